"""Whether a model agrees with PyTorch on a surface: its values and the gradients of all weights.

PyTorch's result on the CPU is the expected one. A result may be off by what rounding does: that is
measured, by the same model with weights that are moved by a millionth.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torch2jax import Torch2JaxError, device, from_module

from .tiny import Subject

CLOSE = 5e-4
"""Of the largest value in a tensor."""


class Result(NamedTuple):
    values: list[np.ndarray]
    grads: dict[str, np.ndarray]


class Verdict(NamedTuple):
    kind: str
    """"right", "wrong", "random" or "error"."""
    text: str = ""


def leaves(out: Any) -> list[Any]:
    """Inexact leaves of an output, PyTorch's or JAX's, dicts by their keys."""
    if isinstance(out, dict):
        return [y for k in sorted(out) for y in leaves(out[k])]
    if isinstance(out, list | tuple):
        return [y for o in out for y in leaves(o)]
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() or out.is_complex() else []
    if isinstance(out, jax.Array):
        return [out] if jnp.issubdtype(out.dtype, jnp.inexact) else []
    return []


# Every output has a weight of its own. Infinite entries (masks) do not count.
def score_torch(out: Any) -> Any:
    total: Any = 0.0
    for k, y in enumerate(leaves(out)):
        if y.numel():
            y = torch.view_as_real(y) if y.is_complex() else y.float()
            y = torch.where(torch.isfinite(y), y, torch.zeros_like(y))
            total = total + ((1.0 + 0.3 * k) * y * y + y).mean()
    return total


def score_jax(out: Any) -> Any:
    total: Any = 0.0
    for k, y in enumerate(leaves(out)):
        if y.size:
            y = jnp.stack([y.real, y.imag], -1) if jnp.iscomplexobj(y) else y.astype(jnp.float32)
            y = jnp.where(jnp.isfinite(y), y, 0.0)
            total = total + ((1.0 + 0.3 * k) * y * y + y).mean()
    return total


def array(t: torch.Tensor) -> np.ndarray:
    t = t.detach().cpu()
    return (torch.view_as_real(t) if t.is_complex() else t.float()).numpy()


def in_torch(subject: Subject, where: str = "cpu") -> Result:
    model = copy.deepcopy(subject.model).to(where)
    inputs = {k: moved(x, where) for k, x in subject.inputs.items()}
    out = model(**inputs)
    score_torch(out).backward()
    grads = {
        k: array(torch.zeros_like(p) if p.grad is None else p.grad)
        for k, p in model.named_parameters()
        if p.requires_grad
    }
    return Result([array(y) for y in leaves(out)], grads)


def moved(x: Any, where: str) -> Any:
    return x.to(where) if isinstance(x, torch.Tensor) else x


def shaken(subject: Subject) -> Result:
    """The result with weights and inputs that are moved by a millionth."""
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return in_torch(Subject(model, subject.inputs))


def in_jax(subject: Subject, **options: Any) -> list[Result]:
    apply, variables = from_module(subject.model, **options)
    arrays = {
        k: jnp.asarray(x.numpy()) for k, x in subject.inputs.items() if isinstance(x, torch.Tensor)
    }
    static = {k: x for k, x in subject.inputs.items() if k not in arrays}

    key: dict[str, Any] = {}

    def loss(params: Any, arrays: Any) -> Any:
        out = apply({**variables, "params": params}, **arrays, **static, **key)
        return score_jax(out), out

    step = jax.jit(jax.grad(loss, has_aux=True))
    results = []
    try:
        step(variables["params"], arrays)
    except Torch2JaxError as error:
        # What the errors say to do: pass a key, or call it eagerly, which knows values.
        if "rng=" in str(error):
            key["rng"] = jax.random.key(0)
        elif "asks for values" not in str(error):
            raise
        apply(variables, **arrays, **static, **key)
    for _ in range(2):
        grads, out = step(variables["params"], arrays)
        values = [np.asarray(y) for y in leaves(out)]
        values = [np.stack([y.real, y.imag], -1) if np.iscomplexobj(y) else y for y in values]
        results.append(Result(values, {k: np.asarray(g) for k, g in grads.items()}))
    return results


def bridge(subject: Subject) -> list[Result]:
    return in_jax(subject)


def lower(subject: Subject) -> list[Result]:
    return in_jax(subject, lower=True)


def eager(subject: Subject) -> list[Result]:
    device.enable()
    return [in_torch(subject, "jax")]


def compiled(subject: Subject) -> list[Result]:
    """Forward and backward under `device.jit`, whose second call is compiled."""
    device.enable()
    model = copy.deepcopy(subject.model).to("jax")
    inputs = {k: moved(x, "jax") for k, x in subject.inputs.items()}

    @device.jit
    def step(**inputs: Any) -> Any:
        for p in model.parameters():
            p.grad = None
        out = model(**inputs)
        score_torch(out).backward()
        return leaves(out), {
            k: torch.zeros_like(p) if p.grad is None else p.grad
            for k, p in model.named_parameters()
            if p.requires_grad
        }

    results = []
    for _ in range(3):
        values, grads = step(**inputs)
        results.append(Result([array(y) for y in values], {k: array(g) for k, g in grads.items()}))
    return results


SURFACES = {"bridge": bridge, "lower": lower, "device": eager, "device.jit": compiled}


def off(actual: np.ndarray, expected: np.ndarray, least: float = 1e-6) -> float:
    """The largest difference beside the largest value; infinite where shapes or NaN differ."""
    if actual.shape != expected.shape:
        return float("inf")
    finite = np.isfinite(expected)
    same = np.where(finite, True, (actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    if not same.all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(expected[finite]).max()), least)
    worst = np.abs(actual[finite].astype(np.float64) - expected[finite]).max()
    return float(worst) / scale if np.isfinite(worst) else float("inf")


def differences(actual: Result, expected: Result) -> dict[str, float]:
    if len(actual.values) != len(expected.values):
        return {f"{len(actual.values)} values, not {len(expected.values)}": float("inf")}
    missing = set(actual.grads) ^ set(expected.grads)
    found = {f"gradient of {k} is on one side only": float("inf") for k in missing}
    pairs = zip(actual.values, expected.values, strict=True)
    found |= {f"value {k}": off(a, b) for k, (a, b) in enumerate(pairs)}
    # Gradients that are rounding (a bias before a norm) are measured beside the largest of all.
    top = max(
        (float(np.abs(g[np.isfinite(g)]).max(initial=0)) for g in expected.grads.values()),
        default=0,
    )
    for k in set(actual.grads) & set(expected.grads):
        found[f"gradient of {k}"] = off(actual.grads[k], expected.grads[k], 1e-4 * top)
    return found


@contextlib.contextmanager
def first_of_equals() -> Iterator[None]:
    """PyTorch's ``topk`` takes any of equal values; in this scope it takes the first ones."""

    def topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
        return TopK(values.narrow(dim, 0, k), indices.narrow(dim, 0, k))

    method, function = torch.Tensor.topk, torch.topk
    torch.Tensor.topk = torch.topk = topk  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.topk, torch.topk = method, function  # type: ignore[method-assign]


class TopK(NamedTuple):
    values: torch.Tensor
    indices: torch.Tensor


def compare(name: str, subject: Subject, expected: Result, noise: dict[str, float]) -> Verdict:
    try:
        results = SURFACES[name](subject)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Verdict("error", message(error))
    worst = []
    for call, actual in enumerate(results):
        for what, by in differences(actual, expected).items():
            if by > max(CLOSE, 100 * noise.get(what, 0.0)):
                worst.append(
                    (by, f"call {call}: {what} off by {by:.2g} (rounding {noise.get(what, 0):.1g})")
                )
    if worst:
        with first_of_equals():
            other = in_torch(subject)
        found = [differences(actual, other) for actual in results]
        if all(by <= max(CLOSE, 100 * noise.get(k, 0.0)) for d in found for k, by in d.items()):
            return Verdict("random", "right where topk takes the first of equal values")
        worst.sort(reverse=True)
        return Verdict("wrong", f"{len(worst)} tensors; " + "; ".join(t for _, t in worst[:4]))
    return Verdict("right")


def message(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    last = [f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in frames[-3:]]
    return f"{text[:1500]} [{' < '.join(reversed(last))}]"


def check(subject: Subject, surfaces: list[str]) -> dict[str, Verdict]:
    state = {k: t.clone() for k, t in subject.model.state_dict().items()}
    expected = in_torch(subject)
    again = differences(in_torch(subject), expected)
    noise = differences(shaken(subject), expected)
    random = [k for k, by in again.items() if by > CLOSE]
    if random:
        return {
            name: Verdict("random", f"PyTorch differs from itself in {random[0]}")
            for name in surfaces
        }
    found = {}
    for name in surfaces:
        found[name] = compare(name, subject, expected, noise)
        for k, t in subject.model.state_dict().items():
            same = isinstance(t, torch.Tensor) and torch.equal(t, state[k])
            if not same and not t.isnan().any():
                found[name] = Verdict("wrong", f"the model's {k} was changed")
        # What a surface leaves behind (caches of functions) must not disturb plain PyTorch.
        try:
            after = differences(in_torch(subject), expected)
            changed = [k for k, by in after.items() if by > CLOSE]
        except Exception as error:
            changed = [message(error)]
        if changed:
            found[name] = Verdict(
                "wrong", f"PyTorch afterwards: {changed[0]}; before: {found[name]}"
            )
    return found
