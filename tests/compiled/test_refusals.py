"""What compiled=True refuses, and what it says then; and its cache, without a compiler."""

from __future__ import annotations

import operator
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import nn

from torch2jax import SignatureError, Torch2JaxError, from_module, torch2jax
from torch2jax._bridge.compiled import cache, command
from torch2jax._bridge.compiled.building import digest_of
from torch2jax._bridge.compiled.graphs import Graph
from torch2jax._bridge.torch_side.inference import Spec

X = jnp.ones(3)
HELD = torch.zeros(3)


def asks_for_a_value(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def asks_in_python(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


def shape_of_values(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(2) + x[x > 0].sum()


def writes_elsewhere(x: torch.Tensor) -> torch.Tensor:
    HELD.add_(1)
    return x + HELD


def draws(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(3)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (asks_for_a_value, r"asks for values.*test_refusals.py, line \d+: `return x \* x.sum\(\)"),
        (asks_in_python, r"asks for values.*test_refusals.py, line \d+: `return x if"),
        (shape_of_values, r"depends on values.*test_refusals.py, line \d+"),
        (writes_elsewhere, r"(?s)changes a tensor that is not among its arguments.*HELD.add_"),
        (draws, r"draws random numbers.*from a key alone"),
    ],
)
def test_functions_that_cannot_be_compiled(fn: Any, said: str) -> None:
    before = HELD.clone()
    with pytest.raises(Torch2JaxError, match=said) as caught:
        jax.jit(torch2jax(fn, compiled=True))(X)
    assert "compiled=True" in str(caught.value)
    assert torch.equal(HELD, before)


def test_an_operator_of_pythons() -> None:
    @torch.library.custom_op("compiled_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(Torch2JaxError, match=r"cannot call compiled_tests::twice"):
        torch2jax(lambda x: twice(x) + 1, compiled=True)(X)


@pytest.mark.parametrize("option", [{"lower": True}, {"side_effects": True}, {"out_arg": "out"}])
def test_options_that_exclude_it(option: dict[str, Any]) -> None:
    with pytest.raises(SignatureError, match="exclude each other"):
        torch2jax(torch.sin, compiled=True, **option)


def test_a_module_that_draws_without_a_key() -> None:
    apply, variables = from_module(nn.Dropout(0.5), compiled=True)
    with pytest.raises(SignatureError, match="pass a JAX key as rng="):
        apply(variables, X, train=True)


def test_libraries_of_other_graphs_have_other_names() -> None:
    """A graph may hold graphs: the branches of ``torch.cond``."""

    def graph(number: float) -> Graph:
        inner = torch.fx.symbolic_trace(lambda x: x + number)
        outer = torch.fx.Graph()
        x = outer.placeholder("x")
        held = outer.get_attr("inner")
        outer.output((outer.call_function(operator.call, (held, x)),))
        module = torch.fx.GraphModule({"inner": inner}, outer)
        spec = Spec((3,), torch.float32, torch.device("cpu"))
        return Graph(module, (spec,), (), (spec,))

    assert digest_of(graph(1.0)) == digest_of(graph(1.0))
    assert digest_of(graph(1.0)) != digest_of(graph(2.0))


def _put(folder: Path, name: str, size: int, age: float) -> Path:
    def build(path: Path) -> None:
        path.write_bytes(b"x" * size)

    path = cache.library(name, build, {"label": f"label of {name}"}, folder)
    cache.os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH2JAX_CACHE_DIR", str(tmp_path / "cache"))
    return cache.folder()


def test_the_cache_drops_what_was_not_used_for_longest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH2JAX_CACHE_BYTES", "250")
    oldest = _put(folder, "a", 100, 300)
    old = _put(folder, "b", 100, 200)
    assert oldest.exists()
    new = _put(folder, "c", 100, 0)
    assert [p.exists() for p in (oldest, old, new)] == [False, True, True]


def test_a_library_that_fails_to_build_leaves_nothing(folder: Path) -> None:
    def build(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("the compiler fell over")

    with pytest.raises(ValueError, match="fell over"):
        cache.library("a", build, {}, folder)
    assert not list(folder.glob("a.*so*"))
    assert not list(folder.glob("*.new"))


def test_a_foreign_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH2JAX_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(Torch2JaxError, match="everyone may write"):
        cache.folder()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _put(folder, "a" * 40, 2_000_000, 0)
    command.main([])
    shown = capsys.readouterr().out
    assert "label of aaaa" in shown
    assert "1 libraries, 2.0 of at most" in shown
    command.main(["--clear"])
    assert "removed 2.0 MB" in capsys.readouterr().out
    assert cache.entries() == []
