"""jax2torch under torch.compile, and its custom operator by PyTorch's own checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import pytest
import torch

from torch2jax import Torch2JaxError, jax2torch
from torch2jax._compat.jax import settings

dynamo = pytest.importorskip("torch._dynamo")
if not hasattr(dynamo, "nonstrict_trace"):
    pytest.skip("this torch has no nonstrict_trace", allow_module_level=True)

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp(d: Any, scale: Any) -> Any:
    return {"y": jnp.tanh(d["x"] @ d["w"]) * scale, "n": jnp.arange(3)}


def tensors(n: int = 4) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(n)
    return [torch.randn(s, generator=gen, requires_grad=True) for s in [(n, 3), (3, 5)]]


def compiled(fn: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_gradients_and_shapes(backend: str) -> None:
    f = jax2torch(mlp)
    g = compiled(lambda x, w: f({"x": 2 * x, "w": w}, scale=2.0)["y"] + 1, backend)
    for n in (4, 7, 9):
        x, w = tensors(n)
        expected = torch.tanh((2 * x) @ w) * 2 + 1
        got = g(x, w)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.pow(2).sum(), (x, w)),
            torch.autograd.grad(expected.pow(2).sum(), (x, w)),
            atol=1e-4,
            rtol=1e-4,
        )
        with torch.no_grad():
            torch.testing.assert_close(g(x, w), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_inside(backend: str) -> None:
    f = jax2torch(mlp)
    x, w = (t.detach() for t in tensors())

    def one(x: torch.Tensor) -> torch.Tensor:
        return f({"x": x, "w": w}, 2.0)["y"].sum()

    def twin(x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w) * 2).sum()

    for transform in (
        torch.func.vmap,
        torch.func.grad,
        lambda f: torch.func.vmap(torch.func.grad(f)),
    ):
        got = compiled(transform(one), backend)(x)
        torch.testing.assert_close(got, transform(twin)(x))


def test_a_graph_without_a_break() -> None:
    f = jax2torch(lambda x, s: jnp.sin(x) * s)
    explained = torch._dynamo.explain(lambda x: f(x, 3).cos() + 1)(torch.ones(3))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_an_argument_that_needs_no_gradient() -> None:
    f = jax2torch(lambda x, i: (x[i], i + 1))
    g = compiled(lambda x, i: f(x, i), "aot_eager")
    x, i = torch.arange(3.0, requires_grad=True), torch.tensor([0, 2])
    y, j = g(x, i)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0, 1]
    assert j.tolist() == [1, 3]


def test_module_in_a_compiled_module() -> None:
    from torch2jax import jax_module

    layer = jax_module(lambda p, x: jnp.tanh(x @ p["w"]), {"w": jnp.ones((3, 2))})
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), layer)
    x = torch.randn(5, 4)
    got = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, net(x))
    got.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# PyTorch 2.14 hides its own warning where it is printed, which comes too late for an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    from torch2jax._jax2torch import graph_operator, graph_sites

    f = jax2torch(lambda x, s, w, n: (jnp.tanh(x @ w) * s, jnp.exp(x) * n))
    x, w = tensors()
    entry, operands = f._flatten((x, 2.0, w, 3), {})  # type: ignore[attr-defined]
    kinds = tuple(map(graph_sites.kind_of, operands))
    for program in (
        entry.program,
        entry.program.emission((0, 2)),
        entry.program.batch((0, None, None, None)),
    ):
        for given in ([x, w], [x.detach(), w.detach()]):
            site = graph_sites.Site.of(program, kinds, 4, 0, settings())
            torch.library.opcheck(graph_operator._op, (given, [2.0], [3], site.name))


def test_derivatives_of_the_operator() -> None:
    from torch2jax._jax2torch import graph_operator

    f = jax2torch(lambda x, w: jnp.tanh(x @ w))
    x, w = tensors()
    entry, operands = f._flatten((x, w), {})  # type: ignore[attr-defined]
    (y,), _ = graph_operator.apply_in_graph(entry.program, operands)
    expected = torch.tanh(x @ w)
    torch.testing.assert_close(y, expected)
    got, wanted = (
        torch.autograd.grad(z.pow(2).sum(), (x, w), create_graph=True) for z in (y, expected)
    )
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(g[0].pow(2).sum(), (x, w)) for g in (got, wanted))
    )


def test_a_name_from_elsewhere_is_an_error() -> None:
    from torch2jax._jax2torch import graph_operator

    with pytest.raises(Torch2JaxError, match="is gone"):
        graph_operator._op([torch.ones(2)], [], [], "f/0/0")


def test_float64_in_a_graph_is_an_error() -> None:
    f = jax2torch(jnp.sin)
    with pytest.raises(Exception) as info:  # noqa: PT011  # of torch.compile, with ours beneath it
        compiled(lambda x: f(x), "eager")(torch.ones(3, dtype=torch.float64))
    error: BaseException | None = info.value
    while error is not None and "jax_enable_x64" not in str(error):
        error = error.__cause__ or error.__context__
    assert error is not None


def test_linearize_and_make_fx_record_the_call() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    f = jax2torch(lambda x, w: jnp.tanh(x @ w))
    x, w = (t.detach() for t in tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.func.linearize itself
        _, push = torch.func.linearize(lambda x: f(x, w), x)
        _, expected = torch.func.linearize(lambda x: torch.tanh(x @ w), x)
    for t in (x, 2 * x, x.cos()):
        torch.testing.assert_close(push(t), expected(t))
    graph = make_fx(lambda x: f(x, w))(x)
    torch.testing.assert_close(graph(3 * x), torch.tanh(3 * x @ w))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    f = jax2torch(lambda x: {"y": jnp.tanh(x).sum(0)})
    with FakeTensorMode():
        out = f(torch.empty(4, 3, requires_grad=True))["y"]
        assert out.shape == (3,)
        assert out.requires_grad


def test_torch_export() -> None:
    """An exported program calls the function, with gradients, in the process that exported it."""
    f = jax2torch(lambda x, w: jnp.tanh(x @ w))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return f(x, self.w) * 2

    exported = torch.export.export(Layer(), (torch.ones(4, 3),)).module()
    x = torch.randn(4, 3, requires_grad=True)
    for module in (exported, Layer()):
        torch.testing.assert_close(module(x), torch.tanh(x @ torch.ones(3, 2)) * 2)
        (gradient,) = torch.autograd.grad(module(x).sum(), x)
        expected = (2 - 2 * torch.tanh(x @ torch.ones(3, 2)) ** 2) @ torch.ones(2, 3)
        torch.testing.assert_close(gradient, expected)
