"""The doctor, ``python -m torch2jax``: what it finds, what it proves, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch2jax import torch2jax
from torch2jax._bridge.handler.extension import TARGET
from torch2jax._doctor import allocators, findings, main, printing, proofs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> Any:
    return main.examine()


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", TARGET, *arguments],
        env={**os.environ, "XLA_FLAGS": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )


def test_it_works_here(report: Any) -> None:
    assert report.ok, report.failed
    assert report.verdict.startswith(f"{TARGET} works here")
    names = {check.name for check in report.checks}
    assert {*proofs.TRANSFORMS, "cpu:0", "jax", "torch", "DLPack", "tape"} <= names
    assert all(0 < cost < 1e6 for cost in report.microseconds.values())


def test_text_has_every_check(report: Any) -> None:
    text = printing.as_text(report)
    assert "\x1b" not in text
    assert text.endswith(report.verdict)
    for check in report.checks:
        assert check.name in text
        assert check.detail in text
        assert check.remedy in text


def test_without_rich_the_text_is_plain(
    report: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(main, "examine", lambda: report)
    assert main.main([]) == 0
    assert capsys.readouterr().out == printing.as_text(report) + "\n"


def test_with_rich(
    report: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(main, "examine", lambda: report)
    assert main.main([]) == 0
    out = capsys.readouterr().out
    assert report.verdict in out
    assert all(check.name in out for check in report.checks)


@pytest.mark.parametrize(
    ("environment", "devices", "warned"),
    [
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3, None),
        ({"JAX_ENABLE_X64": "1"}, 1, None),
        ({"JAX_DISABLE_JIT": "1"}, 1, "jit"),
    ],
    ids=["three devices", "x64", "no jit"],
)
def test_json_of_a_process(environment: dict[str, str], devices: int, warned: str | None) -> None:
    done = doctor("--json", JAX_PLATFORMS="cpu", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    proven = [c["name"] for c in found["checks"] if c["section"] == "Proofs"]
    assert [name for name in proven if name.startswith("cpu:")] == [
        f"cpu:{i}" for i in range(devices)
    ]
    assert ("all devices at once" in proven) == (devices > 1)
    warnings = [c["name"] for c in found["checks"] if c["status"] == "warning"]
    assert warned is None or warned in warnings
    assert set(found["microseconds"]) >= {"jit", "eager", "in a compiled loop"}


def test_a_wrong_result_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proofs, "_torch_fn", lambda a, b: torch.sin(a) @ b)
    assert main.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert "does not work" in found["verdict"]
    failed = {check["name"] for check in found["checks"] if check["status"] == "failed"}
    assert failed >= {*proofs.TRANSFORMS, "cpu:0"}
    assert found["microseconds"] == {}


def test_an_exception_in_a_proof_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fn: Any, *args: Any, **options: Any) -> Any:
        raise ValueError("no bridge today\nand a second line")

    monkeypatch.setattr(proofs, "torch2jax", broken)
    failed = main.examine().failed
    assert {check.detail for check in failed} == {"ValueError: no bridge today"}
    monkeypatch.setattr(proofs, "torch2jax", torch2jax)
    monkeypatch.setattr(findings, "tape_info", lambda: 1 / 0)
    (failed_look,) = main.examine().failed
    assert (failed_look.section, failed_look.detail[:17]) == ("Memory", "ZeroDivisionError")


def test_usage_is_refused() -> None:
    with pytest.raises(SystemExit) as raised:
        main.main(["--jason"])
    assert raised.value.code == 2


# -- settings that hurt ----------------------------------------------------------------------------

GPU = SimpleNamespace(platform="gpu", id=5, local_hardware_id=1, device_kind="a GPU")


def memory_warnings(monkeypatch: pytest.MonkeyPatch, *devices: Any, **environment: str) -> Any:
    for name in ("ALLOCATOR", "PREALLOCATE", "MEM_FRACTION"):
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}", raising=False)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(findings, "visible_devices", lambda: list(devices))
    monkeypatch.setattr(findings, "memory_limit", lambda: None)
    monkeypatch.setattr(findings, "_processors", lambda: 10**6)
    return {check.name for check in findings.memory() if check.status == "warning"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"preallocation"}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, set()),
        ({"XLA_CLIENT_MEM_FRACTION": ".4"}, set()),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, {"preallocation"}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, {"allocator"}),
        (
            {"XLA_CLIENT_MEM_FRACTION": ".4", "CUDA_LAUNCH_BLOCKING": "1"},
            {"CUDA_LAUNCH_BLOCKING"},
        ),
    ],
)
def test_memory_settings_of_a_gpu(
    environment: dict[str, str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory_warnings(monkeypatch, GPU, **environment) == expected


@pytest.mark.parametrize(
    ("environment", "jax_takes", "torch_takes"),
    [
        ({}, "JAX takes 60.0 GiB of 80.0 GiB of a GPU's memory at its start", "20.0 GiB at most"),
        (
            {"XLA_CLIENT_MEM_FRACTION": ".25"},
            "takes 20.0 GiB of 80.0 GiB of a GPU's memory at its start",
            "60.0 GiB at most",
        ),
        (
            {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            "takes what arrays need, 60.0 GiB of 80.0 GiB at most",
            "80.0 GiB at most",
        ),
        (
            {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
            "XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async takes what arrays need",
            "80.0 GiB at most",
        ),
        (
            {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
            "asks the driver for every array",
            "80.0 GiB at most",
        ),
    ],
)
def test_what_the_two_allocators_do(
    environment: dict[str, str],
    jax_takes: str,
    torch_takes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def mem_get_info(number: int) -> tuple[int, int]:
        asked.append(number)
        return 10 * 2**30, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(allocators, "default_budget", lambda device: 2**30 * (1 + device.index))
    found = list(allocators.allocators(GPU, environment))
    assert asked == [1]  # the GPU of this process, by the number of the driver
    told = {check.name: check.detail for check in found}
    assert jax_takes in found[0].detail
    assert torch_takes in told["PyTorch's"]
    assert "up to 2.0 GiB" in told["tape"]
    (fragments,) = [check for check in found if check.name == "fragments"]
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in fragments.remedy
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        set_so = {**environment, name: "expandable_segments:True"}
        assert "fragments" not in {check.name for check in allocators.allocators(GPU, set_so)}


def test_two_names_of_one_variable() -> None:
    both = {"XLA_CLIENT_MEM_FRACTION": ".4", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".4"}
    (check,) = allocators.allocators(GPU, both)
    assert check.status == "failed"
    assert "older name" in check.remedy


def test_memory_settings_of_a_gpu_do_not_matter_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory_warnings(monkeypatch, CUDA_LAUNCH_BLOCKING="1") == set()


def test_a_container_smaller_than_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "memory_limit", lambda: 2**28)
    (check,) = findings._memory_of_host()
    assert check.status == "warning"
    assert f"{TARGET.upper()}_TAPE_BYTES" in check.remedy


def test_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(findings, "_processors", lambda: 2)
    (check,) = findings._switches(gpu=False)
    assert (check.name, check.status) == ("threads", "warning")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("memory.max", "max\n", None),
        ("memory.max", "1073741824\n", 2**30),
        ("memory/memory.limit_in_bytes", "1073741824\n", 2**30),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_memory_limit(name: str, text: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, encoding="ascii")
    assert findings.memory_limit(tmp_path) == expected


@pytest.mark.parametrize(
    ("devices", "on_torch", "status"),
    [([GPU], 0, "failed"), ([], 1, "warning"), ([GPU], 1, None), ([], 0, None)],
)
def test_a_gpu_that_only_one_side_has(
    devices: list[Any], on_torch: int, status: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "visible_devices", lambda: devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_torch > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: on_torch)
    told = [check.status for check in findings.devices() if check.name == "GPUs"]
    assert told == ([] if status is None else [status])


# -- how it is started -----------------------------------------------------------------------------


def test_console_script() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = settings["project"]["scripts"][TARGET].partition(":")
    assert getattr(importlib.import_module(module), function) is main.main
