// Python's exceptions as errors of XLA.

#ifndef CPP_HANDLER_ERRORS_H_
#define CPP_HANDLER_ERRORS_H_

#include <Python.h>

#include "handler/registry.h"
#include "shared/guards.h"
#include "shared/torch.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

// Takes the exception that is set, so that none is set any more. Null: there was none.
Owned TakeException();

// The error that stands for an exception, with the text that the package's Python half gives it.
[[gnu::cold]] xla::ffi::Error PythonError(const Torch& torch, const Callable& callable,
                                          Owned exception = TakeException());

}  // namespace bridge

#endif  // CPP_HANDLER_ERRORS_H_
