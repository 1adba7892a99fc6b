"""What ``seams.py`` measures, for the torchax of this interpreter or for ours; prints JSON.

    python benchmarks/subjects/torchax_seams.py torch2jax 200 15

Programs for torchax run in both. Microseconds of the calling thread's own time, the least of
several means: XLA computes in other threads, and waiting for it is no part of a seam.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch


def least(call: Callable[[], Any], calls: int, rounds: int) -> float:
    means = []
    for _ in range(3):
        call()
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            call()
        means.append((time.thread_time() - start) / calls * 1e6)
    return min(means)


class Chain(torch.nn.Module):
    """Twenty small layers, which have 40 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(20)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


WIDTH, HEADS, LENGTH, VOCABULARY = 32, 4, 16, 64


class Block(torch.nn.Module):
    """A block of a Llama, with a cache of keys and values of a fixed length."""

    def __init__(self) -> None:
        super().__init__()
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)  # noqa: E731
        self.q, self.k, self.v, self.o = (linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = (linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = linear(2 * WIDTH, WIDTH)
        self.before, self.between = torch.nn.RMSNorm(WIDTH), torch.nn.RMSNorm(WIDTH)

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.before(x)
        q, k, v = (f(y).view(1, HEADS, -1) for f in (self.q, self.k, self.v))
        keys, values = keys.index_copy(0, place, k), values.index_copy(0, place, v)
        scores = torch.einsum("qhd,khd->hqk", q, keys) / (WIDTH // HEADS) ** 0.5
        seen = torch.arange(LENGTH, device=x.device) <= place
        weights = torch.where(seen, scores, float("-inf")).softmax(-1)
        x = x + self.o(torch.einsum("hqk,khd->qhd", weights, values).reshape(1, WIDTH))
        y = self.between(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y)), keys, values


class Llama(torch.nn.Module):
    """Four blocks of nine parameters, and four more."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(4)])
        self.norm = torch.nn.RMSNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, token: torch.Tensor, place: torch.Tensor, caches: Any) -> Any:
        x, new = self.tokens(token), []
        for block, (keys, values) in zip(self.blocks, caches):  # noqa: B905
            x, keys, values = block(x, keys, values, place)
            new.append((keys, values))
        return self.head(self.norm(x)).argmax(-1), new


def main() -> None:
    which, calls, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if which == "torch2jax":
        importlib.import_module("torch2jax.torchax").install()
    torchax: Any = importlib.import_module("torchax")
    interop: Any = importlib.import_module("torchax.interop")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arrays = {f"k{i}": jnp.ones((2, 2)) for i in range(100)}
    tensors = interop.torch_view(arrays)
    with torchax.default_env():
        chain, llama = Chain().to("jax"), Llama().to("jax")
        x = torch.ones(2, 4, device="jax")
        params, weights = dict(chain.named_parameters()), dict(llama.named_parameters())
        assert len(params) == len(weights) == 40
        module = interop.JittableModule(chain)
        call = interop.jax_jit(lambda p, x: torch.func.functional_call(chain, p, (x,)))
        step = interop.jax_jit(
            lambda w, token, place, caches: torch.func.functional_call(
                llama, w, (token, place, caches)
            ),
            {"donate_argnums": (3,)},
        )
        row = (LENGTH, HEADS, WIDTH // HEADS)
        state: Any = [
            torch.zeros(1, dtype=torch.int32, device="jax"),
            [tuple(torch.zeros(row, device="jax") for _ in range(2)) for _ in range(4)],
        ]
        place = torch.ones(1, dtype=torch.int32, device="jax")
        sine = jax.jit(jnp.sin)

        def served() -> None:
            state[:] = step(weights, state[0], place, state[1])

        found = {
            "jax_view of a dict of 100": lambda: interop.jax_view(tensors),
            "torch_view of a dict of 100": lambda: interop.torch_view(arrays),
            "JittableModule, 40 parameters": lambda: module(x),
            "jax_jit(functional_call), 40 parameters": lambda: call(params, x),
            "call_jax": lambda: interop.call_jax(sine, x),
            "a served Llama step, 40 parameters": served,
        }
        us = {name: least(fn, calls, rounds) for name, fn in found.items()}
    names = {"torch2jax": "torch2jax-ffi", "torchax": "torchax"}
    try:
        version = importlib.metadata.version(names[which])
    except importlib.metadata.PackageNotFoundError:
        version = getattr(torchax, "__version__", "from a work tree")
    versions = {which: version, "jax": jax.__version__, "torch": str(torch.__version__)}
    print(json.dumps({"versions": versions, "us": us}))


if __name__ == "__main__":
    main()
