// The key of a call: which calls are repeated in the same way.

#ifndef CPP_DEVICE_EAGER_KEY_H_
#define CPP_DEVICE_EAGER_KEY_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "device/eager_state.h"
#include "shared/guards.h"

namespace bridge::eager {

// Adds the words of a call's arguments to `key`, and its operands to `operands`.
Read ReadCall(const Operator& op, PyObject* args, PyObject* kwargs, Key& key,
              std::vector<Owned>& operands);

// The bits of a float: two zeros differ, and NaN is itself.
uint64_t Bits(PyObject* x);

}  // namespace bridge::eager

#endif  // CPP_DEVICE_EAGER_KEY_H_
