"""Implicit differentiation: solvers that are written in JAX, of equations that are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
import torch

from torch2jax import torch2jax

A = jnp.array([1.0, 2.0])
SPREAD = jnp.array([[3.0, 1.0], [1.0, 2.0]])


def residual(x: Any, a: Any, tanh: Any) -> Any:
    return tanh(x) + (x @ x) * 0.1 * x + x - a


torch_residual = torch2jax(lambda x, a: residual(x, a, torch.tanh))


def jax_residual(x: jax.Array, a: jax.Array) -> jax.Array:
    return residual(x, a, jnp.tanh)


def newton(f: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 80, lambda _, x: x - 0.4 * f(x), x)


def by_matrix(matvec: Any, b: jax.Array, jacobian: Any) -> jax.Array:
    return jnp.linalg.solve(jacobian(matvec)(b), b)


TANGENT_SOLVES = {
    "jacobian": lambda g, y: by_matrix(g, y, jax.jacobian),
    "jacfwd": lambda g, y: by_matrix(g, y, jax.jacfwd),
    "jacrev": lambda g, y: by_matrix(g, y, jax.jacrev),
    "columns": lambda g, y: jnp.linalg.solve(jax.vmap(g, out_axes=1)(jnp.eye(2)), y),
    "custom_linear_solve": lambda g, y: jax.lax.custom_linear_solve(
        g, y, *[lambda g, b: by_matrix(g, b, jax.jacfwd)] * 2
    ),
}


def root(equation: Any, tangent_solve: str) -> Callable[[jax.Array], jax.Array]:
    def solve(a: jax.Array) -> jax.Array:
        return jax.lax.custom_root(
            lambda x: equation(x, a), jnp.zeros(2), newton, TANGENT_SOLVES[tangent_solve]
        )

    return solve


@pytest.mark.parametrize("tangent_solve", list(TANGENT_SOLVES))
def test_custom_root(tangent_solve: str) -> None:
    ours, twin = root(torch_residual, tangent_solve), root(jax_residual, tangent_solve)
    loss, expected = (lambda a, f=f: (f(a) ** 3).sum() for f in (ours, twin))
    np.testing.assert_allclose(ours(A), twin(A), rtol=1e-5)
    for transform in (
        jax.grad,
        lambda f: jax.jit(jax.grad(f)),
        lambda f: jax.jacfwd(f),
    ):
        np.testing.assert_allclose(transform(loss)(A), transform(expected)(A), rtol=1e-4)
    many = jnp.stack([A, 2 * A])
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(many), jax.vmap(jax.grad(expected))(many), rtol=1e-4
    )


def test_second_derivatives_through_a_root() -> None:
    ours, twin = root(torch_residual, "jacfwd"), root(jax_residual, "jacfwd")
    loss, expected = (lambda a, f=f: (f(a) ** 3).sum() for f in (ours, twin))
    np.testing.assert_allclose(jax.hessian(loss)(A), jax.hessian(expected)(A), rtol=1e-3, atol=1e-5)


def implicit(equation: Any) -> Callable[[jax.Array], jax.Array]:
    """A fixed point with the implicit function theorem by hand, as jaxopt has it."""

    @jax.custom_vjp
    def solve(a: jax.Array) -> jax.Array:
        return newton(lambda x: equation(x, a), jnp.zeros(2))

    def backward(saved: tuple[jax.Array, jax.Array], c: jax.Array) -> tuple[jax.Array]:
        x, a = saved
        _, pull_x = jax.vjp(lambda x: equation(x, a), x)
        matrix = jax.jacobian(lambda u: pull_x(u)[0])(c)
        u = jnp.linalg.solve(matrix, c)
        _, pull_a = jax.vjp(lambda a: equation(x, a), a)
        return (-pull_a(u)[0],)

    solve.defvjp(lambda a: (solve(a), (solve(a), a)), backward)
    return solve


def test_the_implicit_function_theorem_by_hand() -> None:
    ours, twin = implicit(torch_residual), implicit(jax_residual)
    for run in (jax.jacrev, lambda f: jax.jit(jax.jacrev(f))):
        np.testing.assert_allclose(run(ours)(A), run(twin)(A), rtol=1e-4, atol=1e-6)


def test_custom_linear_solve() -> None:
    """The matrix is PyTorch's, and what differentiates through it is JAX's."""
    product = torch2jax(lambda m, x: torch.sin(m) @ x)

    def solve(multiply: Any, m: jax.Array, b: jax.Array) -> jax.Array:
        def dense(matvec: Any, b: jax.Array) -> jax.Array:
            return by_matrix(matvec, b, jax.jacobian)

        return jax.lax.custom_linear_solve(lambda x: multiply(m, x), b, dense, dense)

    ours, twin = (
        lambda m, b, f=f: (solve(f, m, b) ** 2).sum()
        for f in (product, lambda m, x: jnp.sin(m) @ x)
    )
    for argnum in (0, 1):
        np.testing.assert_allclose(
            jax.grad(ours, argnum)(SPREAD, A), jax.grad(twin, argnum)(SPREAD, A), rtol=1e-4
        )
    np.testing.assert_allclose(
        jax.hessian(ours, 1)(SPREAD, A), jax.hessian(twin, 1)(SPREAD, A), rtol=1e-4
    )


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_derivative_is_linear_for_jax(mode: str, batched: bool) -> None:
    """Its Jacobian does not depend on where it is taken, and what it makes can be transposed."""
    f = torch2jax(lambda x: torch.tanh(x) * x.sum())

    def derivative(t: jax.Array) -> jax.Array:
        if mode == "jvp":
            return jax.jvp(f, (A,), (t,))[1]
        return jax.vjp(f, A)[1](t)[0]

    def matrix(t: jax.Array) -> jax.Array:
        return jax.jacobian(jax.vmap(derivative) if batched else derivative)(t)

    t = jnp.ones((3, 2)) if batched else jnp.ones(2)
    twin = jax.jacobian(lambda x: jnp.tanh(x) * x.sum())(A)
    expected = twin if mode == "jvp" else twin.T
    found = matrix(t)
    if batched:
        found = jnp.einsum("iaib->iab", found)
        expected = jnp.broadcast_to(expected, (3, 2, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    through = lambda t: matrix(jax.lax.stop_gradient(t)).sum() + matrix(t).sum() * 0 + t.sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(through)(t), jnp.ones_like(t))
    [back] = jax.linear_transpose(jax.vmap(derivative) if batched else derivative, t)(t)
    np.testing.assert_allclose(back, t @ (twin if mode == "jvp" else twin.T), rtol=1e-5)


def test_a_constant_matrix_is_not_computed_from_the_linear_operand() -> None:
    f = torch2jax(lambda x: torch.tanh(x) * x.sum())
    push = lambda t: jax.jvp(f, (A,), (t,))[1]  # noqa: E731
    inverse = lambda b: jnp.linalg.solve(jax.jacobian(push)(b), b)  # noqa: E731
    [found] = jax.linear_transpose(inverse, A)(A)
    twin = jax.jacobian(lambda x: jnp.tanh(x) * x.sum())(A)
    np.testing.assert_allclose(found, jnp.linalg.solve(twin.T, A), rtol=1e-4)


# --- solvers of libraries, beside PyTorch's own gradients ------------------------------------------


def equation(w: torch.Tensor, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x + 0.3 * torch.tanh(w @ x) - a


def symmetric(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x + 0.3 * w.T @ (w @ x)


bridged = torch2jax(equation)
bridged_symmetric = torch2jax(symmetric)


def by_root(w: jax.Array, a: jax.Array) -> jax.Array:
    solver = optimistix.Newton(rtol=1e-6, atol=1e-6)
    f = lambda x, args: bridged(*args, x)  # noqa: E731
    return optimistix.root_find(f, solver, jnp.zeros(2), (w, a)).value


def by_fixed_point(w: jax.Array, a: jax.Array) -> jax.Array:
    solver = optimistix.FixedPointIteration(rtol=1e-6, atol=1e-6)
    f = lambda x, args: x - bridged(*args, x)  # noqa: E731
    return optimistix.fixed_point(f, solver, jnp.zeros(2), (w, a)).value


def by_conjugate_gradients(w: jax.Array, a: jax.Array) -> jax.Array:
    operator = lineax.FunctionLinearOperator(
        lambda x: bridged_symmetric(w, x),
        jax.eval_shape(lambda: a),
        lineax.positive_semidefinite_tag,
    )
    return lineax.linear_solve(operator, a, lineax.CG(rtol=1e-6, atol=1e-6)).value


def by_implicit_steps(w: jax.Array, a: jax.Array) -> jax.Array:
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, args: -bridged(*args, x)), diffrax.Kvaerno3(), 0.0, 1.0, 0.1,
        jnp.ones(2), (w, a), stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-6),
    ).ys[0]  # fmt: skip


def torch_root_of(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(2)
    for _ in range(60):
        x = x - equation(w, a, x)
    return x


def torch_solution(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(torch.eye(2) + 0.3 * w.T @ w, a)


def torch_steps(w: torch.Tensor, a: torch.Tensor, n: int = 20) -> torch.Tensor:
    """Runge and Kutta's."""
    x, h = torch.ones(2), 1 / n
    for _ in range(n):
        k1 = -equation(w, a, x)
        k2 = -equation(w, a, x + h / 2 * k1)
        k3 = -equation(w, a, x + h / 2 * k2)
        k4 = -equation(w, a, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (by_root, torch_root_of),
        (by_fixed_point, torch_root_of),
        (by_conjugate_gradients, torch_solution),
        (by_implicit_steps, torch_steps),
    ],
    ids=["optimistix, root", "optimistix, fixed point", "lineax", "diffrax"],
)
def test_a_solver_of_a_library(ours: Any, theirs: Any) -> None:
    """The value, and the gradients of matrix and right-hand side."""
    w = torch.tensor([[0.5, -0.3], [0.2, 0.8]], requires_grad=True)
    a = torch.tensor([1.0, -2.0], requires_grad=True)
    want = theirs(w, a)
    (want**3).sum().backward()
    given = jnp.asarray(w.detach().numpy()), jnp.asarray(a.detach().numpy())
    grad = jax.grad(lambda w, a: (ours(w, a) ** 3).sum(), (0, 1))
    for compiled in (lambda f: f, jax.jit):
        np.testing.assert_allclose(compiled(ours)(*given), want.detach(), rtol=1e-3)
        for actual, expected in zip(compiled(grad)(*given), (w.grad, a.grad), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-3)
