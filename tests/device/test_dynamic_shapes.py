"""Exported programs with dynamic shapes whose operators need care, and constant arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from harness import close

from torch2jax import device

pytest.importorskip("flatbuffers", reason="jax.export writes artifacts with it")
device.enable()


class Resize(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, mode="bilinear", **self.options)


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [
        ({"size": (9, 5)}, (0,)),
        ({"size": (3, 20), "align_corners": True}, (0,)),
        ({"size": (1, 20), "align_corners": True}, (0, 2, 3)),
        ({"scale_factor": 1.5}, (0,)),
        ({"scale_factor": 1.5, "recompute_scale_factor": True}, (0,)),
        ({"scale_factor": 2.0}, (0, 2, 3)),
        ({"scale_factor": (3.0, 2.0), "align_corners": True}, (0, 2, 3)),
    ],
)
def test_bilinear_resizing(options: dict[str, Any], dynamic: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = Resize(options), torch.randn(3, 2, 6, 7)
    dims = {d: torch.export.Dim(f"d{d}", max=64) for d in dynamic}
    program = torch.export.export(module, (x,), dynamic_shapes=(dims,))
    exported = device.export(program)
    for shape in ((3, 2, 6, 7), (5, 2, 8, 9) if 2 in dynamic else (5, 2, 6, 7)):
        x = torch.randn(shape)
        close(exported.call({}, jnp.asarray(x.numpy())), module(x))


def test_slices_to_the_end() -> None:
    class Rest(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.slice.Tensor(x, 0, 1, 2**63 - 1)

    x, rows = torch.randn(4, 2), torch.export.Dim("rows", min=3, max=64)
    program = torch.export.export(Rest(), (x,), dynamic_shapes=({0: rows},))
    x = torch.randn(7, 2)
    close(device.export(program).call({}, jnp.asarray(x.numpy())), x[1:])


def test_constant_arguments() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, by: float, more: Any) -> torch.Tensor:
            return x * by

    rows = torch.export.Dim("rows", max=64)
    x = torch.ones(4, 2)
    program = torch.export.export(Scaled(), (x, 0.5, None), dynamic_shapes=({0: rows}, None, None))
    exported = device.export(program)
    assert [a.shape for a in exported.in_avals][1:] == [()]
    out = exported.call({}, jnp.ones((7, 2)), jax.numpy.float32(0.5), None)
    close(out, torch.full((7, 2), 0.5))
