// The few functions of the CUDA or HIP driver that the handler needs. They come from the library
// that is already in the process where there is a GPU. Nothing is linked, and nothing is loaded on
// machines without one.
//
// Where a launch queue is full, the driver's functions wait for the GPU. So callers release the GIL
// before they call any of these. Functions that can fail return an empty text, or what went wrong.

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

  // Copies on `stream`. The host's memory is pinned, and may not change before the copy is done.
  static std::string Copy(void* to, const void* from, size_t bytes, void* stream);
  static std::string CopyFromHost(void* to, const void* pinned, size_t bytes, void* stream);
  static std::string CopyToHost(void* pinned, const void* from, size_t bytes, void* stream);
  // Memory that every device can copy from and to by itself.
  static std::string AllocatePinned(void** memory, size_t bytes);

  // Has `event` stand for what `stream` holds now. Where it is null, an event is created first, on
  // the thread's current device, which must be the stream's.
  static std::string Record(void** event, void* stream);
  // Whether the GPU has got to the event.
  static bool Reached(void* event) noexcept;
  // Waits until it has.
  static std::string WaitFor(void* event);
  // Makes what `later` is given from now on wait for what `earlier` holds now. Both are streams of
  // `device`, which is the thread's current one.
  static std::string Order(void* earlier, void* later, int32_t device);

  // The context that is current on this thread, or null. A thread makes one current for a while by
  // Enter and Leave.
  static void* Context() noexcept;
  static bool Enter(void* context) noexcept;
  static void Leave() noexcept;
};

}  // namespace bridge

#endif  // CPP_HANDLER_CUDA_DRIVER_H_
