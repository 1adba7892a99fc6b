#include "handler/call.h"

#include <chrono>
#include <exception>
#include <string>
#include <thread>
#include <utility>

#include "handler/describe.h"
#include "handler/errors.h"
#include "handler/release.h"
#include "shared/memory.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

// Calls with at most so many operands and results need no heap for their bookkeeping.
constexpr size_t kInline = 8;

// We look for in-place changes in the first calls of a callable, and then in one of so many.
constexpr uint64_t kAlwaysChecked = 8;
constexpr uint64_t kCheckedEvery = 16;

// NOTE [Placed results]. PyTorch makes a result in memory of its own, and a copy into XLA's buffer
// takes longer than many an operator where it is large. So where a result has so many bytes,
// Python's `place` runs in the place of `run`: it gets the buffers as well, and a number for their
// sizes, and may have the operator that makes a result write it into one of them. It returns a
// tuple, or None, where `run` has the call. What it returns is a result like any other, and a copy
// is saved where it is the buffer. To fn such a tensor looks like PyTorch's own, which it may keep.
// So `settle` gets the storages of the buffers after the call, when no tensor has them but those
// that somebody keeps, and gives these memory of their own. The check for tensors that outlive the
// call comes after it.
constexpr size_t kPlaced = size_t{1} << 20;

// Answers whether this thread's PyTorch state is the one that callables are promised: 1 or 0, or -1
// with a Python exception set.
//
// NOTE [Ambient state]. Autocast, modes, default dtype and device belong to whoever called. They
// cannot change on a thread inside one execution of a program unless a callable changes them
// itself. So we ask Python once per thread and execution. A nested execution on this thread has an
// id of its own and replaces the answer. The outer one then asks again.
[[gnu::always_inline]] inline int AmbientClean(const Torch& torch, int64_t run_id,
                                               PyObject* default_dtype) {
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

}  // namespace

ffi::Error Call::Run() try {
  ran_ = true;
  if (ffi::Error error = CheckCounts(); error.failure()) return error;
  const uint64_t number = callable_.calls.fetch_add(1, std::memory_order_relaxed);
  places_ = Places();
  // fn's tensors view the arguments, and perhaps the results after them.
  const size_t count = args_.size() + (callable_.pass_outputs || places_ ? rets_.size() : 0);
  size_t ranks = 0;
  for (size_t i = 0; i < count; ++i) ranks += Viewed(i).dimensions().size();
  Views views(count, ranks);
  ffi::Error error = CallAndStore(&views, count);
  if (error.success()) error = CheckInPlace(&views, number);
  if (places_) Settle(&views);
  return error.failure() ? error : CheckEscaped(&views);
} catch (const std::exception& error) {  // std::bad_alloc
  return ffi::Error::Internal(callable_.label + " failed: " + error.what());
}

ffi::Error Call::CallAndStore(Views* views, size_t count) {
  Owned results;
  if (ffi::Error error = CallPython(views, count, &results); error.failure()) return error;
  return work_ == nullptr ? Store(results.get(), nullptr) : StoreOnGpu(results.get());
}

bool Call::Places() const noexcept {
  if (work_ != nullptr) return false;
  bool large = false;
  for (size_t i = 0; i < rets_.size(); ++i) {
    ffi::AnyBuffer buffer = ResultBuffer(i);
    if (buffer.size_bytes() < kPlaced) continue;
    large = true;
    UseHugePages(buffer.untyped_data(), buffer.size_bytes());
  }
  return large && place_ != nullptr &&
         callable_.not_placed.load(std::memory_order_relaxed) != Sizes();
}

uint64_t Call::Sizes() const noexcept {
  uint64_t sizes = 1;
  for (size_t i = 0; i < rets_.size(); ++i) {
    ffi::AnyBuffer buffer = ResultBuffer(i);
    sizes = sizes * 31 + static_cast<uint64_t>(buffer.element_type());
    for (int64_t size : buffer.dimensions()) sizes = sizes * 31 + static_cast<uint64_t>(size);
  }
  return sizes | 1;
}

void Call::Settle(Views* views) {
  Owned storages = Owned::Steal(PyList_New(static_cast<Py_ssize_t>(rets_.size())));
  for (size_t i = 0; storages && i < rets_.size(); ++i) {
    PyObject* tensor = (*views)[args_.size() + i];
    Owned storage = tensor == nullptr ? Owned() : CallMethod(tensor, torch_.name_untyped_storage);
    if (!storage) {
      storages.reset();
    } else {
      PyList_SetItem(storages.get(), static_cast<Py_ssize_t>(i), storage.release());
    }
  }
  views->DropTensors();
  if (!storages || !CallMethod(place_, torch_.name_settle, storages.get())) PyErr_Clear();
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
  // One free slot is in front, for vectorcall, and one behind, for `place`.
  SmallArray<PyObject*, kInline + 2> vector(count + 2);
  for (size_t i = 0; i < count; ++i) {
    vector[i + 1] = views->Add(torch_, Viewed(i), target_.device);
    if (vector[i + 1] == nullptr) return PythonError(torch_, callable_);
  }
  NoGrad grad(torch_);
  if (!grad.ok()) return PythonError(torch_, callable_);
  auto call = [&](PyObject* function, size_t given) {
    *results = Owned::Steal(PyObject_Vectorcall(function, vector.data() + 1,
                                                given | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  };
  if (places_) {
    Owned sizes = Owned::Steal(PyLong_FromUnsignedLongLong(Sizes()));
    if (!sizes) return PythonError(torch_, callable_);
    vector[count + 1] = sizes.get();
    call(place_, count + 1);
    if (results->get() == Py_None) {
      callable_.not_placed.store(Sizes(), std::memory_order_relaxed);
      places_ = false;
      call(run_, args_.size());
    }
  } else {
    call(run_, count);
  }
  if (!*results && work_ != nullptr && MadeRoom()) call(run_, count);
  if (*results && collect_ != nullptr && !PyTuple_CheckExact(results->get()) &&
      !(rets_.size() == 1 && IsTensor(torch_, results->get()))) {
    *results = CallFunction(collect_, results->get());
  }
  // This stands in the scope of `grad`, which must not restore grad mode while an exception is set.
  if (!*results) return PythonError(torch_, callable_);
  return ffi::Error::Success();
}

bool Call::MadeRoom() {
  if (!callable_.pure || !torch_.make_room ||
      PyErr_ExceptionMatches(torch_.out_of_memory.get()) == 0) {
    return false;
  }
  Owned exception = TakeException();
  exception.reset();  // its frames hold tensors
  Owned device = Owned::Steal(PyLong_FromLong(target_.device.device_id));
  return device && CallFunction(torch_.make_room.get(), device.get());
}

ffi::Error Call::Refused(const Result& result, Result::Outcome outcome, size_t i) {
  if (outcome == Result::Outcome::kPython) return PythonError(torch_, callable_);
  return ffi::Error::InvalidArgument(
      callable_.label + ": " + callable_.outputs[i] + " is " + result.message() +
      ", expected a torch.Tensor " + Describe(ResultBuffer(i)) +
      ". A result must have the dtype and shape that it had when the call was traced, or that "
      "output_shapes declares.");
}

ffi::Error Call::StoreOnGpu(PyObject* results) {
  Copies copies;
  copies.list.reserve(rets_.size());
  if (ffi::Error error = Store(results, &copies); error.failure()) return error;
  if (!CopyTogether(torch_, rets_, target_, &copies)) return PythonError(torch_, callable_);
  std::string error = work_->End(copies.list);
  return error.empty() ? ffi::Error::Success()
                       : ffi::Error::Internal(callable_.label + ": " + error);
}

ffi::Error Call::Store(PyObject* results, Copies* copies) {
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
  if (!callable_.any_inplace && !callable_.pass_outputs && !places_) {
    for (size_t i = 0; i < count; ++i) {
      Result result;
      result.SetIndex(i);
      ffi::AnyBuffer buffer = ResultBuffer(i);
      Outcome outcome = result.Read(torch_, item(i), buffer, target_.device);
      if (outcome == Outcome::kOk) outcome = result.Write(torch_, buffer, target_, copies);
      if (outcome != Outcome::kOk) return Refused(result, outcome, i);
    }
    return ffi::Error::Success();
  }
  // XLA may have given an output the memory of an input, or fn may hold the outputs themselves.
  // Then writing one result can destroy another (`return b, a`) or the result itself (a transpose).
  // Such results first get memory of their own.
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
    read[i].SetIndex(i);
    Outcome outcome = read[i].Write(torch_, ResultBuffer(i), target_, copies);
    if (outcome != Outcome::kOk) return Refused(read[i], outcome, i);
  }
  return ffi::Error::Success();
}

ffi::Error Call::CheckInPlace(Views* views, uint64_t number) {
  if (number >= kAlwaysChecked && number % kCheckedEvery != 0) return ffi::Error::Success();
  for (size_t i = 0; i < args_.size(); ++i) {
    if (callable_.inplace[i]) continue;
    Owned version = GetAttribute((*views)[i], torch_.name_version);
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
  const size_t count = views->made();
  size_t first = views->FirstKept();
  if (first == count) return ffi::Error::Success();
  // First we collect reference cycles among young objects. Then we wait, for 127 ms in all: threads
  // of PyTorch and XLA may be about to drop their references, and on a busy machine they wait for a
  // core themselves. At last we collect all cycles: torch.compile makes some that are old by then.
  auto collect = [&](long generation) {
    Owned which = Owned::Steal(PyLong_FromLong(generation));
    Owned collected = which ? CallFunction(torch_.collect.get(), which.get()) : Owned();
    if (!collected) PyErr_Clear();
    first = views->FirstKept();
  };
  collect(1);
  for (int attempt = 0; first != count && attempt < 7; ++attempt) {
    GilRelease release;
    std::this_thread::sleep_for(std::chrono::milliseconds(1 << attempt));
    first = views->FirstKept();
  }
  if (first != count) collect(2);
  if (first == count) return ffi::Error::Success();
  bool input = first < args_.size();
  if (!input && places_) {
    return ffi::Error(
        ffi::ErrorCode::kFailedPrecondition,
        callable_.label + " kept the memory of " + callable_.outputs[first - args_.size()] +
            " beyond the call: in a NumPy array, by DLPack, in an autograd graph or on a thread "
            "that computes with it. As none of its calls before did so, that memory belongs to "
            "JAX, which reuses it. Keep a clone() of the tensor instead. From now on its results "
            "are computed elsewhere and copied.");
  }
  return ffi::Error(
      ffi::ErrorCode::kFailedPrecondition,
      callable_.label + " kept a tensor that views " +
          (input ? callable_.inputs[first]
                 : "the buffer of " + callable_.outputs[first - args_.size()]) +
          " beyond the call (in an attribute, a global, a cache or an autograd graph). That memory "
          "belongs to JAX, which reuses it: keep a clone() of the tensor instead.");
}

ffi::Error Call::RunOnCpu(int64_t run_id) {
  const int clean = AmbientClean(torch_, run_id, default_dtype_);
  if (clean < 0) return PythonError(torch_, callable_);
  return clean == 1 ? Run() : RunGuarded();
}

ffi::Error Call::RunOnGpu(GpuCall call) {
  if (!torch_.set_stream) {
    return ffi::Error::Internal(callable_.label + ": PyTorch in this process has no GPU support");
  }
  const int clean = AmbientClean(torch_, call.run_id, default_dtype_);
  if (clean < 0) return PythonError(torch_, callable_);
  NoteXlaStream(target_.device.device_id, target_.stream);
  CurrentStream stream(torch_, target_);
  if (!stream.ok()) return PythonError(torch_, callable_);
  GpuWork work(stream.before(), target_);
  if (std::string error = work.Begin(); !error.empty()) {
    return ffi::Error::Internal(callable_.label + ": " + error);
  }
  work_ = &work;
  InGpuCall inside(&call);
  return clean == 1 ? Run() : RunGuarded();
}

// NOTE [The body]. Python's `run_guarded` runs the whole of Run(), not fn alone. Tensors that are
// made under the caller's inference mode would be wrong too, and so would results that are copied
// under its modes. Python gets Run() as a function without arguments. It is valid until
// `run_guarded` returns.
ffi::Error Call::RunGuarded() {
  static PyMethodDef definition = {"run", &Call::Body, METH_NOARGS, nullptr};
  Owned self = Owned::Steal(PyCapsule_New(this, "call", nullptr));
  Owned body = Owned::Steal(self ? PyCFunction_NewEx(&definition, self.get(), nullptr) : nullptr);
  Owned empty = Owned::Steal(PyTuple_New(0));
  if (!body || !empty) return PythonError(torch_, callable_);
  Owned done = CallFunction(torch_.run_guarded.get(), body.get(), empty.get(), default_dtype_);
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

}  // namespace bridge
