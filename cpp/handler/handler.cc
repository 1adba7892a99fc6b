#include "handler/handler.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "handler/call.h"
#include "handler/cuda_driver.h"
#include "handler/describe.h"
#include "handler/errors.h"
#include "handler/registry.h"
#include "shared/guards.h"
#include "shared/torch.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

std::atomic<int> in_flight{0};

// NOTE [Shutdown]. A call announces itself before it looks at the flag. BeginShutdown sets the flag
// before it looks at the announcements. So either the call sees the flag, or BeginShutdown waits
// for the call.
class InFlight {
 public:
  InFlight() noexcept { in_flight.fetch_add(1); }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;
  ~InFlight() { in_flight.fetch_sub(1); }
  bool refused() const noexcept { return shutting_down.load(); }
};

thread_local int64_t current_execution = 0;

// Calls nest where a function runs a program of JAX's.
class InExecution {
 public:
  explicit InExecution(int64_t run_id) noexcept : outer_(current_execution) {
    current_execution = run_id;
  }
  InExecution(const InExecution&) = delete;
  InExecution& operator=(const InExecution&) = delete;
  ~InExecution() { current_execution = outer_; }

 private:
  int64_t outer_;
};

// Registers what an unknown name stands for; exported programs bring such names. Returns an empty
// text, or why it cannot.
std::string Resolve(const Torch& torch, std::string_view name) {
  std::string unknown = "no PyTorch function is registered as \"" + std::string(name) +
                        "\" in this process: wrap it with torch2jax (or provide it with "
                        "torch2jax.register) before running a cached or exported program";
  if (!torch.resolve) return unknown;
  Owned text =
      Owned::Steal(PyUnicode_FromStringAndSize(name.data(), static_cast<Py_ssize_t>(name.size())));
  Owned refusal = text ? CallFunction(torch.resolve.get(), text.get()) : Owned();
  const char* reason = refusal ? PyUnicode_AsUTF8AndSize(refusal.get(), nullptr) : nullptr;
  if (reason != nullptr) return reason;
  Owned exception = TakeException();
  return exception ? unknown + " (looking it up raised " + TypeNameOf(exception.get()) + ")"
                   : unknown;
}

// `gpu` is null on a CPU.
ffi::Error Dispatch(GpuCall* gpu, int64_t run_id, const ffi::RemainingArgs& args,
                    const ffi::RemainingRets& rets, std::string_view name) {
  InFlight announced;
  if (announced.refused()) {
    return ffi::Error(ffi::ErrorCode::kUnavailable,
                      "PyTorch cannot be called any more: the Python interpreter is shutting down");
  }
  GilGuard gil;
  const Torch* torch = GetTorch();
  Found found = Registry::Find(name);
  if (torch == nullptr) return ffi::Error(ffi::ErrorCode::kNotFound, "the package is not set up");
  if (!found.callable) {
    std::string refusal = Resolve(*torch, name);
    if (refusal.empty()) found = Registry::Find(name);
    if (!found.callable) {
      return ffi::Error(ffi::ErrorCode::kNotFound,
                        refusal.empty() ? "the name of a PyTorch function leads nowhere" : refusal);
    }
  }
  InExecution inside(run_id);
  if (gpu == nullptr) {
    Call call(*torch, found, args, rets, {{dl::kCpu, 0}, nullptr});
    return call.RunOnCpu(run_id);
  }
  gpu->target.device.device_type = torch->rocm ? dl::kRocm : dl::kCuda;
  Call call(*torch, found, args, rets, gpu->target);
  return call.RunOnGpu(*gpu);
}

// Turns exceptions into errors, because no exception may leave a handler.
ffi::Error Handle(GpuCall* gpu, int64_t run_id, const ffi::RemainingArgs& args,
                  const ffi::RemainingRets& rets, std::string_view name) {
  try {
    return Dispatch(gpu, run_id, args, rets, name);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("the call of a PyTorch function failed: ") +
                                error.what());
  }
}

ffi::Error HandleCpu(ffi::RunId run_id, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     std::string_view name) {
  return Handle(nullptr, run_id.run_id, args, rets, name);
}

// Programs that were exported have a name alone.
ffi::Error HandleGpu(ffi::RunId run_id, int32_t device, void* stream, ffi::RemainingArgs args,
                     ffi::RemainingRets rets, ffi::Dictionary attributes) {
  ffi::ErrorOr<std::string_view> name = attributes.get<std::string_view>("name");
  if (!name) return name.error();
  GpuCall call;
  call.run_id = run_id.run_id;
  call.target.device.device_id = device;
  call.target.stream = stream;
  for (auto [key, value] : {std::pair("site", &call.site), std::pair("key", &call.key)}) {
    if (!attributes.contains(key)) continue;
    ffi::ErrorOr<int64_t> number = attributes.get<int64_t>(key);
    if (!number) return number.error();
    *value = *number;
  }
  return Handle(&call, run_id.run_id, args, rets, *name);
}

}  // namespace

XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* call_frame) {
  static const auto* handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::RunId>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<std::string_view>("name")
                                   .To(HandleCpu)
                                   .release();
  return handler->Call(call_frame);
}

XLA_FFI_Error* GpuHandler(XLA_FFI_CallFrame* call_frame) {
  static const auto* handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::RunId>()
                                   .Ctx<ffi::DeviceOrdinal>()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attrs()
                                   .To(HandleGpu)
                                   .release();
  return handler->Call(call_frame);
}

int64_t CurrentExecution() noexcept { return current_execution; }

void BeginShutdown() noexcept {
  shutting_down.store(true);
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::seconds(5);
  GilRelease release;  // calls under way need the GIL to finish
  while (in_flight.load() != 0 && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace bridge
