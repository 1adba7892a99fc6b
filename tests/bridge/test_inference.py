"""Inference leaves no trace, falls back where fake tensors cannot run, and reads any result."""

from __future__ import annotations

import functools
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import SignatureError, Torch2JaxWarning, torch2jax

X = np.arange(4, dtype=np.float32)


def same(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-6, atol=1e-6)


# --- modules -------------------------------------------------------------------------------------


class Rotary(torch.nn.Module):
    """Fills its cache at the first call, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.cos: torch.Tensor | None = None
        self.calls = 0

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        if self.cos is None:
            self.cos = torch.cos(torch.arange(a.shape[0]).float())
        self.calls += 1
        return a * self.cos


def wrapped_in_ways(module: torch.nn.Module) -> dict[str, Any]:
    """Functions that reach a module by every way that the design names."""
    holder = {"net": module}

    class Owner:
        def __init__(self) -> None:
            self.net = module

        def method(self, a: torch.Tensor) -> torch.Tensor:
            return self.net(a)

    return {
        "itself": module,
        "forward": module.forward,
        "closure": lambda a: module(a),
        "partial": functools.partial(lambda m, a: m(a), module),
        "bound": Owner().method,
        "container": lambda a: holder["net"](a),
        "default": lambda a, m=module: m(a),
    }


WAYS = tuple(wrapped_in_ways(torch.nn.Identity()))


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_filled_at_the_first_call_is_not_filled_by_inference(way: str) -> None:
    module = Rotary()
    f = torch2jax(wrapped_in_ways(module)[way])
    f.lower(X)
    assert module.cos is None
    assert module.calls == 0
    same(f(X), X * np.cos(X))
    assert module.calls == 1
    assert type(module.cos) is torch.Tensor
    same(f(X), X * np.cos(X))


GLOBAL_NET = Rotary()


def test_modules_in_globals_are_restored() -> None:
    f = torch2jax(lambda a: GLOBAL_NET(a))
    f.lower(X)
    assert GLOBAL_NET.cos is None
    same(f(X), X * np.cos(X))


@pytest.mark.parametrize("way", WAYS)
def test_batch_norm_is_as_before(way: str) -> None:
    module = torch.nn.BatchNorm1d(3)
    torch2jax(wrapped_in_ways(module)[way]).lower(np.ones((4, 3), np.float32))
    assert int(module.num_batches_tracked) == 0
    same(module.running_mean, np.zeros(3))
    same(module.running_var, np.ones(3))


def test_batch_norm_counts_real_calls() -> None:
    module = torch.nn.BatchNorm1d(3)
    f = torch2jax(module)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    twin = torch.nn.BatchNorm1d(3)
    same(f(x), twin(torch.from_numpy(x)).detach())
    same(module.running_mean, twin.running_mean)
    assert int(module.num_batches_tracked) == int(twin.num_batches_tracked) == 1


def test_batch_norm_is_as_before_where_fakes_cannot_run() -> None:
    module = torch.nn.BatchNorm1d(3)

    def fn(a: torch.Tensor) -> torch.Tensor:
        a.sum().item()
        return module(a)

    torch2jax(fn).lower(np.ones((4, 3), np.float32))
    assert int(module.num_batches_tracked) == 0
    same(module.running_mean, np.zeros(3))


@pytest.mark.parametrize("values", [False, True], ids=["fake", "real"])
def test_parameters_changed_in_place_are_as_before(values: bool) -> None:
    module = torch.nn.Linear(4, 4)
    before = module.weight.detach().clone()

    def fn(a: torch.Tensor) -> torch.Tensor:
        if values:
            a.sum().item()
        with torch.no_grad():
            module.weight.mul_(2)
        return module(a)

    torch2jax(fn).lower(X)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("values", [False, True], ids=["fake", "real"])
def test_captured_tensors_changed_in_place_are_as_before(values: bool) -> None:
    counter = torch.zeros((), dtype=torch.int64)

    def fn(a: torch.Tensor) -> torch.Tensor:
        if values:
            a.sum().item()
        counter.add_(1)
        return a * 2

    f = torch2jax(fn)
    f.lower(X)
    assert int(counter) == 0
    same(f(X), X * 2)
    assert int(counter) == 1


def test_hooks_and_training_mode_survive() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).eval()
    seen: list[int] = []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    f = torch2jax(module)
    same(f(X), module(torch.from_numpy(X)).detach())
    assert not module.training
    assert len(module[0]._forward_hooks) == 1


# --- random state --------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [False, True], ids=["fake", "real"])
def test_the_default_generator_is_as_before(values: bool) -> None:
    before = torch.get_rng_state()

    def fn(a: torch.Tensor) -> torch.Tensor:
        scale = a.sum().item() if values else 1.0
        return a + scale * torch.rand(4)

    torch2jax(fn).lower(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("values", [False, True], ids=["fake", "real"])
def test_a_generator_of_the_user_is_as_before(values: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()

    def fn(a: torch.Tensor) -> torch.Tensor:
        scale = a.sum().item() if values else 1.0
        return a + scale * torch.rand(4, generator=generator)

    torch2jax(fn).lower(X)
    assert torch.equal(generator.get_state(), before)


def test_reference_cycles_are_not_mistaken_for_survivors() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        cycle: list[Any] = [a * 2]
        cycle.append(cycle)
        return a + 1

    same(torch2jax(fn)(X), X + 1)


# --- values --------------------------------------------------------------------------------------


def test_numpy_inside() -> None:
    f = torch2jax(lambda a: torch.from_numpy(np.sin(a.numpy())))
    same(f(X), np.sin(X))
    same(jax.jit(f)(X), np.sin(X))


@pytest.mark.parametrize("kind", ["tensor", "array", "numpy"])
def test_examples_are_the_values_of_the_fallback(kind: str) -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        a.sum().item()
        return torch.linalg.cholesky(a)

    eye = np.eye(3, dtype=np.float32) * 4
    example = {"tensor": torch.from_numpy(eye), "array": jnp.asarray(eye), "numpy": eye}[kind]
    f = torch2jax(fn, example)
    same(jax.jit(f)(eye), np.eye(3) * 2)
    same(f(eye), np.eye(3) * 2)
    assert np.array_equal(eye, np.eye(3) * 4)


def test_a_function_that_calls_a_wrapped_jax_function_inside() -> None:
    from torch2jax import j2t, t2j

    inner = torch2jax(lambda a: a * 2)

    def fn(a: torch.Tensor) -> torch.Tensor:
        return j2t(inner(t2j(a.clone()))) + 1

    same(torch2jax(fn)(X), X * 2 + 1)


# --- results -------------------------------------------------------------------------------------


class ModelOutput(OrderedDict):
    """As Hugging Face's: an OrderedDict with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Record(Mapping):
    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


@pytest.mark.parametrize("kind", [ModelOutput, Record, UserDict])
def test_unknown_mappings_become_dicts(kind: Any) -> None:
    f = torch2jax(lambda a: kind(logits=a * 2, loss=a.sum(), hidden=(a, None), inner=kind(z=a)))
    for out in (f(X), jax.jit(f)(X)):
        assert type(out) is dict
        assert type(out["inner"]) is dict
        assert out["hidden"][1] is None
        same(out["logits"], X * 2)
        same(out["loss"], X.sum())
    same(jax.grad(lambda a: f(a)["loss"])(X), np.ones(4))


@pytest.mark.parametrize(
    ("fn", "twin"),
    [
        (lambda a: torch.topk(a, 2), lambda a: jax.lax.top_k(a, 2)),
        (lambda a: torch.max(a, dim=0), lambda a: (a.max(0), a.argmax(0))),
        (lambda a: a.sort(), lambda a: (jnp.sort(a), jnp.argsort(a))),
        (
            SLOGDET := lambda a: torch.linalg.slogdet(a * torch.eye(4) + torch.eye(4)),
            lambda a: jnp.linalg.slogdet(a * jnp.eye(4) + jnp.eye(4)),
        ),
    ],
    ids=["topk", "max", "sort", "slogdet"],
)
def test_torch_return_types_are_tuples(fn: Any, twin: Any) -> None:
    """`values, indices = f(x)`, as in torch, and fields by name where the tuple keeps them."""
    f = torch2jax(fn)
    for out in (f(X), jax.jit(f)(X)):
        assert isinstance(out, tuple)
        for got, want in zip(out, twin(X), strict=True):
            same(got, want)
    index = 1 if fn is SLOGDET else 0
    same(jax.grad(lambda a: f(a)[index].sum())(X), jax.grad(lambda a: twin(a)[index].sum())(X))


def test_python_numbers_become_0d_arrays() -> None:
    f = torch2jax(lambda a: (a * 2, a.shape[0], 2.5, True, 1j))
    for out in (f(X), jax.jit(f)(X)):
        assert [o.shape for o in out[1:]] == [()] * 4
        assert [o.dtype.name for o in out[1:]] == ["int32", "float32", "bool", "complex64"]
        assert [o.item() for o in out[1:]] == [4, 2.5, True, 1j]


def test_python_numbers_under_transforms() -> None:
    f = torch2jax(lambda a: (a * 2, a.shape[0], 2.5, True))
    out = jax.vmap(f)(np.ones((2, 3), np.float32))
    same(out[1], [3, 3])
    same(out[2], [2.5, 2.5])
    same(out[3], [True, True])
    _, tangent = jax.jvp(f, (X,), (X,))
    same(tangent[0], 2 * X)
    same(tangent[2], 0)
    same(jax.grad(lambda a: f(a)[2])(X), np.zeros(4))
    same(jax.hessian(lambda a: f(a)[2] * f(a)[0].sum())(X), np.zeros((4, 4)))


def test_a_result_from_item_is_read_at_every_call() -> None:
    f = torch2jax(lambda a: a.sum().item())
    same(f(X), 6)
    same(f(X + 1), 10)
    same(jax.jit(f)(X + 1), 10)


def test_arrays_of_numpy_are_refused_with_their_remedy() -> None:
    with pytest.raises(SignatureError, match="from_numpy"):
        torch2jax(lambda a: a.numpy())(X)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_of_the_caller_are_not_changed(name: str) -> None:
    """torch's kernel writes those of batch_norm without saying so: a copy of them is written."""
    norm = getattr(torch.nn.functional, name)
    f = torch2jax(lambda x, mean, var: norm(x, mean, var, momentum=0.5, **{STATISTICS[name]: True}))
    x = jnp.arange(24.0).reshape(4, 3, 2)
    mean, var = jnp.zeros(3), jnp.ones(3)
    with pytest.warns(Torch2JaxWarning, match=r"args\[1\], args\[2\] in place"):
        out = jax.jit(jax.grad(lambda x: (f(x, mean, var) ** 2).sum()))(x)
    f(x, mean, var).block_until_ready()
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(var, np.ones(3))
    assert np.isfinite(out).all()


STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}


def test_running_statistics_updated_in_place() -> None:
    def fn(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.batch_norm(x, mean, var, training=True, momentum=0.5)

    x = jnp.arange(24.0).reshape(4, 3, 2)
    _, (mean, var) = torch2jax(fn, inplace_argnums=(1, 2))(x, jnp.zeros(3), jnp.ones(3))
    np.testing.assert_allclose(mean, x.mean((0, 2)) / 2, rtol=1e-6)
    np.testing.assert_allclose(var, 0.5 + x.var((0, 2), ddof=1) / 2, rtol=1e-6)
