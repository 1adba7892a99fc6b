// The XLA custom call: one handler per platform serves every callable, found by the attribute
// "name".

#ifndef CPP_HANDLER_HANDLER_H_
#define CPP_HANDLER_HANDLER_H_

#include "handler/results.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GpuHandler(XLA_FFI_CallFrame* call_frame);

// Takes ownership. Later calls use it; calls under way keep the one they have. Needs the GIL.
void SetTorch(Torch* torch) noexcept;
const Torch* GetTorch() noexcept;

// From now on calls are refused. Waits, without the GIL, up to some seconds for those under way.
// Needs the GIL.
void BeginShutdown() noexcept;

}  // namespace bridge

#endif  // CPP_HANDLER_HANDLER_H_
