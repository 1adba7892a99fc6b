"""The doctor: what was found on this machine, and a proof that the bridge works on it.

``python -m torch2jax`` prints it. Every proof runs a PyTorch function through a transform of JAX
and compares with the same function in ``jax.numpy`` under the same transform.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch

from . import __version__
from ._errors import TorchCallError
from ._ffi import PLATFORMS, TARGET, dlpack_path, dtype_routes
from ._module import from_module
from ._tape import default_budget, tape_info
from ._wrap import torch2jax

LIBRARIES = ("flax", "equinox", "optax", "orbax-checkpoint", "numpyro", "transformers")
"""Optional libraries whose versions are told where they are installed."""

TIMEOUT = 300
"""Seconds after which the doctor prints where every thread hangs, and gives up."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    section: str
    name: str
    status: str
    """ "ok", "info", "warning" or "failed"."""
    detail: str
    remedy: str = ""


@dataclass
class Report:
    """All that was found."""

    checks: list[Check] = field(default_factory=list)
    microseconds: dict[str, float] = field(default_factory=dict)
    """Median cost of a call, by the way it is called."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
        proofs = [check for check in self.checks if check.section == "Proofs"]
        passed = sum(check.status == "ok" for check in proofs)
        warnings = sum(check.status == "warning" for check in self.checks)
        if self.ok:
            text = f"{TARGET} works here: {passed} of {len(proofs)} proofs passed"
        else:
            names = ", ".join(check.name for check in self.failed)
            text = f"{TARGET} does not work here: {names} failed"
        return text + (f", {warnings} warning{'s' * (warnings > 1)}." if warnings else ".")

    def as_json(self) -> str:
        return json.dumps(
            {
                "ok": self.ok,
                "verdict": self.verdict,
                "checks": [asdict(check) for check in self.checks],
                "microseconds": self.microseconds,
            },
            indent=2,
        )


def examine() -> Report:
    """Look at everything, and run the proofs."""
    report = Report()
    for section in (_versions, _devices, _bridge, _memory, _proofs):
        try:
            report.checks += section()
        except Exception as error:  # the doctor tells of it, and goes on
            name = section.__name__.lstrip("_").capitalize()
            report.checks.append(Check(name, "look", "failed", _told(error)))
    if report.ok:
        costs, report.microseconds = _costs()
        report.checks += costs
    return report


# -- what is here ----------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    def found(name: str, detail: str) -> Check:
        return Check("Versions", name, "info", detail)

    yield found(TARGET, __version__)
    yield found("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield found("jax", f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}")
    built = torch.version.cuda or torch.version.hip
    kind = "CUDA" if torch.version.cuda else "ROCm"
    yield found("torch", f"{torch.__version__}, {f'{kind} {built}' if built else 'CPU only'}")
    yield found("numpy", np.__version__)
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield found(name, importlib.metadata.version(name))


def visible_devices() -> list[Any]:
    """This process's devices of the default backend, and the CPU's."""
    devices = list(jax.local_devices())
    if devices[0].platform != "cpu":
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS leaves the CPU out
            devices += jax.local_devices(backend="cpu")
    return devices


def _devices() -> Iterator[Check]:
    devices = visible_devices()
    for d in devices:
        known = d.platform in ("cpu", "gpu")
        yield Check(
            "Devices",
            f"{d.platform}:{d.id}",
            "info" if known else "warning",
            d.device_kind,
            "" if known else "PyTorch does not reach this device: move arrays to a CPU first.",
        )
    on_jax = sum(d.platform == "gpu" for d in devices)
    on_torch = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if on_jax and not on_torch:
        yield Check(
            "Devices",
            "GPUs",
            "failed",
            f"JAX has {on_jax}, PyTorch has none",
            "Install a PyTorch that is built for this GPU, or set JAX_PLATFORMS=cpu.",
        )
    elif on_torch and not on_jax:
        yield Check(
            "Devices",
            "GPUs",
            "warning",
            f"PyTorch has {on_torch}, JAX has none",
            "To compute on the GPU install JAX for it: pip install 'jax[cuda12]'.",
        )


def _bridge() -> Iterator[Check]:
    def found(name: str, detail: str) -> Check:
        return Check("Bridge", name, "ok", detail)

    yield found("custom call", f"{TARGET!r}, registered for {', '.join(PLATFORMS)}")
    path = dlpack_path()
    ways = {
        "c-exchange-api": "PyTorch's C exchange API, no Python object per tensor",
        "capsules": "capsules; PyTorch 2.10 or later has a faster way",
    }
    yield found("DLPack", ways.get(path, path))
    detours = sorted(name for name, route in dtype_routes().items() if name != route)
    if detours:
        yield Check("Bridge", "dtypes", "info", f"as bytes, reinterpreted: {', '.join(detours)}")
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    yield Check(
        "Bridge",
        "x64",
        "info",
        "on" if x64 else "off, as JAX starts: float64 results become float32, int64 int32",
    )


# -- settings that will hurt -----------------------------------------------------------------------


def _memory() -> Iterator[Check]:
    gpus = [d for d in visible_devices() if d.platform == "gpu"]
    if gpus:
        yield from _memory_of_gpus()
    yield from _memory_of_host()
    yield from _switches(bool(gpus))


def _memory_of_gpus() -> Iterator[Check]:
    environment = os.environ
    if environment.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        yield Check(
            "Memory",
            "allocator",
            "warning",
            "XLA_PYTHON_CLIENT_ALLOCATOR=platform asks the driver for every array",
            "Leave it unset.",
        )
    elif environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0"):
        fraction = environment.get("XLA_CLIENT_MEM_FRACTION") or environment.get(
            "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"
        )
        if float(fraction) > 0.6:
            yield Check(
                "Memory",
                "preallocation",
                "warning",
                f"JAX takes {float(fraction):.0%} of a GPU's memory at its start; PyTorch's "
                "activations have to fit into the rest",
                "Set XLA_PYTHON_CLIENT_PREALLOCATE=false, or XLA_CLIENT_MEM_FRACTION=.4",
            )


def _memory_of_host() -> Iterator[Check]:
    given = tape_info().budget
    budget = default_budget(torch.device("cpu")) if given is None else given
    limit = memory_limit()
    detail = f"up to {budget / 2**30:.1f} GiB of activations on the host"
    if limit is not None:
        detail += f"; the process may use {limit / 2**30:.1f} GiB"
    tight = limit is not None and budget > limit // 2
    yield Check(
        "Memory",
        "tape",
        "warning" if tight else "info",
        detail,
        f"Set {TARGET.upper()}_TAPE_BYTES, or call set_tape_budget()." if tight else "",
    )


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The bytes to which a container limits this process, if it does."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int((root / name).read_text(encoding="ascii"))
            return limit if limit < 2**60 else None
    return None


def _switches(gpu: bool) -> Iterator[Check]:
    """Debugging switches that were left on, and too many threads."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        yield Check(
            "Memory",
            "jit",
            "warning",
            "jax_disable_jit is on: loops run in Python, one call at a time",
            "Unset JAX_DISABLE_JIT.",
        )
    slow = {"CUDA_LAUNCH_BLOCKING": "every kernel is awaited"}
    slow["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "PyTorch asks the driver for every tensor"
    for name, effect in slow.items():
        if gpu and os.environ.get(name, "0") != "0":
            yield Check("Memory", name, "warning", f"is set: {effect}", "Unset it.")
    threads, processors = torch.get_num_threads(), _processors()
    if threads > processors:
        yield Check(
            "Memory",
            "threads",
            "warning",
            f"PyTorch computes with {threads} threads on {processors} processors",
            f"Call torch.set_num_threads({processors}), or set OMP_NUM_THREADS.",
        )


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- proofs ----------------------------------------------------------------------------------------

Fn: TypeAlias = Callable[..., Any]


def _torch_fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a) @ b


def _twin(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tanh(a) @ b


def _total(f: Fn) -> Fn:
    return lambda a, b: f(a, b).sum()


TRANSFORMS: dict[str, Callable[[Fn], Fn]] = {
    "call": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(_total(f), (0, 1)),
    "jvp": lambda f: lambda a, b: jax.jvp(f, (a, b), (b.T, a.T)),
    "hessian": lambda f: jax.hessian(_total(f)),
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "jit(vmap(grad))": lambda f: jax.jit(jax.vmap(jax.grad(_total(f)), (0, None))),
}


def _operands() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    a = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    return a, np.cos(a.T)


def _proofs() -> Iterator[Check]:
    for name, transform in TRANSFORMS.items():
        yield _proof(name, lambda transform=transform: _agrees(transform, jnp.asarray))
    for name, run in {
        "operands": _proof_of_sharing,
        "module": _proof_of_module,
        "randomness": _proof_of_randomness,
        "exception": _proof_of_exception,
    }.items():
        yield _proof(name, run)
    devices = [d for d in visible_devices() if d.platform in ("cpu", "gpu")]
    for d in devices:
        yield _proof(f"{d.platform}:{d.id}", lambda d=d: _proof_of_device(d))
    if len(devices) > 1:
        yield _proof("all devices at once", lambda: _proof_of_all_devices(devices))


def _proof(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check("Proofs", name, "ok", run())
    except Exception as error:  # whatever goes wrong belongs into the report
        return Check("Proofs", name, "failed", _told(error))


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _agrees(transform: Callable[[Fn], Fn], put: Callable[[Any], jax.Array]) -> str:
    a, b = map(put, _operands())
    got = transform(torch2jax(_torch_fn))(a, b)
    _assert_equal(got, transform(_twin)(a, b))
    return "as jax.numpy has it"


def _assert_equal(got: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # As far as a GPU's short floats for matrix products go.
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=2e-3)


def _proof_of_sharing() -> str:
    seen: list[int] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        seen.append(a.data_ptr())
        return a + 1

    a = jnp.asarray(_operands()[0])
    jax.block_until_ready(torch2jax(fn, output_shapes=a, side_effects=True)(a))
    if seen != [a.unsafe_buffer_pointer()]:
        raise AssertionError("PyTorch was given a copy")
    return "PyTorch works in XLA's memory"


def _proof_of_module() -> str:
    module = torch.nn.Linear(3, 2)
    apply, variables = from_module(module)
    a = jnp.asarray(_operands()[0])

    def loss(params: Any) -> jax.Array:
        return (apply({**variables, "params": params}, a) ** 2).sum()

    def twin(params: Any) -> jax.Array:
        return ((a @ params["weight"].T + params["bias"]) ** 2).sum()

    params = variables["params"]
    _assert_equal(jax.jit(jax.grad(loss))(params), jax.grad(twin)(params))
    return "gradients of a torch.nn.Linear"


def _proof_of_randomness() -> str:
    drop = torch2jax(lambda x: torch.nn.functional.dropout(x, 0.5), stochastic=True)
    x, key = jnp.arange(1.0, 65.0), jax.random.key(0)
    out = jax.jit(drop)(x, rng=key)
    gradient = jax.jit(jax.grad(lambda x: drop(x, rng=key).sum()))(x)
    _assert_equal(out, x * gradient)
    if not 0 < int((out != 0).sum()) < x.size:
        raise AssertionError("dropout dropped nothing, or all")
    return "one key, one mask, forward and backward"


def _proof_of_exception() -> str:
    def fn(a: torch.Tensor) -> torch.Tensor:
        raise LookupError("on purpose")

    a = jnp.ones(3)
    try:
        torch2jax(fn, output_shapes=a)(a)
    except TorchCallError as error:
        if not isinstance(error.__cause__, LookupError):
            raise
    else:
        raise AssertionError("an exception in PyTorch was lost")
    _assert_equal(torch2jax(torch.sin)(a), jnp.sin(a))
    return "reaches the caller, and the next call works"


def _proof_of_device(device: Any) -> str:
    a, b = (jax.device_put(x, device) for x in _operands())
    f = torch2jax(_torch_fn)
    out = jax.jit(f)(a, b)
    gradient = jax.jit(jax.grad(_total(f)))(a, b)
    if out.devices() != {device} or gradient.devices() != {device}:
        raise AssertionError(f"results are on {out.devices()} and {gradient.devices()}")
    _assert_equal((out, gradient), (_twin(a, b), jax.grad(_total(_twin))(a, b)))
    return "jit and grad, results on the device"


def _proof_of_all_devices(devices: list[Any]) -> str:
    compiled = jax.jit(torch2jax(_torch_fn))
    operands = [[jax.device_put(x * i, d) for x in _operands()] for i, d in enumerate(devices)]
    results = [[compiled(*pair) for pair in operands] for _ in range(20)]  # none is awaited
    for result in results:
        _assert_equal(result, [_twin(*pair) for pair in operands])
    return f"{len(devices)} devices, 20 calls each, none awaited before the last"


# -- what a call costs -----------------------------------------------------------------------------

_LOOP = 1000


def _costs() -> tuple[list[Check], dict[str, float]]:
    a = b = jnp.ones(16)
    add = torch2jax(torch.add)
    compiled, gradient = jax.jit(add), jax.jit(jax.grad(lambda a, b: add(a, b).sum()))
    native = jax.jit(jnp.add)

    @jax.jit
    def loop(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _LOOP, lambda _, x: add(x, b), a)

    figures = {
        "in a compiled loop": _microseconds(lambda: loop(a, b), 1) / _LOOP,
        "jit": _microseconds(lambda: compiled(a, b)),
        "eager": _microseconds(lambda: add(a, b)),
        "jit(grad)": _microseconds(lambda: gradient(a, b)),
        "jax.jit(jnp.add)": _microseconds(lambda: native(a, b)),
    }
    checks = [
        Check("Cost of a + b, float32[16]", name, "info", f"{cost:.3g} µs a call")
        for name, cost in figures.items()
    ]
    return checks, figures


def _microseconds(call: Callable[[], jax.Array], calls: int = 100) -> float:
    """Median of some rounds, each call awaited."""
    call().block_until_ready()
    rounds = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(calls):
            call().block_until_ready()
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds) * 1e6


# -- on the terminal -------------------------------------------------------------------------------

MARKS = {"ok": "ok", "info": "-", "warning": "!", "failed": "FAILED"}
COLOURS = {"ok": "green", "info": "dim", "warning": "yellow", "failed": "bold red"}


def as_text(report: Report) -> str:
    """The report without colours."""
    lines = []
    for section, checks in _sections(report.checks):
        lines += ["", section]
        for check in checks:
            lines.append(f"  {MARKS[check.status]:>6}  {check.name:<20} {check.detail}")
            if check.remedy:
                lines.append(f"{'':30} {check.remedy}")
    return "\n".join([*lines, "", report.verdict])


def print_rich(report: Report) -> None:
    """The report in colours; ImportError where rich is not installed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    width = max(len(check.name) for check in report.checks)
    for section, checks in _sections(report.checks):
        table = Table.grid(padding=(0, 2))
        table.add_column(width=6, justify="right")
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            colour = COLOURS[check.status]
            detail = escape(check.detail)
            if check.remedy:
                detail += f"\n[bold]{escape(check.remedy)}[/]"
            table.add_row(f"[{colour}]{MARKS[check.status]}[/]", escape(check.name), detail)
        console.print(f"\n[bold]{section}[/]")
        console.print(table)
    colour = "bold green" if report.ok else "bold red"
    console.print(f"\n[{colour}]{escape(report.verdict)}[/]")


def _sections(checks: Iterable[Check]) -> Iterator[tuple[str, list[Check]]]:
    by_section: dict[str, list[Check]] = {}
    for check in checks:
        by_section.setdefault(check.section, []).append(check)
    yield from by_section.items()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 where the bridge works, 1 where it does not."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {TARGET}",
        description=f"Show what {TARGET} finds on this machine, and prove that it works.",
        epilog="The exit status is 0 where it works, 1 where a proof or a check failed.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr of its own
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    try:
        report = examine()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if arguments.json:
        print(report.as_json())
        return int(not report.ok)
    try:
        print_rich(report)
    except ImportError:
        encoding = sys.stdout.encoding or "ascii"
        print(as_text(report).encode(encoding, "replace").decode(encoding))
    return int(not report.ok)
