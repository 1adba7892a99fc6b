#include "device/eager.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "shared/guards.h"

namespace bridge {
namespace {

// What selects a plan, as words. Each item says first what it is, so that no two lists of items
// have the same words. Objects stand by their address: a plan keeps those alive that could die.
using Key = std::vector<uint64_t>;

// Of tensors without dimensions dtypes are promoted in another way.
enum Item : uint64_t {
  kTensor,
  kNumber,
  kObject,
  kInt,
  kFloat,
  kIntOperand,
  kFloatOperand,
  kText,
  kList
};

struct KeyHash {
  size_t operator()(const Key& key) const noexcept {
    return std::hash<std::string_view>()(
        {reinterpret_cast<const char*>(key.data()), key.size() * sizeof(uint64_t)});
  }
};

// What a call does.
struct Plan {
  Owned keep;  // whatever the key has by its address
  // A program: (arrays) -> (results, new arrays of cells).
  Owned program;
  std::vector<Owned> dtypes;          // of the results
  std::vector<size_t> written;        // operands, in the order of the new arrays
  std::vector<size_t> views_written;  // those of them that may not allow it
  Py_ssize_t returned = -1;           // that many of `written`; -1: the results
  // A view: a tuple of (chain, dtype, sizes, strides, offset), or of several such tuples.
  Owned view;
  bool several = false;
};

// What is known of an operator. `call` is Python's way; the rest counts where `plans` has any.
struct Operator {
  Owned self;               // by whose address it is found
  Owned call;               // (args, kwargs)
  bool repeats = false;     // there may be plans
  bool is_view = false;     // of the first argument
  bool shares = false;      // which operands are of one memory matters
  std::vector<char> takes;  // per argument: whether its numbers are operands
  Owned takes_named;        // the same, by name: a dict
  // A null plan: Python has this call each time.
  std::unordered_map<Key, std::shared_ptr<const Plan>, KeyHash> plans;
};

using Operators = std::unordered_map<PyObject*, std::shared_ptr<Operator>>;
using Numbers = std::unordered_map<Key, Owned, KeyHash>;
constexpr Py_ssize_t kGiven = 2;  // options of `make` that are always the same
constexpr size_t kMostNumbers = 4096;
constexpr size_t kMostPlans = 16384;  // of one operator

struct State {
  EagerHooks hooks;
  // Of the two tables; held for no Python code.
  std::mutex mutex;
  Operators operators;
  Numbers numbers;
  Owned name_cell, name_chain, name_array, name_pattern, name_dtype, name_shape, name_stride;
  Owned name_offset, name_operand, name_renew, name_ndim, name_committed;
  Owned zero;
  uint64_t generation = 0;  // how often operators were forgotten
};

// Never destroyed: threads may outlive static destructors.
State* state = nullptr;

uint64_t Word(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

Owned Attribute(PyObject* object, const Owned& name) {
  return Owned::Steal(PyObject_GetAttr(object, name.get()));
}

// False: a Python exception is set. So that nothing is asked while one is: Get(...) && Get(...).
bool Get(PyObject* object, const Owned& name, Owned& found) {
  found = Attribute(object, name);
  return static_cast<bool>(found);
}

Owned CallMethod(PyObject* object, const Owned& name, PyObject* argument = nullptr) {
  PyObject* vector[] = {object, argument};
  const size_t count = argument == nullptr ? 1 : 2;
  return Owned::Steal(PyObject_VectorcallMethod(name.get(), vector, count, nullptr));
}

bool Is(PyObject* object, const Owned& type) {
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(type.get());
}

// Of a float: two zeros differ, and NaN is itself.
uint64_t Bits(PyObject* x) {
  const double value = PyFloat_AsDouble(x);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// --- the key of a call ---------------------------------------------------------------------------

enum class Read { kYes, kNo, kError };

// The words of a call's arguments, and its operands in their order.
class Reader {
 public:
  Reader(const State& state, Key& key, std::vector<Owned>& operands)
      : state_(state), key_(key), operands_(operands) {}

  // kNo: something that only Python code understands.
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

  // The first argument of a view operator: all that its result depends on.
  Read Viewed(PyObject* x) {
    Owned chain, dtype, shape;
    if (!Get(x, state_.name_chain, chain) || !Get(x, state_.name_dtype, dtype) ||
        !Get(x, state_.name_shape, shape)) {
      return Read::kError;
    }
    Owned stride = CallMethod(x, state_.name_stride);
    Owned offset = stride ? CallMethod(x, state_.name_offset) : Owned();
    if (!offset) return Read::kError;
    Add(kTensor, Word(chain.get()));
    key_.push_back(Word(dtype.get()));
    if (Ints(shape.get()) && Ints(stride.get())) return Int(offset.get(), false);
    return PyErr_Occurred() != nullptr ? Read::kError : Read::kNo;
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
    Owned chain, dtype, ndim, pattern;
    if (!Get(x, state_.name_chain, chain) || !Get(x, state_.name_dtype, dtype) ||
        !Get(x, state_.name_ndim, ndim) ||
        (chain.get() != Py_None && !Get(chain.get(), state_.name_pattern, pattern))) {
      return Read::kError;
    }
    Add(PyObject_RichCompareBool(ndim.get(), state_.zero.get(), Py_EQ) == 1 ? kNumber : kTensor,
        Word(pattern.get()));
    key_.push_back(Word(dtype.get()));
    operands_.push_back(Owned::Borrow(x));
    return Read::kYes;
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

  // Sizes or strides, which are tuples of integers, and may be of symbols.
  bool Ints(PyObject* x) {
    const Py_ssize_t size = PyTuple_Size(x);
    if (size < 0) return false;
    Add(kList, static_cast<uint64_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* item = PyTuple_GetItem(x, i);
      if (Py_TYPE(item) != &PyLong_Type || Int(item, false) != Read::kYes) return false;
    }
    return true;
  }

  const State& state_;
  Key& key_;
  std::vector<Owned>& operands_;
};

// Which operands are of one memory: for each the first one that it shares it with.
bool AddCells(const std::vector<Owned>& operands, Key& key) {
  std::unordered_map<PyObject*, size_t> first;
  for (size_t i = 0; i < operands.size(); ++i) {
    PyObject* memory = operands[i].get();
    if (Is(memory, state->hooks.tensor_type)) {
      Owned cell = Attribute(memory, state->name_cell);
      if (!cell) return false;
      memory = cell.get();  // which its tensor keeps alive
    }
    key.push_back(first.try_emplace(memory, i).first->second);
  }
  return true;
}

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

// --- carrying out a plan -------------------------------------------------------------------------

// A tensor of device "jax": `make(Tensor, *positional, dtype=dtype, **options)`.
template <typename... Positional>
Owned MakeTensor(PyObject* cell, PyObject* dtype, Positional*... positional) {
  const EagerHooks& hooks = state->hooks;
  PyObject* options[] = {PyTuple_GetItem(hooks.given.get(), 0),
                         PyTuple_GetItem(hooks.given.get(), 1)};
  PyObject* vector[] = {nullptr,   hooks.tensor_type.get(), positional..., dtype, options[0],
                        options[1]};
  const size_t count = 1 + sizeof...(Positional);
  Owned tensor = Owned::Steal(PyObject_Vectorcall(
      hooks.make.get(), vector + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, hooks.options.get()));
  if (tensor && PyObject_SetAttr(tensor.get(), state->name_cell.get(), cell) < 0) tensor.reset();
  return tensor;
}

Owned Wrap(PyObject* array, PyObject* dtype) {
  Owned shape = Attribute(array, state->name_shape);
  Owned cell = shape ? CallFunction(state->hooks.cell_type.get(), array) : Owned();
  return cell ? MakeTensor(cell.get(), dtype, shape.get()) : Owned();
}

Owned WrapView(PyObject* cell, PyObject* where) {
  auto item = [&](Py_ssize_t i) { return PyTuple_GetItem(where, i); };
  Owned tensor = MakeTensor(cell, item(1), item(2), item(3), item(4));
  if (tensor && item(0) != Py_None &&
      PyObject_SetAttr(tensor.get(), state->name_chain.get(), item(0)) < 0) {
    tensor.reset();
  }
  return tensor;
}

Owned CallView(const Plan& plan, PyObject* base) {
  Owned cell = Attribute(base, state->name_cell);
  if (!cell) return Owned();
  if (!plan.several) return WrapView(cell.get(), plan.view.get());
  Owned views = Owned::Steal(PyList_New(0));
  for (Py_ssize_t i = 0; views && i < PyTuple_Size(plan.view.get()); ++i) {
    Owned view = WrapView(cell.get(), PyTuple_GetItem(plan.view.get(), i));
    if (!view || PyList_Append(views.get(), view.get()) < 0) return Owned();
  }
  return views;
}

// The array of a number, which costs a call of a program a microsecond less than the number.
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
  Owned committed = Attribute(array.get(), state->name_committed);
  if (!committed) return committed;
  if (committed.get() == Py_True) return array;  // to a mesh that is not always there

  Numbers old;  // outlives the lock
  Owned kept = Owned::Borrow(array.get());
  std::lock_guard lock(state->mutex);
  if (state->numbers.size() >= kMostNumbers) old.swap(state->numbers);
  state->numbers.try_emplace(std::move(key), std::move(kept));
  return array;
}

// What the program takes for an operand. kNo: not an array, so Python has the call.
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

// One result, or a tuple or list of them; `index` counts results.
Owned Results(PyObject* out, const Plan& plan, size_t& index) {
  if (out == Py_None) return Owned::Borrow(out);
  const bool tuple = PyTuple_Check(out);
  if (!tuple && !PyList_Check(out)) {
    const size_t which = index < plan.dtypes.size() ? index : plan.dtypes.size() - 1;
    ++index;
    if (Is(out, state->hooks.array_type)) return Wrap(out, plan.dtypes[which].get());
    Owned array = CallFunction(state->hooks.array.get(), out);  // while jit is disabled
    return array ? Wrap(array.get(), plan.dtypes[which].get()) : Owned();
  }
  Owned found = Owned::Steal(PyList_New(0));
  const Py_ssize_t size = tuple ? PyTuple_Size(out) : PyList_Size(out);
  for (Py_ssize_t i = 0; found && i < size; ++i) {
    Owned one = Results(tuple ? PyTuple_GetItem(out, i) : PyList_GetItem(out, i), plan, index);
    if (!one || PyList_Append(found.get(), one.get()) < 0) return Owned();
  }
  return tuple && found ? Owned::Steal(PyList_AsTuple(found.get())) : std::move(found);
}

Owned Written(const Plan& plan, const std::vector<Owned>& operands) {
  if (plan.returned == 0) return Owned::Borrow(Py_None);
  if (plan.returned == 1) return Owned::Borrow(operands[plan.written[0]].get());
  Owned found = Owned::Steal(PyTuple_New(plan.returned));
  for (Py_ssize_t i = 0; found && i < plan.returned; ++i) {
    const Owned& tensor = operands[plan.written[static_cast<size_t>(i)]];
    PyTuple_SetItem(found.get(), i, Owned::Borrow(tensor.get()).release());
  }
  return found;
}

// `done` false and no exception: Python has the call.
Owned CallProgram(const Operator& op, const Plan& plan, const std::vector<Owned>& operands,
                  PyObject* situation, bool& done) {
  std::vector<Owned> arrays(operands.size());
  std::vector<PyObject*> vector(operands.size() + 1);
  done = true;
  for (size_t slot : plan.views_written) {
    if (!CallFunction(state->hooks.may_write.get(), operands[slot].get(), op.call.get()))
      return Owned();
  }
  for (size_t i = 0; i < operands.size(); ++i) {
    const Read read = ArrayOf(operands[i].get(), situation, arrays[i]);
    done = read != Read::kNo;
    if (read != Read::kYes) return Owned();
    vector[i + 1] = arrays[i].get();
  }
  Owned found =
      Owned::Steal(PyObject_Vectorcall(plan.program.get(), vector.data() + 1,
                                       operands.size() | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  PyObject* out = found ? PyTuple_GetItem(found.get(), 0) : nullptr;
  PyObject* cells = out != nullptr ? PyTuple_GetItem(found.get(), 1) : nullptr;
  if (cells == nullptr) return Owned();
  for (size_t i = 0; i < plan.written.size(); ++i) {
    PyObject* array = PyList_GetItem(cells, static_cast<Py_ssize_t>(i));
    if (array == nullptr) return Owned();
    Owned cell = Attribute(operands[plan.written[i]].get(), state->name_cell);
    if (!cell || !CallMethod(cell.get(), state->name_renew, array)) return Owned();
  }
  size_t index = 0;
  return plan.returned >= 0 ? Written(plan, operands) : Results(out, plan, index);
}

// --- what Python says ----------------------------------------------------------------------------

bool Indices(PyObject* tuple, std::vector<size_t>& indices) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) {
    const long long index = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    if (index < 0) return false;
    indices.push_back(static_cast<size_t>(index));
  }
  return PyErr_Occurred() == nullptr;
}

// `plan(call, args, kwargs)` is None; or (what to keep, program, dtypes, written, views
// written, how many are returned); or (what to keep, view, whether it is several). Null: an
// exception is set.
std::shared_ptr<const Plan> MakePlan(PyObject* told) {
  auto plan = std::make_shared<Plan>();
  PyObject* keep = nullptr;
  if (PyTuple_Size(told) == 3) {
    PyObject* view = nullptr;
    int several = 0;
    if (PyArg_ParseTuple(told, "OO!p", &keep, &PyTuple_Type, &view, &several) == 0) return nullptr;
    plan->view = Owned::Borrow(view);
    plan->several = several != 0;
  } else {
    PyObject *program = nullptr, *dtypes = nullptr, *written = nullptr, *views = nullptr;
    if (PyArg_ParseTuple(told, "OOO!O!O!n", &keep, &program, &PyTuple_Type, &dtypes, &PyTuple_Type,
                         &written, &PyTuple_Type, &views, &plan->returned) == 0 ||
        !Indices(written, plan->written) || !Indices(views, plan->views_written)) {
      return nullptr;
    }
    plan->program = Owned::Borrow(program);
    for (Py_ssize_t i = 0; i < PyTuple_Size(dtypes); ++i) {
      plan->dtypes.push_back(Owned::Borrow(PyTuple_GetItem(dtypes, i)));
    }
  }
  plan->keep = Owned::Borrow(keep);
  return plan;
}

// `describe(operator)` is (how Python calls it, None), or with (whether it is a view, of each
// argument whether its numbers are operands, the same by name, whether it matters which operands
// share memory) in place of None. Null: an exception is set.
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
  if (generation != state->generation) return op;  // described before operators were forgotten
  return state->operators.try_emplace(self, op).first->second;
}

// Python's way, after which a plan is asked for.
Owned CallFirst(Operator& op, Key key, PyObject* args, PyObject* kwargs) {
  Owned result = CallFunction(op.call.get(), args, kwargs);
  if (!result) return result;
  Owned told = CallFunction(state->hooks.plan.get(), op.call.get(), args, kwargs);
  if (!told) return told;
  std::shared_ptr<const Plan> plan;
  if (told.get() != Py_None && !(plan = MakePlan(told.get()))) return Owned();
  decltype(op.plans) old;  // outlives the lock
  std::lock_guard lock(state->mutex);
  if (op.plans.size() >= kMostPlans) old.swap(op.plans);
  op.plans.try_emplace(std::move(key), std::move(plan));
  return result;
}

Owned DispatchCall(PyObject* self, PyObject* args, PyObject* kwargs) {
  std::shared_ptr<Operator> op = Find(self);
  if (!op) return Owned();
  if (!op->repeats) return CallFunction(op->call.get(), args, kwargs);
  if (op->is_view) {  // views of ordinary tensors are ordinary tensors, also in inference mode
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
  std::shared_ptr<const Plan> plan;
  {
    std::lock_guard lock(state->mutex);
    auto found = op->plans.find(key);
    known = found != op->plans.end();
    if (known) plan = found->second;
  }
  if (!known) return CallFirst(*op, std::move(key), args, kwargs);
  if (!plan) return CallFunction(op->call.get(), args, kwargs);
  if (plan->view) return CallView(*plan, PyTuple_GetItem(args, 0));
  bool done = false;
  Owned result = CallProgram(*op, *plan, operands, situation.get(), done);
  return done ? std::move(result) : CallFunction(op->call.get(), args, kwargs);
}

// (operator, types, args=(), kwargs=None)
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

Owned MakeEagerDispatch(EagerHooks hooks) {
  // MakeTensor reads so many, at every result.
  const Py_ssize_t names = PyTuple_Size(hooks.options.get());
  const Py_ssize_t values = PyTuple_Size(hooks.given.get());
  if (values != kGiven || names != 1 + kGiven) {
    PyErr_Format(PyExc_ValueError,
                 "eager_dispatch got %zd names in options and %zd values in given, expected "
                 "\"dtype\" and %zd more names, and %zd values",
                 names, values, kGiven, kGiven);
    return Owned();
  }
  if (state == nullptr) state = new State;
  ForgetPlans();
  state->hooks = std::move(hooks);
  auto intern = [](const char* name) { return Owned::Steal(PyUnicode_InternFromString(name)); };
  state->name_cell = intern("_cell");
  state->name_chain = intern("_chain");
  state->name_array = intern("array");
  state->name_pattern = intern("pattern");
  state->name_dtype = intern("dtype");
  state->name_shape = intern("shape");
  state->name_stride = intern("stride");
  state->name_offset = intern("storage_offset");
  state->name_operand = intern("operand");
  state->name_renew = intern("renew");
  state->name_ndim = intern("ndim");
  state->name_committed = intern("committed");
  state->zero = Owned::Steal(PyLong_FromLong(0));
  return Owned::Steal(PyCFunction_NewEx(&dispatch_method, nullptr, nullptr));
}

void ForgetPlans() {
  if (state == nullptr) return;
  Operators operators;  // outlive the lock: dropping them may run arbitrary code
  Numbers numbers;
  std::lock_guard lock(state->mutex);
  ++state->generation;
  operators.swap(state->operators);
  numbers.swap(state->numbers);
}

}  // namespace bridge
