// What tests and the stand-in for PyTorch's kernels ask of the fake driver.

#include "fake_state.h"

using namespace fake;  // NOLINT

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

// Forgets what was done so far, so that long tests stay fast.
FAKE_EXPORT void fake_forget() {
  State& s = Get();
  std::unique_lock lock(s.mutex);
  s.accesses.clear();
  s.log.clear();
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
