"""What takes long says what it is, on stderr, and TORCH2JAX_PROGRESS=0 keeps it silent."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.torch_version import TorchVersion

from torch2jax import _progress, device, torch2jax
from torch2jax._progress import telling

NEEDS_DEVICE = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.10"), reason="the device needs PyTorch 2.10"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "_SILENT_FOR", 0.02)
    monkeypatch.delenv("TORCH2JAX_PROGRESS", raising=False)


def slow(x: Any) -> Any:
    time.sleep(0.2)
    return torch.sin(x)


def test_what_is_fast_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_SILENT_FOR", 60.0)
    started = time.monotonic()
    with telling("resting"):
        pass
    assert time.monotonic() - started < 30  # nobody waits for the two seconds
    assert capsys.readouterr() == ("", "")


def test_what_is_slow_says_what_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with telling("resting"), telling("resting inside"):
        time.sleep(0.2)
    with pytest.raises(ZeroDivisionError), telling("failing"):
        1 / (time.sleep(0.2) or 0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "torch2jax: resting ...",
        "torch2jax: resting took 0 s",
        "torch2jax: failing ...",
        "torch2jax: failing took 0 s",
    ]


def test_the_environment_keeps_it_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH2JAX_PROGRESS", "0")
    with telling("resting"):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def test_a_first_trace_names_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    f = jax.jit(torch2jax(slow))
    assert jnp.allclose(f(jnp.ones(3)), jnp.sin(jnp.ones(3)))
    assert re.match(r"torch2jax: inferring what .*slow.* returns \.\.\.\n", capsys.readouterr().err)
    f(jnp.ones(3))  # this shape was traced
    assert capsys.readouterr().err == ""


@NEEDS_DEVICE
def test_a_lowered_trace_names_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    f = jax.jit(torch2jax(slow, lower=True))
    assert jnp.allclose(f(jnp.ones(3)), jnp.sin(jnp.ones(3)))
    assert re.match(
        r"torch2jax: tracing .*slow.* with lower=True \.\.\.\n", capsys.readouterr().err
    )


@NEEDS_DEVICE
def test_a_trace_for_the_device_names_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    device.enable()
    f, x = device.jit(slow), torch.ones(3, device="jax")
    for _ in range(3):
        assert torch.allclose(f(x).cpu(), torch.sin(torch.ones(3)))
    told = capsys.readouterr().err
    assert told.count("torch2jax: tracing slow for device jax ...") == 1


@NEEDS_DEVICE
def test_compilations_name_the_function(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch2jax._bridge.compiled import building, graphs
    from torch2jax._bridge.torch_side.inference import Spec

    def compiler(module: Any, operands: Any, options: dict[str, Any]) -> None:
        time.sleep(0.2)
        Path(options["aot_inductor.output_path"]).write_bytes(b"a library")

    monkeypatch.setattr("torch._inductor.aot_compile", compiler)
    monkeypatch.setenv("CXX", sys.executable)  # it is looked for, and not run
    spec = Spec((3,), torch.float32, torch.device("cpu"), None)
    around = graphs.Surroundings("mine", torch.float32, (), None)
    graph = graphs.trace(lambda x: (slow(x),), [spec], around)
    building.build(graph, tmp_path / "library.so", "mine")
    assert (tmp_path / "library.so").read_bytes() == b"a library"
    assert [line for line in capsys.readouterr().err.splitlines() if line.endswith("...")] == [
        "torch2jax: tracing mine for compiled=True ...",
        "torch2jax: compiling mine with PyTorch ...",
    ]
