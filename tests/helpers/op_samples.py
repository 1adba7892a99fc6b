"""PyTorch's own operator samples (`op_db`): their operands, results and gradients, and a comparison."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from op_exceptions import UNTAGGED_DATA_DEPENDENT
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import TorchDispatchMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing the table builds sparse tensors, which are in beta
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import SampleInput as SampleInput
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo import core

# The table looks for a TestCase in the stack, with the source of every frame: half a test's time.
# There is none here, so this is what it finds.
for module in (common_utils, core):
    assert callable(module.extract_test_fn)
    module.extract_test_fn = lambda: None

ALL_SAMPLES = os.environ.get("T2J_ALL_OP_SAMPLES") == "1"


DTYPES = (torch.float32, torch.int64)
TENSOR_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


Derived = tuple[list[np.ndarray], list[np.ndarray]]
"""Cotangents of a sample's inexact results, and torch's gradients."""


def entries() -> Iterator[Any]:
    """Every operator with each of the dtypes; one that knows neither, with the first it knows."""
    for op in op_db:
        known = op.supported_dtypes("cpu")
        dtypes = [dtype for dtype in DTYPES if dtype in known] or sorted(known, key=str)[:1]
        for dtype in dtypes:
            yield pytest.param(
                op, dtype, id=f"{op.formatted_name}-{str(dtype).removeprefix('torch.')}"
            )


class Watch(TorchDispatchMode):
    """Notes which tags the operators that run carry."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[torch.Tag] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tags.update(func.tags)
        return func(*args, **(kwargs or {}))


DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def is_operand(leaf: Any) -> bool:
    """A dense tensor of a dtype that JAX has; others (sparse, quantised) are closed over."""
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.layout == torch.strided
        and leaf.dtype in TENSOR_DTYPES
    )


def results(out: Any) -> list[Any]:
    """What of an operator's result a JAX function can return: dense tensors and numbers."""
    leaves = []
    for leaf in torch_tree.tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            dense = leaf if leaf.layout == torch.strided else leaf.to_dense()
            leaves.append(dense if dense.dtype in TENSOR_DTYPES else dense.to(torch.complex64))
        elif isinstance(leaf, bool | int | float | complex):
            leaves.append(leaf)
    return leaves


def to_numpy(leaf: Any) -> np.ndarray:
    """The value of a tensor or number; a number has torch's default dtype."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    tensor = torch.as_tensor(leaf).detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy(force=True)


def declared(outs: list[Any]) -> list[jax.ShapeDtypeStruct]:
    """What a user writes as output_shapes for these results."""
    arrays = [to_numpy(out) for out in outs]
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]


def identity(out: Any) -> Any:
    return out


@dataclass
class Sample:
    """A sample as a flat function of its operands, and what torch itself says about it."""

    function: Callable[..., list[Any]]
    smooth: Callable[
        ..., list[Any]
    ]  # the function with the sample's own gauge fixed: what can be differentiated
    operands: list[torch.Tensor]
    differentiable: list[int]
    shapes_depend_on_values: bool
    expected: list[Any]
    smooth_shapes: list[jax.ShapeDtypeStruct] | None = None

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct] | None:
        """Where shapes depend on values, inference cannot know them and the user says them."""
        return declared(self.expected) if self.shapes_depend_on_values else None

    @classmethod
    def of(cls, op: Any, sample: Any) -> Sample:
        leaves, structure = torch_tree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if is_operand(leaf)]
        process = sample.output_process_fn_grad

        def call(tensors: tuple[torch.Tensor, ...], finish: Callable[[Any], Any]) -> list[Any]:
            full = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                full[i] = tensor
            first, args, kwargs = torch_tree.tree_unflatten(full, structure)
            with seeded():
                return results(finish(op(first, *args, **kwargs)))

        operands = [leaves[i].detach() for i in places]
        watch = Watch()
        function = lambda *tensors: call(tensors, identity)  # noqa: E731
        with watch, torch.no_grad():
            expected = function(*[operand.clone() for operand in operands])
        return cls(
            function=function,
            smooth=lambda *tensors: call(tensors, process or identity),
            operands=operands,
            differentiable=[k for k, i in enumerate(places) if leaves[i].requires_grad],
            shapes_depend_on_values=bool(watch.tags & DATA_DEPENDENT)
            or op.name in UNTAGGED_DATA_DEPENDENT,
            expected=expected,
        )

    def gradients(self) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
        """Cotangents of the inexact results and torch's gradients; None where torch has none."""
        inputs = [operand.clone() for operand in self.operands]
        for i in self.differentiable:
            inputs[i].requires_grad_()
        try:
            results = self.smooth(*inputs)
            self.smooth_shapes = declared(results) if self.shapes_depend_on_values else None
            outs = [out for out in results if is_inexact(out)]
            if any(not isinstance(out, torch.Tensor) for out in outs):
                return None
            cotangents = [cotangent(out) for out in outs]
            pairs = [
                (out, torch.from_numpy(ct).conj().to(out.dtype))
                for out, ct in zip(outs, cotangents, strict=True)
                if out.requires_grad
            ]
            wanted = [inputs[i] for i in self.differentiable]
            found: Any = [None] * len(wanted)
            if pairs:
                found = torch.autograd.grad(
                    [out for out, _ in pairs], wanted, [ct for _, ct in pairs], allow_unused=True
                )
        except RuntimeError:  # torch has no derivative, NotImplementedError included
            return None
        gradients = [
            to_numpy(torch.zeros_like(x) if g is None else g.to_dense())
            for x, g in zip(wanted, found, strict=True)
        ]
        cotangents = [
            ct.astype(to_numpy(out).dtype) for out, ct in zip(outs, cotangents, strict=True)
        ]
        return cotangents, [gradient.conj() for gradient in gradients]


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Random operators draw the same numbers in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def is_inexact(leaf: Any) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return isinstance(leaf, float | complex)
    return leaf.is_floating_point() or leaf.is_complex()


def cotangent(out: torch.Tensor) -> np.ndarray:
    """Fixed random numbers of a result's shape, float32 for bfloat16."""
    rng = np.random.default_rng(out.numel())
    values = rng.uniform(-1, 1, tuple(out.shape))
    if out.is_complex():
        values = values + 1j * rng.uniform(-1, 1, tuple(out.shape))
    dtype = torch.float32 if out.dtype == torch.bfloat16 else out.dtype
    return np.asarray(values).astype(torch.empty(0, dtype=dtype).numpy().dtype)


def compare(
    what: str, actual: list[jax.Array], expected: list[Any], *, values: bool = True
) -> None:
    assert len(actual) == len(expected), f"{len(actual)} {what}, expected {len(expected)}"
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        array = to_numpy(want)
        assert got.dtype == array.dtype, f"{what} {i}: dtype {got.dtype}, expected {array.dtype}"
        assert got.shape == array.shape, f"{what} {i}: shape {got.shape}, expected {array.shape}"
        if not values:
            continue
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            np.testing.assert_array_equal(np.asarray(got), array, err_msg=f"{what} {i}")
            continue
        wide = np.complex128 if array.dtype.kind == "c" else np.float64
        half = array.dtype.itemsize == 2  # whose sums are as exact as what is added up
        tolerance = 2e-2 if half else 2e-4
        array, actual_array = array.astype(wide), np.asarray(got).astype(wide)
        # Operands are up to 10: what should be 0 is rounding of that size.
        largest = np.abs(array[np.isfinite(array)]).max(initial=0.05)
        np.testing.assert_allclose(
            actual_array,
            array,
            rtol=tolerance,
            atol=tolerance * (largest if half else min(1.0, float(largest))),
            err_msg=f"{what} {i}",
        )


def all_samples(op: Any, dtype: torch.dtype) -> Iterator[Any]:
    differentiable = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    return iter(op.sample_inputs("cpu", dtype, requires_grad=differentiable))


def samples(op: Any, dtype: torch.dtype) -> Iterator[Any]:
    """All of them where the environment asks for it, else two."""
    return itertools.islice(all_samples(op, dtype), None if ALL_SAMPLES else 2)
