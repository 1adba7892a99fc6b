"""Programs of other people's libraries as JAX programs: values and all gradients are PyTorch's."""

from __future__ import annotations

import library_programs as programs
import pytest

from torch2jax import from_module

# They deprecate what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # captum, of an argument that requires no gradient
    "ignore:Input Tensor 0 did not already require gradients",
)


@pytest.mark.parametrize("name", programs.named("lower"))
def test_program(name: str) -> None:
    program = programs.PROGRAMS[name]
    module = programs.made(program)
    want = programs.expected(module, program)
    apply, variables = from_module(module, lower=True)
    programs.check(apply, variables, program, want)
