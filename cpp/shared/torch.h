// What the extension uses of PyTorch and of the package's Python half.

#ifndef CPP_SHARED_TORCH_H_
#define CPP_SHARED_TORCH_H_

#include <Python.h>

#include <array>
#include <atomic>

#include "shared/dlpack_abi.h"
#include "shared/dtypes.h"
#include "shared/guards.h"

namespace bridge {

// How one dtype of kDtypes travels.
struct DtypeRoute {
  Owned dtype;           // torch.dtype; null where this PyTorch has none
  dl::DataType carrier;  // what DLPack sees: the dtype itself, or an integer of its width
  Owned carrier_dtype;   // torch.dtype of that integer; null where nothing is reinterpreted
};

// Is immutable after setup(). A new setup() puts a new one in its place and keeps the old one,
// because calls may be using it.
struct Torch {
  const Torch* previous = nullptr;
  const dl::ExchangeApi* api = nullptr;  // null: tensors travel in DLPack capsules
  bool rocm = false;
  Owned tensor_type, parameter_type, set_grad_enabled, is_grad_enabled, from_dlpack, to_dlpack;
  Owned is_neg, is_conj, swaps_parameters;
  // NOTE [Grad mode]. The two Python calls that switch grad mode off and on again are a tenth of
  // the cost of a call. So we use libc10's own functions: we look them up by name in the library
  // that PyTorch has loaded, and take them where they agree with Python's. Where these are null,
  // grad mode is switched through Python.
  bool (*c10_is_grad_enabled)() = nullptr;
  void (*c10_set_grad_enabled)(bool) = nullptr;
  Owned ambient_clean, run_guarded, describe_exception, collect;
  Owned out_of_memory, make_room, copy_all;  // the last two may be null
  // Null where this PyTorch has no GPU support. See NOTE [Current stream].
  Owned set_stream, get_stream, get_raw_stream, get_device, set_device, init_gpu;
  mutable std::atomic<bool> gpu_ready{false};  // whether `init_gpu` has been called
  Owned resolve;  // registers an unknown name and returns "", or says why it cannot; may be null
  Owned name_version, name_view, name_detach, name_clone, name_contiguous, name_copy,
      name_resolve_conj, name_resolve_neg, name_dtype, name_is_cpu, name_requires_grad,
      name_is_leaf, name_untyped_storage, name_settle, zero;
  std::array<DtypeRoute, kDtypes.size()> dtypes;

  // See NOTE [Grad mode]. Needs the GIL and the two Python functions.
  void FindGradMode();
};

// Takes ownership. Later calls use `torch`; calls under way keep the one that they have. Needs the
// GIL.
void SetTorch(Torch* torch) noexcept;
// Null before setup().
const Torch* GetTorch() noexcept;

bool IsTensor(const Torch& torch, PyObject* object);

// Switches PyTorch's grad mode of this thread off, and restores what it was.
class NoGrad {
 public:
  explicit NoGrad(const Torch& torch);
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;
  // No exception may be pending.
  ~NoGrad();
  // False: a Python exception is set.
  bool ok() const noexcept { return ok_; }

 private:
  bool Set(bool enabled) noexcept;

  const Torch& torch_;
  bool before_;
  bool ok_ = false;
};

}  // namespace bridge

#endif  // CPP_SHARED_TORCH_H_
