// RAII for what a call borrows from Python: references, the GIL, thread states. And the calls into
// Python that return such references.

#ifndef CPP_SHARED_GUARDS_H_
#define CPP_SHARED_GUARDS_H_

#include <Python.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <utility>
#include <vector>

namespace bridge {

// An owned reference, or null. It must be destroyed under the GIL.
class Owned {
 public:
  Owned() noexcept = default;
  static Owned Steal(PyObject* object) noexcept { return Owned(object); }
  static Owned Borrow(PyObject* object) noexcept {
    Py_XINCREF(object);
    return Owned(object);
  }
  Owned(Owned&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    PyObject* old = std::exchange(object_, std::exchange(other.object_, nullptr));
    Py_XDECREF(old);  // last: it may run arbitrary code
    return *this;
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }

  PyObject* get() const noexcept { return object_; }
  PyObject* release() noexcept { return std::exchange(object_, nullptr); }
  void reset() noexcept { *this = Owned(); }
  explicit operator bool() const noexcept { return object_ != nullptr; }

 private:
  explicit Owned(PyObject* object) noexcept : object_(object) {}
  PyObject* object_ = nullptr;
};

// The result of `function(*args)`, or null with an exception set.
template <typename... Args>
Owned CallFunction(PyObject* function, Args*... args) noexcept {
  PyObject* vector[] = {nullptr, args...};
  return Owned::Steal(PyObject_Vectorcall(
      function, vector + 1, sizeof...(Args) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

// The result of `self.name(*args)`, or null with an exception set.
template <typename... Args>
Owned CallMethod(PyObject* self, const Owned& name, Args*... args) noexcept {
  PyObject* vector[] = {nullptr, self, args...};
  return Owned::Steal(PyObject_VectorcallMethod(
      name.get(), vector + 1, (1 + sizeof...(Args)) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

// `object.name`, or null with an exception set.
inline Owned GetAttribute(PyObject* object, const Owned& name) noexcept {
  return Owned::Steal(PyObject_GetAttr(object, name.get()));
}

// Answers what `function(argument)` answers: 1 or 0, or -1 with an exception set.
inline int CallPredicate(PyObject* function, PyObject* argument) noexcept {
  Owned answer = CallFunction(function, argument);
  if (!answer) return -1;
  return answer.get() == Py_True ? 1 : 0;
}

// Is set when the interpreter starts to go away. From then on nothing here touches Python.
inline std::atomic<bool> shutting_down{false};

// NOTE [Thread states]. XLA runs handlers on the caller's thread and on threads of its own pools.
// On a pool's thread PyGILState_Ensure would create a thread state at every call, and
// PyGILState_Release would destroy it. So the first call on such a thread takes one extra Ensure
// and keeps it until the thread ends. Later calls find the state and only take the lock. A thread
// that ends after shutdown has begun leaves its state to the interpreter, which frees all of them.
class ThreadState {
 public:
  static void Keep() noexcept {
    thread_local ThreadState state;
    if (state.known_) return;
    state.known_ = true;
    if (PyGILState_GetThisThreadState() != nullptr) return;
    PyGILState_Ensure();
    PyEval_SaveThread();
    state.owned_ = true;
  }
  ThreadState(const ThreadState&) = delete;
  ThreadState& operator=(const ThreadState&) = delete;

 private:
  ThreadState() noexcept = default;
  ~ThreadState() {
    if (!owned_ || shutting_down.load() || Py_IsInitialized() == 0) return;
    PyGILState_Ensure();
    PyGILState_Release(PyGILState_LOCKED);
    PyGILState_Release(PyGILState_UNLOCKED);
  }
  bool known_ = false;
  bool owned_ = false;
};

class GilGuard {
 public:
  GilGuard() noexcept {
    ThreadState::Keep();
    state_ = PyGILState_Ensure();
  }
  GilGuard(const GilGuard&) = delete;
  GilGuard& operator=(const GilGuard&) = delete;
  ~GilGuard() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

class GilRelease {
 public:
  GilRelease() noexcept : state_(PyEval_SaveThread()) {}
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;
  ~GilRelease() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Holds `size` value-initialised elements, on the stack where they are few.
template <typename T, size_t kInline>
class SmallArray {
 public:
  explicit SmallArray(size_t size)
      : heap_(size > kInline ? size : 0), data_(size > kInline ? heap_.data() : inline_.data()) {}
  SmallArray(const SmallArray&) = delete;
  SmallArray& operator=(const SmallArray&) = delete;

  T* data() noexcept { return data_; }
  T& operator[](size_t i) noexcept { return data_[i]; }

 private:
  std::array<T, kInline> inline_{};
  std::vector<T> heap_;
  T* data_;
};

}  // namespace bridge

#endif  // CPP_SHARED_GUARDS_H_
