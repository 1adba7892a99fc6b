// A CUDA driver for machines without a GPU. It computes at once, and keeps books of what a GPU
// would have been free to do in another order: see fake_state.h.

#include "fake_state.h"

using namespace fake;  // NOLINT

Uncounted::Uncounted() { ++Mine().uncounted; }
Uncounted::~Uncounted() { --Mine().uncounted; }

// --- the driver ----------------------------------------------------------------------------------

FAKE_EXPORT int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int code = Enter(lock, "cuPointerGetAttribute", Mine().device, "");
  int device = DeviceOfMemory(s, static_cast<uintptr_t>(pointer));
  if (code != 0 || attribute != 9 || device < 0) return code != 0 ? code : kInvalid;
  *static_cast<int*>(data) = device;
  return 0;
}

FAKE_EXPORT int cuCtxGetDevice(int* device) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  *device = Mine().device;
  return Enter(lock, "cuCtxGetDevice", Mine().device, "");
}

// A device's context is its number and one, as a handle. A thread has a stack of them, but for the
// lowest, which fake_set_device changes.
FAKE_EXPORT int cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(Mine().device) + 1);
  return 0;
}

FAKE_EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (context == nullptr) return kInvalid;
  Mine().contexts.push_back(Mine().device);
  Mine().device = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1;
  return 0;
}

FAKE_EXPORT int cuCtxPopCurrent_v2(void**) {
  if (Mine().contexts.empty()) return kInvalid;
  Mine().device = Mine().contexts.back();
  Mine().contexts.pop_back();
  return 0;
}

FAKE_EXPORT int cuEventCreate(void** event, unsigned) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  if (int code = Enter(lock, "cuEventCreate", Mine().device, "")) return code;
  *event = reinterpret_cast<void*>(s.next_handle += 16);
  s.events[*event].device = Mine().device;
  return 0;
}

FAKE_EXPORT int cuEventDestroy_v2(void* event) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  if (int code = Enter(lock, "cuEventDestroy", Mine().device, "")) return code;
  return s.events.erase(event) == 1 ? 0 : kInvalid;
}

FAKE_EXPORT int cuEventRecord(void* event, void* stream) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int device = DeviceOfStream(s, stream);
  if (int code = Enter(lock, "cuEventRecord", device, " stream=" + Hex(stream))) return code;
  auto found = s.events.find(event);
  // An event and the stream that it is recorded on belong to one device.
  if (found == s.events.end() || found->second.device != device) return kInvalid;
  Stream& recorded = StreamOf(s, stream);
  Join(&recorded.clock, Mine().known);
  found->second.clock = recorded.clock;
  return 0;
}

FAKE_EXPORT int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int device = DeviceOfStream(s, stream);
  if (int code = Enter(lock, "cuStreamWaitEvent", device, " stream=" + Hex(stream))) return code;
  auto found = s.events.find(event);
  if (found == s.events.end()) return kInvalid;
  Join(&StreamOf(s, stream).clock, found->second.clock);
  return 0;
}

// A GPU is at no time known to be done with anything but what the host has waited for.
FAKE_EXPORT int cuEventQuery(void* event) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  auto found = s.events.find(event);
  if (found == s.events.end()) return kInvalid;
  if (int code = Enter(lock, "cuEventQuery", found->second.device, "")) return code;
  return Known(s, found->second.clock) ? 0 : kNotReady;
}

FAKE_EXPORT int cuEventSynchronize(void* event) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  auto found = s.events.find(event);
  if (found == s.events.end()) return kInvalid;
  if (int code = Enter(lock, "cuEventSynchronize", found->second.device, "")) return code;
  Learn(s, found->second.clock);
  return 0;
}

FAKE_EXPORT int cuStreamSynchronize(void* stream) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int device = DeviceOfStream(s, stream);
  if (int code = Enter(lock, "cuStreamSynchronize", device, " stream=" + Hex(stream))) return code;
  Clock clock = StreamOf(s, stream).clock;
  Learn(s, clock);
  return 0;
}

FAKE_EXPORT int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  if (int code = Enter(lock, "cuMemHostAlloc", Mine().device, "")) return code;
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  s.pinned[reinterpret_cast<uintptr_t>(*memory)] = bytes;
  return 0;
}

FAKE_EXPORT int cuMemFreeHost(void* memory) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  if (int code = Enter(lock, "cuMemFreeHost", Mine().device, "")) return code;
  if (s.pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 0) return kInvalid;
  std::free(memory);
  return 0;
}

namespace {

bool IsPinned(const State& s, const void* memory, size_t bytes) {
  auto address = reinterpret_cast<uintptr_t>(memory);
  auto found = s.pinned.upper_bound(address);
  return found != s.pinned.begin() && address + bytes <= (--found)->first + found->second;
}

}  // namespace

FAKE_EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int device = DeviceOfStream(s, stream);
  if (int code = Enter(lock, "cuMemcpyDtoDAsync", device, " stream=" + Hex(stream))) return code;
  size_t operation = Queue(s, stream, "a copy");
  Touch(s, operation, reinterpret_cast<void*>(from), bytes, false);
  Touch(s, operation, reinterpret_cast<void*>(to), bytes, true);
  std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  return 0;
}

// The host's memory is read when the stream gets there, so the host must not write to it before.
// That is checked for pinned memory that is read again, and memory that is not pinned is refused.
FAKE_EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int device = DeviceOfStream(s, stream);
  std::string note = " stream=" + Hex(stream) + " from=" + Hex(from);
  if (int code = Enter(lock, "cuMemcpyHtoDAsync", device, note)) return code;
  if (!IsPinned(s, from, bytes)) {
    s.races.push_back("a copy from memory that is not pinned, so the host waits");
  }
  auto begin = reinterpret_cast<uintptr_t>(from);
  for (const Access& other : s.accesses) {
    if (other.end <= begin || begin + bytes <= other.begin) continue;
    if (!Done(s, other.operation, Mine().known)) {
      s.races.push_back("the host writes to pinned memory that a queued copy uses");
    }
  }
  size_t operation = Queue(s, stream, "a copy from the host");
  Touch(s, operation, from, bytes, false);
  Touch(s, operation, reinterpret_cast<void*>(to), bytes, true);
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}

FAKE_EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int device = DeviceOfStream(s, stream);
  if (int code = Enter(lock, "cuMemcpyDtoHAsync", device, " stream=" + Hex(stream))) return code;
  if (!IsPinned(s, to, bytes)) {
    s.races.push_back("a copy to memory that is not pinned, so the host waits");
  }
  size_t operation = Queue(s, stream, "a copy to the host");
  Touch(s, operation, reinterpret_cast<void*>(from), bytes, false);
  Touch(s, operation, to, bytes, true);
  auto* source = reinterpret_cast<char*>(from);
  s.arriving.push_back({to, std::vector<char>(source, source + bytes), operation});
  std::memset(to, 0xEE, bytes);
  return 0;
}
