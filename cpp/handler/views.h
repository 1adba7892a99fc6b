// XLA's buffers as PyTorch tensors.

#ifndef CPP_HANDLER_VIEWS_H_
#define CPP_HANDLER_VIEWS_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>

#include "shared/dlpack_abi.h"
#include "shared/guards.h"
#include "shared/torch.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

// Tensors that view buffers of XLA for the time of one call.
//
// NOTE [Views and their arena]. The DLPack descriptors live in one allocation of our own, with a
// flag for each. This object owns the allocation once, and each tensor's storage owns it once more.
// The storage's deleter sets the flag. Where the call has dropped its references and a flag is not
// set, that tensor has outlived the call. The arena stays valid until the last late deleter has
// run, whenever that is and on whichever thread.
class Views {
 public:
  // Makes room for `count` tensors that have `ranks` dimensions together.
  Views(size_t count, size_t ranks);
  Views(const Views&) = delete;
  Views& operator=(const Views&) = delete;
  ~Views();

  // Makes the next tensor, which stays ours. Null: a Python exception is set.
  PyObject* Add(const Torch& torch, const xla::ffi::AnyBuffer& buffer, dl::Device device);
  // Makes the next tensor, which is the caller's, of memory and a dtype that DLPack names. Null:
  // the memory was refused; a Python exception is set.
  Owned Import(const Torch& torch, void* data, dl::Device device, dl::DataType dtype,
               const int64_t* shape, size_t rank);
  PyObject* operator[](size_t i) noexcept { return tensors_[i].get(); }
  size_t made() const noexcept { return made_; }
  void DropTensors() noexcept;
  // The index of the first view whose memory PyTorch has not given back; their number where there
  // is none. After DropTensors.
  size_t FirstKept() const noexcept;

 private:
  struct Arena;
  struct Block;

  Arena* arena_;
  size_t made_ = 0;
  int64_t* dims_;  // what is left of the room for shapes and strides
  SmallArray<Owned, 8> tensors_;
};

}  // namespace bridge

#endif  // CPP_HANDLER_VIEWS_H_
