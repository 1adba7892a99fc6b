// Arrays of leaves: a tensor that asks for gradients is imported into JAX once, not at every call.
//
// NOTE [Leaves]. JAX takes ten times as long to import a capsule as PyTorch to make one, and
// parameters are passed again and again. So the array of a leaf is kept while the leaf lives, and
// stands for it as long as it is the same view of the same memory; what is written there, both see.
// The array holds a detached tensor: one that held the leaf would keep it alive. Large leaves are
// imported each time: that is nothing beside what is done with them, and memory that a leaf has
// given up (``p.data = other``) would be held until the next call.

#ifndef CPP_JAX2TORCH_LEAVES_H_
#define CPP_JAX2TORCH_LEAVES_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "shared/dlpack_abi.h"
#include "shared/guards.h"

namespace bridge {

// Arrays of more bytes are not kept.
inline constexpr uint64_t kLargestLeaf = uint64_t{1} << 20;

// Which row-major memory a tensor views.
class View {
 public:
  explicit View(const dl::Tensor& tensor);
  bool operator==(const dl::Tensor& tensor) const noexcept;

 private:
  uintptr_t address_;
  dl::DataType dtype_;
  std::vector<int64_t> shape_;
};

// The array that is kept for `tensor`, if it is that view; null without an exception: there is
// none.
Owned FindLeaf(PyObject* tensor, const dl::Tensor& view);

// Keeps `array` until `tensor` dies, instead of one that is kept already. False: a Python exception
// is set.
bool KeepLeaf(PyObject* tensor, View view, PyObject* array);

// Lets all arrays go: the interpreter ends.
void ForgetLeaves();

}  // namespace bridge

#endif  // CPP_JAX2TORCH_LEAVES_H_
