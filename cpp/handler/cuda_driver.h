// The few entry points of the CUDA (or HIP) driver that the handler needs, resolved from the
// library that is already in the process when there is a GPU. Nothing is linked, nothing is loaded
// on CPU-only machines.

#ifndef CPP_HANDLER_CUDA_DRIVER_H_
#define CPP_HANDLER_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace bridge {

class Driver {
 public:
  // Chooses HIP in place of CUDA; before the first use of anything else.
  static void UseRocm(bool rocm) noexcept;
  // The device that `pointer` lives on; null or not a device pointer: the thread's current device,
  // or 0.
  static int32_t DeviceOf(const void* pointer) noexcept;
  // Device to device, asynchronous, on `stream`. Empty, or what went wrong.
  static std::string Copy(void* to, const void* from, size_t bytes, void* stream);
  // What `later` is given from now on waits for what `earlier` holds now. Empty, or what went
  // wrong.
  static std::string Order(void* earlier, void* later);
};

}  // namespace bridge

#endif  // CPP_HANDLER_CUDA_DRIVER_H_
