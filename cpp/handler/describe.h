// What messages say of tensors, buffers and other objects.

#ifndef CPP_HANDLER_DESCRIBE_H_
#define CPP_HANDLER_DESCRIBE_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "shared/dlpack_abi.h"
#include "xla/ffi/api/ffi.h"

namespace bridge {

// "list", "int"
std::string TypeNameOf(PyObject* object);

// "a list", "an object of type int"
std::string TypeName(PyObject* object);

// "[3,4]"
std::string Shape(const int64_t* dims, size_t rank);

// "cpu", "cuda:0"
std::string DeviceName(dl::Device device);

// "float32[3,4]"
std::string Describe(const xla::ffi::AnyBuffer& buffer);

// Says in PyTorch's words what a tensor is that DLPack cannot describe.
std::string DescribeTensor(PyObject* tensor);

}  // namespace bridge

#endif  // CPP_HANDLER_DESCRIBE_H_
