#include "handler/handler.h"

#include <chrono>
#include <exception>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "handler/cuda_driver.h"
#include "handler/registry.h"
#include "shared/guards.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

// Calls with at most this many operands and results need no heap for their bookkeeping.
constexpr size_t kInline = 8;

// In-place changes are looked for in the first calls of a callable, then in every so many.
constexpr uint64_t kAlwaysChecked = 8;
constexpr uint64_t kCheckedEvery = 16;

std::atomic<const Torch*> current_torch{nullptr};
std::atomic<int> in_flight{0};

// NOTE [Shutdown]. A call announces itself before it looks at the flag, BeginShutdown sets the flag
// before it looks at the announcements: either the call sees the flag, or BeginShutdown waits for
// the call.
class InFlight {
 public:
  InFlight() noexcept { in_flight.fetch_add(1); }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;
  ~InFlight() { in_flight.fetch_sub(1); }
  bool refused() const noexcept { return shutting_down.load(); }
};

// The exception that is set, no longer set; null where there is none.
Owned TakeException() {
#if PY_VERSION_HEX >= 0x030C0000
  return Owned::Steal(PyErr_GetRaisedException());
#else
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr && value != nullptr) PyException_SetTraceback(value, traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  return Owned::Steal(value);
#endif
}

std::string TypeNameOf(PyObject* object) {
  Owned name = Owned::Steal(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__"));
  const char* chars = name ? PyUnicode_AsUTF8AndSize(name.get(), nullptr) : nullptr;
  std::string text = chars == nullptr ? "an exception" : chars;
  PyErr_Clear();
  return text;
}

ffi::Error PythonError(const Torch& torch, const Callable& callable,
                       Owned exception = TakeException()) {
  if (!exception) return ffi::Error::Internal(callable.label + " failed without an exception");
  std::string fallback = callable.label + " raised " + TypeNameOf(exception.get());
  Owned label = Owned::Steal(PyUnicode_DecodeUTF8(
      callable.label.data(), static_cast<Py_ssize_t>(callable.label.size()), "replace"));
  Owned text;
  if (label) {
    text = CallFunction(torch.describe_exception.get(), label.get(), exception.get());
  }
  Py_ssize_t size = 0;
  const char* chars = text ? PyUnicode_AsUTF8AndSize(text.get(), &size) : nullptr;
  std::string message = chars == nullptr ? fallback : std::string(chars, static_cast<size_t>(size));
  PyErr_Clear();
  return ffi::Error::Internal(std::move(message));
}

// Whether this thread's PyTorch state is the one that callables are promised.
//
// NOTE [Ambient state]. Autocast, modes, default dtype and device belong to whoever called; they
// cannot change on a thread inside one execution of a program unless a callable changes them
// itself. So Python is asked once per thread and execution. A nested execution on this thread has
// an id of its own and replaces the answer; the outer one then asks again. 1, 0, or -1 with a
// Python exception set.
int AmbientClean(const Torch& torch, int64_t run_id, PyObject* default_dtype) {
  struct Answer {
    int64_t run_id = 0;
    const Torch* torch = nullptr;
    PyObject* default_dtype = nullptr;  // compared, never followed
    bool clean = false;
  };
  thread_local Answer last;
  if (last.torch == &torch && last.run_id == run_id && last.default_dtype == default_dtype) {
    return last.clean ? 1 : 0;
  }
  Owned answer = CallFunction(torch.ambient_clean.get(), default_dtype);
  int clean = answer ? PyObject_IsTrue(answer.get()) : -1;
  if (clean >= 0) last = {run_id, &torch, default_dtype, clean == 1};
  return clean;
}

// One call, from the moment its callable is known.
class Call {
 public:
  Call(const Torch& torch, const Found& found, const ffi::RemainingArgs& args,
       const ffi::RemainingRets& rets, Target target)
      : torch_(torch),
        callable_(*found.callable),
        run_(found.run.get()),
        collect_(found.collect.get()),
        default_dtype_(found.default_dtype.get()),
        args_(args),
        rets_(rets),
        target_(target) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Everything between the buffers that XLA passed and the buffers that it gets.
  ffi::Error Run();
  // Run() inside Python's `run_guarded`, which gives this thread a clean PyTorch state first.
  ffi::Error RunGuarded();
  // Run() inside Python's `run_on_stream`: XLA's stream is PyTorch's current one.
  ffi::Error RunOnStream();

 private:
  ffi::AnyBuffer Argument(size_t i) const { return *args_.get<ffi::AnyBuffer>(i); }
  ffi::AnyBuffer ResultBuffer(size_t i) const { return **rets_.get<ffi::AnyBuffer>(i); }

  ffi::AnyBuffer Viewed(size_t i) const {
    return i < args_.size() ? Argument(i) : ResultBuffer(i - args_.size());
  }

  ffi::Error CheckCounts() const;
  ffi::Error CallPython(Views* views, size_t count, Owned* results);
  ffi::Error Store(PyObject* results);
  ffi::Error CheckInPlace(Views* views, uint64_t number);
  ffi::Error CheckEscaped(Views* views);
  ffi::Error Refused(const Result& result, Result::Outcome outcome, size_t i);
  ffi::Error RunInside(PyObject* python, PyObject* extra0, PyObject* extra1, PyObject* extra2);
  static PyObject* Body(PyObject* self, PyObject* unused);

  const Torch& torch_;
  Callable& callable_;
  PyObject* run_;
  PyObject* collect_;
  PyObject* default_dtype_;
  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& rets_;
  Target target_;
  void* torch_stream_ = nullptr;  // GPU: PyTorch's current stream before the call
  bool ran_ = false;
  ffi::Error outcome_;
};

// On a GPU: what PyTorch has queued happens before the call, and the call before what it queues
// next.
class StreamOrder {
 public:
  StreamOrder(void* torch_stream, const Target& target)
      : torch_stream_(torch_stream), target_(target) {
    if (on_gpu()) error_ = Driver::Order(torch_stream_, target_.stream);
  }
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;
  ~StreamOrder() {
    if (on_gpu()) Driver::Order(target_.stream, torch_stream_);
  }
  const std::string& error() const noexcept { return error_; }

 private:
  bool on_gpu() const noexcept { return target_.device.device_type != dl::kCpu; }
  void* torch_stream_;
  const Target& target_;
  std::string error_;
};

ffi::Error Call::Run() try {
  ran_ = true;
  if (ffi::Error error = CheckCounts(); error.failure()) return error;
  StreamOrder order(torch_stream_, target_);
  if (!order.error().empty()) return ffi::Error::Internal(callable_.label + ": " + order.error());

  const uint64_t number = callable_.calls.fetch_add(1, std::memory_order_relaxed);
  // What fn's tensors view: the arguments, then perhaps the results.
  const size_t count = args_.size() + (callable_.pass_outputs ? rets_.size() : 0);
  size_t ranks = 0;
  for (size_t i = 0; i < count; ++i) ranks += Viewed(i).dimensions().size();
  Views views(count, ranks);
  {
    Owned results;
    if (ffi::Error error = CallPython(&views, count, &results); error.failure()) return error;
    if (ffi::Error error = Store(results.get()); error.failure()) return error;
  }
  if (ffi::Error error = CheckInPlace(&views, number); error.failure()) return error;
  return CheckEscaped(&views);
} catch (const std::exception& error) {  // std::bad_alloc
  return ffi::Error::Internal(callable_.label + " failed: " + error.what());
}

ffi::Error Call::CheckCounts() const {
  if (run_ == nullptr) return ffi::Error::Internal(callable_.label + " has been freed");
  if (args_.size() == callable_.inputs.size() && rets_.size() == callable_.outputs.size()) {
    return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument(
      callable_.label + ": the program passes " + std::to_string(args_.size()) +
      " arguments and expects " + std::to_string(rets_.size()) +
      " results, but the function registered as \"" + callable_.name + "\" takes " +
      std::to_string(callable_.inputs.size()) + " and gives " +
      std::to_string(callable_.outputs.size()) +
      ". The program was compiled or exported for another function of that name.");
}

ffi::Error Call::CallPython(Views* views, size_t count, Owned* results) {
  SmallArray<PyObject*, kInline + 1> vector(count + 1);  // one free slot in front, for vectorcall
  for (size_t i = 0; i < count; ++i) {
    vector[i + 1] = views->Add(torch_, Viewed(i), target_.device);
    if (vector[i + 1] == nullptr) return PythonError(torch_, callable_);
  }
  GradMode grad(torch_, false);
  if (!grad.ok()) return PythonError(torch_, callable_);
  *results = Owned::Steal(PyObject_Vectorcall(run_, vector.data() + 1,
                                              count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (*results && collect_ != nullptr && !PyTuple_CheckExact(results->get()) &&
      !(rets_.size() == 1 && IsTensor(torch_, results->get()))) {
    PyObject* argument[] = {nullptr, results->get()};
    *results = Owned::Steal(
        PyObject_Vectorcall(collect_, argument + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  }
  // In this scope: grad mode can only be restored when no exception is pending.
  if (!*results) return PythonError(torch_, callable_);
  return ffi::Error::Success();
}

ffi::Error Call::Refused(const Result& result, Result::Outcome outcome, size_t i) {
  if (outcome == Result::Outcome::kPython) return PythonError(torch_, callable_);
  return ffi::Error::InvalidArgument(
      callable_.label + ": " + callable_.outputs[i] + " is " + result.message() +
      ", expected a torch.Tensor " + Describe(ResultBuffer(i)) +
      ". A result must have the dtype and shape that it had when the call was traced, or that "
      "output_shapes declares.");
}

ffi::Error Call::Store(PyObject* results) {
  using Outcome = Result::Outcome;
  const size_t count = rets_.size();
  const bool single = count == 1 && IsTensor(torch_, results);
  Py_ssize_t got = single ? 1 : PyTuple_Check(results) ? PyTuple_Size(results) : -1;
  if (got < 0) {
    return ffi::Error::Internal(callable_.label + ": the call returned " + TypeNameOf(results) +
                                ", expected a tuple of tensors");
  }
  if (static_cast<size_t>(got) != count) {
    return ffi::Error::InvalidArgument(callable_.label + " returned " + std::to_string(got) +
                                       " tensors, expected " + std::to_string(count) +
                                       ", as when the call was traced.");
  }
  auto item = [&](size_t i) {
    return single ? results : PyTuple_GetItem(results, static_cast<Py_ssize_t>(i));
  };
  if (!callable_.any_inplace && !callable_.pass_outputs) {
    for (size_t i = 0; i < count; ++i) {
      Result result;
      ffi::AnyBuffer buffer = ResultBuffer(i);
      Outcome outcome = result.Read(torch_, item(i), buffer, target_.device);
      if (outcome == Outcome::kOk) outcome = result.Write(torch_, buffer, target_);
      if (outcome != Outcome::kOk) return Refused(result, outcome, i);
    }
    return ffi::Error::Success();
  }
  // XLA may have given an output the memory of an input, or fn holds the outputs themselves:
  // writing one result can destroy another (`return b, a`) or itself (a transpose). Those first get
  // their own memory.
  SmallArray<Result, kInline> read(count);
  for (size_t i = 0; i < count; ++i) {
    Outcome outcome = read[i].Read(torch_, item(i), ResultBuffer(i), target_.device);
    if (outcome != Outcome::kOk) return Refused(read[i], outcome, i);
  }
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = 0; j < count; ++j) {
      ffi::AnyBuffer buffer = ResultBuffer(j);
      if (!read[i].Overlaps(buffer.untyped_data(), buffer.size_bytes())) continue;
      if (i == j && (read[i].Is(buffer.untyped_data()) || read[i].contiguous())) continue;
      Outcome outcome = read[i].Detach(torch_, ResultBuffer(i), target_.device);
      if (outcome != Outcome::kOk) return Refused(read[i], outcome, i);
      break;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    Outcome outcome = read[i].Write(torch_, ResultBuffer(i), target_);
    if (outcome != Outcome::kOk) return Refused(read[i], outcome, i);
  }
  return ffi::Error::Success();
}

ffi::Error Call::CheckInPlace(Views* views, uint64_t number) {
  if (number >= kAlwaysChecked && number % kCheckedEvery != 0) return ffi::Error::Success();
  for (size_t i = 0; i < args_.size(); ++i) {
    if (callable_.inplace[i]) continue;
    Owned version = Owned::Steal(PyObject_GetAttr((*views)[i], torch_.name_version.get()));
    if (!version && PyErr_ExceptionMatches(PyExc_RuntimeError) == 0) {
      return PythonError(torch_, callable_);
    }
    if (!version) PyErr_Clear();  // an inference tensor has none
    if (!version || version.get() == torch_.zero.get()) continue;
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      callable_.label + " changed " + callable_.inputs[i] +
                          " in place. The caller's array may have changed. If this is meant, name "
                          "the argument in "
                          "inplace_argnums; otherwise change a clone() of it.");
  }
  return ffi::Error::Success();
}

ffi::Error Call::CheckEscaped(Views* views) {
  views->DropTensors();
  const size_t count = args_.size() + (callable_.pass_outputs ? rets_.size() : 0);
  size_t first = views->FirstKept();
  if (first == count) return ffi::Error::Success();
  // Reference cycles first, then threads of PyTorch and XLA that are about to drop theirs: on a
  // busy machine they wait for a core themselves. 127 ms in all.
  Owned collected = CallFunction(torch_.collect.get());
  if (!collected) PyErr_Clear();
  first = views->FirstKept();
  for (int attempt = 0; first != count && attempt < 7; ++attempt) {
    GilRelease release;
    std::this_thread::sleep_for(std::chrono::milliseconds(1 << attempt));
    first = views->FirstKept();
  }
  if (first == count) return ffi::Error::Success();
  bool input = first < args_.size();
  return ffi::Error(
      ffi::ErrorCode::kFailedPrecondition,
      callable_.label + " kept a tensor that views " +
          (input ? callable_.inputs[first]
                 : "the buffer of " + callable_.outputs[first - args_.size()]) +
          " beyond the call (in an attribute, a global, a cache or an autograd graph). That memory "
          "belongs to JAX, which reuses it: keep a clone() of the tensor instead.");
}

ffi::Error Call::RunGuarded() {
  return RunInside(torch_.run_guarded.get(), default_dtype_, nullptr, nullptr);
}

ffi::Error Call::RunOnStream() {
  if (!torch_.run_on_stream) {
    return ffi::Error::Internal(callable_.label + ": PyTorch in this process has no GPU support");
  }
  if (torch_.api != nullptr) {
    if (torch_.api->current_work_stream(target_.device.device_type, target_.device.device_id,
                                        &torch_stream_) != 0) {
      return PythonError(torch_, callable_);
    }
  } else if (torch_.current_stream) {
    Owned device = Owned::Steal(PyLong_FromLong(target_.device.device_id));
    Owned stream = device ? CallFunction(torch_.current_stream.get(), device.get()) : Owned();
    if (stream) torch_stream_ = PyLong_AsVoidPtr(stream.get());
    if (PyErr_Occurred() != nullptr) return PythonError(torch_, callable_);
  }
  Owned stream = Owned::Steal(PyLong_FromVoidPtr(target_.stream));
  Owned device = Owned::Steal(PyLong_FromLong(target_.device.device_id));
  if (!stream || !device) return PythonError(torch_, callable_);
  return RunInside(torch_.run_on_stream.get(), stream.get(), device.get(), default_dtype_);
}

// NOTE [The body]. What runs inside `run_guarded` is not fn but the whole of Run(): tensors made
// under the caller's inference mode, and results copied under its modes, would be wrong too. Python
// gets it as a function without arguments, valid until `python` returns.
ffi::Error Call::RunInside(PyObject* python, PyObject* extra0, PyObject* extra1, PyObject* extra2) {
  static PyMethodDef definition = {"run", &Call::Body, METH_NOARGS, nullptr};
  Owned self = Owned::Steal(PyCapsule_New(this, "call", nullptr));
  Owned body = Owned::Steal(self ? PyCFunction_NewEx(&definition, self.get(), nullptr) : nullptr);
  Owned empty = Owned::Steal(PyTuple_New(0));
  if (!body || !empty) return PythonError(torch_, callable_);
  PyObject* args[6] = {nullptr, body.get(), empty.get(), extra0, extra1, extra2};
  size_t count = extra1 == nullptr ? 3 : 5;
  Owned done = Owned::Steal(
      PyObject_Vectorcall(python, args + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  Owned exception = done ? Owned() : TakeException();
  PyCapsule_SetName(self.get(), "finished call");
  if (outcome_.failure()) return std::move(outcome_);
  if (exception) return PythonError(torch_, callable_, std::move(exception));
  if (!ran_) return ffi::Error::Internal(callable_.label + " was not called");
  return std::move(outcome_);
}

PyObject* Call::Body(PyObject* self, PyObject* /*unused*/) {
  auto* call = static_cast<Call*>(PyCapsule_GetPointer(self, "call"));
  if (call == nullptr) return nullptr;
  call->outcome_ = call->Run();
  Py_RETURN_NONE;
}

dl::Device DeviceOf(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, bool rocm) {
  const void* pointer = nullptr;
  for (size_t i = 0; i < args.size() && pointer == nullptr; ++i) {
    pointer = args.get<ffi::AnyBuffer>(i)->untyped_data();
  }
  for (size_t i = 0; i < rets.size() && pointer == nullptr; ++i) {
    pointer = (*rets.get<ffi::AnyBuffer>(i))->untyped_data();
  }
  return {rocm ? dl::kRocm : dl::kCuda, Driver::DeviceOf(pointer)};
}

// Registers what an unknown name stands for (exported programs bring such names). Empty, or why it
// cannot.
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

ffi::Error Dispatch(bool gpu, void* stream, int64_t run_id, const ffi::RemainingArgs& args,
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
  Target target{gpu ? DeviceOf(args, rets, torch->rocm) : dl::Device{dl::kCpu, 0}, stream};
  Call call(*torch, found, args, rets, target);
  if (gpu) return call.RunOnStream();
  int clean = AmbientClean(*torch, run_id, found.default_dtype.get());
  if (clean < 0) return PythonError(*torch, *found.callable);
  return clean == 1 ? call.Run() : call.RunGuarded();
}

// Nothing may leave a handler as an exception.
ffi::Error Handle(bool gpu, void* stream, int64_t run_id, const ffi::RemainingArgs& args,
                  const ffi::RemainingRets& rets, std::string_view name) {
  try {
    return Dispatch(gpu, stream, run_id, args, rets, name);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("the call of a PyTorch function failed: ") +
                                error.what());
  }
}

ffi::Error HandleCpu(ffi::RunId run_id, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     std::string_view name) {
  return Handle(/*gpu=*/false, nullptr, run_id.run_id, args, rets, name);
}

ffi::Error HandleGpu(ffi::RunId run_id, void* stream, ffi::RemainingArgs args,
                     ffi::RemainingRets rets, std::string_view name) {
  return Handle(/*gpu=*/true, stream, run_id.run_id, args, rets, name);
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
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<std::string_view>("name")
                                   .To(HandleGpu)
                                   .release();
  return handler->Call(call_frame);
}

void SetTorch(Torch* torch) noexcept {
  torch->previous = current_torch.load(std::memory_order_acquire);
  current_torch.store(torch, std::memory_order_release);
}

const Torch* GetTorch() noexcept { return current_torch.load(std::memory_order_acquire); }

void BeginShutdown() noexcept {
  shutting_down.store(true);
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::seconds(5);
  GilRelease release;  // calls under way need it to finish
  while (in_flight.load() != 0 && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace bridge
