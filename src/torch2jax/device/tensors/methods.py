"""A tensor on device "jax" gets the methods that PyTorch does not derive from operators."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from ..._errors import Torch2JaxError
from ..thread_state import state
from .tensor import (
    Tensor,
    ValueNeeded,
    concrete,
    only_one,
    read,
    recorded,
    stays,
    take_memory,
    to_torch,
    wrap_view,
)

__all__ = ["install"]

_parse_to: Any = torch._C._nn._parse_to  # type: ignore[attr-defined]


def _repr(self: Tensor, *, tensor_contents: Any = None) -> str:
    array = self._cell.array
    if isinstance(array, Tracer):
        kind = "Parameter" if getattr(self, "_is_param", False) else "tensor"
        return f"{kind}(<traced>, size={tuple(self.shape)}, dtype={self.dtype}, device='jax:0')"
    with torch.no_grad():
        text = repr(to_torch(self, "print"))
    extra = ", device='jax:0'"
    if self.grad_fn is not None:
        extra += f", grad_fn=<{type(self.grad_fn).__name__}>"
    elif recorded(self) and not getattr(self, "_is_param", False):
        extra += ", requires_grad=True"
    text = text[:-1] + extra + ")"
    if getattr(self, "_is_param", False):
        return f"Parameter containing:\n{text[:-1]}, requires_grad={recorded(self)})"
    return text


def _host(self: Tensor, what: str) -> torch.Tensor:
    if recorded(self):
        raise RuntimeError(
            f"Can't call {what} on Tensor that requires grad. Use tensor.detach().{what} instead."
        )
    return to_torch(self, what)


def _numpy(self: Tensor, *, force: bool = False) -> np.ndarray[Any, Any]:
    return _host(_detached(self) if force else self, "numpy()").numpy()


def _array(self: Tensor, dtype: Any = None, copy: Any = None) -> Any:
    return np.asarray(_host(self, "numpy()").numpy(), dtype)


def _tolist(self: Tensor) -> Any:
    return to_torch(_detached(self), "tolist()").tolist()


def _item(self: Tensor) -> Any:
    if self.numel() != 1:
        raise RuntimeError(f"a Tensor with {self.numel()} elements cannot be converted to Scalar")
    return concrete(self, "item()").item()


def _cpu(self: Tensor, memory_format: Any = None) -> torch.Tensor:
    return _to(self, "cpu")


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Move or cast as PyTorch does. Return the tensor itself where nothing changes."""
    at = 2 if args and isinstance(args[0], torch.dtype | torch.Tensor) else 3
    copy = kwargs.pop("copy", False) or args[at : at + 1] == (True,)
    args = args[:at]
    if args and isinstance(args[0], torch.Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, _, _ = _parse_to(*args, **kwargs)
    if device is not None and stays(self, device):
        device = None
    ours = device is None or device.type == "jax"
    if ours:
        only_one(device)
    if ours and not copy and (dtype is None or dtype is self.dtype):
        return self
    return torch.Tensor.to(
        self,
        "jax" if device is None else device,
        self.dtype if dtype is None else dtype,
        False,
        copy,
    )


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Any:
    if state.copying is not None:
        return state.copying(self)
    if not self.is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
            "protocol at the moment."
        )
    if id(self) in memo:
        return memo[id(self)]
    with torch.no_grad():
        new = torch.ops.aten.clone.default(self).detach()
        if getattr(self, "_is_param", False):
            new._is_param = True  # type: ignore[attr-defined]
        new.requires_grad_(recorded(self))
        if self.grad is not None:
            new.grad = _deepcopy(self.grad, memo)  # type: ignore[arg-type]
    for name, value in vars(self).items():
        if name not in ("_cell", "_chain", "_memo", "_hooks", "_sort", "_is_param"):
            import copy

            setattr(new, name, copy.deepcopy(value, memo))
    memo[id(self)] = new
    return new


def _reduce(self: Tensor, protocol: int) -> Any:
    """Save a tensor as PyTorch's own on the CPU, so that files load anywhere."""
    host: Any = to_torch(_detached(self), "pickling")
    if getattr(self, "_is_param", False):
        host = torch.nn.Parameter(host, recorded(self))
    else:
        host.requires_grad_(recorded(self))
    return host.__reduce_ex__(protocol)


def _detached(self: Tensor) -> Any:
    return self.detach()


def _data(self: Tensor) -> Tensor:
    """Return ``x.data``: the same memory without autograd's knowledge.

    To autograd it is no view, as the result of ``detach`` would be. It has a version counter of its
    own, so that a write to it does not forbid the use of what was saved of ``x``.
    """
    seen: Any = self.detach()
    return wrap_view(
        seen, seen._chain, seen.dtype, seen.shape, seen.stride(), seen.storage_offset()
    )


def _set_data(self: Tensor, other: Any) -> None:
    new: Any = other if type(other) is Tensor else torch.Tensor.to(other, "jax")
    take_memory(self, new)


def _data_ptr(self: Tensor) -> int:
    """Return where the array of the values begins, as long as nothing is written to the tensor."""
    array = self._cell.array
    if isinstance(array, Tracer):
        raise ValueNeeded("data_ptr()", "a tensor that is being traced has no address")
    if not self.numel():
        return 0
    start = array.addressable_data(0).unsafe_buffer_pointer()
    return start + self.storage_offset() * array.dtype.itemsize


_grad_of: Any = torch.Tensor.grad


def _set_grad(self: Tensor, value: Any) -> None:
    """Set ``x.grad``; C++ calls our device "lazy", and users get "jax"."""
    try:
        _grad_of.__set__(self, value)
    except RuntimeError as error:
        raise RuntimeError(str(error).replace("lazy", "jax")) from error


def _type(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is not None:
        return torch.Tensor.type(self, dtype, *args, **kwargs)
    there = torch.empty(0, dtype=self.dtype, device="cpu").type()
    return there.replace("torch.", "torch.jax.", 1)


def _exported(self: Tensor) -> Any:
    return concrete(self, "__dlpack__")


def _dlpack(self: Tensor, **kwargs: Any) -> Any:
    if recorded(self):
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
    return _exported(self).__dlpack__(**kwargs)


def _dlpack_device(self: Tensor) -> Any:
    return _exported(self).__dlpack_device__()


def _contiguous(self: Tensor, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is torch.contiguous_format and self.is_contiguous():
        return self
    return self.clone()


def _index(self: Tensor) -> int:
    value = _item(self)
    if isinstance(value, float):
        raise TypeError("only integer tensors of a single element can be converted to an index")
    return int(value)


def _format(self: Tensor, spec: str) -> str:
    if self.dim():
        return object.__format__(self, spec)
    if not spec and isinstance(read(self), Tracer):
        return repr(self)  # programs write the text of a check's error before they check
    return _item(self).__format__(spec)


def _block(self: Tensor) -> Tensor:
    """Wait until the values are computed."""
    jax.block_until_ready(read(self))
    return self


class _NoInnerTensors:
    """It refuses ``torch.compile``, which asks an operand for its inner tensors."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        from torch._guards import TracingContext

        if TracingContext.try_get() is not None:
            raise Torch2JaxError(
                "torch.compile does not compile functions of tensors on device jax: use "
                "device.jit(fn_or_module), or keep the model on its device and give "
                'torch.compile backend="torch2jax".'
            )
        raise AttributeError("__tensor_flatten__")


def install() -> None:
    """Put the methods into the class ``Tensor``."""
    for name, method in (
        ("__repr__", _repr),
        ("numpy", _numpy),
        ("__array__", _array),
        ("tolist", _tolist),
        ("item", _item),
        ("cpu", _cpu),
        ("to", _to),
        ("contiguous", _contiguous),
        ("type", _type),
        ("__deepcopy__", _deepcopy),
        ("__reduce_ex__", _reduce),
        ("__dlpack__", _dlpack),
        ("__dlpack_device__", _dlpack_device),
        ("__index__", _index),
        ("__format__", _format),
        ("block_until_ready", _block),
        ("data", property(_data, _set_data)),
        ("data_ptr", _data_ptr),
        ("grad", property(_grad_of.__get__, _set_grad, _grad_of.__delete__)),
        ("__tensor_flatten__", _NoInnerTensors()),
        ("is_jax", property(lambda self: True)),
        ("is_cpu", property(lambda self: False)),
        ("is_lazy", property(lambda self: False)),
        ("get_device", lambda self: 0),
        ("is_pinned", lambda self, device=None: False),
        ("is_shared", lambda self: False),
        ("share_memory_", lambda self: self),
    ):
        setattr(Tensor, name, method)
