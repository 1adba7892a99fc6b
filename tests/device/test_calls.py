"""How many calls and programs eager code on device "jax" takes: whole operators, moving indices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from torch2jax import device, from_module
from torch2jax.device.operators import dispatch
from torch2jax.device.tensors.tensor import Tensor
from torch2jax.device.tracing.events import recorded

device.enable()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that reach the device through PyTorch's dispatcher."""
    found: list[str] = []

    def noted(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found.append(func.name())
        return dispatch.dispatch(func, types, args, kwargs)

    monkeypatch.setattr(Tensor, "__torch_dispatch__", classmethod(noted))
    return found


_compilations = [0]


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    _compilations[0] += "backend_compile" in event


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture
def compilations() -> list[int]:
    """How many programs XLA has compiled, not counting JAX's own for ``asarray`` of a number."""
    for number in (0.25, 1):
        jax.numpy.asarray(number)
    _compilations[0] = 0
    return _compilations


def tensors(shapes: Any, dtype: torch.dtype, place: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, dtype=dtype, generator=generator) for s in shapes]
    return [x.to(place).requires_grad_() for x in made]


def close(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-4, atol=1e-4)


# --- whole operators -----------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (torch.nn.functional.linear, ((5, 4), (3, 4), (3,))),
    "linear rows": (torch.nn.functional.linear, ((2, 5, 4), (3, 4), (3,))),
    "linear vector": (torch.nn.functional.linear, ((4,), (3, 4), (3,))),
    "linear no bias": (torch.nn.functional.linear, ((5, 4), (3, 4))),
    "linear no rows": (torch.nn.functional.linear, ((0, 4), (3, 4), (3,))),
    "linear to a number": (torch.nn.functional.linear, ((5, 4), (4,))),
    "matmul": (torch.matmul, ((5, 4), (4, 3))),
    "matmul dot": (torch.matmul, ((4,), (4,))),
    "matmul of rows": (torch.matmul, ((6, 1, 5, 4), (2, 4, 3))),
    "matmul of a vector": (torch.matmul, ((4,), (2, 4, 3))),
    "matmul with itself": (lambda x: x @ x, ((4, 4),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_derivatives(name: str, dtype: torch.dtype) -> None:
    fn, shapes = PRODUCTS[name]
    results = []
    for place in ("jax", "cpu"):
        xs = tensors(shapes, dtype, place)
        y = fn(*xs)
        weights = torch.arange(1.0, y.numel() + 1).reshape(y.shape).to(place) / 8
        first = torch.autograd.grad((y * weights).abs().sum(), xs)
        y = fn(*xs)
        graph = torch.autograd.grad((y * y.conj() * weights).sum().real, xs, create_graph=True)
        total = torch.stack([(g.abs() ** 2).sum() for g in graph]).sum()
        second = torch.autograd.grad(total, xs)
        results.append((y, *first, *graph, *second))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    xs, ys = (tensors(((8, 512), (4, 512), (4,)), dtype, p) for p in ("jax", "cpu"))
    for x in (xs, ys):
        torch.nn.functional.linear(*x).float().square().mean().backward()
    for x, y in zip(xs, ys, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype is dtype
        torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=0.05, atol=0.05)


def test_a_layer_is_one_call_each_way(calls: list[str]) -> None:
    layer = torch.nn.Linear(4, 3).to("jax")
    x = torch.randn(5, 4, device="jax", requires_grad=True)
    g = torch.ones(5, 3, device="jax")
    calls.clear()
    y = layer(x)
    torch.autograd.grad(y, [x, layer.weight, layer.bias], g)
    assert calls == []  # past the dispatcher


def test_a_layer_in_forward_mode_and_in_transforms() -> None:
    layer = torch.nn.Linear(4, 3)
    ours = copy.deepcopy(layer).to("jax")
    x, t = (torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.to(p), t.to(p)) for p in ("jax", "cpu")]
        ends = [forward_ad.unpack_dual(f(d)) for f, d in zip((ours, layer), duals, strict=True)]
        close(ends[0].primal, ends[1].primal)
        close(ends[0].tangent, ends[1].tangent)
    close(torch.func.vmap(ours)(x.to("jax")), layer(x))
    close(
        torch.func.grad(lambda x: ours(x).sin().sum())(x.to("jax")),
        torch.func.grad(lambda x: layer(x).sin().sum())(x),
    )
    w = x.to("jax").requires_grad_()
    many = torch.eye(3, device="jax").reshape(3, 1, 3).expand(3, 5, 3)
    (rows,) = torch.autograd.grad(ours(w), w, many, is_grads_batched=True)
    close(rows, layer.weight.detach().reshape(3, 1, 4).expand(3, 5, 4))


def test_what_a_derivative_does_not_read_may_change() -> None:
    for place in ("jax", "cpu"):
        x, w, b = tensors(((5, 4), (3, 4), (3,)), torch.float32, place)
        frozen = x.detach()
        y = torch.nn.functional.linear(frozen, w, b)
        with torch.no_grad():
            w.add_(1)
            b.add_(1)
        y.sum().backward()  # of w and b: neither is read
        y = torch.nn.functional.linear(frozen, w, b)
        frozen.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("way", ["eager", "device.jit", "device.jit of a module", "lower=True"])
def test_a_layer_is_one_operator(way: str) -> None:
    layer, rows = torch.nn.Linear(3, 2), np.ones((4, 3), np.float32)
    x: Any = torch.tensor(rows).to("jax")
    with recorded() as events:
        if way == "lower=True":
            apply, variables = from_module(layer, lower=True)
            jax.grad(lambda v: apply(v, rows).sum())(variables)
        elif way == "device.jit of a module":
            call = device.jit(layer.to("jax"))
            for _ in range(2):
                call(x).sum().backward()
        else:
            layer.to("jax")

            def step() -> None:
                layer(x).sum().backward()

            call = device.jit(step) if way == "device.jit" else step
            for _ in range(2):
                call()
    names = {name for name, _, _ in events.counts}
    assert "aten.linear.default" in names
    assert not names & {"aten.addmm.default", "aten.mm.default", "aten.t.default"}


def test_a_mode_sees_the_parts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer = torch.nn.Linear(4, 3)
    found = []
    for place in ("jax", "cpu"):
        with FlopCounterMode(display=False) as counter:
            layer.to(place)(torch.ones(5, 4, device=place)).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


# --- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS = [
    *("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam"),
    *("ASGD", "Rprop"),
]
CAPTURABLE = [name for name in OPTIMIZERS if name not in ("SGD", "Adagrad")]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in OPTIMIZERS] + [(name, {"capturable": True}) for name in CAPTURABLE],
)
def test_optimizers_take_all_parameters_at_once(
    name: str, options: dict[str, Any], calls: list[str]
) -> None:
    torch.manual_seed(0)
    cpu = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    ours = copy.deepcopy(cpu).to("jax")
    x = torch.randn(5, 4)
    for module, data, given in ((cpu, x, {}), (ours, x.to("jax"), options)):
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.05, **given)
        for _ in range(3):
            optimizer.zero_grad()
            module(data).square().mean().backward()
            calls.clear()
            optimizer.step()
    assert any(c.startswith("aten::_foreach_") for c in calls)
    for p, q in zip(ours.parameters(), cpu.parameters(), strict=True):
        close(p, q)


# --- indices that move ---------------------------------------------------------------------------

ROWS = 24
LOOPS: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "read": lambda x, i: x[i] + 1,
    "from the end": lambda x, i: x[-i - 1] + 1,
    "out": lambda x, i: x[i].clone(),
    "add_": lambda x, i: x[i].add_(1),
    "assign a number": lambda x, i: x.__setitem__(i, 0.5 * i),
    "assign a tensor": lambda x, i: x.__setitem__(i, x[0]),
    "one element": lambda x, i: x[i, i % 4].mul_(2),
    "item": lambda x, i: x[i, 1].item(),
    "slice": lambda x, i: x[i : i + 5].add_(1),
    "slice with steps": lambda x, i: x[i : i + 9 : 2].add_(1),
    "narrow": lambda x, i: x.narrow(0, i, 3).sum(),
    "view of a view": lambda x, i: x.t()[1:, i : i + 2].mul_(2),
    "a part twice": lambda x, i: x[i : i + 4][1:3].mul_(2),
    "two views": lambda x, i: x[i].copy_(x[i + 1]),
    "diagonal": lambda x, i: x[i : i + 4].diagonal().fill_(2),
    "unbind": lambda x, i: x.unbind(0)[i].add_(1),
    "split": lambda x, i: x.split(2)[i % 12].add_(1),
    "slice_scatter": lambda x, i: x.slice_scatter(x[:3], 0, i, i + 3),
    "slice_scatter to the end": lambda x, i: x[-4:].slice_scatter(x[:1], 0, -(i % 4) - 1, None, 9),
    "select_scatter": lambda x, i: x.select_scatter(x[0], 0, i - 6),
    "roll": lambda x, i: x.roll(i - 6, 0),
    "roll of two": lambda x, i: x.roll((i, -i), (0, 1)),
    "roll of all": lambda x, i: x.roll(i * 7),
    "rows": lambda x, i: x[[i, i + 1]],
    "index_select": lambda x, i: x.index_select(0, torch.tensor([i], device=x.device)),
    "index_fill": lambda x, i: x.index_fill(0, torch.tensor([i], device=x.device), 0.5 * i),
    "full": lambda x, i: torch.full((3,), 0.5 * i, device=x.device),
    "full of whole numbers": lambda x, i: torch.full((3,), i, device=x.device),
    "full_like": lambda x, i: torch.full_like(x, i),
    "new_full": lambda x, i: x.new_full((2,), i),
    "scatter": lambda x, i: x.scatter(0, torch.tensor([[i, 1]], device=x.device), 0.5 * i),
    "gradient of a row": lambda x, i: gradient(x, lambda w: w[i].square().sum()),
    "gradient of a slice": lambda x, i: gradient(x, lambda w: w[i : i + 3].square().sum()),
}


def gradient(x: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    w = x.detach().requires_grad_()
    return torch.autograd.grad(fn(w), w)[0]


def matrix(place: str) -> torch.Tensor:
    return (torch.arange(ROWS * 4.0).reshape(ROWS, 4) / 16).to(place)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_over_an_index_compiles_once(name: str, compilations: list[int]) -> None:
    fn = LOOPS[name]
    x, y = matrix("jax"), matrix("cpu")
    for i in range(ROWS // 2):
        if i == 2:
            compilations[0] = 0
        ours, theirs = fn(x, i), fn(y, i)
        if isinstance(theirs, torch.Tensor):
            close(ours, theirs)
        close(x, y)
    assert compilations[0] == 0
    for i in range(ROWS // 2):  # a second time over the same views
        fn(x, i)
    assert compilations[0] == 0


def test_a_trace_has_numbers() -> None:
    """XLA does better with indices that it knows."""

    @jax.jit
    def row(a: jax.Array) -> jax.Array:
        view: Any = device.tensor(a)[3, 1:3]
        return view.jax()

    a = np.arange(20.0, dtype=np.float32).reshape(5, 4)
    assert "dynamic" not in row.lower(a).as_text()
    np.testing.assert_array_equal(row(a), a[3, 1:3])


def test_the_same_slice_of_tensors_of_other_sizes() -> None:
    for n in (3, 5, 8, 3):
        x = torch.arange(n)
        y = x.to("jax")
        for view in (lambda x: x[-1], lambda x: x[:5], lambda x: x[-4:], lambda x: x[1::2]):
            close(view(y), view(x))
            view(y).add_(1)
            view(x).add_(1)
            close(y, x)


def test_indices_out_of_range() -> None:
    x = matrix("jax")
    for i in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match="out of"):
            x[i]
    assert x[ROWS:].shape == (0, 4)
