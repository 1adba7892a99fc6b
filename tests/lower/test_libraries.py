"""Programs of other people's libraries as JAX programs: values and all gradients are PyTorch's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import library_derivatives as derivatives
import library_programs as programs
import pytest

from torch2jax import SignatureError, from_module

# They deprecate what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # captum, of an argument that requires no gradient
    "ignore:Input Tensor 0 did not already require gradients",
)


PROGRAMS = programs.PROGRAMS | derivatives.PROGRAMS


@pytest.mark.parametrize("name", programs.named("lower", PROGRAMS))
def test_program(name: str) -> None:
    program = PROGRAMS[name]
    module = programs.made(program)
    want = programs.expected(module, program)
    apply, variables = from_module(module, lower=True)
    programs.check(apply, variables, program, want)


@pytest.mark.parametrize("make", programs.WITH_GENERATORS)
def test_a_generator_of_a_library_is_refused(make: Any) -> None:
    """Its numbers would be constants of the program."""
    module, x = make()
    apply, variables = from_module(module, lower=True)
    with pytest.raises(SignatureError, match=r"drawn from a torch\.Generator in a traced function"):
        jax.jit(apply)(variables, jnp.asarray(x.numpy()), rng=jax.random.key(0))
