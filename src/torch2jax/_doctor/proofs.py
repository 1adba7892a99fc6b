"""Small programs prove that the package works here.

Most run a PyTorch function through a transform of JAX and compare with the same function in
``jax.numpy`` under the same transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._errors import TorchCallError
from .._from_module import from_module
from .._torch2jax import torch2jax
from .diagnosis import Check
from .findings import visible_devices

Fn: TypeAlias = Callable[..., Any]


def _torch_fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a) @ b


def _twin(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tanh(a) @ b


def _total(f: Fn) -> Fn:
    return lambda a, b: f(a, b).sum()


TRANSFORMS: dict[str, Callable[[Fn], Fn]] = {
    "call": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(_total(f), (0, 1)),
    "jvp": lambda f: lambda a, b: jax.jvp(f, (a, b), (b.T, a.T)),
    "hessian": lambda f: jax.hessian(_total(f)),
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "jit(vmap(grad))": lambda f: jax.jit(jax.vmap(jax.grad(_total(f)), (0, None))),
}


def _operands() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    a = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    return a, np.cos(a.T)


def proofs() -> Iterator[Check]:
    """Yield a check for each proof, for each device, and for all devices at once."""
    for name, transform in TRANSFORMS.items():
        yield _proof(name, lambda transform=transform: _agrees(transform, jnp.asarray))
    for name, run in {
        "operands": _proof_of_sharing,
        "module": _proof_of_module,
        "randomness": _proof_of_randomness,
        "exception": _proof_of_exception,
    }.items():
        yield _proof(name, run)
    devices = [d for d in visible_devices() if d.platform in ("cpu", "gpu")]
    for d in devices:
        yield _proof(f"{d.platform}:{d.id}", lambda d=d: _proof_of_device(d))
    if len(devices) > 1:
        yield _proof("all devices at once", lambda: _proof_of_all_devices(devices))


def _proof(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check("Proofs", name, "ok", run())
    except Exception as error:  # whatever goes wrong belongs in the report
        return Check.of_error("Proofs", name, error)


def _agrees(transform: Callable[[Fn], Fn], put: Callable[[Any], jax.Array]) -> str:
    a, b = map(put, _operands())
    got = transform(torch2jax(_torch_fn))(a, b)
    _assert_equal(got, transform(_twin)(a, b))
    return "as jax.numpy has it"


def _assert_equal(got: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # A GPU multiplies matrices in short floats, whose precision sets these tolerances.
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=2e-3)


def _proof_of_sharing() -> str:
    seen: list[int] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        seen.append(a.data_ptr())
        return a + 1

    a = jnp.asarray(_operands()[0])
    jax.block_until_ready(torch2jax(fn, output_shapes=a, side_effects=True)(a))
    if seen != [a.unsafe_buffer_pointer()]:
        raise AssertionError("PyTorch was given a copy")
    return "PyTorch works in XLA's memory"


def _proof_of_module() -> str:
    module = torch.nn.Linear(3, 2)
    apply, variables = from_module(module)
    a = jnp.asarray(_operands()[0])

    def loss(params: Any) -> jax.Array:
        return (apply({**variables, "params": params}, a) ** 2).sum()

    def twin(params: Any) -> jax.Array:
        return ((a @ params["weight"].T + params["bias"]) ** 2).sum()

    params = variables["params"]
    _assert_equal(jax.jit(jax.grad(loss))(params), jax.grad(twin)(params))
    return "gradients of a torch.nn.Linear"


def _proof_of_randomness() -> str:
    drop = torch2jax(lambda x: torch.nn.functional.dropout(x, 0.5), stochastic=True)
    x, key = jnp.arange(1.0, 65.0), jax.random.key(0)
    out = jax.jit(drop)(x, rng=key)
    gradient = jax.jit(jax.grad(lambda x: drop(x, rng=key).sum()))(x)
    _assert_equal(out, x * gradient)
    if not 0 < int((out != 0).sum()) < x.size:
        raise AssertionError("dropout dropped nothing, or all")
    return "one key, one mask, forward and backward"


def _proof_of_exception() -> str:
    def fn(a: torch.Tensor) -> torch.Tensor:
        raise LookupError("on purpose")

    a = jnp.ones(3)
    try:
        torch2jax(fn, output_shapes=a)(a)
    except TorchCallError as error:
        if not isinstance(error.__cause__, LookupError):
            raise
    else:
        raise AssertionError("an exception in PyTorch was lost")
    _assert_equal(torch2jax(torch.sin)(a), jnp.sin(a))
    return "reaches the caller, and the next call works"


def _proof_of_device(device: Any) -> str:
    a, b = (jax.device_put(x, device) for x in _operands())
    f = torch2jax(_torch_fn)
    out = jax.jit(f)(a, b)
    gradient = jax.jit(jax.grad(_total(f)))(a, b)
    if out.devices() != {device} or gradient.devices() != {device}:
        raise AssertionError(f"results are on {out.devices()} and {gradient.devices()}")
    _assert_equal((out, gradient), (_twin(a, b), jax.grad(_total(_twin))(a, b)))
    return "jit and grad, results on the device"


def _proof_of_all_devices(devices: list[Any]) -> str:
    compiled = jax.jit(torch2jax(_torch_fn))
    operands = [[jax.device_put(x * i, d) for x in _operands()] for i, d in enumerate(devices)]
    results = [[compiled(*pair) for pair in operands] for _ in range(20)]  # none is awaited
    for result in results:
        _assert_equal(result, [_twin(*pair) for pair in operands])
    return f"{len(devices)} devices, 20 calls each, none awaited before the last"
