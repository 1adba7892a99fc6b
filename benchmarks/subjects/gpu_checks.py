"""What gpu.py checks and measures: each function returns what it found, or raises.

All but the streams can run on a CPU too, by smaller sizes:
`python benchmarks/programs/gpu.py --rehearse`.
"""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages.page import number

Found = dict[str, str]
"""What a check found, as it stands on the page."""


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# -- results: the same as on a CPU -----------------------------------------------------------------


def dtypes() -> Found:
    """An identity function, and a sum where there is one, of every dtype."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import dtype_t2j, torch2jax

    names = "bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32 complex64 "
    names += "float8_e4m3fn float8_e5m2"
    for name in names.split():
        x = jnp.asarray([0, 1, 2, 3]).astype(dtype_t2j(getattr(torch, name)))
        y = jax.jit(torch2jax(lambda x: x.clone()))(x)
        assert y.dtype == x.dtype, (name, y.dtype)
        assert y.devices() == x.devices()
        np.testing.assert_array_equal(np.asarray(y), np.asarray(x))
    return {"dtypes": ", ".join(names.split())}


def conversions() -> Found:
    """`t2j` and `j2t` share memory on the device; a transposed tensor is copied there."""
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import j2t, t2j

    tensor = torch.arange(64.0, device=device()).reshape(8, 8)
    array = t2j(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = j2t(jnp.arange(64.0))
    assert back.device.type == device()
    np.testing.assert_array_equal(np.asarray(t2j(tensor.T)), tensor.T.cpu().numpy())
    assert t2j(tensor.T).unsafe_buffer_pointer() != tensor.data_ptr()
    source = jnp.arange(8.0)
    assert j2t(source).data_ptr() == source.unsafe_buffer_pointer()
    return {
        "conversions": "`t2j` and `j2t` share the device's memory; a transposed tensor is copied"
    }


def transforms() -> Found:
    """Each transform beside the same function in `jax.numpy`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torch2jax import torch2jax

    f = torch2jax(lambda x, w: (torch.tanh(x) * w).sum() + (x**3).mean())

    def twin(x: jax.Array, w: jax.Array) -> jax.Array:
        return (jnp.tanh(x) * w).sum() + (x**3).mean()

    x, w = jnp.linspace(-1.0, 1.0, 12), jnp.linspace(0.5, 2.0, 12)
    rows = jnp.stack([x, 2 * x, -x])
    every: dict[str, Callable[[Any], Any]] = {
        "grad": lambda f: jax.grad(f, (0, 1))(x, w),
        "jvp": lambda f: jax.jvp(f, (x, w), (w, x)),
        "hessian": lambda f: jax.hessian(f)(x, w),
        "third derivative": lambda f: jax.jacfwd(jax.hessian(f))(x, w),
        "vmap": lambda f: jax.vmap(f, (0, None))(rows, w),
        "vmap(grad)": lambda f: jax.vmap(jax.grad(f), (0, None))(rows, w),
        "jacrev": lambda f: jax.jacrev(lambda x: jax.vmap(f, (None, 0))(x, rows))(x),
        "scan": lambda f: jax.lax.scan(lambda c, r: (c + f(c * r, w), c), 0.1, rows)[0],
        "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(x, w),
    }
    for name, transform in every.items():
        got, want = jax.jit(lambda t=transform: t(f))(), transform(twin)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=name)
    return {"transforms under jit": ", ".join(every)}


def tape() -> Found:
    """The forward pass runs once; the graph of every token is found."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import tape_info, torch2jax

    calls: list[int] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.exp(x).sum()

    step = jax.jit(jax.value_and_grad(torch2jax(fn)))
    x = jnp.linspace(0.0, 1.0, 1000)
    jax.block_until_ready(step(x))
    before, _ = tape_info(), calls.clear()
    for _ in range(100):
        _, gradient = jax.block_until_ready(step(x))
    after = tape_info()
    assert jnp.allclose(gradient, jnp.exp(x), rtol=1e-5)
    assert len(calls) == 100, len(calls)
    assert (after.hits - before.hits, after.misses - before.misses, after.entries) == (100, 0, 0)
    return {"tape": "100 steps: 100 forward passes, 100 hits, no miss, no graph left"}


def randomness() -> Found:
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    drop = torch2jax(lambda x: torch.nn.functional.dropout(x, 0.5), stochastic=True)
    x, key = jnp.arange(1.0, 1001.0), jax.random.key(0)
    first = drop(x, rng=key)
    assert (first == jax.jit(drop)(x, rng=key)).all()
    assert (jax.grad(lambda x: drop(x, rng=key).sum())(x) * x == first).all()
    assert not (first == drop(x, rng=jax.random.key(1))).all()
    return {"randomness": "one key, one mask: eager, jit and gradient"}


# -- streams ---------------------------------------------------------------------------------------


def cycles_of_a_millisecond() -> int:
    """Of the GPU's clock, by a kernel that only waits."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    return int(100_000_000 / begin.elapsed_time(end))


def host_does_not_wait() -> Found:
    """Ten calls in one program, each 50 ms of the GPU: the host is through long before the GPU."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    wait, entered = 50 * cycles_of_a_millisecond(), []

    def slow(x: torch.Tensor) -> torch.Tensor:
        entered.append(time.perf_counter())
        torch.cuda._sleep(wait)
        return x + 1

    f = torch2jax(slow, output_shapes=jax.ShapeDtypeStruct((4,), jnp.float32))

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(10):
            x = f(x)
        return x

    jax.block_until_ready(chain(jnp.zeros(4)))
    entered.clear()
    begin = time.perf_counter()
    out = jax.block_until_ready(chain(jnp.zeros(4)))
    whole, host = time.perf_counter() - begin, entered[-1] - begin
    assert (out == 10).all()
    assert whole > 0.4, f"the GPU waited {whole:.3f} s in all, not 0.5 s"
    assert host < 0.5 * whole, f"the last call was made after {host:.3f} s of {whole:.3f} s"
    told = f"the last of ten calls of 50 ms was queued after {host * 1e3:.1f} ms; "
    return {"host": f"{told}their results were there after {whole * 1e3:.0f} ms"}


def racing() -> Found:
    """Late writers and early readers on streams of their own, from four threads."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import j2t, t2j, torch2jax

    wait, rounds, wrong = cycles_of_a_millisecond() // 2, 250, []

    def late(x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(wait)
        return x * 2

    f = jax.jit(torch2jax(late))
    jax.block_until_ready(f(jnp.zeros(1024)))

    def race(thread: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(rounds):
                source = torch.zeros(1024, device="cuda")
                torch.cuda._sleep(wait)
                source += thread * rounds + i  # queued, not done, when JAX gets it
                result = j2t(f(t2j(source))) + 1  # queued before the call is done
                if not bool((result == 2 * (thread * rounds + i) + 1).all()):
                    wrong.append((thread, i))

    threads = [threading.Thread(target=race, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} wrong results, the first {wrong[:3]}"
    return {"racing streams": f"4 threads, {4 * rounds} calls, all results right"}


# -- memory ----------------------------------------------------------------------------------------


def flat_memory() -> Found:
    """10,000 steps with gradients: what both allocators hold, and the host."""
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
        torchs = torch.cuda.memory_allocated() if device() == "cuda" else 0
        host = pages * os.sysconf("SC_PAGE_SIZE")
        return {"torch": torchs, "jax": stats.get("bytes_in_use", 0), "host": host}

    def run(calls: int) -> None:
        for _ in range(calls):
            result = step(x)
        jax.block_until_ready(result)

    run(1_000)
    before = held()
    run(10_000)
    after = held()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["torch"] <= 2**20, grown
    assert grown["jax"] <= 2**20, grown
    assert grown["host"] <= 30 * 2**20, grown
    told = ", ".join(f"{name} {bytes_ / 2**20:+.2f} MiB" for name, bytes_ in grown.items())
    return {"memory over 10,000 steps": told}


# -- speed -----------------------------------------------------------------------------------------


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
    expected = float((net(x) ** 2).mean())
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


PARTS: dict[str, tuple[Callable[[], Found], ...]] = {
    "results": (dtypes, conversions, transforms, tape, randomness),
    "streams": (host_does_not_wait, racing),
    "memory": (flat_memory,),
    "speed": (training_step, calls),
}
NEED_A_GPU = {"streams"}
