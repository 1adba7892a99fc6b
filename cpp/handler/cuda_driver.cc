#include "handler/cuda_driver.h"

#include <dlfcn.h>

#include <atomic>

namespace bridge {
namespace {

// Both drivers have these signatures. The handles are opaque pointers. Device pointers are integers
// in CUDA and pointers in HIP, and both travel in the same register.
struct Api {
  int (*pointer_get_attribute)(void* data, int attribute, uint64_t pointer) = nullptr;
  int (*get_device)(int* device) = nullptr;
  int (*copy_async)(uint64_t to, uint64_t from, size_t bytes, void* stream) = nullptr;
  int (*event_create)(void** event, unsigned flags) = nullptr;
  int (*event_record)(void* event, void* stream) = nullptr;
  int (*event_destroy)(void* event) = nullptr;
  int (*stream_wait_event)(void* stream, void* event, unsigned flags) = nullptr;
  bool loaded = false;
};

constexpr int kPointerAttributeDeviceOrdinal = 9;  // the same number in both
constexpr unsigned kEventDisableTiming = 2;

std::atomic<bool> use_rocm{false};

Api Load() {
  bool rocm = use_rocm.load();
  Api api;
  void* library = dlopen(rocm ? "libamdhip64.so" : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return api;
  bool complete = true;
  auto resolve = [&](auto& entry, const char* cuda, const char* hip) {
    entry = reinterpret_cast<std::decay_t<decltype(entry)>>(dlsym(library, rocm ? hip : cuda));
    complete = complete && entry != nullptr;
  };
  resolve(api.pointer_get_attribute, "cuPointerGetAttribute", "hipPointerGetAttribute");
  resolve(api.get_device, "cuCtxGetDevice", "hipGetDevice");
  resolve(api.copy_async, "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync");
  resolve(api.event_create, "cuEventCreate", "hipEventCreateWithFlags");
  resolve(api.event_record, "cuEventRecord", "hipEventRecord");
  resolve(api.event_destroy, "cuEventDestroy_v2", "hipEventDestroy");
  resolve(api.stream_wait_event, "cuStreamWaitEvent", "hipStreamWaitEvent");
  api.loaded = complete;
  return api;
}

const Api& GetApi() {
  static const Api api = Load();
  return api;
}

std::string Failed(const char* what, int code) {
  return std::string(what) + " failed with driver error " + std::to_string(code);
}

}  // namespace

void Driver::UseRocm(bool rocm) noexcept { use_rocm.store(rocm); }

int32_t Driver::DeviceOf(const void* pointer) noexcept {
  const Api& api = GetApi();
  int device = 0;
  if (!api.loaded) return 0;
  if (pointer != nullptr && api.pointer_get_attribute(&device, kPointerAttributeDeviceOrdinal,
                                                      reinterpret_cast<uint64_t>(pointer)) == 0) {
    return device;
  }
  // XLA has made its device the current one. In CUDA a device's handle is its number.
  return api.get_device(&device) == 0 ? device : 0;
}

std::string Driver::Copy(void* to, const void* from, size_t bytes, void* stream) {
  const Api& api = GetApi();
  if (!api.loaded) return "the GPU driver library could not be loaded";
  int code = api.copy_async(reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), bytes,
                            stream);
  return code == 0 ? "" : Failed("an asynchronous copy on the GPU", code);
}

std::string Driver::Order(void* earlier, void* later) {
  if (earlier == later) return "";
  const Api& api = GetApi();
  if (!api.loaded) return "the GPU driver library could not be loaded";
  void* event = nullptr;
  int code = api.event_create(&event, kEventDisableTiming);
  if (code != 0) return Failed("creating an event", code);
  code = api.event_record(event, earlier);
  if (code == 0) code = api.stream_wait_event(later, event, 0);
  api.event_destroy(event);  // the driver keeps it until it has been reached
  return code == 0 ? "" : Failed("ordering two streams", code);
}

}  // namespace bridge
