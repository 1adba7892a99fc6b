// What the two halves of the fake GPU share: the driver (fake_driver.cc) and PyTorch's device guard
// (fake_guard.cc). Host memory stands for device memory.

#ifndef TESTS_GPU_FAKE_CUDA_H_
#define TESTS_GPU_FAKE_CUDA_H_

#include <cstddef>
#include <cstdint>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int kDevices = 2;

FAKE_EXPORT int cuEventCreate(void** event, unsigned flags);
FAKE_EXPORT int cuEventRecord(void* event, void* stream);
FAKE_EXPORT int cuEventDestroy_v2(void* event);
FAKE_EXPORT int cuStreamWaitEvent(void* stream, void* event, unsigned flags);
FAKE_EXPORT int cuEventQuery(void* event);
FAKE_EXPORT int cuEventSynchronize(void* event);
FAKE_EXPORT int cuStreamSynchronize(void* stream);

// The thread's current device, as the current context has it.
FAKE_EXPORT int fake_device();
FAKE_EXPORT void fake_set_device(int device);
// The thread's current stream of PyTorch on a device: a handle of the driver.
FAKE_EXPORT void* fake_torch_stream(int device);
FAKE_EXPORT void fake_set_torch_stream(int device, void* stream);
FAKE_EXPORT void* fake_new_stream(int device);

// Work of PyTorch's own does not count among the calls of the extension, nor does it fail or block.
struct Uncounted {
  Uncounted();
  ~Uncounted();
};

#endif  // TESTS_GPU_FAKE_CUDA_H_
