#include "handler/release.h"

#include <array>
#include <atomic>
#include <new>

#include "handler/cuda_driver.h"
#include "shared/dlpack_abi.h"
#include "shared/guards.h"

namespace bridge {
namespace {

constexpr size_t kDevices = 64;
std::array<std::atomic<void*>, kDevices> xla_streams{};

// PyTorch's current stream of this thread. Null is the default stream, and also what is not known.
void* TorchStream(const Torch& torch, dl::Device device) noexcept {
  void* stream = nullptr;
  if (torch.api == nullptr ||
      torch.api->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    return nullptr;
  }
  return stream;
}

template <typename Managed>
struct Release {
  void* manager_ctx;
  void (*deleter)(Managed*);
  const Torch* torch;
  void* context;
  void* torch_stream;

  // PyTorch calls this on any thread, with or without the GIL. Nothing here touches Python.
  static void Run(Managed* self) {
    auto* release = static_cast<Release*>(self->manager_ctx);
    const dl::Device device = self->dl_tensor.device;
    void* xla_stream = XlaStream(device.device_id);
    if (xla_stream != nullptr && !shutting_down.load() && Driver::Enter(release->context)) {
      void* current = TorchStream(*release->torch, device);
      // An error is no reason to keep the memory for ever, and nobody could be told.
      Driver::Order(current, xla_stream, device.device_id);
      if (release->torch_stream != current) {
        Driver::Order(release->torch_stream, xla_stream, device.device_id);
      }
      Driver::Leave();
    }
    self->manager_ctx = release->manager_ctx;
    self->deleter = release->deleter;
    delete release;
    if (self->deleter != nullptr) self->deleter(self);
  }
};

template <typename Managed>
bool Order(const Torch& torch, PyObject* capsule, const char* name) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (managed == nullptr) return false;
  const dl::Device device = managed->dl_tensor.device;
  if (device.device_type != dl::kCuda && device.device_type != dl::kRocm) return true;
  auto* release =
      new (std::nothrow) Release<Managed>{managed->manager_ctx, managed->deleter, &torch,
                                          Driver::Context(), TorchStream(torch, device)};
  if (release == nullptr) {
    PyErr_NoMemory();
    return false;
  }
  managed->manager_ctx = release;
  managed->deleter = Release<Managed>::Run;
  return true;
}

}  // namespace

void NoteXlaStream(int32_t device, void* stream) noexcept {
  if (device >= 0 && static_cast<size_t>(device) < kDevices) {
    xla_streams[static_cast<size_t>(device)].store(stream, std::memory_order_relaxed);
  }
}

void* XlaStream(int32_t device) noexcept {
  if (device < 0 || static_cast<size_t>(device) >= kDevices) return nullptr;
  return xla_streams[static_cast<size_t>(device)].load(std::memory_order_relaxed);
}

bool OrderRelease(const Torch& torch, PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, dl::kVersionedCapsuleName)) {
    return Order<dl::ManagedTensorVersioned>(torch, capsule, dl::kVersionedCapsuleName);
  }
  return Order<dl::ManagedTensor>(torch, capsule, dl::kCapsuleName);
}

}  // namespace bridge
