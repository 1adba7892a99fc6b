#include "device/eager_state.h"

namespace bridge::eager {

State* state = nullptr;

bool State::MakeNames() {
  auto intern = [](const char* name) { return Owned::Steal(PyUnicode_InternFromString(name)); };
  name_cell = intern("_cell");
  name_chain = intern("_chain");
  name_array = intern("array");
  name_pattern = intern("pattern");
  name_dtype = intern("dtype");
  name_shape = intern("shape");
  name_stride = intern("stride");
  name_offset = intern("storage_offset");
  name_operand = intern("operand");
  name_renew = intern("renew");
  name_ndim = intern("ndim");
  name_committed = intern("committed");
  zero = Owned::Steal(PyLong_FromLong(0));
  return PyErr_Occurred() == nullptr;
}

bool Get(PyObject* object, const Owned& name, Owned& found) {
  found = GetAttribute(object, name);
  return static_cast<bool>(found);
}

}  // namespace bridge::eager
