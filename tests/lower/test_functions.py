"""`torch2jax(fn, lower=True)` and `from_module(..., lower=True)`: plain JAX, with torch's values."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hugging_face as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import close
from torch import nn

from torch2jax import SignatureError, from_module, lowering_report, to_state_dict, torch2jax


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.SiLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 2),
    )  # fmt: skip


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def lstm() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 5, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0][:, -1]

    return Last()


MODULES = {
    "mlp": (mlp, (5, 4)),
    "convnet": (convnet, (2, 3, 12, 12)),
    "transformer": (transformer, (2, 5, 8)),
    "lstm": (lstm, (2, 6, 4)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, train: bool) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make()
    x = torch.randn(shape)
    apply, variables = from_module(module, lower=True)
    twin = make()
    twin.load_state_dict(module.state_dict())
    twin.train(train)
    expected = twin(x)
    (expected**2).sum().backward()

    def loss(params: Any) -> Any:
        out = apply({**variables, "params": params}, jnp.asarray(x.numpy()), train=train)
        out, buffers = out if train else (out, None)
        return (out**2).sum(), (out, buffers)

    grads, (out, buffers) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    close(out, expected)
    for key, p in twin.named_parameters():
        close(grads[key], p.grad, 2e-4)
    for key, b in twin.named_buffers():
        if train:
            close(buffers[key], b)
    text = jax.jit(lambda p: loss(p)[0]).lower(variables["params"]).as_text()
    assert "custom_call" not in text


@pytest.mark.parametrize("name", MODULES)
def test_nothing_goes_through_the_bridge(name: str) -> None:
    make, shape = MODULES[name]
    report = lowering_report(make(), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert report.native
    assert not report.bridge
    assert all("test_functions.py" in where or "torch" in where for _, where in report.native)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", list(hf.MODELS))
@pytest.mark.filterwarnings("ignore:.*refuses int32.*")
def test_hugging_face(name: str, train: bool) -> None:
    torch.manual_seed(0)
    make, inputs, no_dropout = hf.MODELS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        warnings.filterwarnings("ignore", category=FutureWarning)
        hf.agrees(make(**no_dropout), inputs, train, lower=True)


@pytest.mark.parametrize("name", list(hf.MODELS))
def test_hugging_face_without_custom_calls(name: str) -> None:
    make, inputs, no_dropout = hf.MODELS[name]
    apply, variables = from_module(make(**no_dropout), lower=True)
    arrays = {k: hf.to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    static = {k: x for k, x in inputs.items() if k not in arrays}

    def run(v: Any, a: Any) -> Any:
        return apply(v, **a, **static)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = jax.export.export(jax.jit(run))(variables, arrays)
    called = re.findall(r"stablehlo.custom_call @([\w.]+)", exported.mlir_module())
    assert {name for name in called if not name.startswith("mhlo.")} == set()  # jax 0.7: mhlo.erf
    again = jax.export.deserialize(exported.serialize())
    close(again.call(variables, arrays)["logits"], run(variables, arrays)["logits"])


# --- transforms ----------------------------------------------------------------------------------


def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b).cumsum(-1) * torch.sigmoid(a[:, :1])


def twin(a: Any, b: Any) -> Any:
    return jnp.cumsum(jnp.tanh(a @ b), -1) * jax.nn.sigmoid(a[:, :1])


A = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
B = np.linspace(-2, 1, 12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        lambda f: jax.grad(lambda a, b: f(a, b).sum(), (0, 1)),
        lambda f: lambda a, b: jax.jvp(f, (a, b), (a, b)),
        lambda f: jax.jacfwd(f),
        lambda f: jax.jacrev(f),
        lambda f: jax.hessian(lambda a, b: f(a, b).sum()),
        lambda f: lambda a, b: jax.vmap(f, (0, None))(jnp.stack([a, 2 * a]), b),
        lambda f: jax.checkpoint(f),
        lambda f: lambda a, b: jax.lax.scan(lambda c, _: (c * 0.5, f(c, b)), a, None, 3),
    ],
    ids=["call", "jit", "grad", "jvp", "jacfwd", "jacrev", "hessian", "vmap", "remat", "scan"],
)
def test_transforms(transform: Any) -> None:
    got = transform(torch2jax(fn, lower=True))(A, B)
    expected = transform(twin)(A, B)
    jax.tree.map(lambda x, y: close(x, np.asarray(y)), got, expected)


def test_pytrees_keywords_statics_and_examples() -> None:
    def fn(d: dict[str, Any], *, mode: str = "sum", scale: Any = 1.0) -> dict[str, Any]:
        return {"out": getattr(d["x"], mode)() * scale, "n": 3}

    f = torch2jax(fn, {"x": torch.ones(3)}, example_kw={"mode": "sum", "scale": 1.0}, lower=True)
    out = f({"x": jnp.arange(3.0)}, mode="sum", scale=2.0)
    assert out["out"] == 6
    assert out["n"] == 3
    with pytest.raises(SignatureError):
        f(jnp.ones(3), mode="sum", scale=2.0)


def test_int64_is_carried_as_int32() -> None:
    f = torch2jax(lambda x: (x.dtype is torch.int64, x.sum())[1], torch.ones(3).long(), lower=True)
    assert f(jnp.arange(3)).dtype == jnp.int32


def test_in_place_and_views() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[0] += 1
        y.t().mul_(2)
        y[:, 1] = 7
        y.view(-1)[::2].zero_()
        return y

    x = torch.arange(6.0).reshape(2, 3)
    close(torch2jax(fn, lower=True)(jnp.asarray(x.numpy())), fn(x))
    close(
        jax.grad(lambda x: torch2jax(fn, lower=True)(x).sum())(jnp.asarray(x.numpy())),
        torch.func.grad(lambda x: fn(x).sum())(x),
    )


def test_inplace_argnums() -> None:
    def update(p: torch.Tensor, g: torch.Tensor) -> None:
        p.sub_(g, alpha=0.1)

    new = torch2jax(update, inplace_argnums=0, lower=True)(jnp.ones(3), jnp.ones(3))
    close(new, np.full(3, 0.9, np.float32))


def test_detach_and_no_grad_stop_gradients() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            a = x * 2
        return x * a + x.detach() * x

    g = jax.grad(lambda x: torch2jax(fn, lower=True)(x).sum())(jnp.array([3.0]))
    close(g, [9.0])


def test_autograd_function_keeps_its_backward() -> None:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 3 * g

    f = torch2jax(lambda x: Round.apply(x) * x, lower=True)
    close(jax.grad(lambda x: f(x).sum())(jnp.array([1.2, 2.7])), [1 + 3 * 1.2, 3 + 3 * 2.7])
    x = torch.tensor([1.2], requires_grad=True)
    Round.apply(x).sum().backward()
    close(x.grad, [3.0])


def test_gradients_inside() -> None:
    def force(x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]

    f = torch2jax(force, lower=True)
    close(f(jnp.array([2.0])), [12.0])
    close(jax.grad(lambda x: f(x).sum())(jnp.array([2.0])), [12.0])
    g = torch2jax(torch.func.grad(lambda x: (x**3).sum()), lower=True)
    close(g(jnp.array([2.0])), [12.0])
    v = torch2jax(torch.func.vmap(lambda x: x.sum() * x), lower=True)
    close(v(jnp.ones((2, 3))), np.full((2, 3), 3.0))


def test_random_numbers_come_from_the_key() -> None:
    drop = torch2jax(lambda x: torch.dropout(x, 0.5, True), lower=True, stochastic=True)
    x = jnp.ones((64, 64))
    a, b = drop(x, rng=jax.random.key(0)), drop(x, rng=jax.random.key(1))
    assert (a == drop(x, rng=jax.random.key(0))).all()
    assert (a != b).any()
    assert 0.4 < float((a == 0).mean()) < 0.6
    assert set(np.unique(a)) == {0.0, 2.0}
    grads = jax.grad(lambda x: drop(x, rng=jax.random.key(0)).sum())(x)
    assert (grads == a).all()
    with pytest.raises(SignatureError, match="rng="):
        torch2jax(lambda x: torch.dropout(x, 0.5, True), lower=True)(x)


DRAWS: dict[str, tuple[Any, float, float]] = {  # with the mean and the deviation of what is drawn
    "normal of numbers": (lambda: torch.normal(1.0, 2.5, (4000,)), 1.0, 2.5),
    "normal of numbers, size=": (lambda: torch.normal(mean=1.0, std=2.5, size=[4000]), 1.0, 2.5),
    "normal of a tensor": (lambda: torch.normal(torch.ones(4000), 2.5), 1.0, 2.5),
    "binomial": (
        lambda: torch.binomial(torch.full((4000,), 10.0), torch.full((4000,), 0.3)), 3.0, 2.1**0.5,
    ),
    "rrelu": (
        lambda: torch.nn.functional.rrelu(-torch.ones(4000), 0.2, 0.4, training=True),
        -0.3, 0.2 / 12**0.5,
    ),
    "rrelu_": (
        lambda: torch.nn.functional.rrelu(-torch.ones(4000), 0.2, 0.4, True, inplace=True),
        -0.3, 0.2 / 12**0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_no_draw_is_a_constant_of_the_program(name: str) -> None:
    draw, mean, deviation = DRAWS[name]
    f = jax.jit(torch2jax(draw, lower=True, stochastic=True))
    a, b = f(rng=jax.random.key(0)), f(rng=jax.random.key(1))
    assert (a == f(rng=jax.random.key(0))).all()
    assert (a != b).any()
    close(a.mean(), mean, 5 * deviation / 4000**0.5)
    close(a.std(), deviation, 0.1 * deviation)
    with pytest.raises(SignatureError, match="rng="):
        torch2jax(draw, lower=True)()


def test_rrelu_without_training() -> None:
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    expected = torch.nn.functional.rrelu(torch.from_numpy(x), 0.2, 0.5).numpy()
    f = torch2jax(lambda x: torch.nn.functional.rrelu(x, 0.2, 0.5), lower=True, stochastic=True)
    close(f(x, rng=jax.random.key(0)), expected)
    slopes = jax.grad(lambda x: f(x, rng=jax.random.key(0)).sum())(x)
    close(slopes, np.where(x > 0, 1, 0.35))


def test_shapes_that_depend_on_values_say_so() -> None:
    with pytest.raises(Exception, match="depends on the values"):
        jax.jit(torch2jax(lambda x: x[x > 0], lower=True))(jnp.ones(3))
    with pytest.raises(Exception, match="being traced"):
        torch2jax(lambda x: x if x.sum() > 0 else -x, lower=True)(jnp.ones(3))


def test_symbolic_sizes_say_so() -> None:
    shape = jax.export.symbolic_shape("n, 3")
    with pytest.raises(SignatureError, match="sizes that are numbers"):
        jax.export.export(jax.jit(torch2jax(torch.sin, lower=True)))(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )


def test_the_report_takes_flags_as_they_are() -> None:
    def fn(x: torch.Tensor, mode: str, twice: bool) -> torch.Tensor:
        y = getattr(x, mode)()
        return y + y if twice else y

    report = lowering_report(fn, jnp.ones(3), "sin", twice=True)
    assert {op for op, _ in report.native} == {"aten.sin.default", "aten.add.Tensor"}


def test_a_loss_that_asks_requires_grad_for_its_gradients() -> None:
    options = torch.nn.modules.linear_cross_entropy_options.LinearCrossEntropyOptions
    labels = torch.tensor([0, 3, -100, 1, 2])

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        chunks = options(batch_chunk_size=2)
        return nn.functional.linear_cross_entropy(x, w, labels, ignore_index=-100, options=chunks)

    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    expected = fn(x, w)
    expected.backward()
    f = torch2jax(fn, lower=True)
    value, (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1)))(
        jnp.asarray(x.detach().numpy()), jnp.asarray(w.detach().numpy())
    )
    close(value, expected)
    close(dx, x.grad)
    close(dw, w.grad)


def test_constants_of_a_trace_are_values() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(3, 3, dtype=torch.bool).tril()
        if not mask.all():  # a Python value while fn is traced
            x = x.masked_fill(~mask, 0.0)
        return x

    close(torch2jax(fn, lower=True)(jnp.ones((3, 3))), np.tril(np.ones((3, 3))))


def test_a_large_constant_is_made_in_the_program() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        big = torch.arange(1 << 20, dtype=torch.float32) * 2
        assert big[3] == 6
        return x + big

    f = torch2jax(fn, lower=True)
    x = jnp.zeros(1 << 20)
    assert len(jax.jit(f).lower(x).as_text()) < 20000
    close(f(x)[:3], [0.0, 2.0, 4.0])


def test_closed_over_tensors_are_constants() -> None:
    w = torch.ones(3, requires_grad=True)
    f = torch2jax(lambda x: x * w, lower=True)
    close(jax.grad(lambda x: f(x).sum())(jnp.ones(3)), np.ones(3))
    assert w.grad is None


def test_an_operator_without_lowering_goes_through_the_bridge() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.householder_product(x, x[0])

    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
    report = lowering_report(fn, x)
    ((op, where),) = report.bridge
    assert "householder" in op
    assert where.startswith(__file__)
    f = torch2jax(fn, lower=True)
    expected = torch.tensor(x, requires_grad=True)
    out = fn(expected)
    out.sum().backward()
    close(jax.jit(f)(x), out)
    close(jax.grad(lambda x: f(x).sum())(x), expected.grad, 1e-4)


def test_registered_lowering() -> None:
    from torch2jax import device

    library = torch.library.Library("t2j_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    device.register_lowering(torch.ops.t2j_test.twice, lambda x: x + x)
    report = lowering_report(torch.ops.t2j_test.twice, jnp.ones(3))
    assert [op for op, _ in report.native] == ["t2j_test.twice.default"]
    close(torch2jax(torch.ops.t2j_test.twice, lower=True)(jnp.ones(3)), [2.0, 2.0, 2.0])


def test_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    f = torch2jax(lambda x: torch.softmax(x, -1), lower=True)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    x = jnp.arange(6.0).reshape(2, 3)
    close(jax.jit(mapped)(x), jax.nn.softmax(x, -1))


def test_constants_are_read_at_each_trace() -> None:
    w = torch.ones(3)
    f = torch2jax(lambda x: x * w, lower=True)
    close(f(jnp.ones(3)), np.ones(3))
    w.data.fill_(5)
    close(f(jnp.ones((1, 3))), np.full((1, 3), 5.0))


def test_automatic_sharding() -> None:
    program = """
import jax, jax.numpy as jnp, numpy as np, torch
from torch2jax import from_module
net = torch.nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
apply, variables = from_module(net, lower=True)
x = jnp.asarray(torch.randn(4, 5, 8).numpy())
expected = apply(variables, x)
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def put(a):
    spec = jax.P("x") if a.ndim and a.shape[0] % 4 == 0 else jax.P()
    return jax.device_put(a, jax.NamedSharding(mesh, spec))
out = jax.jit(apply)(jax.tree.map(put, variables), put(x))
assert len(out.sharding.device_set) == 4
np.testing.assert_allclose(out, expected, 1e-5, 1e-5)
print("equal")
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout == "equal\n", done.stderr


def test_to_state_dict_and_frozen() -> None:
    module = mlp()
    module[0].weight.requires_grad_(False)
    apply, variables = from_module(module, lower=True)
    assert "0.weight" in variables["frozen"]
    module.load_state_dict(to_state_dict(variables, apply))


PAGE = Path(__file__).resolve().parents[2] / "docs" / "pytorch_on_jax.md"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_the_page(block: str) -> None:
    exec(compile(block, str(PAGE), "exec"), {})


def test_the_example(tmp_path: Path) -> None:
    script = PAGE.parent.parent / "examples" / "gpt_on_jax.py"
    done = subprocess.run([sys.executable, str(script), "--smoke"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MODULES_WITH_EXAMPLES = (
    "_lower.report", "device.extract", "device.interop", "device.jit.jitted",
    "device.operators.dispatch", "device.setup.enable",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(f"torch2jax.{name}")
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_the_bridge_does_not_import_it() -> None:
    program = (
        "import sys, torch2jax, jax.numpy as jnp, torch\n"
        "torch2jax.torch2jax(torch.sin)(jnp.ones(3))\n"
        "print([m for m in sys.modules if m.startswith(('torch2jax.device', 'torch2jax.lower'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_output_shapes_are_checked() -> None:
    x = jnp.ones((2, 3))
    f = torch2jax(torch.sin, lower=True, output_shapes=jax.ShapeDtypeStruct((2, 3), jnp.float32))
    close(f(x), jnp.sin(x))
    for wrong in (torch.Size([7]), {"a": torch.Size([2, 3])}):
        with pytest.raises(
            SignatureError, match=r"returned float32\[2,3\], and output_shapes says"
        ):
            torch2jax(torch.sin, lower=True, output_shapes=wrong)(x)


# --- operators whose own code reads values, or meets what few programs have ----------------------

FREQUENCIES = torch.stft(
    torch.sin(torch.arange(64.0)), 16, 4, return_complex=True, window=torch.ones(16)
)
ROWS = torch.arange(12.0).reshape(3, 4).cos()

# name: a function, and its operands, all of which are traced
RARE: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "cov with importance": (lambda x, w: torch.cov(x, aweights=w), (ROWS, torch.rand(4) + 1)),
    "cov with counts": (lambda x, n: torch.cov(x, fweights=n), (ROWS, torch.tensor([1, 2, 3, 1]))),
    "cov with both": (
        lambda x, w: torch.cov(x, correction=0, fweights=w.int(), aweights=w),
        (ROWS, torch.tensor([1.0, 2.0, 3.0, 1.0])),
    ),
    "cov of too few": (
        lambda x, w: torch.cov(x, correction=9, aweights=w), (ROWS, torch.rand(4) + 1)
    ),
    "fftfreq": (lambda x: x * torch.fft.fftfreq(4), (ROWS,)),
    "fftfreq of an odd number": (lambda x: x.T * torch.fft.fftfreq(3, 0.2), (ROWS,)),
    "istft": (
        lambda f, w: torch.istft(f, 16, 4, window=w), (FREQUENCIES, torch.hann_window(16) + 1)
    ),
    "istft of a short window": (
        lambda f, w: torch.istft(f, 16, 4, win_length=12, window=w, length=50),
        (FREQUENCIES, torch.hann_window(12) + 1),
    ),
    "istft beyond the end": (
        lambda f, w: torch.istft(f[None], 16, 4, window=w, normalized=True, length=70),
        (FREQUENCIES, torch.hann_window(16) + 1),
    ),
    "add at a mask": (
        lambda x, m, v: x.clone().index_put_((m,), v, accumulate=True),
        (ROWS, torch.tensor([True, False, True]), ROWS[:2] + 1),
    ),
    "add one row at a mask": (
        lambda x, m, v: x.index_put((m,), v, accumulate=True),
        (ROWS, torch.tensor([True, False, True]), ROWS[0] + 1),
    ),
    "one number for each place of a mask": (
        lambda x, m, v: x.index_put((m,), v),
        (ROWS, ROWS > 0, torch.arange(float((ROWS > 0).sum()))),
    ),
    "I0 at 0": (torch.i0, (torch.tensor([0.0, 1.0, -2.0]),)),
    "gather of nothing": (
        lambda x, i: x.gather(1, i).sum() + x.sum(), (ROWS, torch.zeros(3, 0, dtype=torch.int64))
    ),
    "group_norm of no rows": (lambda x, w: torch.group_norm(x[:0], 2, w, w), (ROWS, ROWS[0])),
}  # fmt: skip


@pytest.mark.parametrize("name", RARE)
def test_values_and_gradients_of_rare_operators(name: str) -> None:
    fn, operands = RARE[name]
    lowered = torch2jax(fn, lower=True)
    arrays = [jnp.asarray(x.numpy()) for x in operands]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of covariances and lengths
        wanted = fn(*operands)
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in operands]
        total = fn(*leaves).sum()
        floats = [i for i, x in enumerate(leaves) if x.requires_grad]
        gradients = torch.autograd.grad(total, [leaves[i] for i in floats], allow_unused=True)
    np.testing.assert_allclose(jax.jit(lowered)(*arrays), wanted, rtol=1e-4, atol=1e-5)
    found = jax.jit(jax.grad(lambda *xs: lowered(*xs).sum(), argnums=tuple(floats)))(*arrays)
    for ours, theirs, i in zip(found, gradients, floats, strict=True):
        zeros = torch.zeros_like(leaves[i])
        theirs = zeros if theirs is None else theirs
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


ZEROS: dict[str, Any] = {
    "abs": lambda x: x.abs().sum(),
    "norm 2": lambda x: x.norm(),
    **{
        f"norm {p}": lambda x, p=p: torch.linalg.vector_norm(x, p)
        for p in (0.5, 1, 3, float("inf"), -1, -0.5, float("-inf"))
    },
    "norm of complex": lambda x: torch.complex(x, x).norm(),
    "cdist": lambda x: torch.cdist(x[None], x[None]).sum(),
    "pdist": lambda x: torch.pdist(x.view(3, 1)).sum(),
    "normalize": lambda x: torch.nn.functional.normalize(x, dim=0).sum(),
    "atan2": lambda x: torch.atan2(x, x).sum(),
    "std": lambda x: x.std(),
    "std_mean": lambda x: sum(torch.std_mean(x)),
    "median": lambda x: x.median(),
    "nanmedian": lambda x: x.nanmedian(),
    "median beside others": lambda x: torch.cat([x, x + 1, x - 1]).median(),
    "max": lambda x: x.max(),
    "amax": lambda x: x.amax(),
    "maximum": lambda x: torch.maximum(x, x * 2).sum(),
    "fmax": lambda x: torch.fmax(x, x * 2).sum(),
    "fmin": lambda x: torch.fmin(x, x * 2).sum(),
    "clamp": lambda x: x.clamp(0, 1).sum(),
    "clamp above": lambda x: x.clamp(-1, 0).sum(),
    "clamp_min": lambda x: x.clamp_min(0).sum(),
    "clamp_max": lambda x: x.clamp_max(0).sum(),
    "clamp by tensors": lambda x: (3 * x.clamp(x * 2, x + 1)).sum(),
    "clamp by a tensor above": lambda x: (3 * x.clamp(max=x * 2)).sum(),
    "clamp_min by a tensor": lambda x: torch.clamp_min(x, x * 2).sum(),
    "clamp_max by a tensor": lambda x: torch.clamp_max(x, x * 2).sum(),
    "copysign": lambda x: torch.copysign(x, torch.tensor(-1.0)).sum(),
    "prod": lambda x: x.prod(),
    "cumprod": lambda x: x.cumprod(0).sum(),
    "sinc": lambda x: x.sinc().sum(),
    "xlogy": lambda x: torch.xlogy(x, x + 1).sum(),
    "hardswish": lambda x: torch.nn.functional.hardswish(x + 3).sum(),
    "huber": lambda x: torch.nn.functional.huber_loss(x, x * 0),
    "i0": lambda x: torch.i0(x).sum(),
}


@pytest.mark.parametrize("name", ZEROS)
def test_derivatives_at_zero(name: str) -> None:
    """Where there is none, infinite or several, JAX's derivative is the one PyTorch chose."""
    fn = ZEROS[name]
    x = torch.zeros(3, requires_grad=True)
    [wanted] = torch.autograd.grad(fn(x), x)
    lowered = torch2jax(fn, lower=True)
    np.testing.assert_allclose(lowered(jnp.zeros(3)), fn(x).detach(), atol=1e-6)
    found = jax.grad(lowered)(jnp.zeros(3))
    np.testing.assert_allclose(found, wanted.numpy(force=True), atol=1e-6)


def test_linspace_between_values() -> None:
    """It has a derivative here, which PyTorch's own has not."""
    f = torch2jax(lambda a, b: torch.linspace(a, b, 7), lower=True)
    close(jax.jit(f)(1.5, 4.0), jnp.linspace(1.5, 4.0, 7))
    close(jax.grad(lambda a: f(a, 4.0).sum())(1.5), jnp.float32(3.5))


def test_cholesky_solve_has_the_gradient_of_what_it_reads() -> None:
    factor = torch.linalg.cholesky(ROWS @ ROWS.T + torch.eye(3))
    both = torch2jax(lambda b, a: torch.cholesky_solve(b, torch.linalg.cholesky(a)), lower=True)
    b, a = ROWS.numpy(), (factor @ factor.T).numpy()
    close(both(b, a), np.linalg.solve(a, b))
    by_jax = jax.grad(lambda b, a: jnp.linalg.solve(a, b).sum(), (0, 1))(b, a)
    ours = jax.grad(lambda b, a: both(b, a).sum(), (0, 1))(b, a)
    close(ours[0], by_jax[0])
    close(ours[1], (by_jax[1] + by_jax[1].T) / 2)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda w: torch.cov(ROWS, aweights=w), "as many elements as there are observations"),
        (lambda w: torch.cov(ROWS[None], aweights=w), "two or fewer dimensions"),
        (lambda w: torch.istft(FREQUENCIES, 16, 4, window=w), "a window of win_length elements"),
        (lambda w: torch.istft(FREQUENCIES.abs(), 5, window=w), "expected a complex tensor"),
        (lambda w: torch.istft(FREQUENCIES, 16, 0, 5, window=w), "expected 0 < hop_length"),
        (lambda w: torch.istft(FREQUENCIES, 16, 4, 5, window=w + 0j), "needs return_complex=True"),
    ],
)
def test_operands_of_rare_operators_are_checked(fn: Any, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        jax.jit(torch2jax(fn, lower=True))(jnp.ones(5))


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_of_attention_on_cpus(causal: bool, heads: int) -> None:
    """Its second result is the logsumexp of the scores, which has no derivative."""
    torch.manual_seed(0)
    drawn = [torch.randn(2, n, 5, 8) for n in (4, heads, heads)]

    def fn(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(*args, is_causal=causal, scale=0.5)

    arrays = [jnp.asarray(x.numpy()) for x in drawn]
    values, pull = jax.vjp(torch2jax(fn, lower=True), *arrays)
    leaves = [x.clone().requires_grad_() for x in drawn]
    expected = fn(*leaves)
    for found, want in zip(values, expected, strict=True):
        np.testing.assert_allclose(found, want.detach(), rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected[0].sum(), leaves)
    for found, want in zip(pull((jnp.ones_like(values[0]), values[1])), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
