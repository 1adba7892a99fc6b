"""Random numbers are functions of a key's words and of what PyTorch's operator takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .binary import mul
from .promotion import array_dtype, cast, category, default_int, is_inexact, of_dtype, wide
from .registry import lowering


def _key(words: Any) -> Any:
    return jax.random.wrap_key_data(words)


def _uniform(words: Any, shape: Any, dtype: Any) -> Any:
    if category(dtype) == 3:  # both parts are uniform
        parts = jax.random.uniform(_key(words), (2, *shape), np.finfo(dtype).dtype)
        return jax.lax.complex(*parts)
    return cast(jax.random.uniform(_key(words), tuple(shape), wide(dtype)), dtype)


def _normal(words: Any, shape: Any, dtype: Any) -> Any:
    return cast(jax.random.normal(_key(words), tuple(shape), wide(dtype)), dtype)


@lowering("rand", "rand.generator", random=True)
def rand(words: Any, size: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _uniform(words, size, of_dtype(dtype))


@lowering("randn", "randn.generator", random=True)
def randn(words: Any, size: Any, *, dtype: Any = None, **_: Any) -> Any:
    dtype = of_dtype(dtype)
    if category(dtype) == 3:
        return jax.random.normal(_key(words), tuple(size), dtype)
    return _normal(words, size, dtype)


@lowering("rand_like", "rand_like.generator", random=True)
def rand_like(words: Any, self: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _uniform(words, self.shape, self.dtype if dtype is None else array_dtype(dtype))


@lowering("randn_like", "randn_like.generator", random=True)
def randn_like(words: Any, self: Any, *, dtype: Any = None, **_: Any) -> Any:
    if dtype is None and category(self.dtype) == 3:
        return jax.random.normal(_key(words), self.shape, self.dtype)
    return _normal(words, self.shape, self.dtype if dtype is None else array_dtype(dtype))


def _randint(words: Any, shape: Any, low: int, high: int, dtype: Any) -> Any:
    drawn = jax.random.randint(_key(words), tuple(shape), low, high, default_int())
    return drawn.astype(dtype)


@lowering("randint", "randint.generator", random=True)
def randint(words: Any, high: int, size: Any, *, dtype: Any = torch.int64, **_: Any) -> Any:
    return _randint(words, size, 0, high, array_dtype(dtype or torch.int64))


@lowering("randint.low", "randint.low_generator", random=True)
def randint_low(
    words: Any, low: int, high: int, size: Any, *, dtype: Any = torch.int64, **_: Any
) -> Any:
    return _randint(words, size, low, high, array_dtype(dtype or torch.int64))


@lowering(
    "randint_like",
    "randint_like.generator",
    "randint_like.Tensor",
    "randint_like.Tensor_generator",
    random=True,
)
def randint_like(words: Any, self: Any, high: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _randint(words, self.shape, 0, high, self.dtype if dtype is None else array_dtype(dtype))


@lowering("randint_like.low_dtype", "randint_like.low_generator_dtype", random=True)
def randint_like_low(
    words: Any, self: Any, low: int, high: int, *, dtype: Any = None, **_: Any
) -> Any:
    return _randint(
        words, self.shape, low, high, self.dtype if dtype is None else array_dtype(dtype)
    )


@lowering("randperm", "randperm.generator", random=True)
def randperm(words: Any, n: int, *, dtype: Any = torch.int64, **_: Any) -> Any:
    return jax.random.permutation(_key(words), n).astype(array_dtype(dtype or torch.int64))


@lowering("uniform", random=True, scalars=("from", "to"))
def uniform(words: Any, self: Any, from_: Any = 0.0, to: Any = 1.0, **named: Any) -> Any:
    low = named.get("from", from_)
    return cast(_uniform(words, self.shape, wide(self.dtype)) * (to - low) + low, self.dtype)


@lowering("normal_functional", random=True, scalars=("mean", "std"))
def normal(words: Any, self: Any, mean: float = 0, std: float = 1) -> Any:
    if category(self.dtype) == 3:
        return jax.random.normal(_key(words), self.shape, self.dtype) * std + mean
    return cast(_normal(words, self.shape, wide(self.dtype)) * std + mean, self.dtype)


@lowering("normal.Tensor_Tensor", "normal.Tensor_float", "normal.float_Tensor", random=True)
def normal_tensors(words: Any, mean: Any, std: Any = 1.0) -> Any:
    shape = jnp.broadcast_shapes(jnp.shape(mean), jnp.shape(std))
    dtype = mean.dtype if hasattr(mean, "dtype") else std.dtype
    return cast(_normal(words, shape, dtype) * std + mean, dtype)


@lowering("bernoulli", random=True)
def bernoulli(words: Any, self: Any) -> Any:
    drawn = jax.random.uniform(_key(words), self.shape, wide(self.dtype)) < self
    return drawn.astype(self.dtype)


@lowering("bernoulli.p", random=True, scalars=("p",))
def bernoulli_p(words: Any, self: Any, p: float = 0.5) -> Any:
    return (jax.random.uniform(_key(words), self.shape) < p).astype(self.dtype)


@lowering("bernoulli.Tensor", random=True)
def bernoulli_tensor(words: Any, self: Any, p: Any) -> Any:
    return (jax.random.uniform(_key(words), self.shape) < p).astype(self.dtype)


@lowering("native_dropout", random=True)
def native_dropout(words: Any, input: Any, p: float, train: bool | None) -> Any:
    if train is False or p == 0:
        return input, jnp.ones(input.shape, bool)
    if p == 1:
        return jnp.zeros_like(input), jnp.zeros(input.shape, bool)
    keep = jax.random.bernoulli(_key(words), 1 - p, input.shape)
    return jnp.where(keep, input * (1 / (1 - p)), 0).astype(input.dtype), keep


@lowering("native_dropout_backward")
def native_dropout_backward(grad_output: Any, mask: Any, scale: float) -> Any:
    # Integers times a fractional number are floating, as in PyTorch.
    product = mul(grad_output, mask)
    return mul(product, scale)


@lowering("exponential", random=True)
def exponential(words: Any, self: Any, lambd: float = 1) -> Any:
    return cast(
        jax.random.exponential(_key(words), self.shape, wide(self.dtype)) / lambd,
        self.dtype,
    )


@lowering("cauchy", random=True)
def cauchy(words: Any, self: Any, median: float = 0, sigma: float = 1) -> Any:
    drawn = jax.random.cauchy(_key(words), self.shape, wide(self.dtype))
    return cast(drawn * sigma + median, self.dtype)


@lowering("log_normal", random=True)
def log_normal(words: Any, self: Any, mean: float = 1, std: float = 2) -> Any:
    return cast(jnp.exp(_normal(words, self.shape, wide(self.dtype)) * std + mean), self.dtype)


@lowering("geometric", random=True)
def geometric(words: Any, self: Any, p: float) -> Any:
    return jax.random.geometric(_key(words), p, self.shape).astype(self.dtype)


@lowering("random", random=True)
def random(words: Any, self: Any) -> Any:
    if self.dtype == bool:
        return jax.random.bernoulli(_key(words), 0.5, self.shape)
    if category(self.dtype) == 3:
        raise NotImplementedError(f"random_ is not implemented for {self.dtype}")
    high = 2 ** (jnp.finfo(self.dtype).nmant + 1) if is_inexact(self) else jnp.iinfo(self.dtype).max
    return _randint(words, self.shape, 0, min(high, 2**31 - 1), self.dtype)


@lowering("random.from", "random.to", random=True)
def random_from(words: Any, self: Any, *bounds: Any) -> Any:
    low, high = (0, *bounds) if len(bounds) == 1 else bounds
    if high is None:
        high = int(np.iinfo(np.int32).max)
    return _randint(words, self.shape, low, high, self.dtype)


@lowering("poisson", random=True)
def poisson(words: Any, self: Any) -> Any:
    return jax.random.poisson(_key(words), self).astype(self.dtype)


@lowering("binomial", random=True)
def binomial(words: Any, count: Any, prob: Any) -> Any:
    dtype = wide(count.dtype)
    none, all_ = (count <= 0) | (prob <= 0), prob >= 1  # as in PyTorch, where JAX has NaN
    drawn = jax.random.binomial(_key(words), cast(count, dtype), cast(prob, dtype), dtype=dtype)
    return jnp.where(none, 0, jnp.where(all_, count, cast(drawn, count.dtype)))


@lowering("rrelu_with_noise", "rrelu_with_noise_functional", random=True)
def rrelu_with_noise(
    words: Any,
    self: Any,
    noise: Any,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
) -> Any:
    if not training:
        return jnp.where(self > 0, self, self * ((lower + upper) / 2)).astype(self.dtype), noise
    drawn = _uniform(words, self.shape, self.dtype) * (upper - lower) + lower
    slope = jnp.where(self > 0, 1, drawn).astype(noise.dtype)
    return (self * slope).astype(self.dtype), slope


@lowering("_standard_gamma", random=True)
def standard_gamma(words: Any, self: Any) -> Any:
    return cast(jax.random.gamma(_key(words), cast(self, wide(self.dtype))), self.dtype)


@lowering("_sample_dirichlet", random=True)
def sample_dirichlet(words: Any, self: Any) -> Any:
    return jax.random.dirichlet(_key(words), self)


@lowering("multinomial", random=True)
def multinomial(words: Any, self: Any, num_samples: int, replacement: bool = False) -> Any:
    logits = jnp.log(self)
    if replacement:
        drawn = jax.random.categorical(
            _key(words), logits, axis=-1, shape=(num_samples, *self.shape[:-1])
        )
        return jnp.moveaxis(drawn, 0, -1).astype(default_int())
    # The largest perturbed logits are a sample without replacement.
    noise = jax.random.gumbel(_key(words), self.shape, wide(self.dtype))
    return jax.lax.top_k(logits + noise, num_samples)[1].astype(default_int())
