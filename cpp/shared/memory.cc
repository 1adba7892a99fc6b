#include "shared/memory.h"

#include <cstdlib>

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

}  // namespace bridge
