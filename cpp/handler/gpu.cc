#include "handler/gpu.h"

#include "handler/cuda_driver.h"
#include "handler/prefetch.h"
#include "handler/staging.h"

namespace bridge {

CurrentStream::CurrentStream(const Torch& torch, const Target& target) : torch_(torch) {
  if (!Remember(target)) return;
  Owned id = Owned::Steal(PyLong_FromVoidPtr(target.stream));
  PyObject* type = PyTuple_GetItem(stream_.get(), 2);
  if (!id || type == nullptr) return;
  // This makes the stream's device the current one too.
  set_ =
      static_cast<bool>(CallFunction(torch.set_stream.get(), id.get(), target_device_.get(), type));
}

bool CurrentStream::Remember(const Target& target) {
  target_device_ = Owned::Steal(PyLong_FromLong(target.device.device_id));
  if (!target_device_) return false;
  if (!torch_.gpu_ready.load()) {
    if (!Owned::Steal(PyObject_CallNoArgs(torch_.init_gpu.get()))) return false;
    torch_.gpu_ready.store(true);
  }
  device_ = Owned::Steal(PyObject_CallNoArgs(torch_.get_device.get()));
  if (device_) stream_ = CallFunction(torch_.get_stream.get(), target_device_.get());
  if (!stream_) return false;
  if (torch_.api != nullptr) {
    return torch_.api->current_work_stream(target.device.device_type, target.device.device_id,
                                           &handle_) == 0;
  }
  Owned handle = CallFunction(torch_.get_raw_stream.get(), target_device_.get());
  if (handle) handle_ = PyLong_AsVoidPtr(handle.get());
  return PyErr_Occurred() == nullptr;
}

CurrentStream::~CurrentStream() {
  if (!set_) return;
  Owned restored =
      CallFunction(torch_.set_stream.get(), PyTuple_GetItem(stream_.get(), 0),
                   PyTuple_GetItem(stream_.get(), 1), PyTuple_GetItem(stream_.get(), 2));
  const int same = PyObject_RichCompareBool(device_.get(), target_device_.get(), Py_EQ);
  if (same == 0) restored = CallFunction(torch_.set_device.get(), device_.get());
  PyErr_Clear();
}

std::string GpuWork::Begin() {
  GilRelease release;
  begun_ = true;
  return Driver::Order(torch_stream_, target_.stream, target_.device.device_id);
}

std::string GpuWork::End(const std::vector<Copy>& copies) {
  GilRelease release;
  const int32_t device = target_.device.device_id;
  std::string error;
  for (const Copy& copy : copies) {
    error = copy.from_host
                ? Staging::ToDevice(copy.to, copy.from, copy.bytes, device, target_.stream)
                : Driver::Copy(copy.to, copy.from, copy.bytes, target_.stream);
    if (!error.empty()) break;
  }
  ended_ = true;
  std::string unordered = Driver::Order(target_.stream, torch_stream_, device);
  return error.empty() ? unordered : error;
}

GpuWork::~GpuWork() {
  if (begun_ && !ended_) End({});
}

namespace {

thread_local const GpuCall* current_call = nullptr;

}  // namespace

const GpuCall* GpuCall::Current() noexcept { return current_call; }

InGpuCall::InGpuCall(GpuCall* call) noexcept : outer_(current_call) { current_call = call; }

InGpuCall::~InGpuCall() { current_call = outer_; }

bool ReadWords(const void* address, size_t count, std::vector<uint32_t>* words) {
  const GpuCall* call = current_call;
  const size_t bytes = count * sizeof(uint32_t);
  if (call == nullptr || bytes > Staging::kMostBytes) return false;
  words->resize(count);
  std::string error;
  {
    GilRelease release;
    const int32_t device = call->target.device.device_id;
    if (!TakeKey(call->run_id, device, call->key, address, words, &error)) {
      error = Staging::ToHost(words->data(), address, bytes, device, call->target.stream);
    }
  }
  if (error.empty()) return true;
  PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return false;
}

}  // namespace bridge
