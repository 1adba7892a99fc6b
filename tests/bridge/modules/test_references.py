"""Tensors that a module refers to beside its tables: activations it keeps, parameters in containers."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_agreement import agrees
from torch import nn

from torch2jax import from_module, torch2jax

Pair = namedtuple("Pair", "w b")


class Plain:
    """An object that is no module."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)


class InAttribute(Linear):
    def forward(self, x):
        self.last = self.l(x)
        return self.last * 2


class InList(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []

    def forward(self, x):
        self.history.append([self.l(x)])
        return self.history[-1][0] * 2


class InObject(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.state = Plain(last=None)

    def forward(self, x):
        self.state.last = self.l(x)
        return self.state.last * 2


def old_weight_norm():
    return nn.utils.weight_norm(nn.Linear(3, 3))


def old_spectral_norm():
    return nn.utils.spectral_norm(nn.Linear(3, 3)).eval()


KEEPERS = [InAttribute, InList, InObject, old_weight_norm, old_spectral_norm]
OLD = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@OLD
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize("make", KEEPERS)
def test_a_module_may_hold_a_tensor_with_a_graph(make: Any, lower: bool, called: bool) -> None:
    module, x = make(), torch.randn(2, 3)
    if called:
        module(x)
    twin = make()
    twin.load_state_dict(module.state_dict())
    apply, variables = from_module(module, lower=lower)

    def f(params, x):
        return apply({**variables, "params": params}, x)

    y = twin(x)
    np.testing.assert_allclose(f(variables["params"], x.numpy()), y.detach(), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    for compiled in (lambda g: g, jax.jit):
        grads = compiled(jax.grad(lambda p: (f(p, x.numpy()) ** 2).sum()))(variables["params"])
        for name, p in twin.named_parameters():
            np.testing.assert_allclose(grads[name], p.grad, rtol=1e-4, atol=1e-5, err_msg=name)


@OLD
@pytest.mark.parametrize("make", KEEPERS)
def test_the_module_itself_may_be_wrapped(make: Any) -> None:
    module, x = make(), torch.randn(2, 3)
    module(x)
    want = module(x).detach()
    f = torch2jax(module)
    for _ in range(2):
        np.testing.assert_allclose(f(x.numpy()), want, rtol=1e-5, atol=1e-6)


class ParameterInList(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.both = [self.l.weight, self.l.bias]

    def forward(self, x):
        return x @ self.both[0].T + self.both[1]


class ParameterInDict(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.both = {"w": [self.l.weight], "b": self.l.bias}

    def forward(self, x):
        return x @ self.both["w"][0].T + self.both["b"]


class ParameterInTuple(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.both = (self.l.weight, [self.l.bias])

    def forward(self, x):
        return x @ self.both[0].T + self.both[1][0]


class ParameterInNamedTuple(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.both = Pair(self.l.weight, (2.0, self.l.bias))

    def forward(self, x):
        return x @ self.both.w.T + self.both.b[0] * self.both.b[1]


class ParameterInSet(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.both = {self.l.weight, self.l.bias}

    def forward(self, x):
        w, b = sorted(self.both, key=lambda t: -t.ndim)
        return x @ w.T + b


class ParameterInObject(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.view = Plain(w=self.l.weight, owner=self)

    def forward(self, x):
        return x @ self.view.w.T + self.view.owner.l.bias


class ParameterInAttribute(Linear):
    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "w", self.l.weight)

    def forward(self, x):
        return x @ self.w.T + self.l.bias


class BufferInList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.randn(3))
        self.scales = [self.scale]

    def forward(self, x):
        return x * self.w * self.scales[0]


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize(
    "make",
    [
        ParameterInList,
        ParameterInDict,
        ParameterInTuple,
        ParameterInNamedTuple,
        ParameterInSet,
        ParameterInObject,
        ParameterInAttribute,
        BufferInList,
    ],
)
def test_parameters_are_found_beside_their_attributes(make: Any, lower: bool) -> None:
    module, x = make(), torch.randn(2, 3)
    agrees(copy.deepcopy(module), x, lower=lower)
    apply, variables = from_module(module, lower=lower)
    moved = {**variables, "params": {k: 2 * p for k, p in variables["params"].items()}}
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    np.testing.assert_allclose(
        apply(moved, jnp.asarray(x)), module(x).detach(), rtol=1e-5, atol=1e-6
    )
