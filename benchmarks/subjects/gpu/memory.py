"""Memory is not used again too early, does not grow, and its end is an error that helps."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from .common import Found, busy, device, on_gpu, prepare, synchronize


def lifetimes() -> Found:
    """256 MB change hands and are given up at once, while the other side still reads them."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import j2t, t2j, torch2jax

    prepare()
    size = (1 << 26) if on_gpu() else (1 << 16)
    rounds = 10 if on_gpu() else 2

    def late(x: torch.Tensor) -> torch.Tensor:
        busy(50)
        return x.clone()

    f = jax.jit(lambda x: torch2jax(late)(x).min() + x.min())
    kept = j2t(jax.block_until_ready(f(jnp.ones(size))))  # compiled
    for i in range(rounds):
        source = torch.full((size,), float(i), device=device())
        y = f(t2j(source))
        del source  # XLA still reads the memory
        other = torch.full((size,), -1.0, device=device())
        assert float(y) == 2 * i, f"t2j, round {i}: {float(y)} of memory that was used again"
        del other
    for i in range(rounds):
        tensor = j2t(jnp.full(size, float(i)))
        busy(50)
        y = tensor.min()
        del tensor  # PyTorch still reads the memory
        gc.collect()
        other = jnp.full(size, -1.0)
        assert float(y) == i, f"j2t, round {i}: {float(y)} of memory that was used again"
        del other
    synchronize()
    told = f"{rounds} rounds, {4 * size / 1e6:,.0f} MB each, all values right"
    return {"t2j, then the tensor is dropped": told, "j2t, then the array is dropped": told} | (
        {} if kept.device.type == device() else {"j2t": "on another device"}
    )


def flat_memory() -> Found:
    """10,000 steps with gradients: what both allocators, the GPU and the host hold."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    step = jax.jit(jax.value_and_grad(torch2jax(lambda x: torch.tanh(x @ x).sum())))
    x = jnp.ones((64, 64)) / 64

    def held() -> dict[str, int]:
        gc.collect()
        stats = jax.devices()[0].memory_stats() or {}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        host = pages * os.sysconf("SC_PAGE_SIZE")
        found = {"jax": stats.get("bytes_in_use", 0), "host": host}
        if on_gpu():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            found |= {"torch": torch.cuda.memory_allocated(), "device": total - free}
        return found

    def run(calls: int) -> None:
        for _ in range(calls):
            result = step(x)
        jax.block_until_ready(result)

    steps = 10_000 if on_gpu() else 1_000
    run(1_000)
    before = held()
    run(steps)
    after = held()
    grown = {name: after[name] - before[name] for name in before}
    told = ", ".join(f"{name} {bytes_ / 2**20:+.2f} MiB" for name, bytes_ in grown.items())
    assert grown.pop("host") <= 30 * 2**20, told
    assert all(bytes_ <= 2**20 for bytes_ in grown.values()), told
    return {f"memory over {steps:,} steps": told}


def end_of_memory() -> Found:
    """With JAX's default preallocation: the error names both allocators, and calls work on."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    def greedy(x: torch.Tensor) -> torch.Tensor:
        if not on_gpu():
            raise torch.OutOfMemoryError("a rehearsal: CUDA out of memory")
        free, _ = torch.cuda.mem_get_info()
        return torch.empty(2 * free, dtype=torch.uint8, device="cuda")[: x.shape[0]] + x

    x = jnp.ones(1 << 20)
    step = jax.jit(jax.value_and_grad(torch2jax(lambda x: torch.tanh(x * 2).sum())))
    jax.block_until_ready(step(x))
    f = torch2jax(greedy, output_shapes=jax.ShapeDtypeStruct(x.shape, x.dtype))
    try:
        jax.block_until_ready(f(x))
    except Exception as error:
        text = str(error)
    else:
        raise AssertionError("twice the free memory was given out")
    assert "out of memory" in text.lower(), text
    kept, y = jax.vjp(torch2jax(lambda x: torch.tanh(x * 2).sum()), x)[0], step(x)
    assert jnp.allclose(kept, y[0])
    found = {"more than there is": f"{text.strip().splitlines()[0]} The next call works."}
    if on_gpu():
        assert "JAX" in text, text
        assert "PyTorch" in text, text
    return found
