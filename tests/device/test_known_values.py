"""A compiled function asks for values of tensors that it closes over; they may change later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import Torch2JaxError, Torch2JaxWarning, device
from torch2jax.device import jit
from torch2jax.torchax import interop

device.enable()

ASKING: dict[str, Callable[[Any, Any], Any]] = {
    "item": lambda x, w: x * w[0].item(),
    "float": lambda x, w: x * float(w[1]),
    "int": lambda x, w: x + sum(range(int(w[0]) + 2)),
    "tolist": lambda x, w: x * w.tolist()[0],
    "numpy": lambda x, w: x * float(w.numpy()[0]),
    "asarray": lambda x, w: x * float(np.asarray(w)[0]),
    "cpu": lambda x, w: x * float(w.cpu()[0]),
    "to cpu and back": lambda x, w: x * w.to("cpu").to("jax"),
    "format": lambda x, w: x * float(f"{w[0]:.3f}"),
    "torch.tensor of elements": lambda x, w: x * torch.tensor([*w], device="jax"),
    "jax()": lambda x, w: device.tensor(x.jax() * w.jax()),
    "jax_view": lambda x, w: device.torch_view(device.jax_view(x) * device.jax_view(w)),
    "call_jax": lambda x, w: device.call_jax(jnp.multiply, x, w),
    "torchax's call_jax": lambda x, w: interop.call_jax(jnp.multiply, x, w),
    "deepcopy": lambda x, w: x * copy.deepcopy(w),
    "read before": lambda x, w: x * w * w[2].item(),
    "view read before": lambda x, w: x * w[1] * w[1].item(),
}


@pytest.mark.parametrize("name", ASKING)
def test_values_that_change_later_count(name: str) -> None:
    x, w = torch.arange(1.0, 4.0, device="jax"), torch.ones(3, device="jax")
    compiled = jit(lambda x: ASKING[name](x, w))
    for value in (1.0, 1.0, 2.0, 2.0):
        w.fill_(value)
        expected = ASKING[name](x, w)
        assert compiled(x).tolist() == expected.tolist() == compiled(x).tolist()


@pytest.mark.parametrize(
    "fn",
    [lambda x, m: x[m], lambda x, m: x.index_put((m,), torch.zeros((), device="jax"))],
    ids=["index", "index_put"],
)
def test_a_mask_that_changes_later(fn: Callable[[Any, Any], Any]) -> None:
    x, mask = torch.arange(3.0, device="jax"), torch.tensor([True, False, True], device="jax")
    compiled = jit(lambda x: fn(x, mask))
    for _ in range(3):
        assert compiled(x).tolist() == fn(x, mask).tolist()
    mask.fill_(True)
    assert compiled(x).tolist() == fn(x, mask).tolist()


def test_the_same_values_compile_nothing_again() -> None:
    x, w = torch.ones(3, device="jax"), torch.ones((), device="jax")
    f: Any = jit(lambda x: x * w.item())
    f(x), f(x)
    (call,) = f._around.current.calls.values()
    w.fill_(1.0)  # another array with the same values
    f(x), f(x)
    assert call.renewed == 0
    w.fill_(2.0)
    assert f(x).tolist() == [2.0] * 3
    assert call.renewed == 1


FOLLOWING: dict[str, Callable[[Any, Any], Any]] = {
    "item of a sum": lambda x, n: x[: int((n * 2).sum()) // 3],
    "tolist of a view": lambda x, n: torch.cat([x * k for k in n.flip(0)[1:].tolist()]),
    "range": lambda x, n: torch.stack([x[: int(k)].sum() for k in n.cumsum(0)]),
    "repeat_interleave": lambda x, n: x[:3].repeat_interleave(n + 1),
    "nonzero": lambda x, n: x[n.bitwise_and(1).nonzero()[:, 0]],
    "mask": lambda x, n: x[torch.arange(6, device=x.device) < n.max()],
    "not the mask": lambda x, n: x[:3][~(n > 1)],
    "ceil of a quotient": lambda x, n: x[: int(torch.ceil((n[0] + 2) / 2 + 0.25).to(torch.int64))],
    "unique": lambda x, n: x.sum() * torch.unique(n // 2),
    "of a shape and a tensor": lambda x, n: x[: int((n[0] * x.shape[0]).item()) // 3],
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_values_that_follow_from_known_integers(name: str) -> None:
    x, n = torch.arange(6.0), torch.tensor([1, 2, 1])
    on_device = n.to("jax")
    compiled = jit(lambda x: FOLLOWING[name](x, on_device))
    for values in ([1, 2, 1], [1, 2, 1], [2, 1, 3], [2, 1, 3]):
        n.copy_(torch.tensor(values))
        on_device.copy_(n)
        found = compiled(x.to("jax"))
        assert found.tolist() == FOLLOWING[name](x, n).tolist() == compiled(x.to("jax")).tolist()


def test_values_that_follow_from_other_ones_are_not_known() -> None:
    x, n = torch.ones(4, device="jax"), torch.tensor([1, 2], device="jax")

    def written(x: Any) -> Any:
        n.add_(0)
        return x[: int(n.sum())]

    for fn in (written, lambda x: x[: int(x.long().sum() + n[0])], lambda x: x * x.int().nonzero()):
        compiled = jit(fn)
        compiled(x)
        with pytest.raises(Torch2JaxError, match="values"):
            compiled(x)
    assert n.tolist() == [1, 2]


def test_a_value_with_a_gradient() -> None:
    x = torch.ones(3, device="jax")
    w = torch.tensor([3.0, 1.0, 1.0], device="jax", requires_grad=True)
    compiled = jit(lambda x: x * w * w[0].item())
    for factor in (3.0, 3.0, 3.0, 6.0):
        w.grad = None
        with torch.no_grad():
            w[0] = factor
        compiled(x).sum().backward()
        assert w.grad is not None
        assert w.grad.tolist() == [factor] * 3


def test_a_value_of_a_replaced_attribute() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones((), device="jax")

        def forward(self, x: Any) -> Any:
            return x * self.scale.item()

    module, x = Scaled(), torch.ones(2, device="jax")
    compiled = jit(lambda x: module(x))
    assert compiled(x).tolist() == compiled(x).tolist() == [1.0, 1.0]
    module.scale = torch.full((), 5.0, device="jax")
    assert compiled(x).tolist() == [5.0, 5.0]


def test_a_value_that_changes_at_each_call_is_named() -> None:
    x, count = torch.ones(2, device="jax"), torch.zeros((), device="jax")

    @jit
    def counted(x: Any) -> Any:
        out = x + count.item()
        count.add_(1)
        return out

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Torch2JaxWarning)
        assert [counted(x)[0].item() for _ in range(6)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [str(w.message).partition(",")[0] for w in caught] == ["counted"]


def test_a_value_that_the_function_has_computed_is_not_known() -> None:
    x, w = torch.ones(2, device="jax"), torch.zeros((), device="jax")

    def written(x: Any) -> Any:
        w.add_(1)
        return x * w.item()

    for fn in (written, lambda x: x * w.sin().item(), lambda x: x * x[0].item()):
        compiled = jit(fn)
        compiled(x)
        with pytest.raises(Torch2JaxError, match="item"):
            compiled(x)
    assert w.item() in (1.0, 2.0)  # the failed trace leaves no tracer behind


# --- buffers of modules ---------------------------------------------------------------------------


class Buffers(torch.nn.Module):
    """It asks for the integers and masks that it keeps."""

    grid: torch.Tensor
    n: torch.Tensor
    mask: torch.Tensor

    def __init__(self, ask: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.ask = ask
        self.register_buffer("grid", torch.tensor([[2, 3], [1, 2]]))
        self.register_buffer("n", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Any) -> Any:
        return self.ask(self, x)


BUFFERS: dict[str, Callable[[Any, Any], Any]] = {
    "tolist": lambda m, x: torch.stack([x * h + w for h, w in m.grid.tolist()]),
    "tuples": lambda m, x: torch.cat([x[:h].repeat(int(w)) for h, w in m.grid]),
    "int": lambda m, x: x * int(m.n),
    "slice": lambda m, x: x[: m.n],
    "range": lambda m, x: sum(x * i for i in range(m.n)),
    "if": lambda m, x: x * 2 if m.n > 2 else x,
    "index": lambda m, x: x[m.mask],
    "split": lambda m, x: torch.cat(x.repeat(2).split([m.n, 6 - m.n])[::-1]),
    "product": lambda m, x: x * int((m.grid[:, 0] * m.grid[:, 1]).sum()),
}


def written(m: Any) -> None:
    m.n.fill_(2)
    m.grid.add_(1)
    m.mask.logical_not_()


def replaced(m: Any) -> None:
    m.n, m.mask, m.grid = m.n - 1, m.mask | True, m.grid.flip(1)


def loaded(m: Any) -> None:
    other = Buffers(m.ask)
    written(other)
    m.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("change", [written, replaced, loaded])
def test_values_of_a_modules_buffers(name: str, change: Any) -> None:
    own, module = Buffers(BUFFERS[name]), Buffers(BUFFERS[name]).to("jax")
    compiled, x = jit(module), torch.tensor([1.0, 2.0, 3.0])
    for step in range(4):
        if step == 2:
            change(own)
            change(module)
        assert compiled(x.to("jax")).tolist() == own(x).tolist()


def test_a_buffer_that_the_program_updates_has_no_known_value() -> None:
    def counting(m: Any, x: Any) -> Any:
        m.n += 1
        return x * int(m.n)

    module, x = Buffers(counting).to("jax"), torch.ones(2, device="jax")
    compiled = jit(lambda x: module(x))
    assert compiled(x).tolist() == [4.0, 4.0]
    for n in (5, 6):
        assert compiled(x).tolist() == [n, n]
    assert module.n.item() == 6
