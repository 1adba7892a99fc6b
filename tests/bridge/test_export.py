"""Exported programs: written in one process, run in another that registers the functions."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import SignatureError, export_checks, register, torch2jax

pytest.importorskip("flatbuffers", reason="the extra `export` is not installed")

FUNCTIONS = """
    import jax, jax.numpy as jnp, numpy as np, sys, torch
    from torch2jax import SignatureError, export_checks, register, torch2jax

    def layer(x, w):
        return torch.tanh(x @ w)

    def noise(x):
        return torch.nn.functional.dropout(x, 0.5)

    def tree(args, *, scale):
        return {"y": args["a"] * scale + args["b"]}

    x, w = jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.linspace(0, 1, 12).reshape(3, 4)
    programs = {
        "call": lambda x, w: f(x, w),
        "grad": jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1)),
        "jvp": lambda x, w: jax.jvp(f, (x, w), (x, w)),
        "vmap": jax.vmap(lambda x, w: f(x[None], w), (0, None)),
        "vmap_grad": jax.vmap(jax.grad(lambda x, w: (f(x[None], w) ** 2).sum(), (0, 1)), (0, None)),
        "hvp": lambda x, w: jax.jvp(jax.grad(lambda x: (f(x, w) ** 2).sum()), (x,), (x,)),
        "jacrev": lambda x, w: jax.jacrev(f)(x, w),
        "scan": lambda x, w: jax.lax.scan(lambda c, _: (c + f(c, w)[:, :3], None), x, None, 3)[0],
        "key": lambda x, w: g(x, rng=jax.random.key(3)),
        "tree": lambda x, w: h({"a": x, "b": x[0]}, scale=x),
    }
"""
EXPORT = (
    FUNCTIONS
    + """
    f = torch2jax(layer, name="layer")
    g = torch2jax(noise, name="noise", stochastic=True)
    h = torch2jax(tree, name="tree")
    for name, program in programs.items():
        exported = jax.export.export(jax.jit(program), disabled_checks=export_checks)(x, w)
        open(f"{sys.argv[1]}/{name}", "wb").write(exported.serialize(vjp_order=1 if name == "call" else 0))
        out = jax.tree.leaves(jax.jit(program)(x, w))
        np.savez(f"{sys.argv[1]}/{name}.npz", *out)
"""
)
LOAD = (
    FUNCTIONS
    + """
    f = register(layer, x, w, name="layer")
    register(layer, jnp.ones((1, 3)), w, name="layer")
    g = register(noise, x, name="noise", stochastic=True)
    h = register(tree, {"a": x, "b": x[0]}, example_kw={"scale": x}, name="tree")
    for name in programs:
        exported = jax.export.deserialize(bytearray(open(f"{sys.argv[1]}/{name}", "rb").read()))
        for _ in range(2):
            out = jax.tree.leaves(exported.call(x, w))
        for a, b in zip(out, np.load(f"{sys.argv[1]}/{name}.npz").values(), strict=True):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6, err_msg=name)
        if name == "call":
            got = jax.grad(lambda x, w: exported.call(x, w).sum(), (0, 1))(x, w)
            want = jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), (0, 1))(x, w)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want)
"""
)
WRONG = (
    FUNCTIONS
    + """
    def message():
        exported = jax.export.deserialize(bytearray(open(f"{sys.argv[1]}/grad", "rb").read()))
        try:
            jax.block_until_ready(exported.call(x, w))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            return str(error)

    assert 'is registered as "layer/keep(0,1)"' in message(), message()
    register(layer, jnp.ones((5, 3)), w, name="layer")
    text = message()
    assert "exported for (float32[2,3],float32[3,4])" in text, text
    assert "registered for (float32[5,3],float32[3,4])" in text, text
    register(layer, x, w, name="layer")
    assert message() is None
    try:
        register(noise, x, name="layer")
    except SignatureError as error:
        assert "has the name 'layer'" in str(error)
        print("refused")
"""
)


def python(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_artifacts_in_another_process(tmp_path: Path) -> None:
    python(EXPORT, tmp_path)
    python(LOAD, tmp_path)
    assert python(WRONG, tmp_path) == "refused\n"


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def exported(f: Any, *args: Any) -> Any:
    return jax.export.export(jax.jit(f), disabled_checks=export_checks)(*args)


def test_in_the_exporting_process() -> None:
    f = torch2jax(double, name="double_here")
    call = exported(f, jnp.ones(3)).call
    np.testing.assert_array_equal(call(jnp.arange(3.0)), [0, 2, 4])
    np.testing.assert_array_equal(jax.jit(call)(jnp.arange(3.0)), [0, 2, 4])


def test_without_a_name() -> None:
    with pytest.raises(SignatureError, match=r'double is exported without a name.*name="'):
        exported(torch2jax(double), jnp.ones(3))


@pytest.mark.parametrize(
    "path",
    ["/vjp", "/vjp(9;0)", "/vmap(0,0)", "/keep(a)", "/tape(0)", "/../x", "/__import__('os')", ""],
)
def test_names_that_nobody_gave(path: str) -> None:
    """A name from an artifact only looks up: anything else is an error."""
    register(double, jnp.ones(3), name="double_known")
    name = f"double_known{path}|float32[{3 if path else 4}]"
    call = jax.ffi.ffi_call("torch2jax", jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="double"):
        jax.block_until_ready(call(jnp.ones(3), name=name))


def test_on_several_devices() -> None:
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    register(double, jnp.ones(2), name="double_spread")
    f = torch2jax(double, name="double_spread")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    artifact = exported(spread, jnp.ones(8))
    x = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, P("d")))
    np.testing.assert_array_equal(jax.jit(artifact.call)(x), 2 * np.arange(8.0))
