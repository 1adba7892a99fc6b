// What the fake driver knows: streams, events, memory, and which work is done before which.
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

#ifndef TESTS_GPU_FAKE_STATE_H_
#define TESTS_GPU_FAKE_STATE_H_

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

namespace fake {

using Clock = std::map<int, uint64_t>;  // by the stream's number

inline void Join(Clock* into, const Clock& other) {
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

inline State& Get() {
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

inline Thread& Mine() {
  thread_local Thread thread;
  return thread;
}

inline int DeviceOfStream(State& s, void* stream) {
  for (auto& [key, value] : s.streams) {
    if (stream != nullptr && key.second == stream) return value.device;
  }
  return Mine().device;
}

inline Stream& StreamOf(State& s, void* handle) {
  int device = DeviceOfStream(s, handle);
  auto [found, is_new] = s.streams.try_emplace({device, handle});
  if (is_new) {
    found->second.number = static_cast<int>(s.streams.size());
    found->second.device = device;
  }
  return found->second;
}

inline std::string Hex(const void* p) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", p);
  return text;
}

// Counts a call of the extension. Waits where the test has the function wait, and returns the error
// that the test wants. Every function calls it first, with the lock held.
inline int Enter(std::unique_lock<std::mutex>& lock, const char* name, int device,
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

inline bool Before(const Operation& a, const Operation& b) {
  auto found = b.before.find(a.stream);
  return found != b.before.end() && found->second >= a.count;
}

// Queues an operation on a stream.
inline size_t Queue(State& s, void* handle, const std::string& label) {
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

inline void Touch(State& s, size_t operation, const void* memory, size_t bytes, bool write) {
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

inline bool Done(const State& s, size_t operation, const Clock& known) {
  const Operation& done = s.operations[operation];
  auto found = known.find(done.stream);
  return found != known.end() && found->second >= done.count;
}

// The host has waited for all that is in `clock`.
inline void Learn(State& s, const Clock& clock) {
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
inline int DeviceOfMemory(const State& s, uintptr_t address) {
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

inline bool Known(const State& s, const Clock& clock) {
  const Clock& known = Mine().known;
  static_cast<void>(s);
  for (auto [stream, count] : clock) {
    auto found = known.find(stream);
    if (found == known.end() || found->second < count) return false;
  }
  return true;
}

constexpr int kInvalid = 1, kNotReady = 600, kOutOfMemory = 2;

}  // namespace fake

#endif  // TESTS_GPU_FAKE_STATE_H_
