"""The class of tensors on device "jax" has a name that says PyTorch, by which libraries choose."""

from __future__ import annotations

import copy
import io
import pickle

import opt_einsum
import torch
from harness import close
from torch import nn

from torch2jax import device

device.enable()


def test_root_of_the_module_is_torch() -> None:
    x = torch.ones(2, device="jax")
    for t in (x, nn.Parameter(x), x[:1], x.detach()):
        assert type(t).__module__.split(".")[0] == "torch"
        assert "torch.jax.Tensor" in repr(type(t))


def test_opt_einsum_computes_by_pytorch() -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    formula = "ij,jk,k->i"
    expected = opt_einsum.contract(formula, a, b.requires_grad_(), c)
    mine = b.detach().to("jax").requires_grad_()
    out = opt_einsum.contract(formula, a.to("jax"), mine, c.to("jax"))
    expected.square().sum().backward()
    out.square().sum().backward()
    close(out, expected)
    close(mine.grad, b.grad)
    expression = opt_einsum.contract_expression(formula, *(x.shape for x in (a, b, c)))
    close(expression(a.to("jax"), mine, c.to("jax")), expected)


def test_class_and_tensors_are_pickled_and_copied() -> None:
    assert pickle.loads(pickle.dumps(device.Tensor)) is device.Tensor
    assert copy.deepcopy(device.Tensor) is device.Tensor
    x = torch.arange(3.0, device="jax")
    assert type(pickle.loads(pickle.dumps(x))) is torch.Tensor  # files load anywhere
    assert type(copy.deepcopy(x)) is device.Tensor
    assert type(copy.copy(x)).__module__.startswith("torch")
    file = io.BytesIO()
    torch.save({"x": x, "kind": device.Tensor.__name__}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["x"]) is torch.Tensor
    assert loaded["x"].tolist() == [0.0, 1.0, 2.0]
