"""Calls on meshes of forced host devices: shard_map, specs, explicit axes, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from torch2jax import SignatureError, from_module, tape_info, torch2jax

Function = Callable[..., Any]

X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
W = jnp.linspace(0.1, 0.5, 16).reshape(4, 4)


def torch_layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w)


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def mesh(kind: AxisType, *sizes: int) -> jax.sharding.Mesh:
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


# jax < 0.8 has it under another name.
entered_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh

AUTO = mesh(AxisType.Auto, 4)
AUTO_2D = mesh(AxisType.Auto, 4, 2)
EXPLICIT = mesh(AxisType.Explicit, 4)
EXPLICIT_2D = mesh(AxisType.Explicit, 4, 2)


def close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), tolerance, tolerance)


def loss(f: Function) -> Function:
    return lambda x, w: (f(x, w) ** 2).sum()


def repeated(f: Function) -> Function:
    """A scan whose every step calls f."""

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        step = lambda c, _: (c + f(x, c).mean() * w, None)  # noqa: E731
        return (jax.lax.scan(step, w, None, length=3)[0] ** 2).sum()

    return run


BOTH = jnp.stack([W, 2 * W])

TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "call": lambda f: f(X, W),
    "jit": lambda f: jax.jit(f)(X, W),
    "grad": lambda f: jax.grad(loss(f), (0, 1))(X, W),
    "jit_grad": lambda f: jax.jit(jax.grad(loss(f), (0, 1)))(X, W),
    "jvp": lambda f: jax.jvp(f, (X, W), (X, W)),
    "linear_transpose": lambda f: jax.linear_transpose(lambda x: jax.jvp(lambda x: f(x, W), (X,), (x,))[1], X)(X),
    "hessian": lambda f: jax.jit(jax.hessian(loss(f), 1))(X, W),
    "jvp_of_grad": lambda f: jax.jvp(jax.grad(loss(f), (0, 1)), (X, W), (X, W)),
    "vmap": lambda f: jax.vmap(f, (None, 0))(X, BOTH),
    "vmap_grad": lambda f: jax.jit(jax.vmap(jax.grad(loss(f), (0, 1)), (None, 0)))(X, BOTH),
    "checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(loss(f)), (0, 1)))(X, W),
    "scan": lambda f: jax.jit(repeated(f))(X, W),
    "grad_of_scan": lambda f: jax.jit(jax.grad(repeated(f), (0, 1)))(X, W),
}  # fmt: skip

MAPPED = {
    "rows": {"mesh": AUTO, "in_specs": (P("data"), P()), "out_specs": P("data")},
    "columns": {"mesh": AUTO, "in_specs": (P(), P(None, "data")), "out_specs": P(None, "data")},
    "both": {
        "mesh": AUTO_2D,
        "in_specs": (P("data"), P(None, "model")),
        "out_specs": P("data", "model"),
    },
    "replicated_over_one": {"mesh": AUTO_2D, "in_specs": (P("data"), P()), "out_specs": P("data")},
    "partly_manual": {
        "mesh": AUTO_2D,
        "in_specs": (P("data"), P()),
        "out_specs": P("data"),
        "axis_names": {"data"},
    },
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mapping", MAPPED)
def test_inside_shard_map(mapping: str, transform: str) -> None:
    f = torch2jax(torch_layer)
    run = TRANSFORMS[transform]
    kept = tape_info().entries
    if mapping == "partly_manual":  # which jax has under jit alone
        sharded = jax.jit(jax.shard_map(f, **MAPPED[mapping]))
    else:
        sharded = jax.shard_map(f, **MAPPED[mapping])
    # All devices are awaited: values are read from one of those that have the same.
    close(jax.block_until_ready(run(sharded)), run(layer))
    assert tape_info().entries <= kept


@pytest.mark.parametrize("jit", [False, True])
def test_gradients_taken_on_a_shard(jit: bool) -> None:
    """A cotangent of a replicated operand is summed over the shards once."""

    def descend(f: Function) -> Function:
        def local(x: jax.Array, w: jax.Array) -> jax.Array:
            step = lambda w, _: (w - 0.1 * jax.grad(loss(f), 1)(x, w), None)  # noqa: E731
            return jax.lax.scan(step, w, None, length=3)[0]

        return local

    run = jax.shard_map(
        descend(torch2jax(torch_layer)), mesh=AUTO, in_specs=(P("data"), P()), out_specs=P()
    )
    close((jax.jit(run) if jit else run)(X, W), descend(layer)(X, W))


def test_results_vary_with_their_operands() -> None:
    f = torch2jax(torch_layer)

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        return f(x, w)

    with pytest.raises(ValueError, match="replicat"):
        jax.shard_map(local, mesh=AUTO, in_specs=(P("data"), P()), out_specs=P())(X, W)
    out = jax.shard_map(local, mesh=AUTO, in_specs=(P(), P()), out_specs=P())(X, W)
    close(out, layer(X, W))


def test_pmap() -> None:
    f = torch2jax(torch_layer)
    x = X.reshape(4, 2, 4)
    close(jax.pmap(f, in_axes=(0, None))(x, W), jax.vmap(layer, (0, None))(x, W))
    grads = jax.pmap(jax.grad(loss(f)), in_axes=(0, None))(x, W)
    close(grads, jax.vmap(jax.grad(loss(layer)), (0, None))(x, W))


# --- specs ---------------------------------------------------------------------------------------


def given(**options: Any) -> Function:
    return torch2jax(
        torch_layer, mesh=AUTO, in_specs=(P("data"), P()), out_specs=P("data"), **options
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("declared", [False, True])
def test_specs_over_automatic_axes(transform: str, declared: bool) -> None:
    shapes = jax.ShapeDtypeStruct((8, 4), jnp.float32) if declared else None
    run = TRANSFORMS[transform]
    close(run(given(output_shapes=shapes)), run(layer))


@pytest.mark.parametrize(
    "in_specs",
    [
        (P("data"), P()),
        {"x": P("data")},
        {"x": P("data"), "w": P()},
        [P("data"), None],
        (P("data"), {"kernel": P(), "bias": P()}),
    ],
    ids=str,
)
def test_forms_of_in_specs(in_specs: Any) -> None:
    tree = isinstance(in_specs, tuple) and isinstance(in_specs[1], dict)

    def fn(x: Any, w: Any) -> Any:
        return x @ w["kernel"] + w["bias"] if tree else x @ w

    f = torch2jax(fn, mesh=AUTO, in_specs=in_specs, out_specs=P("data"))
    w = {"kernel": W, "bias": W[0]} if tree else W
    close(f(X, w), fn(X, w))
    if isinstance(in_specs, dict):
        close(f(x=X, w=w), fn(X, w))


@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("kind", ["one", "two"])
def test_explicit_axes(kind: str, entered: bool) -> None:
    on, specs, out = (
        (EXPLICIT, (P("data"), P()), P("data"))
        if kind == "one"
        else (EXPLICIT_2D, (P("data"), P(None, "model")), P("data", "model"))
    )
    f = torch2jax(torch_layer, out_specs=out)
    x, w = (jax.device_put(a, NamedSharding(on, s)) for a, s in zip((X, W), specs, strict=True))

    def check() -> None:
        y = jax.jit(f)(x, w)
        assert jax.typeof(y).sharding.spec == P(*out, *[None] * (2 - len(out)))
        close(y, layer(X, W))
        close(f(x, w), layer(X, W))
        grads = jax.jit(jax.grad(loss(f), (0, 1)))
        got = grads(x, w)
        close(got, jax.grad(loss(layer), (0, 1))(X, W))
        for g, a in zip(got, (x, w), strict=True):
            assert jax.typeof(g).sharding.spec == jax.typeof(a).sharding.spec
        for compiled in (jax.jit(f).lower(x, w).compile(), grads.lower(x, w).compile()):
            assert "all-gather" not in compiled.as_text()

    if entered:
        with entered_mesh(on):
            check()
    else:
        check()


def test_no_gather_over_automatic_axes() -> None:
    x = jax.device_put(X, NamedSharding(AUTO, P("data")))
    w = jax.device_put(W, NamedSharding(AUTO, P()))
    compiled = jax.jit(jax.grad(loss(given()), (0, 1))).lower(x, w).compile()
    assert "all-gather" not in compiled.as_text()
    assert jax.config.jax_use_shardy_partitioner
    # Without specs XLA's default holds: every device runs the whole call.
    y = jax.jit(torch2jax(torch_layer))(x, w)
    assert y.sharding.is_fully_replicated
    close(y, layer(X, W))


def test_explicit_operands_without_specs() -> None:
    f = torch2jax(torch_layer)
    x = jax.device_put(X, NamedSharding(EXPLICIT, P("data")))
    w = jax.device_put(W, NamedSharding(EXPLICIT, P()))
    for run in (f, jax.jit(f), jax.grad(loss(f))):
        with pytest.raises(SignatureError, match=r"args\[0\].*8@data,4.*out_specs=jax.P\('data'\)"):
            run(x, w)
    with pytest.raises(SignatureError, match="out_specs"):  # a batch of sharded rows
        jax.vmap(f, (0, None))(x, w)
    whole = jax.device_put(X, NamedSharding(EXPLICIT, P()))
    close(jax.jit(lambda x, w: f(x, w) + x)(whole, w), layer(X, W) + X)


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_replicated_operands_to_any_depth(depth: int | None) -> None:
    """What every shard says of an operand that all share is summed over the shards."""
    grads = jax.jit(jax.grad(loss(given(depth=depth)), (0, 1)))(X, W)
    close(grads, jax.grad(loss(layer), (0, 1))(X, W))
    local = jax.shard_map(
        jax.grad(loss(torch2jax(torch_layer, depth=depth)), (0, 1)),
        mesh=AUTO, in_specs=(P("data"), P()), out_specs=(P("data"), P()),
    )  # fmt: skip
    close(local(X, W), jax.grad(loss(layer), (0, 1))(X, W))


@pytest.mark.parametrize("spec", [P("data"), P()], ids=str)
@pytest.mark.parametrize("declared", [False, True])
def test_examples_over_several_devices(spec: P, declared: bool) -> None:
    """Their types are read, and their values are not gathered."""
    x = jax.device_put(X, NamedSharding(EXPLICIT, spec))
    shapes = jax.ShapeDtypeStruct((8, 4), jnp.float32) if declared else None
    f = torch2jax(torch_layer, x, W, out_specs=P("data") if spec else None, output_shapes=shapes)
    with entered_mesh(EXPLICIT):
        close(f(x, W), layer(X, W))


def test_a_donated_example() -> None:
    x = jnp.array(X)
    f = torch2jax(torch_layer, x, W)
    x.delete()
    close(f(X, W), layer(X, W))


def test_specs_inside_shard_map() -> None:
    sharded = jax.shard_map(given(), mesh=AUTO, in_specs=(P("data"), P()), out_specs=P("data"))
    close(sharded(X, W), layer(X, W))


def test_one_function_on_two_meshes() -> None:
    f = torch2jax(torch_layer, in_specs=(P("data"), P()), out_specs=P("data"),
                  output_shapes=jax.ShapeDtypeStruct((8, 4), jnp.float32))  # fmt: skip
    for on in (AUTO, AUTO_2D, mesh(AxisType.Auto, 8)):
        with entered_mesh(on):
            close(f(X, W), layer(X, W))


def test_parameters_of_a_module() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    apply, variables = from_module(module)
    sharded, _ = from_module(module, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P("data"))

    def value(f: Function) -> Function:
        return lambda v, x: (f(v, x) ** 2).mean()

    expected = jax.jit(jax.value_and_grad(value(apply), (0, 1)))(variables, X)
    variables = jax.device_put(variables, NamedSharding(AUTO, P()))
    close(jax.jit(jax.value_and_grad(value(sharded), (0, 1)))(variables, X), expected)


def test_updated_arguments_are_sharded() -> None:
    f = torch2jax(
        lambda cache, x: cache.add_(x).sum(1),
        inplace_argnums=0,
        mesh=AUTO,
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P("data")),
        output_shapes=jax.ShapeDtypeStruct((8,), jnp.float32),
    )
    y, cache = jax.jit(f)(X, X)
    close((y, cache), ((2 * X).sum(1), 2 * X))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="jaxlib 0.7 aborts while compiling a custom call beside the small loop of fold_in",
)
def test_shards_draw_their_own_numbers() -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5)

    ones = jnp.ones((8, 64))
    specs = {"mesh": AUTO, "in_specs": P("data"), "out_specs": P("data")}
    f = torch2jax(draw, stochastic=True, **specs)
    rows = np.asarray(f(ones, rng=jax.random.key(0)))
    assert len({row.tobytes() for row in rows[::2]}) == 4
    np.testing.assert_array_equal(rows, f(ones, rng=jax.random.key(0)))
    grads = jax.grad(lambda x: f(x, rng=jax.random.key(0)).sum())(ones)
    np.testing.assert_array_equal(grads, rows)
    rows = np.asarray(torch2jax(draw, **specs)(ones))  # without a key
    assert len({row.tobytes() for row in rows[::2]}) == 4
    # Each device draws: without a key a result is replicated over no axis.
    with pytest.raises(ValueError, match="replicat"):
        jax.shard_map(torch2jax(draw), mesh=AUTO, in_specs=P(), out_specs=P())(ones)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_specs": P("data")}, "go with out_specs"),
        ({"mesh": AUTO}, "go with out_specs"),
        ({"out_specs": P("data")}, "without a mesh: pass mesh="),
        ({"out_specs": P("data"), "mesh": AUTO}, "automatic.*give in_specs="),
        ({"out_specs": P("data"), "mesh": AUTO, "in_specs": ("data", P())}, "'data' for args\\[0\\]"),
        ({"out_specs": P("data"), "mesh": AUTO, "in_specs": (P(),)}, "structure of the arguments"),
        ({"out_specs": P("data"), "mesh": AUTO, "in_specs": {"y": P()}}, "names 'y'"),
        (
            {"out_specs": P("data"), "mesh": AUTO, "in_specs": (P("data"), P()),
                 "output_shapes": jax.ShapeDtypeStruct((7, 4), jnp.float32)},
            r"\(7, 4\).*does not split evenly",
        ),
        (
            {"out_specs": ("data",), "mesh": AUTO, "in_specs": (P("data"), P()),
                 "output_shapes": (jax.ShapeDtypeStruct((8, 4), jnp.float32),)},
            "out_specs .*'data'.*give a jax.P",
        ),
    ],
)  # fmt: skip
def test_wrong_specs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        torch2jax(torch_layer, **options)(X, W)


def test_the_deprecated_name() -> None:
    with pytest.warns(DeprecationWarning, match="out_specs"):
        f = torch2jax(torch_layer, output_sharding_spec=P("data"), in_specs=(P("data"), P()),
                      mesh=AUTO)  # fmt: skip
    close(f(X, W), layer(X, W))
