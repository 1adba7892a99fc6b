"""Random operators of a graph draw from a key. This file imports torch, never JAX.

The words of the key are an operand. Each operator that draws gets a seed of its own from them and
from its place among those that draw, so a forward pass that is traced again draws the same numbers.
The numbers themselves come from Inductor's counter-based generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor

_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """Return a permutation of the integers of 32 bits in which every bit decides about each.

    Its form is that of the finaliser of MurmurHash3; products of its numbers fit int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x31848BAB) & _WORD
    return x ^ (x >> 14)


class Draws:
    """It draws for one trace from ``words``, those of a JAX key."""

    def __init__(self, words: Tensor) -> None:
        self._words = words
        self._drawn = 0

    def uniform(self, size: Sequence[int], device: Any, normal: bool = False) -> Tensor:
        """Return float32 in [0, 1), or standard normals, from the next seed."""
        # Inductor's generator reads 32 bits of a seed.
        words = self._words.reshape(-1).to(torch.int64) & _WORD
        self._drawn += 1
        seed = _mixed(words[0] ^ (0x9E3779B9 * self._drawn & _WORD))
        for i in range(1, words.shape[0]):
            seed = _mixed((seed + words[i]) & _WORD)
        mode = "randn" if normal else "rand"
        return torch.ops.prims.inductor_random(list(size), seed, mode)


def _made(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(dtype or torch.get_default_dtype())


def _rand(d: Draws, size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return _made(d.uniform(size, device), dtype)


def _randn(d: Draws, size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return _made(d.uniform(size, device, normal=True), dtype)


def _rand_like(d: Draws, x: Tensor, *, dtype: Any = None, **_: Any) -> Tensor:
    return d.uniform(x.shape, x.device).to(dtype or x.dtype)


def _randn_like(d: Draws, x: Tensor, *, dtype: Any = None, **_: Any) -> Tensor:
    return d.uniform(x.shape, x.device, normal=True).to(dtype or x.dtype)


def _integers(d: Draws, low: int, high: int, size: Any, dtype: Any, device: Any) -> Tensor:
    # float32 has 24 random bits, so two draws make an integer of 48.
    fine = d.uniform(size, device).double() * 2.0**-24 + d.uniform(size, device).double()
    drawn = (fine * (high - low)).floor().to(torch.int64).clamp(max=high - low - 1) + low
    return drawn.to(dtype or torch.int64)


def _randint(
    d: Draws, high: int, size: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(d, 0, high, size, dtype, device)


def _randint_low(
    d: Draws, low: int, high: int, size: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(d, low, high, size, dtype, device)


def _randint_like(d: Draws, x: Tensor, high: int, *, dtype: Any = None, **_: Any) -> Tensor:
    return _integers(d, 0, high, x.shape, dtype or x.dtype, x.device)


def _randint_like_low(
    d: Draws, x: Tensor, low: int, high: int, *, dtype: Any = None, **_: Any
) -> Tensor:
    return _integers(d, low, high, x.shape, dtype or x.dtype, x.device)


def _randperm(d: Draws, n: int, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return d.uniform((n,), device).argsort().to(dtype or torch.int64)


def _bernoulli(d: Draws, x: Tensor, **_: Any) -> Tensor:
    return (d.uniform(x.shape, x.device) < x).to(x.dtype)


def _bernoulli_p(d: Draws, x: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    return (d.uniform(x.shape, x.device) < p).to(x.dtype)


def _dropout(d: Draws, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = d.uniform(x.shape, x.device) >= p
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * kept * scale, kept


def _filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an in-place operator that fills its operand with what ``make`` draws."""

    def fill(d: Draws, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(make(d, x, *args, **kwargs))

    return fill


def _uniform(d: Draws, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return (d.uniform(x.shape, x.device) * (high - low) + low).to(x.dtype)


def _normal(d: Draws, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return (d.uniform(x.shape, x.device, normal=True) * std + mean).to(x.dtype)


def _normal_of(d: Draws, mean: Any, std: Any = 1.0, **_: Any) -> Tensor:
    shape = torch.broadcast_shapes(*(t.shape for t in (mean, std) if isinstance(t, Tensor)))
    tensor = mean if isinstance(mean, Tensor) else std
    drawn = d.uniform(shape, tensor.device, normal=True)
    return (drawn.to(tensor.dtype) * std + mean).to(tensor.dtype)


def _exponential_of(d: Draws, x: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    return (-torch.log1p(-d.uniform(x.shape, x.device)) / rate).to(x.dtype)


def _cauchy_of(d: Draws, x: Tensor, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Tensor:
    u = d.uniform(x.shape, x.device)
    return (median + sigma * torch.tan(math.pi * (u - 0.5))).to(x.dtype)


def _log_normal_of(d: Draws, x: Tensor, mean: float = 1.0, std: float = 2.0, **_: Any) -> Tensor:
    return (d.uniform(x.shape, x.device, normal=True) * std + mean).exp().to(x.dtype)


def _geometric_of(d: Draws, x: Tensor, p: float, **_: Any) -> Tensor:
    u = d.uniform(x.shape, x.device)
    return (torch.log1p(-u) / math.log1p(-p)).ceil().clamp(min=1).to(x.dtype)


def _multinomial(d: Draws, weights: Tensor, n: int, replacement: bool = False, **_: Any) -> Tensor:
    # An exponential divided by its rate: the smallest comes from each index with its probability
    # (Efraimidis, Spirakis: Weighted random sampling with a reservoir, 2006).
    if replacement:
        rows = weights.unsqueeze(-2).expand(*weights.shape[:-1], n, weights.shape[-1])
        waits = -torch.log1p(-d.uniform(rows.shape, weights.device)) / rows
        return waits.argmin(-1)
    waits = -torch.log1p(-d.uniform(weights.shape, weights.device)) / weights
    return waits.topk(n, largest=False).indices


_aten: Any = torch.ops.aten
DRAWS: dict[Any, Callable[..., Any]] = {
    _aten.rand.default: _rand,
    _aten.randn.default: _randn,
    _aten.rand_like.default: _rand_like,
    _aten.randn_like.default: _randn_like,
    _aten.randint.default: _randint,
    _aten.randint.low: _randint_low,
    _aten.randint_like.default: _randint_like,
    _aten.randint_like.low_dtype: _randint_like_low,
    _aten.randperm.default: _randperm,
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli.p: _bernoulli_p,
    _aten.bernoulli_.Tensor: lambda d, x, p, **_: x.copy_(_bernoulli(d, p.expand(x.shape))),
    _aten.bernoulli_.float: _filling(_bernoulli_p),
    _aten.native_dropout.default: _dropout,
    _aten.uniform_.default: _filling(_uniform),
    _aten.uniform.default: _uniform,
    _aten.normal_.default: _filling(_normal),
    _aten.normal_functional.default: _normal,
    _aten.normal.Tensor_float: _normal_of,
    _aten.normal.float_Tensor: _normal_of,
    _aten.normal.Tensor_Tensor: _normal_of,
    _aten.exponential_.default: _filling(_exponential_of),
    _aten.exponential.default: _exponential_of,
    _aten.cauchy_.default: _filling(_cauchy_of),
    _aten.cauchy.default: _cauchy_of,
    _aten.log_normal_.default: _filling(_log_normal_of),
    _aten.log_normal.default: _log_normal_of,
    _aten.geometric_.default: _filling(_geometric_of),
    _aten.geometric.default: _geometric_of,
    _aten.multinomial.default: _multinomial,
}
"""How each operator draws."""
