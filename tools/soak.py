"""Long runs: memory stays flat, and nothing hangs. Prints figures; exits with 1 where one is bad.

python tools/soak.py                 # at full size, 10 to 20 minutes
python tools/soak.py --scale 0.02    # a fiftieth
python tools/soak.py --only calls hangs
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.utils.checkpoint as checkpoints
from jax.sharding import AxisType

from torch2jax import Size, device, from_module, jax2torch, tape_info, torch2jax

Step = Callable[[int], Any]

LIMIT = 16.0
"""MiB by which memory may grow: allocators keep some."""
WATCHDOG = 120
"""Seconds without progress after which every thread's stack is printed and the process ended."""

bad: list[str] = []


def resident() -> float:
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(name: str, count: int, step: Step, warm: int, limit: float = LIMIT) -> None:
    """Run ``step`` and print resident memory before and after, once it is warm."""
    start = time.monotonic()
    for i in range(warm):
        step(i)
    before = resident()
    for i in range(count):
        if i % 100 == 0:
            faulthandler.dump_traceback_later(WATCHDOG, exit=True)
        step(warm + i)
    faulthandler.cancel_dump_traceback_later()
    after = resident()
    report(
        f"{name:28s} {count:7d} times  {before:7.1f} -> {after:7.1f} MiB ({after - before:+6.1f})"
        f"  tape {tape_info().entries}  {time.monotonic() - start:6.1f} s",
        after - before < limit and tape_info().entries == 0,
    )


def report(line: str, good: bool) -> None:
    print(line, "" if good else "  BAD", flush=True)
    if not good:
        bad.append(line)


def ready(x: Any) -> None:
    jax.block_until_ready(x)


# --- lifetimes -----------------------------------------------------------------------------------

X = jnp.linspace(0.1, 0.9, 64)


def calls(scale: float) -> None:
    f = torch2jax(lambda a, b: a * b + 1)
    g = jax.jit(jax.grad(lambda a: f(a, a).sum()))
    count = int(100_000 * scale)
    measure("eager calls", count, lambda i: ready(f(X, X)), count // 20)
    measure("gradients", count, lambda i: ready(g(X)), count // 20)

    h = jax2torch(lambda x, w: jnp.tanh(x * w))
    weight = torch.ones(64, requires_grad=True)

    def both(_: int) -> None:
        x = torch.ones(64, requires_grad=True)  # a leaf of its own each time
        y = h(x, weight)
        torch.autograd.grad(y, (x, weight), y)

    measure("jax2torch", count, both, count // 20)


def operators(scale: float) -> None:
    """Of device "jax" in eager mode: numbers, views, writes, lists, gradients, and an error."""
    device.enable()
    x = torch.linspace(0.1, 0.9, 16).to("jax")
    weight = torch.ones(4, 4).to("jax").requires_grad_()

    def step(_: int) -> None:
        y = x * 2.5 + x
        y[3].add_(1.0)
        torch._foreach_add_([y], [x])
        parts = y.view(4, 4).split([1, 3], 1)
        torch.autograd.grad(((y.view(4, 4) @ weight).relu().sum() + parts[0].sum()), weight)
        with contextlib.suppress(RuntimeError):
            y + parts[1]

    measure("operators of device jax", int(20_000 * scale), step, 200)


class HoldsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * ctx.saved_tensors[0]


def transforms(scale: float) -> None:
    f = torch2jax(lambda x: x.sin() * x)
    loss: Any = lambda x: f(x).sum()  # noqa: E731
    one = torch2jax(lambda x: (x.sin() * x).sum(), depth=1)
    recompute = torch2jax(lambda x: (x.sin() * x).sum(), residuals="recompute")
    dropout = torch2jax(torch.nn.functional.dropout, stochastic=True)
    draws = torch2jax(lambda x: torch.nn.functional.dropout(x) * x)
    update = torch2jax(lambda c, x: c.add_(x), inplace_argnums=0)
    checkpoint = torch2jax(lambda x: checkpoints.checkpoint(torch.sin, x, use_reentrant=False))
    held = torch2jax(HoldsInput.apply)
    func = torch2jax(lambda x: x * torch.func.grad(lambda t: t.sin().sum())(x))
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    apply, variables = from_module(module)
    key = jax.random.key(0)
    rows = X.reshape(8, 8)

    def train(params: Any) -> Any:
        return apply({**variables, "params": params}, rows, train=True, rng=key)[0].sum()

    def scan(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0].sum()

    def total(f: Any) -> Any:
        return lambda x: f(x).sum()

    programs: dict[str, tuple[Any, Any]] = {
        "jit": (f, X),
        "grad": (jax.grad(loss), X),
        "vjp unused": (lambda x: jax.vjp(f, x)[0], X),
        "vmap": (jax.vmap(f), rows),
        "vmap(grad)": (jax.vmap(jax.grad(loss)), rows),
        "jacrev": (jax.jacrev(f), X),
        "jacfwd": (jax.jacfwd(f), X),
        "jvp": (lambda x: jax.jvp(f, (x,), (x,)), X),
        "linearize": (lambda x: jax.linearize(f, x)[1](x), X),
        "hessian": (jax.hessian(loss), X),
        "checkpoint": (jax.grad(jax.checkpoint(loss)), X),
        "scan": (jax.grad(scan), X),
        "depth=1": (jax.grad(one), X),
        "residuals=recompute": (jax.grad(recompute), X),
        "stochastic": (jax.grad(lambda x: dropout(x, rng=key).sum()), X),
        "draws without a key": (jax.grad(total(draws)), X),
        "inplace_argnums": (lambda x: update(x, x), X),
        "from_module(train=True)": (jax.grad(train), variables["params"]),
        "torch checkpoint": (jax.grad(total(checkpoint)), X),
        "held input": (jax.grad(total(held)), X),
        "torch.func inside": (jax.grad(total(func)), X),
    }
    count = int(5000 * scale)
    for name, (program, argument) in programs.items():
        program = jax.jit(program)
        measure(name, count, lambda i, p=program, a=argument: ready(p(a)), count // 4)
    measure("grad, eager", count, lambda i: ready(jax.grad(loss)(X)), count // 4)


def wraps(scale: float) -> None:
    def step(i: int) -> None:
        f = torch2jax(lambda a: a * 2 + 1)
        if i % 10 == 0:  # the others are wrapped only: compiling takes 10 ms
            ready(jax.jit(jax.grad(lambda a: f(a).sum()))(X))
        if i % 250 == 0:
            jax.clear_caches()

    count = int(10_000 * scale)
    # JAX itself keeps something of each program; the same with plain JAX stands beside.
    measure("wraps", count, step, count // 4, 64)


def shapes(scale: float) -> None:
    count = int(1000 * scale)

    def step(function: Any) -> Step:
        def call(i: int) -> None:
            ready(function(np.ones(i + 1, np.float32)))
            if i % 100 == 0:
                jax.clear_caches()

        return call

    measure("shapes", count, step(torch2jax(lambda a: a * 2 + 1)), count // 4, 64)
    measure("shapes, plain jax.jit", count, step(jax.jit(lambda a: a * 2 + 1)), count // 4, 64)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")


def exceptions(scale: float) -> None:
    big = jnp.ones(1 << 17)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        raise ValueError("no", y.shape)

    f = torch2jax(forward, output_shapes=Size(big.shape))
    g = torch2jax(lambda x: Fails.apply(x * 2))
    backward = jax.jit(jax.grad(lambda x: g(x).sum()))

    def raises(call: Any) -> Step:
        def step(i: int) -> None:
            try:
                ready(call(big))
            except (RuntimeError, ValueError):
                return
            raise AssertionError("no exception")

        return step

    count = int(1000 * scale)
    measure("exceptions in forward", count, raises(f), count // 4)
    measure("exceptions in backward", count, raises(backward), count // 4)


# --- no hangs ------------------------------------------------------------------------------------


def rounds(name: str, count: int, body: Callable[[], None]) -> None:
    """Run ``body``; a round that takes longer than the watchdog ends the process."""
    start, longest = time.monotonic(), 0.0
    for _ in range(count):
        faulthandler.dump_traceback_later(WATCHDOG, exit=True)
        begun = time.monotonic()
        body()
        longest = max(longest, time.monotonic() - begun)
    faulthandler.cancel_dump_traceback_later()
    taken = time.monotonic() - start
    report(f"{name:28s} {count:7d} rounds, longest {longest:.2f} s, {taken:.1f} s in all", True)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def hangs(scale: float) -> None:
    count = max(int(100 * scale), 1)
    f = torch2jax(lambda a: a * 2 + 1)
    g = jax.jit(jax.grad(lambda a: (f(a) ** 2).sum()))
    big = jnp.ones((1500, 1500))

    def queued() -> None:
        """Calls behind large operations, dispatched without waiting."""
        y = big
        for _ in range(8):
            y = f(y @ big / 3000)
        z = [g(y + k) for k in range(4)]
        ready((y, z))

    small = jnp.ones((300, 300)) / 300
    mixed = jax.jit(lambda a: f(a @ a) + f(a @ (a + 1)))

    def threads() -> None:
        expected = np.asarray(2 * (small @ small) + 2 * (small @ (small + 1)) + 2)

        def work(i: int) -> None:
            for _ in range(5):
                np.testing.assert_allclose(mixed(small), expected, rtol=1e-4)
                ready(g(small))

        in_threads(6, work)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = jax.P("x")

    def local(a: Any) -> Any:
        return f(a) + jax.lax.psum(f(a).sum(), "x")

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    gradient = jax.jit(jax.grad(lambda a: sharded(a).sum()))
    rows = jnp.ones((64, 64))

    def shards() -> None:
        """On eight devices, while the main thread dispatches too."""
        thread = threading.Thread(target=lambda: [ready(f(small)) for _ in range(10)])
        thread.start()
        y = [sharded(rows) for _ in range(3)]
        z = gradient(rows)
        w = [f(small) for _ in range(10)]
        np.testing.assert_allclose(y[-1], np.full((64, 64), 3 + 3 * 64 * 64))
        ready((y, z, w))
        thread.join()

    def collector() -> None:
        """The garbage collector runs in one thread, calls in others."""
        in_threads(4, lambda i: gc.collect() if i == 0 else ready([g(small) for _ in range(5)]))

    rounds("big inputs, queued", count, queued)
    rounds("calls from six threads", count, threads)
    rounds("shard_map on 8 devices", count, shards)
    rounds("collections meanwhile", count, collector)


SECTIONS = [calls, operators, transforms, wraps, shapes, exceptions, hangs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the full size")
    parser.add_argument("--only", nargs="*", choices=[s.__name__ for s in SECTIONS])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for section in SECTIONS:
        if not arguments.only or section.__name__ in arguments.only:
            section(arguments.scale)
    if bad:
        sys.exit("\n".join(["too much:", *bad]))


if __name__ == "__main__":
    main()
