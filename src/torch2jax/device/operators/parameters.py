"""Parameters of distributions are refused as PyTorch refuses them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jax.core import Tracer

from ..tensors.tensor import Tensor, known

__all__ = ["refuse_parameters"]


def refuse_parameters(func: Any, args: Any, kwargs: Any) -> None:
    """Raise PyTorch's error where an operator that draws gets parameters that it refuses.

    Values of tensors are looked at where they are known.
    """
    rule = _RULES.get(func._opname)
    if rule is not None:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        defaults = {
            a.name: a.default_value for a in func._schema.arguments if a.has_default_value()
        }
        rule({**defaults, **given, **kwargs})


def _normal(p: Any) -> None:
    std = p.get("std")
    if _is_number(std) and std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    values = _values(std)
    if values is not None and (values < 0).any():
        raise RuntimeError("normal expects all elements of std >= 0.0")


def _uniform(p: Any) -> None:
    low, high = p.get("from"), p.get("to")
    if _is_number(low) and _is_number(high) and low > high:
        raise RuntimeError(
            f"uniform_ expects to return a [from, to) range, but found from={low} > to={high}"
        )


def _bernoulli(p: Any) -> None:
    probability = p.get("p", p["self"])
    if _is_number(probability) and not 0 <= probability <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={probability}")
    values = _values(probability)
    if values is not None and not ((values >= 0) & (values <= 1)).all():
        raise RuntimeError("Expected p_in >= 0 && p_in <= 1 to be true, but got false.")


def _random(p: Any) -> None:
    low, high = p.get("from", p.get("low", 0)), p.get("to", p.get("high"))
    asked, like = p.get("dtype"), p.get("self")
    dtype = like.dtype if type(like) is Tensor and asked is None else asked
    last = high - 1 if _is_number(high) else None
    ends: list[tuple[str, Any]] = [
        (name, x) for name, x in (("from", low), ("to - 1", last)) if _is_number(x)
    ]
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        least, most = (0, 1) if dtype is torch.bool else _range(dtype)
        for name, x in ends:
            if not least <= x <= most:
                raise RuntimeError(f"{name} is out of bounds for {dtype}")
    elif isinstance(dtype, torch.dtype) and dtype in _DIGITS:
        for name, x in ends:
            if abs(x) > 2 ** _DIGITS[dtype]:
                warnings.warn(
                    f"{name} is out of bounds [-(2^{_DIGITS[dtype]}), 2^{_DIGITS[dtype]}]. Due to "
                    f"precision limitations {dtype} can support discrete uniform distribution "
                    "only within this range.",
                    UserWarning,
                    stacklevel=2,
                )
    if _is_number(low) and _is_number(high) and low >= high:
        raise RuntimeError(
            f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}"
        )


_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Between these powers of two a dtype has all integers."""


def _multinomial(p: Any) -> None:
    weights = p["self"]
    if p["num_samples"] <= 0:
        raise RuntimeError("cannot sample n_sample <= 0 samples")
    values = _values(weights)
    if values is None:
        return
    host = values.astype(np.float64)
    if not np.isfinite(host).all() or (host < 0).any():
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    if (host.sum(-1) <= 0).any():
        raise RuntimeError("invalid multinomial distribution (sum of probabilities <= 0)")


def _range(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def _poisson(p: Any) -> None:
    rates = _values(p["self"])
    if rates is not None and (rates < 0).any():
        raise RuntimeError("invalid Poisson rate, expected rate to be non-negative")


def _values(x: Any) -> Any:
    """Return the values of a tensor where they are known, or None."""
    values = known(x) if type(x) is Tensor else None
    if values is None or isinstance(values, Tracer) or not values.size:
        return None
    return np.asarray(values)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float)


_RULES: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(("normal", "normal_", "normal_functional"), _normal),
    **dict.fromkeys(("uniform", "uniform_"), _uniform),
    **dict.fromkeys(("bernoulli", "bernoulli_"), _bernoulli),
    **dict.fromkeys(("random", "random_"), _random),
    **dict.fromkeys(("randint", "randint_like"), _random),
    "multinomial": _multinomial,
    "poisson": _poisson,
}
