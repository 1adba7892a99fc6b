// PyTorch's device guard and hooks for a fake GPU, so that autograd runs on threads of the device,
// as it does where there is one. A CPU build of PyTorch has neither for CUDA.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "fake_cuda.h"

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

// A stream's id is its handle, as it is for streams that are not of PyTorch's own pool.
Stream Named(Device device, void* handle) {
  return Stream(Stream::UNSAFE, device, reinterpret_cast<int64_t>(handle));
}

void* HandleOf(const Stream& stream) { return reinterpret_cast<void*>(stream.id()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override {
    return Device(DeviceType::CUDA, static_cast<DeviceIndex>(fake_device()));
  }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) fake_set_device(device.index());
  }
  Stream getStream(Device device) const override {
    return Named(device, fake_torch_stream(device.index()));
  }
  Stream getDefaultStream(Device device) const override { return Named(device, nullptr); }
  Stream getNewStream(Device device, int) const override {
    return Named(device, fake_new_stream(device.index()));
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    fake_set_torch_stream(stream.device_index(), HandleOf(stream));
    return before;
  }
  void* getStreamNativeHandle(const Stream stream) const override { return HandleOf(stream); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  void record(void** event, const Stream& stream, const DeviceIndex index,
              const c10::EventFlag) const override {
    Uncounted own;
    int before = fake_device();
    fake_set_device(index >= 0 ? index : stream.device_index());
    if (*event == nullptr) cuEventCreate(event, 2);
    cuEventRecord(*event, HandleOf(stream));
    fake_set_device(before);
  }
  void block(void* event, const Stream& stream) const override {
    Uncounted own;
    int before = fake_device();
    fake_set_device(stream.device_index());
    if (event != nullptr) cuStreamWaitEvent(HandleOf(stream), event, 0);
    fake_set_device(before);
  }
  bool queryEvent(void* event) const override {
    Uncounted own;
    return event == nullptr || cuEventQuery(event) == 0;
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    Uncounted own;
    if (event != nullptr) cuEventDestroy_v2(event);
  }
  void synchronizeEvent(void* event) const override {
    Uncounted own;
    cuEventSynchronize(event);
  }
  void synchronizeStream(const Stream& stream) const override {
    Uncounted own;
    int before = fake_device();
    fake_set_device(stream.device_index());
    cuStreamSynchronize(HandleOf(stream));
    fake_set_device(before);
  }
};

const Guard guard;
const c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);

}  // namespace

namespace at {
namespace {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return static_cast<DeviceIndex>(fake_device()); }
  DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { fake_set_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    DeviceIndex before = current_device();
    fake_set_device(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return exchangeDevice(device);
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace
}  // namespace at
