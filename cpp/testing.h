// What tests need of the extension and users do not. It is built only with T2J_TESTING.

#ifndef CPP_TESTING_H_
#define CPP_TESTING_H_

#include <cstddef>
#include <string>
#include <vector>

#include "shared/dlpack_abi.h"

namespace bridge::testing {

// NOTE [Injected faults]. The handler calls functions of Python and of the allocator. The linker
// puts functions of our own in their place (--wrap, see CMakeLists.txt), so the handler's sources
// know nothing of faults. While armed, each such call is a step. The step with the chosen number
// fails as the real function would: it returns null or -1 with MemoryError set, or throws
// std::bad_alloc.

// Counts steps from now on, from 0. Step `fails` fails; with kNever no step does.
inline constexpr size_t kNever = static_cast<size_t>(-1);
void Arm(size_t fails) noexcept;
// The names of the steps since Arm().
std::vector<std::string> Disarm();
// The exchange API, whose functions are steps too.
const dl::ExchangeApi* Watched(const dl::ExchangeApi* api);

// Adds, finds and withdraws entries in threads that do not hold the GIL. Throws std::runtime_error
// where an entry is not found, or where a name finds another entry. Needs the GIL.
void StressRegistry(size_t threads, size_t rounds);

}  // namespace bridge::testing

#endif  // CPP_TESTING_H_
