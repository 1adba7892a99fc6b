"""Times beside native PyTorch, jax.numpy and a plain copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from pages.page import number

from .common import Found, device


def median_ms(call: Callable[[], Any], rounds: int = 30) -> float:
    """Each call is awaited, by both sides."""
    import jax
    import torch

    def once() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        if device() == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(rounds))


def training_step() -> Found:
    """value_and_grad of a transformer, beside native PyTorch on the same GPU."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import from_module

    torch.manual_seed(0)
    big = device() == "cuda"
    layers, width, rows = (4, 512, 32) if big else (1, 64, 2)
    layer = torch.nn.TransformerEncoderLayer(
        width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    net = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device())
    x = torch.randn(rows, 256, width, device=device())

    def native() -> None:
        net.zero_grad(set_to_none=True)
        (net(x) ** 2).mean().backward()

    apply, variables = from_module(net)
    inputs = jnp.asarray(x.cpu().numpy())
    loss = jax.jit(
        jax.value_and_grad(
            lambda params: (
                apply({**variables, "params": params}, inputs, train=True)[0] ** 2
            ).mean()
        )
    )
    value = float(loss(variables["params"])[0])
    expected = float((net(x) ** 2).mean().detach())
    assert abs(value - expected) <= 1e-3 * abs(expected), (value, expected)
    rounds = 30 if big else 3
    torchs, ours = median_ms(native, rounds), median_ms(lambda: loss(variables["params"]), rounds)
    size = f"{layers} layers, {width} wide, {rows} x 256 tokens"
    return {
        f"step of a transformer ({size}), native PyTorch": f"{number(torchs)} ms",
        "the same through torch2jax": f"{number(ours)} ms, {ours / torchs:.3f} x",
    }


def calls() -> Found:
    """A call in a compiled loop, and bytes against a plain copy on the device."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    identity = torch2jax(lambda x: x.clone())
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda _, x: identity(x), x))
    adds = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda _, x: x + 1, x))
    small = jnp.ones(16)
    found = {
        "a call in a compiled loop": f"{number(median_ms(lambda: loop(small), 10))} µs",
        "jax.numpy's `x + 1` there": f"{number(median_ms(lambda: adds(small), 10))} µs",
        "an eager call": f"{number(median_ms(lambda: identity(small)) * 1e3)} µs",
    }
    size = 10**9 if device() == "cuda" else 10**7
    x, source = jnp.ones(size // 4), torch.ones(size // 4, device=device())
    target = torch.empty_like(source)
    doubled, into = torch2jax(lambda x: x * 2), torch2jax(torch.mul, out_arg="out")
    copy = median_ms(lambda: target.copy_(source), 10)
    plain = median_ms(lambda: doubled(x), 10)
    out = median_ms(lambda: into(x, 2.0), 10)
    rates = {"plain copy": copy, "torch2jax, x * 2": plain, "torch2jax with out_arg": out}
    found[f"{size:,} bytes, GB read and written a second"] = ", ".join(
        f"{name} {number(2 * size / ms / 1e6)}" for name, ms in rates.items()
    )
    return found
