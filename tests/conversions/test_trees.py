"""tree_t2j and tree_j2t; the docstrings, the errors and the GPU of all conversions."""

from __future__ import annotations

import doctest
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_values import numbered, shares
from harness import precision

import torch2jax
from torch2jax import (
    SignatureError,
    Torch2JaxError,
    UnsupportedDtypeError,
    j2t,
    t2j,
    tree_j2t,
    tree_t2j,
)
from torch2jax._conversions import convert, dtypes

# --- trees ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


def test_trees_keep_their_structure_and_their_other_leaves() -> None:
    marker, array, numpy_array = object(), jnp.zeros(2), np.zeros(2)
    tree = {
        "t": torch.ones(2),
        "n": [1, 2.5, "s", True, marker, None],
        "p": Pair(torch.zeros(()), (torch.ones(3),)),
    }
    result = tree_t2j({**tree, "a": array, "np": numpy_array})
    assert result["a"] is array
    assert result["np"] is numpy_array
    assert result["n"] == tree["n"]
    assert result["n"][4] is marker
    assert isinstance(result["p"], Pair)
    assert all(isinstance(x, jax.Array) for x in (result["t"], result["p"].a, result["p"].b[0]))
    back = tree_j2t(result)
    assert back["n"] == tree["n"]
    assert torch.equal(back["p"].b[0], tree["p"].b[0])
    assert isinstance(back["a"], torch.Tensor)
    assert isinstance(back["np"], torch.Tensor)
    assert shares(result["t"], tree["t"])
    assert back["t"].data_ptr() == tree["t"].data_ptr()


@pytest.mark.parametrize(
    "leaf", [None, 3, "s", np.float32(1), torch.float32, torch.Size([2])], ids=repr
)
def test_a_tree_of_one_leaf_that_is_no_array(leaf: Any) -> None:
    assert tree_t2j(leaf) is leaf
    assert tree_j2t(leaf) is leaf


def test_a_state_dict_there_and_back() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    with precision(True):
        arrays = tree_t2j(state)
    assert type(arrays) is OrderedDict
    assert list(arrays) == list(state)
    assert all(shares(arrays[name], tensor) for name, tensor in state.items())
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    twin.load_state_dict(tree_j2t(arrays))
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), twin.state_dict().values(), strict=True)
    )
    with precision(False):
        assert tree_t2j(state)["1.num_batches_tracked"].dtype == np.int32


def test_errors_in_a_tree_name_the_leaf() -> None:
    with (
        precision(False),
        pytest.raises(UnsupportedDtypeError, match=r"^\['a'\]\[1\]: t2j got .*float64"),
    ):
        tree_t2j({"a": [torch.ones(2), torch.ones(2, dtype=torch.float64)]})
    with pytest.raises(SignatureError, match=r"^t2j got .*meta"):
        tree_t2j(torch.ones(2, device="meta"))
    deleted = jnp.ones(3)
    deleted.delete()
    with pytest.raises(Torch2JaxError, match=r"^\['b'\]: j2t got .*deleted"):
        tree_j2t({"a": jnp.ones(3), "b": deleted})


# --- the rest ------------------------------------------------------------------------------------


def test_examples_in_docstrings_run() -> None:
    with precision(False):
        examples = {"jnp": jnp}
        results = [doctest.testmod(m, extraglobs=examples) for m in (convert, dtypes)]
    assert sum(result.attempted for result in results) >= 14
    assert not any(result.failed for result in results)


def test_errors_are_what_the_contract_says() -> None:
    bases = {
        "SignatureError": TypeError,
        "UnsupportedDtypeError": TypeError,
        "DifferentiationError": TypeError,
        "TorchCallError": RuntimeError,
    }
    for name, base in bases.items():
        error = getattr(torch2jax, name)
        assert error.__mro__[1:3] == (Torch2JaxError, base)
        assert error.__doc__


def gpu_on_both_sides() -> bool:
    try:
        return torch.cuda.is_available() and bool(jax.devices("gpu"))
    except RuntimeError:
        return False


@pytest.mark.skipif(not gpu_on_both_sides(), reason="needs a GPU that both torch and jax have")
def test_gpu_memory_is_shared_and_pinned_memory_copied() -> None:
    tensor = numbered(64).cuda()
    array = t2j(tensor)
    assert shares(array, tensor)
    assert array.devices() == {jax.devices("gpu")[0]}
    assert j2t(array).data_ptr() == tensor.data_ptr()
    assert shares(t2j(tensor[1:]), tensor[1:])
    np.testing.assert_array_equal(t2j(numbered(4, 6).cuda().T), numbered(4, 6).T)
    with precision(False):
        assert t2j(torch.tensor([2**32 + 1]).cuda()).tolist() == [1]
    pinned = numbered(64).pin_memory()
    assert not shares(t2j(pinned), pinned)
    assert t2j(pinned).devices() == {jax.devices("cpu")[0]}
