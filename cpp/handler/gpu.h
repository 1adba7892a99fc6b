// What a call on a GPU has around it: streams, and copies of results.

#ifndef CPP_HANDLER_GPU_H_
#define CPP_HANDLER_GPU_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "handler/results.h"
#include "shared/guards.h"
#include "shared/torch.h"

namespace bridge {

// Makes XLA's stream PyTorch's current one of this thread, and restores what was. Needs the GIL.
//
// NOTE [Current stream]. Nothing of PyTorch is linked, and Python's context managers for streams
// cost more than a small call. So we call the functions of torch._C that they call. A stream that
// is not PyTorch's own has its handle for an id.
class CurrentStream {
 public:
  CurrentStream(const Torch& torch, const Target& target);
  CurrentStream(const CurrentStream&) = delete;
  CurrentStream& operator=(const CurrentStream&) = delete;
  // No exception may be pending.
  ~CurrentStream();
  // False: a Python exception is set.
  bool ok() const noexcept { return set_; }
  // The handle of the stream that was the current one.
  void* before() const noexcept { return handle_; }

 private:
  bool Remember(const Target& target);

  const Torch& torch_;
  void* handle_ = nullptr;
  Owned stream_;  // (id, device, device type) of the stream that was current on the device
  Owned device_;  // the device that was current
  Owned target_device_;
  bool set_ = false;
};

// The order of a call's work: after all that PyTorch has queued, and before all that it queues
// next. The functions are called with the GIL and release it.
class GpuWork {
 public:
  GpuWork(void* torch_stream, const Target& target)
      : torch_stream_(torch_stream), target_(target) {}
  GpuWork(const GpuWork&) = delete;
  GpuWork& operator=(const GpuWork&) = delete;
  ~GpuWork();

  // Both return an empty text, or what went wrong.
  std::string Begin();
  // Queues the copies of results, and has PyTorch's stream wait for all of the call.
  std::string End(const std::vector<Copy>& copies);

 private:
  void* torch_stream_;
  Target target_;
  bool begun_ = false, ended_ = false;
};

}  // namespace bridge

#endif  // CPP_HANDLER_GPU_H_
