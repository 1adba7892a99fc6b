"""Large results are computed in XLA's memory, and whoever keeps one has memory of its own."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch2jax import TorchCallError, from_module, j2t, t2j, torch2jax
from torch2jax._bridge.torch_side.placing import makers, placement

N = 1_000_000
X = jnp.arange(N, dtype=jnp.float32)
KEPT = "kept the memory of result beyond the call"


class Spied:
    """A function whose calls tell whether their results were where XLA wants them."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self._fn = fn
        self._made: list[int] = []
        self._jax = torch2jax(self._called, **options)

    def _called(self, *args: Any) -> Any:
        out = self._fn(*args)
        self._made = [t.data_ptr() for t in (out if isinstance(out, tuple) else (out,))]
        return out

    def __call__(self, *args: Any) -> tuple[Any, list[bool]]:
        out = self._jax(*args)
        leaves = jax.block_until_ready(jax.tree.leaves(out))
        # Where a shape is new, inference has called the function too, before this call.
        at = [x.unsafe_buffer_pointer() for x in leaves]
        return out, [a == b for a, b in zip(at, self._made, strict=True)]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of operators that wrote into XLA's memory."""
    names: list[str] = []
    call = makers.Redirect._redirected

    def counted(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        addresses = {b.data_ptr() for b in self._buffers}
        out = call(self, func, types, args, kwargs)
        if out.data_ptr() in addresses:
            names.append(func._schema.name)
        return out

    monkeypatch.setattr(makers.Redirect, "_redirected", counted)
    return names


def agree(got: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


SQUARE = (1000, 1000)

PLACED = {
    "an operator": (lambda x: x * 2.0, lambda x: x * 2, X),
    "a view of all": (lambda x: (x * 2.0).reshape(SQUARE), lambda x: (x * 2).reshape(SQUARE), X),
    "the last of several": (
        lambda x: torch.sin(x * 1e-3).exp() + 1,
        lambda x: jnp.exp(jnp.sin(x * 1e-3)) + 1,
        X,
    ),
    "written in place": (lambda x: (x * 2.0).add_(1), lambda x: x * 2 + 1, X),
    "bfloat16": (lambda x: x * 2.0, lambda x: x * 2, jnp.ones(2 * N, jnp.bfloat16)),
    "complex": (lambda x: x * 2.0, lambda x: x * 2, X.astype(jnp.complex64) * 1j),
    "lazily conjugated": (
        lambda x: (x * 2.0).conj(),
        lambda x: (x * 2).conj(),
        X.astype(jnp.complex64) * 1j,
    ),
    "booleans": (lambda x: x > 3, lambda x: x > 3, jnp.arange(4 * N, dtype=jnp.int32)),
    "another dtype": (
        lambda x: x.to(torch.float16),
        lambda x: x.astype(jnp.float16),
        jnp.ones(2 * N),
    ),
    "made contiguous": (
        lambda x: x.reshape(SQUARE).T.contiguous(),
        lambda x: x.reshape(SQUARE).T,
        X,
    ),
    "concatenated": (lambda x: torch.cat([x, x]), lambda x: jnp.concatenate([x, x]), X),
    "softmax": (
        lambda x: x.reshape(SQUARE).softmax(-1),
        lambda x: jax.nn.softmax(x.reshape(SQUARE)),
        X,
    ),
    "torch.func.vmap": (
        lambda x: torch.func.vmap(lambda row: row.sin() * 2)(x.reshape(SQUARE)),
        lambda x: (jnp.sin(x) * 2).reshape(SQUARE),
        X * 1e-3,
    ),
    "torch.func.grad": (
        lambda x: torch.func.grad(lambda y: (y * y).sum())(x),
        lambda x: 2 * x,
        X,
    ),
}


@pytest.mark.parametrize(("fn", "twin", "x"), PLACED.values(), ids=PLACED)
def test_a_large_result_is_computed_where_it_belongs(fn: Any, twin: Any, x: Any) -> None:
    spied = Spied(fn)
    for i in range(4):
        out, [there] = spied(x)
        agree(out, twin(x))
        assert there == (i > 0)  # the first call shows which operator it is


def test_two_results_have_a_buffer_each() -> None:
    spied = Spied(lambda x: (x * 2.0, x + 1.0))
    for i in range(4):
        out, there = spied(X)
        agree(out, (X * 2, X + 1))
        assert there == [i > 0, i > 0]


def _twice(x: torch.Tensor) -> Any:
    y = x * 2.0
    return y, y


def _with_its_reverse(x: torch.Tensor) -> Any:
    y = x * 2.0
    return y, y[:N]


class _UsersMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _inference_mode(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x * 2.0


COPIED = {
    "returned twice": (_twice, lambda x: (x * 2, x * 2)),
    "returned with a view": (_with_its_reverse, lambda x: (x * 2, x * 2)),
    "an operand": (lambda x: x.view(-1), lambda x: x),
    "transposed": (lambda x: (x * 2.0).reshape(SQUARE).T, lambda x: (x * 2).reshape(SQUARE).T),
    "an inference tensor": (_inference_mode, lambda x: x * 2),
    "no variant with out": (torch.relu, jax.nn.relu),
}


@pytest.mark.parametrize(("fn", "twin"), COPIED.values(), ids=COPIED)
def test_other_results_are_copied(fn: Any, twin: Any) -> None:
    spied = Spied(fn)
    for _ in range(4):
        out, there = spied(X)
        agree(out, twin(X))
        assert not any(there)


def test_a_small_result_is_copied() -> None:
    spied = Spied(lambda x: x * 2.0)
    for _ in range(4):
        out, there = spied(X[:250_000])
        agree(out, X[:250_000] * 2)
        assert there == [False]


def test_a_call_of_many_operators_is_left_alone(written: list[str]) -> None:
    def many(x: torch.Tensor) -> torch.Tensor:
        small = x[:4]
        for _ in range(200):
            small = small + 1
        return x * small[0]

    f = torch2jax(many)
    for _ in range(3):
        agree(f(X), X * 200)
    assert written == []
    assert placement.pays([40 * N], 200)
    assert not placement.pays([4 * N], 200)


def test_modes_and_autocast_of_the_function() -> None:
    def moded(x: torch.Tensor) -> torch.Tensor:
        with _UsersMode(), torch.autocast("cpu", dtype=torch.bfloat16):
            return x.reshape(SQUARE) @ x.reshape(SQUARE)

    spied = Spied(moded)
    first, [there] = spied(X * 1e-3)
    assert not there
    for _ in range(3):
        out, [there] = spied(X * 1e-3)
        agree(out, first)
        assert there


def test_gradients_are_placed(written: list[str]) -> None:
    f = jax.jit(jax.grad(torch2jax(lambda x: (x.sin() * x).sum())))
    twin = jax.grad(lambda x: (jnp.sin(x) * x).sum())
    for _ in range(4):
        agree(f(X * 1e-3), twin(X * 1e-3))
    assert len(written) == 3


def test_a_module_is_placed(written: list[str]) -> None:
    module = torch.nn.Linear(1000, 1000)
    x = jnp.ones(SQUARE)
    f, parameters = from_module(module, x)
    with torch.no_grad():
        expected = t2j(module(j2t(x)))
    for _ in range(4):
        agree(f(parameters, x), expected)
    assert written == ["aten::addmm"] * 3


@pytest.mark.parametrize("derivative", [False, True], ids=["values", "gradients"])
def test_several_devices_at_once(written: list[str], derivative: bool) -> None:
    """Each device computes its shard in memory of its own, at the same time as the others."""
    devices = jax.devices()[:4]
    assert len(devices) == 4
    mesh, spec = jax.sharding.Mesh(devices, "i"), jax.sharding.PartitionSpec("i")
    f = torch2jax(lambda x: torch.sin(x) * 2.0)
    twin: Any = lambda x: jnp.sin(x) * 2  # noqa: E731
    if derivative:
        f, twin = (jax.grad(lambda x, g=g: g(x).sum()) for g in (f, twin))
    x = jax.device_put(jnp.arange(4 * N) * 1e-6, jax.sharding.NamedSharding(mesh, spec))
    sharded = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))
    for i in range(6):
        out = sharded(x + i)
        assert out.sharding.spec == spec
        agree(out, twin(x + i))
    assert len(written) >= 4 * 4


def test_scan_donation_and_nested_calls(written: list[str]) -> None:
    f = torch2jax(lambda x: x * 0.5 + 1)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=10)[0])
    expected = X
    for _ in range(10):
        expected = expected * 0.5 + 1
    agree(scanned(X), expected)
    donated = jax.jit(lambda x: f(x) + f(x * 2), donate_argnums=0)
    for _ in range(3):
        agree(donated(X + 0), X * 1.5 + 2)
    before = len(written)
    assert before >= 9

    outer = torch2jax(lambda x: j2t(f(t2j(x))) * 2.0, output_shapes=X)
    for _ in range(4):
        agree(outer(X), X + 2)
    assert len(written) - before == 4 + 3  # f knows its operators already


def test_several_threads_at_once(written: list[str]) -> None:
    f = torch2jax(lambda x: x * 3.0)
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(20):
                agree(f(X + (k + i)), (X + (k + i)) * 3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert written


def test_a_function_that_goes_another_way(written: list[str]) -> None:
    """Operators of other operands or at another place go their ordinary way."""
    ways = [
        lambda x: x * 2.0,
        lambda x: x * 2.0,
        lambda x: x.reshape(SQUARE).T.mul(2.0).T.reshape(-1),
        lambda x: torch.add(x, 1.0),
        lambda x: (x + 0.0) * 2.0,
        lambda x: torch.cat([x[:1] * 2.0, x[1:] * 2.0]),
        lambda x: x.view(1, -1) * 2.0,
    ]
    calls = iter([*ways, *ways])

    def changing(x: torch.Tensor) -> torch.Tensor:
        return next(calls)(x).reshape(-1)

    f = torch2jax(changing, output_shapes=X)
    for _ in range(2):
        for way in ways:
            agree(f(X), X + 1 if way is ways[3] else X * 2)
    assert written == ["aten::mul"]  # too many misses end it


def test_results_that_change_places() -> None:
    calls = []

    def swapping(x: torch.Tensor) -> Any:
        calls.append(None)
        a, b = x * 2.0, x + 1.0
        return (a, b) if len(calls) < 4 else (b, a)

    f = torch2jax(swapping, output_shapes=(X, X))
    for i in range(8):
        agree(f(X), (X * 2, X + 1) if i < 3 else (X + 1, X * 2))


def test_an_exception_after_the_operator(written: list[str]) -> None:
    calls = []

    def failing(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        y = x * 2.0
        if len(calls) % 2 == 0:
            raise ValueError(f"call {len(calls)}")
        return y

    f = torch2jax(failing, output_shapes=X)
    for i in range(1, 7):
        if i % 2 == 0:
            # While X + i is computed the call waits on another thread, which leaves its error.
            with pytest.raises(RuntimeError, match=f"call {i}"):
                jax.block_until_ready(f(X + i))
        else:
            agree(f(X + i), (X + i) * 2)
    assert written


def test_a_warning_free_fallback_where_the_operator_itself_fails() -> None:
    calls = []

    def failing(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return torch.index_select(x, 0, torch.arange(N) + (len(calls) == 3))

    f = torch2jax(failing, output_shapes=X)
    for i in range(1, 5):
        if i == 3:
            with pytest.raises(TorchCallError, match="out of range"):
                f(X)
        else:
            agree(f(X), X)


# --- who keeps a result --------------------------------------------------------------------------


class _Holder:
    held: Any


def _in_a_generator(y: torch.Tensor, box: list[Any]) -> None:
    def generator() -> Any:
        held = y[:]
        yield None
        yield held

    running = generator()
    next(running)
    box.append(running)


def _in_an_attribute(y: torch.Tensor, box: list[Any]) -> None:
    holder = _Holder()
    holder.held = y
    box.append(holder)


MOVED: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "list": (lambda y, box: box.append(y), lambda kept: kept),
    "view": (lambda y, box: box.append(y[:]), lambda kept: kept),
    "views of views": (
        lambda y, box: box.append((y, y.reshape(SQUARE).T[:, 1:])),
        lambda kept: torch.cat([kept[0][:1000], kept[1].T.reshape(-1)]),
    ),
    "detached": (lambda y, box: box.append(y.detach()), lambda kept: kept),
    "closure": (lambda y, box: box.append(lambda: y), lambda kept: kept()),
    "attribute": (_in_an_attribute, lambda kept: kept.held),
    "partial": (lambda y, box: box.append(functools.partial(y.add, 0)), lambda kept: kept()),
    "generator": (_in_a_generator, next),
}


@pytest.mark.parametrize("always", [False, True], ids=["from the third call", "always"])
@pytest.mark.parametrize(("keep", "take"), MOVED.values(), ids=MOVED)
def test_who_keeps_a_result_has_memory_of_its_own(keep: Any, take: Any, always: bool) -> None:
    box: list[Any] = []
    calls = []

    def keeping(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        y = x * 2.0
        if always or len(calls) >= 3:
            keep(y, box)
        return y

    f = torch2jax(keeping, output_shapes=X)
    for i in range(6):
        agree(f(X + i), (X + i) * 2)
    for i in range(6):  # XLA uses its memory again
        agree(f(X - i), (X - i) * 2)
    values = [*range(6), *range(0, -6, -1)][0 if always else 2 :]
    assert len(box) == len(values)
    for kept, i in zip(box, values, strict=True):
        agree(t2j(take(kept).contiguous()), (X + i) * 2)


def test_who_keeps_a_gradient_has_memory_of_its_own() -> None:
    box: list[Any] = []
    calls = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            calls.append(None)
            out = g * 2.0
            if len(calls) == 3:
                box.append(out)
            return out

    f = torch2jax(Doubled.apply, output_shapes=X)
    pulled = jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])
    for i in range(6):
        agree(pulled(X, X + i), (X + i) * 2)
    assert len(box) == 1
    agree(t2j(box[0]), (X + 2) * 2)


SEEN_BY_NOBODY = {
    "NumPy": lambda y, box: box.append(y.numpy()),
    "a NumPy array of a view": lambda y, box: box.append((y, y[5:].numpy())),
    "DLPack": lambda y, box: box.append(y.__dlpack__()),
    "a graph": lambda y, box: box.append((torch.ones(N, requires_grad=True) * y).sum()),
}


@pytest.mark.parametrize("keep", SEEN_BY_NOBODY.values(), ids=SEEN_BY_NOBODY)
def test_memory_that_cannot_be_moved_is_refused(keep: Any) -> None:
    box: list[Any] = []
    calls = []

    def keeping(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        y = x * 2.0
        if len(calls) >= 3:
            with torch.enable_grad():
                keep(y, box)
        return y

    f = torch2jax(keeping, output_shapes=X)
    for i in range(6):
        if i == 2:
            with pytest.raises(TorchCallError, match=KEPT):
                f(X)
            box.clear()  # it shows memory of XLA's
        else:
            agree(f(X + i), (X + i) * 2)
    assert len(box) == 3


def test_memory_that_was_always_kept_is_never_refused() -> None:
    box: list[Any] = []

    def keeping(x: torch.Tensor) -> torch.Tensor:
        y = x * 2.0
        box.append(y.numpy())
        return y

    f = torch2jax(keeping, output_shapes=X)
    for i in range(20):
        agree(f(X + i), (X + i) * 2)
    for i in (0, 1, 2, 19):
        np.testing.assert_array_equal(box[i], (X + i) * 2)


def test_the_last_result_is_kept() -> None:
    class Module(torch.nn.Module):
        last: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x * 2.0
            return self.last

    module = Module()
    f = torch2jax(module, output_shapes=X)
    for i in range(5):
        agree(f(X + i), (X + i) * 2)
        agree(t2j(module.last), (X + i) * 2)


def test_another_thread_keeps_a_result() -> None:
    calls = []
    taken, seen, done = threading.Event(), [], threading.Event()

    def holder(y: torch.Tensor) -> None:
        taken.set()
        done.wait()
        seen.append(y.clone())

    threads: list[threading.Thread] = []

    def keeping(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        y = x * 2.0
        if len(calls) == 3:
            threads.append(threading.Thread(target=holder, args=(y,)))
            threads[0].start()
            taken.wait()
        return y

    f = torch2jax(keeping, output_shapes=X)
    try:
        for i in range(6):
            agree(f(X + i), (X + i) * 2)
    finally:
        done.set()
    threads[0].join()
    agree(t2j(seen[0]), (X + 2) * 2)


def test_memory_with_which_another_thread_computes_is_refused() -> None:
    calls = []
    started, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        started.set()
        done.wait()

    def holder(box: list[torch.Tensor]) -> None:
        functools.reduce(
            wait, [0], box.pop()
        )  # like an operator, it has the tensor beside variables

    threads: list[threading.Thread] = []

    def keeping(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        y = x * 2.0
        if len(calls) == 3:
            threads.append(threading.Thread(target=holder, args=([y],)))
            threads[0].start()
            started.wait()
        return y

    f = torch2jax(keeping, output_shapes=X)
    try:
        for i in range(6):
            if i == 2:
                with pytest.raises(TorchCallError, match=KEPT):
                    f(X)
            else:
                agree(f(X + i), (X + i) * 2)
    finally:
        done.set()
        threads[0].join()


def test_nothing_is_kept_by_the_bridge(written: list[str]) -> None:
    def large() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor and x.numel() == N for x in gc.get_objects())

    before = large()
    f = torch2jax(lambda x: x * 2.0)
    for _ in range(4):
        f(X).block_until_ready()
    assert written
    assert large() <= before  # those of other tests may go meanwhile
