#include "jax2torch/transfer.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "handler/cuda_driver.h"
#include "handler/release.h"
#include "jax2torch/leaves.h"
#include "shared/dlpack_abi.h"
#include "shared/dtypes.h"
#include "shared/guards.h"
#include "shared/memory.h"

namespace bridge {
namespace {

// XLA reads memory in place where it is so aligned, on a CPU and on a GPU.
constexpr uintptr_t kAlignment = 64;
constexpr uintptr_t kGpuAlignment = 16;

bool IsGpu(const dl::Tensor& view) {
  return view.device.device_type == dl::kCuda || view.device.device_type == dl::kRocm;
}

// The dtype's row in kDtypes, where every DLPack carries the dtype and JAX takes it as it is.
// Otherwise null.
const Dtype* PlainDtype(dl::DataType dtype, bool x64) {
  for (const Dtype& row : kDtypes) {
    if (!(row.dl == dtype)) continue;
    const bool wide = dtype.bits == (row.is_complex() ? 128 : 64);
    return dtype.code > dl::kBool || (wide && !x64) ? nullptr : &row;
  }
  return nullptr;
}

// Whether the tensor is row-major and not empty.
bool IsDense(const dl::Tensor& tensor) {
  int64_t count = 1;
  for (int32_t i = tensor.ndim; i-- > 0;) {
    if (tensor.shape[i] == 0) return false;
    if (tensor.shape[i] != 1 && tensor.strides != nullptr && tensor.strides[i] != count)
      return false;
    count *= tensor.shape[i];
  }
  return true;
}

// A capsule of a tensor that XLA can read in place, as it is. Null: XLA cannot; where a Python
// exception is set, a question failed.
Owned PlainCapsule(const Torch& torch, PyObject* tensor, const Importer& importer) {
  if (Py_TYPE(tensor) != reinterpret_cast<PyTypeObject*>(torch.tensor_type.get()) &&
      Py_TYPE(tensor) != reinterpret_cast<PyTypeObject*>(torch.parameter_type.get())) {
    return Owned();  // a subclass may mean something else by its memory
  }
  Owned capsule = CallFunction(torch.to_dlpack.get(), tensor);
  void* pointer = capsule ? PyCapsule_GetPointer(capsule.get(), dl::kCapsuleName) : nullptr;
  if (pointer == nullptr) {
    PyErr_Clear();  // `other`, which converts it next, says why
    return Owned();
  }
  dl::Tensor& view = static_cast<dl::ManagedTensor*>(pointer)->dl_tensor;
  const Dtype* dtype = PlainDtype(view.dtype, importer.x64);
  auto address = reinterpret_cast<uintptr_t>(view.data) + view.byte_offset;
  const bool gpu = IsGpu(view);
  const bool here = gpu || (view.device.device_type == dl::kCpu && importer.cpu != Py_None);
  if (dtype == nullptr || !here || view.data == nullptr ||
      address % (gpu ? kGpuAlignment : kAlignment) != 0 || !IsDense(view)) {
    return Owned();
  }
  // DLPack hands out the memory before PyTorch's lazy conjugation or negation.
  for (auto [ask, question] :
       {std::pair(dtype->may_be_negated(), torch.is_neg.get()),
        std::pair(dtype->is_complex(), torch.is_conj.get()),
        std::pair(!gpu && importer.is_pinned != Py_None, importer.is_pinned)}) {
    if (ask && CallPredicate(question, tensor) != 0) return Owned();
  }
  // The tensor is row-major whatever the strides of its dimensions of size 1 are. XLA would read a
  // layout into those.
  view.strides = nullptr;
  return capsule;
}

// Answers whether the attribute is true: 1 or 0, or -1 with a Python exception set.
int IsTrue(PyObject* object, const Owned& attribute) {
  Owned answer = GetAttribute(object, attribute);
  return answer ? PyObject_IsTrue(answer.get()) : -1;
}

// Answers whether tensors may get weak references: 1 or 0, or -1 with a Python exception set. Users
// can have Module.to call torch.utils.swap_tensors, which refuses tensors that have any.
int AllowsReferences(const Torch& torch) {
  Owned swaps = Owned::Steal(PyObject_CallNoArgs(torch.swaps_parameters.get()));
  return swaps ? PyObject_Not(swaps.get()) : -1;
}

// What a capsule views. Null, without an exception: the capsule is of another kind.
const dl::Tensor* ViewOf(const Owned& capsule) {
  if (!PyCapsule_IsValid(capsule.get(), dl::kCapsuleName)) return nullptr;
  void* pointer = PyCapsule_GetPointer(capsule.get(), dl::kCapsuleName);
  PyErr_Clear();
  return pointer == nullptr ? nullptr : &static_cast<dl::ManagedTensor*>(pointer)->dl_tensor;
}

// PyTorch's current stream of a GPU. Nothing: a Python exception is set.
std::optional<void*> CurrentStreamOf(const Torch& torch, int gpu) {
  void* stream = nullptr;
  if (torch.api != nullptr) {
    const dl::DeviceType type = torch.rocm ? dl::kRocm : dl::kCuda;
    if (torch.api->current_work_stream(type, gpu, &stream) != 0) return std::nullopt;
    return stream;
  }
  Owned number = Owned::Steal(PyLong_FromLong(gpu));
  Owned found = number ? CallFunction(torch.get_raw_stream.get(), number.get()) : Owned();
  if (found) stream = PyLong_AsVoidPtr(found.get());
  if (PyErr_Occurred() != nullptr) return std::nullopt;
  return stream;
}

// Makes a GPU the current device of PyTorch and of the driver, and restores what was.
class OnDevice {
 public:
  OnDevice(const Torch& torch, PyObject* number)
      : torch_(torch), before_(Owned::Steal(PyObject_CallNoArgs(torch.get_device.get()))) {
    const int same = before_ ? PyObject_RichCompareBool(before_.get(), number, Py_EQ) : -1;
    ok_ = same > 0;
    if (same == 0) ok_ = set_ = bool(CallFunction(torch.set_device.get(), number));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (set_ && !CallFunction(torch_.set_device.get(), before_.get())) PyErr_Clear();
  }
  // False: a Python exception is set.
  bool ok() const noexcept { return ok_; }

 private:
  const Torch& torch_;
  Owned before_;
  bool ok_ = false, set_ = false;
};

// The GPU of a call's tensors, once the first of them is met. See NOTE [One event].
struct Gpu {
  int number = -1;
  Py_ssize_t tensors = 0;
  Owned device, stream;

  // False: JAX lacks this GPU, or the call has another one; or a Python exception is set.
  bool Enter(const Torch& torch, int found, const Importer& importer) {
    if (device) return found == number;
    if (!torch.get_device) return false;
    Owned index = Owned::Steal(PyLong_FromLong(found));
    Owned pair = index ? CallFunction(importer.gpu, index.get()) : Owned();
    if (!pair || pair.get() == Py_None) return false;
    stream = Owned::Steal(PySequence_GetItem(pair.get(), 1));
    void* later = stream ? PyLong_AsVoidPtr(stream.get()) : nullptr;
    if (PyErr_Occurred() != nullptr || !Order(torch, found, index.get(), later)) return false;
    device = Owned::Steal(PySequence_GetItem(pair.get(), 0));
    number = found;
    return bool(device);
  }

 private:
  static bool Order(const Torch& torch, int gpu, PyObject* index, void* later) {
    std::optional<void*> earlier = CurrentStreamOf(torch, gpu);
    if (!earlier) return false;
    const OnDevice on_device(torch, index);
    if (!on_device.ok()) return false;
    std::string error;
    {
      GilRelease release;
      error = Driver::Order(*earlier, later, gpu);
    }
    if (!error.empty()) PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return error.empty();
  }
};

// The array of a tensor on a CPU that XLA can read in place. Null: a Python exception is set, or
// PlainCapsule has none. See NOTE [Leaves].
Owned CpuArray(const Torch& torch, PyObject* tensor, Owned capsule, const dl::Tensor& found,
               const Importer& importer) {
  Owned array = FindLeaf(tensor, found);
  if (array) return array;
  int keep = Bytes(found) <= kLargestLeaf ? IsTrue(tensor, torch.name_requires_grad) : 0;
  if (keep > 0) keep = IsTrue(tensor, torch.name_is_leaf);
  if (keep > 0) keep = AllowsReferences(torch);
  if (keep < 0) return Owned();
  std::optional<View> view;
  if (keep > 0) {
    view.emplace(found);
    Owned detached = CallMethod(tensor, torch.name_detach);
    capsule = detached ? PlainCapsule(torch, detached.get(), importer) : Owned();
    if (!capsule) return Owned();
  }
  array = CallFunction(importer.import_capsule, capsule.get(), importer.cpu, Py_None);
  if (array && view && !KeepLeaf(tensor, *std::move(view), array.get())) return Owned();
  return array;
}

// The array of a tensor that XLA can read in place. Null means what it means of PlainCapsule.
Owned PlainArray(const Torch& torch, PyObject* tensor, const Importer& importer, Gpu& gpu) {
  Owned capsule = PlainCapsule(torch, tensor, importer);
  const dl::Tensor* found = capsule ? ViewOf(capsule) : nullptr;
  if (found == nullptr) return Owned();
  if (!IsGpu(*found)) return CpuArray(torch, tensor, std::move(capsule), *found, importer);
  // No array is kept: each has to wait for what was queued before its own call.
  if (!gpu.Enter(torch, found->device.device_id, importer)) return Owned();
  ++gpu.tensors;
  return CallFunction(importer.import_capsule, capsule.get(), gpu.device.get(), gpu.stream.get());
}

}  // namespace

Owned ToArrays(const Torch& torch, PyObject* operands, const Importer& importer) {
  const Py_ssize_t size = PySequence_Size(operands);
  Owned arrays = Owned::Steal(size < 0 ? nullptr : PyList_New(size));
  if (!arrays) return Owned();
  Py_ssize_t tensors = 0;
  bool elsewhere = false;
  Gpu gpu;
  for (Py_ssize_t i = 0; i < size; ++i) {
    Owned item = Owned::Steal(PySequence_GetItem(operands, i));
    if (!item) return Owned();
    if (IsTensor(torch, item.get())) {
      ++tensors;
      Owned array = PlainArray(torch, item.get(), importer, gpu);
      if (array) {
        item = std::move(array);
      } else {
        if (PyErr_Occurred() != nullptr) return Owned();
        const int on_cpu = IsTrue(item.get(), torch.name_is_cpu);
        Owned index = Owned::Steal(on_cpu < 0 ? nullptr : PyLong_FromSsize_t(i));
        if (!index) return Owned();
        elsewhere = elsewhere || on_cpu == 0;
        item = CallFunction(importer.other, item.get(), index.get());
      }
      if (!item) return Owned();
    }
    if (PyList_SetItem(arrays.get(), i, item.release()) != 0) return Owned();
  }
  const bool known = tensors != 0 && !elsewhere && (gpu.tensors == 0 || gpu.tensors == tensors);
  Owned count = Owned::Steal(PyLong_FromSsize_t(tensors));
  Owned place = known ? Owned::Steal(PyLong_FromLong(gpu.number)) : Owned::Borrow(Py_None);
  if (!count || !place) return Owned();
  return Owned::Steal(PyTuple_Pack(3, arrays.get(), count.get(), place.get()));
}

Owned ToTensors(const Torch& torch, PyObject* arrays, PyObject* export_capsule, int place) {
  const Py_ssize_t size = PySequence_Size(arrays);
  Owned tensors = Owned::Steal(size < 0 ? nullptr : PyTuple_New(size));
  if (!tensors) return Owned();
  Owned stream;
  std::optional<OnDevice> on_device;
  if (place >= 0) {
    Owned number = Owned::Steal(PyLong_FromLong(place));
    if (number) on_device.emplace(torch, number.get());
    if (!on_device || !on_device->ok()) return Owned();
    std::optional<void*> current = CurrentStreamOf(torch, place);
    if (!current) return Owned();
    // In DLPack 1 stands for CUDA's default stream, whose handle is 0.
    const bool is_default = *current == nullptr && !torch.rocm;
    stream = Owned::Steal(is_default ? PyLong_FromLong(1) : PyLong_FromVoidPtr(*current));
    if (!stream) return Owned();
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    Owned item = Owned::Steal(PySequence_GetItem(arrays, i));
    if (item && stream) {
      item = CallFunction(export_capsule, item.get(), stream.get());
      if (item && !OrderRelease(torch, item.get())) return Owned();  // see NOTE [Release]
    } else if (item) {
      item = CallFunction(export_capsule, item.get());
      if (const dl::Tensor* view = item ? ViewOf(item) : nullptr) KeepFreedMemory(Bytes(*view));
    }
    if (item) item = CallFunction(torch.from_dlpack.get(), item.get());
    if (!item || PyTuple_SetItem(tensors.get(), i, item.release()) != 0) return Owned();
  }
  return tensors;
}

Owned RequiringGrad(const Torch& torch, PyObject* operands) {
  const Py_ssize_t size = PySequence_Size(operands);
  Owned indices = Owned::Steal(size < 0 ? nullptr : PyList_New(0));
  if (!indices) return Owned();
  for (Py_ssize_t i = 0; i < size; ++i) {
    Owned item = Owned::Steal(PySequence_GetItem(operands, i));
    if (!item) return Owned();
    if (!IsTensor(torch, item.get())) continue;
    const int requires_grad = IsTrue(item.get(), torch.name_requires_grad);
    if (requires_grad == 0) continue;
    Owned index = Owned::Steal(requires_grad < 0 ? nullptr : PyLong_FromSsize_t(i));
    if (!index || PyList_Append(indices.get(), index.get()) != 0) return Owned();
  }
  return Owned::Steal(PyList_AsTuple(indices.get()));
}

}  // namespace bridge
