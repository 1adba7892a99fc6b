"""Programs written for torchax and torch_xla2, on `torch2jax.torchax`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2jax import torchax

optax = pytest.importorskip("optax", reason="optax is a test dependency")


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 28 * 28)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def test_running_a_model() -> None:
    torchax.enable_globally()
    try:
        inputs = torch.randn(3, 3, 28, 28, device="jax")
        m = MyModel().to("jax")
        res = m(inputs)
        assert type(res) is torchax.tensor.Tensor
        assert res.jax().shape == (9, 10)
        assert torch.ones(2).device.type == "jax"
        with torchax.disable_temporarily():
            assert torch.ones(2).device.type == "cpu"
    finally:
        torchax.disable_globally()
    assert torch.ones(2).device.type == "cpu"


def test_environment_and_to_xla() -> None:
    env = torchax.default_env()
    with env:
        inputs = torch.randn(3, 3, 28, 28)
        res = MyModel()(inputs)
    assert isinstance(res, torchax.tensor.Tensor)
    m, x = MyModel(), torch.randn(2, 784)
    expected = m(x).detach()
    with env:
        got = env.to_xla(m)(env.to_xla({"x": x})["x"])
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_jitted() -> None:
    m, x = MyModel().to("jax"), torch.randn(2, 784).to("jax")
    expected = m(x)

    def model_func(param: Any, inputs: Any) -> Any:
        return torch.func.functional_call(m, param, inputs)

    for run in (
        lambda: torchax.interop.jax_jit(model_func)(m.state_dict(), x),
        lambda: torchax.interop.JittableModule(m)(x),
        lambda: torchax.compile(m)(x),
    ):
        got = run()
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)
    jitted = torchax.interop.JittableModule(m)
    jitted(x).sum().backward()
    assert m.fc1.weight.grad is not None


def test_extract_jax_and_calls() -> None:
    m = MyModel()
    weights, fn = torchax.extract_jax(m)
    out = jax.jit(fn)(weights, (jnp.ones((1, 784)),))
    np.testing.assert_allclose(out, m(torch.ones(1, 784)).detach(), 1e-4, 1e-4)
    x = torch.ones(3, device="jax")
    assert torchax.interop.call_jax(jnp.sum, x).item() == 3
    assert x.apply_jax(jnp.add, 1).tolist() == [2.0, 2.0, 2.0]
    x.apply_jax_(jnp.multiply, 3)
    assert x.tolist() == [3.0, 3.0, 3.0]
    x.shard_(jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with torchax.amp.autocast("jax", torch.bfloat16):
        assert (x[None] @ x[:, None]).dtype is torch.bfloat16


def test_training_and_checkpoints(tmp_path: Any) -> None:
    m = MyModel().to("jax")
    x, label = torch.randn(8, 784).to("jax"), torch.arange(8).to("jax")
    weights, buffers = dict(m.named_parameters()), dict(m.named_buffers())
    optimizer = optax.adam(1e-3)
    opt_state = torchax.interop.call_jax(optimizer.init, weights)

    def model_fn(weights: Any, buffers: Any, args: Any) -> Any:
        return torch.func.functional_call(m, {**weights, **buffers}, args)

    step = torchax.train.make_train_step(model_fn, F.cross_entropy, optimizer)
    step = torchax.interop.jax_jit(step)
    losses = []
    for _ in range(5):
        loss, weights, opt_state = step(weights, buffers, opt_state, x, label)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = {"weights": weights, "opt_state": opt_state, "epoch": 10}
    pytest.importorskip("orbax.checkpoint", reason="orbax is a test dependency")
    torchax.save_checkpoint(state, tmp_path / "checkpoint")
    loaded = torchax.load_checkpoint(tmp_path / "checkpoint", like=state)
    m.load_state_dict(loaded["weights"])
    assert torch.equal(m.fc1.weight, weights["fc1.weight"])
    assert type(loaded["opt_state"][0]) is type(opt_state[0])
    plain = torchax.load_checkpoint(tmp_path / "checkpoint")
    assert int(plain["epoch"]) == 10
    with pytest.raises(TypeError, match="state_dict"):
        torchax.save_checkpoint({"weights": m.parameters()}, tmp_path / "other")


def test_an_unchanged_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    before = dict(sys.modules)
    torchax.install()
    try:
        import torch_xla2  # pyright: ignore
        import torchax as theirs  # pyright: ignore
        from torchax.interop import JittableModule, jax_jit  # noqa: F401  # pyright: ignore

        assert theirs is torch_xla2 is torchax
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("torchax", "torch_xla2"):
                del sys.modules[name]
