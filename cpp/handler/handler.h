// The XLA custom call. One handler per platform serves every callable, which it finds by the
// attribute "name".

#ifndef CPP_HANDLER_HANDLER_H_
#define CPP_HANDLER_HANDLER_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace bridge {

XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GpuHandler(XLA_FFI_CallFrame* call_frame);

// The id of the program's execution whose call this thread is in, perhaps a negative one; 0: none.
int64_t CurrentExecution() noexcept;

// Refuses calls from now on. Waits up to some seconds, without the GIL, for calls under way. Must
// be called with the GIL.
void BeginShutdown() noexcept;

}  // namespace bridge

#endif  // CPP_HANDLER_HANDLER_H_
