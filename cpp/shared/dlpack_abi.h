// The part of the DLPack 1.x ABI that crosses between XLA, this extension and PyTorch.
//
// We declare it here so that the build needs no headers of PyTorch. The layout is a stable ABI
// within a major version. tests/extension/test_extension.py compares every field with the header
// that PyTorch ships.

#ifndef CPP_SHARED_DLPACK_ABI_H_
#define CPP_SHARED_DLPACK_ABI_H_

#include <cstdint>

namespace bridge::dl {

inline constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,
  kRocm = 10,
  kRocmHost = 11,
  kCudaManaged = 13,
};

enum DtypeCode : uint8_t {
  kInt = 0,
  kUint = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E3m4 = 7,
  kFloat8E4m3 = 8,
  kFloat8E4m3b11fnuz = 9,
  kFloat8E4m3fn = 10,
  kFloat8E4m3fnuz = 11,
  kFloat8E5m2 = 12,
  kFloat8E5m2fnuz = 13,
  kFloat8E8m0fnu = 14,
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  DeviceType device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// A capsule of this name holds a ManagedTensor, as before DLPack 1.0.
inline constexpr char kCapsuleName[] = "dltensor";
// One of this name holds a ManagedTensorVersioned.
inline constexpr char kVersionedCapsuleName[] = "dltensor_versioned";

struct ManagedTensor {
  Tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
};

struct ManagedTensorVersioned {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensorVersioned* self);
  uint64_t flags;
  Tensor dl_tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* prev_api;
};

// `torch.Tensor.__dlpack_c_exchange_api__` holds it, a capsule named "dlpack_exchange_api". All
// functions return 0, or -1 with a Python exception set. The allocator, which we do not use, does
// not set one.
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensorVersioned** out, void* error_ctx,
                                  void (*set_error)(void* ctx, const char* kind,
                                                    const char* message));
  int (*managed_tensor_from_py_object_no_sync)(void* py_object, ManagedTensorVersioned** out);
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensorVersioned* tensor, void** out_py_object);
  // This one may be null. The result borrows from `py_object`.
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(DeviceType device_type, int32_t device_id, void** out_stream);
};

}  // namespace bridge::dl

#endif  // CPP_SHARED_DLPACK_ABI_H_
