"""Whether a model as a JAX program agrees with PyTorch: values, all gradients, buffers."""

from __future__ import annotations

import copy
from typing import Any

import hugging_face as hf
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from torch2jax import from_module, lowering_report


def wave(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(float(np.prod(shape))) * 0.7).reshape(shape)


def leaves(out: Any) -> list[Any]:
    """Float results, of PyTorch's model or of ours, in one order."""
    out = dict(out) if hasattr(out, "keys") else out
    found = jax.tree.leaves(out, is_leaf=lambda x: isinstance(x, torch.Tensor))
    return [
        x
        for x in found
        if (x.is_floating_point() if torch.is_tensor(x) else jnp.issubdtype(x.dtype, jnp.floating))
    ]


def score(out: Any) -> Any:
    return sum(((y * y * (1 + k / 2) + y).mean() for k, y in enumerate(leaves(out))), 0.0)


def close(actual: Any, expected: Any, where: str) -> None:
    # Deep convolution nets add up long sums in other orders: measured beside the largest value.
    expected = expected.detach().numpy()
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    off = np.abs(np.asarray(actual) - expected) / scale
    # A unit before a ReLU that is 0 but for rounding passes its gradient on in one of the two.
    assert np.sum(off > 2e-3) <= off.size // 100, f"{where}: {np.sum(off > 2e-3)} of {off.size}"
    assert off.max(initial=0) < 3e-2, f"{where}: {off.max()}"


def agrees(model: nn.Module, inputs: dict[str, Any], train: bool) -> None:
    twin = copy.deepcopy(model).train(train)
    expected = twin(**inputs)
    score(expected).backward()

    apply, variables = from_module(model, lower=True)
    arrays = {k: hf.to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    static = {k: x for k, x in inputs.items() if k not in arrays}

    def loss(params: Any, arrays: Any) -> Any:
        out = apply({**variables, "params": params}, train=train, **arrays, **static)
        out, buffers = out if train else (out, {})
        return score(out), (out, buffers)

    step = jax.jit(jax.grad(loss, has_aux=True))
    assert "custom_call" not in jax.jit(loss).lower(variables["params"], arrays).as_text()
    grads, (out, buffers) = step(variables["params"], arrays)
    for k, (y, want) in enumerate(zip(leaves(out), leaves(expected), strict=True)):
        close(y, want, f"result {k}")
    wanted = {k: p for k, p in twin.named_parameters() if p.requires_grad}
    assert set(grads) == set(wanted)
    top = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, p in wanted.items():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        if want.abs().max() > 1e-5 * top:  # else it is rounding: a bias before a batch norm
            close(grads[name], want, name)
        else:
            assert float(jnp.abs(grads[name]).max()) <= 1e-4 * top, name
    for name, b in twin.named_buffers():
        if name in buffers:
            close(buffers[name], b, name)
    report = lowering_report(apply, variables, train=train, **arrays, **static)
    assert report.native
    assert not report.bridge
