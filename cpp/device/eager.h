// Operators on device "jax" in eager mode: calls like one that has been made before.
//
// NOTE [Repeated calls]. Python code, in the files of `device/`, finds out what an operator does
// for arguments of one kind, and makes the first call. Then we ask it for a replay: a compiled
// program or the geometry of a view, and what becomes of the results. Replays are kept by operator
// and by what a program and the sizes of its results depend on: the structure of the arguments, the
// dtypes, sizes and view steps of tensors, and the numbers that are not operands. A call whose
// replay is known goes from PyTorch to the program and back. The only Python code of the package on
// its way is `situation`. That says what else programs depend on. It is None while something looks
// at calls one by one, such as a trace or a report. Then Python has the call, as it has calls with
// arguments of other kinds.

#ifndef CPP_DEVICE_EAGER_H_
#define CPP_DEVICE_EAGER_H_

#include "device/eager_state.h"
#include "shared/guards.h"

namespace bridge::eager {

// Makes `__torch_dispatch__`, a function (operator, types, args, kwargs). Null: a Python exception
// is set.
Owned MakeDispatch(Hooks hooks);

// Reads one call and makes nothing of it: (the words of its key, its operands), or None where
// Python has such calls. For the test that holds this reader to Python's `read_argument`.
Owned KeyOf(PyObject* self, PyObject* args, PyObject* kwargs);

// Drops all replays, because operators have new meanings or the interpreter ends.
void ForgetReplays();

}  // namespace bridge::eager

#endif  // CPP_DEVICE_EAGER_H_
