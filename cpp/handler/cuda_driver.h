// The few functions of the CUDA or HIP driver that the handler needs. They come from the library
// that is already in the process where there is a GPU. Nothing is linked, and nothing is loaded on
// machines without one.

#ifndef CPP_HANDLER_CUDA_DRIVER_H_
#define CPP_HANDLER_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace bridge {

class Driver {
 public:
  // Chooses HIP in place of CUDA. To be called before anything else here is used.
  static void UseRocm(bool rocm) noexcept;
  // The device of the memory at `pointer`. Where `pointer` is null or of no device, this is the
  // thread's current device, or 0.
  static int32_t DeviceOf(const void* pointer) noexcept;
  // Copies from device to device, asynchronously, on `stream`. Returns an empty text, or what went
  // wrong.
  static std::string Copy(void* to, const void* from, size_t bytes, void* stream);
  // Makes what `later` is given from now on wait for what `earlier` holds now. Returns an empty
  // text, or what went wrong.
  static std::string Order(void* earlier, void* later);
};

}  // namespace bridge

#endif  // CPP_HANDLER_CUDA_DRIVER_H_
