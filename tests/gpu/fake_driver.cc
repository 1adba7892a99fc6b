// A CUDA driver for machines without a GPU. It computes at once, and keeps books of what a GPU
// would have been free to do in another order.
//
// NOTE [Clocks]. Every stream has a vector clock: for each stream, how much of that stream's work
// has to be done before this stream's next operation starts. An operation advances its own stream's
// entry by one. Recording an event stores the stream's clock in it, and waiting for an event joins
// the event's clock into the stream's. A thread of the host has such a clock too, of what it knows
// to be done, because it has waited for it; what it queues starts later than that. An operation A
// of stream `s`, the `n`th there, happens before B where B's clock has at least `n` for `s`. Two
// operations on the same bytes, of which one writes, are a race where neither happens before the
// other.
//
// Copies to the host do not arrive before the host has waited for them.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fake_cuda.h"

namespace {

using Clock = std::map<int, uint64_t>;  // by the stream's number

void Join(Clock* into, const Clock& other) {
  for (auto [stream, count] : other) {
    uint64_t& mine = (*into)[stream];
    mine = std::max(mine, count);
  }
}

struct Stream {
  int number = 0;
  int device = 0;
  Clock clock;
};

struct Event {
  int device = 0;
  Clock clock;
};

struct Operation {
  int stream = 0;
  uint64_t count = 0;
  Clock before;  // what has to be done before it starts
  std::string label;
};

struct Access {
  uintptr_t begin = 0, end = 0;
  bool write = false;
  size_t operation = 0;
};

struct Arriving {  // a copy to the host that has been queued
  void* to;
  std::vector<char> bytes;
  size_t operation;
};

struct Block {
  size_t bytes = 0;
  int device = 0;
  void* stream = nullptr;       // PyTorch allocates for one stream
  std::vector<void*> recorded;  // record_stream
  std::vector<Clock> until;     // when it was freed: what has to be done before it is used again
  bool free = false;
};

struct Failure {
  int after;  // so many calls succeed first
  int code;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::pair<int, void*>, Stream> streams;
  std::map<void*, Event> events;
  std::map<uintptr_t, Block> blocks;                    // PyTorch's memory
  std::map<uintptr_t, std::pair<size_t, int>> foreign;  // XLA's memory and its device
  std::map<uintptr_t, size_t> pinned;
  std::vector<Operation> operations;
  std::vector<Access> accesses;
  std::vector<Arriving> arriving;
  std::vector<std::string> races, log;
  std::map<std::string, int> counts;
  std::map<std::string, Failure> failures;
  std::set<std::pair<std::string, int>> blocking;  // function and device
  int waiting = 0, longest_wait = 600'000;         // threads; milliseconds
  uintptr_t next_handle = 0x1000;
  size_t frees = 0;
  std::string text;  // what was returned last
};

State& Get() {
  static auto* state = new State;
  return *state;
}

struct Thread {
  int device = 0;
  void* torch_streams[kDevices] = {};
  Clock known;
  int uncounted = 0;
  std::vector<int> contexts;
};

Thread& Mine() {
  thread_local Thread thread;
  return thread;
}

int DeviceOfStream(State& s, void* stream) {
  for (auto& [key, value] : s.streams) {
    if (stream != nullptr && key.second == stream) return value.device;
  }
  return Mine().device;
}

Stream& StreamOf(State& s, void* handle) {
  int device = DeviceOfStream(s, handle);
  auto [found, is_new] = s.streams.try_emplace({device, handle});
  if (is_new) {
    found->second.number = static_cast<int>(s.streams.size());
    found->second.device = device;
  }
  return found->second;
}

std::string Hex(const void* p) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", p);
  return text;
}

// Counts a call of the extension. Waits where the test has the function wait, and returns the error
// that the test wants. Every function calls it first, with the lock held.
int Enter(std::unique_lock<std::mutex>& lock, const char* name, int device,
          const std::string& note) {
  State& s = Get();
  if (Mine().uncounted != 0) return 0;
  ++s.counts[name];
  s.log.push_back(std::string(name) + " device=" + std::to_string(device) + note);
  if (s.blocking.count({name, device}) != 0) {
    ++s.waiting;
    s.changed.notify_all();
    s.changed.wait_for(lock, std::chrono::milliseconds(s.longest_wait),
                       [&] { return s.blocking.count({name, device}) == 0; });
    --s.waiting;
    s.changed.notify_all();
  }
  auto failure = s.failures.find(name);
  if (failure == s.failures.end() || failure->second.after-- > 0) return 0;
  int code = failure->second.code;
  s.failures.erase(failure);
  return code;
}

bool Before(const Operation& a, const Operation& b) {
  auto found = b.before.find(a.stream);
  return found != b.before.end() && found->second >= a.count;
}

// Queues an operation on a stream.
size_t Queue(State& s, void* handle, const std::string& label) {
  Stream& stream = StreamOf(s, handle);
  Join(&stream.clock, Mine().known);
  Operation operation;
  operation.stream = stream.number;
  operation.before = stream.clock;
  operation.count = ++stream.clock[stream.number];
  operation.label = label + " on " + Hex(handle);
  s.operations.push_back(std::move(operation));
  return s.operations.size() - 1;
}

void Touch(State& s, size_t operation, const void* memory, size_t bytes, bool write) {
  auto begin = reinterpret_cast<uintptr_t>(memory);
  uintptr_t end = begin + bytes;
  if (bytes == 0) return;
  const Operation& mine = s.operations[operation];
  for (const Access& other : s.accesses) {
    if (other.operation == operation || !(write || other.write)) continue;
    if (other.end <= begin || end <= other.begin) continue;
    const Operation& theirs = s.operations[other.operation];
    if (Before(theirs, mine)) continue;
    s.races.push_back(mine.label + (write ? " writes" : " reads") + " what " + theirs.label +
                      (other.write ? " writes" : " reads"));
  }
  s.accesses.push_back({begin, end, write, operation});
}

bool Done(const State& s, size_t operation, const Clock& known) {
  const Operation& done = s.operations[operation];
  auto found = known.find(done.stream);
  return found != known.end() && found->second >= done.count;
}

// The host has waited for all that is in `clock`.
void Learn(State& s, const Clock& clock) {
  Join(&Mine().known, clock);
  auto arrived = [&](const Arriving& copy) {
    if (!Done(s, copy.operation, clock)) return false;
    std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    return true;
  };
  s.arriving.erase(std::remove_if(s.arriving.begin(), s.arriving.end(), arrived), s.arriving.end());
}

// How many bytes from `address` on lie in one block of memory that the driver knows, and where that
// memory is: a device's number, or -1 for the host's.
int DeviceOfMemory(const State& s, uintptr_t address) {
  auto block = s.blocks.upper_bound(address);
  if (block != s.blocks.begin() && address < (--block)->first + block->second.bytes) {
    return block->second.device;
  }
  auto foreign = s.foreign.upper_bound(address);
  if (foreign != s.foreign.begin() && address < (--foreign)->first + foreign->second.first) {
    return foreign->second.second;
  }
  return -1;
}

bool Known(const State& s, const Clock& clock) {
  const Clock& known = Mine().known;
  static_cast<void>(s);
  for (auto [stream, count] : clock) {
    auto found = known.find(stream);
    if (found == known.end() || found->second < count) return false;
  }
  return true;
}

constexpr int kInvalid = 1, kNotReady = 600, kOutOfMemory = 2;

}  // namespace

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

// --- what tests and the stand-in for PyTorch's kernels ask --------------------------------------

FAKE_EXPORT int fake_device() { return Mine().device; }
FAKE_EXPORT void fake_set_device(int device) { Mine().device = device; }
FAKE_EXPORT void* fake_torch_stream(int device) { return Mine().torch_streams[device]; }
FAKE_EXPORT void fake_set_torch_stream(int device, void* stream) {
  Mine().torch_streams[device] = stream;
}

FAKE_EXPORT void* fake_new_stream(int device) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  void* handle = reinterpret_cast<void*>(s.next_handle += 16);
  Stream& stream = s.streams[{device, handle}];
  stream.number = static_cast<int>(s.streams.size());
  stream.device = device;
  return handle;
}

// The next `after` calls of a driver's function succeed, and the one after them returns `code`.
FAKE_EXPORT void fake_fail(const char* name, int after, int code) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  s.failures[name] = {after, code};
}

// Calls of a driver's function on a device wait, until this is called with `wait` 0.
FAKE_EXPORT void fake_block(const char* name, int device, int wait) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  if (wait != 0) {
    s.blocking.insert({name, device});
  } else {
    s.blocking.erase({name, device});
  }
  s.changed.notify_all();
}

// Waits until a thread waits in a driver's function; 0 where none does in time.
FAKE_EXPORT int fake_wait_until_blocked(int milliseconds) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return s.changed.wait_for(lock, std::chrono::milliseconds(milliseconds),
                            [&] { return s.waiting > 0; });
}

// Calls that wait go on by themselves after so long.
FAKE_EXPORT void fake_unblock_after(int milliseconds) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  s.longest_wait = milliseconds;
}

// How many threads wait in the driver.
FAKE_EXPORT int fake_waiting() {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return s.waiting;
}

FAKE_EXPORT int fake_count(const char* name) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  auto found = s.counts.find(name);
  return found == s.counts.end() ? 0 : found->second;
}

namespace {

const char* Lines(State& s, const std::vector<std::string>& lines) {
  s.text.clear();
  for (const std::string& line : lines) s.text += line + "\n";
  return s.text.c_str();
}

}  // namespace

FAKE_EXPORT const char* fake_log() {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return Lines(s, s.log);
}

FAKE_EXPORT const char* fake_races() {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return Lines(s, s.races);
}

// Forgets counts, log, races, accesses, failures and waits. Streams, events and memory stay.
FAKE_EXPORT void fake_reset() {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  s.counts.clear();
  s.log.clear();
  s.races.clear();
  s.accesses.clear();
  s.failures.clear();
  s.blocking.clear();
  s.frees = 0;
  s.longest_wait = 600'000;
  s.changed.notify_all();
}

// Queues a kernel on a stream; returns its number.
FAKE_EXPORT size_t fake_kernel(void* stream, int device, const char* label) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  int before = std::exchange(Mine().device, device);
  size_t operation = Queue(s, stream, label);
  Mine().device = before;
  return operation;
}

FAKE_EXPORT void fake_touch(size_t operation, const void* memory, size_t bytes, int write) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  Touch(s, operation, memory, bytes, write != 0);
}

// Whether operation `a` is done before operation `b` starts.
FAKE_EXPORT int fake_before(size_t a, size_t b) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return Before(s.operations[a], s.operations[b]);
}

// Whether this thread of the host knows that an operation is done.
FAKE_EXPORT int fake_known(size_t operation) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return Done(s, operation, Mine().known);
}

// The last operation that touched a byte, or -1.
FAKE_EXPORT long fake_last(const void* memory, int write) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  auto address = reinterpret_cast<uintptr_t>(memory);
  for (size_t i = s.accesses.size(); i-- > 0;) {
    const Access& access = s.accesses[i];
    if (access.begin <= address && address < access.end && access.write == (write != 0)) {
      return static_cast<long>(access.operation);
    }
  }
  return -1;
}

FAKE_EXPORT void fake_known_memory(void* memory, size_t bytes, int device) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  if (device < 0) {
    s.foreign.erase(reinterpret_cast<uintptr_t>(memory));
  } else {
    s.foreign[reinterpret_cast<uintptr_t>(memory)] = {bytes, device};
  }
}

// PyTorch's caching allocator: it gives freed memory at once to the stream that it was allocated
// for, unless record_stream named another stream; then when that stream is known to be done.
FAKE_EXPORT void* fake_allocate(size_t bytes, int device) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  void* stream = Mine().torch_streams[device];
  size_t rounded = std::max<size_t>((bytes + 511) / 512 * 512, 512);
  for (auto& [address, block] : s.blocks) {
    if (!block.free || block.bytes != rounded || block.device != device || block.stream != stream) {
      continue;
    }
    bool done = std::all_of(block.until.begin(), block.until.end(),
                            [&](const Clock& clock) { return Known(s, clock); });
    if (!done) continue;
    block.free = false;
    block.until.clear();
    block.recorded.clear();
    return reinterpret_cast<void*>(address);
  }
  void* memory = std::aligned_alloc(512, rounded);
  Block& block = s.blocks[reinterpret_cast<uintptr_t>(memory)];
  block.bytes = rounded;
  block.device = device;
  block.stream = stream;
  return memory;
}

FAKE_EXPORT void fake_free(void* memory) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  Block& block = s.blocks[reinterpret_cast<uintptr_t>(memory)];
  block.free = true;
  ++s.frees;
  for (void* stream : block.recorded) block.until.push_back(StreamOf(s, stream).clock);
}

FAKE_EXPORT void fake_record_stream(void* memory, void* stream) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  auto found = s.blocks.upper_bound(reinterpret_cast<uintptr_t>(memory));
  if (found == s.blocks.begin()) return;
  --found;
  if (found->second.stream != stream) found->second.recorded.push_back(stream);
}

// How many blocks were freed since the last reset.
FAKE_EXPORT size_t fake_frees() {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return s.frees;
}

// --- tensors of PyTorch on that memory ----------------------------------------------------------

namespace {

struct Dlpack {  // DLManagedTensor of DLPack 0.x and 1.x
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
  void* context;
  void (*deleter)(Dlpack* self);
};

}  // namespace

// A tensor in new memory of the device; PyTorch takes it over by a capsule.
FAKE_EXPORT void* fake_tensor(size_t bytes, int device, int code, int bits, int ndim,
                              const int64_t* shape, const int64_t* strides) {
  auto* self = new Dlpack;
  self->data = fake_allocate(bytes, device);
  self->device_type = 2;
  self->device_id = device;
  self->ndim = ndim;
  self->code = static_cast<uint8_t>(code);
  self->bits = static_cast<uint8_t>(bits);
  self->lanes = 1;
  self->shape = new int64_t[2 * static_cast<size_t>(ndim) + 1];
  self->strides = self->shape + ndim;
  std::copy(shape, shape + ndim, self->shape);
  std::copy(strides, strides + ndim, self->strides);
  self->byte_offset = 0;
  self->context = nullptr;
  self->deleter = [](Dlpack* tensor) {
    fake_free(tensor->data);
    delete[] tensor->shape;
    delete tensor;
  };
  return self;
}

// As PyTorch's DLPack exchange API has it.
FAKE_EXPORT int fake_current_work_stream(int32_t device_type, int32_t device, void** stream) {
  *stream = device_type == 2 ? fake_torch_stream(device) : nullptr;
  return 0;
}

// PyTorch makes the host wait for a stream.
FAKE_EXPORT void fake_uncounted_synchronize(void* stream) {
  Uncounted own;
  cuStreamSynchronize(stream);
}

// PyTorch copies; the test may have it wait, under this name.
FAKE_EXPORT int fake_torch_copy(int device) {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  return Enter(lock, "fake_torch_copy", device, "");
}

// Somebody else has a stream wait for another.
FAKE_EXPORT void fake_order(void* earlier, void* later, int device) {
  Uncounted own;
  int before = std::exchange(Mine().device, device);
  void* event = nullptr;
  cuEventCreate(&event, 2);
  cuEventRecord(event, earlier);
  cuStreamWaitEvent(later, event, 0);
  cuEventDestroy_v2(event);
  Mine().device = before;
}
