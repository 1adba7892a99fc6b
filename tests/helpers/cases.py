"""One table of functions, each written twice: in torch, and in jax.numpy as its twin.

The tests put every case through every JAX transform twice, once through the bridge and once through
the twin, and compare. An expected value therefore never comes from the bridge.

Arguments are drawn from generators seeded by the case's name. "float" means float32, or float64
with x64 on; "complex" and "int" likewise.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import lax
from jax.scipy.linalg import solve_triangular


@dataclass(frozen=True)
class Array:
    """One array argument: shape, how its values are drawn, dtype, whether it is differentiated."""

    shape: tuple[int, ...]
    draw: str = "normal"
    dtype: str = "float"
    diff: bool = True
    high: int = 0

    def make(self, rng: np.random.Generator, x64: bool) -> np.ndarray:
        """Values of this argument, in the precision asked for."""
        values = getattr(self, f"_{self.draw}")(rng)
        wide = {"float": np.float64, "complex": np.complex128, "int": np.int64}
        narrow = {"float": np.float32, "complex": np.complex64, "int": np.int32}
        dtype = (wide if x64 else narrow).get(self.dtype, None) or jnp.dtype(self.dtype)
        return np.asarray(values).astype(dtype)

    def _normal(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal(self.shape)

    def _complex(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal(self.shape) + 1j * rng.standard_normal(self.shape)

    def _positive(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(0.5, 1.5, self.shape)

    def _distinct(self, rng: np.random.Generator) -> np.ndarray:
        """Values 0.1 apart from each other, 0.05 from multiples of 0.25: no kinks, no ties."""
        size = int(np.prod(self.shape))
        steps = rng.permutation(size) - size // 2
        return (0.25 * steps + 0.125 + rng.uniform(-0.07, 0.07, size)).reshape(self.shape)

    def _int(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.high, self.shape)

    def _signed(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(-9, 10, self.shape)

    def _bool(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 2, self.shape) > 0


def f(*shape: int, **kw: Any) -> Array:
    return Array(shape, **kw)


def positive(*shape: int) -> Array:
    return Array(shape, "positive")


def distinct(*shape: int) -> Array:
    return Array(shape, "distinct")


def c(*shape: int) -> Array:
    return Array(shape, "complex", "complex")


def ints(high: int, *shape: int) -> Array:
    return Array(shape, "int", "int", diff=False, high=high)


def signed(*shape: int, dtype: str = "int") -> Array:
    return Array(shape, "signed", dtype, diff=False)


def bools(*shape: int) -> Array:
    return Array(shape, "bool", "bool", diff=False)


@dataclass(frozen=True, eq=False)
class Case:
    """A torch function, its jax.numpy twin and what can be asked of them."""

    name: str
    torch_fn: Callable[..., Any]
    twin: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    order: int = 3  # how often torch can differentiate it
    forward: bool = True  # forward mode works: torch has it, or can get it from two reverse passes
    vectorizable: bool = (
        True  # torch.func.vmap can run it; where not, the bridge loops, with a warning
    )
    linear: bool = False  # linear in its differentiable arguments
    core: bool = (
        False  # goes through every transform and composition; the others through the basic ones
    )
    rtol: float = 1.0  # multiplies the default tolerance

    def __str__(self) -> str:
        return self.name

    def draw(self, x64: bool, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments, the same for the same seed."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed])
        is_spec = lambda leaf: isinstance(leaf, Array)  # noqa: E731
        return jax.tree.map(
            lambda spec: spec.make(rng, x64), (self.args, self.kwargs), is_leaf=is_spec
        )

    @functools.cached_property
    def specs(self) -> list[Array]:
        """What each leaf of (arguments, keyword arguments) is."""
        return jax.tree.leaves(
            (self.args, self.kwargs), is_leaf=lambda leaf: isinstance(leaf, Array)
        )

    @property
    def differentiable(self) -> bool:
        return any(spec.diff for spec in self.specs)

    @property
    def is_complex(self) -> bool:
        """A complex number goes in at an argument that is differentiated."""
        return any(spec.diff and spec.dtype.startswith("complex") for spec in self.specs)

    @property
    def size(self) -> int:
        """Elements in all differentiable arguments."""
        return sum(int(np.prod(spec.shape)) for spec in self.specs if spec.diff)


CASES: list[Case] = []


def case(
    name: str, torch_fn: Callable[..., Any], twin: Callable[..., Any], *args: Any, **options: Any
) -> None:
    CASES.append(Case(name, torch_fn, twin, args, **options))


# -------------------------------------------------------------------------------------- elementwise

case(
    "sin_mul",
    lambda x, y: torch.sin(x) * y + x,
    lambda x, y: jnp.sin(x) * y + x,
    f(3),
    f(3),
    core=True,
)
case("rational", lambda x, y: x / (1 + y**2), lambda x, y: x / (1 + y**2), f(2, 3), f(2, 3))
case(
    "exp_tanh",
    lambda x: torch.tanh(torch.exp(0.3 * x) - 1),
    lambda x: jnp.tanh(jnp.exp(0.3 * x) - 1),
    f(4),
)
case("power", lambda x, y: x**y, lambda x, y: x**y, positive(4), f(4))
case("atan2", torch.atan2, jnp.arctan2, positive(3), positive(3))
case("gelu", F.gelu, lambda x: jax.nn.gelu(x, approximate=False), f(4))
case("softplus", F.softplus, jax.nn.softplus, f(4))
case(
    "lgamma_erf",
    lambda x: torch.lgamma(x) + torch.erf(x),
    lambda x: jax.scipy.special.gammaln(x) + lax.erf(x),
    positive(3),
)
case(
    "relu_abs",
    lambda x: torch.relu(x) + 0.5 * x.abs(),
    lambda x: jax.nn.relu(x) + 0.5 * jnp.abs(x),
    distinct(6),
)
case(
    "clamp",
    lambda x: torch.clamp(x, -0.5, 0.5) * x,
    lambda x: jnp.clip(x, -0.5, 0.5) * x,
    distinct(6),
    core=True,
)
case(
    "piecewise",
    lambda x, y: torch.maximum(x, y) * torch.minimum(x**2, y),
    lambda x, y: jnp.maximum(x, y) * jnp.minimum(x**2, y),
    distinct(4),
    positive(4),
    core=True,
)
case(
    "where",
    lambda m, x, y: torch.where(m, x * y, y**2),
    lambda m, x, y: jnp.where(m, x * y, y**2),
    bools(5),
    f(5),
    f(5),
    core=True,
)
case(
    "masked_fill",
    lambda x, m: (x**2).masked_fill(m, -1.0),
    lambda x, m: jnp.where(m, -1.0, x**2),
    f(2, 3),
    bools(3),
)
case(
    "broadcast",
    lambda x, y, z: x * y.sin() + z,
    lambda x, y, z: x * jnp.sin(y) + z,
    f(3, 1),
    f(2),
    f(),
    core=True,
)
case("zero_dim", lambda x, y: x * torch.cos(y), lambda x, y: x * jnp.cos(y), f(), f(), core=True)
case(
    "empty",
    lambda x: (x * 2, x.sum(0)),
    lambda x: (x * 2, x.sum(0)),
    f(0, 3),
    linear=True,
    core=True,
)

# ---------------------------------------------------------------------------- products and networks

case("matmul", torch.matmul, jnp.matmul, f(2, 3), f(3, 2), core=True)
case(
    "batch_matmul",
    lambda x, y: (x @ y).relu(),
    lambda x, y: jax.nn.relu(x @ y),
    f(2, 2, 3),
    f(3, 2),
)
case(
    "einsum",
    lambda a, b, d: torch.einsum("ij,jk,k->i", a, b, d),
    lambda a, b, d: (a @ b) @ d,
    f(2, 3),
    f(3, 2),
    f(2),
)
case("outer", torch.outer, jnp.outer, f(2), f(3))
case("kron", torch.kron, jnp.kron, f(2, 2), f(1, 3), core=True)
case("softmax", lambda x: torch.softmax(x, -1), lambda x: jax.nn.softmax(x, -1), f(2, 3), core=True)
case("logsumexp", lambda x: torch.logsumexp(x, 0), lambda x: jax.nn.logsumexp(x, 0), f(3, 2))
case(
    "cross_entropy",
    lambda x, y: F.cross_entropy(x, y.long()),
    lambda x, y: -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean(),
    f(3, 4),
    ints(4, 3),
    core=True,
)


def _layer_norm(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w + b


case(
    "layer_norm",
    lambda x, w, b: F.layer_norm(x, (3,), w, b),
    _layer_norm,
    f(2, 3),
    f(3),
    f(3),
    rtol=10.0,
    core=True,
)

case(
    "batch_norm",
    lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    lambda x, w, b: _layer_norm(x.T, w[:, None], b[:, None]).T,
    f(3, 2),
    f(2),
    f(2),
    rtol=10.0,
    core=True,
)
case(
    "instance_norm",
    F.instance_norm,
    lambda x: _layer_norm(x, 1.0, 0.0),
    f(1, 2, 3),
    rtol=10.0,
)


def _conv(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    n = w.ndim - 2
    return lax.conv_general_dilated(x, w, (stride,) * n, [(padding, padding)] * n)


case(
    "conv1d",
    F.conv1d,
    lambda x, w, b: _conv(x, w, 1, 0) + b[:, None],
    f(1, 2, 5),
    f(2, 2, 3),
    f(2),
)
case(
    "conv2d",
    lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    lambda x, w: _conv(x, w, 2, 1),
    f(1, 1, 4, 4),
    f(2, 1, 3, 3),
    core=True,
)
case(
    "avg_pool2d",
    lambda x: F.avg_pool2d(x, 2),
    lambda x: x.reshape(1, 2, 2, 2, 2, 2).mean((3, 5)),
    f(1, 2, 4, 4),
    linear=True,
)
case(
    "max_pool1d",
    lambda x: F.max_pool1d(x, 2) ** 2,
    lambda x: x.reshape(1, 2, 2, 2).max(-1) ** 2,
    distinct(1, 2, 4),
    core=True,
)
case(
    "interpolate",
    lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    lambda x: jnp.repeat(x, 2, -1),
    f(1, 2, 3),
    linear=True,
)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -1) @ v


case(
    # torch's CPU kernel has a backward, but neither forward mode, a second derivative nor a batched
    # form
    "attention",
    F.scaled_dot_product_attention,
    _attention,
    f(1, 2, 3, 4),
    f(1, 2, 3, 4),
    f(1, 2, 3, 4),
    order=1,
    forward=False,
    vectorizable=False,
    core=True,
)

# ----------------------------------------------------------------------------------- linear algebra


def _spd(a: Any, eye: Any) -> Any:
    return a @ a.T + 2 * eye


def _torch_spd(a: torch.Tensor) -> torch.Tensor:
    return _spd(a, torch.eye(a.shape[0], dtype=a.dtype))


def _jax_spd(a: jax.Array) -> jax.Array:
    return _spd(a, jnp.eye(a.shape[0], dtype=a.dtype))


case(
    "cholesky",
    lambda a: torch.linalg.cholesky(_torch_spd(a)),
    lambda a: jnp.linalg.cholesky(_jax_spd(a)),
    f(2, 2),
    core=True,
)
case(
    "solve",
    lambda a, b: torch.linalg.solve(_torch_spd(a), b),
    lambda a, b: jnp.linalg.solve(_jax_spd(a), b),
    f(2, 2),
    f(2, 3),
    rtol=10.0,
    core=True,
)
case(
    "inv",
    lambda a: torch.linalg.inv(_torch_spd(a)),
    lambda a: jnp.linalg.inv(_jax_spd(a)),
    f(2, 2),
    rtol=10.0,
)
case(
    "eigvalsh",
    lambda a: torch.linalg.eigvalsh(a + a.T),
    lambda a: jnp.linalg.eigvalsh(a + a.T),
    f(3, 3),
    rtol=100.0,
    core=True,
)
case(
    "logdet",
    lambda a: torch.logdet(_torch_spd(a)),
    lambda a: jnp.linalg.slogdet(_jax_spd(a))[1],
    f(2, 2),
    rtol=10.0,
    core=True,
)
case("det", torch.linalg.det, jnp.linalg.det, f(3, 3), rtol=10.0)
case(
    "solve_triangular",
    lambda a, b: torch.linalg.solve_triangular(torch.tril(_torch_spd(a)), b, upper=False),
    lambda a, b: solve_triangular(jnp.tril(_jax_spd(a)), b, lower=True),
    f(2, 2),
    f(2, 2),
    rtol=10.0,
)
case("norm", lambda x: torch.linalg.norm(x, dim=-1), lambda x: jnp.linalg.norm(x, axis=-1), f(2, 3))

# ----------------------------------------------------------------------------- reductions and scans

case("sum_dims", lambda x: (x**2).sum((0, 2)), lambda x: (x**2).sum((0, 2)), f(2, 2, 2))
case(
    "moments",
    lambda x: (x.mean((0, 1), keepdim=True), x.var(-1)),
    lambda x: (x.mean((0, 1), keepdims=True), x.var(-1, ddof=1)),
    f(2, 4),
    core=True,
)
case(
    "amax",
    lambda x: x.amax(1) * x.amin(0).sum(),
    lambda x: x.max(1) * x.min(0).sum(),
    distinct(2, 3),
)
case("prod", lambda x: x.prod(0), lambda x: x.prod(0), positive(3, 2))
case("cumsum", lambda x: x.cumsum(0), lambda x: x.cumsum(0), f(4), linear=True, core=True)
case("cumprod", lambda x: x.cumprod(1), lambda x: x.cumprod(1), positive(2, 3), core=True)

# ------------------------------------------------------------------ indices, order, integer outputs


def _torch_sort(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.sort(x, dim=-1)
    return values**2, indices


def _torch_topk(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.topk(x, 2)
    return values, indices


def _jax_topk(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    indices = jnp.argsort(-x, axis=-1)[..., :2]
    return jnp.take_along_axis(x, indices, -1), indices


def _torch_max(x: torch.Tensor) -> dict[str, torch.Tensor]:
    values, indices = x.max(dim=0)
    return {"values": values, "indices": indices}


case("sort", _torch_sort, lambda x: (jnp.sort(x) ** 2, jnp.argsort(x)), distinct(2, 3), core=True)
case("topk", _torch_topk, _jax_topk, distinct(2, 4))
case("return_type", torch.sort, lambda x: (jnp.sort(x), jnp.argsort(x)), distinct(2, 3))
case(
    "max_dim",
    _torch_max,
    lambda x: {"values": x.max(0), "indices": x.argmax(0)},
    distinct(3, 2),
    core=True,
)
case("argmax", lambda x: (x.argmax(), x * 2), lambda x: (x.argmax(), x * 2), distinct(4))
case(
    "gather",
    lambda x, i: torch.gather(x, 1, i.long()) * 2,
    lambda x, i: jnp.take_along_axis(x, i, 1) * 2,
    f(2, 4),
    ints(4, 2, 3),
    linear=True,
    core=True,
)
case("index", lambda x, i: x[i] ** 2, lambda x, i: x[i] ** 2, f(4), ints(4, 3))
case(
    "scatter_add",
    lambda x, i: torch.zeros(5, dtype=x.dtype).scatter_add(0, i.long(), x**2),
    lambda x, i: jnp.zeros(5, x.dtype).at[i].add(x**2),
    f(4),
    ints(5, 4),
    core=True,
)
case(
    "embedding",
    lambda i, w: F.embedding(i, w).sin(),
    lambda i, w: jnp.sin(w[i]),
    ints(3, 4),
    f(3, 2),
    core=True,
)
case(
    "integers",
    lambda a, b: {"sum": a + b, "product": a * b, "sign": a.sign(), "less": a < b, "xor": a ^ b},
    lambda a, b: {"sum": a + b, "product": a * b, "sign": jnp.sign(a), "less": a < b, "xor": a ^ b},
    signed(3),
    signed(2, 1),
)
case(
    "small_integers",
    lambda a, b, m: (a + a, b.abs(), a.to(torch.float32) / 2, ~m, m.any()),
    lambda a, b, m: (a + a, jnp.abs(b), a.astype(jnp.float32) / 2, ~m, m.any()),
    Array((3,), "int", "uint8", diff=False, high=200),
    signed(3, dtype="int16"),
    bools(3),
)

# --------------------------------------------------------------------------------- shapes and views

case(
    "tril",
    lambda x: torch.tril(x) + torch.triu(x, 1).T,
    lambda x: jnp.tril(x) + jnp.triu(x, 1).T,
    f(3, 3),
    linear=True,
)
case(
    "roll_flip",
    lambda x: x.roll(1, 0).flip(1) * 3,
    lambda x: jnp.flip(jnp.roll(x, 1, 0), 1) * 3,
    f(2, 3),
    linear=True,
)
case(
    "strided_views",
    lambda x: (x.T, x[:, ::2], x[0].expand(2, -1), x.reshape(-1)),
    lambda x: (x.T, x[:, ::2], jnp.broadcast_to(x[0], (2, 3)), x.reshape(-1)),
    f(2, 3),
    linear=True,
    core=True,
)
case("identity", lambda x, y: (y, x, x), lambda x, y: (y, x, x), f(2), f(3), linear=True, core=True)
case(
    "cat_split",
    lambda x, y: list(torch.split(torch.cat([x, y * x[:1]], 0), [1, 3])),
    lambda x, y: list(jnp.split(jnp.concatenate([x, y * x[:1]], 0), [1])),
    f(2, 2),
    f(2, 2),
)

# ------------------------------------------------------------------------------------------ pytrees


def _tree(sin: Callable[[Any], Any]) -> Callable[..., Any]:
    def tree(params: dict[str, Any], pair: tuple[Any, list[Any]]) -> dict[str, Any]:
        x, (y, n) = pair
        return {
            "out": (params["w"] * x + params["nested"]["b"], [sin(y) * params["w"]]),
            "count": n + 1,
            "none": None,
        }

    return tree


case(
    "pytrees",
    _tree(torch.sin),
    _tree(jnp.sin),
    {"w": f(3), "nested": {"b": f()}},
    (f(3), [f(3), ints(9, 2)]),
    core=True,
)
case(
    "keywords",
    lambda x, *, scale, shift=0.0: torch.tanh(x * scale) + shift,
    lambda x, *, scale, shift=0.0: jnp.tanh(x * scale) + shift,
    f(3),
    kwargs={"scale": f(3), "shift": f()},
    core=True,
)
case(
    "python_numbers",
    lambda x: {"x": x.sum() * 2, "count": x.shape[0]},
    lambda x: {"x": x.sum() * 2, "count": jnp.asarray(x.shape[0])},
    f(3),
)

# --------------------------------------------------------- results that do not depend on the inputs

case(
    "steps",
    lambda x: ((x > 0).float(), x.round(), x**2),
    lambda x: ((x > 0).astype(jnp.float32), jnp.round(x), x**2),
    distinct(4),
    core=True,
)
case("only_steps", lambda x: (x > 0).float(), lambda x: (x > 0).astype(jnp.float32), distinct(4))
case(
    "detached",
    lambda x, y: x.detach() * y,
    lambda x, y: lax.stop_gradient(x) * y,
    f(3),
    f(3),
    core=True,
)
case(
    "constant",
    lambda x: (torch.full((2, 3), 1.5), torch.arange(3)),
    lambda x: (jnp.full((2, 3), 1.5, jnp.float32), jnp.arange(3)),
    f(2),
    core=True,
)
case("no_arguments", lambda: torch.arange(3) + 1, lambda: jnp.arange(3) + 1)

# ------------------------------------------------------- what PyTorch programs do inside a function


def _in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.clone()
    z[0] += 1.0
    z.mul_(y)
    z[1:] = z[:-1].clone() * 2
    return z


def _in_place_twin(x: jax.Array, y: jax.Array) -> jax.Array:
    z = x.at[0].add(1.0) * y
    return z.at[1:].set(z[:-1] * 2)


case(  # torch cannot batch it where y is batched and x is not: z.mul_(y) would have to grow z
    "in_place", _in_place, _in_place_twin, f(3), f(3), vectorizable=False, core=True
)


def _branch(x: torch.Tensor) -> torch.Tensor:
    if x.sum().item() > 0:
        return x**2
    return torch.sin(x)


case(
    "branch",
    _branch,
    lambda x: jnp.where(x.sum() > 0, x**2, jnp.sin(x)),
    f(3),
    vectorizable=False,
    core=True,
)


def _halve(x: torch.Tensor) -> torch.Tensor:
    while x.detach().abs().max().item() > 0.5:
        x = x * 0.5
    return x**3


def _halve_twin(x: jax.Array) -> jax.Array:
    largest = lax.stop_gradient(jnp.abs(x).max())
    return (x * 0.5 ** jnp.maximum(0, jnp.ceil(jnp.log2(largest / 0.5)))) ** 3


case("loop", _halve, _halve_twin, f(3), vectorizable=False)
case(
    "inner_grad",
    lambda x, y: torch.func.grad(lambda z: (z**3 * y).sum())(x),
    lambda x, y: 3 * x**2 * y,
    f(3),
    f(3),
    core=True,
)
case("inner_vmap", torch.func.vmap(torch.dot), lambda x, y: (x * y).sum(-1), f(2, 3), f(2, 3))
case(
    "inner_jacobian", lambda x: torch.func.jacrev(torch.sin)(x) @ x, lambda x: jnp.cos(x) * x, f(3)
)


def _physics(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Forces from an energy, by torch.autograd.grad on a leaf made inside."""
    with torch.enable_grad():
        positions = x.detach().requires_grad_()
        energy = (torch.sin(positions) * w.detach()).sum()
        (gradient,) = torch.autograd.grad(energy, positions)
    return gradient.detach() * w


case(
    "inner_autograd",
    _physics,
    lambda x, w: jnp.cos(lax.stop_gradient(x)) * lax.stop_gradient(w) * w,
    f(3),
    f(3),
    order=1,
    forward=False,
    vectorizable=False,
    core=True,
)


class OldStyleCube(torch.autograd.Function):
    """forward(ctx, x) without setup_context: torch.func refuses it, autograd runs it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # ty: ignore
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # ty: ignore
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cube(torch.autograd.Function):
    """With setup_context and a differentiable backward, but no jvp: two reverse passes instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:  # ty: ignore
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # ty: ignore
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


case(
    "old_style_function",
    lambda x: OldStyleCube.apply(x),
    lambda x: x**3,
    f(3),
    order=1,
    forward=False,
    vectorizable=False,
    core=True,
)
case("function_without_jvp", lambda x: Cube.apply(x), lambda x: x**3, f(3), core=True)
case(
    "numpy_inside",
    lambda x: x * torch.from_numpy(np.sin(x.detach().numpy())),
    lambda x: x * jnp.sin(lax.stop_gradient(x)),
    f(3),
    order=1,
    forward=False,
    vectorizable=False,
    core=True,
)

# --------------------------------------------------------------------------------- other precisions

case(
    "float16",
    lambda x, y: torch.sin(x) * y,
    lambda x, y: jnp.sin(x) * y,
    f(3, dtype="float16"),
    f(3, dtype="float16"),
    order=2,
)
case(
    "bfloat16",
    lambda x, y: x @ y,
    lambda x, y: x @ y,
    f(2, 3, dtype="bfloat16"),
    f(3, 2, dtype="bfloat16"),
    order=2,
)
case(
    "mixed_precision",
    lambda x, y: (x * y.float(), y.sum()),
    lambda x, y: (x * y.astype(jnp.float32), y.sum()),
    f(3),
    f(3, dtype="bfloat16"),
    order=2,
    core=True,
)

# ------------------------------------------------------------------------------------------ complex


case(
    "holomorphic",
    lambda z, w: torch.exp(0.5 * z) * w**2,
    lambda z, w: jnp.exp(0.5 * z) * w**2,
    c(3),
    c(3),
    core=True,
)
case(
    "complex_abs",
    lambda z: z.abs() * z.angle(),
    lambda z: jnp.abs(z) * jnp.angle(z),
    c(3),
    core=True,
)
case("real_imag", lambda z: (z.real * z.imag, z.imag), lambda z: (z.real * z.imag, z.imag), c(3))
case(
    "make_complex",
    lambda x, y: torch.complex(x, y) ** 2,
    lambda x, y: lax.complex(x, y) ** 2,
    f(3),
    f(3),
)
case(  # some of its third derivatives take a view with the negative bit, which torch cannot batch
    "polar",
    torch.polar,
    lambda r, t: r * jnp.exp(1j * t),
    positive(3),
    f(3),
    vectorizable=False,
    core=True,
)
case("conj_product", lambda z, w: z.conj() * w, lambda z, w: z.conj() * w, c(3), c(3), core=True)
# torch returns these lazily, with a bit set and nothing computed
case(
    "conjugate_bit",
    lambda z: (z.conj(), z.mH),
    lambda z: (z.conj(), z.conj().T),
    c(2, 3),
)
case("negative_bit", lambda z: z.conj().imag, lambda z: z.conj().imag, c(3), vectorizable=False)
case("modulus", lambda z: (z * z.conj()).real, lambda z: (z * z.conj()).real, c(3))
case("fft", torch.fft.fft, jnp.fft.fft, c(4), linear=True)
case("fft_real", torch.fft.fft, jnp.fft.fft, f(4))
case(
    "rfft_filter",
    lambda x, h: torch.fft.irfft(torch.fft.rfft(x) * h),
    lambda x, h: jnp.fft.irfft(jnp.fft.rfft(x) * h),
    f(4),
    c(3),
    core=True,
)
case(
    "view_as_real",
    lambda z: torch.view_as_real(z) ** 2,
    lambda z: jnp.stack([z.real, z.imag], -1) ** 2,
    c(3),
)
case(
    "view_as_complex",
    lambda x: torch.view_as_complex(x) * (2 + 1j),
    lambda x: lax.complex(x[..., 0], x[..., 1]) * (2 + 1j),
    f(3, 2),
)
case("complex_matmul", lambda z, w: (z @ w).mT, lambda z, w: (z @ w).mT, c(2, 2), c(2, 2))
case(
    "complex_solve",
    lambda z, w: torch.linalg.solve(z + 3 * torch.eye(2), w),
    lambda z, w: jnp.linalg.solve(z + 3 * jnp.eye(2, dtype=jnp.float32), w),
    c(2, 2),
    c(2, 1),
    rtol=10.0,
    core=True,
)
case(
    "mixed_complex",
    lambda x, z: {"product": x * z, "energy": (x * z.abs() ** 2).sum()},
    lambda x, z: {"product": x * z, "energy": (x * jnp.abs(z) ** 2).sum()},
    f(3),
    c(3),
)

assert len({case.name for case in CASES}) == len(CASES), "two cases have one name"
