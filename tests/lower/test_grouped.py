"""`F.grouped_mm` and `torch.histc` as JAX programs and on the device, beside PyTorch's own.

PyTorch's grouped product wants strides of 16 bytes, and its CPU kernel counts no integers: there
the expected histogram is that of the same numbers in float64.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import close

from torch2jax import device, lowering_report, t2j, torch2jax

device.enable()

ENDS = torch.tensor([2, 2, 8], dtype=torch.int32)  # the second group is empty
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.Tensor | None]] = {
    "rows": ((8, 8), (3, 8, 16), ENDS),
    "columns": ((3, 4, 8), (8, 8), ENDS),
    "contracted": ((4, 8), (8, 16), ENDS),
    "batch": ((3, 4, 8), (3, 8, 16), None),
}


def operands(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    a, b, ends = SHAPES[kind]
    torch.manual_seed(0)
    return torch.randn(a) / 4, torch.randn(b) / 4, ends


def grouped(a: torch.Tensor, b: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(a, b, offs=ends[0] if ends else None)


def derived(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> list[torch.Tensor]:
    """The product, and the gradients of a loss and of a loss of those gradients."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = grouped(a, b, *(() if ends is None else (ends,)))
    da, db = torch.autograd.grad((out**3).sum(), [a, b], create_graph=True)
    return [out, da, db, *torch.autograd.grad((da**2).sum() + (db**2).sum(), [a, b])]


@pytest.mark.parametrize("kind", list(SHAPES))
def test_grouped_product_as_a_jax_program(kind: str) -> None:
    a, b, ends = operands(kind)
    f = torch2jax(grouped, lower=True)
    rest = () if ends is None else (t2j(ends),)

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return (f(a, b, *rest) ** 3).sum()

    def loss_of_gradients(a: jax.Array, b: jax.Array) -> jax.Array:
        return sum((g**2).sum() for g in jax.grad(loss, (0, 1))(a, b))  # type: ignore[return-value]

    def all_of_it(a: jax.Array, b: jax.Array) -> list[jax.Array]:
        first, second = (jax.grad(fn, (0, 1))(a, b) for fn in (loss, loss_of_gradients))
        return [f(a, b, *rest), *first, *second]

    x, y = t2j(a), t2j(b)
    for ours, want in zip(jax.jit(all_of_it)(x, y), derived(a, b, ends), strict=True):
        close(ours, want, 1e-4)
    tangents = jnp.cos(x), jnp.sin(y)
    _, forward = jax.jvp(loss, (x, y), tangents)
    reverse = sum(
        jnp.vdot(g, t) for g, t in zip(jax.grad(loss, (0, 1))(x, y), tangents, strict=True)
    )
    close(forward, reverse, 1e-4)
    report = lowering_report(f, x, y, *rest)
    assert report.native
    assert not report.bridge


@pytest.mark.parametrize("kind", list(SHAPES))
def test_grouped_product_on_the_device(kind: str) -> None:
    a, b, ends = operands(kind)
    there = None if ends is None else ends.to("jax")
    for ours, want in zip(
        derived(a.to("jax"), b.to("jax"), there), derived(a, b, ends), strict=True
    ):
        close(ours, want, 1e-4)


@pytest.mark.parametrize("kind", ["rows", "columns", "contracted"])
def test_batches_of_grouped_products(kind: str) -> None:
    """Of one operand alone, of both, and of the groups; their gradients too."""
    a, b, _ = operands(kind)
    f = torch2jax(grouped, lower=True)
    x = jnp.stack([t2j(a), jnp.cos(t2j(a))])
    y = jnp.stack([t2j(b), jnp.sin(t2j(b))], axis=-1)
    ends = jnp.array([[2, 2, 8], [0, 5, 8]], np.int32)

    def both(a: Any, b: Any, ends: Any) -> Any:
        return f(a, b, ends), jax.grad(lambda a, b: (f(a, b, ends) ** 2).sum(), (0, 1))(a, b)

    for axes in ((0, None, None), (None, -1, None), (None, None, 0), (0, -1, 0)):

        def at(i: int, axes: Any = axes) -> list[Any]:
            return [
                jnp.take(z, i if axis is not None else 0, own)
                for z, axis, own in zip((x, y, ends), axes, (0, -1, 0), strict=True)
            ]

        rows = zip((x, y, ends), axes, at(0), strict=True)
        given = [z if axis is not None else one for z, axis, one in rows]
        found = jax.tree.leaves(jax.vmap(both, axes)(*given))
        for k, ours in enumerate(found):
            want = jnp.stack([jax.tree.leaves(both(*at(i)))[k] for i in range(2)])
            close(ours, want, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_product_in_half_precision(dtype: torch.dtype) -> None:
    a, b, ends = operands("rows")
    a, b = a.to(dtype), b.to(dtype)
    assert ends is not None
    out = grouped(a.to("jax"), b.to("jax"), ends.to("jax"))
    assert out.dtype is dtype
    close(out.float(), grouped(a, b, ends).float(), 1e-2)


def test_rows_beyond_the_last_end_are_zero() -> None:
    a, b, _ = operands("rows")
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    out = grouped(a.to("jax"), b.to("jax"), ends.to("jax")).cpu()
    close(out[:5], grouped(a, b, ends)[:5])
    assert out[5:].tolist() == torch.zeros(3, 16).tolist()


def test_bias_and_result_dtype() -> None:
    """PyTorch's schema has them, and its kernel for the CPU refuses them."""
    a, b, ends = operands("rows")
    assert ends is not None
    a, b, bias = a.bfloat16(), b.bfloat16(), torch.arange(16.0)
    out = torch.nn.functional.grouped_mm(
        a.to("jax"), b.to("jax"), offs=ends.to("jax"), bias=bias.to("jax"), out_dtype=torch.float32
    )
    assert out.dtype is torch.float32
    close(out, grouped(a.float(), b.float(), ends) + bias)


def test_what_grouped_mm_refuses() -> None:
    a, b, ends = operands("rows")
    assert ends is not None
    x, y, there = a.to("jax"), b.to("jax"), ends.to("jax")
    with pytest.raises(RuntimeError, match="Have to provide offsets"):
        grouped(x, y)
    with pytest.raises(RuntimeError, match="Have to provide offsets"):
        grouped(y, y.transpose(1, 2), there)
    with pytest.raises(RuntimeError, match="same dtype"):
        grouped(x, y.bfloat16(), there)


# --- histc ---------------------------------------------------------------------------------------

torch.manual_seed(1)
FLOATS = [
    (torch.tensor([0.0, 1, 1.5, 2, 3, np.nan, np.inf, -1, 2.9999]), (3, 0, 3)),
    (torch.tensor([2.0, 2, 2]), (4,)),
    (torch.zeros(0), (4,)),
    (torch.randn(10, 50), (37,)),
    (torch.randn(500), (37, -1, 2)),
    (torch.randn(90).bfloat16(), (7, -1, 2)),
    (torch.randn(90).half(), (7, -1, 2)),
]
INTEGERS = [(4, 0, 3), (4,), (3, -2, 7), (30, -5, 6)]


@pytest.mark.parametrize(("x", "arguments"), FLOATS)
def test_histogram_of_floats(x: torch.Tensor, arguments: Any) -> None:
    def count(x: torch.Tensor) -> torch.Tensor:
        return torch.histc(x, *arguments)

    want, f = count(x), torch2jax(count, lower=True)
    out = count(x.to("jax"))
    assert out.dtype is want.dtype
    close(out.float(), want.float())
    close(jax.jit(f)(t2j(x)).astype(np.float32), want.float())
    close(jax.grad(lambda x: f(x).sum().astype(np.float32))(t2j(x)), np.zeros(x.shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("arguments", INTEGERS)
def test_histogram_of_integers(dtype: torch.dtype, arguments: Any) -> None:
    x = torch.randint(-5, 9, (6, 9))
    want = torch.histc(x.double(), *arguments).to(dtype)
    out = torch.histc(x.to(dtype).to("jax"), *arguments)
    assert out.dtype is dtype
    assert out.tolist() == want.tolist()
    f = torch2jax(lambda x: torch.histc(x, *arguments), lower=True)
    assert f(t2j(x.to(dtype))).tolist() == want.tolist()


def test_histogram_of_the_whole_range_of_integers() -> None:
    top = 2**31 - 1
    x = torch.tensor([-top - 1, -top, -1, 0, 1, top - 1, top], dtype=torch.int32)
    for bins in (2, 3, 1000):
        places = [min((v + top + 1) * bins // (2 * top + 1), bins - 1) for v in x.tolist()]
        want = np.bincount(places, minlength=bins)
        assert torch.histc(x.to("jax"), bins).tolist() == want.tolist()


def test_what_histc_refuses() -> None:
    x = torch.ones(3, device="jax")
    with pytest.raises(RuntimeError, match="bins must be > 0"):
        torch.histc(x, 0)
    with pytest.raises(RuntimeError, match="max must be larger than min"):
        torch.histc(x, 3, 2, 1)
    with pytest.raises(NotImplementedError, match="histc"):
        torch.histc(x > 0, 3)
