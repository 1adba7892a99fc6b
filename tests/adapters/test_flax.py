"""Flax. Expected values come from PyTorch, or from the same model without PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapter_models import adamw, assert_states_equal, data, mlp, normed, trained_by_torch
from torch import nn

import torch2jax as package
from torch2jax import clear_tape, tape_info

REASON = "the extra `test` is not installed"
optax = pytest.importorskip("optax", reason=REASON)
flax = pytest.importorskip("flax", reason=REASON)

from flax import nnx  # noqa: E402

from torch2jax import flax as t2j_flax  # noqa: E402


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))


# --- Flax ----------------------------------------------------------------------------------------


def nnx_step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    def loss(model: Any) -> Any:
        return ((model(x) - y) ** 2).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@pytest.mark.parametrize("make", [mlp, normed])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_flax_trains_as_torch(make: Any, jit: bool) -> None:
    module, (x, y) = make(), data()
    before = copy.deepcopy(module.state_dict())
    model = t2j_flax.TorchModule(module)
    optimizer = nnx.Optimizer(model, adamw(), wrt=nnx.Param)
    step = nnx.jit(nnx_step) if jit else nnx_step
    losses = [float(step(model, optimizer, x, y)) for _ in range(20)]
    expected, expected_losses = trained_by_torch(module, 20, x, y)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert_states_equal(model.state_dict(), expected)
    assert_states_equal(module.state_dict(), before)


def test_flax_kinds_of_variables() -> None:
    model = t2j_flax.TorchModule(normed())
    _, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    assert set(params["params"]) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert set(stats["buffers"]) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert set(rest["frozen"]) == {"0.weight", "0.bias"}
    grads = nnx.grad(lambda model, x: model(x).sum())(model, data()[0])
    assert set(grads) == {"params"}


def test_flax_modes() -> None:
    module, (x, _) = normed(), data()
    model = t2j_flax.TorchModule(module)
    assert not model.deterministic
    assert t2j_flax.TorchModule(normed().eval()).deterministic

    @nnx.jit
    def call(model: Any, x: Any) -> Any:
        return model(x)

    for mode in ("train", "eval", "train"):
        getattr(model, mode)()
        getattr(module, mode)()
        with torch.no_grad():
            expected = module(torch.from_numpy(x))
        np.testing.assert_allclose(call(model, x), expected, atol=1e-5)
        assert_states_equal(model.state_dict(), module.state_dict())
    view = nnx.view(model, deterministic=True)
    np.testing.assert_allclose(
        view(x), module.eval()(torch.from_numpy(x)).detach(), atol=1e-5, err_msg="nnx.view"
    )
    assert not model.deterministic


def test_flax_dropout() -> None:
    x, _ = data(64)
    module = nn.Dropout(0.5)
    ones = jnp.ones((64, 64))
    model = t2j_flax.TorchModule(module, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda model, x: model(x))
    first, second = call(model, ones), call(model, ones)
    assert set(np.unique(first)) == {0.0, 2.0}
    assert bool((first != second).any()), "each call takes a new key"
    again = t2j_flax.TorchModule(module, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(again(ones), first)
    key = jax.random.key(3)
    np.testing.assert_array_equal(model(ones, rngs=key), model(ones, rngs=key))
    np.testing.assert_array_equal(
        model(ones, rngs=nnx.Rngs(dropout=7)), again(ones, rngs=nnx.Rngs(dropout=7))
    )
    model.eval()
    np.testing.assert_array_equal(call(model, ones), ones)

    bare = t2j_flax.TorchModule(dropping())
    with pytest.raises(package.SignatureError, match="draws random numbers") as caught:
        bare(x)
    assert any("rngs= of TorchModule" in note for note in caught.value.__notes__)
    with pytest.raises(package.SignatureError):
        t2j_flax.TorchModule(jnp.sin)  # pyright: ignore[reportArgumentType]


def test_flax_inside_another_module() -> None:
    """Modes, gradients and updates reach it there; ``nnx.split``, ``merge`` and ``clone`` too."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = t2j_flax.TorchModule(normed(), rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.drop(self.body(x)))

    x, y = data()
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    step = nnx.jit(nnx_step)
    losses = [float(step(net, optimizer, x, y)) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert int(net.body.buffers["1.num_batches_tracked"][...]) == 60
    net.eval()
    assert net.body.deterministic
    out = net(x)
    np.testing.assert_allclose(net(x), out, err_msg="evaluation mode is deterministic")
    graphdef, state = nnx.split(net)
    np.testing.assert_allclose(nnx.merge(graphdef, state)(x), out)
    np.testing.assert_allclose(nnx.clone(net)(x), out)
    pure = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_allclose(pure(state, x), out, rtol=1e-5)


def test_flax_vmap_and_scan_over_stacked_layers() -> None:
    """One module, several sets of weights: an ensemble, and a stack of layers."""
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)]
    x, _ = data()
    model = t2j_flax.TorchModule(layers[0])
    graphdef, _ = nnx.split(model)
    states = [nnx.split(t2j_flax.TorchModule(m))[1] for m in layers]
    stacked = nnx.merge(graphdef, jax.tree.map(lambda *a: jnp.stack(a), *states))

    @nnx.vmap(in_axes=(0, None))
    def ensemble(model: Any, x: Any) -> Any:
        return model(x)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def deep(x: Any, model: Any) -> Any:
        return model(x)

    with torch.no_grad():
        t = torch.from_numpy(x)
        np.testing.assert_allclose(
            ensemble(stacked, x), torch.stack([m(t) for m in layers]), atol=1e-6
        )
        for m in layers:
            t = m(t)
    np.testing.assert_allclose(deep(x, stacked), t, atol=1e-6)
    grads = nnx.jit(nnx.grad(lambda model, x: deep(x, model).sum()))(stacked, x)
    assert grads["params"]["0.weight"].shape == (4, 3, 3)
    u = torch.from_numpy(x)
    for m in layers:
        u = m(u)
    u.sum().backward()
    expected = torch.stack([m[0].weight.grad for m in layers])
    np.testing.assert_allclose(grads["params"]["0.weight"][...], expected, atol=1e-5)


def test_flax_batchnorm_inside_scan() -> None:
    """The statistics move in the carry."""
    module, (x, _) = nn.BatchNorm1d(3), data()
    model = t2j_flax.TorchModule(module)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(model: Any, x: Any) -> Any:
        return model, model(x)

    model, outs = run(model, x.reshape(4, 4, 3))
    for row, out in zip(x.reshape(4, 4, 3), outs, strict=True):
        np.testing.assert_allclose(out, module(torch.from_numpy(row)).detach(), atol=1e-5)
    assert_states_equal(model.state_dict(), module.state_dict())


# --- a frozen extractor under a head of Flax -----------------------------------------------------


def test_feature_extractor_under_a_flax_head() -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()).requires_grad_(False).eval()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(32, 1, 6, 6)).astype(np.float32)
    labels = (images.mean((1, 2, 3)) > 0).astype(np.int32)

    class Classifier(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = t2j_flax.TorchModule(body)
            self.head = nnx.Linear(64, 2, rngs=rngs)

        def __call__(self, images: Any) -> Any:
            return self.head(self.body(images))

    model = Classifier(nnx.Rngs(0))
    before = model.body.state_dict()
    optimizer = nnx.Optimizer(model, optax.adamw(3e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        def loss(model: Any) -> Any:
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    clear_tape()
    hits = tape_info().hits
    losses = [float(step(model, optimizer)) for _ in range(50)]
    assert losses[-1] < 0.3 * losses[0]
    assert_states_equal(model.body.state_dict(), before)
    assert set(nnx.state(model, nnx.Param)) == {"head"}
    assert tape_info().entries == 0, "nothing is kept for a backward pass that never comes"
    assert tape_info().hits == hits, "PyTorch runs no backward pass"
