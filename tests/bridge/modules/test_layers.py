"""PyTorch's layers as pure functions: values and gradients are torch's own."""

from __future__ import annotations

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_agreement import Normed, agrees, array, close
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torch2jax import SignatureError, Torch2JaxWarning, from_module, to_state_dict


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_batch_norm(train):
    module = Normed()
    apply, variables = agrees(module, torch.randn(4, 2, 5, 5), train=train)
    if train:
        _, new = apply(variables, jnp.ones((4, 2, 5, 5)), train=True)
        assert new["body.1.num_batches_tracked"] == 1
        _, new = apply({**variables, "buffers": new}, jnp.ones((4, 2, 5, 5)), train=True)
        assert new["body.1.num_batches_tracked"] == 2
        loaded = copy.deepcopy(module)
        loaded.load_state_dict(to_state_dict({**variables, "buffers": new}, apply))
        assert loaded.body[1].num_batches_tracked.dtype is torch.int64
        assert int(loaded.body[1].num_batches_tracked) == 2


def test_batch_norm_over_many_steps():
    module = nn.BatchNorm1d(3)
    twin = copy.deepcopy(module).train()
    apply, variables = from_module(module)
    xs = torch.randn(5, 4, 3)

    def step(buffers, x):
        y, buffers = apply({**variables, "buffers": buffers}, x, train=True)
        return buffers, y

    buffers, ys = jax.lax.scan(step, variables["buffers"], jnp.asarray(xs.numpy()))
    for k in range(5):
        close(ys[k], array(twin(xs[k])))
    for name, b in twin.named_buffers():
        close(buffers[name], array(b))
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent(cell, bidirectional, train):
    module = cell(3, 4, num_layers=2, bidirectional=bidirectional, batch_first=True)
    agrees(module, torch.randn(2, 5, 3), train=train)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_with_state_and_projection():
    module = nn.LSTM(3, 4, proj_size=2)
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 2, 2), torch.randn(1, 2, 4)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, x, h, c):
            y, (h, c) = self.rnn(x, (h, c))
            return {"y": y, "state": (h, [c])}

    agrees(Wrapped(), x, h, c)


def test_recurrent_dropout_needs_a_key_and_repeats():
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    apply, variables = from_module(module)
    x = jnp.ones((5, 2, 3))
    with pytest.raises(SignatureError, match="rng="):
        apply(variables, x, train=True)
    key = jax.random.key(0)
    (a, _), _ = apply(variables, x, train=True, rng=key)
    (b, _), _ = jax.jit(lambda k: apply(variables, x, train=True, rng=k))(key)
    (c, _), _ = apply(variables, x, train=True, rng=jax.random.key(1))
    close(a, b, 0)
    assert not np.allclose(a, c)
    (d, _) = apply(variables, x)
    close(d, array(module.eval()(torch.ones(5, 2, 3))[0]))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(train, norm_first):
    module = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    agrees(module, torch.randn(2, 5, 8), train=train)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_fast_path_is_right():
    """In eval mode without gradients torch takes another kernel."""
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True
    ).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = module(x, src_key_padding_mask=padding)
    apply, variables = from_module(module)
    out = apply(
        variables, jnp.asarray(x.numpy()), src_key_padding_mask=jnp.asarray(padding.numpy())
    )
    close(out, array(expected))
    with torch.no_grad():
        plain = module(x)
    close(jax.jit(lambda x: apply(variables, x))(jnp.asarray(x.numpy())), array(plain))


def test_multihead_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=6)

        def forward(self, q, k, v, mask):
            return self.mha(q, k, v, attn_mask=mask, average_attn_weights=False)

    mask = torch.triu(torch.ones(3, 4, dtype=torch.bool), 2)
    agrees(Attention(), torch.randn(2, 3, 8), torch.randn(2, 4, 4), torch.randn(2, 4, 6), mask)


def test_embedding_and_int64_labels():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4, padding_idx=0)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens, labels):
            logits = self.head(self.embed(tokens))
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    tokens, labels = torch.randint(0, 10, (2, 3)), torch.randint(0, 10, (2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        agrees(Classifier(), tokens, labels)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "decorate",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.weight_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old_spectral_norm", "old_weight_norm"],
)
def test_parametrizations(decorate, train):
    # (Without gradients: torch cannot copy a module whose weight is computed with them.)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = nn.Sequential(decorate(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))
    agrees(module, torch.randn(3, 4), train=train, tolerance=2e-4)


def test_own_parametrization():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Symmetric())
    apply, variables = agrees(module, torch.randn(3, 4))
    assert "parametrizations.weight.original" in variables["params"]
    copy.deepcopy(module).load_state_dict(to_state_dict(variables, apply))
