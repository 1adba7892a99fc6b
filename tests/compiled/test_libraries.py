"""PyTorch compiles, XLA calls: one function in three libraries, which these tests share."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch2jax as package
from torch2jax import export_checks, load_compiled, save_compiled, torch2jax
from torch2jax._bridge.compiled import libraries as table
from torch2jax._bridge.handler import extension

A = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.float32)
B = jnp.asarray(np.random.default_rng(1).standard_normal((16, 16)) / 4, jnp.float32)

PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np, torch
    from torch2jax import torch2jax

    def small(a, b):
        return torch.tanh(a @ b) * 2 + 1

    f = torch2jax(small, compiled=True)
    A = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.float32)
    B = jnp.asarray(np.random.default_rng(1).standard_normal((16, 16)) / 4, jnp.float32)
    value, grads = jax.value_and_grad(lambda a, b: f(a, b).sum(), (0, 1))(A, B)
    print(float(value))
"""
"""It is the function of this file, in another process."""


def small(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b) * 2 + 1


def twin(a: Any, b: Any) -> Any:
    return jnp.tanh(a @ b) * 2 + 1


f = torch2jax(small, compiled=True)


def total(fn: Any) -> Any:
    return lambda a, b: fn(a, b).sum()


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(package.__file__).parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module", autouse=True)
def compiled(libraries: Path) -> None:
    """Compile the function's graphs: forward, forward with residuals, backward."""
    f(A, B)
    jax.value_and_grad(total(f), (0, 1))(A, B)


def test_values_and_gradients() -> None:
    np.testing.assert_allclose(f(A, B), twin(A, B), rtol=1e-4, atol=1e-5)
    value, grads = jax.jit(jax.value_and_grad(total(f), (0, 1)))(A, B)
    expected, expected_grads = jax.value_and_grad(total(twin), (0, 1))(A, B)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_loop_of_calls() -> None:
    looped = jax.jit(lambda a, b: jax.lax.fori_loop(0, 50, lambda _, x: f(x, b), a))
    expected = jax.jit(lambda a, b: jax.lax.fori_loop(0, 50, lambda _, x: twin(x, b), a))
    np.testing.assert_allclose(looped(A, B), expected(A, B), rtol=1e-2, atol=1e-2)


def _libraries_of_small() -> list[str]:
    text = jax.jit(lambda a, b: f(a, b)).lower(A, B).as_text()
    return [name for name in table._loaded if name in text]


def test_calls_go_on_while_another_thread_holds_the_gil() -> None:
    """A bridged call would wait: for a second this thread keeps Python's lock."""
    [name] = _libraries_of_small()
    looped = jax.jit(lambda a, b, n: jax.lax.fori_loop(0, n, lambda _, x: f(x, b), a))
    looped(A, B, 1).block_until_ready()
    start = extension.library_calls(name)
    thread = threading.Thread(target=lambda: looped(A, B, 600_000).block_until_ready())
    thread.start()
    deadline = time.monotonic() + 30
    while extension.library_calls(name) == start and time.monotonic() < deadline:
        time.sleep(0.01)
    before = extension.library_calls(name)
    ctypes.PyDLL(None).usleep(1_000_000)
    after = extension.library_calls(name)
    thread.join()
    assert after - before > 1000
    assert extension.library_calls("no such library") == -1


def test_threads_at_once() -> None:
    looped = jax.jit(lambda a, b: jax.lax.fori_loop(0, 500, lambda _, x: f(x, b), a))
    expected = np.asarray(looped(A, B))
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        found[i] = np.asarray(looped(A, B))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in found:
        np.testing.assert_array_equal(x, expected)


def test_several_devices() -> None:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    stacked = jnp.stack([A, A + 1, A - 1, 2 * A])

    def local(a: Any, b: Any) -> Any:
        return f(a[0], b)[None]

    spec = jax.P("rows")
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec))
    found = mapped(stacked, B)
    np.testing.assert_allclose(found, jax.vmap(twin, (0, None))(stacked, B), rtol=1e-3, atol=1e-4)


def test_another_process_compiles_nothing() -> None:
    """There is no compiler in that process."""
    done = run(PROGRAM, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(float(done.stdout), total(twin)(A, B), rtol=1e-4)
    assert done.stderr == ""


def test_a_damaged_library_is_never_loaded(libraries: Path, tmp_path: Path) -> None:
    for path in libraries.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("*.so"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    done = run(PROGRAM, CXX="no-such-compiler", TORCH2JAX_CACHE_DIR=str(tmp_path))
    assert done.returncode != 0
    assert "there is no C++ compiler 'no-such-compiler'" in done.stderr
    assert "apt-get install g++" in done.stderr


def test_a_program_with_its_libraries_is_one_file(tmp_path: Path) -> None:
    step = jax.jit(lambda a, b: jax.value_and_grad(total(f), (0, 1))(a, b))
    exported = jax.export.export(step, disabled_checks=export_checks)(A, B)
    path = tmp_path / "step.zip"
    save_compiled(path, exported)
    program = f"""
        import jax.numpy as jnp, numpy as np, sys
        from torch2jax import load_compiled

        A = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.float32)
        B = jnp.asarray(np.random.default_rng(1).standard_normal((16, 16)) / 4, jnp.float32)
        value, grads = load_compiled({str(path)!r})(A, B)
        print(float(value), float(abs(grads[0]).sum()))
    """
    done = run(program, CXX="no-such-compiler", TORCH2JAX_CACHE_DIR=str(tmp_path / "fresh"))
    assert done.returncode == 0, done.stderr
    value, grads = jax.value_and_grad(total(twin), (0, 1))(A, B)
    found = list(map(float, done.stdout.split()))
    np.testing.assert_allclose(found, [value, jnp.abs(grads[0]).sum()], rtol=1e-3)


def test_a_saved_program_has_derivatives(tmp_path: Path) -> None:
    export = jax.export.export(jax.jit(lambda a, b: f(a, b).sum()), disabled_checks=export_checks)
    save_compiled(tmp_path / "f.zip", export(A, B), vjp_order=1)
    loaded = load_compiled(tmp_path / "f.zip")
    found = jax.grad(loaded)(A, B)
    np.testing.assert_allclose(found, jax.grad(total(twin))(A, B), rtol=1e-3, atol=1e-4)


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(package.Torch2JaxError, match="is no file of save_compiled"):
        load_compiled(tmp_path / "text")
    plain = jax.jit(torch2jax(lambda x: 2 * x, name="doubled"))
    exported = jax.export.export(plain, disabled_checks=export_checks)(A)
    with pytest.raises(package.Torch2JaxError, match="calls PyTorch through Python, too"):
        save_compiled(tmp_path / "plain", exported)


def test_numbers_from_a_key() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) + torch.randn(256)

    g = torch2jax(noisy, compiled=True, stochastic=True)
    x = jnp.ones(256)
    key, other = jax.random.split(jax.random.key(0))
    first, again, different = g(x, rng=key), g(x, rng=key), g(x, rng=other)
    assert jnp.array_equal(first, again)
    assert not jnp.isclose(first, different).any()
    # The gradient is that of the mask that was drawn: the rest is the same noise.
    value, slope = jax.value_and_grad(lambda x: g(x, rng=key).sum())(x)
    np.testing.assert_allclose(value, first.sum(), rtol=1e-4)
    assert set(np.unique(slope).tolist()) == {0.0, 2.0}
    noise = first - slope
    assert abs(float(noise.mean())) < 0.3
    assert 0.8 < float(noise.std()) < 1.2
    assert 0.3 < float((slope == 0).mean()) < 0.7
    rows = jax.vmap(lambda k: g(x, rng=k))(jax.random.split(key, 2))
    assert not jnp.isclose(rows[0], rows[1]).any()


def test_the_librarys_own_error_text() -> None:
    g = torch2jax(lambda x, y: torch.div(x, y, rounding_mode="floor"), compiled=True)
    ints = jnp.arange(1, 5, dtype=jnp.int32)
    assert g(ints, ints).tolist() == [1, 1, 1, 1]
    with pytest.raises(Exception, match=r"a compiled library failed: .*[Zz]ero"):
        g(ints, 0 * ints)
