// Operators of device "jax" in eager mode: calls like one that has been made before.
//
// NOTE [Repeated calls]. Python code finds out what an operator does for arguments of one kind (the
// files of `device/`) and makes that the first call. Then it is asked for a plan: a compiled
// program or the geometry of a view, and what becomes of the results. Plans are kept by operator
// and by what a program depends on: the structure of the arguments, dtypes and view steps of
// tensors, numbers that are not operands. Of shapes `jax.jit` keeps programs by itself. A call
// whose plan is known goes from PyTorch to the program and back without Python code of the package
// but for `situation`, which says what else programs depend on, and None while something looks at
// calls one by one (a trace, a report): then, and for arguments of other kinds, Python has the
// call.

#ifndef CPP_DEVICE_EAGER_H_
#define CPP_DEVICE_EAGER_H_

#include <Python.h>

#include "shared/guards.h"

namespace bridge {

// What eager mode uses of PyTorch, JAX and the package.
struct EagerHooks {
  Owned tensor_type;  // of device "jax"
  Owned array_type;   // of arrays that are not tracers
  Owned cell_type;
  Owned make;       // Tensor._make_wrapper_subclass
  Owned options;    // its keyword arguments that are always the same, as a tuple of names ...
  Owned given;      // ... and their values
  Owned constants;  // types whose objects are compared by identity
  Owned situation;  // () -> an object that stays, or None
  Owned describe;   // (operator) -> see `Describe` in eager.cc
  Owned plan;       // (call, args, kwargs) -> see `MakePlan` in eager.cc; of what was described
  Owned array;      // (number) -> array
  Owned may_write;  // (tensor, call): raises where a view cannot be written to
  Owned inference;  // () -> whether inference mode is on
};

// `__torch_dispatch__`: a function (operator, types, args, kwargs). Null: a Python exception is
// set.
Owned MakeEagerDispatch(EagerHooks hooks);

// Lets all plans go: operators have new meanings, or the interpreter ends.
void ForgetPlans();

}  // namespace bridge

#endif  // CPP_DEVICE_EAGER_H_
