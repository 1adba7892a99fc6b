// PyTorch's results into XLA's buffers.

#ifndef CPP_HANDLER_RESULTS_H_
#define CPP_HANDLER_RESULTS_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "shared/dlpack_abi.h"
#include "shared/guards.h"
#include "shared/torch.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

// Where results go.
struct Target {
  dl::Device device;
  void* stream;  // on a GPU; else null
};

// A copy that is left to do on a GPU, into XLA's buffer.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool from_host;    // else from the same device
  PyObject* tensor;  // borrowed: what was returned
  size_t result;     // which result it is
};

// The copies of a call, and what has to live until they are queued.
struct Copies {
  std::vector<Copy> list;
  std::vector<Owned> kept;
};

// One tensor that fn returned, on its way into XLA's buffer.
class Result {
 public:
  enum class Outcome {
    kOk,
    kMismatch,  // message() says what was got
    kPython,    // a Python exception is set
  };

  // Checks type, layout, device, dtype and shape. `object` is borrowed.
  Outcome Read(const Torch& torch, PyObject* object, const xla::ffi::AnyBuffer& expected,
               dl::Device device);
  // Whether the result views memory in [begin, begin + bytes).
  bool Overlaps(const void* begin, size_t bytes) const noexcept;
  // Whether the result is the buffer, element for element.
  bool Is(const void* data) const noexcept { return contiguous_ && data_ == data; }
  bool contiguous() const noexcept { return contiguous_; }
  // Copies the result to memory of its own.
  Outcome Detach(const Torch& torch, const xla::ffi::AnyBuffer& expected, dl::Device device);
  // Copies the result into the buffer. On a GPU, copies that the driver can do go to `copies`.
  Outcome Write(const Torch& torch, const xla::ffi::AnyBuffer& buffer, const Target& target,
                Copies* copies);
  // Which result of its call it is, for copies.
  void SetIndex(size_t index) noexcept { index_ = index; }

  const std::string& message() const noexcept { return message_; }

 private:
  Outcome Mismatch(std::string got);
  // Replaces a lazily conjugated or negated result. False: a Python exception is set.
  bool Resolve(const Torch& torch);
  [[gnu::cold]] Outcome WriteOnGpu(const Torch& torch, const xla::ffi::AnyBuffer& buffer,
                                   const Target& target, Copies* copies);
  // Has PyTorch copy what is not contiguous.
  Outcome Gather(const Torch& torch, const xla::ffi::AnyBuffer& buffer, const Target& target);

  PyObject* object_ = nullptr;  // borrowed, or kept_
  size_t index_ = 0;
  Owned kept_;     // what replaced the result (resolved, viewed as its carrier, cloned)
  Owned capsule_;  // keeps shape and strides alive where there is no exchange API
  char* data_ = nullptr;
  size_t bytes_ = 0;
  bool contiguous_ = true;
  bool resolved_ = false, cloned_ = false;
  bool on_host_ = false;        // where the buffer is on a GPU
  int64_t low_ = 0, high_ = 0;  // the bytes that it views are data_ + [low_, high_)
  std::string message_;
};

}  // namespace bridge

#endif  // CPP_HANDLER_RESULTS_H_
