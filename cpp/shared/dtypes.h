// The table of element types that XLA and PyTorch both know.

#ifndef CPP_SHARED_DTYPES_H_
#define CPP_SHARED_DTYPES_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "shared/dlpack_abi.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

struct Dtype {
  xla::ffi::DataType xla;
  const char* name;  // the name in JAX, and in PyTorch
  dl::DataType dl;

  constexpr size_t bytes() const { return dl.bits / 8u; }
  // Only these can carry PyTorch's lazy negative bit. Complex ones can carry the lazy conjugate bit
  // too.
  constexpr bool may_be_negated() const {
    return dl.code == dl::kFloat || dl.code == dl::kBfloat || is_complex();
  }
  constexpr bool is_complex() const { return dl.code == dl::kComplex; }
};

inline constexpr std::array kDtypes = {
    Dtype{xla::ffi::PRED, "bool", {dl::kBool, 8, 1}},
    Dtype{xla::ffi::S8, "int8", {dl::kInt, 8, 1}},
    Dtype{xla::ffi::S16, "int16", {dl::kInt, 16, 1}},
    Dtype{xla::ffi::S32, "int32", {dl::kInt, 32, 1}},
    Dtype{xla::ffi::S64, "int64", {dl::kInt, 64, 1}},
    Dtype{xla::ffi::U8, "uint8", {dl::kUint, 8, 1}},
    Dtype{xla::ffi::U16, "uint16", {dl::kUint, 16, 1}},
    Dtype{xla::ffi::U32, "uint32", {dl::kUint, 32, 1}},
    Dtype{xla::ffi::U64, "uint64", {dl::kUint, 64, 1}},
    Dtype{xla::ffi::F16, "float16", {dl::kFloat, 16, 1}},
    Dtype{xla::ffi::BF16, "bfloat16", {dl::kBfloat, 16, 1}},
    Dtype{xla::ffi::F32, "float32", {dl::kFloat, 32, 1}},
    Dtype{xla::ffi::F64, "float64", {dl::kFloat, 64, 1}},
    Dtype{xla::ffi::C64, "complex64", {dl::kComplex, 64, 1}},
    Dtype{xla::ffi::C128, "complex128", {dl::kComplex, 128, 1}},
    Dtype{xla::ffi::F8E3M4, "float8_e3m4", {dl::kFloat8E3m4, 8, 1}},
    Dtype{xla::ffi::F8E4M3, "float8_e4m3", {dl::kFloat8E4m3, 8, 1}},
    Dtype{xla::ffi::F8E4M3B11FNUZ, "float8_e4m3b11fnuz", {dl::kFloat8E4m3b11fnuz, 8, 1}},
    Dtype{xla::ffi::F8E4M3FN, "float8_e4m3fn", {dl::kFloat8E4m3fn, 8, 1}},
    Dtype{xla::ffi::F8E4M3FNUZ, "float8_e4m3fnuz", {dl::kFloat8E4m3fnuz, 8, 1}},
    Dtype{xla::ffi::F8E5M2, "float8_e5m2", {dl::kFloat8E5m2, 8, 1}},
    Dtype{xla::ffi::F8E5M2FNUZ, "float8_e5m2fnuz", {dl::kFloat8E5m2fnuz, 8, 1}},
    Dtype{xla::ffi::F8E8M0FNU, "float8_e8m0fnu", {dl::kFloat8E8m0fnu, 8, 1}},
};

inline constexpr int kNoDtype = -1;

namespace internal {
inline constexpr size_t kMaxXlaDtype = 64;

constexpr std::array<int8_t, kMaxXlaDtype> IndexByXlaDtype() {
  std::array<int8_t, kMaxXlaDtype> index{};
  for (size_t i = 0; i < kMaxXlaDtype; ++i) index[i] = kNoDtype;
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    index[static_cast<size_t>(kDtypes[i].xla)] = static_cast<int8_t>(i);
  }
  return index;
}
inline constexpr auto kIndexByXlaDtype = IndexByXlaDtype();
}  // namespace internal

// The dtype's position in kDtypes, or kNoDtype.
inline int DtypeIndex(xla::ffi::DataType dtype) {
  auto value = static_cast<size_t>(dtype);
  return value < internal::kMaxXlaDtype ? internal::kIndexByXlaDtype[value] : kNoDtype;
}

// How many bytes the elements of a tensor take, whatever its strides.
inline uint64_t Bytes(const dl::Tensor& tensor) {
  uint64_t count = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) count *= static_cast<uint64_t>(tensor.shape[i]);
  return count * tensor.dtype.bits / 8;
}

inline bool operator==(dl::DataType a, dl::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline const char* DtypeName(dl::DataType dtype) {
  for (const Dtype& row : kDtypes) {
    if (dtype.code == row.dl.code && dtype.bits == row.dl.bits && dtype.lanes == row.dl.lanes) {
      return row.name;
    }
  }
  return "an unknown dtype";
}

}  // namespace bridge

#endif  // CPP_SHARED_DTYPES_H_
