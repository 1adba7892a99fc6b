// XLA's buffers as PyTorch tensors, and PyTorch's results into XLA's buffers.

#ifndef CPP_HANDLER_RESULTS_H_
#define CPP_HANDLER_RESULTS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "shared/dlpack_abi.h"
#include "shared/dtypes.h"
#include "shared/guards.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

// How one dtype of kDtypes travels.
struct DtypeRoute {
  Owned dtype;           // torch.dtype; null where this PyTorch has none
  dl::DataType carrier;  // what DLPack sees: the dtype itself, or an integer of its width
  Owned carrier_dtype;   // torch.dtype of that integer; null when nothing has to be reinterpreted
};

// What the handler uses of PyTorch and of the package's Python half. Immutable after setup(). A new
// setup() puts a new one in its place and keeps the old one: calls may be using it.
struct Torch {
  const Torch* previous = nullptr;
  const dl::ExchangeApi* api = nullptr;  // null: tensors travel in DLPack capsules
  bool rocm = false;
  Owned tensor_type, parameter_type, set_grad_enabled, is_grad_enabled, from_dlpack, to_dlpack;
  Owned is_neg, is_conj, swaps_parameters;
  // NOTE [Grad mode]. Two Python calls to switch it and switch it back are a tenth of the cost of a
  // call, so libc10's own functions are used where they are found, by name, in the library that
  // PyTorch has loaded, and where they agree with Python's. Null: through Python.
  bool (*c10_is_grad_enabled)() = nullptr;
  void (*c10_set_grad_enabled)(bool) = nullptr;
  Owned ambient_clean, run_guarded, run_on_stream, current_stream, describe_exception, collect;
  Owned resolve;  // takes an unknown name: registers it and returns "", or says why not
  Owned name_version, name_view, name_detach, name_clone, name_copy, name_resolve_conj,
      name_resolve_neg, name_dtype, name_is_cpu, name_requires_grad, name_is_leaf, zero;
  std::array<DtypeRoute, kDtypes.size()> dtypes;

  // Finds out which dtypes this PyTorch's DLPack refuses. Needs the GIL, and everything above.
  void ChooseRoutes();
  // See NOTE [Grad mode]. Needs the GIL, and the two Python functions.
  void FindGradMode();
};

// Sets PyTorch's grad mode of this thread, and restores what it was.
class GradMode {
 public:
  GradMode(const Torch& torch, bool enabled);
  GradMode(const GradMode&) = delete;
  GradMode& operator=(const GradMode&) = delete;
  // No exception may be pending.
  ~GradMode();
  // False: a Python exception is set.
  bool ok() const noexcept { return ok_; }

 private:
  bool Set(bool enabled) noexcept;

  const Torch& torch_;
  bool before_;
  bool changed_ = false;
  bool ok_ = false;
};

// Tensors that view buffers of XLA for the time of one call.
//
// NOTE [Views and their arena]. The DLPack descriptors live in one allocation of our own, with a
// flag for each. It is owned by this object and once by each tensor's storage, whose deleter sets
// the flag. When the call has dropped its references and a flag is not set, that tensor has
// outlived the call. The arena stays valid until the last late deleter has run, whenever that is,
// on whichever thread.
class Views {
 public:
  // Room for `count` tensors with `ranks` dimensions together.
  Views(size_t count, size_t ranks);
  Views(const Views&) = delete;
  Views& operator=(const Views&) = delete;
  ~Views();

  // Makes the next one. Null: a Python exception is set. Borrowed otherwise.
  PyObject* Add(const Torch& torch, const xla::ffi::AnyBuffer& buffer, dl::Device device);
  PyObject* operator[](size_t i) noexcept { return tensors_[i].get(); }
  void DropTensors() noexcept;
  // The first view whose memory PyTorch has not given back, or their number. After DropTensors.
  size_t FirstKept() const noexcept;

 private:
  struct Arena;
  struct Block;
  friend struct Torch;

  Owned Import(const Torch& torch, void* data, dl::Device device, dl::DataType dtype,
               const int64_t* shape, size_t rank);

  Arena* arena_;
  size_t made_ = 0;
  int64_t* dims_;  // what is left of the room for shapes and strides
  SmallArray<Owned, 8> tensors_;
};

// Where results go. `stream` and `copy` serve GPU buffers.
struct Target {
  dl::Device device;
  void* stream;
};

// One tensor that fn returned, on its way into XLA's buffer.
class Result {
 public:
  enum class Outcome {
    kOk,
    kMismatch,  // message() says what was got
    kPython,    // a Python exception is set
  };

  // Checks type, layout, device, dtype and shape; `object` is borrowed.
  Outcome Read(const Torch& torch, PyObject* object, const xla::ffi::AnyBuffer& expected,
               dl::Device device);
  // Whether the memory that the result views meets [begin, begin + bytes).
  bool Overlaps(const void* begin, size_t bytes) const noexcept;
  // Whether the result is the buffer, element for element.
  bool Is(const void* data) const noexcept { return contiguous_ && data_ == data; }
  bool contiguous() const noexcept { return contiguous_; }
  // Gives the result memory of its own.
  Outcome Detach(const Torch& torch, const xla::ffi::AnyBuffer& expected, dl::Device device);
  Outcome Write(const Torch& torch, const xla::ffi::AnyBuffer& buffer, const Target& target);

  const std::string& message() const noexcept { return message_; }

 private:
  Outcome Mismatch(std::string got);
  // Replaces a lazily conjugated or negated result. False: a Python exception is set.
  bool Resolve(const Torch& torch);

  PyObject* object_ = nullptr;  // borrowed, or kept_
  Owned kept_;     // what replaced the result (resolved, viewed as its carrier, cloned)
  Owned capsule_;  // keeps shape and strides alive where there is no exchange API
  char* data_ = nullptr;
  size_t bytes_ = 0;
  bool contiguous_ = true;
  bool resolved_ = false, cloned_ = false;
  int64_t low_ = 0, high_ = 0;  // bytes touched, relative to data_: [low_, high_)
  std::string message_;
};

bool IsTensor(const Torch& torch, PyObject* object);

// To be called where results of so many bytes are made on a CPU; see NOTE [Large results].
void KeepFreedMemory(size_t bytes);

// `self.name()` or `self.name(argument)`. Null: a Python exception is set.
Owned CallMethod(PyObject* self, PyObject* name, PyObject* argument = nullptr);

// "float32[3,4]"
std::string Describe(const xla::ffi::AnyBuffer& buffer);

}  // namespace bridge

#endif  // CPP_HANDLER_RESULTS_H_
