"""Eager calls like one that has been made before: the extension carries them out by itself."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from harness import precision
from torch.utils._pytree import tree_leaves as leaves

from torch2jax import _ext, device, lowering_report, torch2jax
from torch2jax.device.operators import dispatch
from torch2jax.device.operators.operator import Operator
from torch2jax.device.operators.view_operator import ViewOperator
from torch2jax.device.tensors.tensor import Tensor

entered_mesh: Any = getattr(jax, "set_mesh", None) or getattr(jax.sharding, "use_mesh", None)

device.enable()
aten = torch.ops.aten


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operators that Python code has carried out."""
    found: list[Any] = []
    for kind in (Operator, ViewOperator):
        plain: Any = kind.__call__

        def noted(self: Any, args: Any, kwargs: Any, plain: Any = plain) -> Any:
            found.append(self.func)
            return plain(self, args, kwargs)

        monkeypatch.setattr(kind, "__call__", noted)
    return found


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif theirs is not None:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)


def x(place: str) -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4).to(place)


CALLS: dict[str, Callable[[str], Any]] = {
    "one result": lambda p: x(p).exp(),
    "two operands": lambda p: x(p) + x(p),
    "a number": lambda p: x(p) * 2.5,
    "a number with a name": lambda p: torch.add(x(p), x(p), alpha=3),
    "a word": lambda p: torch.div(x(p), 2, rounding_mode="floor"),
    "a dtype": lambda p: x(p).sum(0, dtype=torch.float64 if p == "cpu" else None).float(),
    "lists": lambda p: x(p).sum([0, 1], keepdim=True),
    "several results": lambda p: torch.sort(x(p), descending=True),
    "a list of results": lambda p: torch._foreach_mul([x(p), x(p)[0]], 2.0),
    "a cast": lambda p: x(p).to(torch.int32),
    "in place": lambda p: x(p).mul_(3),
    "in place, into a part": lambda p: x(p)[1].add_(1),
    "in place, several": lambda p: (
        lambda a, b: torch._foreach_add_([a, b], [x(p), x(p)]) or [a, b]
    )(x(p), x(p) + 1),
    "a view": lambda p: x(p).t(),
    "a view with numbers": lambda p: x(p)[1:, 2],
    "several views": lambda p: x(p).split([1, 3], 1),
    "a view of a view": lambda p: x(p).t()[1:].unsqueeze(0),
    "an operator of what is seen": lambda p: x(p).t()[1:].unsqueeze(0).exp(),
    "an alias": lambda p: x(p).detach(),
    "by default": lambda p: torch.ones_like(x(p), memory_format=torch.preserve_format),
    "no elements": lambda p: x(p)[:0].sum(1),
    "gradients": lambda p: torch.autograd.grad(
        (lambda a: (a.relu() * a).sum())(a := x(p).requires_grad_()), a
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_need_no_python(name: str, python: list[Any]) -> None:
    call = CALLS[name]
    expected = call("cpu")
    call("jax"), call("jax")
    python.clear()
    again = call("jax")
    assert not [f for f in python if f not in (aten._to_copy.default, aten.copy_.default)]
    same(again, expected)
    if "view" in name:
        for ours, theirs in zip(leaves(again), leaves(expected), strict=True):
            assert ours.stride() == theirs.stride()
            assert ours.storage_offset() == theirs.storage_offset()


def test_what_tells_calls_apart() -> None:
    """Each is made first, then again after all the others."""
    a, b = x("cpu"), torch.tensor([[1, -2], [3, 4]])
    variants: list[Callable[[Any], Any]] = [
        lambda to: to(a) * 2,
        lambda to: to(a) * 2.0,
        lambda to: to(b) * 2,
        lambda to: to(b) * 2.0,
        lambda to: to(b) * True,
        lambda to: to(b.bool()) * 2,
        lambda to: to(a) * 3,
        lambda to: to(a) * -0.0,
        lambda to: to(a) * 0.0,
        lambda to: to(a) * math.nan,
        lambda to: to(a) * math.inf,
        lambda to: to(a).half() * 2,
        lambda to: to(a).t() * 2,
        lambda to: to(a)[1] * 2,
        lambda to: to(a)[2] * 2,
        lambda to: to(a)[:, 1:3] * 2,
        lambda to: to(a)[:, ::2] * 2,
        lambda to: to(a).sum(0),
        lambda to: to(a).sum(1),
        lambda to: to(a).sum(1, keepdim=True),
        lambda to: to(a).sum([0, 1]),
        lambda to: to(a).sum([0], keepdim=True),
        lambda to: torch.div(to(a), 3, rounding_mode="floor"),
        lambda to: torch.div(to(a), 3, rounding_mode="trunc"),
        lambda to: torch.div(to(a), 3),
        lambda to: torch.nn.functional.gelu(to(a), approximate="tanh"),
        lambda to: torch.nn.functional.gelu(to(a)),
        lambda to: to(a).clamp(1.0, 2.0),
        lambda to: to(a).clamp(2.0, 3.0),
        lambda to: to(a).clamp(None, 3.0),
        lambda to: to(a).clamp(3.0),
        lambda to: torch.cat([to(a), to(a)]),
        lambda to: torch.cat([to(a), to(a)], 1),
        lambda to: torch.cat([to(a), to(a), to(a)]),
        lambda to: to(a).view(4, 3),
        lambda to: to(a).view(2, 6),
        lambda to: to(a).view(2, 6).view(4, 3),
        lambda to: to(a).expand(2, 3, 4),
        lambda to: to(a).unsqueeze(0).transpose(0, 1),
        lambda to: to(a).unsqueeze(0).transpose(0, 2),
        lambda to: torch.arange(3, device=to(a).device) + 2**31 if to(a).device.type == "cpu"
        else torch.arange(3) + 2**31,
    ]  # fmt: skip
    for _ in range(3):
        for k, variant in enumerate(variants):
            theirs = variant(lambda t: t)
            ours = variant(lambda t: t.to("jax"))
            same(ours, theirs)
            assert torch.equal(ours.cpu().signbit(), theirs.signbit()), k


def test_x64_and_the_default_dtype_count() -> None:
    a = torch.tensor([1, 2]).to("jax")

    def found() -> Any:
        return (a / 2).dtype, a.sum().jax().dtype

    for _ in range(2):
        assert found() == (torch.float32, np.int32)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert found()[0] is torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)
        with precision(True):
            assert found() == (torch.float32, np.int64)


def test_traces_see_calls_that_are_known() -> None:
    def f(a: torch.Tensor) -> torch.Tensor:
        return (a * 2 + a.sum()).t()[0]

    a = x("jax")
    f(a), f(a)
    compiled = device.jit(f)
    same(compiled(a), f(x("cpu")))
    same(compiled(a + 1), f(x("cpu") + 1))
    lowered = torch2jax(f, lower=True)
    jaxpr = str(jax.make_jaxpr(lowered)(a.jax()))
    assert "mul" in jaxpr
    gradient = jax.grad(lambda v: lowered(v).sum())(a.jax())
    np.testing.assert_allclose(gradient, torch.func.grad(lambda v: f(v).sum())(x("cpu")))
    report = lowering_report(f, a.jax())
    assert "mul" in str(report)
    rows = jax.vmap(lowered)(np.stack([a.jax(), a.jax() + 1]))
    np.testing.assert_allclose(rows[1], f(x("cpu") + 1))


def test_a_new_lowering_counts_for_known_calls() -> None:
    with torch.library._scoped_library("repeated", "DEF") as library:
        library.define("plus(Tensor x, int n) -> Tensor")
        plus = torch.ops.repeated.plus.default
        device.register_lowering(plus, lambda x, n: x + n)
        a = torch.zeros(2).to("jax")
        assert [plus(a, 1).tolist() for _ in range(3)] == [[1.0, 1.0]] * 3
        device.register_lowering(plus, lambda x, n: x + 10 * n)
        assert [plus(a, 1).tolist() for _ in range(3)] == [[10.0, 10.0]] * 3


def test_writes_that_overlap_are_refused_each_time() -> None:
    for _ in range(3):
        a = torch.zeros(1, 3).to("jax").expand(2, 3)
        with pytest.raises(RuntimeError, match="single memory location"):
            a.add_(1)
        assert a.fill_(2).tolist() == [[2.0] * 3] * 2


LISTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "one tensor twice": lambda a: torch._foreach_add_([a, a], 1),
    "one tensor twice, after another": lambda a: torch._foreach_mul_([a + 1, a, a], [2, 3, 4.0]),
    "each reads the other": lambda a: torch._foreach_add_([a[0], a[1]], [a[1], a[0]]),
    "rows": lambda a: torch._foreach_mul_(list(a), 2),
    "rows that meet": lambda a: torch._foreach_mul_([a[:2], a[1:]], 2),
    "rows and what they were": lambda a: torch._foreach_add_(list(a), list(a.clone())),
    "columns": lambda a: torch._foreach_add_([a[:, :2], a[:, 2:]], [1, 2]),
    "columns that meet": lambda a: torch._foreach_addcmul_(
        [a[:, :3], a[:, 1:]], [a.new_ones(3, 3)] * 2, [a.new_ones(3, 3)] * 2, [0.5, 2.0]
    ),
    "numbers in a tensor": lambda a: torch._foreach_addcdiv_(
        [a, a], [a, a], [a + 1, a + 2], torch.tensor([0.5, 2.0]).to(a.device)
    ),
    "no elements": lambda a: torch._foreach_add_([a[:0], a[:0], a], 1),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", LISTS)
def test_items_of_lists_that_meet_are_done_in_turn(name: str, jit: bool) -> None:
    """As PyTorch does on a CPU, where each item sees what was written before."""
    call = LISTS[name]
    expected = x("cpu")
    call(expected)

    def f(a: torch.Tensor) -> torch.Tensor:
        call(a)
        return a

    run = device.jit(f) if jit else f
    for _ in range(3):
        same(run(x("jax")), expected)


def test_errors_of_known_calls() -> None:
    """The same arguments but for shapes have one plan; PyTorch's error comes each time."""
    a = torch.ones(3).to("jax")
    a + a
    for _ in range(2):
        with pytest.raises(RuntimeError):
            a + torch.ones(2).to("jax")
        with pytest.raises(RuntimeError, match=r"same device|two devices"):
            a + torch.ones(3)
        assert (a + a).tolist() == [2.0] * 3


def test_results_have_memory_of_their_own() -> None:
    a = torch.ones(3).to("jax")
    made = [a + a for _ in range(3)]
    made[1].zero_()
    assert [m.tolist() for m in made] == [[2.0] * 3, [0.0] * 3, [2.0] * 3]
    views = [a[1:] for _ in range(3)]
    views[0].add_(1)
    assert a.tolist() == [1.0, 2.0, 2.0]
    assert all(v.tolist() == [2.0, 2.0] for v in views)


def test_nothing_is_kept() -> None:
    def call() -> Any:
        a = torch.ones(1024).to("jax")
        b = a[1:].add_(a[:-1])
        return weakref.ref(a), weakref.ref(b.jax())

    for _ in range(3):
        found = call()
        gc.collect()
        assert [r() for r in found] == [None, None]


def test_threads() -> None:
    dispatch.forget()
    wrong: list[Any] = []
    start = threading.Barrier(4)

    def work(n: int) -> None:
        start.wait()
        for k in range(100):
            a = torch.full((n + 1,), float(k)).to("jax")
            got = ((a * 2.0 + float(n))[0:].add_(1) + a.sum()).tolist()
            if got != [k * 2.0 + n + 1 + k * (n + 1)] * (n + 1):
                wrong.append((n, k, got))
            if n == 0 and k % 10 == 0:
                dispatch.forget()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_wrong_use_of_the_entry() -> None:
    a = torch.ones(2).to("jax")
    dispatch_of: Any = Tensor.__torch_dispatch__
    with pytest.raises(TypeError, match="operator, types, args"):
        dispatch_of()
    with pytest.raises(TypeError, match="operator, types, args"):
        dispatch_of(aten.neg.default, (), (a,), {}, kwargs={})
    with pytest.raises(TypeError, match="operator, types, args"):
        dispatch_of(aten.neg.default, (), operands=(a,))
    with pytest.raises(TypeError, match="operator, types, args"):
        dispatch_of(aten.neg.default, (), [a])
    assert dispatch_of(aten.neg.default, (), (a,)).tolist() == [-1.0, -1.0]
    assert dispatch_of(aten.neg.default, (), args=(a,), kwargs={}).tolist() == [-1.0, -1.0]
    assert dispatch_of(aten.zeros.default, (), kwargs={"size": [2]}).tolist() == [0.0, 0.0]
    assert dispatch_of(aten.neg.default, (), (a,), None).tolist() == [-1.0, -1.0]


PROMOTED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "list": lambda a, b: torch._foreach_add([a], [b])[0],
}


@pytest.mark.parametrize("name", PROMOTED)
@pytest.mark.parametrize("first", ["vector", "number"])
@pytest.mark.parametrize(
    ("low", "high"), [(torch.float16, torch.float32), (torch.int32, torch.int64)]
)
def test_numbers_promote_as_numbers(
    name: str, first: str, low: torch.dtype, high: torch.dtype
) -> None:
    """A tensor without dimensions decides the dtype in another way than one with."""
    fn = PROMOTED[name]
    x = torch.tensor([1, 2, 3], dtype=low)
    others = {"vector": torch.tensor([2, 3, 4], dtype=high), "number": torch.tensor(2, dtype=high)}
    dispatch.forget()
    for kind in [first, first, *others, *others]:
        y = others[kind]
        ours = fn(x.to("jax"), y.to("jax"))
        same(ours, fn(x, y))
        assert ours.jax().dtype.itemsize == min(ours.dtype.itemsize, 4)


def test_lists_that_meet_are_told_from_lists_of_nothing() -> None:
    dispatch.forget()
    for n in (0, 0, 0, 3, 3):
        a = torch.zeros(n).to("jax")
        torch._foreach_add_([a, a], [2.0, 3.0])
        assert a.tolist() == [5.0] * n


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_numbers_of_a_mesh_stay_there(kind: str) -> None:
    types: Any = getattr(jax.sharding, "AxisType", None)
    if types is None or len(jax.devices()) < 4:
        pytest.skip("needs four devices, and meshes with types of axes")
    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(types, kind),))
    a = torch.ones(8, device="jax")
    elsewhere = device.tensor(jax.device_put(np.ones(8, np.float32), jax.devices()[1]))
    if kind == "Auto":
        with entered_mesh(mesh):
            for _ in range(3):
                a * 5.25
    else:
        with entered_mesh(mesh):
            for _ in range(3):
                device.tensor(jax.numpy.ones(8)) * 5.25
    for x in (a, elsewhere):
        got = x * 5.25
        assert got.jax().sharding.device_set == x.jax().sharding.device_set
        assert got.tolist() == [5.25] * 8


def test_without_jit() -> None:
    with torch.library._scoped_library("unjitted", "DEF") as library:
        library.define("three(Tensor x) -> Tensor")
        three = torch.ops.unjitted.three.default
        device.register_lowering(three, lambda x: np.ones(3, np.float32))
        a = torch.zeros(2).to("jax")
        with jax.disable_jit():
            made = [three(a) for _ in range(3)]
        assert all(isinstance(x.jax(), jax.Array) for x in made)


def test_a_lowering_that_comes_while_another_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.library._scoped_library("looked_up", "DEF") as library:
        library.define("n(Tensor x) -> Tensor")
        op = torch.ops.looked_up.n.default
        device.register_lowering(op, lambda x: x + 1)
        find = dispatch._find

        def found(func: Any) -> Any:
            made = find(func)
            if func is op:
                monkeypatch.setattr(dispatch, "_find", find)
                device.register_lowering(op, lambda x: x + 2)
            return made

        monkeypatch.setattr(dispatch, "_find", found)
        a = torch.zeros(2).to("jax")
        op(a)
        assert [op(a).tolist() for _ in range(3)] == [[2.0, 2.0]] * 3


def test_views_in_inference_mode() -> None:
    """Of an ordinary tensor they are ordinary tensors, as on a CPU."""
    results = []
    for place in ("cpu", "jax"):
        a = x(place)
        a[0], a.view(4, 3), a.detach()
        with torch.inference_mode():
            views = [a[0], a[0:1], a.view(4, 3), a.detach(), a.t(), *a.split(2)]
            views += [(a + 1)[0], torch.atleast_3d(a)]
            views[0].add_(1)
            results.append([(v.tolist(), v.is_inference()) for v in views])
    assert results[0] == results[1]


@pytest.mark.parametrize("values", [(), (torch.strided,), (None,) * 9])
def test_a_dispatcher_with_another_number_of_values(values: tuple[Any, ...]) -> None:
    names = ("tensor_type", "array_type", "cell_type", "make", "situation", "describe", "replay")
    others = ("array", "may_write", "inference", "sort", "large")
    hooks: dict[str, Any] = dict.fromkeys((*names, *others), object)
    with pytest.raises(ValueError, match=f"got {len(values)} values in after_dtype, expected 8"):
        _ext.eager_dispatch(after_dtype=values, constants=(), **hooks)
    with pytest.raises(TypeError):
        _ext.eager_dispatch(after_dtype=values, **{**hooks, "constants": []})
    # The dispatcher of the package is as it was.
    assert [(x("jax") * 2)[1].tolist() for _ in range(3)] == [[8.0, 10.0, 12.0, 14.0]] * 3


def test_repeated_calls_follow_sizes_that_change() -> None:
    """Calls are repeated by what is known of the sizes, also of a tensor that takes others."""
    results = []
    for place in ("cpu", "jax"):
        x, found = torch.arange(6.0).to(place), []

        def look(x: Any, found: list[Any] = found) -> None:
            for _ in range(3):
                for y in (x + 1, x.sum(), x.detach(), x.reshape(2, -1), x.reshape(2, -1).t()):
                    found.append((tuple(y.shape), y.dtype, y.tolist()))
                views = x.detach(), x.unsqueeze(0), x[:1], x.mT if x.ndim > 1 else x
                found.append([(y.stride(), y.storage_offset()) for y in views])

        look(x)
        x.data = torch.ones(2, 2, dtype=torch.int32).to(place)
        look(x)
        x.resize_(2, 1)
        look(x)
        x.t_()
        look(x)
        x.set_(torch.arange(8, dtype=torch.int32).to(place).view(4, 2).t())
        look(x)
        results.append(found)
    assert results[0] == results[1]
