#include "jax2torch/leaves.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "shared/dtypes.h"

namespace bridge {
namespace {

uintptr_t Address(const dl::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
}

struct Leaf {
  View view;
  Owned reference;  // a weak one to the tensor; its callback removes this leaf
  Owned array;
};

struct Leaves {
  std::mutex mutex;  // no Python code runs while it is held
  std::unordered_map<PyObject*, Leaf> by_tensor;
};

Leaves& All() {
  static auto* leaves = new Leaves;  // outlives the interpreter
  return *leaves;
}

// Python calls this when a tensor has died. `self` is its address, `reference` pointed to it.
PyObject* Forget(PyObject* self, PyObject* reference) {
  auto* tensor = static_cast<PyObject*>(PyLong_AsVoidPtr(self));
  std::unordered_map<PyObject*, Leaf>::node_type gone;  // freed after the lock
  {
    Leaves& leaves = All();
    std::lock_guard<std::mutex> lock(leaves.mutex);
    auto found = leaves.by_tensor.find(tensor);
    if (found != leaves.by_tensor.end() && found->second.reference.get() == reference) {
      gone = leaves.by_tensor.extract(found);
    }
  }
  Py_RETURN_NONE;
}

PyMethodDef forget = {"forget_leaf", &Forget, METH_O, nullptr};

}  // namespace

View::View(const dl::Tensor& tensor)
    : address_(Address(tensor)),
      dtype_(tensor.dtype),
      shape_(tensor.shape, tensor.shape + tensor.ndim) {}

bool View::operator==(const dl::Tensor& tensor) const noexcept {
  return address_ == Address(tensor) && dtype_ == tensor.dtype &&
         std::equal(shape_.begin(), shape_.end(), tensor.shape, tensor.shape + tensor.ndim);
}

Owned FindLeaf(PyObject* tensor, const dl::Tensor& view) {
  Leaves& leaves = All();
  std::lock_guard<std::mutex> lock(leaves.mutex);
  auto found = leaves.by_tensor.find(tensor);
  if (found == leaves.by_tensor.end() || !(found->second.view == view)) return Owned();
  return Owned::Borrow(found->second.array.get());
}

bool KeepLeaf(PyObject* tensor, View view, PyObject* array) {
  Owned address = Owned::Steal(PyLong_FromVoidPtr(tensor));
  Owned callback = Owned::Steal(address ? PyCFunction_New(&forget, address.get()) : nullptr);
  Owned reference = Owned::Steal(callback ? PyWeakref_NewRef(tensor, callback.get()) : nullptr);
  if (!reference) return false;
  Leaf leaf{std::move(view), std::move(reference), Owned::Borrow(array)};
  Leaves& leaves = All();
  std::lock_guard<std::mutex> lock(leaves.mutex);
  auto [place, is_new] = leaves.by_tensor.try_emplace(tensor, std::move(leaf));
  if (!is_new) std::swap(place->second, leaf);  // the old one is freed after the lock
  return true;
}

void ForgetLeaves() {
  std::unordered_map<PyObject*, Leaf> gone;
  {
    Leaves& leaves = All();
    std::lock_guard<std::mutex> lock(leaves.mutex);
    gone.swap(leaves.by_tensor);
  }
}

}  // namespace bridge
