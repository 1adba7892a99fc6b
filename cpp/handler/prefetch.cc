#include "handler/prefetch.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "handler/cuda_driver.h"
#include "handler/release.h"
#include "handler/staging.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

struct Prefetched {
  std::optional<Staging::Arriving> words;  // empty: not there, or nobody knows whose
  const void* address = nullptr;
  bool sure = true;
};

struct Table {
  std::mutex mutex;
  // By execution, and there by device and site. Executions have rising numbers.
  std::map<int64_t, std::map<std::pair<int32_t, int64_t>, Prefetched>> runs;
  int64_t forgotten = 0;  // nothing is known of executions up to this one
};

Table& GetTable() {
  static auto* table = new Table;  // XLA's threads may outlive static destructors
  return *table;
}

constexpr size_t kRuns = 64;  // so many executions are remembered

ffi::Error Prefetch(ffi::RunId run_id, void* stream, ffi::AnyBuffer words,
                    ffi::Result<ffi::AnyBuffer> same, int64_t site) {
  const size_t bytes = words.size_bytes();
  const int32_t device = Driver::DeviceOf(words.untyped_data());
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
  const int64_t run = run_id.run_id;
  if (run <= table.forgotten) return ffi::Error::Success();
  Prefetched& found = table.runs[run][{device, site}];
  if (found.words || !found.sure) {
    found.words.reset();
    found.sure = false;
  } else {
    found.words = std::move(arriving);
    found.address = same->untyped_data();
  }
  while (table.runs.size() > kRuns) {
    table.forgotten = table.runs.begin()->first;
    table.runs.erase(table.runs.begin());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_Error* PrefetchHandler(XLA_FFI_CallFrame* call_frame) {
  static const auto* handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::RunId>()
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
    auto run = table.runs.find(run_id);
    if (run == table.runs.end()) return false;
    auto found = run->second.find({device, site});
    if (found == run->second.end() || found->second.address != address) return false;
    arriving = std::exchange(found->second.words, std::nullopt);
  }
  if (!arriving || arriving->bytes() != words->size() * sizeof(uint32_t)) return false;
  *error = arriving->Finish(words->data());
  return true;
}

}  // namespace bridge
