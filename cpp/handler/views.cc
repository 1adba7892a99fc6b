#include "handler/views.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>

#include "handler/describe.h"

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
  // PyTorch calls this when the last tensor on the memory is gone. It touches no Python.
  template <typename Managed>
  static void Release(Managed* self) {
    // The descriptor is the first member of its block.
    reinterpret_cast<Block*>(self)->released.store(true, std::memory_order_release);
    static_cast<Arena*>(self->manager_ctx)->Drop();
  }
};

namespace {

// Python calls this for a capsule; where nobody has consumed it, its memory is given back.
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

}  // namespace

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
  // This is PyTorch's share. Where PyTorch refuses the tensor, nobody says whether it still wants
  // the memory, so the arena is leaked.
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
    tensor = CallMethod(tensor.get(), torch.name_view, route->dtype.get());
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

}  // namespace bridge
