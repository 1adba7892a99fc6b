"""Device jax refuses what PyTorch refuses, by its own table of wrong calls and by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import precision
from op_samples import op_db
from torch.utils import _pytree as torch_tree

from torch2jax import device, torch2jax

device.enable()

NOT_KNOWN = {
    "gather": "an index beyond the end: a compiled program cannot raise for a value",
    "scatter": "the same",
    "scatter_add": "the same",
}
OUT = "Expected out tensor|argument 'out'|Long tensor out|single memory location"
OUT_OF_ANY = {
    *("complex", "kthvalue", "masked_select", "aminmax", "gather", "index_select", "take"),
    *("multinomial", "bernoulli", "cat"),
}
"""PyTorch's kernels for meta tensors do not look at the ``out=`` of these operators. It may overlap
an operand, and have any dtype to which the result can be cast."""


@pytest.mark.parametrize(
    "op",
    [op for op in op_db if op.error_inputs_func and not op.name.startswith("jiterator")],
    ids=lambda op: op.name,
)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_wrong_calls_of_pytorchs_table(op: Any) -> None:
    with precision(True):
        _refuses(op)


def _refuses(op: Any) -> None:
    for case in op.error_inputs("cpu"):
        sample = case.sample_input
        try:
            _call(op, sample.input, sample.args, sample.kwargs)
        except Exception as error:
            expected, kind = str(error), type(error)
        else:  # it is wrong on other devices alone
            continue
        if (op.name in OUT_OF_ANY and re.search(OUT, expected)) or (
            op.name in NOT_KNOWN and "out of bounds for dim" in expected
        ):
            continue
        moved = torch_tree.tree_map(_moved, (sample.input, sample.args, sample.kwargs))
        with pytest.raises(Exception) as here:  # noqa: PT011
            _call(op, *moved)
        assert isinstance(here.value, RuntimeError | IndexError | TypeError | kind), here.value


def _call(op: Any, x: Any, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        op.op(x, *args, **kwargs)


def _moved(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to("jax") if x.layout is torch.strided and x.device.type == "cpu" else x
    return torch.device("jax") if x == "cpu" else x


def mask(*rows: Any, on: str) -> Any:
    return torch.tensor(rows, device=on)


def filled(on: str) -> Any:
    x = torch.ones(5, 4, 3, device=on)
    x[mask(True, on=on)] = 5.0
    return x


def rows_filled(on: str) -> Any:
    x = torch.ones(3, 2, device=on)
    x[mask(True, False, on=on)] = torch.ones(1, 2, device=on)
    return x


WRONG: dict[str, Callable[[str], Any]] = {
    "a mask that is too small": filled,
    "a mask with rows": rows_filled,
    "a mask that is read": lambda on: torch.arange(5, device=on)[mask(True, False, True, on=on)],
    "a mask of another shape": lambda on: torch.ones(2, 3, device=on)[
        mask(*[[True] * 2] * 3, on=on)
    ],
    "a mask behind an index": lambda on: torch.ones(2, 3, device=on)[
        mask(0, on=on), mask(True, on=on)
    ],
    "mm of three": lambda on: torch.mm(torch.ones(2, 2, 2, device=on), torch.ones(2, 2, device=on)),
    "dot of two": lambda on: torch.dot(torch.ones(2, 2, device=on), torch.ones(2, 2, device=on)),
    "bmm": lambda on: torch.bmm(torch.ones(1, 2, 2, device=on), torch.ones(3, 2, 2, device=on)),
    "topk": lambda on: torch.topk(torch.ones(3, device=on), 4),
    "kthvalue": lambda on: torch.kthvalue(torch.ones(3, device=on), 0),
    "layer_norm": lambda on: torch.nn.functional.layer_norm(torch.ones(2, 3, device=on), (2,)),
    "reflect": lambda on: torch.nn.functional.pad(torch.ones(1, 3, device=on), (3, 3), "reflect"),
    "kernel": lambda on: torch.nn.functional.conv1d(
        torch.ones(1, 1, 2, device=on), torch.ones(1, 1, 3, device=on)
    ),
    "index_select": lambda on: torch.ones(3, device=on).index_select(0, mask([0], [1], on=on)),
    "index_fill": lambda on: torch.ones(3, device=on).index_fill(0, mask([0], [1], on=on), 1.0),
    "index_add": lambda on: torch.ones(3, 2, device=on).index_add(
        0, mask(0, 1, on=on), torch.ones(1, 2, device=on)
    ),
    "masked_scatter": lambda on: torch.ones(3, device=on).masked_scatter(
        mask(True, True, False, on=on), torch.ones(1, device=on)
    ),
    "where": lambda on: torch.where(*[torch.ones(2, device=on)] * 3),
    "clamp": lambda on: torch.ones(2, device=on).clamp(),
    "bool": lambda on: torch.ones(2, device=on).bool() - torch.ones(2, device=on).bool(),
    "inv": lambda on: torch.linalg.inv(torch.zeros(2, 2, device=on)),
    "repeat": lambda on: torch.ones(2, device=on).repeat(-1),
    "softmax": lambda on: torch.ones(3, device=on).softmax(4),
    "amax of nothing": lambda on: torch.ones(0, 3, device=on).amax(0),
    "argmax of nothing": lambda on: torch.ones(0, device=on).argmax(),
    "max of nothing": lambda on: torch.ones(0, device=on).max(),
    "indices that do not broadcast": lambda on: torch.ones(2, 2, device=on)[
        mask(0, 1, on=on), mask(0, 1, 0, on=on)
    ],
    "indices of floats": lambda on: torch.ones(2, device=on)[torch.ones(2, device=on)],
    "one_hot": lambda on: torch.nn.functional.one_hot(mask(5, on=on), 3),
    "one_hot of less": lambda on: torch.nn.functional.one_hot(mask(-1, on=on), 3),
    "as_strided": lambda on: torch.ones(2, device=on).as_strided((3,), (1,)),
    "out of mm": lambda on: torch.mm(
        *[torch.eye(2, device=on)] * 2, out=torch.eye(2, device=on, dtype=torch.float16)
    ),
    "out of svdvals": lambda on: torch.linalg.svdvals(
        torch.eye(2, device=on), out=torch.empty(2, device=on, dtype=torch.float16)
    ),
    "out of integers": lambda on: torch.add(
        *[torch.ones(2, device=on)] * 2, out=torch.ones(2, device=on, dtype=torch.int32)
    ),
    "normal of tensors": lambda on: torch.normal(*[-torch.ones(2, device=on)] * 2),
    "bernoulli": lambda on: torch.bernoulli(2 * torch.ones(2, device=on)),
    "poisson": lambda on: torch.poisson(-torch.ones(2, device=on)),
    "random_ beyond": lambda on: torch.ones(2, device=on, dtype=torch.uint8).random_(0, 1000),
    "randint beyond": lambda on: torch.randint(1000, (2,), device=on, dtype=torch.uint8),
    "in place": lambda on: torch.ones(3, device=on).add_(torch.ones(2, 3, device=on)),
    "sum": lambda on: torch.ones(3, device=on).sum(4),
    "select": lambda on: torch.ones(3, device=on)[7],
    "bernoulli_": lambda on: torch.ones(2, device=on).bernoulli_(2.0),
    "exponential_": lambda on: torch.ones(2, device=on).exponential_(-1),
    "normal_": lambda on: torch.ones(2, device=on).normal_(0, -1),
    "torch.normal": lambda on: torch.normal(0.0, -1.0, (2,), device=on),
    "uniform_": lambda on: torch.ones(2, device=on).uniform_(1, 0),
    "random_": lambda on: torch.ones(2, device=on).random_(3, 1),
    "random_ of complex": lambda on: torch.ones(2, device=on, dtype=torch.complex64).random_(),
    "randint": lambda on: torch.randint(3, 1, (2,), device=on),
    "multinomial": lambda on: torch.multinomial(torch.tensor([-1.0, 2.0], device=on), 1),
    "multinomial of zeros": lambda on: torch.multinomial(torch.zeros(2, device=on), 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_raises_the_same_error(name: str) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        WRONG[name]("cpu")
    with pytest.raises(type(expected.value)) as found:
        WRONG[name]("jax")
    assert "lazy" not in str(found.value)


def test_masks_of_the_wrong_size_under_lower() -> None:
    def read(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[m] = 5.0
        return x

    with pytest.raises(Exception, match="shape of the mask"):
        torch2jax(read, lower=True)(np.ones((5, 4), np.float32), np.array([True, False]))


def into_view(on: str, part: slice) -> torch.Tensor:
    x = torch.zeros(4, 3, device=on)
    torch.add(torch.ones(2, 3, device=on), 1, out=x[part])
    return x


SAME: dict[str, Callable[[str], Any]] = {
    "all": lambda on: torch.tensor([[True, False]], device=on).all(dim=()),
    "any": lambda on: torch.tensor([[True, False]], device=on).any(dim=()),
    "linspace": lambda on: torch.linspace(0, 1j, 3, device=on),
    "logspace": lambda on: torch.logspace(1 + 1j, 2, 3, device=on),
    "copy_": lambda on: torch.ones(3, device=on).copy_(2.5),  # pyright: ignore
    "resize_as_": lambda on: torch.ones(3, device=on).resize_as_(torch.ones(2, device=on)),
    "is_set_to": lambda on: torch.tensor(
        torch.ones(3, device=on).is_set_to(torch.ones(3, device=on))
    ),
    "set_": lambda on: torch.ones(3, device=on).set_(),
    "median": lambda on: torch.ones(0, device=on).median(),
    "median of integers": lambda on: torch.ones(0, device=on, dtype=torch.int32).median(),
    "svdvals": lambda on: torch.linalg.svdvals(
        torch.eye(2, device=on), out=torch.empty(0, device=on)
    ),
    "mode": lambda on: torch.mode(
        torch.ones(2, 2, device=on),
        out=(torch.empty(0, device=on), torch.empty(0, device=on, dtype=torch.int64)),
    )[0],
    "slogdet": lambda on: torch.slogdet(
        2 * torch.eye(2, device=on), out=(torch.empty(0, device=on), torch.empty(0, device=on))
    )[1],
    "out of a view": lambda on: into_view(on, slice(None, None, 2)),
    "out transposed": lambda on: torch.mm(
        *[torch.eye(2, device=on)] * 2, out=torch.empty(2, 2, device=on).t()
    ),
    "out of a wider dtype": lambda on: torch.add(
        *[torch.ones(2, device=on)] * 2, out=torch.empty(2, device=on, dtype=torch.complex64)
    ),
    "ones": lambda on: torch.ones(2, out=torch.empty(0, device=on)),
    "arange": lambda on: torch.arange(3, out=torch.empty(0, device=on)),
    "eye": lambda on: torch.eye(2, out=torch.empty(0, device=on)),
    "to_dlpack": lambda on: torch.from_dlpack(
        torch.utils.dlpack.to_dlpack(torch.ones(2, device=on))
    ),
    "rand of complex": lambda on: torch.rand(9, device=on, dtype=torch.complex64).imag < 1,
    "uniform_ of complex": lambda on: torch.ones(9, device=on).cfloat().uniform_().imag.sign(),
    "histogram": lambda on: torch.histogram(
        torch.ones(3, device=on), 2, out=(torch.empty(0, device=on), torch.empty(0, device=on))
    )[0],
}


@pytest.mark.parametrize("name", SAME)
def test_a_call_gives_the_same(name: str) -> None:
    expected, found = SAME[name]("cpu"), SAME[name]("jax")
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("draw", "dtype"),
    [
        (lambda out: torch.rand(3, out=out), torch.float32),
        (lambda out: torch.randn(3, out=out), torch.float64),
        (lambda out: torch.randint(5, (3,), out=out), torch.int64),
        (lambda out: torch.randint(2, 5, (3,), out=out), torch.float32),
        (lambda out: torch.randperm(3, out=out), torch.int64),
        (lambda out: torch.normal(0.0, 1.0, (3,), out=out), torch.float32),
    ],
    ids=["rand", "randn", "randint", "randint of floats", "randperm", "normal"],
)
def test_random_numbers_into_out(draw: Callable[[Any], Any], dtype: torch.dtype) -> None:
    out = torch.empty(3, device="jax", dtype=torch.float32 if dtype is torch.float64 else dtype)
    torch.manual_seed(0)
    assert draw(out) is out
    first = out.tolist()
    torch.manual_seed(0)
    assert draw(out).tolist() == first
    assert {draw(out).dtype for _ in range(3)} == {out.dtype}


def test_a_view_as_out_is_not_resized() -> None:
    """PyTorch would resize it within the memory behind it; to fill it would be wrong."""
    x = torch.zeros(5, device="jax")
    with pytest.raises(RuntimeError, match="on device jax a view is not resized"):
        torch.arange(2, out=x[3:3])
    assert x.tolist() == [0] * 5
    torch.arange(2, out=x[3:])
    assert x.tolist() == [0, 0, 0, 0, 1]


def test_errors_of_a_backward_pass_say_jax() -> None:
    x = torch.ones(2, device="jax", requires_grad=True)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError, match=r"\[torch\.jax\.FloatTensor \[2\]\]"):
        y.sum().backward()


def test_a_name_of_its_type() -> None:
    x = torch.ones(2, device="jax")
    assert x.type() == "torch.jax.FloatTensor"
    assert x.type(torch.int32).dtype is torch.int32
    assert torch.ones(2, device="jax", dtype=torch.bool).random_().dtype is torch.bool
