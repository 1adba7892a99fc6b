"""Modules with checkpoints inside, and compiled modules: values and gradients are torch's own."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_agreement import agrees, array, close, score
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch2jax import from_module, tape_info, to_state_dict


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, style: str = "method"):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.reentrant, self.style = reentrant, style

    def inner(self, x):
        return self.block(x) * self.scale

    def forward(self, x):
        x = self.first(x)
        if self.style == "method":
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)
        if self.style == "module":
            return checkpoint(self.block, x, use_reentrant=self.reentrant) * self.scale
        scale = self.scale
        return checkpoint(lambda t: t.sin() * scale, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("style", ["method", "module", "closure"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoint_inside(reentrant, style, train):
    module = Checkpointed(reentrant, style)
    apply, variables = agrees(module, torch.randn(3, 4), train=train)
    x = jnp.ones((3, 4))

    def loss(scale):
        params = jax.tree.map(lambda p: p * scale, variables["params"])
        out = apply({**variables, "params": params}, x, train=train)
        return score(out[0] if train else out)

    # Other variables in every step: the block that runs again must use those of its own call.
    scales = jnp.array([0.5, 1.0, 1.5, 2.0])
    grads = jax.jit(lambda s: jax.lax.scan(lambda c, k: (c, jax.grad(loss)(k)), 0, s)[1])(scales)
    for s, g in zip(scales.tolist(), grads.tolist(), strict=True):
        twin = copy.deepcopy(module)
        for p in twin.parameters():
            p.data.mul_(s)
        score(twin(torch.ones(3, 4))).backward()
        want = sum(
            float((p.grad * p.detach()).sum()) for p in twin.parameters() if p.grad is not None
        )
        np.testing.assert_allclose(g, want / s, 2e-4)
    assert tape_info().entries == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoint_inside_with_several_live_graphs(reentrant):
    """Graphs of several calls wait for their backward passes, which come in any order."""
    apply, variables = from_module(Checkpointed(reentrant))
    x = jnp.ones((3, 4))
    scaled = [jax.tree.map(lambda p, k=k: p * k, variables["params"]) for k in (0.5, 1.0, 2.0)]

    def forward(params, x):
        return score(apply({**variables, "params": params}, x))

    expected = [jax.grad(forward, (0, 1))(p, x) for p in scaled]
    pulls = [jax.vjp(forward, p, x)[1] for p in scaled]
    for k in (1, 2, 0):
        for a, b in zip(jax.tree.leaves(pulls[k](1.0)), jax.tree.leaves(expected[k]), strict=True):
            close(a, b, 1e-6)
    for k in (1, 0):  # and again
        for a, b in zip(jax.tree.leaves(pulls[k](1.0)), jax.tree.leaves(expected[k]), strict=True):
            close(a, b, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*row by row")
def test_checkpoint_inside_other_transforms(reentrant):
    apply, variables = from_module(Checkpointed(reentrant))
    x = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)

    def by_hand(params, x):
        y = x @ params["first.weight"].T + params["first.bias"]
        y = jnp.tanh(y @ params["block.0.weight"].T + params["block.0.bias"])
        return (y @ params["block.2.weight"].T + params["block.2.bias"]) * params["scale"]

    def bridged(params, x):
        return apply({**variables, "params": params}, x)

    p = variables["params"]
    for transform in (
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.vmap(jax.grad(lambda p, x: score(f(p, x))), (None, 0)),
        lambda f: jax.grad(lambda p, x: score(jax.vmap(f, (None, 0))(p, x))),
        lambda f: lambda p, x: jax.jacrev(f)(p, x[0]),
        lambda f: lambda p, x: jax.jit(jax.grad(jax.checkpoint(lambda p: score(f(p, x)))))(p),
    ):
        a, b = transform(bridged)(p, x), transform(by_hand)(p, x)
        for got, want in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            close(got, want, 1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["wrapped", "in_place"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiled_modules(inplace, train):
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    if inplace:
        inner.compile(backend="aot_eager")
        module = inner
        apply, variables = from_module(module)
        x = torch.randn(3, 4)
        out = apply(variables, jnp.asarray(x.numpy()), train=train)
        twin = copy.deepcopy(inner)
        twin._compiled_call_impl = None
        close(out[0] if train else out, array(twin.train(train)(x)))
        return
    module = torch.compile(inner, backend="aot_eager")
    apply, variables = agrees(module, torch.randn(3, 4), train=train)
    assert list(to_state_dict(variables, module)) == list(module.state_dict())
    copy.deepcopy(inner).load_state_dict(to_state_dict(variables))
