// Small copies between the host and a GPU, in the order of a stream, that do not stop the host.

#ifndef CPP_HANDLER_STAGING_H_
#define CPP_HANDLER_STAGING_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace bridge {

// NOTE [Staging]. A GPU copies by itself only from and to pinned memory, and reads it when the
// stream gets there. So bytes of the host are first written to a pinned block, which is used again
// once the copy is done: an event that is recorded after the copy says so. Blocks are kept for
// good. Nothing here needs the GIL, and no lock is held while the driver is called. Functions
// return an empty text, or what went wrong. The thread's current device is `device`.
class Staging {
 public:
  // Queues a copy to the device. `from` may change as soon as this returns.
  static std::string ToDevice(void* to, const void* from, size_t bytes, int32_t device,
                              void* stream);
  // Queues a copy to the host, and waits for what the stream holds now, no longer. `bytes` is at
  // most kMostBytes.
  static std::string ToHost(void* to, const void* from, size_t bytes, int32_t device, void* stream);

  static constexpr size_t kMostBytes = size_t{1} << 20;

  // A copy to the host that has been queued.
  class Arriving {
   public:
    Arriving() = default;
    Arriving(Arriving&& other) noexcept;
    Arriving& operator=(Arriving&& other) noexcept;
    // Gives the block back, where nobody wants the bytes.
    ~Arriving();
    // To be called once.
    std::string Begin(const void* from, size_t bytes, int32_t device, void* stream);
    // Waits for this copy alone, and hands over the bytes.
    std::string Finish(void* to);
    size_t bytes() const noexcept { return bytes_; }

   private:
    void* memory_ = nullptr;
    void* event_ = nullptr;
    size_t bytes_ = 0;
    int32_t device_ = 0;
  };
};

}  // namespace bridge

#endif  // CPP_HANDLER_STAGING_H_
