#include "handler/staging.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "handler/cuda_driver.h"

namespace bridge {
namespace {

struct Block {
  void* memory = nullptr;
  void* event = nullptr;  // where it is not null: recorded after the last copy from or to the block
};

struct Shelf {  // the blocks of one device and size that nobody holds
  std::deque<Block> blocks;
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

std::string Make(size_t size, Shelf* made) {
  const size_t count = std::max<size_t>(kPage / size, 1);
  void* memory = nullptr;
  std::string error = Driver::AllocatePinned(&memory, size * count);
  if (!error.empty()) return error;
  for (size_t i = 0; i < count; ++i) {
    made->blocks.push_back({static_cast<char*>(memory) + i * size, nullptr});
  }
  made->made = count;
  return "";
}

// Takes a block that no queued copy uses.
std::string Take(size_t size, int32_t device, Block* taken) {
  Shelves& shelves = GetShelves();
  bool may_make = true;
  {
    std::lock_guard lock(shelves.mutex);
    Shelf& shelf = shelves.by_size[{device, size}];
    may_make = shelf.made * size < kManyBytes;
    if (!shelf.blocks.empty()) {
      *taken = shelf.blocks.front();  // the one that has been there for longest
      shelf.blocks.pop_front();
    }
  }
  if (taken->memory != nullptr) {
    if (taken->event == nullptr || Driver::Reached(taken->event)) return "";
    if (!may_make) return Driver::WaitFor(taken->event);
  }
  Shelf made;
  std::string error = Make(size, &made);
  std::lock_guard lock(shelves.mutex);
  Shelf& shelf = shelves.by_size[{device, size}];
  if (taken->memory != nullptr) shelf.blocks.push_front(*taken);
  *taken = {};
  if (!error.empty()) return error;
  *taken = made.blocks.front();
  made.blocks.pop_front();
  shelf.made += made.made;
  // New blocks go first, because the others are in use.
  shelf.blocks.insert(shelf.blocks.begin(), made.blocks.begin(), made.blocks.end());
  return "";
}

void Return(size_t size, int32_t device, Block block) {
  Shelves& shelves = GetShelves();
  std::lock_guard lock(shelves.mutex);
  Shelf& shelf = shelves.by_size[{device, size}];
  shelf.blocks.push_back(block);
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
