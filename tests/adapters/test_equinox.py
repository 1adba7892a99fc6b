"""Equinox. Expected values come from PyTorch, or from the same model without PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapter_models import adamw, assert_states_equal, data, mlp, normed, trained_by_torch
from torch import nn

import torch2jax as package

REASON = "the extra `test` is not installed"
optax = pytest.importorskip("optax", reason=REASON)
eqx = pytest.importorskip("equinox", reason=REASON)


from torch2jax import equinox as t2j_equinox  # noqa: E402


@pytest.mark.parametrize("make", [mlp, normed])
def test_equinox_trains_as_torch(make: Any) -> None:
    module, (x, y) = make(), data()
    before = copy.deepcopy(module.state_dict())
    model, state = eqx.nn.make_with_state(t2j_equinox.TorchModule)(module)
    optimizer = adamw()
    trained = t2j_equinox.trainable(model)
    opt_state = optimizer.init(eqx.filter(model, trained))

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any) -> Any:
        @eqx.filter_value_and_grad(has_aux=True)
        def loss(part: Any, rest: Any, state: Any) -> Any:
            model = eqx.combine(part, rest)
            out, state = model(x, state) if model.is_stateful() else (model(x), state)
            return ((out - y) ** 2).mean(), state

        part, rest = eqx.partition(model, trained)
        (value, state), grads = loss(part, rest, state)
        updates, opt_state = optimizer.update(grads, opt_state, part)
        return eqx.apply_updates(model, updates), state, opt_state, value

    losses = []
    for _ in range(20):
        model, state, opt_state, loss = step(model, state, opt_state)
        losses.append(float(loss))
    expected, expected_losses = trained_by_torch(module, 20, x, y)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert_states_equal(model.state_dict(state), expected)
    assert_states_equal(module.state_dict(), before)


def test_equinox_filter_grad() -> None:
    module, (x, _) = mlp(), data()
    model = t2j_equinox.TorchModule(module)
    assert not model.is_stateful()

    def loss(model: Any, x: Any) -> Any:
        return (model(x) ** 2).sum()

    eager = eqx.filter_grad(loss)(model, x)
    jitted = eqx.filter_jit(eqx.filter_grad(loss))(model, x)
    (module(torch.from_numpy(x)) ** 2).sum().backward()
    for name, p in module.named_parameters():
        np.testing.assert_allclose(eager.params[name], p.grad, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jitted.params[name], p.grad, rtol=1e-5, atol=1e-5)


def test_equinox_frozen_parameters_have_zero_gradients() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    module[0].requires_grad_(False)
    model = t2j_equinox.TorchModule(module)
    grads = eqx.filter_grad(lambda m, x: m(x).sum())(model, data()[0])
    assert not any(bool(g.any()) for g in grads.frozen.values())
    pair = {"torch": model, "own": jnp.ones(3), "number": jnp.arange(3), "name": "pair"}
    chosen = eqx.filter(pair, t2j_equinox.trainable(pair))
    assert len(jax.tree.leaves(chosen)) == 3
    assert jax.tree.structure(t2j_equinox.trainable(pair)) == jax.tree.structure(pair)


def test_equinox_modes_and_state() -> None:
    module, (x, _) = normed(), data()
    make = eqx.nn.make_with_state(t2j_equinox.TorchModule)
    model, state = make(module)
    assert model.is_stateful()
    assert not model.inference
    assert make(normed().eval())[0].inference
    call = eqx.filter_jit(lambda model, x, state: model(x, state))
    for inference in (False, True, False):
        model = eqx.nn.inference_mode(model, inference)
        module.train(not inference)
        with torch.no_grad():
            expected = module(torch.from_numpy(x))
        out, state = call(model, x, state)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        assert_states_equal(model.state_dict(state), module.state_dict())
    out, state = model(x, state=state, inference=True)
    np.testing.assert_allclose(out, module.eval()(torch.from_numpy(x)).detach(), atol=1e-5)
    with pytest.raises(package.SignatureError, match="make_with_state"):
        model(x)


def test_equinox_dropout() -> None:
    model = t2j_equinox.TorchModule(nn.Dropout(0.5))
    ones, keys = jnp.ones((64, 64)), jax.random.split(jax.random.key(0))
    call = eqx.filter_jit(lambda model, x, key: model(x, key=key))
    first, second = (call(model, ones, key) for key in keys)
    assert set(np.unique(first)) == {0.0, 2.0}
    assert bool((first != second).any())
    np.testing.assert_array_equal(model(ones, key=keys[0]), first)
    np.testing.assert_array_equal(eqx.nn.inference_mode(model)(ones, key=keys[0]), ones)
    np.testing.assert_array_equal(model(ones, inference=True), ones)
    rows = jax.vmap(lambda x, key: model(x, key=key))(jnp.stack([ones, ones]), keys)
    np.testing.assert_array_equal(rows, jnp.stack([first, second]))
    old = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(model(ones, key=old), model(ones, key=old))
    with pytest.raises(package.SignatureError, match="draws random numbers") as caught:
        model(ones)
    assert "With Equinox: key= of the call." in caught.value.__notes__


def test_equinox_vmap() -> None:
    """Over examples, as Equinox's own models are used, and over models, an ensemble."""
    module, (x, _) = mlp(), data()
    expected = module(torch.from_numpy(x)).detach()
    model = t2j_equinox.TorchModule(module)
    np.testing.assert_allclose(jax.vmap(model)(x), expected, atol=1e-6)
    other = jax.tree.map(lambda a: 2 * a if eqx.is_array(a) else a, model)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]) if eqx.is_array(a) else a, model, other)
    outs = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(both, x)
    np.testing.assert_allclose(outs, jnp.stack([model(x), other(x)]), atol=1e-6)


def test_equinox_inside_sequential() -> None:
    def make(key: Any) -> Any:
        return eqx.nn.Sequential(
            [
                t2j_equinox.TorchModule(normed()),
                eqx.nn.Lambda(jnp.tanh),
                t2j_equinox.TorchModule(nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))),
            ]
        )

    x, _ = data()
    model, state = eqx.nn.make_with_state(make)(jax.random.key(0))
    out, state = eqx.filter_jit(model)(x, state, key=jax.random.key(1))
    assert out.shape == (16, 4)
    assert int(model[0].variables(state)["buffers"]["1.num_batches_tracked"]) == 1


def test_equinox_serialisation(tmp_path: Path) -> None:
    x, _ = data()
    make = eqx.nn.make_with_state(t2j_equinox.TorchModule)
    model, state = make(normed())
    _, state = model(x, state)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", (model, state))
    like = make(normed())
    other, other_state = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    assert_states_equal(other.state_dict(other_state), model.state_dict(state))
    model, other = eqx.nn.inference_mode((model, other))
    np.testing.assert_array_equal(other(x, other_state)[0], model(x, state)[0])
