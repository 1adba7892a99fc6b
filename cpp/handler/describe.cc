#include "handler/describe.h"

#include "shared/dtypes.h"
#include "shared/guards.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

std::string ToString(PyObject* object) {
  Owned text = Owned::Steal(object == nullptr ? nullptr : PyObject_Str(object));
  const char* chars = text ? PyUnicode_AsUTF8AndSize(text.get(), nullptr) : nullptr;
  std::string result = chars == nullptr ? "?" : chars;
  PyErr_Clear();
  return result;
}

std::string Attribute(PyObject* object, const char* name) {
  Owned value = Owned::Steal(PyObject_GetAttrString(object, name));
  return ToString(value.get());
}

}  // namespace

std::string TypeNameOf(PyObject* object) {
  return Attribute(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__");
}

std::string TypeName(PyObject* object) {
  std::string name = TypeNameOf(object);
  return (name.find_first_of("AEIOUaeiou") == 0 ? "an object of type " : "a ") + name;
}

std::string Shape(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) {
    if (i != 0) text += ',';
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

std::string DeviceName(dl::Device device) {
  switch (device.device_type) {
    case dl::kCpu:
    case dl::kCudaHost:
    case dl::kRocmHost:
      return "cpu";
    case dl::kCuda:
    case dl::kRocm:
    case dl::kCudaManaged:
      return "cuda:" + std::to_string(device.device_id);
  }
  return "device " + std::to_string(static_cast<int>(device.device_type));
}

std::string Describe(const ffi::AnyBuffer& buffer) {
  int index = DtypeIndex(buffer.element_type());
  std::string name =
      index == kNoDtype ? "an unknown dtype" : kDtypes[static_cast<size_t>(index)].name;
  return name + Shape(buffer.dimensions().begin(), buffer.dimensions().size());
}

std::string DescribeTensor(PyObject* tensor) {
  PyErr_Clear();  // DLPack's refusal
  auto strip = [](std::string text) {
    return text.compare(0, 6, "torch.") == 0 ? text.substr(6) : text;
  };
  Owned shape = Owned::Steal(PyObject_GetAttrString(tensor, "shape"));
  Owned list = Owned::Steal(shape ? PySequence_List(shape.get()) : nullptr);
  std::string dims = ToString(list.get());
  std::string compact;
  for (char c : dims) {
    if (c != ' ') compact += c;
  }
  std::string text = strip(Attribute(tensor, "dtype")) + compact;
  std::string layout = strip(Attribute(tensor, "layout"));
  std::string device = Attribute(tensor, "device");
  if (layout != "strided") return text + " with layout " + layout;
  if (device != "cpu") return text + " on " + device;
  return text + " of type " + TypeNameOf(tensor);
}

}  // namespace bridge
