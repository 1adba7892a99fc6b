"""Generators of the caller's: in eager mode, carried by ``device.jit``, refused by pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import SignatureError, Torch2JaxError, device, from_module, torch2jax
from torch2jax.torchax.interop import jax_jit

device.enable()
J = "jax"


def half(n: int = 40) -> torch.Tensor:
    return torch.full((n,), 0.5, device=J)


def empty() -> torch.Tensor:
    return torch.empty(40, device=J)


aten = torch.ops.aten
DRAWS: dict[str, Callable[[Any], torch.Tensor]] = {
    "rand": lambda g: torch.rand(40, device=J, generator=g),
    "randn": lambda g: torch.randn(40, device=J, generator=g),
    "randint": lambda g: torch.randint(99, (40,), device=J, generator=g),
    "randint_low": lambda g: torch.randint(1, 99, (40,), device=J, generator=g),
    "randperm": lambda g: torch.randperm(40, device=J, generator=g),
    "rand_like": lambda g: aten.rand_like.generator(half(), generator=g),
    "randn_like": lambda g: aten.randn_like.generator(half(), generator=g),
    "randint_like": lambda g: aten.randint_like.generator(half(), 99, generator=g),
    "randint_like_low": lambda g: aten.randint_like.low_generator_dtype(half(), 1, 99, generator=g),
    "randint_like_tensor": lambda g: aten.randint_like.Tensor_generator(
        half(), torch.tensor(99, device=J), generator=g
    ),
    "normal": lambda g: torch.normal(0.0, 1.0, (40,), device=J, generator=g),
    "normal_tensors": lambda g: torch.normal(half(), half(), generator=g),
    "normal_mean": lambda g: torch.normal(half(), 1.0, generator=g),
    "normal_std": lambda g: torch.normal(1.0, half(), generator=g),
    "bernoulli": lambda g: torch.bernoulli(half(), generator=g),
    "bernoulli_p": lambda g: torch.bernoulli(half(), 0.3, generator=g),
    "multinomial": lambda g: torch.multinomial(half(), 20, generator=g),
    "poisson": lambda g: torch.poisson(half() * 20, generator=g),
    "binomial": lambda g: torch.binomial(half() * 40, half(), generator=g),
    "gamma": lambda g: torch._standard_gamma(half(), g),
    "dirichlet": lambda g: torch._sample_dirichlet(half(), g),
    "rrelu": lambda g: aten.rrelu(-half(), 0.1, 0.3, True, g),
    "uniform_": lambda g: empty().uniform_(generator=g),
    "normal_": lambda g: empty().normal_(generator=g),
    "exponential_": lambda g: empty().exponential_(generator=g),
    "cauchy_": lambda g: empty().cauchy_(generator=g),
    "log_normal_": lambda g: empty().log_normal_(generator=g),
    "geometric_": lambda g: empty().geometric_(0.1, generator=g),
    "random_": lambda g: empty().random_(generator=g),
    "random_to": lambda g: empty().random_(99, generator=g),
    "random_from": lambda g: empty().random_(2, 99, generator=g),
    "bernoulli_": lambda g: empty().bernoulli_(generator=g),
    "bernoulli_tensor": lambda g: empty().bernoulli_(half(), generator=g),
    "init": lambda g: nn.init.kaiming_uniform_(empty().view(8, 5), generator=g),
}


def values(x: torch.Tensor) -> list[float]:
    return x.detach().cpu().tolist()


@pytest.mark.parametrize("name", DRAWS)
def test_compiled_draws_are_those_of_eager_mode(name: str) -> None:
    """Each call goes on in the generator's sequence, and seeding it starts again."""
    g = torch.Generator().manual_seed(7)
    eager = [values(DRAWS[name](g)) for _ in range(4)]
    assert eager[0] != eager[1]
    compiled = device.jit(lambda: DRAWS[name](g))
    for _ in range(2):
        g.manual_seed(7)
        got = [values(compiled()) for _ in range(4)]
        np.testing.assert_allclose(got, eager, 1e-5, 1e-6)


class Noisy(nn.Module):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3, device=J, generator=self.generator)


def of_closure(g: Any) -> Any:
    return device.jit(lambda x: x + torch.rand(3, device=J, generator=g))


def of_argument(g: Any) -> Any:
    f = device.jit(lambda x, g: x + torch.rand(3, device=J, generator=g))
    return lambda x: f(x, g)


def of_keyword(g: Any) -> Any:
    f = device.jit(lambda x, *, how: x + torch.rand(3, device=J, generator=how["g"]))
    return lambda x: f(x, how={"g": g})


def of_attribute(g: Any) -> Any:
    return device.jit(Noisy(g))


def of_method(g: Any) -> Any:
    return device.jit(Noisy(g).forward)


@pytest.mark.parametrize("place", [J, "cpu"])
@pytest.mark.parametrize("how", [of_closure, of_argument, of_keyword, of_attribute, of_method])
def test_where_a_generator_comes_from(how: Any, place: str) -> None:
    g, same = (torch.Generator(place).manual_seed(7) for _ in range(2))
    x = torch.zeros(3, device=J)
    f = how(g)
    for i in range(5):
        if i == 3:
            g.manual_seed(1)
            same.manual_seed(1)
        assert values(f(x)) == values(torch.rand(3, device=J, generator=same))
    assert torch.equal(g.get_state(), same.get_state())


def test_two_generators_and_one_twice() -> None:
    def f(a: Any, b: Any) -> Any:
        return torch.rand(2, device=J, generator=a), torch.rand(2, device=J, generator=b)

    compiled = device.jit(f)
    make = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    for a, b in [(1, 2), (3, 4), (5, 6)]:
        got, want = compiled(make(a), make(b)), f(make(a), make(b))
        assert [*map(values, got)] == [*map(values, want)]
    for seed in (1, 2, 3):
        g, h = make(seed), make(seed)
        got, want = compiled(g, g), f(h, h)
        assert [*map(values, got)] == [*map(values, want)]


def test_another_generator_in_its_place() -> None:
    m = Noisy(torch.Generator().manual_seed(1))
    f, x = device.jit(m), torch.zeros(3, device=J)
    for seed in (1, 2, 3, 4):
        m.generator = torch.Generator().manual_seed(seed)
        want = torch.rand(3, device=J, generator=torch.Generator().manual_seed(seed))
        assert values(f(x)) == values(want)


def test_a_draw_for_each_row_of_the_argument() -> None:
    g, same = (torch.Generator().manual_seed(7) for _ in range(2))

    def f(x: torch.Tensor, g: Any) -> torch.Tensor:
        return torch.stack([row + torch.rand((), device=J, generator=g) for row in x])

    compiled = device.jit(f)
    for n in (2, 3, 2, 3, 2, 3):
        x = torch.zeros(n, device=J)
        assert values(compiled(x, g)) == values(f(x, same))


def test_gradients_go_through_the_numbers_of_the_forward_pass() -> None:
    g = torch.Generator().manual_seed(7)
    x = torch.ones(3, device=J, requires_grad=True)
    f = device.jit(lambda x: x * torch.rand(3, device=J, generator=g))
    for _ in range(3):
        out = f(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert values(grad) == values(out)


def test_a_failing_call_leaves_nothing() -> None:
    g = torch.Generator().manual_seed(7)
    box = [False]

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + torch.rand(3, device=J, generator=g)
        if box[0]:
            raise KeyError("half-way")
        return y

    compiled, x = device.jit(f), torch.zeros(3, device=J)
    compiled(x)
    box[0] = True
    for _ in range(2):
        with pytest.raises(KeyError, match="half-way"):
            compiled(x)
    box[0] = False
    g.manual_seed(3)
    want = torch.rand(3, device=J, generator=torch.Generator().manual_seed(3))
    assert values(compiled(x)) == values(want)


# --- where it cannot be


def test_pure_functions_refuse_generators() -> None:
    g = torch.Generator()
    x = jnp.zeros(3)

    def draws(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3, generator=g)

    def on_the_cpu(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3, generator=g, device="cpu").to(x.device)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.clone().uniform_(generator=g)

    def positional(x: torch.Tensor) -> torch.Tensor:
        return torch._standard_gamma(x + 1, g)

    for fn in (draws, on_the_cpu, in_place, positional):
        with pytest.raises(SignatureError, match="rng="):
            torch2jax(fn, lower=True)(x)
        with pytest.raises(SignatureError, match="rng="):
            torch2jax(fn, lower=True, stochastic=True)(x, rng=jax.random.key(0))
        with pytest.raises(SignatureError, match="rng="):
            jax_jit(fn)(torch.zeros(3, device=J))
    apply, variables = from_module(Noisy(g), lower=True)
    with pytest.raises(SignatureError, match="rng="):
        apply(variables, x, rng=jax.random.key(0))
    before = g.get_state()
    with pytest.raises(SignatureError, match="rng="):
        device.jit(device.checkpoint(draws))(torch.zeros(3, device=J))
    assert torch.equal(g.get_state(), before)


def test_numbers_of_the_cpu_would_be_constants() -> None:
    g = torch.Generator()
    x = torch.zeros(3, device=J)

    def draws(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand((), device="cpu")

    def draws_from(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand((), generator=g, device="cpu")

    def seeds(x: torch.Tensor) -> torch.Tensor:
        g.manual_seed(0)
        return x + torch.rand(3, device=J, generator=g)

    for fn in (draws, draws_from, seeds):
        f = device.jit(fn)
        f(x)
        with pytest.raises(Torch2JaxError, match="happen once"):
            f(x)


def test_generators_that_a_function_makes() -> None:
    """Each trace would find another one, without an end."""

    def draws(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3, device=J, generator=torch.Generator(J).manual_seed(0))

    f, x = device.jit(draws), torch.zeros(3, device=J)
    f(x)
    for _ in range(2):
        with pytest.raises(Torch2JaxError, match="makes itself"):
            f(x)
    assert torch.equal(draws(x), draws(x))
