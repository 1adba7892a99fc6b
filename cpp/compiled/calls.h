// XLA's calls of compiled libraries. There is no Python in them, and no GIL.

#ifndef CPP_COMPILED_CALLS_H_
#define CPP_COMPILED_CALLS_H_

#include "xla/ffi/api/c_api.h"

namespace bridge::compiled {

XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GpuHandler(XLA_FFI_CallFrame* call_frame);

}  // namespace bridge::compiled

#endif  // CPP_COMPILED_CALLS_H_
