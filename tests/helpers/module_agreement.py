"""Whether a module agrees with its twin in PyTorch: values, all gradients, buffers, state."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from torch2jax import from_module, tape_info


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().to(torch.float32).numpy() if t.is_floating_point() else t.detach().numpy()


def close(actual: Any, expected: Any, tolerance: float = 2e-5, where: str = "") -> None:
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        tolerance,
        tolerance,
        err_msg=where,
    )


def leaves(out: Any) -> list[Any]:
    """Inexact leaves of an output, torch's or JAX's, dicts by their keys."""
    if isinstance(out, dict):
        return [y for k in sorted(out) for y in leaves(out[k])]
    if isinstance(out, list | tuple):
        return [y for o in out for y in leaves(o)]
    if out is None:
        return []
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    return [out] if jnp.issubdtype(out.dtype, jnp.inexact) else []


def score(out: Any) -> Any:
    """A number in which every output has a weight of its own."""
    total = 0.0
    for k, y in enumerate(leaves(out)):
        y = y.float() if isinstance(y, torch.Tensor) else y.astype(jnp.float32)
        total = total + ((1.0 + 0.3 * k) * y * y + y).sum()
    return total


def state(module: nn.Module) -> dict[str, bytes]:
    """Every tensor of a module bit by bit, plain attributes too; and its modes."""
    found: dict[str, Any] = {}
    for path, sub in module.named_modules():
        found[f"{path}.training"] = sub.training
        for table in (sub._parameters, sub._buffers, vars(sub)):
            for key, t in table.items():
                if isinstance(t, torch.Tensor):
                    found[f"{path}.{key}"] = (
                        t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                        if t.numel()
                        else b"",
                        not t.is_leaf or t.grad is None,
                        t.requires_grad,
                        id(t),
                    )
        found[f"{path}.keys"] = tuple(vars(sub))
    return found


def to_jax(x: Any) -> Any:
    return jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x


def agrees(
    module: nn.Module,
    *args: Any,
    train: bool = False,
    tolerance: float = 5e-5,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Outputs, new buffers and all gradients are torch's, eager and compiled; nothing changes."""
    keywords = keywords or {}
    before = state(module)
    apply, variables = from_module(module, **options)
    twin = copy.deepcopy(getattr(module, "_orig_mod", module)).train(train)
    watched = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    ]
    out = twin(*watched, **keywords)
    score(out).backward()
    named = dict(twin.named_parameters())
    grads = {k: named[k].grad for k in variables["params"]}
    inputs = [to_jax(x) for x in args]
    where = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    jax_keywords = {k: to_jax(v) for k, v in keywords.items()}

    def loss(params: Any, chosen: Any) -> Any:
        full = list(inputs)
        for i, x in zip(where, chosen, strict=True):
            full[i] = x
        result = apply({**variables, "params": params}, *full, train=train, **jax_keywords)
        return score(result[0] if train else result), result

    plain = apply(variables, *inputs, train=train, **jax_keywords)
    plain = plain[0] if train else plain
    for k, (a, b) in enumerate(zip(leaves(plain), leaves(out), strict=True)):
        close(a, array(b), tolerance, f"output {k}")
    step = jax.grad(loss, argnums=(0, 1), has_aux=True)
    chosen = [inputs[i] for i in where]
    for run in (step, jax.jit(step)):
        (by_name, by_input), result = run(variables["params"], chosen)
        assert set(by_name) == set(grads)
        for name, g in by_name.items():
            expected = grads[name]
            expected = torch.zeros(g.shape) if expected is None else expected
            close(g, array(expected), tolerance, name)
        for i, g in zip(where, by_input, strict=True):
            expected = watched[i].grad
            close(g, 0 * g if expected is None else array(expected), tolerance, f"input {i}")
        if train:
            after = dict(twin.named_buffers())
            assert set(result[1]) == set(variables["buffers"])
            for name, b in result[1].items():
                close(b, array(after[name]), tolerance, name)
    assert state(module) == before, "the module was changed"
    assert tape_info().entries == 0
    return apply, variables


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x):
        return self.head(self.body(x))


def mlp_twin(params: Any, x: jax.Array) -> jax.Array:
    y = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return y @ params["2.weight"].T + params["2.bias"]
