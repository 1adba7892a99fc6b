"""Modules that ask for values go through the bridge under ``lower=True``, the innermost alone.

Values and all gradients are PyTorch's, for the kinds of modules that ask: experts that are chosen
by ``nonzero``, masks as indices, ``torch.equal``, loops until convergence. What such a module does
beside its result (buffers, attributes, random numbers) is seen by the rest of the function.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.core import Tracer
from torch import nn

from torch2jax import (
    SignatureError,
    Torch2JaxError,
    TorchCallError,
    device,
    from_module,
    lowering_report,
    torch2jax,
)
from torch2jax.device.tensors.tensor import Tensor


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(actual: Any, expected: torch.Tensor, where: str = "") -> None:
    np.testing.assert_allclose(
        np.asarray(actual), expected.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=where
    )


class Experts(nn.Module):
    """Each row goes to the experts that its gate chooses."""

    def __init__(self, size: int = 4, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(size, count)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, k = (chosen == i).nonzero(as_tuple=True)
            out.index_add_(0, rows, weights[rows, k, None] * expert(x[rows]))
        return out


class Coupling(nn.Module):
    """A layer of a flow changes one half of the columns by the other half."""

    mask: torch.Tensor

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.net = nn.Linear(size // 2, size)
        self.register_buffer("mask", torch.arange(size) % 2 == 0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale = self.net(x[:, self.mask]).tanh().chunk(2, -1)
        out = x.clone()
        out[:, ~self.mask] = x[:, ~self.mask] * scale.exp() + shift
        return out, scale.sum(-1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Coupling(), Coupling()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0])
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return total - (x * x).sum(-1)


class Kernel(nn.Module):
    """A kernel of a Gaussian process looks whether both sides are the same points."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, a: torch.Tensor, b: torch.Tensor, diag: bool = False) -> torch.Tensor:
        if torch.equal(a, b):
            square = (a[:, None] - a[None]).pow(2).sum(-1)
            square = square - torch.diag_embed(square.diagonal())
        else:
            square = (a[:, None] - b[None]).pow(2).sum(-1)
        k = torch.exp(-square / (2 * self.log_scale.exp()))
        return k.diagonal() if diag else k


class Process(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kernel = nn.Linear(4, 3), Kernel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.inner(x)
        k = self.kernel(z, z * 1.0) + self.kernel(z[:2], z[2:4]).sum()
        return torch.linalg.cholesky(k + torch.eye(len(x)))


class Sinkhorn(nn.Module):
    """It balances the rows and columns of a plan until the marginals are met."""

    def __init__(self, tolerance: float = 1e-4) -> None:
        super().__init__()
        self.tolerance, self.sharpness = tolerance, nn.Parameter(torch.tensor(1.5))

    def forward(self, cost: torch.Tensor) -> torch.Tensor:
        log_plan = -cost * self.sharpness
        error = torch.ones(())
        while error > self.tolerance:
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
            error = (log_plan.logsumexp(1).exp() - 1).abs().max()
        return log_plan.exp()


class Transport(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.plan = nn.Linear(4, 4), Sinkhorn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cost = torch.cdist(self.inner(x), x + 0.1)
        return (self.plan(cost) * cost).sum(-1)


PROGRAMS: list[tuple[Callable[[], nn.Module], dict[str, str], int]] = [
    (
        lambda: nn.Sequential(nn.Linear(4, 4), Experts(), nn.Tanh(), Experts()),
        {"1 (Experts)": "nonzero", "3 (Experts)": "nonzero"},
        2,
    ),
    (Flow, {"layers.0 (Coupling)": "mask", "layers.1 (Coupling)": "mask"}, 2),
    (Process, {"kernel (Kernel)": "torch.equal"}, 2),
    (Transport, {"plan (Sinkhorn)": "item()"}, 1),
]


@pytest.mark.parametrize(("make", "bridged", "calls"), PROGRAMS)
@pytest.mark.parametrize("jit", [False, True])
def test_values_and_all_gradients(
    make: Callable[[], nn.Module], bridged: dict[str, str], calls: int, jit: bool
) -> None:
    model, x = make(), torch.randn(5, 4)
    expected = agreement(model, jit, x)
    assert expected.requires_grad
    apply, variables = from_module(model, lower=True)
    report = lowering_report(apply, variables, jnp.asarray(x.numpy()))
    assert {name for name, *_ in report.modules} == set(bridged)
    for name, question, line in report.modules:
        assert bridged[name] in question
        assert line.startswith(__file__)
    assert sum(report.modules.values()) == calls
    assert report.native  # the rest is lowered
    assert f"modules through the bridge: {calls}" in str(report)


def agreement(model: nn.Module, jit: bool, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Compare value and gradients of parameters and arguments with PyTorch's."""
    twin = copy.deepcopy(model)
    given = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    expected = twin(*given, **kwargs)
    weights = torch.linspace(0.5, 1.5, expected.numel()).reshape(expected.shape)
    (expected * weights).sum().backward()

    apply, variables = from_module(model, lower=True)

    def loss(params: Any, *xs: Any) -> Any:
        out = apply({**variables, "params": params}, *xs, **kwargs)
        return (out * weights.numpy()).sum(), out

    wanted = (0, *[i + 1 for i, a in enumerate(args) if a.is_floating_point()])
    step: Any = jax.value_and_grad(loss, wanted, has_aux=True)
    step = jax.jit(step) if jit else step
    (_, out), (params, *grads) = step(variables["params"], *[jnp.asarray(a.numpy()) for a in args])
    close(out, expected)
    for name, p in twin.named_parameters():
        assert p.grad is not None, name
        close(params[name], p.grad, name)
    for g, a in zip(grads, [a for a in given if a.requires_grad], strict=True):
        assert a.grad is not None
        close(g, a.grad)
    return expected


# --- what is refused, and which module is chosen -------------------------------------------------


def test_strict_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Experts())
    apply, variables = from_module(model, lower="strict")
    with pytest.raises(Torch2JaxError, match="the shape of the result of nonzero"):
        apply(variables, jnp.ones((5, 4)))
    with pytest.raises(Torch2JaxError, match="the shape of the result of nonzero"):
        lowering_report(apply, variables, jnp.ones((5, 4)))

    def histogram(x: torch.Tensor) -> torch.Tensor:
        return torch.histogram(x, 3, range=(0.0, 1.0))[0]

    assert lowering_report(histogram, jnp.ones(3)).bridge
    with pytest.raises(Torch2JaxError, match=r'histogram.* has no lowering, and lower="strict"'):
        torch2jax(histogram, lower="strict")(jnp.ones(3))
    with pytest.raises(SignatureError, match="lower='always'"):
        torch2jax(torch.sin, lower="always")  # type: ignore[arg-type]


def test_a_function_that_asks_itself_raises() -> None:
    """There is no module to choose: the whole function on the bridge is torch2jax without lower."""
    linear = nn.Linear(4, 4)
    f = torch2jax(lambda x: linear(x)[x.sum(-1) > 0], lower=True)
    with pytest.raises(Torch2JaxError, match="an index that is a mask"):
        f(jnp.ones((3, 4)))
    g = torch2jax(lambda x: linear(x) if x.sum() > 0 else x, lower=True)
    with pytest.raises(Torch2JaxError, match=r"item\(\) asks for the values"):
        g(jnp.ones((3, 4)))


class Rows(nn.Module):
    """The size of its result depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(-1) > 0]


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(4, 4), Rows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rows(x)).sum(0)


def test_the_module_around_takes_the_place_of_one_without_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Mean(), nn.Tanh(), Mean2d())
    x = torch.randn(5, 4)
    agreement(model, True, x)
    apply, variables = from_module(model, lower=True)
    report = lowering_report(apply, variables, jnp.asarray(x.numpy()))
    assert {name: q for name, q, _ in report.modules} == {
        "1 (Mean)": "an index that is a mask",
        "3.mean (Mean)": "an index that is a mask",
    }


class Mean2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = Mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mean(x[None].expand(3, -1)) + x.exp()


def test_where_no_module_has_shapes_the_error_says_why() -> None:
    f = torch2jax(nn.Sequential(nn.Linear(4, 4), Rows()), lower=True)
    with pytest.raises(Torch2JaxError, match="an index that is a mask") as caught:
        f(jnp.ones((3, 4)))
    text = str(caught.value)
    assert "1 (Rows) cannot go through the bridge: the shape of Rows's result depends" in text
    assert "\nSequential cannot go through the bridge: the shape of" in text


class Checked(nn.Module):
    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises:
            raise ValueError("it is configured to raise")
        if (x < 0).any():
            raise ValueError("negative")
        return x.sqrt()


def test_errors_of_the_user_stay_errors() -> None:
    with pytest.raises(ValueError, match="configured"):
        torch2jax(nn.Sequential(Checked(True)), lower=True)(jnp.ones(3))
    f = torch2jax(nn.Sequential(nn.Tanh(), Checked(False)), lower=True)
    np.testing.assert_allclose(f(jnp.full(3, 0.5)), np.sqrt(np.tanh(np.full(3, 0.5))), rtol=1e-6)
    with pytest.raises(TorchCallError, match="negative") as caught:
        f(jnp.full(3, -0.5))
    assert isinstance(caught.value.__cause__, ValueError)


class AlwaysRaises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        raise ValueError("not negative")


def test_an_error_in_every_branch_is_the_cause() -> None:
    with pytest.raises(Torch2JaxError, match="negative") as caught:
        torch2jax(nn.Sequential(AlwaysRaises()), lower=True)(jnp.ones(3))
    causes, error = [], caught.value.__cause__
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert ValueError in causes


# --- shapes, recursion, arguments ----------------------------------------------------------------


def test_one_module_with_several_shapes() -> None:
    experts = Experts()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.experts(x), self.experts(x[:2])])

    model = Twice()
    agreement(model, True, torch.randn(5, 4))
    apply, variables = from_module(model, lower=True)
    for n in (3, 6):  # other shapes of the arguments too
        x = torch.randn(n, 4)
        close(apply(variables, jnp.asarray(x.numpy())), model(x))


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        y = self.linear(x)
        if depth:
            return self(y, depth=depth - 1) + 1
        return y.index_fill(0, (y.sum(-1) > 0).nonzero()[:, 0], 0.5)


def test_recursion() -> None:
    model = nn.Sequential(Recursive())
    agreement(model, True, torch.randn(5, 4))


@dataclasses.dataclass
class Output:
    value: torch.Tensor
    parts: dict[str, Any]
    name: str


class Structured(nn.Module):
    def forward(
        self, xs: dict[str, torch.Tensor], *, scale: float, mode: str, mask: Any = None
    ) -> Output:
        x, i = xs["x"], xs["i"]
        rows = (i > 1).nonzero()[:, 0]
        y = x.index_fill(0, rows, scale)
        assert mask is None
        return Output(y, {"rows": (i, [y.sum()]), "none": None}, mode)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Structured()

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        out = self.inner({"x": x, "i": i}, scale=0.25, mode="fill")
        assert out.name == "fill"
        assert out.parts["none"] is None
        again, (total,) = out.parts["rows"]
        assert again.dtype is torch.int64
        return out.value * total + again[:, None]


def test_trees_dataclasses_and_arguments_that_are_no_tensors() -> None:
    agreement(Outer(), True, torch.randn(4, 3), torch.tensor([0, 2, 1, 3]))


class Changes(nn.Module):
    """It writes to its argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[(x > 0).nonzero(as_tuple=True)] = 0.5
        return x * 2


class SeesChanges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.changes = Changes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        return self.changes(y) + y


def test_what_it_writes_to_an_argument_comes_back() -> None:
    agreement(SeesChanges(), True, torch.randn(4, 3))


class Appends(nn.Module):
    def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        seen.append(x.index_fill(0, (x.sum(-1) > 0).nonzero()[:, 0], 1.0))
        return x + 1


class SeesList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.appends = Appends()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        y = self.appends(x, seen)
        return y * seen[0]


def test_where_it_changes_a_list_the_module_around_is_called() -> None:
    model = nn.Sequential(nn.Linear(3, 3), SeesList())
    x = torch.randn(4, 3)
    agreement(model, True, x)
    report = lowering_report(torch2jax(model, lower=True), jnp.asarray(x.numpy()))
    assert [name for name, *_ in report.modules] == ["1 (SeesList)"]


# --- what a module holds and sets ----------------------------------------------------------------


def test_tied_parameters_get_one_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Experts(4, 2), nn.Linear(4, 4))
    model[1].experts[1].weight = model[0].weight  # type: ignore[index,union-attr]
    model[2].weight = model[0].weight
    agreement(model, True, torch.randn(5, 4))


class Normalised(nn.Module):
    """It has statistics that move, and drops values."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.drop = nn.Dropout(p)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = (x.sum(-1) > 0).nonzero()[:, 0]
        self.seen = self.seen + rows.numel()
        return self.drop(self.frozen(self.norm(x)).index_fill(0, rows, 0.1))


def test_buffers_that_it_changes_are_new_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Normalised(0.0))
    twin, x = copy.deepcopy(model), torch.randn(6, 4)
    apply, variables = from_module(model, lower=True)
    for _ in range(2):
        out, buffers = apply(variables, jnp.asarray(x.numpy()), train=True)
        close(out, twin(x))
        for name, b in twin.named_buffers():
            close(buffers[name], b, name)
        variables = {**variables, "buffers": buffers}
    assert float(variables["buffers"]["1.seen"]) > 0
    assert int(variables["buffers"]["1.norm.num_batches_tracked"]) == 2


def test_parts_of_it_may_be_in_eval_mode() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Normalised(0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner.frozen.eval()
            return self.inner(x)

    model, x = Half(), torch.randn(6, 4)
    twin = copy.deepcopy(model).train()
    expected = twin(x)
    apply, variables = from_module(model, lower=True)
    out, buffers = apply(variables, jnp.asarray(x.numpy()), train=True)
    close(out, expected)
    close(buffers["inner.frozen.running_mean"], torch.zeros(4))
    close(buffers["inner.norm.running_mean"], twin.inner.norm.running_mean)  # type: ignore[arg-type]


def test_random_numbers_come_from_the_key() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Normalised(0.5))
    apply, variables = from_module(model, lower=True)
    x, key = jnp.ones((64, 4)), jax.random.key(1)

    def run(key: Any) -> Any:
        return apply(variables, x + jnp.arange(64.0)[:, None], train=True, rng=key)[0]

    one = np.asarray(run(key))
    compiled = np.asarray(jax.jit(run)(key))
    np.testing.assert_array_equal(one == 0, compiled == 0)
    np.testing.assert_allclose(one, compiled, rtol=1e-5, atol=1e-5)  # XLA rounds it otherwise
    assert (one != np.asarray(run(jax.random.key(2)))).any()
    assert 0.3 < (one == 0).mean() < 0.7
    before = torch.get_rng_state()
    with pytest.raises(SignatureError, match="without a key"):
        apply(variables, x, train=True)
    assert torch.equal(before, torch.get_rng_state())
    # The same mask is used in the backward pass.
    grad = jax.grad(lambda w: (apply(
        {**variables, "params": {**variables["params"], "1.frozen.bias": w}},
        x, train=True, rng=key)[0]).sum())(variables["params"]["1.frozen.bias"])  # fmt: skip
    kept = np.asarray(apply(variables, x, train=True, rng=key)[0] != 0)
    filled = np.asarray((x @ variables["params"]["0.weight"].T).sum(-1) > 1e9)
    assert not filled.any()
    assert np.all(np.asarray(grad) <= 2 * kept.sum(0) + 1e-3)


class Losses(nn.Module):
    """A mixture keeps its balance loss as an attribute, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.loss, self.calls = Experts(), None, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = self.experts.gate(x).softmax(-1)
        self.loss = probs.mean(0).square().sum()  # type: ignore[assignment]
        self.calls += 1
        if probs.max() > 2:
            return x
        return self.experts(x)


class UsesLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Losses()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        assert self.inner.calls == 1
        return out + self.inner.loss


def test_attributes_that_it_sets_are_seen_outside() -> None:
    agreement(UsesLosses(), True, torch.randn(5, 4))


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(0, (x.sum(-1) > 0).nonzero()[:, 0], 0.5) * self.scale


class Sets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.linear = Reads(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reads.scale = self.linear(x).mean()  # a traced tensor in an attribute
        return self.reads(x)


class Table(nn.Module):
    """It holds tensors that are no variables."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(1.0, 5.0), persistent=False)
        self.table = torch.linspace(0, 1, 4)
        self.parts = [torch.tensor(2.0), {"a": torch.ones(4)}]

    def forward(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        assert x.shape == shape
        rows = (x.sum(-1) > 0).nonzero()[:, 0]
        parts: Any = self.parts
        return x.index_fill(0, rows, 0.5) * self.steps + self.table * parts[0] * parts[1]["a"]


class TableUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = Table(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.table(y, y.shape)


def test_tensors_that_are_no_variables() -> None:
    agreement(TableUser(), True, torch.randn(3, 4))
    model, x = TableUser(), torch.randn(3, 4)
    close(torch2jax(lambda x: model(x), lower=True)(jnp.asarray(x.numpy())), model(x))
    device.enable()
    twin = copy.deepcopy(model).to("jax")
    twin.table.table = twin.table.table.to("jax")
    twin.table.parts = [torch.tensor(2.0, device="jax"), {"a": torch.ones(4, device="jax")}]
    jitted = device.jit(twin)
    for _ in range(2):
        close(jitted(x.to("jax")).detach().jax(), model(x))


def test_attributes_that_were_set_outside_are_operands() -> None:
    agreement(Sets(), True, torch.randn(4, 3))


class Counted(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, int((x > 0).sum())


def test_a_python_result_that_follows_values_is_refused() -> None:
    class UsesCount(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counted = Counted()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, n = self.counted(x)
            return y * n

    # The count never leaves the module around it, which goes through the bridge in its place.
    agreement(UsesCount(), True, torch.randn(5))
    with pytest.raises(Torch2JaxError, match="other Python values"):
        torch2jax(Counted(), lower=True)(jnp.ones(3))


# --- hooks, functions, closures, the rest of JAX -------------------------------------------------


def test_hooks_of_the_module_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Experts())
    model[1].register_forward_hook(lambda module, args, out: out * 2 + args[0])
    model[1].experts[0].register_forward_pre_hook(  # type: ignore[index,union-attr]
        lambda module, args: (args[0] * 3,)
    )
    agreement(model, True, torch.randn(5, 4))


def test_a_module_that_a_function_closes_over_is_a_constant() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Experts())
    model[1].calls = 0  # type: ignore[assignment]
    attributes = dict(vars(model[1]))
    f = torch2jax(lambda x: model(x) * 2, lower=True)
    x = torch.randn(5, 4, requires_grad=True)
    expected = model(x) * 2
    expected.square().sum().backward()
    y = jnp.asarray(x.detach().numpy())
    close(f(y), expected)
    assert x.grad is not None
    close(jax.grad(lambda y: (f(y) ** 2).sum())(y), x.grad)
    assert vars(model[1]) == attributes
    assert not any(type(p) is Tensor for p in model.parameters())


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attempts, self.last, self.inner = 0, None, Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.attempts += 1
        self.last = x * 2  # type: ignore[assignment]
        return self.inner(x)


def test_a_trace_that_failed_leaves_nothing() -> None:
    model = Keeps()
    f = torch2jax(lambda x: model(x), lower=True)
    x = torch.randn(5, 4)
    close(f(jnp.asarray(x.numpy())), model(x))
    model.attempts = 0
    f = torch2jax(lambda x: model(x) + 0, lower=True)
    f(jnp.asarray(x.numpy()))
    assert model.attempts == 1  # as after one trace without questions
    assert model.last is None or type(model.last) is torch.Tensor
    gc.collect()
    traced = [
        t for t in gc.get_objects() if type(t) is Tensor and isinstance(t._cell.array, Tracer)
    ]
    assert traced == []


def test_vmap_and_second_derivatives() -> None:
    model, xs = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Experts()), torch.randn(3, 5, 4)
    f = torch2jax(model, lower=True)
    ys = jnp.asarray(xs.numpy())
    close(jax.vmap(f)(ys), torch.stack([model(x) for x in xs]))
    g = jax.vmap(jax.grad(lambda y: (f(y) ** 2).sum()))(ys)
    xs.requires_grad_()
    sum(model(x).square().sum() for x in xs).backward()  # type: ignore[union-attr]
    assert xs.grad is not None
    close(g, xs.grad)
    hvp: Any = torch.autograd.functional.hvp(lambda x: model(x).square().sum(), xs[0], xs[1])[1]
    close(jax.jvp(jax.grad(lambda y: (f(y) ** 2).sum()), (ys[0],), (ys[1],))[1], hvp)


def test_a_derivative_inside_the_function() -> None:
    """PyTorch's own autograd goes through the module that is called on the bridge."""
    model = nn.Sequential(nn.Linear(4, 4), Experts())

    def force(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    x = torch.randn(5, 4)
    close(torch2jax(force, lower=True)(jnp.asarray(x.numpy())), force(x))


def test_in_a_function_that_the_device_compiles() -> None:
    device.enable()
    model = nn.Sequential(nn.Linear(4, 4), Experts(), nn.Tanh(), Normalised(0.0))
    twin, xs = copy.deepcopy(model), torch.randn(4, 5, 4)
    model.to("jax")

    def step(model: nn.Module, optimizer: Any, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    theirs = torch.optim.SGD(twin.parameters(), 0.1)
    ours = device.jit(lambda x: step(model, optimizer, x))
    for x in xs:
        close(ours(x.to("jax")).jax(), step(twin, theirs, x))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        close(p.detach().jax(), q, name)  # type: ignore[attr-defined]
    for (name, b), c in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        close(b.jax(), c[1], name)  # type: ignore[attr-defined]
    module = device.jit(model)
    for x in xs:
        y = x.to("jax").requires_grad_()
        x = x.clone().requires_grad_()
        module(y).square().sum().backward()
        twin(x).square().sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        close(y.grad.jax(), x.grad)  # type: ignore[attr-defined]


def test_in_a_function_that_torchax_compiles() -> None:
    from torch2jax import torchax

    model = nn.Sequential(nn.Linear(4, 4), Experts())
    twin, x = copy.deepcopy(model), torch.randn(5, 4)
    compiled = torchax.interop.JittableModule(model.to("jax"))
    for _ in range(2):
        close(compiled(x.to("jax")).detach().jax(), twin(x))


def test_inside_of_transforms_of_torch_the_error_says_so() -> None:
    model = Experts()

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: model(x).sum())(x)

    with pytest.raises(Torch2JaxError, match=r"nonzero(.|\n)*inside of a transform of torch\.func"):
        torch2jax(f, lower=True)(jnp.ones((5, 4)))


def test_a_lowered_function_inside_of_another_one() -> None:
    inner_model, outer_model = nn.Sequential(Experts()), nn.Sequential(nn.Linear(4, 4), Experts())
    inner = torch2jax(inner_model, lower=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        return outer_model(device.call_jax(inner, outer_model[0](x)))

    x = torch.randn(5, 4)
    expected = outer_model(inner_model(outer_model[0](x)))
    close(torch2jax(f, lower=True)(jnp.asarray(x.numpy())), expected)


def test_other_modules_of_its_class_need_no_trace_of_their_own() -> None:
    traces = 0

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal traces
            traces += 1
            return x

    model = nn.Sequential(Counts(), *[Experts() for _ in range(5)])
    x = torch.randn(5, 4)
    close(torch2jax(model, lower=True)(jnp.asarray(x.numpy())), model(x))
    assert traces == 3  # two for JAX, one by PyTorch


def test_modules_that_ask_nothing_are_lowered() -> None:
    report = lowering_report(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), jnp.ones((2, 4)))
    assert report.modules == {}
    assert "modules through" not in str(report)
