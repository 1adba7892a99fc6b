"""The host waits for nothing, and the streams of PyTorch and XLA are ordered all the same.

A rehearsal on a CPU runs the same code; there every call has ended when it returns.
"""

from __future__ import annotations

import threading
import time

from .common import Found, busy, device, new_stream, on_gpu, prepare, synchronize


def host_does_not_wait() -> Found:
    """Ten calls in one program, each 50 ms of the GPU: the host is through long before the GPU."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    prepare()
    entered: list[float] = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        entered.append(time.perf_counter())
        busy(50)
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
    if on_gpu():
        assert whole > 0.4, f"the GPU waited {whole:.3f} s in all, not 0.5 s"
        assert host < 0.5 * whole, f"the last call was made after {host:.3f} s of {whole:.3f} s"
    told = f"the last of ten calls of 50 ms was queued after {host * 1e3:.1f} ms; "
    return {"host": f"{told}their results were there after {whole * 1e3:.0f} ms"}


def gradients_do_not_wait() -> Found:
    """Ten steps of value_and_grad, called while the GPU is busy with something else."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import tape_info, torch2jax

    prepare()
    entered: list[float] = []

    def fn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        entered.append(time.perf_counter())
        return torch.tanh(x @ w).sum()

    step = jax.jit(jax.value_and_grad(torch2jax(fn)))
    w, x = jnp.ones((64, 64)) / 64, jnp.ones((64, 64))
    expected = jax.block_until_ready(step(w, x))
    before = tape_info()
    entered.clear()
    begin = time.perf_counter()
    busy(500)
    results = [step(w, x) for _ in range(10)]
    called = time.perf_counter() - begin
    jax.block_until_ready(results)
    whole, host = time.perf_counter() - begin, entered[-1] - begin
    after = tape_info()
    for result in results:
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            assert jnp.allclose(a, b, rtol=1e-5)
    assert (after.hits - before.hits, after.misses - before.misses) == (10, 0)
    if on_gpu():
        assert whole > 0.4, f"the GPU was busy for {whole:.3f} s, not for 0.5 s"
        assert host < 0.6 * whole, f"the last step ran in Python after {host:.3f} of {whole:.3f} s"
    told = f"called after {called * 1e3:.1f} ms, in Python after {host * 1e3:.1f} ms, "
    return {"ten steps with gradients": f"{told}ready after {whole * 1e3:.0f} ms of a busy device"}


def late_weights() -> Found:
    """A closed-over weight is written late by another stream, and again right after the call."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import torch2jax

    prepare()
    weight = torch.zeros(1 << 16, device=device())

    def fn(x: torch.Tensor) -> torch.Tensor:
        busy(1)
        return x * weight

    f = jax.jit(torch2jax(fn))
    x = jnp.ones(1 << 16)
    jax.block_until_ready(f(x))
    rounds = 100 if on_gpu() else 3
    for i in range(rounds):
        with new_stream() as stream:
            busy(1)
            weight.fill_(float(i))  # queued, not done
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        y = f(x)
        weight.fill_(-1.0)  # queued right after the call, which has not read it yet
        synchronize()
        assert bool((y == i).all()), f"round {i}: the call saw {float(y[0])}"
    told = f"{rounds} calls saw what was written before them, and nothing that was written after"
    return {"weights written around a call": told}


def racing() -> Found:
    """Late writers and early readers on streams of their own, from four threads."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import j2t, t2j, torch2jax

    prepare()
    rounds, wrong = 250 if on_gpu() else 5, []

    def late(x: torch.Tensor) -> torch.Tensor:
        busy(0.5)
        return x * 2

    f = jax.jit(torch2jax(late))
    jax.block_until_ready(f(jnp.zeros(1024)))

    def race(thread: int) -> None:
        with new_stream():
            for i in range(rounds):
                source = torch.zeros(1024, device=device())
                busy(0.5)
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
