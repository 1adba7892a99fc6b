"""jax2torch in uses that are odd, but not wrong; and wrong ones, whose errors say what to do."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch2jax import SignatureError, Torch2JaxError, UnsupportedDtypeError, jax2torch, torch2jax

sin = jax2torch(jnp.sin)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def grad(y: torch.Tensor, *xs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y.sum(), xs, **options)


# --- derivatives ---------------------------------------------------------------------------------


TWINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "power": (lambda x, w: x**3 * w**2, lambda x, w: x**3 * w**2),
    "sine": (lambda x, w: jnp.sin(x * w), lambda x, w: torch.sin(x * w)),
    "logistic": (
        lambda x, w: jax.nn.sigmoid(x) * jnp.exp(w),
        lambda x, w: torch.sigmoid(x) * torch.exp(w),
    ),
    "scan": (
        lambda x, w: jax.lax.scan(lambda v, _: (jnp.sin(v * w), None), x, None, length=3)[0],
        lambda x, w: torch.sin(torch.sin(torch.sin(x * w) * w) * w),
    ),
}


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_fourth_derivatives_by_backward(name: str, shape: tuple[int, ...]) -> None:
    results = []
    for f in (jax2torch(TWINS[name][0]), TWINS[name][1]):
        x, w = ones(*shape), (2 * ones(*shape)).detach().requires_grad_()
        y, found = f(x, w), []
        for _ in range(4):
            gx, gw = grad(y, x, w, create_graph=True)
            found += [gx, gw]
            y = gx * gw
        results.append(found)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_functional_products_with_hessians() -> None:
    f = jax2torch(lambda x: (x**3).sum())
    x, v = torch.ones(2), torch.ones(2)
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        assert product(f, x, v)[1].tolist() == [6, 6]


def test_a_gradient_edge() -> None:
    x = ones(3)
    edge = torch.autograd.graph.get_gradient_edge(x)
    (g,) = torch.autograd.grad(sin(x).sum(), edge)
    torch.testing.assert_close(g, torch.cos(x).detach())


def test_every_hook_is_called_once() -> None:
    x, calls = ones(3), []
    y = sin(x)
    y.retain_grad()
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda cotangents: calls.append("before"))
    y.grad_fn.register_hook(lambda gradients, cotangents: calls.append("after"))
    x.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    (2 * y).sum().backward()
    assert calls == ["before", "after", "accumulated"]
    assert y.grad is not None
    assert y.grad.tolist() == [2, 2, 2]


def test_the_same_tensor_twice_to_second_order() -> None:
    x = ones(3)
    (g,) = grad(jax2torch(lambda a, b: a * b)(x, x), x, create_graph=True)
    assert g.tolist() == grad(g, x)[0].tolist() == [2, 2, 2]


def test_three_hundred_arguments() -> None:
    xs = [ones(2) for _ in range(300)]
    jax2torch(lambda xs: sum(xs))(xs).sum().backward()
    assert all(x.grad is not None and x.grad.tolist() == [1, 1] for x in xs)


def test_a_deep_tree() -> None:
    x = ones(2)
    tree: Any = x
    for _ in range(200):
        tree = {"k": [tree]}
    y = jax2torch(lambda tree: jax.tree.map(lambda v: 2 * v, tree))(tree)
    for _ in range(200):
        y = y["k"][0]
    assert grad(y, x)[0].tolist() == [2, 2]


def test_a_chain_of_fifty_calls() -> None:
    x = ones(3)
    y, z = x, x
    for _ in range(50):
        y, z = sin(y), torch.sin(z)
    torch.testing.assert_close(grad(y, x), grad(z, x))


def test_nested_in_vmap_of_grad() -> None:
    inner = torch2jax(lambda x: torch.sin(x))
    f, g = jax2torch(lambda x: inner(x).sum()), jax2torch(lambda x: 2 * x)
    x = torch.randn(3, 4)
    got = torch.func.vmap(torch.func.grad(lambda row: f(g(row))))(x)
    torch.testing.assert_close(got, 2 * torch.cos(2 * x))


def test_an_expanded_cotangent_and_one_of_another_dtype() -> None:
    x = ones(3, 4)
    expected = torch.cos(x).detach()
    (g,) = torch.autograd.grad(sin(x), x, torch.ones(1).expand(3, 4))
    torch.testing.assert_close(g, expected)
    sin(x).backward(torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(x.grad, expected)


def test_an_error_in_the_rule_of_the_function() -> None:
    @jax.custom_vjp
    def f(x: Any) -> Any:
        return x * 1

    def backward(residuals: None, c: Any) -> Any:
        raise ValueError("in the rule")

    f.defvjp(lambda x: (f(x), None), backward)
    x = ones(3)
    y = jax2torch(f)(x)
    with pytest.raises(ValueError, match="in the rule"):
        y.sum().backward()
    sin(x).sum().backward()
    assert x.grad is not None


# --- memory --------------------------------------------------------------------------------------


def test_results_may_be_written_to_before_backward() -> None:
    x = ones(3)
    y = jax2torch(lambda x: 3 * x)(x)
    y.mul_(2)
    assert grad(y, x)[0].tolist() == [6, 6, 6]
    a, b = jax2torch(lambda x: (3 * x, 2 * x))(x)
    a.mul_(2)
    assert grad(a + b, x)[0].tolist() == [8, 8, 8]
    row = torch.func.vmap(lambda x: jax2torch(lambda x: 2 * x)(x).add_(1))
    assert row(torch.ones(3, 2)).tolist() == [[3, 3]] * 3


def test_results_that_are_arguments_are_copies() -> None:
    x = ones(3)
    y, z = jax2torch(lambda x: (x, x))(x)
    assert len({t.data_ptr() for t in (x, y, z)}) == 3
    y.data.fill_(9)
    assert x.tolist() == z.tolist() == [1, 1, 1]
    assert grad(y + z, x)[0].tolist() == [2, 2, 2]


def test_an_optimizer_writes_to_parameters_between_calls() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], 0.1)
    f = jax2torch(lambda p: p * p)
    for _ in range(3):
        optimizer.zero_grad()
        f(p).sum().backward()
        optimizer.step()
    torch.testing.assert_close(p.data, torch.full((3,), 0.8**3))


# --- what PyTorch has switched on ----------------------------------------------------------------


def test_inference_mode() -> None:
    with torch.inference_mode():
        z = torch.ones(3)
        assert sin(ones(3)).is_inference()
    assert torch.equal(sin(z), torch.sin(z))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        jax2torch(lambda a, b: a * b)(z, ones(3))


def test_autocast_changes_no_dtype_of_fn() -> None:
    x = ones(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = jax2torch(lambda x: x @ x)(x)
        z = jax2torch(lambda h: 2 * h)(torch.mm(x, x))
        (y.sum() + z.sum()).backward()
    assert y.dtype is torch.float32
    assert z.dtype is torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype is torch.float32


def test_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(UnsupportedDtypeError, match="jax_enable_x64"):
            sin(torch.ones(2))
        x = torch.ones(2, dtype=torch.float32, requires_grad=True)
        assert grad(sin(x), x)[0].dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_grad_enabled_inside_no_grad() -> None:
    x = ones(3)
    with torch.no_grad():
        assert not sin(x).requires_grad
        with torch.enable_grad():
            assert sin(x).requires_grad


def test_anomaly_detection_names_the_call() -> None:
    f = jax2torch(lambda x: jnp.sqrt(x - 1) * 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow, and the traceback
        with (
            torch.autograd.detect_anomaly(),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            f(ones(3)).sum().backward()


def test_backward_in_another_thread() -> None:
    x = ones(3)
    y = sin(x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None


class Subclass(torch.Tensor):
    pass


def test_a_subclass_is_taken_as_a_tensor() -> None:
    x = torch.ones(3).as_subclass(Subclass).requires_grad_()
    y = sin(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(grad(y, x)[0].as_subclass(torch.Tensor), torch.cos(torch.ones(3)))


# --- functions and arguments ---------------------------------------------------------------------


def test_callables_of_every_kind() -> None:
    class Scale:
        k = 3.0

        def by(self, x: Any) -> Any:
            return x * self.k

        def __call__(self, x: Any) -> Any:
            return x * self.k

    for f in (
        *(Scale().by, Scale(), functools.partial(lambda k, x: k * x, 3.0)),
        *(jax.jit(lambda x: 3 * x), jax.vmap(lambda x: 3 * x)),
        jax.checkpoint(lambda x: 3 * x),  # type: ignore[attr-defined]
    ):
        x = ones(2)
        assert grad(jax2torch(f)(x), x)[0].tolist() == [3, 3]


def test_nothing_as_result() -> None:
    for x in (torch.ones(2), ones(2)):
        assert jax2torch(lambda x: None)(x) is None
        assert jax2torch(lambda x: ())(x) == ()
        nothing, y = jax2torch(lambda x: (None, x))(x)
        assert nothing is None
        assert y.tolist() == [1, 1]


def test_keyword_arguments_in_any_order_have_gradients() -> None:
    x, w = ones(2), torch.full((2,), 3.0, requires_grad=True)
    f = jax2torch(lambda x, *rest, w, **more: (x * w + sum(rest)) * more["z"])
    y = f(x, 1.0, torch.ones(2), z=2.0, w=w)
    assert y.tolist() == [10, 10]
    assert [g.tolist() for g in grad(y, x, w)] == [[6, 6], [2, 2]]


def test_bools_infinities_and_keys() -> None:
    x = torch.ones(2)
    assert jax2torch(lambda x, b: jnp.where(b, x, -x))(x, False).tolist() == [-1, -1]
    assert jax2torch(lambda x, s: x * s)(x, float("inf")).tolist() == [float("inf")] * 2
    key = jax.random.key(0)
    y = jax2torch(lambda key, x: x + jax.random.normal(key, x.shape))(key, x)
    np.testing.assert_allclose(y, 1 + jax.random.normal(key, (2,)))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a meta tensor": (
        lambda: sin(torch.ones(2, device="meta")),
        SignatureError,
        r"args\[0\] of sin.*meta tensor",
    ),
    "a quantized tensor": (
        lambda: sin(torch._empty_affine_quantized([2], scale=0.1, zero_point=0, dtype=torch.qint8)),
        UnsupportedDtypeError,
        r"args\[0\] of sin.*qint8",
    ),
    "a nested tensor": (
        lambda: sin(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        SignatureError,
        r"args\[0\] of sin.*nested.*to_padded_tensor",
    ),
    "a lazy parameter": (
        lambda: sin(torch.nn.UninitializedParameter()),
        SignatureError,
        r"args\[0\] of sin.*not initialized",
    ),
    "a size": (lambda: sin(torch.Size([2])), SignatureError, r"args\[0\] of sin is a Size"),
    "a dtype": (
        lambda: jax2torch(lambda x, d: x.astype(d))(torch.ones(2), torch.float16),
        SignatureError,
        r"args\[1\] of .* is a dtype.*static_argnums",
    ),
    "a large number": (
        lambda: jax2torch(lambda x, n: x * n)(torch.ones(2), 2**40),
        SignatureError,
        r"args\[1\] of .* does not fit JAX's integers",
    ),
    "a keyword too many": (lambda: sin(torch.ones(2), foo=1), SignatureError, "foo"),
    "a static list": (
        lambda: jax2torch(lambda x, c: x, static_argnums=1)(torch.ones(2), [1]),
        SignatureError,
        r"args\[1\] of .* cannot be hashed",
    ),
    "a static tensor": (
        lambda: jax2torch(lambda x, c: x, static_argnames="c")(torch.ones(2), c=torch.ones(2)),
        SignatureError,
        r"kwargs\['c'\] of .* is a tensor.*leave it out",
    ),
    "an object as result": (
        lambda: jax2torch(lambda x: {"a": {1}})(ones(2)),
        SignatureError,
        r"result\['a'\] of .* is a set",
    ),
    "a tensor as result": (
        lambda: jax2torch(lambda x: torch.ones(2))(ones(2)),
        SignatureError,
        "result of .* is a Tensor",
    ),
    "a device that JAX has not": (
        lambda: jax2torch(lambda s: jnp.ones(2) * s, device="meta")(2.0),
        Torch2JaxError,
        "JAX has no device meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_wrong_uses(name: str) -> None:
    use, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        use()
    assert torch.equal(sin(torch.zeros(2)), torch.zeros(2))


def test_a_fake_tensor_outside_of_its_mode_is_an_error() -> None:
    with FakeTensorMode():
        x = ones(2)
        y = sin(x)
        y.sum().backward()
        assert y.shape == (2,)
    assert x.grad is not None
    with pytest.raises(SignatureError, match=r"args\[0\] of sin.*fake tensor"):
        sin(x)
