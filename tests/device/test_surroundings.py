"""What ``device.jit`` looks at beside arguments, and what it puts there: as the same eager calls."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torch2jax import Torch2JaxWarning, device

device.enable()
J = "jax"


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=2e-5, atol=2e-5)


class Net(nn.Module):
    """Reads all kinds of state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.0)
        self.more = nn.ModuleList([nn.Tanh()])
        self.register_buffer("shift", torch.zeros(3))
        self.factor, self.mode, self.powers = 2.0, "sin", [1]
        self.table = {"a": 1.0}
        self.config = types.SimpleNamespace(scale=1.0)
        self.plain = torch.ones(3, device=J)
        self.constant = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.layer(x))) * self.factor * self.plain + self.shift
        x = torch.sin(x) if self.mode == "sin" else torch.cos(x)
        for m in self.more:
            x = m(x)
        for power in self.powers:
            x = x + x**power
        return x * self.table["a"] * self.config.scale + self.constant.to(J)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def _set(**values: Any) -> Any:
    return lambda net: vars(net).update(values)


def _hook(net: Any) -> None:
    net.layer.register_forward_hook(lambda m, i, o: o * 3)


def _full(net: Any) -> None:
    net.drop.p = 1.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "eval": lambda net: net.eval(),
    "eval of a part": lambda net: net.norm.eval(),
    "p": _full,
    "hook": _hook,
    "pre-hook": lambda net: net.drop.register_forward_pre_hook(lambda m, i: (i[0] * 3,)),
    "number": _set(factor=3.0),
    "integer": _set(factor=2),
    "string": _set(mode="cos"),
    "list": lambda net: net.powers.append(2),
    "dict": lambda net: net.table.update(a=2.0),
    "object": lambda net: setattr(net.config, "scale", 2.0),
    "module": lambda net: net.more.append(nn.ReLU()),
    "other module": lambda net: setattr(net, "drop", nn.ReLU()),
    "parameter": lambda net: setattr(net.layer, "bias", nn.Parameter(torch.ones(3, device=J))),
    "no parameter": lambda net: setattr(net.layer, "bias", None),
    "buffer": lambda net: setattr(net, "shift", torch.ones(3, device=J)),
    "attribute": _set(plain=torch.full((3,), 5.0, device=J)),
    "its shape": _set(plain=torch.full((1,), 5.0, device=J)),
    "its dtype": _set(plain=torch.full((3,), 5, device=J)),
    "data": lambda net: setattr(net.layer.weight, "data", torch.ones(3, 3, device=J)),
    "written": lambda net: net.plain.fill_(7.0),
    "constant": _set(constant=torch.full((3,), 5.0)),
    "written constant": lambda net: net.constant.fill_(7.0),
    "frozen": lambda net: net.layer.weight.requires_grad_(False),
    "weight norm": lambda net: parametrizations.weight_norm(net.layer),
    "parametrization": lambda net: parametrize.register_parametrization(
        net.layer, "weight", nn.Tanh()
    ),
}

WAYS: dict[str, Callable[[Any], Any]] = {
    "module": lambda net: net,
    "closure": lambda net: lambda x: net(x),
    "forward": lambda net: net.forward,
    "method": lambda net: net.helper,
    "partial": lambda net: functools.partial(Net.forward, net),
    "container": lambda net: functools.partial(lambda nets, x: nets["n"][0](x), {"n": [net]}),
    "default": lambda net: functools.partial(lambda x, net=net: net(x)),
}


def _follow(compiled: Any, plain: Any, x: Any) -> None:
    for _ in range(3):
        same(compiled(x), plain(x))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls(change: str) -> None:
    torch.manual_seed(0)
    here = Net().to(J)
    there = copy.deepcopy(here)
    x = torch.randn(4, 3).to(J)
    compiled = device.jit(lambda x: here(x))
    _follow(compiled, there, x)
    for net in (here, there):
        CHANGES[change](net)
    _follow(compiled, there, x)
    here.zero_grad()
    there.zero_grad()
    compiled(x).sum().backward()
    there(x).sum().backward()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            same(p.grad, q.grad)


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_reached_and_back_again(way: str) -> None:
    torch.manual_seed(0)
    here = Net().to(J)
    there = copy.deepcopy(here)
    x = torch.randn(4, 3).to(J)
    compiled = device.jit(WAYS[way](here))
    for training in (True, False, True, False):
        for net in (here, there):
            net.train(training)
            net.factor += 1
        _follow(compiled, there, x)


SCALE = 1.0


def test_globals_and_variables_of_outer_functions() -> None:
    global SCALE
    scale = 1.0

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * SCALE * scale

    x = torch.ones(3, device=J)
    compiled = device.jit(f)
    for i in range(1, 4):
        SCALE, scale = float(i), i * 10.0
        _follow(compiled, f, x)


class Trainer:
    """Counts outside of what is compiled, and its optimizer's rate changes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1).to(J)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.seen, self.losses = 0, []
        self.weight = 1.0
        self.kept: Any = None

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).square().mean() * self.weight


def test_an_object_that_does_more() -> None:
    here, there = Trainer(), Trainer()
    x = torch.randn(4, 3).to(J)
    step = device.jit(here.step)
    for i in range(9):
        same(step(x), there.step(x))
        here.seen += 1
        here.losses.append(float(i))
        if i == 5:
            for t in (here, there):
                t.weight = 2.0
                t.optimizer.param_groups[0]["lr"] = 0.01
    for p, q in zip(here.model.parameters(), there.model.parameters(), strict=True):
        same(p, q)


def test_the_first_state_is_compiled_once() -> None:
    net, traces = Net().to(J), []
    x = torch.randn(4, 3).to(J)

    def f(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            print("trace")
        return net(x)

    compiled = device.jit(f)

    def count(calls: int) -> int:
        import contextlib
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            for _ in range(calls):
                compiled(x)
        traces.append(out.getvalue().count("trace"))
        return traces[-1]

    assert count(4) > 0
    net.eval()
    assert count(4) > 0
    net.train()
    assert count(4) == 0
    net.eval()
    assert count(4) == 0
    net.plain = net.plain * 2  # another tensor of the same kind
    assert count(4) == 0


def test_numbers_that_each_call_changes_are_named() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * 2

    net = Counts()
    f, x = device.jit(net), torch.ones(3, device=J)
    f(x)
    f(x)
    with pytest.warns(Torch2JaxWarning, match="calls"):
        f(x)
    for _ in range(3):
        same(f(x), x * 2)


# --- what the function puts there


class Keeps(nn.Module):
    """A base of modules that keep something of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.e = torch.zeros(3, device=J)
        self.register_buffer("k", torch.zeros(1, 3, device=J))
        self.past: Any = None
        self.cache: dict[str, Any] = {}
        self.rows: list[Any] = [torch.zeros(3, device=J)]
        self.w = nn.Parameter(torch.ones(3, device=J))

    def kept(self) -> list[Any]:
        past = self.past if isinstance(self.past, tuple) else [self.past]
        found = [self.e, self.k, *past, *self.cache.values(), *self.rows, self.w]
        return [t for t in found if t is not None]


class Average(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.e = 0.9 * self.e + x
        return self.e * 2


class Result(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.e = self.e + x
        return self.e


class Argument(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        old, self.e = self.e, x
        return x - old


class Swap(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(self.rows.pop(0) + 1)
        self.e, self.k = self.k[0], self.e[None] + x
        return self.e + x


class Grows(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.k = torch.cat([self.k, x[None]])
        return self.k.sum(0)


class Window(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.k = torch.cat([self.k, x[None]])[-3:]
        return self.k.sum(0)


class Past(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, n = self.past if self.past is not None else (x * 0, x.sum() * 0)
        self.past = h + x, n + 1
        return self.past[0] / self.past[1]


class Cached(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "k" not in self.cache:
            self.cache["k"] = x * 2
        self.cache["v"] = self.cache["k"] + x
        return self.cache["v"]


class Rows(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows[0] = self.rows[-1] + x
        self.rows[-1] = self.rows[0] * 0.5
        return sum(self.rows)  # type: ignore[return-value]


class Data(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.w.data = self.w.data * 0.5 + x
        return self.w * x


class Deletes(Keeps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "once"):
            del self.once
            return x
        self.once = x * 3
        return self.once


KEEPS = [Average, Result, Argument, Swap, Grows, Window, Past, Cached, Rows, Data, Deletes]


def _no_tracers(module: Keeps) -> None:
    for t in module.kept():
        assert isinstance(t.jax(), __import__("jax").Array)
        assert t.cpu() is not None


@pytest.mark.parametrize("way", ["module", "closure"])
@pytest.mark.parametrize("kind", KEEPS)
def test_what_is_kept(kind: Any, way: str) -> None:
    here, there = kind(), kind()
    compiled = device.jit(here if way == "module" else lambda x: here(x))
    held = []
    for i in range(7):
        x = torch.full((3,), float(i), device=J)
        same(compiled(x), there(x))
        held.append((here.e, here.e.clone()))
        for a, b in zip(here.kept(), there.kept(), strict=True):
            same(a, b)
    for tensor, value in held if kind is not Swap else ():
        same(tensor, value)  # a tensor that somebody holds stays as it is


@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("kind", KEEPS)
def test_an_exception_half_way(kind: Any, when: int) -> None:
    """In the trace nothing stays; where it runs step by step what eager mode leaves."""
    here, there = kind(), kind()
    fails = [False]

    def with_failure(m: Any) -> Any:
        def f(x: torch.Tensor) -> torch.Tensor:
            y = m(x)
            if fails[0]:
                raise KeyError("half-way")
            return y

        return f

    compiled, plain = device.jit(with_failure(here)), with_failure(there)
    x = torch.ones(3, device=J)
    for _ in range(when):
        compiled(x)
        plain(x)
    fails[0] = True
    with pytest.raises(KeyError):
        compiled(x)
    _no_tracers(here)
    fails[0] = False
    for name in ("e", "past", "cache", "rows"):
        setattr(there, name, copy.deepcopy(getattr(here, name)))
    there.k, there.w.data = here.k.clone(), here.w.data.clone()
    if hasattr(here, "once"):
        there.once = here.once
    elif hasattr(there, "once"):
        del there.once
    for _ in range(3):
        same(compiled(x), plain(x))
        for a, b in zip(here.kept(), there.kept(), strict=True):
            same(a, b)


def test_a_loss_that_a_layer_keeps_has_gradients() -> None:
    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.extra: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            self.extra = y.square().mean()
            return y

    torch.manual_seed(0)
    here = Balanced().to(J)
    there = copy.deepcopy(here)
    compiled, x = device.jit(here), torch.randn(4, 3).to(J)
    for _ in range(3):
        here.zero_grad()
        there.zero_grad()
        (compiled(x).sum() + here.extra).backward()
        (there(x).sum() + there.extra).backward()
        same(here.layer.weight.grad, there.layer.weight.grad)


def test_variables_of_outer_functions_and_objects() -> None:
    state = torch.zeros(3, device=J)
    thing = Trainer()

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal state
        state = state + x
        thing.kept = state * 2
        return state

    compiled, x = device.jit(f), torch.ones(3, device=J)
    for i in range(1, 5):
        same(compiled(x), x * i)
        same(state, x * i)
        same(thing.kept, x * 2 * i)


def test_results_that_depend_on_shapes() -> None:
    f = device.jit(lambda x: (x * 2, x.shape[0]))
    for n in (2, 3, 2, 3, 2, 3):
        y, size = f(torch.ones(n, device=J))
        assert (size, tuple(y.shape)) == (n, (n,))


def test_a_compiled_function_inside_of_another_one() -> None:
    net = Average()
    inner = device.jit(net)
    outer = device.jit(lambda x: inner(x) + 1)
    there, x = Average(), torch.ones(3, device=J)
    for _ in range(4):
        same(outer(x), there(x) + 1)
        same(inner(x), there(x))
        same(net.e, there.e)


def test_tensors_that_are_gone_are_not_kept() -> None:
    import gc
    import weakref

    net = Average()
    compiled, x = device.jit(net), torch.ones(3, device=J)
    for _ in range(3):
        compiled(x)
    memory = weakref.ref(net.e._cell)  # type: ignore[attr-defined]
    net.e = torch.zeros(2, 3, device=J)
    compiled(x)
    gc.collect()
    assert memory() is None


def _refuses(*_: Any) -> Any:
    raise NotImplementedError("this class means something else by it")


METHODS = ("__len__", "__iter__", "__bool__", "items", "values", "keys")
OWN: dict[str, Callable[[], Any]] = {
    kind.__name__: lambda kind=kind: type("Own", (kind,), dict.fromkeys(METHODS, _refuses))(
        [("a", 1.0)]
    )
    for kind in (tuple, list, dict, set, frozenset, deque)
}


@pytest.mark.parametrize("kind", list(OWN))
def test_containers_with_methods_of_their_own(kind: str) -> None:
    """As e3nn's irreps, which are tuples without a length."""
    net = nn.Tanh()
    net.own = OWN[kind]()
    compiled = device.jit(lambda x: net(x) * isinstance(net.own, object))
    x = torch.linspace(-1, 1, 3)
    for _ in range(3):
        same(compiled(x.to(J)), x.tanh())


def test_an_item_of_a_list_with_methods_of_its_own() -> None:
    own: Any = type("Own", (list,), {"__len__": _refuses, "__iter__": _refuses})([2.0])
    compiled, x = device.jit(lambda x: x * own[0]), torch.ones(3)
    for _ in range(3):
        same(compiled(x.to(J)), x * 2)
    own[0] = 3.0
    for _ in range(3):
        same(compiled(x.to(J)), x * 3)


def test_results_require_gradients_as_in_eager_mode() -> None:
    """The loss has a graph, its gradients have none; a copy of the loss has none either."""
    layer = nn.Linear(3, 2).to(J)

    def step(x: torch.Tensor) -> Any:
        x = x.detach().requires_grad_()
        out = layer(x)
        (slope,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        return {"out": out, "slope": slope, "copy": out.detach(), "x": x * 2}

    compiled, x = device.jit(step), torch.ones(4, 3, device=J)
    want = step(x)
    for _ in range(3):
        layer.zero_grad()
        got = compiled(x)
        flags = {k: y.requires_grad for k, y in got.items()}
        assert flags == {k: y.requires_grad for k, y in want.items()}
        for k, y in got.items():
            same(y, want[k])
        got["out"].sum().backward()
        same(layer.bias.grad, torch.full((2,), 4.0))
