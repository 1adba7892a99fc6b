// One call of a PyTorch function, from the moment its callable is known.

#ifndef CPP_HANDLER_CALL_H_
#define CPP_HANDLER_CALL_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>

#include "handler/gpu.h"
#include "handler/registry.h"
#include "handler/results.h"
#include "handler/views.h"
#include "shared/guards.h"
#include "shared/torch.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

class Call {
 public:
  Call(const Torch& torch, const Found& found, const xla::ffi::RemainingArgs& args,
       const xla::ffi::RemainingRets& rets, Target target)
      : torch_(torch),
        callable_(*found.callable),
        run_(found.run.get()),
        collect_(found.collect.get()),
        place_(found.place.get()),
        default_dtype_(found.default_dtype.get()),
        args_(args),
        rets_(rets),
        target_(target) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // The call on a CPU, where PyTorch's state is clean or is made so. `run_id` is the id of the
  // program's execution.
  xla::ffi::Error RunOnCpu(int64_t run_id);
  // The call on a GPU, where XLA's stream is made PyTorch's current one.
  [[gnu::cold]] xla::ffi::Error RunOnGpu(GpuCall call);  // cold beside the path of a CPU

 private:
  xla::ffi::AnyBuffer Argument(size_t i) const { return *args_.get<xla::ffi::AnyBuffer>(i); }
  xla::ffi::AnyBuffer ResultBuffer(size_t i) const { return **rets_.get<xla::ffi::AnyBuffer>(i); }

  xla::ffi::AnyBuffer Viewed(size_t i) const {
    return i < args_.size() ? Argument(i) : ResultBuffer(i - args_.size());
  }

  // Does everything between the buffers that XLA passed and the buffers that it gets.
  xla::ffi::Error Run();
  xla::ffi::Error CheckCounts() const;
  xla::ffi::Error CallAndStore(Views* views, size_t count);
  xla::ffi::Error CallPython(Views* views, size_t count, Owned* results);
  // Where the exception that is set is that a GPU's memory ran out, and the call can be made again:
  // replaces it by free memory. False: a Python exception is set.
  [[gnu::cold]] bool MadeRoom();
  // Writes results to XLA's buffers. On a GPU, copies of the driver's go to `copies`.
  xla::ffi::Error Store(PyObject* results, Copies* copies);
  [[gnu::cold]] xla::ffi::Error StoreOnGpu(PyObject* results);
  // Whether `place` has the call. See NOTE [Placed results].
  bool Places() const noexcept;
  // A number that is not 0 and tells results of other sizes apart.
  uint64_t Sizes() const noexcept;
  // Has `place` answer for those who keep a result in XLA's memory. No exception may be pending.
  void Settle(Views* views);
  xla::ffi::Error CheckInPlace(Views* views, uint64_t number);
  xla::ffi::Error CheckEscaped(Views* views);
  [[gnu::cold]] xla::ffi::Error Refused(const Result& result, Result::Outcome outcome, size_t i);
  // Has Python's `run_guarded` call Run(). See NOTE [The body].
  xla::ffi::Error RunGuarded();
  static PyObject* Body(PyObject* self, PyObject* unused);

  const Torch& torch_;
  Callable& callable_;
  PyObject* run_;
  PyObject* collect_;
  PyObject* place_;
  PyObject* default_dtype_;
  const xla::ffi::RemainingArgs& args_;
  const xla::ffi::RemainingRets& rets_;
  Target target_;
  GpuWork* work_ = nullptr;  // on a GPU
  bool places_ = false;      // whether results may be in XLA's buffers: see NOTE [Placed results]
  bool ran_ = false;
  xla::ffi::Error outcome_;
};

}  // namespace bridge

#endif  // CPP_HANDLER_CALL_H_
