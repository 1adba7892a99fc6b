// The registry finds the Python callables of this process by their names in compiled programs.

#ifndef CPP_HANDLER_REGISTRY_H_
#define CPP_HANDLER_REGISTRY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "shared/guards.h"

namespace bridge {

// What the handler knows of one callable. It is immutable once it is registered, except for the
// counters and for `run`, `collect`, `place` and `default_dtype`, which the garbage collector may
// clear (see NOTE [Registry lifetimes]).
struct Callable {
  std::string name;
  std::string label;                 // the user's function, for messages
  std::vector<std::string> inputs;   // "args[0]['w']"
  std::vector<std::string> outputs;  // "result[1]"
  std::vector<char> inplace;         // per input: may change
  bool any_inplace = false;
  bool pass_outputs = false;
  bool pure = false;  // a call may be made again
  Owned run;
  Owned collect;  // makes a tuple of whatever else `run` returns; may be null
  Owned place;    // `run` where results are large; may be null. See NOTE [Placed results].
  Owned default_dtype;
  std::atomic<uint64_t> calls{0};
  std::atomic<uint64_t> not_placed{0};  // the results, as a number, that `place` did not want last
};

// What one call holds: the callable, and references of its own.
struct Found {
  std::shared_ptr<Callable> callable;
  Owned run;
  Owned collect;
  Owned place;
  Owned default_dtype;
};

// NOTE [Registry lifetimes]. The registry owns nothing. An entry lives as long as its Python
// object, which executables keep alive. The registry has a lock of its own and never relies on the
// GIL. `run`, `collect`, `place` and `default_dtype` change only under that lock, where the
// destructor or the garbage collector calls Withdraw. So a call that finds an entry takes
// references of its own. No Python code runs under the lock.
class Registry {
 public:
  // False: a live entry has this name.
  static bool Add(const std::shared_ptr<Callable>& callable);
  // Removes the entry and drops its references. May be called again. Needs the GIL.
  static void Withdraw(Callable& callable) noexcept;
  // `callable` is null where there is none. Needs the GIL.
  static Found Find(std::string_view name);
};

}  // namespace bridge

#endif  // CPP_HANDLER_REGISTRY_H_
