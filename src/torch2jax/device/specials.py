"""Operators that are no function of arrays: they move, ask for values, or change a tensor."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from .._compat import trace_state_clean
from .._dtypes import x64_enabled
from .._errors import Torch2JaxError
from ..lowerings.registry import TABLE, DataDependentShape, cast
from .dispatch import special
from .operands import foreign
from .operators import Operator
from .state import foreign_allowed, state
from .tensor import (
    Tensor,
    ValueNeeded,
    become,
    carried,
    concrete,
    from_torch,
    only_one,
    read,
    to_torch,
    wrap,
    write,
)

aten = torch.ops.aten


def _is_ours(device: Any) -> bool:
    return device is None or torch.device(device).type in ("jax", "lazy")


def _ours(func: Any) -> Any:
    """The ordinary way of an operator that also has a handler."""
    op: list[Any] = []

    def call(args: Any, kwargs: Any) -> Any:
        if not op:
            op.append(Operator(func))
        return op[0](args, kwargs)

    return call


# --- to and from other devices -------------------------------------------------------------------


@special(aten._to_copy.default)
def _to_copy(args: Any, kwargs: Any) -> Any:
    x = args[0]
    dtype = kwargs.get("dtype") or x.dtype
    if state.float64_is_float32 and dtype is torch.float64 and not x64_enabled():
        dtype = torch.float32
    device = kwargs.get("device")
    if _is_ours(device):
        only_one(device)
    if type(x) is not Tensor:
        return wrap(cast(from_torch(x), carried(dtype)), dtype)
    if _is_ours(device):
        return _cast(x, dtype)
    if torch.device(device).type == "meta":
        return torch.empty(x.shape, dtype=dtype, device="meta")
    return to_torch(x, f"to({device})").to(device=device, dtype=dtype)


_astype: list[Any] = []


def _cast(x: Tensor, dtype: torch.dtype) -> Any:
    carried(dtype)
    if not _astype:
        import torch._prims

        _astype.append(torch.ops.prims.convert_element_type.default)
    return _astype[0](x, dtype)


@special(aten.copy_.default)
def _copy_(args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if type(target) is not Tensor:
        return target.copy_(to_torch(source, "copy_ into a CPU tensor"))
    if type(source) is not Tensor:
        if torch.nn.parameter.is_lazy(source):
            raise Torch2JaxError(
                "a parameter of a lazy module has no shape yet: call the module once where it is, "
                'and move it to "jax" after that.'
            )
        if source.device.type == "meta":
            raise RuntimeError("copy_ from a meta tensor, which has no values")
        same = source.shape == target.shape and target._chain is None
        source = source.detach().to(target.dtype)
        value = wrap(from_torch(source), source.dtype)
        if same and source.dtype == target.dtype:
            write(target, value._cell.array)
            return target
        source = value
    return _copy_op(target, source)


_copy_op_cache: list[Any] = []


def _copy_op(target: Tensor, source: Tensor) -> Any:
    if not _copy_op_cache:
        _copy_op_cache.append(Operator(aten.copy_.default))
    return _copy_op_cache[0]((target, source), {})


@special(aten.lift_fresh.default, aten.lift.default)
def _lift(args: Any, kwargs: Any) -> Any:
    return args[0]


# --- values --------------------------------------------------------------------------------------


@special(aten._local_scalar_dense.default, aten.item.default)
def _item(args: Any, kwargs: Any) -> Any:
    return concrete(args[0], "item()").item()


@special(aten.equal.default)
def _equal(args: Any, kwargs: Any) -> Any:
    a, b = args
    if a.shape != b.shape:
        return False
    return bool(concrete(aten.all.default(aten.eq.Tensor(a, b)), "torch.equal"))


@special(aten.is_pinned.default)
def _is_pinned(args: Any, kwargs: Any) -> Any:
    return False


@special(
    getattr(aten._assert_async, "default", None),
    getattr(aten._assert_async, "msg", None),
)
def _assert_async(args: Any, kwargs: Any) -> Any:
    value = read(args[0])
    if not isinstance(value, Tracer) and not bool(value):
        raise RuntimeError(
            args[1] if len(args) > 1 else "Expected Tensor with single nonzero value"
        )


_is_all_true = _ours(aten._is_all_true.default)


@special(aten._is_all_true.default)
def _holds(args: Any, kwargs: Any) -> Any:
    """As which ``torch.distributions`` check their arguments: in a traced function they hold."""
    if not isinstance(read(args[0]), Tracer):
        return _is_all_true(args, kwargs)
    with jax.ensure_compile_time_eval():
        return wrap(jax.numpy.asarray(True), torch.bool)


@special(aten._linalg_check_errors.default)
def _linalg_check_errors(args: Any, kwargs: Any) -> Any:
    """In a compiled program a singular matrix gives NaN or infinity, as in JAX."""
    info, name = read(args[0]), args[1]
    if isinstance(info, Tracer):
        if state.compiling:
            raise ValueNeeded(name)
        return
    if np.any(np.asarray(info)):
        raise torch.linalg.LinAlgError(f"{name}: the matrix is singular or not positive definite")


# --- changes of the tensor itself ----------------------------------------------------------------


@special(aten.set_.source_Tensor)
def _set_(args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or type(args[1]) is not Tensor:
        raise Torch2JaxError("set_ on device jax takes a tensor on device jax, and no sizes.")
    return become(args[0], args[1])


@special(aten.set_.source_Storage, aten.set_.default)
def refuse_storage(args: Any, kwargs: Any) -> Any:
    raise Torch2JaxError(
        "set_ on device jax takes a tensor on device jax: a JAX array has no storage to share."
    )


@special(aten.resize_.default)
def _resize_(args: Any, kwargs: Any) -> Any:
    x, size = args[0], tuple(args[1])
    if tuple(x.shape) == size:
        return x
    count = int(np.prod(size))
    flat = read(x).reshape(-1)
    if count > flat.size:
        flat = jax.numpy.concatenate([flat, jax.numpy.zeros(count - flat.size, flat.dtype)])
    return become(x, wrap(flat[:count].reshape(size), x.dtype))


def _in_place_view(name: str) -> Any:
    def handler(args: Any, kwargs: Any) -> Any:
        view = getattr(aten, name)(args[0], *args[1:], **kwargs)
        return become(args[0], view)

    return handler


for _op, _name in (
    (aten.t_.default, "t"),
    (aten.transpose_.default, "transpose"),
    (aten.squeeze_.default, "squeeze"),
    (aten.squeeze_.dim, "squeeze"),
    (aten.squeeze_.dims, "squeeze"),
    (aten.unsqueeze_.default, "unsqueeze"),
    (aten.as_strided_.default, "as_strided"),
):
    special(_op)(_in_place_view(_name))


# --- batch norm, whose statistics are written to without the schema saying so -------------------


@special(
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
)
def _batch_norm(args: Any, kwargs: Any) -> Any:
    x, weight, bias, mean, var, training, momentum, eps = args
    functional = aten._native_batch_norm_legit_functional.default
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    out, saved_mean, saved_invstd, new_mean, new_var = functional(
        x, weight, bias, mean, var, training, momentum, eps
    )
    if training:
        aten.copy_.default(mean, new_mean)
        aten.copy_.default(var, new_var)
    return out, saved_mean, saved_invstd


@special(aten._batch_norm_with_update.default)
def _batch_norm_with_update(args: Any, kwargs: Any) -> Any:
    x, weight, bias, mean, var, momentum, eps = args
    out = _batch_norm((x, weight, bias, mean, var, True, momentum, eps), {})
    return (*out, wrap(jax.numpy.zeros((0,), np.uint8), torch.uint8))


# --- masks as indices ----------------------------------------------------------------------------


def _without_masks(x: Tensor, indices: Any, what: str) -> list[Any]:
    """Indices with the places of a mask for the mask, whose values are read."""
    found: list[Any] = []
    for index in indices:
        if index is None:
            found.append(None)
            continue
        index = foreign(index) if type(index) is not Tensor else index
        if index.dtype in (torch.bool, torch.uint8):
            if isinstance(read(index), Tracer):
                raise DataDependentShape(what)
            places = np.nonzero(np.asarray(read(index)))
            found += [wrap(jax.numpy.asarray(p, np.int32), torch.int64) for p in places]
        else:
            found.append(index)
    return found


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


_scalar_tensor = _ours(aten.scalar_tensor.default)


@special(aten.scalar_tensor.default)
def _number(args: Any, kwargs: Any) -> Any:
    """As which ``x[i] = 1.5`` brings its value; another value is not another program."""
    dtype = kwargs.get("dtype")
    if dtype is None or not trace_state_clean():
        return _scalar_tensor(args, kwargs)
    return wrap(TABLE[aten.scalar_tensor.default].fn(*args, **kwargs), dtype)


_index = _ours(aten.index.Tensor)


@special(aten.index.Tensor)
def _index_tensor(args: Any, kwargs: Any) -> Any:
    x, indices = _beside(args[0]), args[1]
    if _has_mask(indices):
        indices = _without_masks(x, indices, "an index that is a mask")
    return _index((x, [i if i is None else _beside(i) for i in indices]), kwargs)


def _beside(x: Any) -> Any:
    """An index may be on the CPU, as it may beside CUDA tensors."""
    if type(x) is Tensor:
        return x
    with foreign_allowed():
        return foreign(x)


def _index_put(func: Any) -> Any:
    plain = _ours(func)

    def handler(args: Any, kwargs: Any) -> Any:
        x, indices, values, *rest = args
        accumulate = kwargs.get("accumulate", rest[0] if rest else False)
        if _has_mask(indices):
            only = [i for i in indices if i is not None]
            whole = len(only) == 1 and indices[0] is not None and only[0].dtype is torch.bool
            if whole and not accumulate and values.numel() == 1:
                return _masked(func, x, _beside(only[0]), values)
            if whole and isinstance(read(_beside(only[0])), Tracer):
                return _masked_rows(func, x, _beside(only[0]), values, accumulate)
            indices = _without_masks(x, indices, "an index that is a mask")
        indices = [i if i is None else _beside(i) for i in indices]
        return plain((x, indices, values, *rest), kwargs)

    return handler


def _masked(func: Any, x: Any, mask: Any, values: Any) -> Any:
    """``x[mask] = number`` needs no places, so it works on tracers as well."""
    mask = mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))
    number = values.reshape(()).to(x.dtype)
    if func._schema.is_mutable:
        return aten.masked_fill_.Tensor(x, mask, number)
    return aten.masked_fill.Tensor(x, mask, number)


def _masked_rows(func: Any, x: Any, mask: Any, values: Any, accumulate: bool) -> Any:
    """``x[mask] = values``: the k-th place that is true takes the k-th row, or all the only one."""
    places = aten.cumsum.default(mask.reshape(-1), 0) - 1
    row = x.shape[mask.ndim :]
    rows = values.expand(-1 if values.ndim > len(row) else 1, *row)
    taken = aten.index_select.default(rows, 0, places.clamp(0, rows.shape[0] - 1))
    taken = taken.reshape(x.shape)
    new = aten.where.self(
        mask.view(*mask.shape, *[1] * len(row)), x + taken if accumulate else taken, x
    )
    return aten.copy_.default(x, new) if func._schema.is_mutable else new


for _op in (
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
):
    special(_op)(_index_put(_op))


@special(getattr(aten._nested_tensor_from_mask_left_aligned, "default", None))
def _no_nested_tensor(args: Any, kwargs: Any) -> bool:
    """``nn.TransformerEncoder`` asks whether a padded batch can be a nested tensor."""
    return False


# --- lengths, which are on the CPU beside tensors of any device ----------------------------------


@special(aten._pack_padded_sequence.default)
def _pack_padded_sequence(args: Any, kwargs: Any) -> Any:
    """The places of what is kept, by PyTorch's own kernel; sizes of batches stay on the CPU."""
    x, lengths, batch_first = args
    if type(lengths) is Tensor:
        lengths = to_torch(lengths, "the lengths of pack_padded_sequence")
    if batch_first:
        x = aten.transpose.int(x, 0, 1)
    steps, batch = x.shape[:2]
    index = torch.arange(steps * batch, device="cpu").view(steps, batch, 1)
    places, sizes = aten._pack_padded_sequence.default(index, lengths, False)
    rows = aten.reshape.default(x, [steps * batch, *x.shape[2:]])
    kept = wrap(jax.numpy.asarray(places.flatten().numpy(), np.int32), torch.int64)
    return aten.index_select.default(rows, 0, kept), sizes
