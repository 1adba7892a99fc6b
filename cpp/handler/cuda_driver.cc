#include "handler/cuda_driver.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

namespace bridge {
namespace {

// Both drivers have these signatures. The handles are opaque pointers. Device pointers are integers
// in CUDA and pointers in HIP, and both travel in the same register.
struct Api {
  int (*copy_async)(uint64_t to, uint64_t from, size_t bytes, void* stream) = nullptr;
  int (*copy_from_host)(uint64_t to, const void* from, size_t bytes, void* stream) = nullptr;
  int (*copy_to_host)(void* to, uint64_t from, size_t bytes, void* stream) = nullptr;
  int (*host_alloc)(void** memory, size_t bytes, unsigned flags) = nullptr;
  int (*event_create)(void** event, unsigned flags) = nullptr;
  int (*event_record)(void* event, void* stream) = nullptr;
  int (*event_query)(void* event) = nullptr;
  int (*event_synchronize)(void* event) = nullptr;
  int (*stream_wait_event)(void* stream, void* event, unsigned flags) = nullptr;
  int (*context)(void** context) = nullptr;
  int (*push_context)(void* context) = nullptr;
  int (*pop_context)(void** context) = nullptr;
  bool loaded = false;
};

// These are the same numbers in both.
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostAllocPortable = 1;

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
  resolve(api.copy_async, "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync");
  resolve(api.copy_from_host, "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync");
  resolve(api.copy_to_host, "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync");
  resolve(api.host_alloc, "cuMemHostAlloc", "hipHostMalloc");
  resolve(api.event_create, "cuEventCreate", "hipEventCreateWithFlags");
  resolve(api.event_record, "cuEventRecord", "hipEventRecord");
  resolve(api.event_query, "cuEventQuery", "hipEventQuery");
  resolve(api.event_synchronize, "cuEventSynchronize", "hipEventSynchronize");
  resolve(api.stream_wait_event, "cuStreamWaitEvent", "hipStreamWaitEvent");
  resolve(api.context, "cuCtxGetCurrent", "hipCtxGetCurrent");
  resolve(api.push_context, "cuCtxPushCurrent_v2", "hipCtxPushCurrent");
  resolve(api.pop_context, "cuCtxPopCurrent_v2", "hipCtxPopCurrent");
  api.loaded = complete;
  return api;
}

const Api& GetApi() {
  static const Api api = Load();
  return api;
}

constexpr char kNotLoaded[] = "the GPU driver library could not be loaded";

std::string Failed(const char* what, int code) {
  return code == 0 ? "" : std::string(what) + " failed with driver error " + std::to_string(code);
}

// NOTE [Events for order]. Each thread keeps one event per device. It is recorded anew for each
// order, which does not change what earlier waits wait for. Creating events costs more than a copy.
// A thread that ends leaves its events to others, because no driver may be called when it ends.
using Events = std::vector<std::pair<int32_t, void*>>;  // by device

struct Spare {
  std::mutex mutex;
  Events events;
};

Spare& GetSpare() {
  static auto* spare = new Spare;  // threads may outlive static destructors
  return *spare;
}

struct ThreadEvents {
  Events events;

  ~ThreadEvents() {
    Spare& spare = GetSpare();
    std::lock_guard lock(spare.mutex);
    spare.events.insert(spare.events.end(), events.begin(), events.end());
  }
  // The thread's event for a device: null where it has to be created.
  void** Of(int32_t device) {
    for (auto& [of, event] : events) {
      if (of == device) return &event;
    }
    void* found = nullptr;
    Spare& spare = GetSpare();
    std::lock_guard lock(spare.mutex);
    for (size_t i = 0; i < spare.events.size() && found == nullptr; ++i) {
      if (spare.events[i].first != device) continue;
      found = spare.events[i].second;
      spare.events.erase(spare.events.begin() + static_cast<std::ptrdiff_t>(i));
    }
    return &events.emplace_back(device, found).second;
  }
};

}  // namespace

void Driver::UseRocm(bool rocm) noexcept { use_rocm.store(rocm); }

std::string Driver::Copy(void* to, const void* from, size_t bytes, void* stream) {
  const Api& api = GetApi();
  if (!api.loaded) return kNotLoaded;
  return Failed("an asynchronous copy on the GPU",
                api.copy_async(reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from),
                               bytes, stream));
}

std::string Driver::CopyFromHost(void* to, const void* pinned, size_t bytes, void* stream) {
  const Api& api = GetApi();
  if (!api.loaded) return kNotLoaded;
  return Failed("an asynchronous copy to the GPU",
                api.copy_from_host(reinterpret_cast<uint64_t>(to), pinned, bytes, stream));
}

std::string Driver::CopyToHost(void* pinned, const void* from, size_t bytes, void* stream) {
  const Api& api = GetApi();
  if (!api.loaded) return kNotLoaded;
  return Failed("an asynchronous copy from the GPU",
                api.copy_to_host(pinned, reinterpret_cast<uint64_t>(from), bytes, stream));
}

std::string Driver::AllocatePinned(void** memory, size_t bytes) {
  const Api& api = GetApi();
  if (!api.loaded) return kNotLoaded;
  return Failed("allocating pinned memory", api.host_alloc(memory, bytes, kHostAllocPortable));
}

std::string Driver::Record(void** event, void* stream) {
  const Api& api = GetApi();
  if (!api.loaded) return kNotLoaded;
  if (*event == nullptr) {
    void* created = nullptr;
    int code = api.event_create(&created, kEventDisableTiming);
    if (code != 0) return Failed("creating an event", code);
    *event = created;
  }
  return Failed("recording an event", api.event_record(*event, stream));
}

bool Driver::Reached(void* event) noexcept {
  const Api& api = GetApi();
  return api.loaded && api.event_query(event) == 0;
}

std::string Driver::WaitFor(void* event) {
  const Api& api = GetApi();
  if (!api.loaded) return kNotLoaded;
  return Failed("waiting for the GPU", api.event_synchronize(event));
}

std::string Driver::Order(void* earlier, void* later, int32_t device) {
  if (earlier == later) return "";
  thread_local ThreadEvents kept;
  void** event = kept.Of(device);
  std::string error = Record(event, earlier);
  if (!error.empty()) return error;
  return Failed("ordering two streams", GetApi().stream_wait_event(later, *event, 0));
}

void* Driver::Context() noexcept {
  const Api& api = GetApi();
  void* context = nullptr;
  return api.loaded && api.context(&context) == 0 ? context : nullptr;
}

bool Driver::Enter(void* context) noexcept {
  const Api& api = GetApi();
  return api.loaded && api.push_context(context) == 0;
}

void Driver::Leave() noexcept {
  void* left = nullptr;
  GetApi().pop_context(&left);
}

}  // namespace bridge
