#include "device/eager.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "device/eager_key.h"
#include "device/eager_replay.h"
#include "device/eager_state.h"
#include "shared/guards.h"

namespace bridge::eager {
namespace {

// Asks Python's `describe(operator)`. It returns (call, None) for an operator whose calls are not
// repeated. For others a tuple is in place of None: (whether it makes views, of each argument
// whether its numbers are operands, a dict of the same by name, whether it matters which operands
// share memory). Null: a Python exception is set.
std::shared_ptr<Operator> Describe(PyObject* self) {
  Owned told = CallFunction(state->hooks.describe.get(), self);
  if (!told) return nullptr;
  auto op = std::make_shared<Operator>();
  PyObject *call = nullptr, *repeats = nullptr;
  if (PyArg_ParseTuple(told.get(), "OO", &call, &repeats) == 0) return nullptr;
  op->self = Owned::Borrow(self);
  op->call = Owned::Borrow(call);
  if (repeats != Py_None) {
    PyObject *takes = nullptr, *named = nullptr;
    int view = 0, shares = 0;
    if (PyArg_ParseTuple(repeats, "pO!O!p", &view, &PyTuple_Type, &takes, &PyDict_Type, &named,
                         &shares) == 0) {
      return nullptr;
    }
    op->repeats = true;
    op->is_view = view != 0;
    op->shares = shares != 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(takes); ++i) {
      op->takes.push_back(PyTuple_GetItem(takes, i) == Py_True);
    }
    op->takes_named = Owned::Borrow(named);
  }
  return op;
}

std::shared_ptr<Operator> Find(PyObject* self) {
  uint64_t generation = 0;
  {
    std::lock_guard lock(state->mutex);
    auto found = state->operators.find(self);
    if (found != state->operators.end()) return found->second;
    generation = state->generation;
  }
  std::shared_ptr<Operator> op = Describe(self);
  if (!op) return op;
  std::lock_guard lock(state->mutex);
  if (generation != state->generation) return op;  // operators were forgotten meanwhile
  return state->operators.try_emplace(self, op).first->second;
}

// Calls an operator in Python's way, and then asks for a replay.
Owned CallFirst(Operator& op, Key key, PyObject* args, PyObject* kwargs) {
  Owned result = CallFunction(op.call.get(), args, kwargs);
  if (!result) return result;
  Owned told = CallFunction(state->hooks.replay.get(), op.call.get(), args, kwargs, result.get());
  if (!told) return told;
  std::shared_ptr<const Replay> replay;
  if (told.get() != Py_None && !(replay = MakeReplay(told.get()))) return Owned();
  decltype(op.replays) old;  // outlives the lock, for dropping them may run any code
  std::lock_guard lock(state->mutex);
  if (op.replays.size() >= kMostReplays) old.swap(op.replays);
  op.replays.try_emplace(std::move(key), std::move(replay));
  return result;
}

Owned DispatchCall(PyObject* self, PyObject* args, PyObject* kwargs) {
  std::shared_ptr<Operator> op = Find(self);
  if (!op) return Owned();
  if (!op->repeats) return CallFunction(op->call.get(), args, kwargs);
  if (op->is_view) {
    // In inference mode too, a view of an ordinary tensor is an ordinary tensor. Python sees to it.
    Owned inference = CallFunction(state->hooks.inference.get());
    if (!inference) return inference;
    if (inference.get() == Py_True) return CallFunction(op->call.get(), args, kwargs);
  }
  Owned situation = CallFunction(state->hooks.situation.get());
  if (!situation) return situation;
  if (situation.get() == Py_None) return CallFunction(op->call.get(), args, kwargs);
  Key key;
  key.reserve(64);
  key.push_back(Word(situation.get()));
  std::vector<Owned> operands;
  operands.reserve(8);
  const Read read = ReadCall(*op, args, kwargs, key, operands);
  if (read == Read::kError) return Owned();
  if (read == Read::kNo) return CallFunction(op->call.get(), args, kwargs);
  bool known = false;
  std::shared_ptr<const Replay> replay;
  {
    std::lock_guard lock(state->mutex);
    auto found = op->replays.find(key);
    known = found != op->replays.end();
    if (known) replay = found->second;
  }
  if (!known) return CallFirst(*op, std::move(key), args, kwargs);
  if (!replay) return CallFunction(op->call.get(), args, kwargs);
  if (replay->view) return CallView(*replay, PyTuple_GetItem(args, 0));
  bool done = false;
  Owned result = CallProgram(*op, *replay, operands, situation.get(), done);
  return done ? std::move(result) : CallFunction(op->call.get(), args, kwargs);
}

// Parses (operator, types, args=(), kwargs=None).
PyObject* Dispatch(PyObject*, PyObject* const* given, Py_ssize_t positional, PyObject* names) {
  PyObject* arguments[] = {nullptr, nullptr, nullptr, Py_None};
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_Size(names);
  bool good = positional <= 4;
  for (Py_ssize_t i = 0; good && i < positional; ++i) arguments[i] = given[i];
  for (Py_ssize_t i = 0; good && i < named; ++i) {
    PyObject* name = PyTuple_GetItem(names, i);
    const int which = PyUnicode_CompareWithASCIIString(name, "args") == 0     ? 2
                      : PyUnicode_CompareWithASCIIString(name, "kwargs") == 0 ? 3
                                                                              : -1;
    good = which >= positional;
    if (good) arguments[which] = given[positional + i];
  }
  Owned no_arguments;
  if (good && arguments[2] == nullptr) {
    no_arguments = Owned::Steal(PyTuple_New(0));
    arguments[2] = no_arguments.get();
    if (!no_arguments) return nullptr;
  }
  if (!good || arguments[0] == nullptr || !PyTuple_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError,
                    "__torch_dispatch__ takes (operator, types, args=(), kwargs=None)");
    return nullptr;
  }
  try {
    Owned none;
    PyObject* kwargs = arguments[3];
    if (kwargs == Py_None) {
      none = Owned::Steal(PyDict_New());
      kwargs = none.get();
    }
    return kwargs == nullptr ? nullptr : DispatchCall(arguments[0], arguments[2], kwargs).release();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyMethodDef dispatch_method = {"__torch_dispatch__",
                               reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Dispatch)),
                               METH_FASTCALL | METH_KEYWORDS, nullptr};

}  // namespace

Owned MakeDispatch(Hooks hooks) {
  // MakeTensor reads so many for every result.
  const Py_ssize_t values = PyTuple_Size(hooks.after_dtype.get());
  if (values != kAfterDtype) {
    PyErr_Format(PyExc_ValueError, "eager_dispatch got %zd values in after_dtype, expected %zd",
                 values, kAfterDtype);
    return Owned();
  }
  if (state == nullptr) state = new State;
  ForgetReplays();
  state->hooks = std::move(hooks);
  if (!state->MakeNames()) return Owned();
  return Owned::Steal(PyCFunction_NewEx(&dispatch_method, nullptr, nullptr));
}

Owned KeyOf(PyObject* self, PyObject* args, PyObject* kwargs) {
  Owned none = Owned::Borrow(Py_None);
  if (state == nullptr) return none;
  std::shared_ptr<Operator> op = Find(self);
  if (!op) return Owned();
  if (!op->repeats) return none;
  Key key;
  std::vector<Owned> operands;
  const Read read = ReadCall(*op, args, kwargs, key, operands);
  if (read == Read::kError) return Owned();
  if (read == Read::kNo) return none;
  Owned words = Owned::Steal(
      PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.data()),
                                static_cast<Py_ssize_t>(key.size() * sizeof(uint64_t))));
  Owned list = Owned::Steal(PyList_New(0));
  if (!words || !list) return Owned();
  for (const Owned& operand : operands) {
    if (PyList_Append(list.get(), operand.get()) < 0) return Owned();
  }
  return Owned::Steal(PyTuple_Pack(2, words.get(), list.get()));
}

void ForgetReplays() {
  if (state == nullptr) return;
  Operators operators;  // outlive the lock, for dropping them may run any code
  Numbers numbers;
  std::lock_guard lock(state->mutex);
  ++state->generation;
  operators.swap(state->operators);
  numbers.swap(state->numbers);
}

}  // namespace bridge::eager
