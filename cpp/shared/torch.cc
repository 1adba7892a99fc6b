#include "shared/torch.h"

#include <dlfcn.h>

#include <atomic>

namespace bridge {
namespace {

std::atomic<const Torch*> current_torch{nullptr};

}  // namespace

void SetTorch(Torch* torch) noexcept {
  torch->previous = current_torch.load(std::memory_order_acquire);
  current_torch.store(torch, std::memory_order_release);
}

const Torch* GetTorch() noexcept { return current_torch.load(std::memory_order_acquire); }

bool IsTensor(const Torch& torch, PyObject* object) {
  auto* type = reinterpret_cast<PyTypeObject*>(torch.tensor_type.get());
  return Py_TYPE(object) == type || PyType_IsSubtype(Py_TYPE(object), type);
}

void Torch::FindGradMode() {
#ifdef __APPLE__
  void* library = dlopen("@rpath/libc10.dylib", RTLD_NOW | RTLD_NOLOAD);
#else
  void* library = dlopen("libc10.so", RTLD_NOW | RTLD_NOLOAD);
#endif
  if (library == nullptr) return;
  auto is_enabled = reinterpret_cast<bool (*)()>(dlsym(library, "_ZN3c108GradMode10is_enabledEv"));
  auto set_enabled =
      reinterpret_cast<void (*)(bool)>(dlsym(library, "_ZN3c108GradMode11set_enabledEb"));
  if (is_enabled == nullptr || set_enabled == nullptr) return;
  const bool before = is_enabled();
  bool agree = true;
  for (bool enabled : {!before, before}) {
    set_enabled(enabled);
    Owned answer = CallFunction(is_grad_enabled.get());
    agree = agree && answer.get() == (enabled ? Py_True : Py_False);
  }
  PyErr_Clear();
  if (!agree) return;
  c10_is_grad_enabled = is_enabled;
  c10_set_grad_enabled = set_enabled;
}

NoGrad::NoGrad(const Torch& torch) : torch_(torch) {
  if (torch.c10_is_grad_enabled != nullptr) {
    before_ = torch.c10_is_grad_enabled();
  } else {
    Owned before = CallFunction(torch.is_grad_enabled.get());
    before_ = before.get() == Py_True;
    if (!before) return;
  }
  ok_ = !before_ || Set(false);
}

// Restores the mode also where switching it off reported an error.
NoGrad::~NoGrad() {
  if (before_ && !Set(true)) PyErr_Clear();
}

bool NoGrad::Set(bool enabled) noexcept {
  if (torch_.c10_set_grad_enabled != nullptr) {
    torch_.c10_set_grad_enabled(enabled);
    return true;
  }
  return static_cast<bool>(
      CallFunction(torch_.set_grad_enabled.get(), enabled ? Py_True : Py_False));
}

}  // namespace bridge
