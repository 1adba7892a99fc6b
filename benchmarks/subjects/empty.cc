// Custom calls that do nothing: the floor under every bridge. Compiled by peers.py.

#include <atomic>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Declared here, so that no Python headers are needed: the enum PyGILState_STATE has int's ABI.
extern "C" int PyGILState_Ensure();
extern "C" void PyGILState_Release(int);

static std::atomic<int64_t> calls{0};
extern "C" int64_t Calls() { return calls.load(); }

// XLA hands over operands and results; they are decoded, as any handler must, and not looked at.
static ffi::Error DoNothing(ffi::RemainingArgs, ffi::RemainingRets) { return ffi::Error::Success(); }

static ffi::Error TakeGil(ffi::RemainingArgs, ffi::RemainingRets) {
  PyGILState_Release(PyGILState_Ensure());
  return ffi::Error::Success();
}

static ffi::Error Count(ffi::RemainingArgs, ffi::RemainingRets) {
  calls.fetch_add(1);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Empty, DoNothing, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(EmptyGil, TakeGil, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Counted, Count, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
