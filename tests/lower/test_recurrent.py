"""Recurrent layers under ``lower=True``: a scan for each layer and direction, PyTorch's numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torch2jax import from_module, lowering_report, torch2jax

KINDS: dict[str, Any] = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": lambda *a, **k: torch.nn.RNN(*a, nonlinearity="relu", **k),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
]
CASES = [(kind, o) for kind in KINDS for o in OPTIONS] + [
    ("gru", {"bias": False, "bidirectional": True}),
    ("lstm", {"proj_size": 2, "bias": False, "bidirectional": True, "num_layers": 2}),
]
STEPS, BATCH = 5, 3

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def _close(got: Any, want: Any, tol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tol, atol=tol)


def _made(kind: str, options: dict[str, Any]) -> tuple[Any, torch.Tensor, Any]:
    """A module, inputs, and a state to start with."""
    torch.manual_seed(0)
    module = KINDS[kind](4, 6, **options)
    x = torch.randn(STEPS, BATCH, 4)
    n = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    h = torch.randn(n, BATCH, options.get("proj_size", 6))
    state = (h, torch.randn(n, BATCH, 6)) if kind == "lstm" else h
    return module, x.transpose(0, 1).contiguous() if options.get("batch_first") else x, state


def _arrays(tree: Any) -> Any:
    return jax.tree.map(lambda t: jnp.asarray(t.detach().numpy()), tree)


def _flat(out: Any) -> list[Any]:
    return jax.tree.leaves(out, is_leaf=torch.is_tensor)


def _loss(out: Any) -> torch.Tensor:
    return torch.stack([(y**2).sum() for y in _flat(out)]).sum()


def _gradients(module: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(module.parameters()))
    return {k: g for (k, _), g in zip(module.named_parameters(), found, strict=True)}


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_values_and_gradients(kind: str, options: dict[str, Any]) -> None:
    given = bool(options)
    module, x, state = _made(kind, options)
    inputs = (x, state) if given else (x,)
    want = _flat(module(*inputs))
    apply, variables = from_module(module, lower=True)

    def run(variables: Any, *inputs: Any) -> Any:
        out = _flat(apply(variables, *inputs))
        return sum((y**2).sum() for y in out), out

    value = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, out), (by_variable, by_input) = value(variables, *_arrays(inputs))
    for got, expected in zip(out, want, strict=True):
        _close(got, expected.detach())
    x.requires_grad_()
    loss = _loss(module(*inputs))
    (of_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    _close(by_input, of_x)
    for name, g in _gradients(module, loss).items():
        _close(by_variable["params"][name], g)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_packed(kind: str, options: dict[str, Any]) -> None:
    batch_first, order = "batch_first" in options, not options
    module, x, state = _made(kind, {k: v for k, v in options.items() if k != "batch_first"})
    x = x.transpose(0, 1).contiguous() if batch_first else x
    lengths = torch.tensor([5, 4, 2] if order else [2, 5, 4])

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Any, state: Any) -> Any:
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=order)
            out, end = self.layer(packed, state)
            return pad_packed_sequence(out, batch_first, -1.0, 7)[0], end

    net = Net()
    want = _flat(net(x, state))
    apply, variables = from_module(net, lower=True)

    def run(variables: Any, *inputs: Any) -> Any:
        out = _flat(apply(variables, *inputs))
        return sum((y**2).sum() for y in out), out

    value = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, out), (by_variable, by_input) = value(variables, *_arrays((x, state)))
    for got, expected in zip(out, want, strict=True):
        _close(got, expected.detach())
    x.requires_grad_()
    loss = _loss(net(x, state))
    (of_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    _close(by_input, of_x)
    for name, g in _gradients(net, loss).items():
        _close(by_variable["params"][name], g)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_and_second_order(kind: str) -> None:
    module, x, _ = _made(kind, {"bidirectional": True})
    f = torch2jax(lambda x: module(x)[0].sin().sum(), lower=True)
    a, v = _arrays((x, torch.randn_like(x)))

    def plain(x: Any) -> Any:
        return module(x)[0].sin().sum()

    back = torch.func.grad(plain)
    _close(jax.jvp(f, (a,), (v,))[1], (back(x) * torch.from_numpy(np.array(v))).sum().detach())

    x.requires_grad_()
    (g,) = torch.autograd.grad(plain(x), x, create_graph=True)
    (second,) = torch.autograd.grad((g * torch.from_numpy(np.array(v))).sum(), x)
    _close(jax.jvp(jax.grad(f), (a,), (v,))[1], second)
    _close(jax.vjp(jax.grad(f), a)[1](v)[0], second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_derivative_inside_of_the_function(kind: str) -> None:
    module, x, _ = _made(kind, {"num_layers": 2})

    def penalty(x: Any) -> Any:
        x = x * 1
        if not x.requires_grad:
            x.requires_grad_()
        (g,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        return (g**2).sum()

    want = penalty(x)
    _close(jax.jit(torch2jax(penalty, lower=True))(_arrays(x)), want.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_one_scan_however_many_steps(kind: str) -> None:
    module = KINDS[kind](4, 6, num_layers=2, bidirectional=True)
    f = torch2jax(lambda x: module(x)[0], lower=True)

    def program(steps: int) -> Any:
        return jax.make_jaxpr(lambda x: f(x))(jnp.ones((steps, 2, 4))).jaxpr

    def names(jaxpr: Any) -> list[str]:
        found = []
        for eqn in jaxpr.eqns:
            inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
            found.append(str(eqn.primitive))
            if str(eqn.primitive) != "scan":
                for p in inner:
                    found += names(getattr(p, "jaxpr", p))
        return found

    short, long = names(program(16)), names(program(1024))
    assert short == long
    assert short.count("scan") == 4


def test_dropout_between_layers() -> None:
    module = torch.nn.LSTM(4, 6, num_layers=2, dropout=0.5)
    x = jnp.ones((3, 2, 4))
    f = torch2jax(lambda x: module(x)[0], lower=True, stochastic=True)
    one, same, other = (f(x, rng=jax.random.key(k)) for k in (0, 0, 1))
    _close(one, same)
    assert not np.allclose(one, other)
    sure = torch.nn.LSTM(4, 6, num_layers=2, dropout=1.0)
    alone = torch.nn.LSTM(6, 6)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(alone, f"{name}_l0").data = getattr(sure, f"{name}_l1").data
    f = torch2jax(lambda x: sure(x)[0], lower=True, stochastic=True)
    _close(f(x, rng=jax.random.key(0)), alone(torch.zeros(3, 2, 6))[0].detach())
    module.eval()
    _close(
        torch2jax(lambda x: module(x)[0], lower=True)(x), module(torch.ones(3, 2, 4))[0].detach()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    module, x, _ = _made(kind, {"num_layers": 2})
    want = module(x)[0].detach()
    half = module.to(dtype)
    out = torch2jax(lambda x: half(x.to(dtype))[0], lower=True)(_arrays(x))
    assert out.dtype == {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}[dtype]
    _close(out.astype(jnp.float32), want, 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    """As the unrolled form, whose parts PyTorch's autocast casts one by one."""
    module, x, _ = _made(kind, {"num_layers": 2})
    want = module(x)[0].detach()

    def run(x: Any) -> Any:
        with torch.autocast("jax", torch.bfloat16):
            return module(x)[0]

    unrolled = module.to("jax")
    with torch.no_grad():
        eager = run(x.to("jax"))
    del unrolled
    out = torch2jax(run, lower=True)(_arrays(x))
    assert out.dtype == eager.jax().dtype
    _close(out.astype(jnp.float32), want, 0.03)


def test_without_gradients_there_are_none() -> None:
    module = torch.nn.GRU(4, 6)

    def run(x: Any) -> Any:
        with torch.no_grad():
            return module(x)[0].sum()

    assert not np.any(jax.grad(torch2jax(run, lower=True))(jnp.ones((3, 2, 4))))


def test_cells_in_a_loop_and_what_the_report_says() -> None:
    cell = torch.nn.GRUCell(4, 6)
    x = torch.randn(3, 2, 4)

    def run(x: Any) -> Any:
        h = x.new_zeros(2, 6)
        for row in x:
            h = cell(row, h)
        return h

    _close(torch2jax(run, lower=True)(_arrays(x)), run(x).detach())
    assert "aten.gru.input" in str(lowering_report(torch.nn.GRU(4, 6), jnp.ones((3, 2, 4))))


def test_batches_of_jax() -> None:
    module = torch.nn.LSTM(4, 6)
    x = torch.randn(7, 3, 2, 4)
    f = torch2jax(lambda x: module(x)[0], lower=True)
    want = torch.stack([module(row)[0] for row in x])
    _close(jax.vmap(f)(_arrays(x)), want.detach())
