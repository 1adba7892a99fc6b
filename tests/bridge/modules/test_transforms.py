"""Modules under JAX's transforms and the options of the bridge."""

from __future__ import annotations

import copy
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_agreement import agrees, array, close, mlp_twin, score
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch2jax import SignatureError, from_module, tape_info


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.vmap(jax.grad(lambda p, x: score(f(p, x))), (None, 0)),
        lambda f: lambda p, x: jax.jvp(jax.grad(lambda p: score(f(p, x))), (p,), (p,))[1],
        lambda f: (
            lambda p, x: jax.grad(
                lambda p: sum(
                    (g**2).sum() for g in jax.tree.leaves(jax.grad(lambda p: score(f(p, x)))(p))
                )
            )(p)
        ),
        lambda f: jax.jacfwd(f, 1),
        lambda f: jax.jacrev(f),
        lambda f: lambda p, x: jax.hessian(lambda x: score(f(p, x)))(x[0]),
        lambda f: (
            lambda p, x: jax.vmap(lambda s: f(jax.tree.map(lambda q: q * s, p), x))(
                jnp.array([0.5, 2.0])
            )
        ),
        lambda f: (
            lambda p, x: jax.lax.scan(
                lambda p, row: (
                    jax.tree.map(
                        lambda q, g: q - 0.1 * g, p, jax.grad(lambda p: score(f(p, row)))(p)
                    ),
                    score(f(p, row)),
                ),
                p,
                x,
            )
        ),
    ],
    ids=["vmap", "per_example", "hvp", "gg", "jacfwd", "jacrev", "hessian", "ensemble", "sgd"],
)
def test_transforms(mlp, transform, jit):
    _, apply, variables = mlp
    x = jnp.linspace(-1, 1, 15).reshape(5, 3)

    def bridged(params, x):
        return apply({**variables, "params": params}, x)

    maybe = jax.jit if jit else (lambda f: f)
    actual = maybe(transform(bridged))(variables["params"], x)
    expected = transform(mlp_twin)(variables["params"], x)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(got, want, 3e-4)
    assert tape_info().entries == 0


@pytest.mark.parametrize("options", [{"depth": 1}, {"residuals": "recompute"}, {"depth": 2}])
def test_options(mlp, options):
    module, _, _ = mlp
    agrees(module, torch.randn(5, 3), **options)


def test_vmap_of_training_batch_norm():
    module = nn.BatchNorm1d(3)
    apply, variables = from_module(module, vmap_method="sequential")
    x = jnp.linspace(0, 1, 24).reshape(2, 4, 3) ** 2
    y, new = jax.vmap(lambda x: apply(variables, x, train=True))(x)
    for k in range(2):
        twin = copy.deepcopy(module).train()
        close(y[k], array(twin(torch.tensor(np.array(x[k])))))
        close(new["running_var"][k], array(twin.running_var))


def test_dropout_module():
    module = nn.Sequential(nn.Linear(3, 64, bias=False), nn.Dropout(0.25))
    apply, variables = from_module(module)
    x, key = jnp.ones((2, 3)), jax.random.key(3)
    with pytest.raises(SignatureError, match="rng="):
        apply(variables, x, train=True)
    close(apply(variables, x, rng=key), apply(variables, x))
    before = torch.get_rng_state()

    def loss(w):
        out, _ = apply({**variables, "params": {"0.weight": w}}, x, train=True, rng=key)
        return out.sum(), out

    for run in (jax.grad(loss, has_aux=True), jax.jit(jax.grad(loss, has_aux=True))):
        g, out = run(variables["params"]["0.weight"])
        mask = np.asarray(out) != 0
        assert 0.1 < 1 - mask.mean() < 0.4
        close(g, (mask / 0.75).sum(0)[:, None] * np.ones((64, 3)))
    assert torch.equal(before, torch.get_rng_state())
    assert module.training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_dropout_in_a_checkpoint(reentrant):
    """The block draws again in its backward pass: the same mask, and torch's generator stays."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.drop = nn.Dropout(0.25)

        def forward(self, x):
            y = x * self.scale
            return checkpoint(lambda t: self.drop(t) * 1.0, y, use_reentrant=reentrant)

    apply, variables = from_module(Block())
    x = jnp.arange(1.0, 65.0)
    before = torch.get_rng_state()

    def loss(p, key):
        out, _ = apply({**variables, "params": p}, x, train=True, rng=key)
        return out.sum(), out

    step = jax.jit(jax.grad(loss, has_aux=True))
    for seed in range(4):
        g, out = step(variables["params"], jax.random.key(seed))
        close(g["scale"], out, 1e-5)
    assert torch.equal(before, torch.get_rng_state())
    failed: list[Any] = []

    def work(seed: int) -> None:
        for n in range(25):
            g, out = step(variables["params"], jax.random.key(100 * seed + n))
            if not np.allclose(g["scale"], out):
                failed.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert torch.equal(before, torch.get_rng_state())
