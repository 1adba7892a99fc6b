// Repeats a call: through its program, or as views of its first argument.

#ifndef CPP_DEVICE_EAGER_REPLAY_H_
#define CPP_DEVICE_EAGER_REPLAY_H_

#include <Python.h>

#include <memory>
#include <vector>

#include "device/eager_state.h"
#include "shared/guards.h"

namespace bridge::eager {

// Makes a replay of what Python's `replay(call, args, kwargs, result)` returned, where that is not
// None. It is (what to keep, program, (dtype, sizes, sort) of each result, written, views written,
// how many are returned), or (what to keep, view, whether it is several). Null: a Python exception
// is set.
std::shared_ptr<const Replay> MakeReplay(PyObject* told);

// The views of `base`. Null: a Python exception is set.
Owned CallView(const Replay& replay, PyObject* base);

// The results of the program. Null with `done` set: a Python exception is set. Null with `done` not
// set: Python has the call.
Owned CallProgram(const Operator& op, const Replay& replay, const std::vector<Owned>& operands,
                  PyObject* situation, bool& done);

}  // namespace bridge::eager

#endif  // CPP_DEVICE_EAGER_REPLAY_H_
