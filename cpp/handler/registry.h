// The registry: names in compiled programs -> Python callables of this process.

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

// What the handler knows of one callable. Immutable once registered, but for `run`,
// `collect` and `default_dtype`, which belong to the garbage collector's world (see Registry), and
// the counter.
struct Callable {
  std::string name;
  std::string label;                 // the user's function, for messages
  std::vector<std::string> inputs;   // "args[0]['w']"
  std::vector<std::string> outputs;  // "result[1]"
  std::vector<char> inplace;         // per input: may change
  bool any_inplace = false;
  bool pass_outputs = false;
  Owned run;
  Owned collect;  // makes a tuple of whatever else `run` returns; may be null
  Owned default_dtype;
  std::atomic<uint64_t> calls{0};
};

// What one call holds: the description, and references of its own.
struct Found {
  std::shared_ptr<Callable> callable;
  Owned run;
  Owned collect;
  Owned default_dtype;
};

// NOTE [Registry lifetimes]. The registry owns nothing: an entry lives as long as its Python
// object, which executables keep alive. It has a lock of its own and never relies on the GIL.
// `run`, `collect` and `default_dtype` change only under that lock (Withdraw, from the destructor
// or the garbage collector), so a call that finds an entry holds references of its own. No Python
// code runs under the lock.
class Registry {
 public:
  // False: a live entry has this name.
  static bool Add(const std::shared_ptr<Callable>& callable);
  // Removes the entry and drops its references. Idempotent. Needs the GIL.
  static void Withdraw(Callable& callable) noexcept;
  // Needs the GIL. `callable` is null when there is none.
  static Found Find(std::string_view name);
};

}  // namespace bridge

#endif  // CPP_HANDLER_REGISTRY_H_
