#include "device/eager_key.h"

#include <cstddef>
#include <cstring>
#include <unordered_map>

namespace bridge::eager {
namespace {

// Kinds of items.
enum Item : uint64_t { kTensor, kObject, kInt, kFloat, kIntOperand, kFloatOperand, kText, kList };

// Reads a call's arguments: their words, and the operands in their order. Python's `read_argument`
// (device/operators/operands.py) does the same for the first call, and a test compares the two.
class Reader {
 public:
  Reader(const State& state, Key& key, std::vector<Owned>& operands)
      : state_(state), key_(key), operands_(operands) {}

  // kNo: only Python code understands this argument.
  Read Argument(PyObject* x, bool takes_numbers) {
    PyTypeObject* type = Py_TYPE(x);
    if (Is(x, state_.hooks.tensor_type)) return Tensor(x);
    if (x == Py_None || type == &PyBool_Type) return Object(x);
    if (type == &PyLong_Type) return Int(x, takes_numbers);
    if (type == &PyFloat_Type) return Float(x, takes_numbers);
    if (type == &PyUnicode_Type) return Text(x);
    if (type == &PyTuple_Type || type == &PyList_Type) return List(x, takes_numbers);
    for (Py_ssize_t i = 0; i < PyTuple_Size(state_.hooks.constants.get()); ++i) {
      PyObject* constant = PyTuple_GetItem(state_.hooks.constants.get(), i);
      if (reinterpret_cast<PyObject*>(type) == constant) return Object(x);
    }
    return Read::kNo;
  }

  Read Text(PyObject* x) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(x, &size);
    if (text == nullptr) {
      if (PyErr_ExceptionMatches(PyExc_UnicodeError) == 0) return Read::kError;
      PyErr_Clear();
      return Read::kNo;
    }
    const auto bytes = static_cast<size_t>(size);
    Add(kText, bytes);
    const size_t start = key_.size();
    key_.resize(start + (bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t));
    std::memcpy(key_.data() + start, text, bytes);
    return Read::kYes;
  }

  // Adds all of the first argument of a view operator on which its results depend. Strides and
  // offset follow from the steps of the chain. Without one the tensor sees its whole memory.
  Read Viewed(PyObject* x) {
    Owned chain;
    if (!Get(x, state_.name_chain, chain)) return Read::kError;
    Add(kTensor, Word(chain.get()));
    return Sort(x);
  }

 private:
  void Add(Item item, uint64_t word) {
    key_.push_back(item);
    key_.push_back(word);
  }

  Read Object(PyObject* x) {
    Add(kObject, Word(x));
    return Read::kYes;
  }

  Read Tensor(PyObject* x) {
    Owned chain, pattern;
    if (!Get(x, state_.name_chain, chain) ||
        (chain.get() != Py_None && !Get(chain.get(), state_.name_pattern, pattern))) {
      return Read::kError;
    }
    Add(kTensor, Word(pattern.get()));
    operands_.push_back(Owned::Borrow(x));
    return Sort(x);
  }

  // Adds the number of dtype and sizes. kNo: the sizes are symbols.
  Read Sort(PyObject* x) {
    Owned sort;
    if (!Get(x, state_.name_sort, sort)) return Read::kError;
    if (sort.get() == Py_None) sort = CallFunction(state_.hooks.sort.get(), x);
    if (!sort) return Read::kError;
    if (sort.get() == Py_None) return Read::kNo;
    key_.push_back(PyLong_AsUnsignedLongLong(sort.get()));
    return PyErr_Occurred() != nullptr ? Read::kError : Read::kYes;
  }

  Read Int(PyObject* x, bool takes_numbers) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    if (overflow != 0) return Read::kNo;
    if (takes_numbers && value >= INT32_MIN && value <= INT32_MAX) {
      key_.push_back(kIntOperand);
      operands_.push_back(Owned::Borrow(x));
    } else {
      Add(kInt, static_cast<uint64_t>(value));
    }
    return Read::kYes;
  }

  Read Float(PyObject* x, bool takes_numbers) {
    if (takes_numbers) {
      key_.push_back(kFloatOperand);
      operands_.push_back(Owned::Borrow(x));
    } else {
      Add(kFloat, Bits(x));
    }
    return Read::kYes;
  }

  Read List(PyObject* x, bool takes_numbers) {
    const bool tuple = PyTuple_Check(x);
    const Py_ssize_t size = tuple ? PyTuple_Size(x) : PyList_Size(x);
    Add(kList, static_cast<uint64_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* item = tuple ? PyTuple_GetItem(x, i) : PyList_GetItem(x, i);
      if (item == nullptr) return Read::kError;
      const Read read = Argument(item, takes_numbers);
      if (read != Read::kYes) return read;
    }
    return Read::kYes;
  }

  const State& state_;
  Key& key_;
  std::vector<Owned>& operands_;
};

// Adds, for each operand, the index of the first operand that has the same memory. False: an
// exception is set.
bool AddCells(const std::vector<Owned>& operands, Key& key) {
  std::unordered_map<PyObject*, size_t> first;
  for (size_t i = 0; i < operands.size(); ++i) {
    PyObject* memory = operands[i].get();
    if (Is(memory, state->hooks.tensor_type)) {
      Owned cell = GetAttribute(memory, state->name_cell);
      if (!cell) return false;
      memory = cell.get();  // the tensor keeps its cell alive
    }
    key.push_back(first.try_emplace(memory, i).first->second);
  }
  return true;
}

}  // namespace

Read ReadCall(const Operator& op, PyObject* args, PyObject* kwargs, Key& key,
              std::vector<Owned>& operands) {
  Reader reader(*state, key, operands);
  const Py_ssize_t count = PyTuple_Size(args);
  Py_ssize_t i = 0;
  if (op.is_view) {
    if (count == 0 || !Is(PyTuple_GetItem(args, 0), state->hooks.tensor_type)) return Read::kNo;
    const Read read = reader.Viewed(PyTuple_GetItem(args, 0));
    if (read != Read::kYes) return read;
    i = 1;
  }
  for (; i < count; ++i) {
    const auto k = static_cast<size_t>(i);
    const bool takes = k < op.takes.size() && op.takes[k] != 0;
    const Read read = reader.Argument(PyTuple_GetItem(args, i), takes);
    if (read != Read::kYes) return read;
  }
  Py_ssize_t position = 0;
  PyObject *name = nullptr, *value = nullptr;
  while (PyDict_Next(kwargs, &position, &name, &value) != 0) {
    PyObject* takes = PyDict_GetItemWithError(op.takes_named.get(), name);
    if (takes == nullptr && PyErr_Occurred() != nullptr) return Read::kError;
    Read read = reader.Text(name);
    if (read == Read::kYes) read = reader.Argument(value, takes == Py_True);
    if (read != Read::kYes) return read;
  }
  if (op.is_view && !operands.empty()) return Read::kNo;
  if (op.shares && !AddCells(operands, key)) return Read::kError;
  return Read::kYes;
}

uint64_t Bits(PyObject* x) {
  const double value = PyFloat_AsDouble(x);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace bridge::eager
