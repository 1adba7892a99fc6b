"""What ``reverse.py`` compares, and a process that times it.

Nothing here imports torch2jax or a peer before it is asked to: each interpreter holds its own. As a
program it reads one JSON request a line and answers in one:

{"do": "versions"}                                                  -> {"jax": ..., "torch": ...}
{"do": "prepare", "subject": ..., "case": ..., "n": ..., "calls": ...}  -> {} or {"skip": reason}
{"do": "sample", "subject": ..., "case": ..., "n": ..., "calls": ...}   -> {"us": ... a call}
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

CASES = ("no_grad", "graph", "forward and backward")
Thunk = Callable[[], Any]


def f(x: Any, w: Any) -> Any:
    return jnp.tanh(x * w)


_jitted = jax.jit(f)
_forward = jax.jit(lambda x, w: jax.vjp(f, x, w))
_backward = jax.jit(lambda pull, c: pull(c))
_recomputed = jax.jit(lambda x, w, c: jax.vjp(f, x, w)[1](c))


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> Any:
        return ctx.saved_tensors


class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_dlpack(_jitted(*map(jax.dlpack.from_dlpack, (x.detach(), w.detach()))))

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> Any:
        arrays = map(jax.dlpack.from_dlpack, (*(t.detach() for t in ctx.saved_tensors), c))
        return tuple(map(torch.from_dlpack, _recomputed(*arrays)))


# --- subjects: their thunk for a case, on arguments of n x n -------------------------------------


def jax_alone(case: str, n: int) -> Thunk:
    x, w, c = (jnp.asarray(t.detach().numpy()) for t in arguments(n))

    def both() -> Any:
        y, pull = _forward(x, w)
        y.block_until_ready()
        return jax.block_until_ready(_backward(pull, c))

    return {
        "no_grad": lambda: _jitted(x, w).block_until_ready(),
        "graph": lambda: jax.block_until_ready(_forward(x, w)[0]),
        "forward and backward": both,
    }[case]


def of_torch(case: str, n: int, make: Callable[[], Callable[..., Any]]) -> Thunk:
    """A function of tensors; on a CPU its results are computed when it returns."""
    return thunk(case, make(), *arguments(n))


def torchax(case: str, n: int) -> Thunk:
    """On tensors of torchax's own type, which a program for other tensors has to make first."""
    import torchax as peer  # type: ignore[import-not-found]
    from torchax.interop import j2t_autograd, torch_view  # type: ignore[import-not-found]

    environment = peer.default_env()
    with environment:
        x, w, c = (t.detach().to("jax") for t in arguments(n))
        x.requires_grad_(), w.requires_grad_()
    g = torch_view(_jitted) if case == "no_grad" else j2t_autograd(_jitted)
    call = thunk(case, g, x, w, c)

    def awaited() -> Any:
        with environment:
            result = call()
        for tensor in result if isinstance(result, tuple) else (result,):
            tensor.jax().block_until_ready()

    return awaited


def arguments(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two that ask for gradients, and a cotangent."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, n, generator=generator, requires_grad=True) for _ in range(2))
    return x, w, torch.ones(n, n)


def thunk(case: str, g: Callable[..., Any], x: Any, w: Any, c: Any) -> Thunk:
    def no_grad() -> Any:
        with torch.no_grad():
            return g(x, w)

    return {
        "no_grad": no_grad,
        "graph": lambda: g(x, w),
        "forward and backward": lambda: torch.autograd.grad(g(x, w), (x, w), c),
    }[case]


def raw() -> Callable[..., Any]:
    """The parts that no bridge of this kind can leave out, by hand, without a check or a cache."""
    from jax._src.lib import _jax as xla

    cpu = jax.local_devices(backend="cpu")[0]
    emit = jax.jit(lambda x, w: (y := f(x, w), 1 - y))
    pull = jax.jit(lambda x, w, y, r, c: ((d := c * r * (1 + y)) * w, d * x))

    def array(t: torch.Tensor) -> Any:
        return xla.dlpack_managed_tensor_to_buffer(torch._C._to_dlpack(t), cpu, None)

    def tensor(a: Any) -> torch.Tensor:
        return torch._C._from_dlpack(xla.buffer_to_dlpack_managed_tensor(a))

    class Raw(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ax, aw = array(x), array(w)
            y, r = emit(ax, aw)
            out = tensor(y)
            ctx.save_for_backward(x, w, out)
            ctx.held = ax, aw, y, r
            return out

        @staticmethod
        def backward(ctx: Any, c: torch.Tensor) -> Any:
            assert len(ctx.saved_tensors) == 3  # checks their versions
            gx, gw = pull(*ctx.held, array(c))
            del ctx.held
            return tensor(gx), tensor(gw)

    # Without the part of Function.apply that torch.func needs.
    apply: Any = super(torch.autograd.Function, Raw).apply  # type: ignore[misc]

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return apply(x, w) if torch.is_grad_enabled() else tensor(_jitted(array(x), array(w)))

    return call


def ours() -> Callable[..., Any]:
    from torch2jax import jax2torch

    return jax2torch(f)


def jax2torch_package() -> Callable[..., Any]:
    from jax2torch import jax2torch  # type: ignore[import-not-found]

    return jax2torch(_jitted)


SUBJECTS: dict[str, Callable[[str, int], Thunk]] = {
    "JAX": jax_alone,
    "PyTorch": functools.partial(of_torch, make=lambda: lambda x, w: torch.tanh(x * w)),
    "empty": functools.partial(of_torch, make=lambda: Empty.apply),
    "raw parts": functools.partial(of_torch, make=raw),
    "ours": functools.partial(of_torch, make=ours),
    "recompute": functools.partial(of_torch, make=lambda: Recompute.apply),
    "jax2torch package": functools.partial(of_torch, make=jax2torch_package),
    "torchax": torchax,
}
PEERS = ("jax2torch package", "torchax")


# --- the process ---------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "torch", "jax2torch", "torchax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Timer:
    def __init__(self) -> None:
        self._ready: dict[tuple[str, str, int], Thunk] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "versions":
            return versions()
        key = request["subject"], request["case"], request["n"]
        if request["do"] == "prepare":
            try:
                call = SUBJECTS[key[0]](*key[1:])
                for _ in range(20):
                    call()
            except Exception as error:  # a peer that does not run here is told of, not hidden
                return {"skip": f"{type(error).__name__}: {error}"}
            self._ready[key] = call
            return {}
        call, calls = self._ready[key], request["calls"]
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return {"us": (time.perf_counter() - begin) / calls * 1e6}


def main() -> None:
    # Libraries print: only answers go to the real standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # of what the peers call
    torch.set_num_threads(1)
    timer = Timer()
    for line in sys.stdin:
        print(json.dumps(timer.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
