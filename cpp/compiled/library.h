// Libraries that PyTorch compiled ahead of time (AOTInductor), and libtorch's C functions for them.
// Nothing here touches Python.

#ifndef CPP_COMPILED_LIBRARY_H_
#define CPP_COMPILED_LIBRARY_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "shared/dtypes.h"

namespace bridge::compiled {

// Handles of libtorch's C interface; they are opaque.
using Tensor = void*;
using Container = void*;

// Functions of libtorch, found by name in the process. Nothing is linked.
struct Shim {
  int32_t (*create_from_blob)(void* data, int64_t ndim, const int64_t* sizes,
                              const int64_t* strides, int64_t offset, int32_t dtype,
                              int32_t device_type, int32_t device, Tensor* result) = nullptr;
  int32_t (*delete_tensor)(Tensor) = nullptr;
  const char* (*exception_text)() = nullptr;     // may be null
  int32_t cpu = 0, gpu = 0;                      // types of devices
  std::array<int32_t, kDtypes.size()> dtypes{};  // PyTorch's numbers; -1 where it has none

  // Null: this libtorch has no such interface.
  static const Shim* Find();
};

class Library {
 public:
  // Throws std::runtime_error.
  Library(const Shim& shim, const std::string& path);
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // Makes on first use what runs on a device. Null, with a text in `error`: it cannot be made.
  Container OnDevice(int32_t device_type, int32_t device, std::string* error);
  // Takes the tensors. Returns whether it succeeded.
  bool Run(Container container, Tensor* tensors, size_t count, void* stream) const;
  // The text of this thread's last error.
  std::string LastError() const;

  const Shim& shim() const noexcept { return shim_; }
  std::atomic<int64_t> calls{0};

 private:
  using CreateFn = int32_t (*)(Container*, size_t models, const char* device, const char* cubins);
  using RunFn = int32_t (*)(Container, Tensor* inputs, size_t, Tensor* outputs, size_t,
                            void* stream, void* proxy);

  const Shim& shim_;
  CreateFn create_ = nullptr;
  RunFn run_ = nullptr;
  int32_t (*last_error_)(const char**) = nullptr;  // may be null
  std::atomic<Container> on_cpu_{nullptr};
  std::mutex mutex_;
  std::map<int32_t, Container> on_gpu_;
};

// Libraries by name. One that is loaded stays until the process ends, as programs may call it.
//
// Loads the library under a name that has none yet. Throws std::runtime_error.
void Load(const std::string& name, const std::string& path);
// Null: nothing is loaded under the name.
Library* Find(std::string_view name);

}  // namespace bridge::compiled

#endif  // CPP_COMPILED_LIBRARY_H_
