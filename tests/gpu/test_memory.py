"""A GPU's memory: what the tape may take of it, and what happens when there is none left."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_gpu import entry

from torch2jax import clear_tape, tape_info, torch2jax
from torch2jax._bridge.torch_side.tape.table import default_budget, tape

GIB = 2**30


@pytest.fixture
def card(gpu: Any) -> Any:
    """A card of which something else has a part; its budget is asked anew."""
    clear_tape()
    default_budget.cache_clear()
    yield gpu
    if gpu is not None:
        gpu.memory.update(free=16 * GIB, total=16 * GIB, reserved=0, allocated=0)
    default_budget.cache_clear()
    clear_tape()


@pytest.mark.parametrize(
    ("total", "free", "reserved", "allocated", "expected"),
    [
        (16, 16, 0, 0, 4),  # a quarter of the card
        (16, 4, 0, 0, 2),  # JAX has three quarters
        (16, 2, 2, 0, 2),  # what PyTorch has taken and does not use is free for it
        (16, 2, 2, 2, 1),
    ],
)
def test_the_budget(
    card: Any, total: int, free: int, reserved: int, allocated: int, expected: int
) -> None:
    sizes = {"total": total, "free": free, "reserved": reserved, "allocated": allocated}
    card.memory.update({name: size * GIB for name, size in sizes.items()})
    assert default_budget(torch.device("cuda", 0)) == expected * GIB


class Full:
    """A function for which there is no memory the first times."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0
        self.kept: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.kept.append(tape_info().entries)
        big = x * 2
        if self.calls <= self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return big + 1


def keep_a_graph(gpu: Any, device: int) -> None:
    """Leave a graph on the tape."""
    f = torch2jax(lambda x: torch.sin(x).sum())
    gpu.run(lambda x: jax.vjp(f, x), jnp.ones(3), device=device)


def test_a_pure_call_is_made_again(card: Any) -> None:
    gpu = card
    keep_a_graph(gpu, 0)
    keep_a_graph(gpu, 1)
    assert tape_info().entries == 2
    frees, cleared = gpu.frees(), gpu.emptied
    full = Full(1)
    made = entry(full, "full once", pure=True)
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    gpu.call(made.name, [x], [y])
    gpu.xla_kernel(reads=[y])
    np.testing.assert_array_equal(y.array, 3 * np.ones(3))
    assert full.kept == [2, 1]  # the other card's graph stays
    assert gpu.emptied == cleared + 1
    assert gpu.frees() > frees
    assert tape.bytes_on(torch.device("cuda", 0)) == 0


def test_a_second_failure_reports_both_allocators(card: Any, monkeypatch: Any) -> None:
    gpu = card

    class Device:
        local_hardware_id = 0

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": 3 * GIB, "pool_bytes": 12 * GIB, "bytes_limit": 12 * GIB}

    from torch2jax._bridge.handler import memory

    monkeypatch.setattr(memory, "gpus", lambda: [Device()])
    gpu.memory.update(free=GIB, reserved=2 * GIB, allocated=GIB)
    full = Full(2)
    made = entry(full, "full twice", pure=True)
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    with pytest.raises(Exception, match="full twice raised OutOfMemoryError") as raised:
        gpu.call(made.name, [x], [y])
    assert full.calls == 2
    text = str(raised.value)
    assert "GPU 0 has 16,384 MiB, of which 1,024 MiB are free." in text
    assert "PyTorch has taken 2,048 MiB and uses 1,024 MiB of them; the tape holds 0 MiB." in text
    assert "JAX has taken 12,288 MiB, uses 3,072 MiB of them and may take 12,288 MiB." in text
    assert "XLA_CLIENT_MEM_FRACTION" in text


@pytest.mark.parametrize("kind", ["side effects", "changes"])
def test_a_call_that_is_not_pure_is_not_made_again(card: Any, kind: str) -> None:
    gpu = card
    full = Full(1)

    def fn(x: torch.Tensor) -> torch.Tensor:
        full.calls += 0 if torch._C._len_torch_dispatch_stack() else 1
        if kind == "changes":
            x.add_(1)
        if full.calls:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x + 1

    options = {"side effects": {"side_effects": True}, "changes": {"inplace_argnums": 0}}
    f = torch2jax(fn, **options.get(kind, {}))
    with pytest.raises(Exception, match="raised OutOfMemoryError"):
        gpu.run(lambda x: f(x), jnp.ones(3))
    assert full.calls == 1


def test_a_wrapped_function_is_pure(card: Any) -> None:
    calls = 0

    def fn(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        if not torch._C._len_torch_dispatch_stack():
            calls += 1
            if calls == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return (x * x).sum()

    f = torch2jax(fn)
    grad = card.run(jax.grad(f), jnp.arange(3.0))
    np.testing.assert_array_equal(grad, 2 * jnp.arange(3.0))
    assert calls == 2
