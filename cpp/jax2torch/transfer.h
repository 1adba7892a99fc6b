// Calls of JAX from PyTorch: turns tensors into arrays and back, and finds those that require a
// gradient.

#ifndef CPP_JAX2TORCH_TRANSFER_H_
#define CPP_JAX2TORCH_TRANSFER_H_

#include <Python.h>

#include "shared/torch.h"

namespace bridge {

// What imports a tensor. All references are borrowed.
struct Importer {
  PyObject* import_capsule;  // (capsule, device, stream or None) -> array
  PyObject* cpu;             // JAX's CPU; None where it has none
  PyObject* gpu;             // (number) -> (device, stream) of a GPU, or None where JAX lacks it
  PyObject* is_pinned;       // (tensor) -> bool; None where no memory is pinned
  PyObject* other;           // (tensor, i) -> array, for tensors that XLA cannot read in place
  bool x64;                  // whether 64-bit dtypes may pass
};

// Makes a list of a sequence, with arrays in place of tensors; other values stay. Returns (list,
// number of tensors, place). The place is -1 where there are tensors and all of them are on a CPU,
// the number of a GPU where all of them are on it and could be read in place, and else None. Null:
// a Python exception is set.
//
// NOTE [One event]. On a GPU what XLA reads must wait for what PyTorch has queued. One event does
// that for all tensors of a call: before the first is imported, the stream on which XLA looks for
// such events waits for PyTorch's current one.
Owned ToArrays(const Torch& torch, PyObject* operands, const Importer& importer);

// A tuple of the tensors that `export_capsule` makes of arrays at `place`, as ToArrays tells it.
// PyTorch's current stream of a GPU waits for the arrays. Null: a Python exception is set.
Owned ToTensors(const Torch& torch, PyObject* arrays, PyObject* export_capsule, int place);

// A tuple of the indices of tensors that require a gradient. Null: a Python exception is set.
Owned RequiringGrad(const Torch& torch, PyObject* operands);

}  // namespace bridge

#endif  // CPP_JAX2TORCH_TRANSFER_H_
