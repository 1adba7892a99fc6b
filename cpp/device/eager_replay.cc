#include "device/eager_replay.h"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

#include "device/eager_key.h"

namespace bridge::eager {
namespace {

// Makes a tensor of device "jax":
// `make(Tensor, sizes, strides, offset, memory_format=None, dtype, *after_dtype)`.
Owned MakeTensor(PyObject* cell, PyObject* sort, PyObject* dtype, PyObject* sizes,
                 PyObject* strides, PyObject* offset) {
  const Hooks& hooks = state->hooks;
  constexpr size_t kFirst = 6;
  PyObject* vector[1 + kFirst + kAfterDtype] = {
      nullptr, hooks.tensor_type.get(), sizes, strides, offset, Py_None, dtype};
  for (Py_ssize_t i = 0; i < kAfterDtype; ++i) {
    vector[1 + kFirst + static_cast<size_t>(i)] = PyTuple_GetItem(hooks.after_dtype.get(), i);
  }
  const size_t count = kFirst + static_cast<size_t>(kAfterDtype);
  Owned tensor = Owned::Steal(PyObject_Vectorcall(hooks.make.get(), vector + 1,
                                                  count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (tensor && (PyObject_SetAttr(tensor.get(), state->name_cell.get(), cell) < 0 ||
                 PyObject_SetAttr(tensor.get(), state->name_sort.get(), sort) < 0)) {
    tensor.reset();
  }
  return tensor;
}

Owned Wrap(PyObject* array, const Replay::Result& result) {
  Owned cell = CallFunction(state->hooks.cell_type.get(), array);
  if (!cell) return cell;
  return MakeTensor(cell.get(), result.sort.get(), result.dtype.get(), result.size.get(), Py_None,
                    Py_None);
}

Owned WrapView(PyObject* cell, PyObject* where) {
  auto item = [&](Py_ssize_t i) { return PyTuple_GetItem(where, i); };
  Owned tensor = MakeTensor(cell, item(5), item(1), item(2), item(3), item(4));
  if (tensor && item(0) != Py_None &&
      PyObject_SetAttr(tensor.get(), state->name_chain.get(), item(0)) < 0) {
    tensor.reset();
  }
  return tensor;
}

// The array of a number. A call of a program takes a microsecond less with it than with the number.
Owned NumberArray(PyObject* number, PyObject* situation) {
  const bool floating = Py_TYPE(number) == &PyFloat_Type;
  Key key = {Word(situation), static_cast<uint64_t>(floating),
             floating ? Bits(number) : static_cast<uint64_t>(PyLong_AsLongLong(number))};
  {
    std::lock_guard lock(state->mutex);
    auto found = state->numbers.find(key);
    if (found != state->numbers.end()) return Owned::Borrow(found->second.get());
  }
  Owned array = CallFunction(state->hooks.array.get(), number);
  if (!array) return array;
  Owned committed = GetAttribute(array.get(), state->name_committed);
  if (!committed) return committed;
  if (committed.get() == Py_True) return array;  // it is bound to a mesh that may end

  Numbers old;  // outlives the lock
  Owned kept = Owned::Borrow(array.get());
  std::lock_guard lock(state->mutex);
  if (state->numbers.size() >= kMostNumbers) old.swap(state->numbers);
  state->numbers.try_emplace(std::move(key), std::move(kept));
  return array;
}

// Sets `array` to what the program takes for an operand. kNo: that is no array, so Python has the
// call.
Read ArrayOf(PyObject* operand, PyObject* situation, Owned& array) {
  if (!Is(operand, state->hooks.tensor_type)) {
    array = NumberArray(operand, situation);
    return array ? Read::kYes : Read::kError;
  }
  Owned cell, chain;
  if (!Get(operand, state->name_cell, cell) || !Get(cell.get(), state->name_array, array) ||
      !Get(operand, state->name_chain, chain)) {
    return Read::kError;
  }
  if (!Is(array.get(), state->hooks.array_type)) return Read::kNo;
  if (chain.get() != Py_None) array = CallMethod(chain.get(), state->name_operand, array.get());
  return array ? Read::kYes : Read::kError;
}

// Makes tensors of a result, or of a tuple or list of them. `index` counts results.
Owned Results(PyObject* out, const Replay& replay, size_t& index) {
  if (out == Py_None) return Owned::Borrow(out);
  const bool tuple = PyTuple_Check(out);
  if (!tuple && !PyList_Check(out)) {
    if (index >= replay.results.size()) {
      PyErr_SetString(PyExc_RuntimeError, "a program has more results than when it first ran");
      return Owned();
    }
    const Replay::Result& result = replay.results[index++];
    if (Is(out, state->hooks.array_type)) return Wrap(out, result);
    Owned array = CallFunction(state->hooks.array.get(), out);  // while jit is disabled
    return array ? Wrap(array.get(), result) : Owned();
  }
  Owned found = Owned::Steal(PyList_New(0));
  const Py_ssize_t size = tuple ? PyTuple_Size(out) : PyList_Size(out);
  for (Py_ssize_t i = 0; found && i < size; ++i) {
    Owned one = Results(tuple ? PyTuple_GetItem(out, i) : PyList_GetItem(out, i), replay, index);
    if (!one || PyList_Append(found.get(), one.get()) < 0) return Owned();
  }
  return tuple && found ? Owned::Steal(PyList_AsTuple(found.get())) : std::move(found);
}

Owned Written(const Replay& replay, const std::vector<Owned>& operands) {
  if (replay.returned == 0) return Owned::Borrow(Py_None);
  if (replay.returned == 1) return Owned::Borrow(operands[replay.written[0]].get());
  Owned found = Owned::Steal(PyTuple_New(replay.returned));
  for (Py_ssize_t i = 0; found && i < replay.returned; ++i) {
    const Owned& tensor = operands[replay.written[static_cast<size_t>(i)]];
    PyTuple_SetItem(found.get(), i, Owned::Borrow(tensor.get()).release());
  }
  return found;
}

// Calls the program. It may find out while it is traced that arrays are large, and then has another
// `call` for them.
Owned Run(const Replay& replay, PyObject* const* arrays, size_t count) {
  for (bool again = false;; again = true) {
    Owned call = GetAttribute(replay.program.get(), state->name_call);
    if (!call) return call;
    Owned found = Owned::Steal(PyObject_Vectorcall(call.get(), arrays, count, nullptr));
    if (found || again || PyErr_ExceptionMatches(state->hooks.large.get()) == 0) return found;
    PyErr_Clear();
  }
}

// Reads a tuple of indices. False: a Python exception is set.
bool Indices(PyObject* tuple, std::vector<size_t>& indices) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) {
    const long long index = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    if (index < 0) return false;
    indices.push_back(static_cast<size_t>(index));
  }
  return PyErr_Occurred() == nullptr;
}

}  // namespace

std::shared_ptr<const Replay> MakeReplay(PyObject* told) {
  auto replay = std::make_shared<Replay>();
  PyObject* keep = nullptr;
  if (PyTuple_Size(told) == 3) {
    PyObject* view = nullptr;
    int several = 0;
    if (PyArg_ParseTuple(told, "OO!p", &keep, &PyTuple_Type, &view, &several) == 0) return nullptr;
    replay->view = Owned::Borrow(view);
    replay->several = several != 0;
  } else {
    PyObject *program = nullptr, *results = nullptr, *written = nullptr, *views = nullptr;
    if (PyArg_ParseTuple(told, "OOO!O!O!n", &keep, &program, &PyTuple_Type, &results, &PyTuple_Type,
                         &written, &PyTuple_Type, &views, &replay->returned) == 0 ||
        !Indices(written, replay->written) || !Indices(views, replay->views_written)) {
      return nullptr;
    }
    replay->program = Owned::Borrow(program);
    for (Py_ssize_t i = 0; i < PyTuple_Size(results); ++i) {
      PyObject *dtype = nullptr, *size = nullptr, *sort = nullptr;
      if (PyArg_ParseTuple(PyTuple_GetItem(results, i), "OOO", &dtype, &size, &sort) == 0) {
        return nullptr;
      }
      replay->results.push_back({Owned::Borrow(dtype), Owned::Borrow(size), Owned::Borrow(sort)});
    }
  }
  replay->keep = Owned::Borrow(keep);
  return replay;
}

Owned CallView(const Replay& replay, PyObject* base) {
  Owned cell = GetAttribute(base, state->name_cell);
  if (!cell) return Owned();
  if (!replay.several) return WrapView(cell.get(), replay.view.get());
  Owned views = Owned::Steal(PyList_New(0));
  for (Py_ssize_t i = 0; views && i < PyTuple_Size(replay.view.get()); ++i) {
    Owned view = WrapView(cell.get(), PyTuple_GetItem(replay.view.get(), i));
    if (!view || PyList_Append(views.get(), view.get()) < 0) return Owned();
  }
  return views;
}

Owned CallProgram(const Operator& op, const Replay& replay, const std::vector<Owned>& operands,
                  PyObject* situation, bool& done) {
  std::vector<Owned> arrays(operands.size());
  std::vector<PyObject*> vector(operands.size() + 1);
  done = true;
  for (size_t slot : replay.views_written) {
    if (!CallFunction(state->hooks.may_write.get(), operands[slot].get(), op.call.get()))
      return Owned();
  }
  for (size_t i = 0; i < operands.size(); ++i) {
    const Read read = ArrayOf(operands[i].get(), situation, arrays[i]);
    done = read != Read::kNo;
    if (read != Read::kYes) return Owned();
    vector[i + 1] = arrays[i].get();
  }
  Owned found = Run(replay, vector.data() + 1, operands.size() | PY_VECTORCALL_ARGUMENTS_OFFSET);
  PyObject* out = found ? PyTuple_GetItem(found.get(), 0) : nullptr;
  PyObject* cells = out != nullptr ? PyTuple_GetItem(found.get(), 1) : nullptr;
  if (cells == nullptr) return Owned();
  for (size_t i = 0; i < replay.written.size(); ++i) {
    PyObject* array = PyList_GetItem(cells, static_cast<Py_ssize_t>(i));
    if (array == nullptr) return Owned();
    Owned cell = GetAttribute(operands[replay.written[i]].get(), state->name_cell);
    if (!cell || !CallMethod(cell.get(), state->name_renew, array)) return Owned();
  }
  size_t index = 0;
  return replay.returned >= 0 ? Written(replay, operands) : Results(out, replay, index);
}

}  // namespace bridge::eager
