"""``device.jit``: gradients of what a compiled function closes over, and of its arguments."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import SignatureError, Torch2JaxError, device, torch2jax

device.enable()


def pair() -> tuple[nn.Module, nn.Module]:
    """A model on the CPU, and the same on the device."""
    torch.manual_seed(0)
    there = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return there, copy.deepcopy(there).to("jax")


def same_gradients(here: nn.Module, there: nn.Module) -> None:
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            np.testing.assert_allclose(p.grad.cpu(), q.grad, 2e-5, 1e-6)


def backward_of(model: nn.Module) -> Any:
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().sum()
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize("schedule", ["zzzzz", "z..z.", ".....", "zs.zs"])
def test_gradients_that_are_cleared_or_kept_outside(schedule: str) -> None:
    """z clears gradients before the call; s sets them to zero; a dot adds to what is there."""
    there, here = pair()
    steps = {"cpu": backward_of(there), "jax": device.jit(backward_of(here))}
    for i, what in enumerate(schedule):
        x = torch.randn(2, 3)
        for where, model in (("cpu", there), ("jax", here)):
            if what != ".":
                model.zero_grad(set_to_none=what == "z")
            steps[where](x.to(where))
        same_gradients(here, there)
        if i == 3:  # other memory for the gradients
            for p in here.parameters():
                assert p.grad is not None
                p.grad = p.grad.clone()


def test_an_optimizer_outside_of_the_compiled_function() -> None:
    there, here = pair()
    steps = {"cpu": backward_of(there), "jax": device.jit(backward_of(here))}
    x = torch.randn(4, 3)
    for where, model in (("cpu", there), ("jax", here)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            steps[where](x.to(where))
            optimizer.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        np.testing.assert_allclose(p.detach().cpu(), q.detach(), 1e-3, 1e-4)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_learning_rate_that_changes_is_a_tensor(name: str) -> None:
    there, here = pair()
    x = torch.randn(4, 3)
    for where, model in (("cpu", there), ("jax", here)):
        options = {"capturable": True} if name == "Adam" and where == "jax" else {}
        rate: Any = torch.tensor(0.1, device="jax") if where == "jax" else 0.1
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=rate, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        backward = backward_of(model)

        def update(x: torch.Tensor, optimizer: Any = optimizer, backward: Any = backward) -> None:
            optimizer.zero_grad()
            backward(x)
            optimizer.step()

        step = device.jit(update) if where == "jax" else update
        for _ in range(4):
            step(x.to(where))
            schedule.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        np.testing.assert_allclose(p.detach().cpu(), q.detach(), 1e-3, 1e-4)


def test_distributions_check_their_arguments_in_eager_mode_only() -> None:
    from torch.distributions import Categorical, Normal, kl_divergence

    def fn(x: torch.Tensor) -> torch.Tensor:
        # Asked for, because torch.compile switches the checks off for the process.
        normal = Normal(x, x.exp(), validate_args=True)
        choice = Categorical(logits=x, validate_args=True)
        divergence = kl_divergence(normal, Normal(torch.zeros_like(x), 1.0)).sum(-1)
        return normal.log_prob(x + 1).sum(-1) + choice.entropy() + divergence

    torch.manual_seed(0)
    x = torch.randn(4, 3)
    compiled = device.jit(fn)
    lowered = jax.jit(torch2jax(fn, lower=True))(x.numpy())
    for found in (compiled(x.to("jax")), compiled(x.to("jax")), device.tensor(lowered)):
        np.testing.assert_allclose(found.cpu(), fn(x), 1e-4, 1e-4)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        Normal(x.to("jax"), -x.to("jax").abs(), validate_args=True)


def test_a_compiled_optimizer_and_an_eager_backward() -> None:
    there, here = pair()
    x = torch.randn(4, 3)
    for where, model in (("cpu", there), ("jax", here)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step: Any = device.jit(optimizer.step) if where == "jax" else optimizer.step
        for i in range(4):
            optimizer.zero_grad()
            backward_of(model)(x.to(where))
            if i == 2:
                model.get_parameter("0.bias").grad = None  # it is left out of this step
            step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        np.testing.assert_allclose(p.detach().cpu(), q.detach(), 1e-4, 1e-5)


def test_backward_through_a_compiled_function_that_closes_over_parameters() -> None:
    there, here = pair()
    compiled = device.jit(lambda x: here(x).square().sum())
    for _ in range(3):
        x = torch.randn(2, 3)
        y: Any = x.to("jax").requires_grad_()
        for model, loss in ((there, there(x.requires_grad_()).square().sum()), (here, compiled(y))):
            model.zero_grad()
            loss.backward()
        same_gradients(here, there)
        assert x.grad is not None
        np.testing.assert_allclose(y.grad.cpu(), x.grad, 2e-5, 1e-6)
    here.requires_grad_(False)
    here.get_parameter("2.weight").requires_grad_()
    here.zero_grad()
    compiled(y).backward()
    assert here.get_parameter("0.weight").grad is None
    assert here.get_parameter("2.weight").grad is not None


def test_gradients_of_arguments() -> None:
    there, here = pair()
    compiled, plain = device.jit(backward_of(here)), backward_of(there)
    x = torch.randn(2, 3)
    y: Any = x.to("jax").requires_grad_()
    x.requires_grad_()
    for _ in range(3):
        compiled(y)
        plain(x)
        assert x.grad is not None
        np.testing.assert_allclose(y.grad.cpu(), x.grad, 2e-5, 1e-6)
    with pytest.raises(Torch2JaxError, match="detach"):
        compiled(y * 1)


def test_frozen_parameters_get_none() -> None:
    there, here = pair()
    for model in (there, here):
        model.get_parameter("0.weight").requires_grad_(False)
    compiled, plain = device.jit(backward_of(here)), backward_of(there)
    for _ in range(3):
        x = torch.randn(2, 3)
        compiled(x.to("jax"))
        plain(x)
        same_gradients(here, there)


def test_arguments_that_are_written_to() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y[0] *= 2
        return (x + y).sum()

    compiled = device.jit(fn)
    there, here = torch.ones(2, 3), torch.ones(2, 3, device="jax")
    rows, columns = torch.arange(6.0).view(3, 2).t(), torch.arange(6.0, device="jax").view(3, 2).t()
    for _ in range(3):
        assert compiled(here, columns).item() == fn(there, rows).item()
        assert here.tolist() == there.tolist()
        assert columns.tolist() == rows.tolist()
    with pytest.raises(Torch2JaxError, match=r"x\.clone"):
        compiled(here, here)
    w = torch.ones(3, device="jax", requires_grad=True)
    scale = torch.ones(3, device="jax")
    bump = device.jit(lambda x: x.add_(1))
    bump(torch.ones(3, device="jax"))
    loss = (w * scale).sum()
    bump(scale)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [np.ones(2), {1, 2}, [np.ones(2)]], ids=["array", "set", "list"])
def test_arguments_that_select_no_program(value: Any) -> None:
    f = device.jit(lambda x, value: x * 2)
    with pytest.raises(SignatureError, match=r"selects a program .*device\.tensor"):
        f(torch.ones(2, device="jax"), value)


def test_only_what_draws_takes_from_the_generator() -> None:
    dropout = device.jit(lambda x: nn.functional.dropout(x, 0.5))
    plain = device.jit(lambda x, scale=1.0: x * scale)
    x = torch.ones(200, device="jax")
    dropout(x), plain(x)  # step by step

    def draws(others: int) -> list[torch.Tensor]:
        torch.manual_seed(3)
        found = []
        for _ in range(3):
            found.append(dropout(x).cpu())
            for _ in range(others):
                plain(x, scale=2.0)
        return found

    alone, among = draws(0), draws(2)
    assert all(map(torch.equal, alone, among))
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(plain(x, 3.0).cpu(), torch.full((200,), 3.0))


def test_arguments_with_and_without_containers() -> None:
    f = device.jit(lambda x, *more, **named: (x + sum(more), named))
    x = torch.ones(2, device="jax")
    for _ in range(3):
        for args, kwargs in (((x,), {}), ((x, x, 2), {}), ((x,), {"a": x, "b": None, "c": "d"})):
            total, named = f(*args, **kwargs)
            assert total.cpu().tolist() == [1 + (3 if len(args) == 3 else 0)] * 2
            assert list(named) == list(kwargs)
        total, named = f(x, a=[x, {"b": x * 2}])
        assert named["a"][1]["b"].cpu().tolist() == [2, 2]
