#include "compiled/library.h"

#include <dlfcn.h>

#include <algorithm>
#include <shared_mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>

namespace bridge::compiled {
namespace {

template <typename Function>
bool Symbol(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

void* Libtorch() {
#ifdef __APPLE__
  void* library = dlopen("@rpath/libtorch_cpu.dylib", RTLD_NOW | RTLD_NOLOAD);
#else
  void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
#endif
  return library == nullptr ? RTLD_DEFAULT : library;
}

// Both live until the process ends: threads of XLA may use them until then.
struct Table {
  std::shared_mutex mutex;
  std::unordered_map<std::string_view, Library*> libraries;  // the keys live as long
};

Table& GetTable() {
  static auto* table = new Table;
  return *table;
}

}  // namespace

const Shim* Shim::Find() {
  static const Shim* shim = []() -> const Shim* {
    void* library = Libtorch();
    auto* found = new Shim;
    int32_t (*device_type)() = nullptr;
    bool all = Symbol(library, "aoti_torch_create_tensor_from_blob", &found->create_from_blob) &&
               Symbol(library, "aoti_torch_delete_tensor_object", &found->delete_tensor) &&
               Symbol(library, "aoti_torch_device_type_cpu", &device_type);
    if (!all) {
      delete found;
      return nullptr;
    }
    found->cpu = device_type();
    if (Symbol(library, "aoti_torch_device_type_cuda", &device_type)) found->gpu = device_type();
    Symbol(library, "torch_exception_get_what_without_backtrace", &found->exception_text);
    for (size_t i = 0; i < kDtypes.size(); ++i) {
      int32_t (*dtype)() = nullptr;
      std::string name = std::string("aoti_torch_dtype_") + kDtypes[i].name;
      found->dtypes[i] = Symbol(library, name.c_str(), &dtype) ? dtype() : -1;
    }
    return found;
  }();
  return shim;
}

Library::Library(const Shim& shim, const std::string& path) : shim_(shim) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  if (!Symbol(library, "AOTInductorModelContainerCreateWithDevice", &create_) ||
      !Symbol(library, "AOTInductorModelContainerRun", &run_)) {
    throw std::runtime_error(path + " is no library that AOTInductor compiled");
  }
  Symbol(library, "AOTInductorGetLastError", &last_error_);
}

Container Library::OnDevice(int32_t device_type, int32_t device, std::string* error) {
  const bool cpu = device_type == shim_.cpu;
  if (cpu) {
    Container known = on_cpu_.load(std::memory_order_acquire);
    if (known != nullptr) return known;
  }
  std::lock_guard lock(mutex_);
  Container& container = on_gpu_[cpu ? -1 : device];
  if (container == nullptr) {
    // So many calls can run at once; a further one waits.
    const size_t models = cpu ? std::clamp(std::thread::hardware_concurrency(), 2u, 64u) : 4;
    const std::string place = cpu ? "cpu" : "cuda:" + std::to_string(device);
    if (create_(&container, models, place.c_str(), nullptr) != 0) {
      container = nullptr;
      *error = LastError();
      return nullptr;
    }
    if (cpu) on_cpu_.store(container, std::memory_order_release);
  }
  return container;
}

bool Library::Run(Container container, Tensor* tensors, size_t count, void* stream) const {
  Tensor none = nullptr;  // results are among the tensors
  return run_(container, tensors, count, &none, 0, stream, nullptr) == 0;
}

std::string Library::LastError() const {
  const char* text = nullptr;
  if (last_error_ != nullptr && last_error_(&text) != 0) text = nullptr;
  std::string error = text == nullptr ? "" : text;
  const char* torch = shim_.exception_text == nullptr ? nullptr : shim_.exception_text();
  if (torch != nullptr && *torch != '\0') error += (error.empty() ? "" : ": ") + std::string(torch);
  return error.empty() ? "an error without a text" : error;
}

void Load(const std::string& name, const std::string& path) {
  Table& table = GetTable();
  std::unique_lock lock(table.mutex);
  if (table.libraries.count(name) != 0) return;
  const Shim* shim = Shim::Find();
  if (shim == nullptr) {
    throw std::runtime_error("this PyTorch has no C interface for compiled libraries");
  }
  auto library = std::make_unique<Library>(*shim, path);
  table.libraries.emplace(*new std::string(name), library.get());
  library.release();
}

Library* Find(std::string_view name) {
  Table& table = GetTable();
  std::shared_lock lock(table.mutex);
  auto found = table.libraries.find(name);
  return found == table.libraries.end() ? nullptr : found->second;
}

}  // namespace bridge::compiled
