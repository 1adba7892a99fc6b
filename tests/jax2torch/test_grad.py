"""jax2torch: every derivative and batch that PyTorch knows, against PyTorch's own or numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import pytest
import torch
import torch.autograd.forward_ad as fwad
from harness import precision
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from torch2jax import jax2torch

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with precision(True):
        yield


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=dtype, generator=gen).requires_grad_()


def positive(*shape: int) -> torch.Tensor:
    return (rand(*shape).detach().abs() + 0.5).requires_grad_()


def spd(n: int) -> torch.Tensor:
    a = rand(n, n).detach()
    return (a @ a.T + n * torch.eye(n, dtype=a.dtype)).requires_grad_()


def comp(*shape: int) -> torch.Tensor:
    return rand(*shape, dtype=torch.complex128)


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return jnp.sin(x)


clipped.defvjp(lambda x: (clipped(x), x), lambda x, c: (c * jnp.cos(x),))


@jax.custom_jvp
def softsign(x: Any) -> Any:
    return x / (1 + x * x)


@softsign.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return softsign(x), t * (1 - x * x) / (1 + x * x) ** 2


def ode(x: Any, k: Any) -> Any:
    """Ten steps of Runge and Kutta's midpoint rule."""

    def step(v: Any, _: Any) -> Any:
        half = v + 0.05 * jnp.sin(k * v)
        v = v + 0.1 * jnp.sin(k * half)
        return v, v.sum()

    return jax.lax.scan(step, x, None, length=10)


CASES: dict[str, tuple[Function, list[Any]]] = {
    "sin": (jnp.sin, [rand(3)]),
    "0-d": (lambda x: x * jnp.exp(x), [rand()]),
    "identity": (lambda x: x, [rand(3)]),
    "two results": (lambda x: (jnp.exp(x), x.sum()), [rand(3)]),
    "mlp": (lambda x, w, b: jnp.tanh(x @ w + b), [rand(2, 3), rand(3, 2), rand(2)]),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), [rand(2, 3)]),
    "logsumexp": (lambda x: jsp.special.logsumexp(x, axis=0), [rand(3, 2)]),
    "prod": (jnp.prod, [positive(3)]),
    "cumsum": (lambda x: jnp.cumsum(x**2, 1), [rand(2, 3)]),
    "norm": (lambda x: jnp.linalg.norm(x, axis=-1), [positive(2, 3)]),
    "layer norm": (
        lambda x, g: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3) * g,
        [rand(2, 4), rand(4)],
    ),
    "attention": (
        lambda q, k, v: jax.nn.softmax(q @ k.T) @ v, [rand(2, 3), rand(2, 3, seed=1), rand(2, 2)]
    ),
    "conv": (
        lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), [rand(1, 2, 3, 3), rand(1, 2, 2, 2)]
    ),
    "einsum": (lambda a, b: jnp.einsum("ij,jk->ik", a, b), [rand(2, 3), rand(3, 2)]),
    "solve": (jnp.linalg.solve, [spd(3), rand(3, 2)]),
    "inverse": (jnp.linalg.inv, [spd(3)]),
    "cholesky": (lambda a: jnp.linalg.cholesky((a + a.T) / 2), [spd(2)]),
    "logdet": (lambda a: jnp.linalg.slogdet(a)[1], [spd(3)]),
    "eigh": (lambda a: jnp.linalg.eigvalsh(a + a.T), [spd(3)]),
    "expm": (jsp.linalg.expm, [rand(2, 2)]),
    "gather": (lambda x, i: x[i] ** 2, [rand(4), torch.tensor([0, 2, 2])]),
    "scatter": (lambda x, i: jnp.zeros(5).at[i].add(x**2), [rand(3), torch.tensor([0, 2, 2])]),
    "sort": (lambda x: jnp.sort(x) ** 2, [rand(4)]),
    "where": (lambda x, m: jnp.where(m, jnp.sin(x), x**3), [rand(3), torch.tensor([True, False, True])]),
    "scan": (ode, [rand(2), rand()]),
    "fori": (lambda x: jax.lax.fori_loop(0, 3, lambda i, v: v * jnp.sin(x), x), [rand(2)]),
    "cond": (lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), [rand(3)]),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))), [rand(3)]),
    "inner vmap": (lambda x: jax.vmap(lambda r: jnp.sin(r).sum() * r)(x), [rand(2, 2)]),
    "inner grad": (jax.grad(lambda x: (jnp.sin(x) * x).sum()), [rand(3)]),
    "weak scalar": (lambda x, s: x**2 * s, [rand(3), 1.5]),
    "tree": (lambda d: {"y": d["a"] * d["b"][0]}, [{"a": rand(2), "b": [rand(2, seed=3)]}]),
    "constant result": (lambda x: (jnp.sin(x), jnp.arange(3), jnp.ones(2)), [rand(2)]),
    "integer result": (lambda x: (x**2, jnp.argmax(x)), [rand(3)]),
    "custom jvp": (softsign, [rand(3)]),
    "complex exp": (jnp.exp, [comp(2)]),
    "complex product": (lambda a, b: a * jnp.conj(b), [comp(2), comp(2)]),
    "complex abs": (jnp.abs, [comp(2)]),
    "complex to real": (lambda z: (jnp.real(z) ** 2, jnp.imag(z) ** 3), [comp(2)]),
    "real to complex": (lambda x: jnp.exp(1j * x), [rand(2)]),
    "mixed": (lambda x, z: (x * z).sum(), [rand(2), comp(2)]),
    "fft": (lambda x: jnp.fft.fft(x), [rand(4)]),
    "complex solve": (jnp.linalg.solve, [(comp(2, 2).detach() + 3 * torch.eye(2)).requires_grad_(), comp(2, 1)]),
}  # fmt: skip


def flat(name: str) -> tuple[Function, list[torch.Tensor]]:
    """A case as a function of the tensors that ask for gradients, with inexact results alone."""
    fn, args = CASES[name]
    f = jax2torch(fn)
    leaves, treedef = jax.tree.flatten(args)
    asking = [isinstance(x, torch.Tensor) and x.requires_grad for x in leaves]

    def g(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        full = [next(given) if asks else x for x, asks in zip(leaves, asking, strict=True)]
        outs = jax.tree.leaves(f(*treedef.unflatten(full)))
        return tuple(o for o in outs if o.is_floating_point() or o.is_complex())

    return g, [x for x, asks in zip(leaves, asking, strict=True) if asks]


def independent(name: str) -> bool:
    """Whether a result does not depend on the arguments: gradcheck wants a gradient of each."""
    return name == "constant result"


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    f, args = flat(name)
    if independent(name):
        f = (lambda f: lambda *xs: f(*xs)[:1])(f)
    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(
        f, args, check_backward_ad=False, check_forward_ad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name: str) -> None:
    f, args = flat(name)
    if independent(name):
        f = (lambda f: lambda *xs: f(*xs)[:1])(f)
    if name == "identity":
        f = (lambda f: lambda x: f(f(x)[0] ** 2))(f)
    assert gradgradcheck(f, args, check_fwd_over_rev=True, check_batched_grad=True)


# --- torch.func ----------------------------------------------------------------------------------


def network(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w).sum(-1) ** 2


def twin(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w).sum(-1) ** 2


F = torch.func
TRANSFORMS: dict[str, Callable[[Function, torch.Tensor, torch.Tensor], Any]] = {
    "grad": lambda f, x, w: F.grad(lambda x: f(x, w).sum())(x),
    "grad and value": lambda f, x, w: F.grad_and_value(lambda x: f(x, w).sum())(x),
    "vjp": lambda f, x, w: F.vjp(f, x, w)[1](torch.ones_like(x[:, 0])),
    "jvp": lambda f, x, w: F.jvp(f, (x, w), (2 * x, w)),
    "vmap": lambda f, x, w: F.vmap(f, (0, None))(x, w),
    "vmap, dims": lambda f, x, w: F.vmap(f, (1, None))(x.T, w),
    "vmap, both": lambda f, x, w: F.vmap(f)(x, w.expand(3, *w.shape)),
    "vmap in chunks": lambda f, x, w: F.vmap(f, (0, None), chunk_size=2)(x, w),
    "vmap of vmap": lambda f, x, w: F.vmap(F.vmap(f, (None, 0)), (0, None))(x, torch.stack([w, 2 * w])),
    "jacrev": lambda f, x, w: F.jacrev(f, (0, 1))(x, w),
    "jacfwd": lambda f, x, w: F.jacfwd(f, (0, 1))(x, w),
    "hessian": lambda f, x, w: F.hessian(lambda w: f(x, w).sum())(w),
    "jacrev of jacrev": lambda f, x, w: F.jacrev(F.jacrev(lambda w: f(x, w)))(w),
    "jacrev of jacfwd": lambda f, x, w: F.jacrev(F.jacfwd(lambda w: f(x, w)))(w),
    "jacfwd of jacfwd": lambda f, x, w: F.jacfwd(F.jacfwd(lambda w: f(x, w)))(w),
    "third": lambda f, x, w: F.jacrev(F.jacfwd(F.jacrev(lambda v: f(v, w))))(x[0]),
    "vmap of grad": lambda f, x, w: F.vmap(F.grad(f), (0, None))(x, w),
    "grad of vmap": lambda f, x, w: F.grad(lambda w: F.vmap(f, (0, None))(x, w).sum())(w),
    "grad of vmap of grad": lambda f, x, w: F.grad(
        lambda w: (F.vmap(F.grad(f), (0, None))(x, w) ** 2).sum()
    )(w),
    "vmap of hessian": lambda f, x, w: F.vmap(F.hessian(f), (0, None))(x, w),
    "hvp": lambda f, x, w: F.jvp(F.grad(lambda w: f(x, w).sum()), (w,), (w,))[1],
    "vmap of jvp": lambda f, x, w: F.vmap(lambda t: F.jvp(lambda x: f(x, w), (x,), (t,))[1])(
        torch.stack([x, 2 * x])
    ),
    "autograd jacobian": lambda f, x, w: torch.autograd.functional.jacobian(f, (x, w)),
    "vectorized jacobian": lambda f, x, w: torch.autograd.functional.jacobian(
        f, (x, w), vectorize=True
    ),
    "vectorized forward jacobian": lambda f, x, w: torch.autograd.functional.jacobian(
        f, (x, w), vectorize=True, strategy="forward-mode"
    ),
    "vectorized hessian": lambda f, x, w: torch.autograd.functional.hessian(
        lambda w: f(x, w).sum(), w, vectorize=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("asks", [False, True], ids=["plain", "requires_grad"])
def test_transforms(name: str, asks: bool) -> None:
    x, w = rand(3, 2).detach().requires_grad_(asks), rand(2, 4).detach().requires_grad_(asks)
    got = TRANSFORMS[name](jax2torch(network), x, w)
    expected = TRANSFORMS[name](twin, x, w)
    torch.testing.assert_close(got, expected)
    got, expected = jax.tree.leaves(got)[-1], jax.tree.leaves(expected)[-1]
    if asks and expected.requires_grad:
        assert got.requires_grad
        ours, torchs = (
            torch.autograd.grad((y * y).sum(), (x, w), allow_unused=True) for y in (got, expected)
        )
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_backward(create_graph: bool) -> None:
    x, w = rand(3, 2), rand(2, 4)
    basis = torch.eye(3, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(
            f(x, w), (x, w), basis, is_grads_batched=True, create_graph=create_graph
        )
        for f in (jax2torch(network), twin)
    )
    torch.testing.assert_close(got, expected)
    if create_graph:
        ours, torchs = (torch.autograd.grad((g[0] ** 2).sum(), (x, w)) for g in (got, expected))
        torch.testing.assert_close(ours, torchs)


def test_forward_mode() -> None:
    x, w = rand(3, 2), rand(2, 4)
    with fwad.dual_level():
        got, expected = (
            fwad.unpack_dual(f(fwad.make_dual(x, x.detach()), w)).tangent
            for f in (jax2torch(network), twin)
        )
        torch.testing.assert_close(got, expected)
        ours, torchs = (torch.autograd.grad(t.sum(), (x, w)) for t in (got, expected))
        torch.testing.assert_close(ours, torchs)


def test_custom_vjp_has_first_and_second_derivatives() -> None:
    f = jax2torch(clipped)
    x = rand(3)
    assert gradcheck(f, x)
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), x)[0], -torch.sin(x))
    with pytest.raises(TypeError, match="forward-mode"):
        torch.func.jvp(f, (x.detach(),), (x.detach(),))


# --- what autograd asks of an operator -----------------------------------------------------------


def test_only_what_asks_gets_a_gradient() -> None:
    f = jax2torch(lambda x, i, y: (x[i] * y, i + 1))
    x, y, i = rand(3), rand(3).detach(), torch.tensor([0, 1, 2])
    out, j = f(x, i, y)
    assert out.requires_grad
    assert not j.requires_grad
    assert j.tolist() == [1, 2, 3]
    out.sum().backward()
    torch.testing.assert_close(x.grad, y)
    assert y.grad is None
    assert not f(x.detach(), i, y)[0].requires_grad


def test_unused_arguments_and_results() -> None:
    f = jax2torch(lambda x, y: (jnp.sin(x), jnp.cos(x), x.astype(int)))
    x, y = rand(3), rand(3)
    a, b, _ = f(x, y)
    torch.testing.assert_close(
        torch.autograd.grad(b.sum(), (x, y)), (-torch.sin(x), torch.zeros_like(y))
    )
    a, b, _ = f(x, y)
    (a.sum() + b.sum()).backward()
    torch.testing.assert_close(x.grad, torch.cos(x) - torch.sin(x))


def test_retain_graph() -> None:
    x = rand(3)
    y = jax2torch(lambda x: jnp.sin(jnp.sin(x)))(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    second = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_hooks_on_graph_and_tensors() -> None:
    x = rand(3)
    seen = []
    y = jax2torch(jnp.sin)(x)
    y.register_hook(lambda g: seen.append(g) or 2 * g)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()))
    assert len(seen) == 1


def test_same_tensor_twice() -> None:
    x = rand(3)
    jax2torch(lambda a, b: a * b)(x, x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_saved_tensor_hooks_see_everything() -> None:
    f = jax2torch(lambda x: jnp.sin(jnp.sin(x)))
    x = rand(300)
    packed: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        y = f(x)
    assert len(packed) >= 2
    with torch.autograd.graph.save_on_cpu():
        z = f(x)
    expected = torch.cos(torch.sin(x)) * torch.cos(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    traces = []

    def body(x: Any, w: Any) -> Any:
        traces.append(1)
        return network(x, w)

    f = jax2torch(body)
    x, w = rand(3, 2), rand(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = checkpoint(lambda x, w: f(x, w) * 2, x, w, use_reentrant=reentrant)
    torch.testing.assert_close(y, 2 * twin(x, w))
    y.sum().backward()
    expected = torch.autograd.grad(2 * twin(x, w).sum(), (x, w))
    torch.testing.assert_close((x.grad, w.grad), expected)


def test_broadcast_gradients_and_accumulation() -> None:
    f = jax2torch(lambda x, b: x + b)
    x, b = rand(3, 1).expand(3, 4), rand(4)
    for _ in range(2):
        f(x, b).sum().backward(inputs=[b])
    torch.testing.assert_close(b.grad, torch.full((4,), 6.0, dtype=torch.float64))


def test_training_step_equals_pytorchs() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh()).double()
    other = copy.deepcopy(net)
    head = rand(8, 1)
    losses = []
    for model, f in ((net, jax2torch(network)), (other, twin)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = f(model(rand(4, 2).detach()), head.detach()).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-9


def test_half_precision_gradients() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.ones(3, dtype=dtype, requires_grad=True)
        jax2torch(lambda x: x * 3)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype is dtype
        assert x.grad.tolist() == [3, 3, 3]


def test_empty_arguments() -> None:
    x = rand(0, 3)
    y = jax2torch(lambda x: jnp.sin(x).sum(0))(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)
    assert torch.func.vmap(jax2torch(jnp.sin))(rand(2, 0)).shape == (2, 0)
