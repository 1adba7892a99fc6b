#include "handler/results.h"

#include <cstring>
#include <utility>

#include "handler/describe.h"
#include "handler/views.h"
#include "shared/dtypes.h"
#include "shared/memory.h"

namespace bridge {

namespace ffi = xla::ffi;

namespace {

// A copy of more bytes than this takes about 0.1 ms, and other threads run Python meanwhile.
constexpr size_t kLongCopy = size_t{1} << 20;

bool OnHost(dl::Device device) {
  return device.device_type == dl::kCpu || device.device_type == dl::kCudaHost ||
         device.device_type == dl::kRocmHost;
}

bool SameDevice(dl::Device got, dl::Device expected) {
  if (expected.device_type == dl::kCpu) return OnHost(got);
  return (got.device_type == expected.device_type || got.device_type == dl::kCudaManaged) &&
         got.device_id == expected.device_id;
}

}  // namespace

Result::Outcome Result::Mismatch(std::string got) {
  PyErr_Clear();
  message_ = std::move(got);
  return Outcome::kMismatch;
}

// NOTE [Lazy bits]. DLPack hands out the memory before PyTorch's lazy conjugation or negation. We
// ask complex tensors about both. A negated real tensor is the imaginary half of a conjugated one.
// Its neighbours are the real parts, so it is contiguous only where it has a single element. We
// need not ask any other contiguous tensor, which saves 60 ns each.
bool Result::Resolve(const Torch& torch) {
  resolved_ = true;
  int negated = CallPredicate(torch.is_neg.get(), object_);
  int conjugated = negated < 0 ? -1 : CallPredicate(torch.is_conj.get(), object_);
  if (conjugated < 0) return false;
  for (auto [lazy, method] : {std::pair(negated, &torch.name_resolve_neg),
                              std::pair(conjugated, &torch.name_resolve_conj)}) {
    if (lazy == 0) continue;
    kept_ = CallMethod(object_, *method);
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
    Owned got = GetAttribute(object_, torch.name_dtype);
    if (got.get() != route.dtype.get()) return Mismatch(DescribeTensor(object_));
    kept_ = CallMethod(object_, torch.name_view, route.carrier_dtype.get());
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
  // Numbers, keyless draws and what fn makes without naming a device are on the host.
  on_host_ = device.device_type != dl::kCpu && OnHost(tensor->device);
  const bool same_device = on_host_ || SameDevice(tensor->device, device);
  if (!same_shape || !(tensor->dtype == route.carrier) || !same_device) {
    std::string got = route.carrier_dtype ? dtype.name : DtypeName(tensor->dtype);
    got += Shape(tensor->shape, rank);
    if (!same_device) {
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
      // PyTorch has zeros without memory, and some derivatives are such. A clone has memory.
      if (cloned_) return Mismatch(DescribeTensor(object_) + " without data");
      cloned_ = true;
      Owned clone = CallMethod(object, torch.name_clone);
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
  Owned detached = CallMethod(object_, torch.name_detach);
  Owned clone = detached ? CallMethod(detached.get(), torch.name_clone) : Owned();
  if (!clone) return Outcome::kPython;
  int index = DtypeIndex(expected.element_type());
  const DtypeRoute& route = torch.dtypes[static_cast<size_t>(index)];
  if (route.carrier_dtype) clone = CallMethod(clone.get(), torch.name_view, route.dtype.get());
  if (!clone) return Outcome::kPython;
  Owned previous = std::move(kept_);
  Outcome outcome = Read(torch, clone.get(), expected, device);
  if (!kept_) kept_ = std::move(clone);
  return outcome;
}

Result::Outcome Result::Write(const Torch& torch, const ffi::AnyBuffer& buffer,
                              const Target& target, Copies* copies) {
  void* out = buffer.untyped_data();
  if (bytes_ == 0 || Is(out)) return Outcome::kOk;
  if (target.device.device_type != dl::kCpu) return WriteOnGpu(torch, buffer, target, copies);
  KeepFreedMemory(bytes_);
  if (!contiguous_) return Gather(torch, buffer, target);
  if (bytes_ < kLongCopy) {
    std::memmove(out, data_, bytes_);
  } else {
    GilRelease release;
    std::memmove(out, data_, bytes_);
  }
  return Outcome::kOk;
}

Result::Outcome Result::WriteOnGpu(const Torch& torch, const ffi::AnyBuffer& buffer,
                                   const Target& target, Copies* copies) {
  if (on_host_ && !contiguous_) {
    Owned dense = CallMethod(object_, torch.name_contiguous);
    if (!dense) return Outcome::kPython;
    copies->kept.push_back(std::move(kept_));
    kept_ = std::move(dense);
    // It has its carrier's dtype already, so its address alone is news.
    dl::Tensor tensor;
    if (torch.api != nullptr) {
      if (torch.api->dltensor_from_py_object_no_sync(kept_.get(), &tensor) != 0) {
        return Outcome::kPython;
      }
    } else {
      capsule_ = CallFunction(torch.to_dlpack.get(), kept_.get());
      void* managed = capsule_ ? PyCapsule_GetPointer(capsule_.get(), dl::kCapsuleName) : nullptr;
      if (managed == nullptr) return Outcome::kPython;
      tensor = static_cast<dl::ManagedTensor*>(managed)->dl_tensor;
    }
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  } else if (!contiguous_) {
    return Gather(torch, buffer, target);
  }
  copies->list.push_back({buffer.untyped_data(), data_, bytes_, on_host_, object_, index_});
  if (kept_) copies->kept.push_back(std::move(kept_));
  if (capsule_) copies->kept.push_back(std::move(capsule_));
  return Outcome::kOk;
}

Result::Outcome Result::Gather(const Torch& torch, const ffi::AnyBuffer& buffer,
                               const Target& target) {
  Views view(1, buffer.dimensions().size());
  PyObject* tensor = view.Add(torch, buffer, target.device);
  if (tensor == nullptr) return Outcome::kPython;
  const DtypeRoute& route = torch.dtypes[static_cast<size_t>(DtypeIndex(buffer.element_type()))];
  Owned source = CallMethod(object_, torch.name_detach);
  if (!source) return Outcome::kPython;
  Owned sink = Owned::Borrow(tensor);
  if (route.carrier_dtype) {  // `object_` is viewed as its carrier, so the buffer is too

    sink = CallMethod(tensor, torch.name_view, route.carrier_dtype.get());
    if (!sink) return Outcome::kPython;
  }
  Owned copied = CallMethod(sink.get(), torch.name_copy, source.get());
  return copied ? Outcome::kOk : Outcome::kPython;
}

}  // namespace bridge
