"""JAX's own libraries: optax, orbax, Flax, Equinox and numpyro, each in its own habits.

Expected values come from PyTorch, from the same model without PyTorch, or from the analytic answer.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import torch2jax as package
from torch2jax import clear_tape, from_module, tape_info, to_state_dict, torch2jax

ROOT = Path(__file__).resolve().parent.parent
REASON = "the extra `test` is not installed"
optax = pytest.importorskip("optax", reason=REASON)
flax = pytest.importorskip("flax", reason=REASON)
eqx = pytest.importorskip("equinox", reason=REASON)

from flax import nnx  # noqa: E402

from torch2jax import equinox as t2j_equinox  # noqa: E402
from torch2jax import flax as t2j_flax  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    clear_tape()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def normed() -> nn.Module:
    """With buffers that move and, in front, parameters that are frozen."""
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    module[0].requires_grad_(False)
    return module


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def data(rows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)


def trained_by_torch(module: nn.Module, steps: int, x: Any, y: Any) -> tuple[Any, list[float]]:
    """The module's state after some steps of torch's own AdamW, and the losses before each."""
    module = copy.deepcopy(module)
    held = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((module(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module.state_dict(), losses


def adamw() -> Any:
    return optax.adamw(1e-2, weight_decay=0.1)


def assert_states_equal(got: Any, expected: Any) -> None:
    assert list(got) == list(expected)
    for name, t in expected.items():
        assert got[name].dtype is t.dtype
        torch.testing.assert_close(got[name], t, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: n + m)


# -- optax and orbax, on the variables as they are -------------------------------------------------


@pytest.mark.parametrize("make", [mlp, normed])
def test_optax_equals_torch(make: Any) -> None:
    module, (x, y) = make(), data()
    apply, variables = from_module(module)
    optimizer = adamw()
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            out, buffers = apply({**variables, "params": params}, x, train=True)
            return ((out - y) ** 2).mean(), buffers

        (value, buffers), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state_ = optimizer.update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, "params": params, "buffers": buffers}, state_, value

    losses = []
    for _ in range(20):
        variables, state, loss = step(variables, state)
        losses.append(float(loss))
    expected, expected_losses = trained_by_torch(module, 20, x, y)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert_states_equal(to_state_dict(variables, apply), expected)


def test_optax_masks_by_name() -> None:
    """Names are those of ``state_dict``, so that decay can spare the biases."""
    _, variables = from_module(mlp())
    params = variables["params"]
    mask = {name: name.endswith("weight") for name in params}
    optimizer = optax.adamw(1e-2, weight_decay=0.1, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for name, update in updates.items():
        assert bool(jnp.any(update != 0)) == mask[name]


def test_orbax_round_trip(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint", reason=REASON)
    x, _ = data()
    apply, variables = from_module(normed())
    _, buffers = apply(variables, x, train=True)
    variables = {**variables, "buffers": buffers}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", variables)
        checkpointer.wait_until_finished()
        _, like = from_module(normed())
        restored = checkpointer.restore(tmp_path / "saved", like)
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(restored), jax.tree.leaves(variables), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_array_equal(apply(restored, x), apply(variables, x))


# -- Flax ------------------------------------------------------------------------------------------


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


class Clashing(nn.Module):
    """Keywords with the names that ``apply`` has, and one that is static."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Any, train: Any = None, rng: Any = None, mode: str = "plain") -> Any:
        out = self.linear(x) + (0 if train is None else train) + (0 if rng is None else rng)
        return {"out": -out if mode == "minus" else out}


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_keywords_of_the_module_never_clash(library: str) -> None:
    module, (x, _) = Clashing(), data()
    model: Any = importlib.import_module(f"{package.__name__}.{library}").TorchModule(module)
    out = model(x, train=jnp.float32(2), rng=jnp.float32(3), mode="minus")["out"]
    expected = -(module.linear(torch.from_numpy(x)) + 5).detach()
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_lazy_modules(library: str) -> None:
    module = nn.Sequential(nn.LazyLinear(4))
    kind: Any = importlib.import_module(f"{package.__name__}.{library}").TorchModule
    with pytest.raises(package.SignatureError, match="lazy"):
        kind(module)
    assert kind(module, torch.ones(2, 3))(jnp.ones((2, 3))).shape == (2, 4)


# -- Equinox ---------------------------------------------------------------------------------------


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


# -- what is missing, and what is not imported -----------------------------------------------------


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_missing_library(library: str) -> None:
    code = f"""
import sys
import {package.__name__} as package
assert {library!r} not in sys.modules, "the package itself imports it"
sys.modules[{library!r}] = None
try:
    import {package.__name__}.{library}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"pip install 'torch2jax-ffi[{library}]'" in done.stdout


def test_adapters_are_imported_on_use() -> None:
    code = f"""
import sys
import {package.__name__} as package
print(any(name in sys.modules for name in ("flax", "equinox")))
print(package.flax.TorchModule.__name__, package.equinox.TorchModule.__name__)
try:
    package.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, names, error = done.stdout.splitlines()
    assert before == "False"
    assert names == "TorchModule TorchModule"
    assert error == f"module {package.__name__!r} has no attribute 'nothing'"


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_deepcopy(library: str) -> None:
    """Averages of weights and targets of reinforcement learning begin with one."""
    module, (x, _) = mlp(), data()
    model: Any = importlib.import_module(f"{package.__name__}.{library}").TorchModule(module)
    out = model(x)
    np.testing.assert_array_equal(copy.deepcopy(model)(x), out)


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_docstrings(library: str) -> None:
    module = importlib.import_module(f"{package.__name__}.{library}")
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


# -- a frozen extractor under a head of Flax -------------------------------------------------------


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


# -- a log-density inside numpyro's NUTS -----------------------------------------------------------


@pytest.mark.parametrize("chain_method", ["sequential", "vectorized"])
def test_numpyro_nuts_samples_a_gaussian(chain_method: str) -> None:
    """jit, scan, while_loop, vmap and gradients at once. The posterior is known."""
    infer = pytest.importorskip("numpyro.infer", reason=REASON)
    mean = np.array([1.0, -2.0, 0.5], np.float32)
    scale = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.2, 0.5]], np.float32)
    target = torch.distributions.MultivariateNormal(
        torch.from_numpy(mean), scale_tril=torch.from_numpy(scale), validate_args=False
    )
    log_density = torch2jax(target.log_prob)
    kernel = infer.NUTS(potential_fn=lambda x: -log_density(x))
    chains = 2
    mcmc = infer.MCMC(
        kernel,
        num_warmup=200,
        num_samples=1000,
        num_chains=chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), init_params=jnp.zeros((chains, 3)))
    samples = np.asarray(mcmc.get_samples())
    assert samples.shape == (2000, 3)
    # Some 1,000 effective draws or more: five standard errors.
    sd = np.linalg.norm(scale, axis=1)
    np.testing.assert_allclose((samples.mean(0) - mean) / sd, 0, atol=5 / np.sqrt(1000))
    covariance = np.cov(samples.T) / np.outer(sd, sd)
    np.testing.assert_allclose(
        covariance, scale @ scale.T / np.outer(sd, sd), atol=5 * np.sqrt(2 / 1000)
    )


def test_numpyro_model_with_a_torch_likelihood() -> None:
    """``numpyro.factor`` beside numpyro's own priors: Bayesian linear regression, conjugate."""
    numpyro = pytest.importorskip("numpyro", reason=REASON)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2)).astype(np.float32)
    y = (x @ [1.0, -0.5] + 0.3 * rng.normal(size=40)).astype(np.float32)

    def log_likelihood(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(x @ w, 0.3, validate_args=False).log_prob(y).sum()

    likelihood = torch2jax(log_likelihood)

    def model(x: Any, y: Any) -> None:
        prior = numpyro.distributions.Normal(0, 1).expand([2]).to_event(1)
        w = numpyro.sample("w", prior)
        numpyro.factor("likelihood", likelihood(w, x, y))

    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False
    )
    mcmc.run(jax.random.key(0), jnp.asarray(x), jnp.asarray(y))
    samples = np.asarray(mcmc.get_samples()["w"])
    covariance = np.linalg.inv(np.eye(2) + x.T @ x / 0.09)
    mean = covariance @ x.T @ y / 0.09
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((samples.mean(0) - mean) / sd, 0, atol=5 / np.sqrt(400))
    np.testing.assert_allclose(samples.std(0) / sd, 1, atol=5 / np.sqrt(2 * 400))
