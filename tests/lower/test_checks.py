"""Checks of values hold where a function is traced, and the text of their errors may name tensors.

Models of text and images count the tokens of an image, and write the error before they check.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import device, from_module, torch2jax
from torch2jax.device.tensors.tensor import ValueNeeded

device.enable()

IDS = torch.tensor([[1, 3, 3], [3, 2, 1]])
PATCHES = torch.arange(6.0).reshape(3, 2) - 2
WORDS = torch.linspace(-1, 1, 12).reshape(3, 4)[:, :2].repeat(2, 1).reshape(2, 3, 2)


def placed(ids: Any, patches: Any, words: Any) -> Any:
    """Put the patches of images where their tokens stand, as transformers does."""
    mask = ids == 3
    count = mask.sum()
    text = f"tokens: {count}, features: {patches.shape[0]}"
    torch._check_tensor_all_with(ValueError, count * 2 == patches.numel(), lambda: text)
    return words.masked_scatter(mask.unsqueeze(-1), patches).tanh()


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 2)

    def forward(self, ids: Any, patches: Any, words: Any) -> Any:
        return placed(ids, self.project(patches), words)


def expected() -> list[Any]:
    patches, words = PATCHES.clone().requires_grad_(), WORDS.clone().requires_grad_()
    out = placed(IDS, patches, words)
    (out * out).sum().backward()
    return [out.detach(), patches.grad, words.grad]


def agree(found: Any) -> None:
    for a, b in zip(found, expected(), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), 1e-6, 1e-6)


@pytest.mark.parametrize("options", [{}, {"lower": True}], ids=["bridge", "lower"])
def test_functions(options: dict[str, Any]) -> None:
    f = torch2jax(placed, **options)
    ids, patches, words = (jnp.asarray(t.numpy()) for t in (IDS, PATCHES, WORDS))

    def loss(patches: Any, words: Any) -> Any:
        out = f(ids, patches, words)
        return (out * out).sum(), out

    for run in (
        jax.grad(loss, (0, 1), has_aux=True),
        jax.jit(jax.grad(loss, (0, 1), has_aux=True)),
    ):
        grads, out = run(patches, words)
        agree([out, *grads])
    for traced in (jax.jit(f), jax.jit(lambda *args: f(*args))):
        agree([traced(ids, patches, words), *expected()[1:]])


@pytest.mark.parametrize("wrap", [lambda f: f, device.jit], ids=["eager", "jit"])
def test_device(wrap: Callable[..., Any]) -> None:
    def step(ids: Any, patches: Any, words: Any) -> Any:
        out = placed(ids, patches, words)
        return [out.detach(), *torch.autograd.grad((out * out).sum(), (patches, words))]

    run = wrap(step)
    for _ in range(3):
        ids, patches, words = (t.to("jax") for t in (IDS, PATCHES, WORDS))
        agree([t.cpu() for t in run(ids, patches.requires_grad_(), words.requires_grad_())])


def test_modules() -> None:
    torch.manual_seed(0)
    module = Placed()
    module(IDS, PATCHES, WORDS).square().sum().backward()
    apply, variables = from_module(module, lower=True)
    ids, patches, words = (jnp.asarray(t.numpy()) for t in (IDS, PATCHES, WORDS))

    def loss(params: Any) -> Any:
        return jnp.square(apply({**variables, "params": params}, ids, patches, words)).sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for name, p in module.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad, 1e-5, 1e-5)


def test_checks_fail_where_values_are_known() -> None:
    few = PATCHES[:2]
    with pytest.raises(ValueError, match="tokens: 3, features: 2"):
        placed(IDS, few, WORDS)
    with pytest.raises(ValueError, match="tokens: 3, features: 2"):
        placed(IDS.to("jax"), few.to("jax"), WORDS.to("jax"))


def test_text() -> None:
    """A number in the text of a trace is its description; how it is to be written needs its value."""
    seen = []

    def f(x: Any) -> Any:
        seen.append(f"{x.sum()}")
        return x + 1

    torch2jax(f, lower=True)(jnp.ones(3))
    assert re.fullmatch(r"tensor\(<traced>, .*dtype=torch.float32.*\)", seen[0])
    assert f"{torch.ones((), device='jax')}" == f"{torch.ones(())}"
    assert f"{torch.ones((), device='jax'):.2f}" == "1.00"
    with pytest.raises(ValueNeeded):
        torch2jax(lambda x: (f"{x.sum():.2f}", x)[1], lower=True)(jnp.ones(3))
