#include "device/eager_state.h"

namespace bridge::eager {

State* state = nullptr;

bool State::MakeNames() {
  auto intern = [](const char* name) { return Owned::Steal(PyUnicode_InternFromString(name)); };
  name_cell = intern("_cell");
  name_chain = intern("_chain");
  name_sort = intern("_sort");
  name_array = intern("array");
  name_pattern = intern("pattern");
  name_operand = intern("operand");
  name_renew = intern("renew");
  name_call = intern("call");
  name_committed = intern("committed");
  return PyErr_Occurred() == nullptr;
}

bool Get(PyObject* object, const Owned& name, Owned& found) {
  found = GetAttribute(object, name);
  return static_cast<bool>(found);
}

}  // namespace bridge::eager
