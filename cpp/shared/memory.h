// Keeps the memory of large results with malloc.

#ifndef CPP_SHARED_MEMORY_H_
#define CPP_SHARED_MEMORY_H_

#include <cstddef>

namespace bridge {

// Callers pass the size of each result that they make on a CPU. See NOTE [Large results].
void KeepFreedMemory(size_t bytes);

}  // namespace bridge

#endif  // CPP_SHARED_MEMORY_H_
