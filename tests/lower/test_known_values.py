"""Where fake tensors do not do under ``lower=True``, modules that ask look at values.

Models of images with text are of this kind: a grid says into how many patches an image was cut, and
made-up grids do not fit the patches. Values come from an eager call, from examples, from what the
function closes over and from the module's own buffers. Expected values are PyTorch's.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.core import Tracer
from torch import nn

from torch2jax import Torch2JaxError, device, from_module, lowering_report, torch2jax
from torch2jax.device.tensors.tensor import Tensor

GRID = torch.tensor([[2, 3], [1, 4]])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Positions(nn.Module):
    """It adds a number of its own to each patch, by its row and column in the grid."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(8, size), nn.Embedding(8, size)

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        found = []
        for h, w in grid.tolist():
            rows = torch.arange(h, device=x.device).repeat_interleave(w)
            columns = torch.arange(w, device=x.device).repeat(h)
            found.append(self.rows(rows) + self.columns(columns))
        return x + torch.cat(found)


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.positions = nn.Linear(4, 4), Positions()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return self.head(self.positions(self.inner(x).tanh(), grid).tanh())


class Coarse(nn.Module):
    """Its inner module gets another grid than it does."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        finer = grid * torch.tensor([1, 2], device=grid.device)
        return self.vision(x, finer) + self.vision(x, finer.flip(0))


class Stored(nn.Module):
    """The grid is a buffer."""

    grid: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()
        self.register_buffer("grid", GRID)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vision(x, self.grid)


def arrays_of(*tensors: torch.Tensor) -> list[jax.Array]:
    return [jnp.asarray(x.numpy()) for x in tensors]


def expect(model: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    twin = copy.deepcopy(model)
    out = twin(*args)
    out.square().sum().backward()
    return out, {k: p.grad for k, p in twin.named_parameters() if p.grad is not None}


def compare(actual: Any, grads: Any, expected: tuple[torch.Tensor, dict[str, Any]]) -> None:
    def close(x: Any, y: torch.Tensor, name: str = "") -> None:
        np.testing.assert_allclose(x, y.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)

    close(actual, expected[0])
    assert set(grads) == set(expected[1])
    for name, g in expected[1].items():
        close(grads[name], g, name)


def step_of(apply: Any, variables: Any) -> Any:
    def loss(params: Any, *args: Any) -> Any:
        out = apply({**variables, "params": params}, *args)
        return (out**2).sum(), out

    return jax.value_and_grad(loss, has_aux=True)


def bridged(apply: Any, *args: Any) -> list[str]:
    return sorted(name for name, _, _ in lowering_report(apply, *args).modules)


@pytest.mark.parametrize(("model", "rows"), [(Vision(), 10), (Coarse(), 20)])
def test_values_of_an_eager_call(model: nn.Module, rows: int) -> None:
    x = torch.randn(rows, 4)
    expected = expect(model, x, GRID)
    apply, variables = from_module(model, lower=True)
    arrays = arrays_of(x, GRID)
    out = apply(variables, *arrays)
    # Its inference serves calls of the same shapes, whose values are not known.
    (_, again), grads = jax.jit(step_of(apply, variables))(variables["params"], *arrays)
    np.testing.assert_array_equal(out, again)
    compare(out, grads, expected)


@pytest.mark.parametrize("model", [Vision(), Coarse()])
def test_values_beside_what_is_differentiated(model: nn.Module) -> None:
    """In an eager call of ``jax.grad`` the parameters are traced, and the grid has values."""
    x = torch.randn(20 if isinstance(model, Coarse) else 10, 4)
    expected = expect(model, x, GRID)
    apply, variables = from_module(model, lower=True)
    (_, out), grads = step_of(apply, variables)(variables["params"], *arrays_of(x, GRID))
    compare(out, grads, expected)


def test_values_of_examples() -> None:
    model, x = Coarse(), torch.randn(20, 4)
    expected = expect(model, x, GRID)
    apply, variables = from_module(model, x, GRID, lower=True)
    arrays = arrays_of(x, GRID)
    assert bridged(apply, variables, *arrays) == ["vision.positions (Positions)"]
    (_, out), grads = jax.jit(step_of(apply, variables))(variables["params"], *arrays)
    compare(out, grads, expected)
    jitted = jax.jit(torch2jax(lambda x, grid: model(x, grid), x, GRID, lower=True))
    np.testing.assert_allclose(jitted(*arrays), expected[0].detach().numpy(), rtol=2e-5, atol=2e-6)


def test_values_that_the_function_closes_over() -> None:
    model, x = Vision(), torch.randn(10, 4)
    jitted = jax.jit(torch2jax(lambda x: model(x, GRID * 1), lower=True))
    np.testing.assert_allclose(
        jitted(*arrays_of(x)), model(x, GRID).detach().numpy(), rtol=2e-5, atol=2e-6
    )


def test_values_of_buffers() -> None:
    model, x = Stored(), torch.randn(10, 4)
    expected = expect(model, x)
    apply, variables = from_module(model, lower=True)
    (_, out), grads = jax.jit(step_of(apply, variables))(variables["params"], *arrays_of(x))
    compare(out, grads, expected)


def test_without_values_the_error_says_what_to_do() -> None:
    apply, variables = from_module(Vision(), lower=True)
    arrays = arrays_of(torch.randn(10, 4), GRID)
    with pytest.raises(Torch2JaxError, match=r"asks for the values(.|\n)*give examples"):
        jax.jit(apply)(variables, *arrays)
    assert apply(variables, *arrays).shape == (10, 3)


class Selects(nn.Module):
    """It gives the rows that a mask selects, as many as the text has tokens for."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.checks = checks
        self.layer = nn.Linear(4, 4)

    def forward(self, ids: Any, mask: Any, x: Any) -> Any:
        y = self.layer(x)
        rows = y[torch.from_numpy(mask.numpy() > 0)]
        if self.checks and int((ids.numpy() == 3).sum()) != rows.shape[0]:
            raise ValueError("rows and tokens differ")
        return y * 2, rows


class AroundSelects(nn.Module):
    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.inner = Selects(checks)
        self.outer = nn.Linear(4, 4)

    def forward(self, ids: Any, mask: Any, x: Any) -> Any:
        y, rows = self.inner(ids + 1, mask * 1, self.outer(x))
        return y, rows


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("kind", [Selects, AroundSelects])
def test_what_made_up_zeros_select_is_not_taken_for_the_shape(kind: Any, checks: bool) -> None:
    model = kind(checks)
    ids = np.array([1, 3, 3, 0] if kind is Selects else [0, 2, 2, 0], np.int32)
    given = ids, np.array([0, 1, 1, 0], np.int32), np.arange(16, dtype=np.float32).reshape(4, 4)
    apply, variables = from_module(model, lower=True)
    what = "asks for values.*rows and tokens differ" if checks else "depends on the values"
    with pytest.raises(Torch2JaxError, match=f"(?s){what}"):
        jax.jit(apply)(variables, *given)
    if not checks:  # any mask goes, so that an eager call would show one of many shapes
        return
    want = model(*map(torch.from_numpy, given))
    for call in (apply, jax.jit(apply)):  # the first one shows the second one what it needs
        for a, b in zip(call(variables, *given), want, strict=True):
            np.testing.assert_allclose(a, b.detach(), 1e-5, 1e-6)
    grads = jax.jit(jax.grad(lambda v: (apply(v, *given)[1] ** 2).sum()))(variables)
    want[1].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        np.testing.assert_allclose(grads["params"][name], p.grad, 2e-5, 1e-5)


class Chosen(nn.Module):
    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return x[: int(grid.sum())]


class SumOfChosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.chosen = nn.Linear(4, 4), Chosen()

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return self.chosen(self.inner(x), grid).sum(0)


def test_a_shape_that_follows_values_stays_inside() -> None:
    """The module around takes its place, so that other values are right, too."""
    model, x = SumOfChosen(), torch.randn(12, 4)
    apply, variables = from_module(model, lower=True)
    jitted = jax.jit(apply)
    for grid in (GRID, GRID - 1, GRID):
        out = jitted(variables, *arrays_of(x, grid))
        np.testing.assert_allclose(out, model(x, grid).detach().numpy(), rtol=2e-5, atol=2e-6)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.calls, self.last = Vision(), 0, None

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x * 2  # type: ignore[assignment]
        return self.vision(x, grid)


def test_a_rehearsal_leaves_nothing() -> None:
    model, x = Counts(), torch.randn(10, 4)
    f = torch2jax(lambda x, grid: model(x, grid), lower=True)
    out = f(*arrays_of(x, GRID))
    assert model.calls == 1  # as after one trace without questions
    np.testing.assert_allclose(out, model(x, GRID).detach().numpy(), rtol=2e-5, atol=2e-6)
    model.last = None
    gc.collect()
    kept = [t for t in gc.get_objects() if type(t) is Tensor and isinstance(t._cell.array, Tracer)]
    assert kept == []


def test_random_numbers_and_other_transforms() -> None:
    model, x = nn.ModuleList([Vision(), nn.Dropout(0.5)]), torch.randn(10, 4)

    def run(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return model[1].train()(model[0](x, grid))

    f = torch2jax(run, lower=True, stochastic=True)
    key, arrays = jax.random.key(1), arrays_of(x, GRID)
    out = np.asarray(f(*arrays, rng=key))
    expected = model[0](x, GRID).detach().numpy()
    np.testing.assert_allclose(out, np.where(out == 0, 0, expected * 2), rtol=2e-5, atol=2e-6)
    assert 0.2 < (out == 0).mean() < 0.8
    np.testing.assert_array_equal(out, jax.jit(f)(*arrays, rng=key))
    xs = torch.randn(3, 10, 4)
    batched = jax.vmap(torch2jax(model[0], lower=True), in_axes=(0, None))
    got = batched(jnp.asarray(xs.numpy()), arrays[1])
    wanted = torch.stack([model[0](x, GRID) for x in xs]).detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


def test_in_a_function_that_the_device_compiles() -> None:
    device.enable()
    model, x = Coarse(), torch.randn(20, 4)
    expected = model(x, GRID).detach().numpy()
    jitted = device.jit(copy.deepcopy(model).to("jax"))
    for _ in range(3):
        out = jitted(x.to("jax"), GRID.to("jax"))
        np.testing.assert_allclose(out.detach().jax(), expected, rtol=2e-5, atol=2e-6)
