#include "handler/results.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "handler/cuda_driver.h"

namespace bridge {

namespace ffi = xla::ffi;

struct Views::Block {
  union {
    dl::ManagedTensorVersioned versioned;
    dl::ManagedTensor legacy;
  };
  std::atomic<bool> released;
};

struct Views::Arena {
  std::atomic<size_t> owners;

  Block* blocks() noexcept { return reinterpret_cast<Block*>(this + 1); }
  void Drop() noexcept {
    if (owners.fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(this);
  }
  // PyTorch calls this when the last tensor on the memory is gone. Touches no Python.
  template <typename Managed>
  static void Release(Managed* self) {
    // The descriptor is the first member of its block.
    reinterpret_cast<Block*>(self)->released.store(true, std::memory_order_release);
    static_cast<Arena*>(self->manager_ctx)->Drop();
  }
};

namespace {

// Copies of more bytes than this (about 0.1 ms) let other threads run Python meanwhile.
constexpr size_t kLongCopy = size_t{1} << 20;

// Runs for a capsule that nobody consumed.
void ReleaseCapsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dl::kCapsuleName)) return;
  auto* managed = static_cast<dl::ManagedTensor*>(PyCapsule_GetPointer(capsule, dl::kCapsuleName));
  managed->deleter(managed);
}

void Fill(dl::Tensor* out, int64_t* dims, void* data, dl::Device device, dl::DataType dtype,
          const int64_t* shape, size_t rank) {
  out->data = data;
  out->device = device;
  out->ndim = static_cast<int32_t>(rank);
  out->dtype = dtype;
  out->shape = dims;
  out->strides = dims + rank;
  out->byte_offset = 0;
  int64_t stride = 1;
  for (size_t i = rank; i-- > 0;) {
    dims[i] = shape[i];
    dims[rank + i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
}

std::string ToString(PyObject* object) {
  Owned text = Owned::Steal(object == nullptr ? nullptr : PyObject_Str(object));
  const char* chars = text ? PyUnicode_AsUTF8AndSize(text.get(), nullptr) : nullptr;
  std::string result = chars == nullptr ? "?" : chars;
  PyErr_Clear();
  return result;
}

std::string Attribute(PyObject* object, const char* name) {
  Owned value = Owned::Steal(PyObject_GetAttrString(object, name));
  return ToString(value.get());
}

std::string TypeName(PyObject* object) {
  std::string name = Attribute(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__");
  return (name.find_first_of("AEIOUaeiou") == 0 ? "an object of type " : "a ") + name;
}

std::string Shape(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) {
    if (i != 0) text += ',';
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

std::string DeviceName(dl::Device device) {
  switch (device.device_type) {
    case dl::kCpu:
    case dl::kCudaHost:
    case dl::kRocmHost:
      return "cpu";
    case dl::kCuda:
    case dl::kRocm:
    case dl::kCudaManaged:
      return "cuda:" + std::to_string(device.device_id);
  }
  return "device " + std::to_string(static_cast<int>(device.device_type));
}

bool SameDevice(dl::Device got, dl::Device expected) {
  if (expected.device_type == dl::kCpu) {
    return got.device_type == dl::kCpu || got.device_type == dl::kCudaHost ||
           got.device_type == dl::kRocmHost;
  }
  return (got.device_type == expected.device_type || got.device_type == dl::kCudaManaged) &&
         got.device_id == expected.device_id;
}

// What a tensor that DLPack cannot describe is, in PyTorch's words.
std::string DescribeTensor(PyObject* tensor) {
  PyErr_Clear();  // DLPack's refusal
  auto strip = [](std::string text) {
    return text.compare(0, 6, "torch.") == 0 ? text.substr(6) : text;
  };
  Owned shape = Owned::Steal(PyObject_GetAttrString(tensor, "shape"));
  Owned list = Owned::Steal(shape ? PySequence_List(shape.get()) : nullptr);
  std::string dims = ToString(list.get());
  std::string compact;
  for (char c : dims) {
    if (c != ' ') compact += c;
  }
  std::string text = strip(Attribute(tensor, "dtype")) + compact;
  std::string layout = strip(Attribute(tensor, "layout"));
  std::string device = Attribute(tensor, "device");
  if (layout != "strided") return text + " with layout " + layout;
  if (device != "cpu") return text + " on " + device;
  return text + " of type " + Attribute(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), "__name__");
}

dl::DataType CarrierOf(dl::DataType dtype) {
  return {static_cast<uint8_t>(dtype.bits == 8 ? dl::kUint : dl::kInt), dtype.bits, 1};
}

}  // namespace

Owned CallMethod(PyObject* self, PyObject* name, PyObject* argument) {
  PyObject* args[3] = {nullptr, self, argument};
  size_t count = argument == nullptr ? 1 : 2;
  return Owned::Steal(
      PyObject_VectorcallMethod(name, args + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

// NOTE [Large results]. A call has two blocks for each result, PyTorch's and XLA's, and both are
// freed before the next call; a JAX function's residuals and results are, too. glibc gives freed
// memory back to the system once there is more of it than it has seen in one block, and fresh pages
// cost more than many an operator. So it is shown one large block, unused, the largest that it
// takes notice of; as after any large array of the user's, it then keeps up to twice as much.
// Settings of malloc in the environment go before.
void KeepFreedMemory(size_t bytes) {
  constexpr size_t kLarge = size_t{1} << 17;  // smaller blocks never leave malloc's own lists
  if (bytes < kLarge) return;
#ifdef __GLIBC__
  static const bool shown = [] {
    void* volatile block = std::malloc((size_t{32} << 20) - (size_t{1} << 16));
    std::free(block);
    return true;
  }();
  static_cast<void>(shown);
#endif
}

bool IsTensor(const Torch& torch, PyObject* object) {
  auto* type = reinterpret_cast<PyTypeObject*>(torch.tensor_type.get());
  return Py_TYPE(object) == type || PyType_IsSubtype(Py_TYPE(object), type);
}

std::string Describe(const ffi::AnyBuffer& buffer) {
  int index = DtypeIndex(buffer.element_type());
  std::string name =
      index == kNoDtype ? "an unknown dtype" : kDtypes[static_cast<size_t>(index)].name;
  return name + Shape(buffer.dimensions().begin(), buffer.dimensions().size());
}

void Torch::ChooseRoutes() {
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    DtypeRoute& route = dtypes[i];
    route.carrier = kDtypes[i].dl;
    if (!route.dtype) continue;
    // A tensor with one element, there and back.
    int64_t shape[1] = {1};
    alignas(16) static char memory[16];
    Views view(1, 1);
    Owned tensor = view.Import(*this, memory, {dl::kCpu, 0}, route.carrier, shape, 1);
    bool works = false;
    if (tensor) {
      Owned dtype = Owned::Steal(PyObject_GetAttr(tensor.get(), name_dtype.get()));
      works = dtype.get() == route.dtype.get();
      if (works && api != nullptr) {
        dl::Tensor out;
        works = api->dltensor_from_py_object_no_sync(tensor.get(), &out) == 0 &&
                out.dtype == route.carrier;
      } else if (works) {
        works = static_cast<bool>(CallFunction(to_dlpack.get(), tensor.get()));
      }
    }
    PyErr_Clear();
    if (works) continue;
    route.carrier = CarrierOf(kDtypes[i].dl);
    for (size_t j = 0; j < kDtypes.size(); ++j) {
      if (kDtypes[j].dl == route.carrier && dtypes[j].dtype) {
        route.carrier_dtype = Owned::Borrow(dtypes[j].dtype.get());
      }
    }
    if (!route.carrier_dtype) route.dtype.reset();
  }
}

void Torch::FindGradMode() {
#ifdef __APPLE__
  void* library = dlopen("@rpath/libc10.dylib", RTLD_NOW | RTLD_NOLOAD);
#else
  void* library = dlopen("libc10.so", RTLD_NOW | RTLD_NOLOAD);
#endif
  if (library == nullptr) return;
  auto is_enabled = reinterpret_cast<bool (*)()>(dlsym(library, "_ZN3c108GradMode10is_enabledEv"));
  auto set_enabled =
      reinterpret_cast<void (*)(bool)>(dlsym(library, "_ZN3c108GradMode11set_enabledEb"));
  if (is_enabled == nullptr || set_enabled == nullptr) return;
  const bool before = is_enabled();
  bool agree = true;
  for (bool enabled : {!before, before}) {
    set_enabled(enabled);
    Owned answer = CallFunction(is_grad_enabled.get());
    agree = agree && answer.get() == (enabled ? Py_True : Py_False);
  }
  PyErr_Clear();
  if (!agree) return;
  c10_is_grad_enabled = is_enabled;
  c10_set_grad_enabled = set_enabled;
}

GradMode::GradMode(const Torch& torch, bool enabled) : torch_(torch) {
  if (torch.c10_is_grad_enabled != nullptr) {
    before_ = torch.c10_is_grad_enabled();
  } else {
    Owned before = CallFunction(torch.is_grad_enabled.get());
    before_ = before.get() == Py_True;
    if (!before) return;
  }
  changed_ = before_ != enabled;  // restored too where the switch reports an error
  ok_ = !changed_ || Set(enabled);
}

GradMode::~GradMode() {
  if (changed_ && !Set(before_)) PyErr_Clear();
}

bool GradMode::Set(bool enabled) noexcept {
  if (torch_.c10_set_grad_enabled != nullptr) {
    torch_.c10_set_grad_enabled(enabled);
    return true;
  }
  return static_cast<bool>(
      CallFunction(torch_.set_grad_enabled.get(), enabled ? Py_True : Py_False));
}

Views::Views(size_t count, size_t ranks) : tensors_(count) {
  static_assert(sizeof(Arena) % alignof(Block) == 0 && sizeof(Block) % alignof(int64_t) == 0,
                "blocks follow the arena, shapes and strides follow the blocks");
  void* memory = std::malloc(sizeof(Arena) + count * sizeof(Block) + 2 * ranks * sizeof(int64_t));
  if (memory == nullptr) throw std::bad_alloc();
  arena_ = new (memory) Arena{{1}};
  dims_ = reinterpret_cast<int64_t*>(arena_->blocks() + count);
}

Views::~Views() {
  DropTensors();
  arena_->Drop();
}

Owned Views::Import(const Torch& torch, void* data, dl::Device device, dl::DataType dtype,
                    const int64_t* shape, size_t rank) {
  Block* block = new (arena_->blocks() + made_) Block;
  block->released.store(false, std::memory_order_relaxed);
  ++made_;
  int64_t* dims = std::exchange(dims_, dims_ + 2 * rank);
  // PyTorch's share. When it refuses the tensor nobody says whether it still wants the memory:
  // leaked.
  arena_->owners.fetch_add(1, std::memory_order_relaxed);
  if (torch.api != nullptr) {
    dl::ManagedTensorVersioned& managed = block->versioned;
    managed.version = {dl::kMajorVersion, 0};
    managed.manager_ctx = arena_;
    managed.deleter = Arena::Release<dl::ManagedTensorVersioned>;
    managed.flags = 0;
    Fill(&managed.dl_tensor, dims, data, device, dtype, shape, rank);
    void* tensor = nullptr;
    if (torch.api->managed_tensor_to_py_object_no_sync(&managed, &tensor) != 0) return Owned();
    return Owned::Steal(static_cast<PyObject*>(tensor));
  }
  dl::ManagedTensor& managed = block->legacy;
  managed.manager_ctx = arena_;
  managed.deleter = Arena::Release<dl::ManagedTensor>;
  Fill(&managed.dl_tensor, dims, data, device, dtype, shape, rank);
  Owned capsule = Owned::Steal(PyCapsule_New(&managed, dl::kCapsuleName, ReleaseCapsule));
  if (!capsule) {
    arena_->Drop();  // PyTorch never saw it
    return Owned();
  }
  return CallFunction(torch.from_dlpack.get(), capsule.get());
}

PyObject* Views::Add(const Torch& torch, const ffi::AnyBuffer& buffer, dl::Device device) {
  int index = DtypeIndex(buffer.element_type());
  const DtypeRoute* route = index == kNoDtype ? nullptr : &torch.dtypes[static_cast<size_t>(index)];
  if (route == nullptr || !route->dtype) {
    PyErr_Format(PyExc_TypeError, "this version of PyTorch has no dtype for %s",
                 Describe(buffer).c_str());
    return nullptr;
  }
  Owned& tensor = tensors_[made_];
  ffi::AnyBuffer::Dimensions dims = buffer.dimensions();
  tensor = Import(torch, buffer.untyped_data(), device, route->carrier, dims.begin(), dims.size());
  if (tensor && route->carrier_dtype) {
    tensor = CallMethod(tensor.get(), torch.name_view.get(), route->dtype.get());
  }
  return tensor.get();
}

void Views::DropTensors() noexcept {
  for (size_t i = 0; i < made_; ++i) tensors_[i].reset();
}

size_t Views::FirstKept() const noexcept {
  size_t i = 0;
  while (i < made_ && arena_->blocks()[i].released.load(std::memory_order_acquire)) ++i;
  return i;
}

Result::Outcome Result::Mismatch(std::string got) {
  PyErr_Clear();
  message_ = std::move(got);
  return Outcome::kMismatch;
}

// NOTE [Lazy bits]. DLPack hands out the memory before PyTorch's lazy conjugation or negation.
// Complex tensors are asked about both. A negated real tensor is the imaginary half of a conjugated
// one: its neighbours are the real parts, so it is contiguous only where it has a single element,
// and all others need not be asked (60 ns each).
bool Result::Resolve(const Torch& torch) {
  resolved_ = true;
  int negated = CallPredicate(torch.is_neg.get(), object_);
  int conjugated = negated < 0 ? -1 : CallPredicate(torch.is_conj.get(), object_);
  if (conjugated < 0) return false;
  for (auto [lazy, method] : {std::pair(negated, torch.name_resolve_neg.get()),
                              std::pair(conjugated, torch.name_resolve_conj.get())}) {
    if (lazy == 0) continue;
    kept_ = CallMethod(object_, method);
    if (!kept_) return false;
    object_ = kept_.get();
  }
  return true;
}

Result::Outcome Result::Read(const Torch& torch, PyObject* object, const ffi::AnyBuffer& expected,
                             dl::Device device) {
  object_ = object;
  if (!IsTensor(torch, object)) return Mismatch(TypeName(object));
  int index = DtypeIndex(expected.element_type());
  if (index == kNoDtype) return Mismatch(DescribeTensor(object));
  const Dtype& dtype = kDtypes[static_cast<size_t>(index)];
  const DtypeRoute& route = torch.dtypes[static_cast<size_t>(index)];

  if (dtype.is_complex() && !Resolve(torch)) return Outcome::kPython;
  if (route.carrier_dtype) {
    Owned got = Owned::Steal(PyObject_GetAttr(object_, torch.name_dtype.get()));
    if (got.get() != route.dtype.get()) return Mismatch(DescribeTensor(object_));
    kept_ = CallMethod(object_, torch.name_view.get(), route.carrier_dtype.get());
    if (!kept_) return Mismatch(DescribeTensor(object));
    object_ = kept_.get();
  }

  dl::Tensor borrowed;
  const dl::Tensor* tensor = &borrowed;
  if (torch.api != nullptr) {
    if (torch.api->dltensor_from_py_object_no_sync(object_, &borrowed) != 0) {
      return Mismatch(DescribeTensor(object_));
    }
  } else {
    capsule_ = CallFunction(torch.to_dlpack.get(), object_);
    void* managed = capsule_ ? PyCapsule_GetPointer(capsule_.get(), dl::kCapsuleName) : nullptr;
    if (managed == nullptr) return Mismatch(DescribeTensor(object_));
    tensor = &static_cast<dl::ManagedTensor*>(managed)->dl_tensor;
  }

  ffi::AnyBuffer::Dimensions dims = expected.dimensions();
  auto rank = static_cast<size_t>(tensor->ndim);
  bool same_shape = rank == dims.size() && (rank == 0 || std::memcmp(tensor->shape, dims.begin(),
                                                                     rank * sizeof(int64_t)) == 0);
  if (!same_shape || !(tensor->dtype == route.carrier) || !SameDevice(tensor->device, device)) {
    std::string got = route.carrier_dtype ? dtype.name : DtypeName(tensor->dtype);
    got += Shape(tensor->shape, rank);
    if (!SameDevice(tensor->device, device)) {
      got += " on " + DeviceName(tensor->device) + " (the arguments are on " + DeviceName(device) +
             ")";
    }
    return Mismatch(std::move(got));
  }

  data_ = static_cast<char*>(tensor->data) + tensor->byte_offset;
  contiguous_ = true;
  auto element = static_cast<int64_t>(dtype.bytes());
  int64_t count = 1, low = 0, high = 0;
  for (size_t i = rank; i-- > 0;) {
    int64_t size = tensor->shape[i],
            stride = tensor->strides == nullptr ? count : tensor->strides[i];
    if (size != 1 && stride != count) contiguous_ = false;
    (stride < 0 ? low : high) += stride * (size - 1);
    count *= size;
  }
  bytes_ = static_cast<size_t>(count * element);
  // See NOTE [Lazy bits].
  if (dtype.may_be_negated() && !dtype.is_complex() && !resolved_ && (!contiguous_ || count == 1)) {
    if (!Resolve(torch)) return Outcome::kPython;
    if (kept_) return Read(torch, object_, expected, device);
  }
  if (bytes_ == 0) {
    contiguous_ = true;
    low_ = high_ = 0;
  } else {
    low_ = low * element;
    high_ = (high + 1) * element;
    if (tensor->data == nullptr) {
      // PyTorch's zeros without memory, which some derivatives are; a clone has memory.
      if (cloned_) return Mismatch(DescribeTensor(object_) + " without data");
      cloned_ = true;
      Owned clone = CallMethod(object, torch.name_clone.get());
      if (!clone) return Mismatch(DescribeTensor(object_) + " without data");
      kept_ = std::move(clone);
      return Read(torch, kept_.get(), expected, device);
    }
  }
  return Outcome::kOk;
}

bool Result::Overlaps(const void* begin, size_t bytes) const noexcept {
  auto first = reinterpret_cast<intptr_t>(data_) + low_;
  auto last = reinterpret_cast<intptr_t>(data_) + high_;
  auto other = reinterpret_cast<intptr_t>(begin);
  return first < other + static_cast<intptr_t>(bytes) && other < last;
}

Result::Outcome Result::Detach(const Torch& torch, const ffi::AnyBuffer& expected,
                               dl::Device device) {
  Owned detached = CallMethod(object_, torch.name_detach.get());
  Owned clone = detached ? CallMethod(detached.get(), torch.name_clone.get()) : Owned();
  if (!clone) return Outcome::kPython;
  int index = DtypeIndex(expected.element_type());
  const DtypeRoute& route = torch.dtypes[static_cast<size_t>(index)];
  if (route.carrier_dtype)
    clone = CallMethod(clone.get(), torch.name_view.get(), route.dtype.get());
  if (!clone) return Outcome::kPython;
  Owned previous = std::move(kept_);
  Outcome outcome = Read(torch, clone.get(), expected, device);
  if (!kept_) kept_ = std::move(clone);
  return outcome;
}

Result::Outcome Result::Write(const Torch& torch, const ffi::AnyBuffer& buffer,
                              const Target& target) {
  void* out = buffer.untyped_data();
  if (bytes_ == 0 || Is(out)) return Outcome::kOk;
  const bool on_cpu = target.device.device_type == dl::kCpu;
  if (on_cpu) KeepFreedMemory(bytes_);
  if (contiguous_) {
    if (on_cpu) {
      if (bytes_ < kLongCopy) {
        std::memmove(out, data_, bytes_);
      } else {
        GilRelease release;
        std::memmove(out, data_, bytes_);
      }
      return Outcome::kOk;
    }
    std::string error = Driver::Copy(out, data_, bytes_, target.stream);
    if (error.empty()) return Outcome::kOk;
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return Outcome::kPython;
  }
  // PyTorch gathers. `object_` may be a carrier: the view takes its own dtype through the same one.
  Views view(1, buffer.dimensions().size());
  PyObject* tensor = view.Add(torch, buffer, target.device);
  if (tensor == nullptr) return Outcome::kPython;
  const DtypeRoute& route = torch.dtypes[static_cast<size_t>(DtypeIndex(buffer.element_type()))];
  Owned source = CallMethod(object_, torch.name_detach.get());
  if (!source) return Outcome::kPython;
  Owned sink = Owned::Borrow(tensor);
  if (route.carrier_dtype) {
    sink = CallMethod(tensor, torch.name_view.get(), route.carrier_dtype.get());
    if (!sink) return Outcome::kPython;
  }
  Owned copied = CallMethod(sink.get(), torch.name_copy.get(), source.get());
  return copied ? Outcome::kOk : Outcome::kPython;
}

}  // namespace bridge
