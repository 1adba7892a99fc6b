"""Modules of TorchScript: scripted, traced, frozen, loaded, and inside of another module."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import SignatureError, from_module, to_state_dict, torch2jax

# PyTorch says it while it traces an LSTM.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Tied weights, statistics, a recurrent layer, parameters in lists and tuples beside."""

    both: list[torch.Tensor]
    by_name: dict[str, torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.rnn = nn.LSTM(3, 3, batch_first=True)
        self.both = [self.first.weight, self.second.bias]
        self.by_name = {"bias": self.first.bias}
        self.pair = (self.first.weight, 3)

    def forward(self, x):
        h = self.second(torch.relu(self.norm(self.first(x))))
        h = self.rnn(h[None])[0][0]
        return h @ self.both[0] + self.both[1] * self.by_name["bias"] + self.pair[0].sum()


class Around(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def saved_and_loaded(script: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


KINDS = {
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, X),
    "loaded": lambda net: saved_and_loaded(torch.jit.script(net)),
    "inside": lambda net: Around(torch.jit.script(net)),
}


def gradients(module: Any) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(X).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str) -> None:
    module = KINDS[kind](Net().eval())
    apply, variables = from_module(module, vmap_method="sequential")
    with torch.no_grad():
        np.testing.assert_allclose(apply(variables, jnp.asarray(X)), module(X), rtol=1e-5)

    def loss(params):
        return (apply({**variables, "params": params}, jnp.asarray(X)) ** 2).sum()

    for compiled in (lambda g: g, jax.jit):
        grads = compiled(jax.grad(loss))(variables["params"])
        for name, want in gradients(module).items():
            np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-5, err_msg=name)
    batch = jax.vmap(lambda x: apply(variables, x))(jnp.stack([jnp.asarray(X)] * 2))
    with torch.no_grad():
        np.testing.assert_allclose(batch[1], module(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["scripted", "loaded", "inside"])
def test_variables_are_the_modules_only_parameters(kind: str) -> None:
    module = KINDS[kind](Net().eval())
    apply, variables = from_module(module)
    doubled = jax.tree.map(lambda p: 2 * p, variables["params"])
    out = apply({**variables, "params": doubled}, jnp.asarray(X))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
        np.testing.assert_allclose(out, module(X), rtol=1e-5, atol=1e-6)
    state = to_state_dict({**variables, "params": doubled}, module)
    for name, t in module.state_dict().items():
        torch.testing.assert_close(state[name], t, msg=name)


@pytest.mark.parametrize("kind", ["scripted", "loaded", "inside"])
def test_training_moves_the_statistics(kind: str) -> None:
    module = KINDS[kind](Net())
    before = {name: t.clone() for name, t in module.state_dict().items()}
    apply, variables = from_module(module)
    out, buffers = jax.jit(lambda v: apply(v, jnp.asarray(X), train=True))(variables)
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), name
    module.train()
    with torch.no_grad():
        np.testing.assert_allclose(out, module(X), rtol=1e-5, atol=1e-6)
    for name, b in module.named_buffers():
        np.testing.assert_allclose(buffers[name], b, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, X)])
def test_a_frozen_module_is_a_function_without_variables(make: Any, lower: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    module = torch.jit.freeze(make(net))
    apply, variables = from_module(module, lower=lower)
    assert variables == {"params": {}, "frozen": {}, "buffers": {}}
    with torch.no_grad():
        np.testing.assert_allclose(apply(variables, jnp.asarray(X)), net(X), rtol=1e-5, atol=1e-6)
        f = torch2jax(module, lower=lower)
        np.testing.assert_allclose(f(jnp.asarray(X)), net(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["scripted", "loaded", "inside"])
def test_lowered(kind: str) -> None:
    module = KINDS[kind](Net().eval())
    apply, variables = from_module(module, lower=True)

    def loss(params):
        return (apply({**variables, "params": params}, jnp.asarray(X)) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    with torch.no_grad():
        np.testing.assert_allclose(value, module(X).square().sum(), rtol=1e-5)
    for name, want in gradients(module).items():
        np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_keyword_that_apply_has_too() -> None:
    class Named(nn.Module):
        def forward(self, x, train: bool):
            return x * 2 if train else x

    script = torch.jit.script(Named())
    with pytest.raises(SignatureError, match=r"kwargs=True"):
        from_module(script)
    apply, variables = from_module(script, kwargs=True)
    np.testing.assert_allclose(apply(variables, jnp.ones(2), kwargs={"train": True}), [2, 2])
