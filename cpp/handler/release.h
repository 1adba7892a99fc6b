// Memory of XLA's on a GPU that PyTorch has a tensor of goes back to XLA in the order of streams.
//
// NOTE [Release]. XLA gives an array's memory to its next computation as soon as nothing refers to
// the array, because its stream does one thing after the other. PyTorch's stream may still read it
// then. So before the last tensor's reference goes, XLA's stream is made to wait for PyTorch's: for
// the stream that was the current one when the tensor was made, and for the one that is current on
// the thread on which the tensor dies. Who uses the tensor on other streams has to order them, as
// with tensors of PyTorch's own.

#ifndef CPP_HANDLER_RELEASE_H_
#define CPP_HANDLER_RELEASE_H_

#include <Python.h>

#include <cstdint>

#include "shared/torch.h"

namespace bridge {

// XLA's stream on a device, as the handler has seen it. Null: it has not yet.
void NoteXlaStream(int32_t device, void* stream) noexcept;
void* XlaStream(int32_t device) noexcept;

// Has the release of a DLPack capsule's memory be ordered, where it is on a GPU. The thread's
// current device is the memory's. To be called before PyTorch takes over the capsule, with the GIL.
// False: a Python exception is set.
bool OrderRelease(const Torch& torch, PyObject* capsule);

}  // namespace bridge

#endif  // CPP_HANDLER_RELEASE_H_
