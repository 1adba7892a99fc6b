"""Every lowering takes the arguments of its operator, and reads what it takes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from torch2jax import device, torch2jax
from torch2jax.lowerings import registry
from torch2jax.lowerings.registry import TABLE

device.enable()

# What does not concern values: where and how memory lies, and how long the host waits.
ELSEWHERE = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator"}

_SIZES = "the shape of another operand says it"
_DENSE = "JAX's arrays are dense: so is the gradient"
_STRIDES = "a new array is in row-major order"
_AGAIN = "what the forward pass returned says it"
_ACCURACY = "how sums are added up: here in float32"

UNREAD: dict[tuple[str, str], str] = {
    ("slice_backward", "end"): _SIZES,
    ("slice_scatter", "end"): _SIZES,
    ("repeat_interleave", "output_size"): "a hint, which the number of repeats says too",
    ("empty_strided", "stride"): _STRIDES,
    ("new_empty_strided", "stride"): _STRIDES,
    ("gather", "sparse_grad"): _DENSE,
    ("embedding", "sparse"): _DENSE,
    ("embedding_bag", "sparse"): _DENSE,
    ("embedding_bag_backward", "offsets"): _AGAIN,
    ("embedding_bag_backward", "sparse"): _DENSE,
    ("embedding_bag_per_sample_weights_backward", "offsets"): _AGAIN,
    ("embedding_bag_per_sample_weights_backward", "mode"): "sums alone have such weights",
    ("max_pool2d_with_indices_backward", "kernel_size"): _AGAIN,
    ("max_pool2d_with_indices_backward", "stride"): _AGAIN,
    ("max_pool2d_with_indices_backward", "padding"): _AGAIN,
    ("max_pool2d_with_indices_backward", "dilation"): _AGAIN,
    ("max_pool2d_with_indices_backward", "ceil_mode"): _AGAIN,
    ("max_pool3d_with_indices_backward", "kernel_size"): _AGAIN,
    ("max_pool3d_with_indices_backward", "stride"): _AGAIN,
    ("max_pool3d_with_indices_backward", "padding"): _AGAIN,
    ("max_pool3d_with_indices_backward", "dilation"): _AGAIN,
    ("max_pool3d_with_indices_backward", "ceil_mode"): _AGAIN,
    ("nll_loss_backward", "total_weight"): "it is added up again",
    ("batch_norm_backward", "reserve"): "empty, but on cuDNN",
    ("batch_norm_no_stats", "training"): "without statistics of its own there is no other way",
    ("topk", "sorted"): "sorted is one of the orders that are allowed",
    ("sort", "stable"): "it is stable in any case",
    ("index_put_impl", "unsafe"): "it leaves out a check",
    ("cholesky_ex", "check_errors"): "a handler checks what it returns",
    ("inv_ex", "check_errors"): "a handler checks what it returns",
    ("eigh", "compute_v"): "the vectors are there either way",
    ("cdist_forward", "compute_mode"): "which way it is computed",
    ("linear_cross_entropy", "acc_policy"): _ACCURACY,
    ("linear_cross_entropy", "acc_dtype"): _ACCURACY,
    ("linear_cross_entropy", "allow_retain_graph"): "JAX's derivative can be taken twice",
    ("linear_cross_entropy_of_rows", "acc_policy"): _ACCURACY,
    ("linear_cross_entropy_of_rows", "acc_dtype"): _ACCURACY,
}
"""Arguments that a lowering takes and never reads, by the names of both."""


def parameters(lowered: Any) -> list[inspect.Parameter]:
    found = list(inspect.signature(lowered.fn).parameters.values())
    return found[1:] if lowered.random else found


def read_names(fn: Any) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)).strip().removesuffix(","))
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def ours() -> list[tuple[Any, Any]]:
    """Operators with our lowerings; other tests register their own."""
    # Other tests register functions such as jnp.sinc, which may have no module.
    own = f"{registry.__name__.partition('.')[0]}."
    return [(op, x) for op, x in TABLE.items() if (x.fn.__module__ or "").startswith(own)]


def test_lowerings_take_what_their_operators_take() -> None:
    wrong = []
    for op, lowered in ours():
        given = parameters(lowered)
        kinds = {p.kind for p in given}
        places = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {p.name for p in given}
        schema = op._schema.arguments
        positional = [a.name for a in schema if not a.kwarg_only]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            wrong += [
                f"{op}: {name}" for name in positional[len(places) :] if name not in ELSEWHERE
            ]
        # By keyword comes what is keyword-only; what `**_` takes is never read.
        keywords = {a.name for a in schema if a.kwarg_only}
        if any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in given):
            continue
        if op.namespace == "prims":  # which autograd never sees
            keywords -= {"requires_grad"}
        wrong += [f"{op}: {name}" for name in keywords - named - ELSEWHERE]
    assert not wrong


def test_lowerings_read_what_they_take() -> None:
    unread = set()
    for _, lowered in ours():
        read = read_names(lowered.fn)
        for p in parameters(lowered):
            hidden = p.kind is p.VAR_KEYWORD and p.name == "_"
            if p.name not in read | ELSEWHERE and not hidden:
                unread.add((lowered.fn.__name__, p.name))
    assert unread == set(UNREAD)


def test_what_was_dropped_once() -> None:
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]], device="jax")
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.inv_ex(singular, check_errors=True)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky_ex(-singular, check_errors=True)
    assert torch.linalg.inv_ex(singular).info.item() != 0
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.inv(singular)
    found = torch.ops.prims.amax(torch.ones(3, device="jax"), [0], output_dtype=torch.float16)
    assert found.dtype == torch.float16
    inverse = jax.jit(torch2jax(torch.linalg.inv, lower=True))(jnp.diag(jnp.array([1.0, 4.0])))
    assert inverse[1, 1] == 0.25
