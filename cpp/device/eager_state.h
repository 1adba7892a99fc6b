// What eager mode on device "jax" knows: its hooks into Python, and the calls that it can repeat.
//
// NOTE [Repeated calls] is in device/eager.h.

#ifndef CPP_DEVICE_EAGER_STATE_H_
#define CPP_DEVICE_EAGER_STATE_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "shared/guards.h"

namespace bridge::eager {

// What eager mode uses of PyTorch, JAX and the package.
struct Hooks {
  Owned tensor_type;  // of tensors on device "jax"
  Owned array_type;   // of arrays that are not tracers
  Owned cell_type;
  Owned make;         // Tensor._make_wrapper_subclass
  Owned after_dtype;  // a tuple of kAfterDtype arguments that `make` always gets after the dtype
  Owned constants;    // a tuple of types whose objects are compared by identity
  Owned situation;    // () -> an object that lives on, or None
  Owned describe;     // (operator) -> see `Describe` in eager.cc
  Owned replay;  // (call, args, kwargs, result) -> see `MakeReplay`; `call` comes from `describe`
  Owned array;   // (number) -> array
  Owned may_write;  // (tensor, call): raises where a view cannot be written to
  Owned inference;  // () -> whether inference mode is on
  Owned sort;       // (tensor) -> sets its `_sort` and returns it
  Owned large;      // an exception: the program has met large arrays, and has another `call` now
};

constexpr Py_ssize_t kAfterDtype = 8;

// The words that select a replay. Each item begins with its kind, so that different lists of items
// have different words. Objects stand by their address, and a replay keeps those alive that could
// die.
using Key = std::vector<uint64_t>;

struct KeyHash {
  size_t operator()(const Key& key) const noexcept {
    return std::hash<std::string_view>()(
        {reinterpret_cast<const char*>(key.data()), key.size() * sizeof(uint64_t)});
  }
};

// How the extension repeats a call: it runs a program, or makes views.
struct Replay {
  Owned keep;  // objects whose addresses are in the key
  // `program.call`: (arrays) -> (results, new arrays of cells).
  Owned program;
  struct Result {
    Owned dtype, size, sort;
  };
  std::vector<Result> results;
  std::vector<size_t> written;        // indices of operands, in the order of the new arrays
  std::vector<size_t> views_written;  // those of them that are views and may refuse it
  Py_ssize_t returned = -1;  // the call returns so many of `written`; -1: it returns the results
  // A view: a tuple of (chain, dtype, sizes, strides, offset, sort), or a tuple of such tuples.
  Owned view;
  bool several = false;  // whether it is a tuple of tuples
};

// What is known of an operator. `call` is Python's way. The other members count where `repeats`.
struct Operator {
  Owned self;  // operators are found by its address
  Owned call;  // (args, kwargs)
  bool repeats = false;
  bool is_view = false;     // whether it makes views of its first argument
  bool shares = false;      // whether it matters which operands share memory
  std::vector<char> takes;  // of each argument, whether its numbers are operands
  Owned takes_named;        // a dict of the same by name
  // Where a replay is null, Python has this call each time.
  std::unordered_map<Key, std::shared_ptr<const Replay>, KeyHash> replays;
};

using Operators = std::unordered_map<PyObject*, std::shared_ptr<Operator>>;
using Numbers = std::unordered_map<Key, Owned, KeyHash>;
constexpr size_t kMostNumbers = 4096;
constexpr size_t kMostReplays = 16384;  // of one operator

struct State {
  Hooks hooks;
  std::mutex mutex;  // of all tables; no Python code runs while it is held
  Operators operators;
  Numbers numbers;
  Owned name_cell, name_chain, name_sort, name_array, name_pattern, name_operand, name_renew;
  Owned name_call, name_committed;
  uint64_t generation = 0;  // how often operators were forgotten

  // False: a Python exception is set.
  bool MakeNames();
};

// Null before the first dispatcher is made. It is never destroyed, because threads may outlive
// static destructors.
extern State* state;

// Whether the extension can carry out a call by itself.
enum class Read {
  kYes,
  kNo,     // Python has the call
  kError,  // a Python exception is set
};

inline uint64_t Word(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Sets `found` to the attribute. False: a Python exception is set. Get(...) && Get(...) asks for
// nothing more once one is set.
bool Get(PyObject* object, const Owned& name, Owned& found);

// Whether the object's type is `type` itself.
inline bool Is(PyObject* object, const Owned& type) {
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(type.get());
}

}  // namespace bridge::eager

#endif  // CPP_DEVICE_EAGER_STATE_H_
