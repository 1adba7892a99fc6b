#include "handler/prefetch.h"

#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "handler/cuda_driver.h"
#include "handler/release.h"
#include "handler/staging.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

struct Prefetched {
  std::optional<Staging::Arriving> words;  // empty: nobody knows whose they are
  const void* address = nullptr;
};

struct Table {
  std::mutex mutex;
  std::map<std::tuple<int64_t, int32_t, int64_t>, Prefetched> waiting;  // execution, device, site
  bool too_many = false;
};

Table& GetTable() {
  static auto* table = new Table;  // XLA's threads may outlive static destructors
  return *table;
}

constexpr size_t kMost = 4096;

ffi::Error Prefetch(ffi::RunId run_id, int32_t device, void* stream, ffi::AnyBuffer words,
                    ffi::Result<ffi::AnyBuffer> same, int64_t site) {
  const size_t bytes = words.size_bytes();
  if (words.untyped_data() != same->untyped_data()) {
    std::string error = Driver::Copy(same->untyped_data(), words.untyped_data(), bytes, stream);
    if (!error.empty()) return ffi::Error::Internal("a key: " + error);
  }
  NoteXlaStream(device, stream);
  if (site == 0) return ffi::Error::Success();  // somebody wants the stream alone to be noted
  Staging::Arriving arriving;
  std::string error = arriving.Begin(words.untyped_data(), bytes, device, stream);
  if (!error.empty()) return ffi::Error::Internal("a key: " + error);
  Table& table = GetTable();
  std::lock_guard lock(table.mutex);
  if (table.too_many || run_id.run_id <= 0) return ffi::Error::Success();
  auto [place, is_new] = table.waiting.try_emplace({run_id.run_id, device, site});
  if (is_new) {
    place->second = {std::move(arriving), same->untyped_data()};
  } else {
    place->second.words.reset();  // nobody knows any more whose they are
  }
  if (table.waiting.size() > kMost) {
    table.too_many = true;
    table.waiting.clear();
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_Error* PrefetchHandler(XLA_FFI_CallFrame* call_frame) {
  static const auto* handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::RunId>()
                                   .Ctx<ffi::DeviceOrdinal>()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .Arg<ffi::AnyBuffer>()
                                   .Ret<ffi::AnyBuffer>()
                                   .Attr<int64_t>("site")
                                   .To(Prefetch)
                                   .release();
  return handler->Call(call_frame);
}

bool TakeKey(int64_t run_id, int32_t device, int64_t site, const void* address,
             std::vector<uint32_t>* words, std::string* error) {
  if (site == 0 || run_id <= 0) return false;
  std::optional<Staging::Arriving> arriving;
  {
    Table& table = GetTable();
    std::lock_guard lock(table.mutex);
    auto found = table.waiting.find({run_id, device, site});
    if (found == table.waiting.end() || !found->second.words || found->second.address != address) {
      return false;
    }
    arriving = std::move(found->second.words);
    table.waiting.erase(found);
  }
  if (arriving->bytes() != words->size() * sizeof(uint32_t)) return false;
  *error = arriving->Finish(words->data());
  return true;
}

}  // namespace bridge
