"""What tells eager calls apart is read twice: in Python for the first call, in C++ for those after.

The calls are those of PyTorch's own operator samples, recorded on the CPU and given to both readers
with tensors of device jax. Each is read beside variants of itself. One sample of each operator; with
T2J_ALL_OP_SAMPLES=1, as `make test-ops` sets it, all of them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from op_samples import ALL_SAMPLES, Sample, entries, samples
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import TorchDispatchMode

from torch2jax import _ext, device
from torch2jax.device.operators.dispatch import operator_of
from torch2jax.device.operators.operator import Operator
from torch2jax.device.operators.view_operator import ViewOperator
from torch2jax.device.tensors.tensor import Tensor, wrap

aten = torch.ops.aten
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """Notes calls, without the device: what asks for one is for the CPU here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Call]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(operator_of(func), Operator | ViewOperator):
            named = {k: v for k, v in (kwargs or {}).items() if k != "device"}
            self.calls.append((func, (args, named)))
        return func(*args, **(kwargs or {}))


def one_of_each() -> Iterator[Any]:
    """Every operator with one dtype, or with all that are tested."""
    known: set[str] = set()
    for entry in entries():
        name = entry.values[0].formatted_name
        if ALL_SAMPLES or name not in known:
            known.add(name)
            yield entry


def recorded(op: Any, dtype: torch.dtype) -> Iterator[tuple[Any, Call]]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for drawn in itertools.islice(samples(op, dtype), None if ALL_SAMPLES else 1):
            try:
                sample = Sample.of(op, drawn)
                with Recorder() as recorder:
                    sample.function(*[x.clone() for x in sample.operands])
            except (RuntimeError, ValueError, TypeError, AssertionError):
                continue  # torch itself cannot run the sample on a CPU
            yield from recorder.calls


def with_numbers() -> list[tuple[Any, Call]]:
    """Numbers that are operands and numbers that are not: the first samples have few."""
    x = torch.ones(2, 3)
    return [
        (aten.add.Tensor, ((x, 3), {})),
        (aten.add.Tensor, ((x, x), {"alpha": 2})),
        (aten.mul.Tensor, ((x, 2.5), {})),
        (aten.clamp.default, ((x, 0, 1.5), {})),
        (aten.sum.dim_IntList, ((x, [0, 1], True), {})),
        (aten._foreach_add_.List, (([x, x], [x, x.clone()]), {"alpha": 1})),
        (aten._foreach_mul_.ScalarList, (([x, x], [2, 2.5]), {})),
        (aten.slice.Tensor, ((x, 0, 1, 2), {})),
    ]


def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """Readers look at no values, so the array has a dtype that all of JAX's settings have."""
    return wrap(np.zeros(shape, np.float32), dtype)


def moved(call: Call) -> Call:
    """The call with tensors of device jax in the place of those of the CPU."""
    known: dict[int, Any] = {}

    def of(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known.setdefault(id(x), tensor(x.dtype, *x.shape))

    return torch_tree.tree_map(of, call)


def other_values(x: Any) -> list[Any]:
    """Values that a reader could mistake for ``x``."""
    if type(x) is Tensor:
        other = torch.int32 if x.dtype is not torch.int32 else torch.int16
        further = [tensor(x.dtype, *x.shape), tensor(x.dtype, 2, *x.shape), tensor(other, *x.shape)]
        flat = tensor(x.dtype, *x.shape, 2, 3)
        views = [flat[..., 0, 1], flat[..., 1, 1], flat.transpose(-1, -2)[..., 0, 1]]
        return [*further, tensor(x.dtype), *views]
    if x is None:
        return [0, False]
    if type(x) is bool:
        return [not x, int(x), float(x), None]
    if type(x) is int:
        return [x + 1, -x - 1, float(x), bool(x), 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**70]
    if type(x) is float:
        return [x + 1.5, 0.0, -0.0, float("nan"), float("inf"), 1, True]
    if type(x) is str:
        return [x + "x", x[:-1], x + "\0", "", None]
    if isinstance(x, torch.dtype):
        return [torch.int8 if x is not torch.int8 else torch.int16, None]
    return []


def variants(call: Call) -> Iterator[Call]:
    """The call, the same again, and for each leaf those with another value in its place."""
    leaves, structure = torch_tree.tree_flatten(call)
    yield call
    yield torch_tree.tree_unflatten(leaves, structure)
    for i, leaf in enumerate(leaves):
        for value in other_values(leaf):
            yield torch_tree.tree_unflatten([*leaves[:i], value, *leaves[i + 1 :]], structure)
    tensors = [i for i, x in enumerate(leaves) if type(x) is Tensor]
    for i, j in itertools.pairwise(tensors):  # the same memory twice
        shared = list(leaves)
        shared[j] = shared[i]
        yield torch_tree.tree_unflatten(shared, structure)
    args, kwargs = call
    yield tuple(list(a) if type(a) is tuple else a for a in args), kwargs
    yield tuple([*a, *a[:1]] if isinstance(a, list | tuple) else a for a in args), kwargs
    for k in range(1, len(args)):
        yield args[:k], kwargs


def understood(x: Any) -> bool:
    """Whether an argument is of a kind that C++ reads."""
    if isinstance(x, list | tuple):
        return type(x) in (list, tuple) and all(map(understood, x))
    if type(x) is int:
        return -(2**63) <= x < 2**63
    plain = (Tensor, bool, float, str, type(None))
    return type(x) in plain or isinstance(x, torch.dtype | torch.layout | torch.memory_format)


def in_python(func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
    op: Any = operator_of(func)
    if type(op) is ViewOperator:
        return op.key(args[0], args, kwargs), []
    key, operands, *_ = op.read(args, kwargs)
    return key, operands


class Readers:
    """Both readings of one operator's calls: they are the same for the same calls."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.is_view = type(operator_of(func)) is ViewOperator
        self.key_of: dict[bytes, Any] = {}
        self.words_of: dict[Any, bytes] = {}
        self.calls: list[Call] = []
        """C++ reads objects by their address, so they have to live."""

    def understood(self, args: Any, kwargs: Any) -> bool:
        if not self.is_view:
            return all(map(understood, [*args, *kwargs.values()]))
        rest = [*args[1:], *kwargs.values()]
        tensors = [x for x in torch_tree.tree_leaves(rest) if isinstance(x, torch.Tensor)]
        return all(map(understood, rest)) and not tensors

    def compare(self, args: Any, kwargs: Any) -> bool:
        """Whether C++ understands a call, which both readers are given."""
        found = _ext.eager_key(self.func, args, kwargs)
        assert (found is not None) == self.understood(args, kwargs), self.told(args, kwargs)
        if found is None:
            return False
        words, operands = found
        key, expected = in_python(self.func, args, kwargs)
        assert [id(x) for x in operands] == [id(x) for x in expected], self.told(args, kwargs)
        self.calls.append((args, kwargs))
        assert self.key_of.setdefault(words, key) == key, self.told(args, kwargs)
        if not self.is_view:  # of a view C++ tells an argument from the same one by its name
            # C++ tells sizes apart too, because those of the results follow from them.
            key = key, tuple([tuple(x.shape) for x in expected if type(x) is Tensor])
            assert self.words_of.setdefault(key, words) == words, self.told(args, kwargs)
        return True

    def told(self, args: Any, kwargs: Any) -> str:
        return f"{self.func} {torch_tree.tree_map(kind, (args, kwargs))}"


def test_cpp_tells_calls_apart_as_python_does() -> None:
    device.enable()
    seen: set[Any] = set()
    readers: dict[Any, Readers] = {}
    count = 0
    sampled = (pair for entry in one_of_each() for pair in recorded(*entry.values))
    for func, call in itertools.chain(with_numbers(), sampled):
        op: Any = operator_of(func)
        if type(op) is Operator and not op.repeats:
            continue
        facts = (func, repr(torch_tree.tree_map(kind, call)))
        if facts in seen:
            continue
        seen.add(facts)
        both = readers.setdefault(func, Readers(func))
        for args, kwargs in variants(moved(call)):
            if not both.is_view or (args and type(args[0]) is Tensor):
                count += both.compare(args, kwargs)
    assert len(readers) > 300
    assert count > 5_000


def kind(x: Any) -> Any:
    return (x.dtype, x.ndim > 0) if isinstance(x, torch.Tensor) else x


def test_only_repeated_operators_have_a_key() -> None:
    device.enable()
    x = tensor(torch.float32, 2)
    assert _ext.eager_key(aten.add.Tensor, (x, x), {}) is not None
    assert _ext.eager_key(aten.t.default, (tensor(torch.float32, 2, 3),), {}) is not None
    for func, args in ((aten.rand_like.default, (x,)), (aten.nonzero.default, (x,))):
        assert _ext.eager_key(func, args, {}) is None
