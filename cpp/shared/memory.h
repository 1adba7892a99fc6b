// The memory of large results on a CPU.

#ifndef CPP_SHARED_MEMORY_H_
#define CPP_SHARED_MEMORY_H_

#include <cstddef>

namespace bridge {

// Callers pass the size of each result that they make on a CPU. See NOTE [Large results].
void KeepFreedMemory(size_t bytes);

// Callers pass memory of a result that is about to be written for the first time. See
// NOTE [Huge pages].
void UseHugePages(void* memory, size_t bytes) noexcept;

}  // namespace bridge

#endif  // CPP_SHARED_MEMORY_H_
