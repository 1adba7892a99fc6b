#include "handler/routes.h"

#include "handler/views.h"

namespace bridge {
namespace {

dl::DataType CarrierOf(dl::DataType dtype) {
  return {static_cast<uint8_t>(dtype.bits == 8 ? dl::kUint : dl::kInt), dtype.bits, 1};
}

}  // namespace

void ChooseRoutes(Torch& torch) {
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    DtypeRoute& route = torch.dtypes[i];
    route.carrier = kDtypes[i].dl;
    if (!route.dtype) continue;
    // A tensor with one element goes there and back.
    int64_t shape[1] = {1};
    alignas(16) static char memory[16];
    Views view(1, 1);
    Owned tensor = view.Import(torch, memory, {dl::kCpu, 0}, route.carrier, shape, 1);
    bool works = false;
    if (tensor) {
      Owned dtype = GetAttribute(tensor.get(), torch.name_dtype);
      works = dtype.get() == route.dtype.get();
      if (works && torch.api != nullptr) {
        dl::Tensor out;
        works = torch.api->dltensor_from_py_object_no_sync(tensor.get(), &out) == 0 &&
                out.dtype == route.carrier;
      } else if (works) {
        works = static_cast<bool>(CallFunction(torch.to_dlpack.get(), tensor.get()));
      }
    }
    PyErr_Clear();
    if (works) continue;
    route.carrier = CarrierOf(kDtypes[i].dl);
    for (size_t j = 0; j < kDtypes.size(); ++j) {
      if (kDtypes[j].dl == route.carrier && torch.dtypes[j].dtype) {
        route.carrier_dtype = Owned::Borrow(torch.dtypes[j].dtype.get());
      }
    }
    if (!route.carrier_dtype) route.dtype.reset();
  }
}

}  // namespace bridge
