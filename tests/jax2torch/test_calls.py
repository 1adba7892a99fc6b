"""jax2torch: calls, dtypes, memory, errors, lifetimes, nesting."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision

from torch2jax import (
    SignatureError,
    Torch2JaxError,
    UnsupportedDtypeError,
    jax2torch,
    t2j,
    torch2jax,
)
from torch2jax._conversions.convert import array_beside
from torch2jax._jax2torch import transfer

Pair = namedtuple("Pair", ["a", "b"])


def mlp(x: Any, w: Any, b: Any) -> Any:
    return jnp.tanh(x @ w + b)


def operands(requires_grad: bool = False) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 5), (5,)]
    return [torch.randn(s, generator=gen, requires_grad=requires_grad) for s in shapes]


# --- arguments and results -----------------------------------------------------------------------


def test_trees_numbers_none_and_keywords() -> None:
    @jax2torch
    def f(d: Any, pair: Any, nothing: Any, *, scale: Any) -> Any:
        assert nothing is None
        return {"p": Pair(d["x"] * scale, [pair.a + 1, None]), "n": pair.b, "c": 3}

    x = torch.arange(3.0)
    out = f({"x": x}, Pair(torch.tensor(2), 5), None, scale=0.5)
    assert isinstance(out["p"], Pair)
    torch.testing.assert_close(out["p"].a, x * 0.5)
    assert out["p"].b[1] is None
    assert out["p"].b[0].item() == 3
    assert out["n"].item() == 5
    assert out["c"].item() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_python_numbers_are_weakly_typed(dtype: torch.dtype) -> None:
    out = jax2torch(lambda x, s: x * s)(torch.ones(2, dtype=dtype), 2)
    assert out.dtype is dtype


def test_numpy_and_jax_arrays_pass() -> None:
    f = jax2torch(lambda x, y, z: x + y + z)
    x = torch.ones(3, requires_grad=True)
    out = f(x, np.ones(3, np.float32), jnp.ones(3))
    out.sum().backward()
    assert out.tolist() == [3, 3, 3]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


DTYPES = [
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    n = int(np.prod(shape))
    x = torch.arange(n).reshape(shape).to(dtype)
    with precision(True):
        out = jax2torch(lambda x: (x, x.reshape(-1)))(x)
    assert out[0].dtype is dtype
    assert out[0].shape == x.shape
    assert torch.equal(out[0].to(torch.complex128), x.to(torch.complex128))
    assert out[0].data_ptr() != x.data_ptr() or not n


def test_64_bit_with_x64_off() -> None:
    f = jax2torch(lambda x: x + 1)
    assert f(torch.tensor([1, 2])).dtype is torch.int32
    with pytest.raises(UnsupportedDtypeError, match=r"args\[0\] of .*do not fit into int32.*x64"):
        f(torch.tensor([2**40]))
    for dtype in (torch.float64, torch.complex128, torch.uint64):
        with pytest.raises(UnsupportedDtypeError, match=r"args\[0\] of .*jax_enable_x64"):
            f(torch.ones(2, dtype=dtype))


VIEWS = {
    "transposed": lambda: torch.randn(3, 4).t(),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "strided": lambda: torch.randn(6, 8)[::2, ::2],
    "offset": lambda: torch.randn(13)[1:].view(3, 4),
    "conjugated": lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(3, 4, dtype=torch.complex64).conj().imag,
    "negated, dense": lambda: (
        torch.randn(6, dtype=torch.complex64).conj().imag.as_strided((3, 4), (4, 1), 0)
    ),
    "negated, one element": lambda: torch.randn(1, dtype=torch.complex64).conj().imag,
    "conjugated, one element": lambda: torch.randn((), dtype=torch.complex64).conj(),
    "flipped": lambda: torch.randn(3, 4).flip(0),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": lambda: torch.nn.Parameter(torch.randn(3, 4)),
    "size one, odd strides": lambda: torch.randn(3, 4).as_strided((1, 4), (77, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    x = VIEWS[name]().detach().requires_grad_()
    y = jax2torch(lambda x: jnp.sin(x) * x)(x)
    expected = torch.sin(x) * x
    torch.testing.assert_close(y, expected)
    c = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, c)[0], torch.autograd.grad(expected, x, c)[0]
    )


def test_what_is_not_plain_goes_through_t2j(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tensors the extension imports itself, and that t2j gives the same for them."""
    asked: list[int] = []

    def other(x: torch.Tensor, i: int) -> jax.Array:
        asked.append(i)
        return array_beside(x)

    class Mine(torch.Tensor):
        pass

    monkeypatch.setattr(transfer, "_array", other)
    dense = torch.randn(4, 4)
    plain = [
        *(dense, dense.requires_grad_(), torch.nn.Parameter(dense.detach()), torch.tensor(2.0)),
        *(torch.ones(3, dtype=d) for d in (torch.bool, torch.uint8, torch.bfloat16)),
        *(torch.ones(3, dtype=torch.complex64), torch.randn(4, 1).as_strided((1, 4, 1), (9, 1, 5))),
    ]
    others = [
        *(
            dense.t(),
            dense[1:, 1:],
            dense.flatten()[1:],
            torch.ones(0),
            dense.detach().as_subclass(Mine),
        ),
        *(torch.ones(3, dtype=torch.complex64).conj(), torch.ones(3, dtype=torch.int64)),
    ]
    arrays, n_tensors, place = transfer.to_arrays([*plain, 2.0, None, *others], False)
    first = len(plain) + 2
    assert asked == list(range(first, first + len(others)))
    assert n_tensors == len(plain) + len(others)
    assert place == -1
    assert arrays[len(plain) : first] == [2.0, None]
    for x, array in zip([*plain, *others], arrays[: len(plain)] + arrays[first:], strict=True):
        expected = t2j(x)
        assert array.committed
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(jax.jit(lambda a: a)(array), expected)
        for each in (array, expected) if x.numel() else ():
            shared = each.unsafe_buffer_pointer() == x.data_ptr()
            assert shared == (any(x is p for p in plain) or type(x) is Mine)
    asked.clear()
    with precision(True):
        transfer.to_arrays([torch.ones(3, dtype=torch.int64)], True)
    assert not asked
    assert transfer.to_arrays([1.0], False) == ([1.0], 0, None)


def test_static_arguments() -> None:
    def power(x: Any, n: Any, mode: str = "plain") -> Any:
        return x**n if mode == "plain" else -(x**n)

    f = jax2torch(power, static_argnames=("n", "mode"))
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    assert f(x, 2).tolist() == [4, 9]
    assert f(x, n=3, mode="negative").tolist() == [-8, -27]
    f(x, 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4, 6]
    g = jax2torch(power, static_argnums=1)
    assert g(x, 2).tolist() == [4, 9]
    with pytest.raises(SignatureError, match="cannot be hashed"):
        g(x, [2])


def test_nondiff_argnums() -> None:
    f = jax2torch(lambda x, d: x * d["y"], nondiff_argnums=1)
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    f(x, {"y": y}).sum().backward()
    assert x.grad is not None
    assert y.grad is None
    assert not f(x.detach(), {"y": y}).requires_grad


def test_device() -> None:
    f = jax2torch(lambda x: x + 1, device="cpu")
    assert f(1.0).device.type == "cpu"
    assert f(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(SignatureError, match=r"args\[0\].*is on meta"):
        f(torch.ones(2, device="meta"))


def test_without_tensors() -> None:
    out = jax2torch(lambda n: jnp.arange(3.0) * n)(2)
    assert out.tolist() == [0, 2, 4]


# --- errors --------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    def f(x: Any, mode: Any = None) -> Any:
        return x

    g = jax2torch(f)
    with pytest.raises(SignatureError, match=r"args\[1\] of .*is a str.*static_argnames"):
        g(torch.ones(2), "mode")
    with pytest.raises(SignatureError, match=r"called with 0 positional"):
        g()
    with pytest.raises(SignatureError, match=r"is a JAX tracer.*call the JAX function"):
        jax.jit(lambda x: g(x))(jnp.ones(2))
    with pytest.raises(SignatureError, match=r"result\['a'\] of .*is a str"):
        jax2torch(lambda x: {"a": "text", "b": x})(torch.ones(2))
    with pytest.raises(UnsupportedDtypeError, match=r"result of .*random keys"):
        jax2torch(lambda x: jax.random.key(0))(torch.ones(2))
    with pytest.raises(SignatureError, match=r"args\[0\] of .*sparse"):
        g(torch.ones(2, 2).to_sparse())
    with pytest.raises(SignatureError, match="wraps a callable"):
        jax2torch(3)  # type: ignore[arg-type]


def test_errors_of_options() -> None:
    with pytest.raises(SignatureError, match=r"static_argnums .*names argument 5.* takes 1 pos"):
        jax2torch(lambda x: x, static_argnums=5)
    with pytest.raises(SignatureError, match=r"static_argnames .*names 'm'"):
        jax2torch(lambda x: x, static_argnames="m")
    assert jax2torch(lambda *xs: xs[5], static_argnums=5)(*[torch.ones(1)] * 5, 7).item() == 7
    for i in (5, -5):
        with pytest.raises(SignatureError, match=rf"nondiff_argnums .*names argument {i}"):
            jax2torch(lambda x: x, nondiff_argnums=i)(torch.ones(2))
    assert jax2torch(lambda x, y: x * y, nondiff_argnums=-1)(torch.ones(2), 2.0).tolist() == [2, 2]
    with pytest.raises(SignatureError, match="device='nowhere'"):
        jax2torch(lambda x: x, device="nowhere")
    with pytest.raises(SignatureError, match="name=3"):
        jax2torch(lambda x: x, name=3)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(Torch2JaxError, match=r"no device cuda here, but cpu:0"):
            jax2torch(lambda: jnp.ones(2), device="cuda")()


def test_an_exception_of_the_function_reaches_the_caller() -> None:
    class Mine(Exception):
        pass

    def f(x: Any) -> Any:
        if x.shape[0] == 3:
            raise Mine("three")
        return x

    g = jax2torch(f)
    for requires_grad in (False, True):
        with pytest.raises(Mine, match="three"):
            g(torch.ones(3, requires_grad=requires_grad))
        assert g(torch.ones(2, requires_grad=requires_grad)).tolist() == [1, 1]


def test_an_exception_at_run_time_reaches_the_caller() -> None:
    def fail(x: Any) -> Any:
        raise ValueError("at run time")

    def f(x: Any) -> Any:
        return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(Exception, match="at run time"):
        jax2torch(f)(torch.ones(2))
    assert jax2torch(jnp.sin)(torch.zeros(2)).tolist() == [0, 0]


def test_shape_errors_are_jax_own() -> None:
    x, w, b = operands()
    with pytest.raises(TypeError, match="dot_general"):
        jax2torch(mlp)(x, w.t(), b)


# --- memory --------------------------------------------------------------------------------------


def test_arguments_are_not_copied() -> None:
    x = torch.ones(1 << 20)
    (array,), _, place = transfer.to_arrays([x], False)
    assert array.unsafe_buffer_pointer() == x.data_ptr()
    assert place == -1
    (tensor,) = transfer.to_tensors([array], frozenset({array.dtype}), place)
    assert tensor.data_ptr() == x.data_ptr()


def imported(x: torch.Tensor) -> jax.Array:
    return transfer.to_arrays([x], False)[0][0]


def test_a_leaf_is_imported_once() -> None:
    """As long as it is the same view of the same memory, whatever is written there."""
    x = torch.ones(4, requires_grad=True)
    array = imported(x)
    assert imported(x) is array
    with torch.no_grad():
        x += 1
    assert imported(x) is array
    assert jax2torch(jnp.sum)(x).item() == 8
    memory = x.detach()
    for data in (memory.view(2, 2), memory[None], torch.zeros(4), memory.view(torch.int32).float()):
        x.data = data
        again = imported(x)
        assert again is not array
        np.testing.assert_array_equal(again, data)
        assert again.shape == data.shape
    bits = torch.ones(4, requires_grad=True)
    array = imported(bits)
    bits.data = bits.data.view(torch.complex64)
    assert imported(bits).dtype == jnp.complex64


def test_other_tensors_are_imported_each_time() -> None:
    leaf = torch.ones(4, requires_grad=True)
    large = torch.ones((1 << 18) + 1, requires_grad=True)
    for x in (torch.ones(4), leaf * 1, large):
        assert imported(x) is not imported(x)


def test_modules_that_swap_their_parameters() -> None:
    """PyTorch swaps tensors without weak references alone."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = torch.nn.Linear(2, 2)
        jax2torch(lambda w: w.sum())(module.weight).backward()
        module.to(torch.float16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module.weight.dtype is torch.float16
    assert imported(module.weight) is imported(module.weight)


def test_a_leaf_and_its_array_are_freed() -> None:
    f = jax2torch(jnp.sum)
    for kind in (torch.nn.Parameter, lambda x: x.requires_grad_()):
        leaves = [kind(torch.ones(4)) for _ in range(100)]
        for x in leaves:
            f(x).backward()
        freed = [weakref.ref(a) for x in leaves for a in (x, imported(x))]
        assert all(ref() is not None for ref in freed)
        del leaves, x
        assert [ref() for ref in freed] == [None] * 200
    x = torch.ones(4, requires_grad=True)
    old = weakref.ref(imported(x))
    x.data = torch.zeros(4)
    assert imported(x).tolist() == [0] * 4
    assert old() is None


def test_leaves_in_threads() -> None:
    """Made, imported, replaced and dropped in four threads, beside leaves that all share."""
    shared = [torch.full((4,), float(i), requires_grad=True) for i in range(8)]
    wrong: list[Any] = []

    def work(k: int) -> None:
        for i in range(300):
            own = torch.full((4,), float(k * i), requires_grad=True)
            for x, value in ((own, k * i), (shared[i % 8], i % 8)):
                if imported(x).tolist() != [float(value)] * 4:
                    wrong.append((k, i))
            own.data = torch.full((4,), -1.0)
            if imported(own).tolist() != [-1.0] * 4:
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_argument_may_be_written_to_after_the_call() -> None:
    f = jax2torch(lambda x: jax.lax.fori_loop(0, 50, lambda i, v: jnp.sin(v @ x), x))
    x = torch.randn(200, 200)
    expected = f(x.clone())
    for _ in range(5):
        y = x.clone()
        out = f(y)
        y.zero_()
        assert torch.equal(out, expected)


def test_a_result_may_be_written_to() -> None:
    constant = jnp.arange(4.0)
    f = jax2torch(lambda x: (constant, x, jnp.zeros(4), constant + 0))
    x = torch.ones(4)
    for _ in range(3):
        out = f(x)
        assert [t.tolist() for t in out] == [[0, 1, 2, 3], [1] * 4, [0] * 4, [0, 1, 2, 3]]
        pointers = {t.data_ptr() for t in (*out, x)}
        assert len(pointers) == 5
        for t in out:
            t.fill_(7)
    assert constant.tolist() == [0, 1, 2, 3]
    assert x.tolist() == [1] * 4


@pytest.mark.parametrize("which", ["argument", "result"])
def test_what_backward_reads_keeps_its_version_check(which: str) -> None:
    x = torch.ones(3, requires_grad=True)
    z = x * 1
    y = jax2torch(jnp.exp if which == "result" else lambda z: z * z)(z)
    with torch.no_grad():
        (y if which == "result" else z).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_results_outlive_everything() -> None:
    def make() -> torch.Tensor:
        return jax2torch(lambda x: x * 2)(torch.arange(1000.0))

    tensors = [make() for _ in range(50)]
    gc.collect()
    for t in tensors:
        assert torch.equal(t, torch.arange(1000.0) * 2)


# --- traces --------------------------------------------------------------------------------------


def test_traced_once_for_each_shape_and_dtype() -> None:
    traces = []

    def f(x: Any, s: Any) -> Any:
        traces.append((x.shape, x.dtype))
        return jnp.sin(x) * s

    g = jax2torch(f)
    for s in (1.0, 2.0, 3.0):
        for x in (torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.bfloat16)):
            g(x, s)
    assert len(traces) == 3
    for _ in range(3):
        x = torch.ones(2, requires_grad=True)
        g(x, 2.0).sum().backward()
    assert len(traces) == 4


def test_forward_runs_once_in_forward_and_backward() -> None:
    counts = {"forward": 0, "backward": 0}

    def count(which: str) -> None:
        counts[which] += 1

    @jax.custom_vjp
    def f(x: Any) -> Any:
        jax.debug.callback(lambda: count("forward"))
        return jnp.sin(x)

    def forward(x: Any) -> Any:
        return f(x), x

    def backward(x: Any, c: Any) -> Any:
        jax.debug.callback(lambda: count("backward"))
        return (c * jnp.cos(x),)

    f.defvjp(forward, backward)
    g = jax2torch(f)
    for run in (
        lambda x: g(x).sum().backward(),
        lambda x: torch.autograd.grad(g(x).sum(), x, create_graph=True),
        lambda x: torch.func.grad(lambda x: g(x).sum())(x.detach()),
        lambda x: torch.func.vmap(torch.func.grad(g))(x.detach()),
        lambda x: torch.func.grad(lambda x: torch.func.vmap(g)(x).sum())(x.detach()),
    ):
        counts.update(forward=0, backward=0)
        run(torch.ones(3, requires_grad=True))
        jax.effects_barrier()
        assert counts["forward"] in (1, 3)  # the callback runs for each row under vmap
        assert counts["backward"] == counts["forward"]
    counts.update(forward=0, backward=0)
    with torch.no_grad():
        g(torch.ones(3, requires_grad=True))
    jax.effects_barrier()
    assert counts == {"forward": 1, "backward": 0}


# --- threads, lifetimes --------------------------------------------------------------------------


def test_threads() -> None:
    f = jax2torch(mlp)
    failures: list[Any] = []

    def work(seed: int) -> None:
        try:
            gen = torch.Generator().manual_seed(seed)
            for n in range(1, 20):
                x = torch.randn(n, 3, generator=gen, requires_grad=True)
                w = torch.randn(3, 5, generator=gen, requires_grad=True)
                b = torch.randn(5, generator=gen)
                y, z = f(x, w, b), torch.tanh(x @ w + b)
                torch.testing.assert_close(y, z)
                for p, q in zip(
                    torch.autograd.grad(y.sum(), (x, w)),
                    torch.autograd.grad(z.sum(), (x, w)),
                    strict=True,
                ):
                    torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not failures
    assert not any(t.is_alive() for t in threads)


def test_backward_in_another_thread_keeps_x64() -> None:
    f = jax2torch(lambda x: jnp.sin(x) * 2)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with precision(True):
        y = f(x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()))


def _live_bytes() -> int:
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_left_behind(backward: bool) -> None:
    f = jax2torch(mlp)
    x, w, b = operands(requires_grad=True)

    def call() -> list[Any]:
        given = x.clone()
        out = f(given, w, b)
        refs = [weakref.ref(given), weakref.ref(out)]
        if backward:
            torch.autograd.grad(out.sum(), (x, w, b))
        return refs

    call()
    before = _live_bytes()
    refs = [r for _ in range(1000) for r in call()]
    assert not any(r() is not None for r in refs)
    assert _live_bytes() <= before


def test_backward_frees_residuals() -> None:
    f = jax2torch(lambda x: jnp.sin(jnp.sin(x)))
    before = _live_bytes()
    x = torch.ones(1 << 19, requires_grad=True)
    y = f(x)
    assert _live_bytes() > before
    y.sum().backward()
    assert _live_bytes() == before + 2 * x.nbytes  # y and x.grad, which are JAX's memory
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_no_grad_keeps_no_residuals() -> None:
    f = jax2torch(lambda x: jnp.sin(jnp.sin(x)))
    x = torch.ones(1 << 19, requires_grad=True)
    before = _live_bytes()
    with torch.no_grad():
        y = f(x)
    with torch.inference_mode():
        z = f(x)
    assert not y.requires_grad
    assert torch.equal(y, z)
    assert _live_bytes() == before + 2 * x.nbytes  # y and z


def test_the_function_is_freed() -> None:
    def make() -> Any:
        big = np.ones(10)

        def f(x: Any) -> Any:
            return jnp.sin(x) * big.sum()

        g = jax2torch(f)
        x = torch.ones(3, requires_grad=True)
        torch.autograd.grad(torch.autograd.grad(g(x).sum(), x, create_graph=True)[0].sum(), x)
        torch.func.vmap(g)(x)
        return weakref.ref(f), weakref.ref(g)

    gc.disable()  # no cycles: see NOTE [No cycles] in _jax_program.py
    try:
        refs = make()
        assert [r() for r in refs] == [None, None]
    finally:
        gc.enable()


def test_copies_and_pickles() -> None:
    f = jax2torch(mlp, name="network")
    for g in (copy.copy(f), copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert torch.equal(g(*operands()), f(*operands()))
    assert repr(f) == "jax2torch(mlp)"


# --- nesting -------------------------------------------------------------------------------------


def test_round_trips_unwrap() -> None:
    def f(x: Any) -> Any:
        return jnp.sin(x)

    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    assert torch2jax(jax2torch(f)) is f
    assert jax2torch(torch2jax(g)) is g
    assert jax2torch(torch2jax(jax2torch(f))).__wrapped__ is f  # type: ignore[attr-defined]


def test_round_trips_with_options_do_not_unwrap() -> None:
    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    h = jax2torch(torch2jax(g, depth=1))
    x = torch.ones(3, requires_grad=True)
    h(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.cos(x.detach()))
    k = torch2jax(jax2torch(jnp.sin), depth=1)
    np.testing.assert_allclose(
        jax.grad(lambda x: k(x).sum())(jnp.ones(3)), np.cos(np.ones(3)), 1e-6
    )


def test_a_torch_function_inside_a_jax_function() -> None:
    inner = torch2jax(lambda x: torch.sin(x))
    f = jax2torch(lambda x: inner(x) * jnp.cos(x))
    x = torch.randn(4, requires_grad=True)
    y, z = f(x), torch.sin(x) * torch.cos(x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(z.sum(), x)[0]
    )


@pytest.mark.parametrize("jit", [False, True])
def test_a_jax_function_inside_a_torch_function(jit: bool) -> None:
    inner = jax2torch(lambda x: jnp.tanh(x @ x.T))
    f = torch2jax(lambda x: inner(x) * 2 + inner(x))
    run = jax.jit(f) if jit else f
    x = jax.random.normal(jax.random.key(0), (8, 8))
    np.testing.assert_allclose(run(x), 3 * jnp.tanh(x @ x.T), 1e-4, 1e-5)
    expected = jax.grad(lambda x: (3 * jnp.tanh(x @ x.T)).sum())(x)
    got = jax.grad(lambda x: run(x).sum())(x)
    np.testing.assert_allclose(got, expected, 1e-3, 1e-4)


def test_nested_calls_from_many_threads_end() -> None:
    inner = jax2torch(lambda x: jax.lax.fori_loop(0, 20, lambda i, v: jnp.sin(v @ x), x))
    outer = jax.jit(torch2jax(lambda x: inner(x) + inner(2 * x)))
    x = jnp.ones((64, 64)) / 64
    expected = np.asarray(outer(x))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(np.asarray(outer(x)))) for _ in range(8)
    ]
    start = time.monotonic()
    for t in threads:
        t.daemon = True
        t.start()
    for t in threads:
        t.join(max(0.0, 60 - (time.monotonic() - start)))
    assert not any(t.is_alive() for t in threads)
    for r in results:
        np.testing.assert_allclose(r, expected, 1e-6)
