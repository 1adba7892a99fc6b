// Where PyTorch calls JAX: tensors to arrays and back, and which of them ask for a gradient.

#ifndef CPP_JAX2TORCH_TRANSFER_H_
#define CPP_JAX2TORCH_TRANSFER_H_

#include <Python.h>

#include "handler/results.h"

namespace bridge {

// What imports a tensor; all borrowed.
struct Importer {
  PyObject* import_capsule;  // (capsule, device, None) -> array
  PyObject* device;
  PyObject* is_pinned;  // None: nothing is pinned here
  PyObject* other;      // (tensor, i) -> array: of whatever is not plain
  bool x64;
};

// (list of arrays, number of tensors, whether there are any and all of them on a CPU) of a
// sequence; other values than tensors pass. Null: a Python exception is set.
Owned ToArrays(const Torch& torch, PyObject* operands, const Importer& importer);

// A tuple of the tensors that `export_capsule` makes of arrays. Null: a Python exception is set.
Owned ToTensors(const Torch& torch, PyObject* arrays, PyObject* export_capsule);

// A tuple of the indices of tensors that require a gradient. Null: a Python exception is set.
Owned RequiringGrad(const Torch& torch, PyObject* operands);

}  // namespace bridge

#endif  // CPP_JAX2TORCH_TRANSFER_H_
