"""What a module is made of: tied and frozen parameters, buffers, hooks, tensors cached at first use."""

from __future__ import annotations

import copy
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_agreement import agrees, array, close, score, state
from torch import nn

from torch2jax import SignatureError, from_module, to_state_dict


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = self.a  # the same module
        self.list = nn.ParameterList([self.a.bias, nn.Parameter(torch.ones(4))])

    def forward(self, x):
        return self.c(self.b(self.a(x)).tanh()) * self.list[1] + self.list[0]


def test_tied_weights():
    module = Tied()
    _, variables = agrees(module, torch.randn(3, 4))
    assert sorted(variables["params"]) == ["a.bias", "a.weight", "b.bias", "list.1"]
    state = to_state_dict(variables, module)
    assert list(state) == list(module.state_dict())
    module.load_state_dict(state)
    for name, t in module.state_dict().items():
        assert torch.equal(state[name], t)


def test_frozen_parameters_cost_nothing():
    counts = {"first": 0, "input": 0}

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            counts["input"] += ctx.needs_input_grad[0]
            counts["first"] += ctx.needs_input_grad[1]
            return g * w, g * x

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.ones(3), requires_grad=False)
            self.second = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Noted.apply(x, self.first) * self.second

    module = Partly()
    apply, variables = from_module(module)
    assert set(variables["frozen"]) == {"first"}
    x = jnp.arange(3.0)
    grads = jax.grad(lambda v: apply(v, x).sum())(variables)
    assert counts == {"first": 0, "input": 0}
    close(grads["frozen"]["first"], np.zeros(3))
    close(grads["params"]["second"], x)
    jax.grad(lambda v, x: apply(v, x).sum(), (0, 1))(variables, x)
    assert counts == {"first": 0, "input": 1}
    assert not module.first.requires_grad


def test_buffers_in_their_own_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("low", torch.randn(3).bfloat16())
            self.register_buffer("steps", torch.tensor(7))
            self.register_buffer("flags", torch.tensor([True, False, True]))
            self.register_buffer("small", torch.tensor([1, 2, 250], dtype=torch.uint8))
            self.weight = nn.Parameter(torch.randn(3).bfloat16())

        def forward(self, x):
            assert self.low.dtype is torch.bfloat16
            assert self.steps.dtype is torch.int64
            assert self.flags.dtype is torch.bool
            assert self.small.dtype is torch.uint8
            if self.training:
                self.steps += 1
            return (x.bfloat16() * self.low * self.weight * self.flags).float() + self.steps

    module = Mixed()
    for train in (False, True):
        apply, variables = agrees(module, torch.randn(3), train=train, tolerance=2e-2)
    assert variables["buffers"]["low"].dtype == jnp.bfloat16
    _, new = apply(variables, jnp.ones(3), train=True)
    for given in (apply, module):
        state = to_state_dict({**variables, "buffers": new}, given)
        assert {k: t.dtype for k, t in state.items()} == {
            k: t.dtype for k, t in module.state_dict().items()
        }
        assert int(state["steps"]) == 8


def test_bfloat16_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(torch.bfloat16)
    apply, variables = from_module(module)
    x = torch.randn(3, 4)
    out = apply(variables, jnp.asarray(x.numpy()).astype(jnp.bfloat16))
    close(out.astype(jnp.float32), array(module(x.bfloat16())), 1e-2)
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(to_state_dict(variables))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters()))  # noqa: B905


def test_keywords_and_nested_outputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, *, scale=None, mode="sum", flip=False, extra=None):
            y = self.linear(x)
            y = y if scale is None else y * scale
            y = -y if flip else y
            y = y + extra["deep"][0] if extra else y
            return {"a": (y, [y.sin(), None]), "b": {"c": y.sum() if mode == "sum" else y.mean()}}

    module = Nested()
    x, s = torch.randn(2, 3), torch.randn(3)
    agrees(module, x)
    agrees(module, x, keywords={"scale": s, "mode": "mean", "flip": True})
    apply, variables = from_module(module)
    deep = jnp.ones(3)
    g = jax.grad(
        lambda d: score(apply(variables, jnp.asarray(x.numpy()), extra={"deep": [d, None]}))
    )(deep)
    assert g.shape == (3,)
    assert float(abs(g).min()) > 0


@pytest.mark.parametrize("keyword", ["train", "rng", "kwargs"])
def test_clashing_keywords(keyword):
    scope: dict[str, Any] = {}
    exec(f"def forward(self, x, {keyword}=None):\n    return x * {keyword}", scope)
    module = type("Clashing", (nn.Module,), {"forward": scope["forward"]})()
    with pytest.raises(SignatureError, match=rf"(?s){keyword}.*kwargs={{"):
        from_module(module)
    apply, variables = from_module(module, kwargs=True)
    x = jnp.arange(3.0)
    close(apply(variables, x, kwargs={keyword: x}), x * x)
    close(jax.grad(lambda x: apply(variables, x, kwargs={keyword: x}).sum())(x), 2 * x)
    out, _ = apply(variables, x, train=True, kwargs={keyword: x})
    close(out, x * x)
    with pytest.raises(SignatureError, match="kwargs="):
        apply(variables, x, other=x)


def test_module_keyword_named_variables():
    class Odd(nn.Module):
        def forward(self, x, variables=None):
            return x if variables is None else x * variables

    x = jnp.arange(3.0)
    try:
        apply, variables = from_module(Odd())
    except SignatureError:
        apply, variables = from_module(Odd(), kwargs=True)
        close(apply(variables, x, kwargs={"variables": x}), x * x)
        return
    close(apply(variables, x, variables=x), x * x)


def test_forward_hooks():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.full((3,), 1.5))
            self.register_forward_pre_hook(lambda m, args: (args[0] * m.scale,))
            self.linear.register_forward_hook(lambda m, args, out: out + m.weight.sum())
            self.linear.register_forward_hook(
                lambda m, args, kwargs, out: out * 2, with_kwargs=True, prepend=True
            )
            self.register_forward_hook(self.after)

        def after(self, module, args, out):
            return out * self.scale  # a bound method: of the replica

        def forward(self, x):
            return self.linear(x).tanh()

    agrees(Scaled(), torch.randn(2, 3))


def test_backward_hooks():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    module[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    module[2].register_full_backward_pre_hook(lambda m, go: (go[0] * 3,))
    agrees(module, torch.randn(2, 3))


def test_lazy_modules_are_initialised_on_a_copy():
    module = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    _, variables = from_module(module, torch.randn(3, 5))
    assert variables["params"]["0.weight"].shape == (4, 5)
    assert isinstance(module[0].weight, nn.UninitializedParameter)


def test_lazy_modules():
    module = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d())
    with pytest.raises(SignatureError, match="lazy"):
        from_module(module)
    x = torch.randn(3, 5)
    apply, variables = from_module(module, x)
    assert variables["params"]["0.weight"].shape == (4, 5)
    out = apply(variables, jnp.asarray(x.numpy()))
    module.load_state_dict(to_state_dict(variables))
    module.eval()
    close(out, array(module(x)))
    agrees(module, x)


class Caching(nn.Module):
    """Keeps what it computes first from its weights and the length of its input."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(4))
        if kind == "dict":
            self.cache = {}
        elif kind == "preset":
            self.cache = {"w": None}
        elif kind == "list":
            self.cache = []
        elif kind == "slot":
            self.cache = [None]
        elif kind == "nested":
            self.cache = {"deep": {}}
        elif kind == "namespace":
            self.cache = types.SimpleNamespace()
        elif kind == "attribute":
            self.cache = None
        elif kind == "buffer":
            self.register_buffer("cache", None, persistent=False)
        elif kind == "persistent":
            self.register_buffer("cache", None)

    def find(self) -> Any:
        if self.kind in ("dict", "preset"):
            return self.cache.get("w")
        if self.kind in ("list", "slot"):
            return self.cache[0] if self.cache else None
        if self.kind == "nested":
            return self.cache["deep"].get("w")
        if self.kind == "namespace":
            return getattr(self.cache, "w", None)
        return getattr(self, "cache", None)

    def keep(self, w: torch.Tensor) -> None:
        if self.kind in ("dict", "preset"):
            self.cache["w"] = w
        elif self.kind == "list":
            self.cache.append(w)
        elif self.kind == "slot":
            self.cache[0] = w
        elif self.kind == "nested":
            self.cache["deep"]["w"] = w
        elif self.kind == "namespace":
            self.cache.w = w
        else:
            self.cache = w

    def forward(self, x):
        w = self.find()
        if w is None:
            w = self.weight * torch.arange(1.0, 5.0)
            self.keep(w)
        return x * w


KINDS = ["dict", "preset", "list", "slot", "nested", "namespace", "attribute", "new_attribute"]


@pytest.mark.parametrize("kind", [*KINDS, "buffer", "persistent"])
def test_modules_that_cache_at_first_use(kind):
    """A cache holds for one call: it is computed from that call's variables."""
    apply, variables = agrees(Caching(kind), torch.randn(2, 4))
    x = jnp.ones((2, 4))
    first = apply(variables, x)
    doubled = jax.tree.map(lambda p: 2 * p, variables)
    close(apply(doubled, x), 2 * first)
    close(jax.jit(apply)(doubled, x), 2 * first)


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_masks_cached_at_first_use(kind):
    """The usual pattern: a causal mask, made anew for longer inputs."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            if kind == "buffer":
                self.register_buffer("mask", None, persistent=False)
            else:
                self.mask = None

        def find(self, n):
            if self.mask is None or self.mask.shape[-1] < n:
                mask = torch.tril(torch.ones(n, n))
                if kind == "buffer":
                    self.register_buffer("mask", mask, persistent=False)
                else:
                    self.mask = mask
            return self.mask[:n, :n]

        def forward(self, x):
            return self.find(x.shape[0]) @ self.linear(x)

    module = Causal()
    for n in (3, 2, 5):
        agrees(module, torch.randn(n, 4))
    apply, variables = from_module(module)
    for n in (3, 2, 5, 3):
        x = torch.randn(n, 4)
        close(apply(variables, jnp.asarray(x.numpy())), array(copy.deepcopy(module)(x)))


@pytest.mark.parametrize("kind", ["non_persistent", "attribute", "list"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_tensors_that_are_no_variables_stay(kind, train):
    """What is neither parameter nor persistent buffer cannot move: calls repeat, modules stay."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            if kind == "non_persistent":
                self.register_buffer("n", torch.zeros(()), persistent=False)
            else:
                self.n = torch.zeros(()) if kind == "attribute" else [torch.zeros(())]

        def forward(self, x):
            n = self.n[0] if kind == "list" else self.n
            n.add_(1)
            return self.linear(x) * n

    module = Counting()
    before = state(module)
    apply, variables = from_module(module)
    x = torch.randn(2, 3)
    expected = array(module.linear(x))
    for _ in range(3):
        out = apply(variables, jnp.asarray(x.numpy()), train=train)
        close(out[0] if train else out, expected)
    assert state(module) == before
    if kind == "list":
        assert float(module.n[0]) == 0


def test_plain_and_non_persistent_tensors_are_constants():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.shift = torch.randn(3)
            self.tables = {"a": [torch.randn(3)]}
            self.register_buffer("freq", torch.randn(3), persistent=False)

        def forward(self, x):
            return self.linear(x) * self.shift + self.tables["a"][0] * self.freq

    _, variables = agrees(Plain(), torch.randn(2, 3))
    assert variables["buffers"] == {}
