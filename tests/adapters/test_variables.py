"""optax, orbax and numpyro, on the variables as they are.

Expected values come from PyTorch or from the analytic answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapter_models import adamw, assert_states_equal, data, mlp, normed, trained_by_torch

from torch2jax import from_module, to_state_dict, torch2jax

REASON = "the extra `test` is not installed"
optax = pytest.importorskip("optax", reason=REASON)


# --- optax and orbax, on the variables as they are -----------------------------------------------


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


# --- a log-density inside numpyro's NUTS ---------------------------------------------------------


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
