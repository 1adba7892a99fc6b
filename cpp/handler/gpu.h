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
  // Whether such an object exists on this thread: a call on a GPU is under way.
  static bool Entered() noexcept;
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

// Has PyTorch do those copies of a call together that then are fewer launches, and takes them out
// of `copies`. XLA's stream is PyTorch's current one. Needs the GIL. False: a Python exception is
// set.
bool CopyTogether(const Torch& torch, const xla::ffi::RemainingRets& rets, const Target& target,
                  Copies* copies);

// The call on a GPU that this thread is in, for Python code that the call runs.
struct GpuCall {
  int64_t run_id = 0;  // of the program's execution; not positive: unknown
  int64_t site = 0;    // what the program says of the call's token, see NOTE [Sites]; 0: nothing
  int64_t key = 0;     // the site of the prefetch of its key; 0: there is none
  Target target;

  // Null: this thread is in no call on a GPU.
  static const GpuCall* Current() noexcept;
};

// Makes a call the current one of this thread.
class InGpuCall {
 public:
  explicit InGpuCall(GpuCall* call) noexcept;
  InGpuCall(const InGpuCall&) = delete;
  InGpuCall& operator=(const InGpuCall&) = delete;
  ~InGpuCall();

 private:
  const GpuCall* outer_;
};

// Reads 32-bit words of the device, once all is done that the current call's stream holds now; or,
// where the words are a key that was prefetched, once that is done. Needs the GIL, and releases it.
// Returns false where this thread is in no call on a GPU, or with a Python exception set.
bool ReadWords(const void* address, size_t count, std::vector<uint32_t>* words);

}  // namespace bridge

#endif  // CPP_HANDLER_GPU_H_
