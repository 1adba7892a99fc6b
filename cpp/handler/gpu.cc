#include "handler/gpu.h"

#include <algorithm>

#include "handler/cuda_driver.h"
#include "handler/prefetch.h"
#include "handler/staging.h"
#include "handler/views.h"
#include "shared/dtypes.h"

namespace bridge {
namespace {

thread_local int entered = 0;

}  // namespace

bool CurrentStream::Entered() noexcept { return entered > 0; }

CurrentStream::CurrentStream(const Torch& torch, const Target& target) : torch_(torch) {
  if (!Remember(target)) return;
  Owned id = Owned::Steal(PyLong_FromVoidPtr(target.stream));
  PyObject* type = PyTuple_GetItem(stream_.get(), 2);
  if (!id || type == nullptr) return;
  // This makes the stream's device the current one too.
  set_ =
      static_cast<bool>(CallFunction(torch.set_stream.get(), id.get(), target_device_.get(), type));
  if (set_) ++entered;
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
  --entered;
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

namespace ffi = xla::ffi;

// What one launch of PyTorch's copies at most: tensors, and chunks of so many elements.
constexpr size_t kTensorsPerLaunch = 64, kChunksPerLaunch = 320, kChunk = 65536;
// For fewer copies, what Python does for one launch takes longer than the launches.
constexpr size_t kMany = 4;

// The copies that are from the device and of one dtype, by their places in `copies`; none where
// they are few, or PyTorch would need as many launches for them.
std::vector<size_t> Together(const Torch& torch, const ffi::RemainingRets& rets,
                             const Copies& copies, size_t dtype) {
  std::vector<size_t> found;
  size_t chunks = 0;
  if (torch.dtypes[dtype].carrier_dtype) return found;
  for (size_t i = 0; i < copies.list.size(); ++i) {
    const Copy& copy = copies.list[i];
    ffi::AnyBuffer buffer = **rets.get<ffi::AnyBuffer>(copy.result);
    if (copy.from_host || DtypeIndex(buffer.element_type()) != static_cast<int>(dtype)) continue;
    found.push_back(i);
    chunks += (buffer.element_count() + kChunk - 1) / kChunk;
  }
  const size_t launches = std::max((found.size() + kTensorsPerLaunch - 1) / kTensorsPerLaunch,
                                   (chunks + kChunksPerLaunch - 1) / kChunksPerLaunch);
  if (found.size() < kMany || launches >= found.size()) found.clear();
  return found;
}

bool CopyAll(const Torch& torch, const ffi::RemainingRets& rets, const Target& target,
             const Copies& copies, const std::vector<size_t>& places) {
  size_t ranks = 0;
  auto buffer = [&](size_t i) { return **rets.get<ffi::AnyBuffer>(copies.list[places[i]].result); };
  for (size_t i = 0; i < places.size(); ++i) ranks += buffer(i).dimensions().size();
  Views views(places.size(), ranks);
  const auto size = static_cast<Py_ssize_t>(places.size());
  Owned to = Owned::Steal(PyList_New(size)), from = Owned::Steal(to ? PyList_New(size) : nullptr);
  if (!from) return false;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto at = static_cast<Py_ssize_t>(i);
    Owned view = Owned::Borrow(views.Add(torch, buffer(i), target.device));
    if (!view || PyList_SetItem(to.get(), at, view.release()) != 0) return false;
    Owned source = Owned::Borrow(copies.list[places[i]].tensor);
    if (PyList_SetItem(from.get(), at, source.release()) != 0) return false;
  }
  NoGrad grad(torch);
  return grad.ok() && CallFunction(torch.copy_all.get(), to.get(), from.get());
}

}  // namespace

bool CopyTogether(const Torch& torch, const ffi::RemainingRets& rets, const Target& target,
                  Copies* copies) {
  if (!torch.copy_all || copies->list.size() < kMany) return true;
  for (size_t dtype = 0; dtype < kDtypes.size(); ++dtype) {
    std::vector<size_t> places = Together(torch, rets, *copies, dtype);
    if (places.empty()) continue;
    if (!CopyAll(torch, rets, target, *copies, places)) return false;
    for (size_t i = places.size(); i-- > 0;) {
      copies->list.erase(copies->list.begin() + static_cast<std::ptrdiff_t>(places[i]));
    }
  }
  return true;
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
