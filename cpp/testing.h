// What tests need of the extension and users do not: built with T2J_TESTING alone.

#ifndef CPP_TESTING_H_
#define CPP_TESTING_H_

#include <cstddef>
#include <string>
#include <vector>

#include "shared/dlpack_abi.h"

namespace bridge::testing {

// NOTE [Injected faults]. The linker (--wrap, see CMakeLists.txt) puts functions of our own before
// those of Python and of the allocator that the handler calls, so its sources know nothing of
// faults. While armed, each such call is a step; the step with the chosen number fails as the real
// function would: null or -1, with MemoryError set, or std::bad_alloc.

// From now on steps count, from 0. Step `fails` fails; kNever counts alone.
inline constexpr size_t kNever = static_cast<size_t>(-1);
void Arm(size_t fails) noexcept;
// The names of the steps since Arm().
std::vector<std::string> Disarm();
// The exchange API with steps before its functions.
const dl::ExchangeApi* Watched(const dl::ExchangeApi* api);

// Adds, finds and withdraws entries in threads that do not hold the GIL. Throws
// std::runtime_error where one is not found, or another than that of its name. Needs the GIL.
void StressRegistry(size_t threads, size_t rounds);

}  // namespace bridge::testing

#endif  // CPP_TESTING_H_
