// The Python module. No logic stands here.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "compiled/calls.h"
#include "compiled/library.h"
#include "device/eager.h"
#include "handler/cuda_driver.h"
#include "handler/gpu.h"
#include "handler/handler.h"
#include "handler/prefetch.h"
#include "handler/registry.h"
#include "handler/release.h"
#include "handler/routes.h"
#include "jax2torch/leaves.h"
#include "jax2torch/transfer.h"
#include "shared/dtypes.h"
#include "shared/torch.h"
#ifdef T2J_TESTING
#include "testing.h"
#endif

namespace nb = nanobind;

namespace bridge {
namespace {

Owned ToOwned(nb::handle object) {
  return object.is_none() ? Owned() : Owned::Borrow(object.ptr());
}

// A registered callable lives as long as this object does.
class Entry {
 public:
  Entry(std::string name, nb::callable run, std::string label, std::vector<std::string> inputs,
        std::vector<std::string> outputs, nb::object default_dtype, bool pass_outputs,
        const std::vector<size_t>& inplace, nb::object collect, bool pure, nb::object place)
      : callable_(std::make_shared<Callable>()) {
    callable_->name = std::move(name);
    callable_->label = std::move(label);
    callable_->inputs = std::move(inputs);
    callable_->outputs = std::move(outputs);
    callable_->inplace.assign(callable_->inputs.size(), 0);
    for (size_t i : inplace) {
      if (i >= callable_->inplace.size()) throw nb::index_error("inplace names no input");
      callable_->inplace[i] = 1;
      callable_->any_inplace = true;
    }
    callable_->pass_outputs = pass_outputs;
    callable_->pure = pure;
    callable_->run = ToOwned(run);
    callable_->collect = ToOwned(collect);
    callable_->place = ToOwned(place);
    callable_->default_dtype = ToOwned(default_dtype);
    if (!Registry::Add(callable_)) {
      std::string message = "a PyTorch function is already registered as \"" + callable_->name +
                            "\": give one of the two another name=";
      callable_.reset();
      throw nb::value_error(message.c_str());
    }
  }
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;
  ~Entry() { Clear(); }

  void Clear() noexcept {
    if (callable_) Registry::Withdraw(*callable_);
  }
  Callable& callable() const noexcept { return *callable_; }

 private:
  std::shared_ptr<Callable> callable_;
};

// The garbage collector asks, because `run` may lead back to the Entry that holds it.
int TraverseEntry(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const Callable& callable = nb::inst_ptr<Entry>(self)->callable();
  Py_VISIT(callable.run.get());
  Py_VISIT(callable.collect.get());
  Py_VISIT(callable.place.get());
  Py_VISIT(callable.default_dtype.get());
  return 0;
}

int ClearEntry(PyObject* self) {
  if (nb::inst_ready(self)) nb::inst_ptr<Entry>(self)->Clear();
  return 0;
}

PyType_Slot entry_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(TraverseEntry)},
                             {Py_tp_clear, reinterpret_cast<void*>(ClearEntry)},
                             {0, nullptr}};

// PyTorch's exchange API. Null: there is none, or none that this build understands.
const dl::ExchangeApi* ExchangeApiOf(nb::handle capsule) {
  if (capsule.is_none() || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header = static_cast<dl::ExchangeApiHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != dl::kMajorVersion) header = header->prev_api;
  auto* api = reinterpret_cast<const dl::ExchangeApi*>(header);
  return api == nullptr || api->dltensor_from_py_object_no_sync == nullptr ? nullptr : api;
}

void Setup(nb::handle exchange_api, nb::handle module, nb::handle ambient_clean,
           nb::handle run_guarded, nb::handle describe_exception, nb::handle collect,
           nb::handle resolve, nb::handle streams, nb::handle make_room, nb::handle copy_all,
           bool force_capsules, bool rocm) {
  auto torch = std::make_unique<Torch>();
  torch->api = force_capsules ? nullptr : ExchangeApiOf(exchange_api);
#ifdef T2J_TESTING
  torch->api = testing::Watched(torch->api);
#endif
  torch->rocm = rocm;
  nb::object tensor_type = module.attr("Tensor"), internals = module.attr("_C");
  torch->tensor_type = ToOwned(tensor_type);
  torch->parameter_type = ToOwned(module.attr("nn").attr("Parameter"));
  torch->is_neg = ToOwned(tensor_type.attr("is_neg"));
  torch->is_conj = ToOwned(tensor_type.attr("is_conj"));
  torch->swaps_parameters =
      ToOwned(module.attr("__future__").attr("get_swap_module_params_on_conversion"));
  torch->is_grad_enabled = ToOwned(module.attr("is_grad_enabled"));
  torch->set_grad_enabled = ToOwned(internals.attr("_set_grad_enabled"));
  // torch.utils.dlpack calls these two, after Python code of its own.
  torch->from_dlpack = ToOwned(internals.attr("_from_dlpack"));
  torch->to_dlpack = ToOwned(internals.attr("_to_dlpack"));
  torch->ambient_clean = ToOwned(ambient_clean);
  torch->run_guarded = ToOwned(run_guarded);
  torch->describe_exception = ToOwned(describe_exception);
  torch->collect = ToOwned(collect);
  torch->resolve = ToOwned(resolve);
  torch->make_room = ToOwned(make_room);
  torch->copy_all = ToOwned(copy_all);
  torch->out_of_memory = ToOwned(module.attr("OutOfMemoryError"));
  if (!streams.is_none()) {
    Owned* functions[] = {&torch->set_stream, &torch->get_stream, &torch->get_raw_stream,
                          &torch->get_device, &torch->set_device, &torch->init_gpu};
    for (size_t i = 0; i < std::size(functions); ++i) *functions[i] = ToOwned(streams[i]);
  }
  auto intern = [](const char* name) { return Owned::Steal(PyUnicode_InternFromString(name)); };
  torch->name_version = intern("_version");
  torch->name_view = intern("view");
  torch->name_detach = intern("detach");
  torch->name_clone = intern("clone");
  torch->name_contiguous = intern("contiguous");
  torch->name_copy = intern("copy_");
  torch->name_resolve_conj = intern("resolve_conj");
  torch->name_resolve_neg = intern("resolve_neg");
  torch->name_dtype = intern("dtype");
  torch->name_is_cpu = intern("is_cpu");
  torch->name_requires_grad = intern("requires_grad");
  torch->name_is_leaf = intern("is_leaf");
  torch->name_untyped_storage = intern("untyped_storage");
  torch->name_settle = intern("settle");
  torch->zero = Owned::Steal(PyLong_FromLong(0));
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    torch->dtypes[i].dtype = ToOwned(nb::getattr(module, kDtypes[i].name, nb::none()));
  }
  ChooseRoutes(*torch);
  if (!force_capsules) torch->FindGradMode();
  Driver::UseRocm(rocm);
  SetTorch(torch.release());
}

nb::dict DtypeRoutes() {
  nb::dict routes;
  const Torch* torch = GetTorch();
  for (size_t i = 0; torch != nullptr && i < kDtypes.size(); ++i) {
    const DtypeRoute& route = torch->dtypes[i];
    if (!route.dtype) continue;
    routes[kDtypes[i].name] = route.carrier_dtype ? DtypeName(route.carrier) : kDtypes[i].name;
  }
  return routes;
}

// Hands a result to Python. Where it is null, throws the Python exception that is set.
nb::object Returned(Owned object) {
  if (!object) throw nb::python_error();
  return nb::steal(object.release());
}

nb::object ArraysOf(nb::handle operands, bool x64, nb::handle import_capsule, nb::handle cpu,
                    nb::handle gpu, nb::handle is_pinned, nb::handle other) {
  Importer importer{import_capsule.ptr(), cpu.ptr(), gpu.ptr(), is_pinned.ptr(), other.ptr(), x64};
  return Returned(ToArrays(*GetTorch(), operands.ptr(), importer));
}

nb::object TensorsOf(nb::handle arrays, nb::handle export_capsule, int place) {
  return Returned(ToTensors(*GetTorch(), arrays.ptr(), export_capsule.ptr(), place));
}

nb::object IndicesRequiringGrad(nb::handle operands) {
  return Returned(RequiringGrad(*GetTorch(), operands.ptr()));
}

nb::object EagerDispatch(nb::handle tensor_type, nb::handle array_type, nb::handle cell_type,
                         nb::handle make, nb::tuple after_dtype, nb::tuple constants,
                         nb::handle situation, nb::handle describe, nb::handle replay,
                         nb::handle array, nb::handle may_write, nb::handle inference,
                         nb::handle sort, nb::handle large) {
  eager::Hooks hooks = {ToOwned(tensor_type), ToOwned(array_type),  ToOwned(cell_type),
                        ToOwned(make),        ToOwned(after_dtype), ToOwned(constants),
                        ToOwned(situation),   ToOwned(describe),    ToOwned(replay),
                        ToOwned(array),       ToOwned(may_write),   ToOwned(inference),
                        ToOwned(sort),        ToOwned(large)};
  return Returned(eager::MakeDispatch(std::move(hooks)));
}

nb::object EagerKey(nb::handle op, nb::tuple args, nb::dict kwargs) {
  return Returned(eager::KeyOf(op.ptr(), args.ptr(), kwargs.ptr()));
}

// (run, device, site) of the call on a GPU that this thread is in, or None.
nb::object CallSite() {
  const GpuCall* call = GpuCall::Current();
  if (call == nullptr || call->run_id <= 0 || call->site == 0) return nb::none();
  return nb::make_tuple(call->run_id, call->target.device.device_id, call->site);
}

nb::object WordsAt(uintptr_t address, size_t count) {
  std::vector<uint32_t> words;
  if (ReadWords(reinterpret_cast<const void*>(address), count, &words)) return nb::cast(words);
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return nb::none();
}

nb::object XlaStreamOf(int32_t device) {
  void* stream = XlaStream(device);
  return stream == nullptr ? nb::none() : nb::cast(reinterpret_cast<uintptr_t>(stream));
}

nb::object WithOrderedRelease(nb::object capsule) {
  if (!OrderRelease(*GetTorch(), capsule.ptr())) throw nb::python_error();
  return capsule;
}

void Shutdown() {
  eager::ForgetReplays();
  ForgetLeaves();
  BeginShutdown();
}

nb::capsule HandlerCapsule(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace
}  // namespace bridge

NB_MODULE(_ext, m) {
  using namespace bridge;  // NOLINT
  // Compiled programs keep entries alive, and JAX keeps compiled programs until the process ends.
  nb::set_leak_warnings(false);
  m.doc() = "The XLA FFI handler that calls PyTorch functions, and its registry.";

  m.def(
      "cpu_handler", [] { return HandlerCapsule(CpuHandler); },
      "The handler for CPU buffers, for `jax.ffi.register_ffi_target` (api_version=1).");
  m.def(
      "gpu_handler", [] { return HandlerCapsule(GpuHandler); },
      "The handler for CUDA and ROCm buffers, for `jax.ffi.register_ffi_target` "
      "(api_version=1).");

  m.def(
      "compiled_cpu_handler", [] { return HandlerCapsule(compiled::CpuHandler); },
      "A capsule for jax.ffi.register_ffi_target: calls of compiled libraries on CPUs.");
  m.def(
      "compiled_gpu_handler", [] { return HandlerCapsule(compiled::GpuHandler); },
      "The same on GPUs.");
  m.def(
      "load_library", &compiled::Load, nb::arg("name"), nb::arg("path"),
      "Lets programs call the library at `path` by `name`, until the process ends. A name that has "
      "a library keeps it. Raises RuntimeError where it cannot be loaded.");
  m.def(
      "library_calls",
      [](const std::string& name) {
        compiled::Library* library = compiled::Find(name);
        return library == nullptr ? int64_t{-1} : library->calls.load();
      },
      nb::arg("name"), "How often programs have called a library; -1 where it is not loaded.");
  m.def(
      "prefetch_handler", [] { return HandlerCapsule(PrefetchHandler); },
      "The handler that brings a key's words to the host; see cpp/handler/prefetch.h.");
  m.def("call_site", &CallSite,
        "(execution, device, site) of the call on a GPU that this thread is in. None where it is "
        "in none, or the program says nothing of the call's token.");
  m.def("current_execution", &CurrentExecution, "See cpp/handler/handler.h.");
  m.def("read_words", &WordsAt, nb::arg("address"), nb::arg("count"),
        "A list of 32-bit words of the device, in the order of the stream of the call that this "
        "thread is in. None where it is in none.");

  m.def("xla_stream", &XlaStreamOf, nb::arg("device"),
        "The handle of XLA's stream on a GPU. None where no handler has run there yet.");
  m.def("order_release", &WithOrderedRelease, nb::arg("capsule"),
        "The DLPack capsule itself. When its memory goes back to XLA, XLA's stream waits for "
        "PyTorch's first.");

  nb::class_<Entry>(m, "Entry", nb::type_slots(entry_slots), nb::is_weak_referenceable(),
                    "A PyTorch function that compiled programs of this process can call by name, "
                    "for as long as this object lives.")
      .def(
          nb::init<std::string, nb::callable, std::string, std::vector<std::string>,
                   std::vector<std::string>, nb::object, bool, const std::vector<size_t>&,
                   nb::object, bool, nb::object>(),
          nb::arg("name"), nb::arg("run"), nb::arg("label"), nb::arg("inputs"), nb::arg("outputs"),
          nb::arg("default_dtype").none(), nb::arg("pass_outputs") = false,
          nb::arg("inplace") = std::vector<size_t>(), nb::arg("collect") = nb::none(),
          nb::arg("pure") = false, nb::arg("place").none() = nb::none(),
          "Registers `run` as `name`.\n\n"
          "`run(*tensors)` takes one tensor for each label in `inputs` (then, with `pass_outputs`, "
          "one for\neach label in `outputs`) and returns a tuple with one tensor for each label in "
          "`outputs`, or that\ntensor itself where it is one. Of anything else `collect` makes the "
          "tuple. `label` names the user's function in messages.\n`inplace` lists the inputs that "
          "may change. A call of a `pure` one is made again where a GPU's memory ran "
          "out.\n`place(*tensors, "
          "*buffers)` takes the place of `run` on CPUs, where a result is large: see NOTE [Placed "
          "results] in cpp/handler/call.cc.\nRaises ValueError when a live entry has the name.")
      .def_prop_ro(
          "name", [](const Entry& entry) { return entry.callable().name; },
          "The name in compiled programs.")
      .def_prop_ro(
          "label", [](const Entry& entry) { return entry.callable().label; },
          "The user's function, for messages.")
      .def_prop_ro(
          "calls", [](const Entry& entry) { return entry.callable().calls.load(); },
          "How often XLA has called it.");

  m.def(
      "setup", &Setup, nb::kw_only(), nb::arg("exchange_api").none(), nb::arg("torch"),
      nb::arg("ambient_clean"), nb::arg("run_guarded"), nb::arg("describe_exception"),
      nb::arg("collect"), nb::arg("resolve").none() = nb::none(),
      nb::arg("streams").none() = nb::none(), nb::arg("make_room").none() = nb::none(),
      nb::arg("copy_all").none() = nb::none(), nb::arg("force_capsules") = false,
      nb::arg("rocm") = false,
      "Hands over what the handler uses of PyTorch and of the package. May be called again.\n\n"
      "exchange_api: `torch.Tensor.__dlpack_c_exchange_api__` or None. torch: the module.\n"
      "ambient_clean(default_dtype) -> bool: whether this thread's PyTorch state is clean.\n"
      "run_guarded(body, args, default_dtype): calls body(*args) with a clean state.\n"
      "streams: set_stream(id, device, device type), get_stream(device) -> those three,\n"
      "get_raw_stream(device) -> handle, get_device(), set_device(device) and init(); None without "
      "GPU support.\n"
      "describe_exception(label, exception) -> str. collect(generation): gc.collect.\n"
      "resolve(name) -> str: registers what an unknown name stands for, or says why it cannot.\n"
      "force_capsules: do without the exchange API and libc10's functions. rocm: PyTorch and XLA "
      "use HIP.");
  m.def("to_arrays", &ArraysOf, nb::arg("operands"), nb::arg("x64"), nb::arg("import_capsule"),
        nb::arg("cpu").none(), nb::arg("gpu"), nb::arg("is_pinned").none(), nb::arg("other"),
        "A sequence with JAX's arrays for tensors, as a list; the number of tensors; and where all "
        "of them are: -1 for a\nCPU, the number of a GPU, or None.\n\n"
        "What XLA can read in place becomes `import_capsule(capsule, device, stream)`, any other "
        "tensor `other(tensor, i)`.\nThe device is `cpu`, without a stream, or "
        "`gpu(number) -> (device, stream)`. x64: 64-bit dtypes may pass.\nis_pinned: asks a "
        "tensor, or None where no memory is pinned. After setup().");
  m.def("to_tensors", &TensorsOf, nb::arg("arrays"), nb::arg("export_capsule"), nb::arg("place"),
        "A tuple of the tensors in the memory of arrays at a place that to_arrays told. After "
        "setup().");
  m.def("in_gpu_call", &CurrentStream::Entered, "Whether this thread is in a call on a GPU.");
  m.def(
      "requiring_grad", &IndicesRequiringGrad, nb::arg("operands"),
      "A tuple of the indices of those that are tensors which require a gradient. After setup().");
  m.def(
      "eager_dispatch", &EagerDispatch, nb::kw_only(), nb::arg("tensor_type"),
      nb::arg("array_type"), nb::arg("cell_type"), nb::arg("make"), nb::arg("after_dtype"),
      nb::arg("constants"), nb::arg("situation"), nb::arg("describe"), nb::arg("replay"),
      nb::arg("array"), nb::arg("may_write"), nb::arg("inference"), nb::arg("sort"),
      nb::arg("large"),
      "`__torch_dispatch__` of tensors on device \"jax\": (operator, types, args=(), "
      "kwargs=None).\n\n"
      "Calls like one that has been made before go to their compiled program; `describe`, `replay` "
      "and `situation`\nsay which are alike, and what the first of them did. See "
      "cpp/device/eager.h.");
  m.def(
      "eager_key", &EagerKey, nb::arg("operator"), nb::arg("args"), nb::arg("kwargs"),
      "What tells eager calls of an operator apart, as bytes, and the operands of this call. None "
      "where Python has the call each time.");
  m.def("forget_replays", &eager::ForgetReplays, "The next call of each operator is a first one.");
  m.def("begin_shutdown", &Shutdown,
        "From now on calls are refused with an error and touch no Python. Waits for calls under "
        "way, 5 s at most.");
  nb::module_::import_("atexit").attr("register")(m.attr("begin_shutdown"));

  m.def(
      "dlpack_path",
      [] {
        const Torch* torch = GetTorch();
        return torch == nullptr ? "none" : torch->api == nullptr ? "capsules" : "c-exchange-api";
      },
      "How tensors travel: \"c-exchange-api\", \"capsules\", or \"none\" before setup().");
  m.def("dtype_routes", &DtypeRoutes,
        "dtype name -> name of the dtype as which PyTorch's DLPack carries it.");

#ifdef T2J_TESTING
  m.def("arm", &testing::Arm, nb::arg("fails") = testing::kNever,
        "From now on steps of the handler count, from 0, and the step `fails` fails.");
  m.def("disarm", &testing::Disarm, "The names of the steps since arm().");
  m.def("stress_registry", &testing::StressRegistry, nb::arg("threads"), nb::arg("rounds"),
        "Uses the registry in threads without the GIL. Raises RuntimeError where it errs.");
#endif
}
