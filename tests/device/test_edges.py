"""Edges of operators that PyTorch's own tests for devices have found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from torch.nn import functional

from torch2jax import device, torch2jax

device.enable()

# --- nothing to pool -----------------------------------------------------------------------------


def _max(n: int) -> Callable[[Any], Any]:
    return lambda x: getattr(functional, f"max_pool{n}d")(x, 2)


def _unpooled(n: int) -> Callable[[Any], Any]:
    def fn(x: Any) -> Any:
        y, places = getattr(functional, f"max_pool{n}d")(x, 2, return_indices=True)
        return getattr(functional, f"max_unpool{n}d")(y, places, 2)

    return fn


POOLS: dict[str, Callable[[int], Callable[[Any], Any]]] = {
    "max": _max,
    "unpooled": _unpooled,
    "average": lambda n: lambda x: getattr(functional, f"avg_pool{n}d")(x, 2),
    "adaptive average": lambda n: lambda x: getattr(functional, f"adaptive_avg_pool{n}d")(x, 3),
    "adaptive max": lambda n: lambda x: getattr(functional, f"adaptive_max_pool{n}d")(x, 3),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", POOLS)
def test_a_batch_of_nothing_is_pooled(name: str, n: int) -> None:
    fn, shape = POOLS[name](n), (0, 2, *[6] * n)
    expected = fn(torch.ones(shape)).shape
    x = torch.ones(shape, device="jax", requires_grad=True)
    out = fn(x)
    out.sum().backward()
    assert out.shape == expected
    assert x.grad is not None
    assert x.grad.shape == shape
    lowered = torch2jax(fn, lower=True)
    assert lowered(jnp.ones(shape)).shape == expected
    assert jax.grad(lambda x: lowered(x).sum())(jnp.ones(shape)).shape == shape


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_a_gradient_of_no_elements_is_refused(kind: str, n: int) -> None:
    pool: Any = getattr(functional, f"adaptive_{kind}_pool{n}d")
    for on in ("cpu", "jax"):
        out = pool(torch.ones(1, 2, *[6] * n, device=on, requires_grad=True), 0)
        with pytest.raises(RuntimeError, match="Expected grad_output to have non-zero size"):
            out.sum().backward()


# --- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bag_of_half_precision_is_rounded_once(dtype: torch.dtype, mode: str) -> None:
    table = torch.linspace(0.9, 9.1, 20).reshape(5, 4).to(dtype)
    places = torch.arange(200) % 5
    factors = torch.linspace(0.1, 1.3, 200).to(dtype) if mode == "sum" else None
    offsets = torch.tensor([0, 70])

    def fn(table: Any, places: Any, offsets: Any, factors: Any) -> Any:
        return functional.embedding_bag(
            places, table, offsets, mode=mode, per_sample_weights=factors
        )

    wide = fn(table.double(), places, offsets, None if factors is None else factors.double())
    moved: list[Any] = [
        None if x is None else x.to("jax") for x in (table, places, offsets, factors)
    ]
    assert torch.equal(fn(*moved).cpu(), wide.to(dtype))
    with precision(True):
        lowered = torch2jax(lambda *given: fn(*given).float(), lower=True)
        given = [None if x is None else x.jax() for x in moved]
        np.testing.assert_array_equal(lowered(*given), wide.to(dtype).float().numpy())


# --- no channels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_convolution_of_no_channels_has_none(n: int, batch: int) -> None:
    convolve: Any = getattr(functional, f"conv{n}d")

    def on(place: str) -> Any:
        shapes = (batch, 0, *[5] * n), (4, 0, *[2] * n), (4,)
        given = [torch.ones(shape, device=place, requires_grad=True) for shape in shapes]
        out = convolve(*given, stride=2)
        out.sum().backward()
        return [x.cpu() for x in (out, *[g.grad for g in given if g.grad is not None])]

    expected = on("cpu")
    assert len(expected) == 4
    torch.testing.assert_close(on("jax"), expected)
    arrays = jnp.ones((batch, 0, *[5] * n)), jnp.ones((4, 0, *[2] * n)), jnp.ones(4)
    lowered = torch2jax(lambda *given: convolve(*given, stride=2), lower=True)
    assert lowered(*arrays).shape == expected[0].shape
    grads = jax.grad(lambda *given: lowered(*given).sum(), (0, 1, 2))(*arrays)
    assert [g.shape for g in grads] == [x.shape for x in expected[1:]]


# --- matrices that have no factors ---------------------------------------------------------------


def _batch(on: str, dtype: torch.dtype) -> torch.Tensor:
    a = torch.eye(3, dtype=dtype).repeat(4, 1, 1)
    a[0, 2, 2], a[1, 0, 0], a[2, 1, 1] = 0, -1, 0
    return a.to(on)


def _coupled(on: str, dtype: torch.dtype) -> torch.Tensor:
    """The minors of orders 1 and 2 are positive, and that of order 3 is not; the rank is 3."""
    rows = [[4, 2, 2, 0], [2, 5, 3, 0], [2, 3, 1, 0], [0, 0, 0, 1]]
    return torch.tensor(rows, dtype=dtype).to(on)


FACTORS: dict[str, Callable[[Any], Any]] = {
    "cholesky_ex": lambda a: torch.linalg.cholesky_ex(a)[1],
    "inv_ex": lambda a: torch.linalg.inv_ex(a)[1],
    "solve_ex": lambda a: torch.linalg.solve_ex(a, torch.ones_like(a[..., :1]))[1],
    "lu_factor_ex": lambda a: torch.linalg.lu_factor_ex(a)[2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("name", FACTORS)
def test_what_failed_is_the_first_minor_or_pivot(name: str, dtype: torch.dtype) -> None:
    with precision(True):
        for a in (_batch, _coupled):
            expected = FACTORS[name](a("cpu", dtype))
            assert torch.equal(FACTORS[name](a("jax", dtype)).cpu(), expected)
            lowered = torch2jax(FACTORS[name], lower=True)(jnp.asarray(a("cpu", dtype).numpy()))
            np.testing.assert_array_equal(lowered, expected.numpy())


UNFACTORED: dict[str, Callable[[Any], Any]] = {
    "cholesky": torch.linalg.cholesky,
    "cholesky_ex": lambda a: torch.linalg.cholesky_ex(a, check_errors=True),
    "inv": torch.linalg.inv,
    "inverse": torch.inverse,
    "inv_ex": lambda a: torch.linalg.inv_ex(a, check_errors=True),
    "matrix_power": lambda a: torch.linalg.matrix_power(a, -1),
    "solve": lambda a: torch.linalg.solve(a, a),
    "lu_factor": torch.linalg.lu_factor,
    "eigh": lambda a: torch.linalg.eigh(a / 0),
    "eigvalsh": lambda a: torch.linalg.eigvalsh(a / 0),
}


@pytest.mark.parametrize("name", UNFACTORED)
def test_an_error_names_the_matrix_and_the_minor(name: str) -> None:
    fn = UNFACTORED[name]
    for index in ((), 0):
        a = _batch("cpu", torch.float32)[index]
        with pytest.raises(RuntimeError) as expected:
            fn(a)
        with pytest.raises(RuntimeError) as found:
            fn(a.to("jax"))
        assert isinstance(found.value, type(expected.value))
        assert _without_code(found.value) == _without_code(expected.value)


def _without_code(error: Any) -> str:
    """LAPACK's number of an eigenvalue that it has not found says nothing."""
    return str(error).partition("(error code")[0]


def test_an_exponential_keeps_the_digits_of_a_small_result() -> None:
    with precision(True):
        torch.manual_seed(0)
        a = torch.randn(20, 4, 4)
        a = 10 * a / torch.linalg.matrix_norm(a, 1)[:, None, None]
        for x in (a, a.to(torch.complex64)):
            wide: Any = torch.complex128 if x.is_complex() else torch.float64
            expected = torch.linalg.matrix_exp(x.to(wide))
            found = torch.linalg.matrix_exp(x.to("jax")).cpu().to(wide)
            size = expected.abs().amax((1, 2))
            assert ((found - expected).abs().amax((1, 2)) / size).max() < 4e-6


# --- the inverse of a short-time transform -------------------------------------------------------


@pytest.mark.parametrize("n_fft", [5, 8, 15])
@pytest.mark.parametrize("onesided", [True, False])
@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.filterwarnings("ignore:A window was not provided:UserWarning")
def test_istft_of_an_odd_number_of_frequencies(n_fft: int, onesided: bool, windowed: bool) -> None:
    x = torch.linspace(-1, 2, 60).reshape(2, 30).sin()
    options = {"n_fft": n_fft, "hop_length": 2, "onesided": onesided}
    window = torch.hamming_window(n_fft) if windowed else None
    spectrum = torch.stft(x, **options, window=torch.ones(n_fft), return_complex=True)  # type: ignore
    expected = torch.istft(spectrum, **options, window=window, length=30)  # type: ignore
    place = None if window is None else window.to("jax")
    found = torch.istft(spectrum.to("jax"), **options, window=place, length=30)  # type: ignore
    torch.testing.assert_close(found.cpu(), expected)
    lowered = torch2jax(
        lambda s: torch.istft(s, **options, window=window, length=30),  # type: ignore
        lower=True,
    )
    np.testing.assert_allclose(
        lowered(jnp.asarray(spectrum.numpy())), expected.numpy(), rtol=1e-4, atol=1e-5
    )


def test_stft_takes_a_constant_window() -> None:
    x, window = torch.linspace(-1, 2, 60).reshape(2, 30).sin(), torch.hann_window(8)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.stft(x, 8, 2, window=window, return_complex=True).abs()

    found = torch2jax(fn, lower=True)(jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, fn(x).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="on the same device") as error:
        fn(x.to("jax"))
    assert "lazy" not in str(error.value)


def test_istft_refuses_windows_that_leave_gaps() -> None:
    window = torch.zeros(5)
    for on in ("cpu", "jax"):
        spectrum = torch.ones(3, 9, dtype=torch.complex64, device=on)
        with pytest.raises(RuntimeError, match="window overlap add min"):
            torch.istft(spectrum, 5, 2, window=window.to(on))


# --- constants beside traced tensors -------------------------------------------------------------

three = torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6)
square, line = three[0, 0], three[0, 0, 0]

BESIDE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "attention": (functional.scaled_dot_product_attention, (three, three + 1, three + 2)),
    "inner": (torch.inner, (square, square + 1)),
    "multi_dot": (lambda *given: torch.linalg.multi_dot(given), (square, square + 1, square + 2)),
    "meshgrid": (lambda *given: torch.stack(torch.meshgrid(*given, indexing="ij")), (line, line)),
    "cartesian_prod": (torch.cartesian_prod, (line, line + 1)),
    "take_along_dim": (
        lambda x, places: torch.take_along_dim(x, places, 0),
        (square, torch.tensor([[2, 0, 1, 3, 5, 4]])),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_constant_of_the_function_is_an_operand_under_lower(name: str) -> None:
    fn, operands = BESIDE[name]
    expected = fn(*operands)
    for k, traced in enumerate(operands):
        if k and not traced.is_floating_point():
            traced = traced.int()

        def with_constants(x: Any, k: int = k) -> Any:
            return fn(*operands[:k], x.to(operands[k].dtype), *operands[k + 1 :])

        found = torch2jax(with_constants, lower=True)(jnp.asarray(traced.numpy()))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    # In eager mode it is an error, as beside CUDA tensors.
    mixed = [x.to("jax") if k == 0 else x for k, x in enumerate(operands)]
    with pytest.raises(RuntimeError, match="on the same device") as error:
        fn(*mixed)
    assert "lazy" not in str(error.value)
    torch.testing.assert_close(fn(*[x.to("jax") for x in operands]).cpu(), expected)


def test_attention_in_a_transform_of_functions() -> None:
    q = three.to("jax")

    def loss(k: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, k).square().sum()

    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), leaf.grad)
    attention: Any = functional.scaled_dot_product_attention
    mapped: Any = torch.func.vmap(attention)(*[torch.stack([q, q])] * 3)
    torch.testing.assert_close(mapped[1], attention(q, q, q))


def test_a_window_in_a_transform_of_functions() -> None:
    x = torch.linspace(-1, 2, 30).sin().to("jax")

    def loss(window: torch.Tensor) -> torch.Tensor:
        return torch.stft(x, 8, 2, window=window, return_complex=True).abs().sum()

    window = torch.hann_window(8).to("jax")
    leaf = window.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(window), leaf.grad)
