// Calls of JAX from PyTorch: turns tensors into arrays and back, and finds those that require a
// gradient.

#ifndef CPP_JAX2TORCH_TRANSFER_H_
#define CPP_JAX2TORCH_TRANSFER_H_

#include <Python.h>

#include "shared/torch.h"

namespace bridge {

// What imports a tensor. All references are borrowed.
struct Importer {
  PyObject* import_capsule;  // (capsule, device, None) -> array
  PyObject* device;
  PyObject* is_pinned;  // (tensor) -> bool; None where no memory is pinned
  PyObject* other;      // (tensor, i) -> array, for tensors that XLA cannot read in place
  bool x64;             // whether 64-bit dtypes may pass
};

// Makes a list of a sequence, with arrays in place of tensors; other values stay. Returns (list,
// number of tensors, whether there are any and all of them are on a CPU). Null: a Python exception
// is set.
Owned ToArrays(const Torch& torch, PyObject* operands, const Importer& importer);

// A tuple of the tensors that `export_capsule` makes of arrays. Null: a Python exception is set.
Owned ToTensors(const Torch& torch, PyObject* arrays, PyObject* export_capsule);

// A tuple of the indices of tensors that require a gradient. Null: a Python exception is set.
Owned RequiringGrad(const Torch& torch, PyObject* operands);

}  // namespace bridge

#endif  // CPP_JAX2TORCH_TRANSFER_H_
