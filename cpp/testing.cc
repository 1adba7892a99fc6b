#include "testing.h"

#include <Python.h>

#include <array>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "handler/registry.h"
#include "shared/guards.h"

namespace bridge::testing {
namespace {

std::atomic<bool> armed{false};
std::atomic<size_t> steps{0};
std::atomic<size_t> failing{kNever};
std::array<std::atomic<const char*>, 4096> names;

// Whether the call that is about to be made fails.
bool Fails(const char* name) noexcept {
  if (!armed.load()) return false;
  const size_t step = steps.fetch_add(1);
  if (step < names.size()) names[step].store(name);
  return step == failing.load();
}

dl::ExchangeApi real_api, watched_api;

// Where it fails, it makes the tensor and drops it, so that the memory which the tensor took over
// is given back.
int ToPyObject(dl::ManagedTensorVersioned* tensor, void** out) {
  const bool fails = Fails("managed_tensor_to_py_object_no_sync");
  if (int status = real_api.managed_tensor_to_py_object_no_sync(tensor, out); status != 0) {
    return status;
  }
  if (!fails) return 0;
  Owned::Steal(static_cast<PyObject*>(*out)).reset();
  PyErr_NoMemory();
  return -1;
}

int FromPyObject(void* py_object, dl::Tensor* out) {
  if (!Fails("dltensor_from_py_object_no_sync")) {
    return real_api.dltensor_from_py_object_no_sync(py_object, out);
  }
  PyErr_NoMemory();
  return -1;
}

}  // namespace

void Arm(size_t fails) noexcept {
  steps.store(0);
  failing.store(fails);
  armed.store(true);
}

std::vector<std::string> Disarm() {
  armed.store(false);
  std::vector<std::string> made;
  for (size_t i = 0; i < steps.load() && i < names.size(); ++i) made.emplace_back(names[i].load());
  return made;
}

const dl::ExchangeApi* Watched(const dl::ExchangeApi* api) {
  if (api == nullptr) return nullptr;
  real_api = *api;
  watched_api = *api;
  watched_api.managed_tensor_to_py_object_no_sync = ToPyObject;
  watched_api.dltensor_from_py_object_no_sync = FromPyObject;
  return &watched_api;
}

void StressRegistry(size_t threads, size_t rounds) {
  std::atomic<size_t> wrong{0};
  // Neighbours share a name, so that each meets the other's entry. No entry has a Python object.
  auto work = [&](size_t i) {
    for (size_t k = 0; k < rounds; ++k) {
      auto callable = std::make_shared<Callable>();
      callable->name = "stress/" + std::to_string(i / 2);
      const bool added = Registry::Add(callable);
      for (size_t j = 0; j < threads; ++j) {
        const std::string name = "stress/" + std::to_string(j / 2);
        Found found = Registry::Find(name);
        const bool own = added && j / 2 == i / 2;
        if (found.callable ? found.callable->name != name : own) wrong.fetch_add(1);
        if (found.callable) found.callable->calls.fetch_add(1, std::memory_order_relaxed);
        if (own && found.callable != callable) wrong.fetch_add(1);
        if (found.run) wrong.fetch_add(1);
      }
      Registry::Withdraw(*callable);
    }
  };
  {
    GilRelease release;
    std::vector<std::thread> running;
    for (size_t i = 0; i < threads; ++i) running.emplace_back(work, i);
    for (std::thread& thread : running) thread.join();
  }
  if (wrong.load() != 0) {
    throw std::runtime_error(std::to_string(wrong.load()) + " look-ups went wrong");
  }
}

}  // namespace bridge::testing

// The linker has these called in place of the functions themselves. Each name is also in
// CMakeLists.txt.

using bridge::testing::Fails;

extern "C" {

#define FAILS_INSTEAD(Type, name, parameters, arguments, failure) \
  Type __real_##name parameters;                                  \
  Type __wrap_##name parameters {                                 \
    if (!Fails(#name)) return __real_##name arguments;            \
    PyErr_NoMemory();                                             \
    return failure;                                               \
  }

FAILS_INSTEAD(PyObject*, PyTuple_New, (Py_ssize_t size), (size), nullptr)
FAILS_INSTEAD(PyObject*, PyList_New, (Py_ssize_t size), (size), nullptr)
FAILS_INSTEAD(PyObject*, PyList_AsTuple, (PyObject * list), (list), nullptr)
FAILS_INSTEAD(PyObject*, PySequence_GetItem, (PyObject * object, Py_ssize_t i), (object, i),
              nullptr)
FAILS_INSTEAD(PyObject*, PyLong_FromSsize_t, (Py_ssize_t value), (value), nullptr)
FAILS_INSTEAD(PyObject*, PyLong_FromVoidPtr, (void* value), (value), nullptr)
FAILS_INSTEAD(PyObject*, PyWeakref_NewRef, (PyObject * object, PyObject* callback),
              (object, callback), nullptr)
FAILS_INSTEAD(PyObject*, PyLong_FromLong, (long value), (value), nullptr)
FAILS_INSTEAD(PyObject*, PyObject_Str, (PyObject * object), (object), nullptr)
FAILS_INSTEAD(PyObject*, PySequence_List, (PyObject * object), (object), nullptr)
FAILS_INSTEAD(PyObject*, PyObject_GetAttr, (PyObject * object, PyObject* name), (object, name),
              nullptr)
FAILS_INSTEAD(PyObject*, PyObject_GetAttrString, (PyObject * object, const char* name),
              (object, name), nullptr)
FAILS_INSTEAD(int, PyObject_IsTrue, (PyObject * object), (object), -1)
FAILS_INSTEAD(PyObject*, PyUnicode_DecodeUTF8,
              (const char* chars, Py_ssize_t size, const char* errors), (chars, size, errors),
              nullptr)
FAILS_INSTEAD(PyObject*, PyUnicode_FromStringAndSize, (const char* chars, Py_ssize_t size),
              (chars, size), nullptr)
FAILS_INSTEAD(const char*, PyUnicode_AsUTF8AndSize, (PyObject * text, Py_ssize_t* size),
              (text, size), nullptr)
FAILS_INSTEAD(PyObject*, PyCapsule_New,
              (void* pointer, const char* name, PyCapsule_Destructor destructor),
              (pointer, name, destructor), nullptr)
FAILS_INSTEAD(void*, PyCapsule_GetPointer, (PyObject * capsule, const char* name), (capsule, name),
              nullptr)
FAILS_INSTEAD(PyObject*, PyCMethod_New,
              (PyMethodDef * definition, PyObject* self, PyObject* module, PyTypeObject* type),
              (definition, self, module, type), nullptr)
FAILS_INSTEAD(PyObject*, PyObject_VectorcallMethod,
              (PyObject * name, PyObject* const* arguments, size_t count, PyObject* keywords),
              (name, arguments, count, keywords), nullptr)

// Where it fails, it makes the call and loses the result.
PyObject* __real_PyObject_Vectorcall(PyObject* function, PyObject* const* arguments, size_t count,
                                     PyObject* keywords);
PyObject* __wrap_PyObject_Vectorcall(PyObject* function, PyObject* const* arguments, size_t count,
                                     PyObject* keywords) {
  PyObject* result = __real_PyObject_Vectorcall(function, arguments, count, keywords);
  if (result == nullptr || !Fails("PyObject_Vectorcall")) return result;
  Py_DECREF(result);
  return PyErr_NoMemory();
}

void* __real_malloc(size_t size);
void* __wrap_malloc(size_t size) { return Fails("malloc") ? nullptr : __real_malloc(size); }

// operator new
void* __real__Znwm(size_t size);
void* __wrap__Znwm(size_t size) {
  if (Fails("operator new")) throw std::bad_alloc();
  return __real__Znwm(size);
}

}  // extern "C"
