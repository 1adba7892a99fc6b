#include "handler/errors.h"

#include <string>
#include <utility>

#include "handler/describe.h"

namespace bridge {

namespace ffi = xla::ffi;

Owned TakeException() {
#if PY_VERSION_HEX >= 0x030C0000
  return Owned::Steal(PyErr_GetRaisedException());
#else
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr && value != nullptr) PyException_SetTraceback(value, traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  return Owned::Steal(value);
#endif
}

ffi::Error PythonError(const Torch& torch, const Callable& callable, Owned exception) {
  if (!exception) return ffi::Error::Internal(callable.label + " failed without an exception");
  std::string fallback = callable.label + " raised " + TypeNameOf(exception.get());
  Owned label = Owned::Steal(PyUnicode_DecodeUTF8(
      callable.label.data(), static_cast<Py_ssize_t>(callable.label.size()), "replace"));
  Owned text;
  if (label) {
    text = CallFunction(torch.describe_exception.get(), label.get(), exception.get());
  }
  Py_ssize_t size = 0;
  const char* chars = text ? PyUnicode_AsUTF8AndSize(text.get(), &size) : nullptr;
  std::string message = chars == nullptr ? fallback : std::string(chars, static_cast<size_t>(size));
  PyErr_Clear();
  return ffi::Error::Internal(std::move(message));
}

}  // namespace bridge
