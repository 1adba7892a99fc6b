// Arrays of leaves: JAX imports a tensor that requires gradients once, not at every call.
//
// NOTE [Leaves]. JAX takes ten times as long to import a capsule as PyTorch takes to make one, and
// the same parameters are passed again and again. So we keep the array of a leaf while the leaf
// lives. The array stands for the leaf as long as the leaf is the same view of the same memory.
// What is written there, both see. The array holds a detached tensor, because an array that held
// the leaf would keep it alive. Large leaves are imported each time. That costs little beside what
// is done with them; and a kept array would hold memory that the leaf has given up
// (``p.data = other``) until the next call.

#ifndef CPP_JAX2TORCH_LEAVES_H_
#define CPP_JAX2TORCH_LEAVES_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "shared/dlpack_abi.h"
#include "shared/guards.h"

namespace bridge {

// Larger arrays, in bytes, are not kept.
inline constexpr uint64_t kLargestLeaf = uint64_t{1} << 20;

// The row-major memory that a tensor views.
class View {
 public:
  explicit View(const dl::Tensor& tensor);
  bool operator==(const dl::Tensor& tensor) const noexcept;

 private:
  uintptr_t address_;
  dl::DataType dtype_;
  std::vector<int64_t> shape_;
};

// The array that is kept for `tensor`, if it is that view. Null, without an exception: there is
// none.
Owned FindLeaf(PyObject* tensor, const dl::Tensor& view);

// Keeps `array` until `tensor` dies, in place of an array that is kept already. False: a Python
// exception is set.
bool KeepLeaf(PyObject* tensor, View view, PyObject* array);

// Drops all arrays, because the interpreter ends.
void ForgetLeaves();

}  // namespace bridge

#endif  // CPP_JAX2TORCH_LEAVES_H_
