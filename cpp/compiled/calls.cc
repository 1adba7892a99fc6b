#include "compiled/calls.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "compiled/library.h"
#include "shared/dtypes.h"
#include "xla/ffi/api/ffi.h"

namespace bridge::compiled {

namespace ffi = xla::ffi;

namespace {

// The tensors of a call. They view XLA's buffers; the library takes them when it runs.
class Tensors {
 public:
  explicit Tensors(const Shim& shim, size_t count) : shim_(shim) {
    if (count > inline_.size()) more_.resize(count);
    data_ = count > inline_.size() ? more_.data() : inline_.data();
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors() {
    for (size_t i = 0; i < size_; ++i) shim_.delete_tensor(data_[i]);
  }

  // False: libtorch refuses the buffer.
  bool Add(ffi::AnyBuffer buffer, int32_t device_type, int32_t device) {
    const int index = DtypeIndex(buffer.element_type());
    const int32_t dtype = index == kNoDtype ? -1 : shim_.dtypes[static_cast<size_t>(index)];
    if (dtype < 0) return false;
    auto sizes = buffer.dimensions();
    const size_t ndim = sizes.size();
    if (ndim > strides_.size()) strides_.resize(ndim);
    int64_t stride = 1;
    for (size_t i = ndim; i-- > 0;) {
      strides_[i] = stride;
      stride *= std::max<int64_t>(sizes[i], 1);
    }
    Tensor* place = &data_[size_];
    if (shim_.create_from_blob(buffer.untyped_data(), static_cast<int64_t>(ndim), sizes.begin(),
                               strides_.data(), 0, dtype, device_type, device, place) != 0) {
      return false;
    }
    ++size_;
    return true;
  }

  // The library takes the tensors: whoever runs it frees them no more.
  Tensor* Take() {
    size_ = 0;
    return data_;
  }

 private:
  const Shim& shim_;
  std::array<Tensor, 32> inline_;
  std::vector<Tensor> more_;
  Tensor* data_ = nullptr;
  size_t size_ = 0;
  std::vector<int64_t> strides_ = std::vector<int64_t>(8);
};

ffi::Error Call(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                std::string_view name, bool gpu, int32_t device, void* stream) {
  Library* library = Find(name);
  if (library == nullptr) {
    return ffi::Error(ffi::ErrorCode::kNotFound,
                      "no compiled library is loaded as \"" + std::string(name) +
                          "\" in this process: load what torch2jax.save_compiled saved with "
                          "torch2jax.load_compiled");
  }
  const Shim& shim = library->shim();
  const int32_t device_type = gpu ? shim.gpu : shim.cpu;
  std::string error;
  Container container = library->OnDevice(device_type, device, &error);
  if (container == nullptr) return ffi::Error::Internal("a compiled library refused: " + error);
  const size_t count = args.size() + rets.size();
  Tensors tensors(shim, count);
  for (size_t i = 0; i < count; ++i) {
    const bool is_arg = i < args.size();
    ffi::AnyBuffer buffer =
        is_arg ? *args.get<ffi::AnyBuffer>(i) : **rets.get<ffi::AnyBuffer>(i - args.size());
    if (!tensors.Add(buffer, device_type, device)) {
      return ffi::Error::Internal(
          std::string(is_arg ? "operand " : "result ") +
          std::to_string(is_arg ? i : i - args.size()) +
          " of a compiled call is no tensor of PyTorch's: " + library->LastError());
    }
  }
  library->calls.fetch_add(1, std::memory_order_relaxed);
  if (!library->Run(container, tensors.Take(), count, stream)) {
    return ffi::Error::Internal("a compiled library failed: " + library->LastError());
  }
  return ffi::Error::Success();
}

// Turns exceptions into errors, because no exception may leave a handler.
ffi::Error Handle(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                  std::string_view name, bool gpu, int32_t device, void* stream) {
  try {
    return Call(args, rets, name, gpu, device, stream);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("a compiled call failed: ") + error.what());
  }
}

ffi::Error HandleCpu(ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view name) {
  return Handle(args, rets, name, false, 0, nullptr);
}

ffi::Error HandleGpu(int32_t device, void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     std::string_view name) {
  return Handle(args, rets, name, true, device, stream);
}

}  // namespace

XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* call_frame) {
  static const auto* handler = ffi::Ffi::Bind()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<std::string_view>("name")
                                   .To(HandleCpu)
                                   .release();
  return handler->Call(call_frame);
}

XLA_FFI_Error* GpuHandler(XLA_FFI_CallFrame* call_frame) {
  static const auto* handler = ffi::Ffi::Bind()
                                   .Ctx<ffi::DeviceOrdinal>()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<std::string_view>("name")
                                   .To(HandleGpu)
                                   .release();
  return handler->Call(call_frame);
}

}  // namespace bridge::compiled
