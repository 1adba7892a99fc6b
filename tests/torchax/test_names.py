"""torchax's names: the list of them in the documentation, and what programs do with them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchax_names import NAMES

from torch2jax import torchax
from torch2jax.torchax.ops import jaten as _jaten
from torch2jax.torchax.ops import jlibrary, jtorch, mappings, ops_registry

PAGE = Path(__file__).parents[2] / "docs" / "migrating" / "torchax.md"
aten = torch.ops.aten
jaten: Any = _jaten
env: Any = torchax.default_env()
Operator = ops_registry.Operator


def rows() -> dict[str, tuple[set[str], set[str]]]:
    """Return the names in the second and third column of the table, by the module in the first."""
    text = PAGE.read_text().split("| `torchax.` |")[1].split("\n\n")[0]
    found = {}
    for line in text.splitlines()[2:]:
        module, here, rest = _cells(line)
        quoted = [set(re.findall(r"`([A-Za-z_0-9]+)`", cell)) for cell in (here, rest)]
        found[module.strip(" `")] = (quoted[0], quoted[1])
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def of(module: str) -> Any:
    if module == "(itself)":
        return torchax
    if module == "device_module":
        return torch.jax  # type: ignore[attr-defined]
    try:
        return importlib.import_module(f"torch2jax.torchax.{module}")
    except ModuleNotFoundError:
        return None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("", "default_env interop tensor torch"),
        ("interop", "JittableModule call_jax jax_view shard_map torch_view"),
        ("ops.jtorch", "register_function"),
        ("ops.mappings", "TORCH_DTYPE_TO_JAX j2t j2t_dtype t2j t2j_dtype"),
        ("tensor", "Tensor"),
    ],
)
def test_what_tpu_inference_asks_of_torchax_is_there(module: str, names: str) -> None:
    there = importlib.import_module(f"torchax.{module}".rstrip("."))
    assert [name for name in names.split() if not hasattr(there, name)] == []


def test_the_page_lists_every_name_of_torchax() -> None:
    table = rows()
    assert set(table) == set(NAMES)
    for module, names in NAMES.items():
        here, elsewhere = table[module]
        for name in names.split():
            assert name in here | elsewhere, f"{module}.{name}"
            assert (name in here) == hasattr(of(module), name), f"{module}.{name}"


def test_classes_say_that_they_are_torchax(installed: None) -> None:
    theirs: Any = importlib.import_module("torchax")
    importlib.import_module("torchax.export")
    from torchax.ops import jaten, jtorch, ops_registry  # type: ignore  # noqa: F401

    assert theirs.__version__ == theirs.VERSION == "0.0.14"
    x = torch.ones(1, device="jax")
    for part, kind in (
        ("tensor", type(x)),
        ("tensor", type(env)),
        ("tensor", theirs.tensor.OperatorNotFound),
        ("interop", theirs.interop.JittableModule),
        ("export", theirs.export.JaxInterpreter),
        ("ops.ops_registry", Operator),
    ):
        assert kind.__module__ == f"torchax.{part}"
    assert theirs.interop.shard_map is jax.shard_map


# --- operators and functions that are overridden -------------------------------------------------


def test_an_entry_of_ops_overrides() -> None:
    x = torch.tensor([-1.0, 2.0], device="jax")
    ours, plain = lambda x, inplace=False: x * 100, torch.relu(x).tolist()
    env._ops[F.relu] = Operator(F.relu, ours, False, True, False, False)
    try:
        with env:
            assert F.relu(x).tolist() == [-100.0, 200.0]
        assert env._ops[F.relu].func is ours
        assert F.relu in env._ops
    finally:
        del env._ops[F.relu]
    with env:
        assert F.relu(x).tolist() == plain
    for op, func, is_jax in (
        (aten.relu.default, lambda x: jnp.sin(x), True),
        (aten.relu, lambda x: x.sin(), False),
    ):
        before = env._ops[op]
        env._ops[op] = Operator(op, func, is_jax, True, False, False)
        assert torch.allclose(torch.relu(x), x.sin())
        env._ops[op] = before
        assert torch.relu(x).tolist() == plain
        del env._ops[op]
        assert torch.relu(x).tolist() == plain
    env._ops[aten.t] = Operator(aten.t, lambda a: a.T + 1, True, True, False, False)
    assert torch.zeros(2, 3, device="jax").t().tolist() == [[1.0] * 2] * 3
    del env._ops[aten.t]
    assert torch.zeros(2, 3, device="jax").t().tolist() == [[0.0] * 2] * 3


def test_the_registries_say_what_computes() -> None:
    x = jnp.asarray([-1.0, 2.0])
    relu = ops_registry.all_aten_ops[aten.relu.default]
    assert relu.is_jax_function
    assert relu.func(x).tolist() == [0.0, 2.0]
    assert ops_registry.all_aten_ops[aten.relu].func(x).tolist() == [0.0, 2.0]
    taken = env._ops[aten.copy_.default]
    assert not taken.is_jax_function
    assert ops_registry.all_torch_functions is env._decomps
    assert len(list(env._ops)) == len(env._ops)
    assert aten.relu.default in torchax.ops.all_aten_jax_ops()
    with pytest.raises(torchax.tensor.OperatorNotFound, match="print"):
        env._get_op_or_decomp(print)
    assert env._get_op_or_decomp(aten.relu.default).torch_op is aten.relu.default
    assert env.dispatch(torch.relu, (), (torch.ones(1, device="jax"),)).tolist() == [1.0]


def test_functions_are_registered_by_decorators() -> None:
    @jtorch.register_function(F.selu, is_jax_function=True)
    def selu(x: Any, inplace: bool = False) -> Any:
        return jnp.cos(x)

    @jaten.op(aten.sinc.default)
    def sinc(x: Any) -> Any:
        return jnp.cos(x)

    x = torch.ones(2, device="jax")
    try:
        with env:
            assert torch.allclose(F.selu(x), x.cos())
        assert torch.allclose(torch.sinc(x), x.cos())
    finally:
        del env._ops[F.selu], env._ops[aten.sinc.default]
    assert torch.allclose(torch.sinc(x).cpu(), torch.sinc(x.cpu()), atol=1e-6)


def test_operators_as_functions_of_arrays() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    ours = [jnp.asarray(t.numpy()) for t in (x, w, b)]

    def check(got: Any, expected: torch.Tensor) -> None:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)

    check(jaten._aten_conv2d(*ours, 2, 1, 1, 1), F.conv2d(x, w, b, 2, 1))
    check(jaten._aten_conv2d(*ours, [1, 1], "same", 1, 1), F.conv2d(x, w, b, padding="same"))
    check(
        jaten._aten_convolution(*ours, [1, 2], [0, 1], [1, 1], False, 1, 1),
        F.conv2d(x, w, b, (1, 2), (0, 1)),
    )
    check(
        jaten._aten_convolution(ours[0], ours[1].swapaxes(0, 1), None, 2, 1, 1, True, 1, 1),
        F.conv_transpose2d(x, w.transpose(0, 1), None, 2, 1, 1),
    )
    check(jax.jit(jaten._aten_softmax, static_argnums=1)(ours[0], 1, False), x.softmax(1))
    check(jaten._aten_add(ours[0], ours[0], alpha=2), x + 2 * x)
    check(jaten._aten_mish(ours[0]), F.mish(x))
    with pytest.raises(AttributeError, match="_aten_no_such"):
        _ = jaten._aten_no_such


def test_a_definition_may_call_what_it_replaces() -> None:
    def conv2d(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        x, weight, bias = env.t2j_iso((x, weight, bias))
        return env.j2t_iso(jaten._aten_conv2d(x, weight, bias, stride, padding, dilation, groups))

    def attention(*args: Any, **kwargs: Any) -> Any:
        return jtorch._sdpa_reference(*args, **kwargs)

    torch.manual_seed(0)
    x, w = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
    q, mask = torch.randn(1, 2, 4, 8), torch.randn(4, 4)
    names = (
        F.conv2d,
        aten.conv2d,
        F.scaled_dot_product_attention,
        aten.scaled_dot_product_attention,
    )
    for name, func in zip(names, (conv2d, conv2d, attention, attention), strict=True):
        env.override_op_definition(name, func)
    try:
        with env:
            got = F.conv2d(x.to("jax"), w.to("jax"), padding=1)
            j = q.to("jax")
            same = F.scaled_dot_product_attention(j, j, j, mask.to("jax"), scale=0.3)
            causal = jtorch._sdpa_reference(j, j, j, is_causal=True)
            dropped = jtorch._sdpa_reference(j, j, j, dropout_p=0.5)
    finally:
        for name in names:
            del env._ops[name]
    torch.testing.assert_close(got.cpu(), F.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-4)
    plain = F.scaled_dot_product_attention
    torch.testing.assert_close(same.cpu(), plain(q, q, q, mask, scale=0.3))
    torch.testing.assert_close(causal.cpu(), plain(q, q, q, is_causal=True))
    assert dropped.shape == q.shape


def test_composites_keep_their_names() -> None:
    with torch.library._scoped_library("torch2jax_names", "DEF") as library:
        library.define("halve(Tensor x) -> Tensor")
        library.define("twice(Tensor x) -> Tensor")
        ops: Any = torch.ops.torch2jax_names
        jlibrary.register_jax_composite("names.halve", lambda x: x / 2, ops.halve)
        jlibrary.register_torch_composite("names.twice", lambda x: torch.add(x, x), ops.twice)

        def f(x: Any) -> Any:
            return ops.twice(ops.halve(x))

        x = torch.ones(2, device="jax")
        assert f(x).tolist() == [1.0, 1.0]
        text = jax.jit(torchax.interop.jax_view(f)).lower(jnp.ones(2)).as_text()
        assert "call @names.halve" in text
        assert "call @names.twice" in text


# --- the environment -----------------------------------------------------------------------------


def test_modes() -> None:
    x = torch.ones(2, 2, device="jax")
    with torchax.tensor.XLAFunctionMode(env), torchax.tensor.XLADispatchMode(env):
        assert (x @ x.bfloat16()).dtype is torch.float32
    with env._function_mode, env._dispatch_mode:
        assert (x @ x.bfloat16()).dtype is torch.float32


def test_the_key_is_set_and_read() -> None:
    key = jax.random.key(3)
    env.prng_key = key
    assert env.prng_key == key
    assert env.prng_key == key  # reading it draws nothing
    first = torch.randn(3, device="jax")
    assert env.prng_key != key
    env.prng_key = jax.random.PRNGKey(3)
    assert torch.equal(first, torch.randn(3, device="jax"))
    env.prng_key = jax.random.key(4)
    assert not torch.equal(first, torch.randn(3, device="jax"))
    with env.override_property(prng=key):
        assert env.param.prng == key
        torch.randn(3, device="jax")
        assert env.param.prng != key

    @torchax.interop.jax_jit
    def seeded(words: Any) -> Any:
        env.prng_key = words.jax()
        return torch.randn(3)

    words: Any = torch.tensor([0, 7], dtype=torch.uint32, device="jax")
    drawn = seeded(words)
    env.prng_key = jax.random.key(9)
    assert torch.equal(drawn, seeded(words))


def test_tables_of_dtypes() -> None:
    assert mappings.TORCH_DTYPE_TO_JAX[torch.bfloat16] == jnp.bfloat16
    assert mappings.TORCH_DTYPE_TO_JAX[None] is None
    assert mappings.JAX_DTYPE_TO_TORCH[jnp.dtype("int4")] is torch.int8
    assert mappings.JAX_DTYPE_TO_TORCH[jnp.dtype("float4_e2m1fn")] is torch.float4_e2m1fn_x2
    assert mappings.t2j_dtype(torch.float4_e2m1fn_x2) == jnp.float4_e2m1fn
    for theirs, mine in mappings.TORCH_DTYPE_TO_JAX.items():
        assert mappings.JAX_DTYPE_TO_TORCH[mine] is theirs
    assert torch.bfloat16 in mappings.NUMPY_UNSUPPORTED_DTYPES
    assert torch.float32 not in mappings.NUMPY_UNSUPPORTED_DTYPES
    assert torchax.tensor.t2j is mappings.t2j
    assert torchax.tensor.j2t is mappings.j2t


def test_one_value_is_viewed() -> None:
    x = torch.ones(2, device="jax")
    interop: Any = torchax.interop
    assert interop.jax_view_elem(x) is x.jax()  # type: ignore[attr-defined]
    assert interop.torch_view_elem(jnp.ones(2)).tolist() == [1.0, 1.0]
    assert interop.torch_view_elem(jnp.sin)(x).device.type == "jax"


def test_options_of_a_jittable_module_change() -> None:
    module: Any = torchax.interop.JittableModule(torch.nn.Linear(2, 2).to("jax"))
    assert module._extra_jit_args == {}
    module._extra_jit_args = {"donate_argnums": (2,)}
    x: Any = torch.ones(2, 2, device="jax")
    given = x.jax()
    module(x)
    assert given.is_deleted()
