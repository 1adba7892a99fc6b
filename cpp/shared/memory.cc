#include "shared/memory.h"

#include <cstdint>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bridge {

// NOTE [Large results]. A call has two blocks for each result: PyTorch's and XLA's. Both are freed
// before the next call, and so are a JAX function's residuals and results. glibc gives freed memory
// back to the system once there is more of it than glibc has seen in one block. Fresh pages cost
// more than many an operator. So we show glibc one large block that nobody uses, the largest of
// which it takes notice. From then on it keeps up to twice as much, as it does after any large
// array of the user's. Settings of malloc in the environment take precedence.
void KeepFreedMemory(size_t bytes) {
  constexpr size_t kLarge = size_t{1} << 17;  // smaller blocks never leave malloc's own lists
  if (bytes < kLarge) return;
#ifdef __GLIBC__
  static const bool shown = [] {
    void* volatile block = std::malloc((size_t{32} << 20) - (size_t{1} << 16));
    std::free(block);
    return true;
  }();
  static_cast<void>(shown);
#endif
}

// NOTE [Huge pages]. glibc maps each block of 32 MiB or more anew, so all its pages are fresh. A
// page fault takes 2 us, and a block of 40 MB has 9,766 of them: five times the time of a copy. Of
// huge pages it has 19. Where the system leaves the choice to programs, we ask for them, as NumPy
// does for its large arrays. Smaller blocks come from memory that has its pages already.
void UseHugePages(void* memory, size_t bytes) noexcept {
#ifdef MADV_HUGEPAGE
  constexpr size_t kMapped = size_t{1} << 25, kPage = size_t{1} << 12;
  if (bytes < kMapped) return;
  auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (address + bytes) & ~(kPage - 1);
  // Where the system refuses, the pages are small.
  static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace bridge
