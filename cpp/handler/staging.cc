#include "handler/staging.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "handler/cuda_driver.h"

namespace bridge {
namespace {

struct Block {
  void* memory = nullptr;
  void* event = nullptr;  // recorded after the last copy from or to the block
};

struct Shelf {               // the blocks of one device and size that nobody holds
  std::deque<Block> used;    // the one that has been there for longest first
  std::vector<Block> fresh;  // without events
  size_t made = 0;
};

struct Shelves {
  std::mutex mutex;
  std::map<std::pair<int32_t, size_t>, Shelf> by_size;
};

Shelves& GetShelves() {
  static auto* shelves = new Shelves;  // threads may outlive static destructors
  return *shelves;
}

constexpr size_t kSmallest = 256;
constexpr size_t kPage = size_t{1} << 16;
// Of larger blocks so many are made; then the host waits for the oldest.
constexpr size_t kManyBytes = size_t{1} << 24;

size_t SizeFor(size_t bytes) {
  size_t size = kSmallest;
  while (size < bytes) size *= 2;
  return size;
}

std::string Make(size_t size, std::vector<Block>* made) {
  const size_t count = std::max<size_t>(kPage / size, 1);
  void* memory = nullptr;
  std::string error = Driver::AllocatePinned(&memory, size * count);
  if (!error.empty()) return error;
  for (size_t i = 0; i < count; ++i) {
    made->push_back({static_cast<char*>(memory) + i * size, nullptr});
  }
  return "";
}

// Takes a block that no queued copy uses: one whose copy is done, or a fresh one.
std::string Take(size_t size, int32_t device, Block* taken) {
  Shelves& shelves = GetShelves();
  Block oldest;
  {
    std::lock_guard lock(shelves.mutex);
    Shelf& shelf = shelves.by_size[{device, size}];
    if (!shelf.used.empty()) {
      oldest = shelf.used.front();
      shelf.used.pop_front();
    }
  }
  if (oldest.memory != nullptr && Driver::Reached(oldest.event)) {
    *taken = oldest;
    return "";
  }
  bool may_make = true;
  {
    std::lock_guard lock(shelves.mutex);
    Shelf& shelf = shelves.by_size[{device, size}];
    may_make = oldest.memory == nullptr || shelf.made * size < kManyBytes;
    if (!shelf.fresh.empty()) {
      *taken = shelf.fresh.back();
      shelf.fresh.pop_back();
    }
    if (oldest.memory != nullptr && (taken->memory != nullptr || may_make)) {
      shelf.used.push_front(oldest);
    }
  }
  if (taken->memory != nullptr) return "";
  if (!may_make) {
    *taken = oldest;
    return Driver::WaitFor(oldest.event);
  }
  std::vector<Block> made;
  std::string error = Make(size, &made);
  if (!error.empty()) return error;
  *taken = made.back();
  made.pop_back();
  std::lock_guard lock(shelves.mutex);
  Shelf& shelf = shelves.by_size[{device, size}];
  shelf.made += made.size() + 1;
  shelf.fresh.insert(shelf.fresh.end(), made.begin(), made.end());
  return "";
}

void Return(size_t size, int32_t device, Block block) {
  Shelves& shelves = GetShelves();
  std::lock_guard lock(shelves.mutex);
  shelves.by_size[{device, size}].used.push_back(block);
}

}  // namespace

std::string Staging::ToDevice(void* to, const void* from, size_t bytes, int32_t device,
                              void* stream) {
  auto* target = static_cast<char*>(to);
  auto* source = static_cast<const char*>(from);
  while (bytes != 0) {
    const size_t part = std::min(bytes, kMostBytes), size = SizeFor(part);
    Block block;
    std::string error = Take(size, device, &block);
    if (!error.empty()) return error;
    std::memcpy(block.memory, source, part);
    error = Driver::CopyFromHost(target, block.memory, part, stream);
    if (error.empty()) error = Driver::Record(&block.event, stream);
    // Where that failed the block is lost, because nobody knows whether a copy uses it.
    if (!error.empty()) return error;
    Return(size, device, block);
    target += part;
    source += part;
    bytes -= part;
  }
  return "";
}

std::string Staging::Arriving::Begin(const void* from, size_t bytes, int32_t device, void* stream) {
  Block block;
  std::string error = Take(SizeFor(bytes), device, &block);
  if (!error.empty()) return error;
  error = Driver::CopyToHost(block.memory, from, bytes, stream);
  if (error.empty()) error = Driver::Record(&block.event, stream);
  if (!error.empty()) return error;
  memory_ = block.memory;
  event_ = block.event;
  bytes_ = bytes;
  device_ = device;
  return "";
}

std::string Staging::Arriving::Finish(void* to) {
  std::string error = Driver::WaitFor(event_);
  if (error.empty()) std::memcpy(to, memory_, bytes_);
  return error;
}

Staging::Arriving::Arriving(Arriving&& other) noexcept { *this = std::move(other); }

Staging::Arriving& Staging::Arriving::operator=(Arriving&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(event_, other.event_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

Staging::Arriving::~Arriving() {
  if (memory_ != nullptr) Return(SizeFor(bytes_), device_, {memory_, event_});
}

std::string Staging::ToHost(void* to, const void* from, size_t bytes, int32_t device,
                            void* stream) {
  Arriving arriving;
  std::string error = arriving.Begin(from, bytes, device, stream);
  return error.empty() ? arriving.Finish(to) : error;
}

}  // namespace bridge
