"""The tests of a file here run in a process of their own, which has fake GPUs.

NOTE [A process for each file]. The fake GPUs replace parts of torch for good, so ordinary tests must
not share their process. The first test of a file starts one, which runs all of the file's tests
that were chosen; each test here then reports what happened to it there. ``inside.py`` is that
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_DRIVER = os.environ.get("T2J_FAKE_GPU")
_results = pytest.StashKey[dict[str, Any]]()


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The fake GPUs, with nothing counted. A test that leaves a race behind fails."""
    if _DRIVER is None:
        yield None
        return
    import fake_gpu

    fake = fake_gpu.install(Path(_DRIVER))
    fake.reset()
    fake.synchronizations = fake.foreach_copies = 0
    yield fake
    if request.node.get_closest_marker("races") is None:
        assert fake.races() == []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "races: the test makes races itself, and looks at them")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if _DRIVER is not None:
        return None
    if torch.version.cuda is not None:
        pytest.skip("the fake GPUs stand for PyTorch's CUDA half, which this build has itself")
    session = pyfuncitem.session
    stash = session.stash.setdefault(_results, {})
    path = str(pyfuncitem.path)
    if path not in stash:
        chosen = [item.nodeid for item in session.items if str(item.path) == path]
        stash[path] = _run(pyfuncitem.config, chosen)
    outcome = stash[path].get(pyfuncitem.nodeid)
    if outcome is None:
        pytest.fail(f"the process with the fake GPUs ended early:\n{stash[path]['']}", False)
    kind, text = outcome
    if kind == "skipped":
        pytest.skip(text)
    if kind == "failed":
        pytest.fail(text, pytrace=False)
    return True


def _run(config: pytest.Config, chosen: list[str]) -> dict[str, Any]:
    program = str(Path(__file__).with_name("inside.py"))
    command = [sys.executable, program, "-p", "no:xdist", "--no-header", "-q", *chosen]
    done = subprocess.run(
        command,
        cwd=config.rootpath,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = {"": done.stdout[-8000:] + done.stderr[-8000:]}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            nodeid, kind, text = json.loads(line[len(_MARK) :])
            found[nodeid] = kind, text
    return found


_MARK = "fake-gpu:"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _DRIVER is not None and (report.when == "call" or not report.passed):
        line = _MARK + json.dumps([report.nodeid, report.outcome, report.longreprtext])
        sys.__stdout__.write("\n" + line + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
