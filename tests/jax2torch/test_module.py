"""jax_module: models of JAX as torch.nn.Module."""

from __future__ import annotations

import copy
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import check

from torch2jax import SignatureError, jax_module

pytestmark = pytest.mark.optimized


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "params": {"w": rng.normal(size=(3, 2)).astype(np.float32), "forward": jnp.zeros(2)},
        "layers": [jnp.ones(2), (jnp.full(2, 2.0),)],
        "steps": jnp.arange(3),
        "scale": 2.0,
        "act": jnp.tanh,
        "key": jax.random.key(0),
    }


def apply(p: Any, x: Any, *, shift: Any = 0.0) -> Any:
    h = p["act"](x @ p["params"]["w"] + p["params"]["forward"]) * p["scale"] + shift
    return h * p["layers"][0] * p["layers"][1][0] + p["steps"].sum()


def test_parameters_buffers_and_names() -> None:
    module = jax_module(apply, params())
    assert set(dict(module.named_parameters())) == {
        *("params.w", "params.forward_", "layers.0", "layers.1.0")
    }
    assert set(dict(module.named_buffers())) == {"steps"}
    x = torch.randn(4, 3)
    expected = apply(params(), jnp.asarray(x.numpy()), shift=1.0)
    np.testing.assert_allclose(module(x, shift=1.0).detach(), expected, 1e-5)


def test_trains_and_saves() -> None:
    torch.manual_seed(0)
    module = jax_module(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
        {
            "w": jax.random.normal(jax.random.key(0), (2, 16)),
            "v": jax.random.normal(jax.random.key(1), (16,)) / 4,
        },
    )
    x = torch.randn(64, 2)
    y = torch.sin(x).sum(1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), module(x))
    back = module.to_jax()
    np.testing.assert_allclose(back["w"], module.state_dict()["w"])


def test_to_jax_is_a_copy_with_the_constants() -> None:
    module = jax_module(apply, params())
    back = module.to_jax()
    assert jax.tree.structure(back) == jax.tree.structure(params())
    assert back["act"] is jnp.tanh
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    check(back["params"]["w"], jnp.asarray(params()["params"]["w"]))


def test_trainable_and_options() -> None:
    module = jax_module(
        lambda p, x, n: (x * p["a"] * p["b"]) ** n,
        {"a": jnp.ones(2), "b": jnp.ones(2)},
        trainable=lambda name: name != "b",
        static_argnums=1,
    )
    assert [n for n, _ in module.named_parameters()] == ["a"]
    assert [n for n, _ in module.named_buffers()] == ["b"]
    module(torch.ones(2), 3).sum().backward()
    assert module.a.grad.tolist() == [3, 3]


def test_dtype_functional_call_and_ensembles() -> None:
    module = jax_module(lambda p, x: x * p["a"], {"a": jnp.ones(2)})
    assert module.to(torch.bfloat16)(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.bfloat16
    stacked = {"a": torch.arange(6.0).reshape(3, 2)}
    call = lambda p, x: torch.func.functional_call(module, p, (x,))  # noqa: E731
    out = torch.func.vmap(call, (0, None))(stacked, torch.ones(2))
    assert torch.equal(out, stacked["a"])
    grads = torch.func.vmap(torch.func.grad(lambda p, x: call(p, x).sum()), (0, None))(
        stacked, torch.ones(2)
    )
    assert torch.equal(grads["a"], torch.ones(3, 2))


def test_errors() -> None:
    with pytest.raises(SignatureError, match="no leaf that is an array"):
        jax_module(lambda p, x: x, {"a": 1.0})


def test_flax_linen() -> None:
    nn = pytest.importorskip("flax.linen", reason="the extra `flax` is not installed")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))

    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
    module = jax_module(net.apply, variables)
    assert "params.Dense_0.kernel" in module.state_dict()
    compare(module, lambda v, x: net.apply(v, x), variables)


def test_flax_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="the extra `flax` is not installed")

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.a = nnx.Linear(3, 8, rngs=rngs)
            self.b = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.b(nnx.tanh(self.a(x)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))

    def apply(state: Any, x: Any) -> Any:
        return nnx.merge(graphdef, state)(x)

    compare(jax_module(apply, state), apply, state)


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox", reason="the extra `equinox` is not installed")
    model = eqx.nn.MLP(3, 1, 8, 2, key=jax.random.key(0))

    def apply(model: Any, x: Any) -> Any:
        return jax.vmap(model)(x)

    module = jax_module(apply, model)
    array, static = eqx.partition(model, eqx.is_array)
    compare(module, lambda p, x: apply(eqx.combine(p, static), x), array)
    assert "layers.0.weight" in module.state_dict()


def compare(module: Any, apply: Any, params: Any) -> None:
    x = torch.randn(4, 3)
    a = jnp.asarray(x.numpy())
    value, grads = jax.value_and_grad(lambda p: (apply(p, a) ** 2).sum())(params)
    loss = module(x).square().sum()
    np.testing.assert_allclose(loss.item(), value, 1e-5)
    loss.backward()
    wanted = [g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.inexact)]
    got = [getattr(owner, name).grad for owner, name in module._spots]
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, w, 1e-4, 1e-5)
