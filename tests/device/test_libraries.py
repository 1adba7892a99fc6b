"""Programs of other people's libraries on device "jax": values and all gradients are PyTorch's.

A training step is compiled with its backward pass. It meets a module's state as it was left.
"""

from __future__ import annotations

from typing import Any

import library_programs as programs
import numpy as np
import pytest
import torch

from torch2jax import device

# They deprecate what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # captum, of an argument that requires no gradient
    "ignore:Input Tensor 0 did not already require gradients",
)

device.enable()


@pytest.mark.parametrize("name", programs.named("device"))
def test_program(name: str) -> None:
    program = programs.PROGRAMS[name]
    module = programs.made(program)
    want = programs.expected(module, program)
    module = module.to("jax")

    def step(*args: torch.Tensor) -> Any:
        args = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in args)
        out = module(*args)
        programs.score(out).backward()
        return programs.leaves(out), [x.grad for x in args if x.requires_grad]

    compiled = device.jit(step)
    out: Any = None
    by_input: Any = None
    for _ in range(program.steps or 2):  # the first call runs step by step
        module.zero_grad()
        out, by_input = compiled(*(x.to("jax") for x in program.args))
    for k, (y, x) in enumerate(zip(out, programs.leaves(want.out), strict=True)):
        programs.close(y.detach().cpu(), x, f"result {k}")
    for k, (g, x) in enumerate(zip(by_input, want.inputs, strict=True)):
        assert (g is None) == (x is None), k
        if x is not None:
            programs.close(g.cpu(), x, f"input {k}")
    ours = dict(module.named_parameters())
    for key, x in want.parameters.items():
        g = ours[key].grad
        programs.close(
            np.zeros(()) if g is None else g.cpu(), np.zeros(()) if x is None else x, key
        )
    for key, b in module.named_buffers():
        if key in want.buffers:
            programs.close(b.detach().cpu(), want.buffers[key], key)
