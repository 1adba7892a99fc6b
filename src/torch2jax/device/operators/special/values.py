"""These operators ask for the values of a tensor."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from ...tensors.tensor import Tensor, ValueNeeded, concrete, known, read, wrap
from ...thread_state import state
from .table import aten, ordinary_way, special


@special(aten._local_scalar_dense.default, aten.item.default)
def _item(args: Any, kwargs: Any) -> Any:
    return concrete(args[0], "item()").item()


@special(aten.equal.default)
def _equal(args: Any, kwargs: Any) -> Any:
    a, b = args
    if a.shape != b.shape:
        return False
    if a.numel() == 0 or (_is_traced(a) and _same_values(a, b)):
        return True
    return bool(concrete(aten.all.default(aten.eq.Tensor(a, b)), "torch.equal"))


def _is_traced(x: Any) -> bool:
    return type(x) is Tensor and isinstance(x._cell.array, Tracer)


def _same_values(a: Any, b: Any) -> bool:
    """Say whether two tensors see the same values, whatever these are, NaN included."""
    if type(b) is not Tensor or a.dtype is not b.dtype:
        return False
    return read(a) is read(b) or (a._cell is b._cell and _elements(a) == _elements(b))


def _elements(x: Tensor) -> list[Any]:
    steps = () if x._chain is None else x._chain.steps
    return [(s.op, s.args, s.index) for s in steps if s.op is not aten.detach.default]


@special(aten.is_pinned.default)
def _is_pinned(args: Any, kwargs: Any) -> Any:
    return False


@special(
    getattr(aten._assert_async, "default", None),
    getattr(aten._assert_async, "msg", None),
)
def _assert_async(args: Any, kwargs: Any) -> Any:
    value = known(args[0])
    if not isinstance(value, Tracer) and not bool(value):
        raise RuntimeError(
            args[1] if len(args) > 1 else "Expected Tensor with single nonzero value"
        )


_is_all_true = ordinary_way(aten._is_all_true.default)


@special(aten._is_all_true.default)
def _holds(args: Any, kwargs: Any) -> Any:
    """Check arguments for ``torch.distributions``. A traced function trusts them."""
    if not isinstance(read(args[0]), Tracer):
        return _is_all_true(args, kwargs)
    with jax.ensure_compile_time_eval():
        return wrap(jax.numpy.asarray(True), torch.bool)


@special(aten._linalg_check_errors.default)
def _linalg_check_errors(args: Any, kwargs: Any) -> Any:
    """Raise for a singular matrix, which in a compiled program gives NaN or infinity instead."""
    info, name, *rest = read(args[0]), *args[1:]
    if isinstance(info, Tracer):
        if state.compiling:
            raise ValueNeeded(name, name)
        return
    _refuse(info, name, *rest, **kwargs)


def _refuse(info: Any, *rest: Any, **kwargs: Any) -> None:
    """Let PyTorch say which of the matrices cannot be taken apart, where there is one."""
    if np.any(np.asarray(info)):
        aten._linalg_check_errors.default(torch.tensor(np.asarray(info)), *rest, **kwargs)


def _checked(func: Any, name: str) -> None:
    plain = ordinary_way(func)

    @special(func)
    def handler(args: Any, kwargs: Any) -> Any:
        out = plain(args, {k: v for k, v in kwargs.items() if k != "check_errors"})
        if kwargs.get("check_errors"):
            aten._linalg_check_errors.default(out[-1], name, is_matrix=args[0].ndim == 2)
        return out


_eigh = ordinary_way(aten._linalg_eigh.default)


@special(aten._linalg_eigh.default)
def _eigh_of_numbers(args: Any, kwargs: Any) -> Any:
    """Refuse matrices with NaN or infinity, of which the eigenvalues are NaN."""
    out = _eigh(args, kwargs)
    values = read(out[0])
    if not isinstance(values, Tracer):
        info = np.asarray(np.isnan(np.asarray(values)).any(-1), np.int32)
        _refuse(info, "linalg.eigh", is_matrix=args[0].ndim == 2)
    return out


@special(getattr(getattr(aten, "cholesky", None), "default", None))  # PyTorch 2.14 has dropped it
def _cholesky(args: Any, kwargs: Any) -> Any:
    upper = kwargs.get("upper", args[1] if len(args) > 1 else False)
    factor, info = aten.linalg_cholesky_ex.default(args[0], upper=upper)
    aten._linalg_check_errors.default(info, "cholesky", is_matrix=args[0].ndim == 2)
    return factor


_histc = ordinary_way(aten.histc.default)


@special(aten.histc.default)
def _histc_of_numbers(args: Any, kwargs: Any) -> Any:
    """Refuse ends of the bins that are not finite, where these come from values that are known."""
    x = args[0]
    ends = [*args[2:], *[v for k, v in kwargs.items() if k in ("min", "max")], 0, 0][:2]
    values = known(x) if ends[0] == ends[1] and x.numel() and x.is_floating_point() else None
    if values is not None and not isinstance(values, Tracer):
        least, most = float(values.min()), float(values.max())
        if not (np.isfinite(least) and np.isfinite(most)):
            raise RuntimeError(f"torch.histc: range of [{least}, {most}] is not finite")
    return _histc(args, kwargs)


_checked(aten.linalg_cholesky_ex.default, "linalg.cholesky_ex")
_checked(aten.linalg_inv_ex.default, "linalg.inv_ex")
