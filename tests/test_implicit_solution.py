"""A foreign solver as a differentiable function, against the closed form of ridge regression."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import quick

import gradhpo


RANDOM = np.random.default_rng(0)
X, Y = jnp.asarray(RANDOM.normal(size=(30, 5))), jnp.asarray(RANDOM.normal(size=30))
START, H = jnp.zeros(5), jnp.asarray(2.0)
# Direct solves of systems with a condition number below 10: only rounding.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def loss(w, h):
    return jnp.sum((X @ w - Y) ** 2) / 2 + h * jnp.sum(w**2) / 2


def closed(h):
    return jnp.linalg.solve(X.T @ X + h * jnp.eye(5), X.T @ Y)


def by_numpy(w, h):
    solve = lambda a, b: np.linalg.solve(a, b[..., None])[..., 0]
    given = X.T @ X + h * jnp.eye(5), X.T @ Y
    like = jax.ShapeDtypeStruct((5,), w.dtype)
    return jax.pure_callback(solve, like, *given, vmap_method="broadcast_all")


SOLUTION = gradhpo.implicit_solution(by_numpy, jax.grad(loss), lx.LU())


def ridge(h):
    return SOLUTION(START, h)


def squared(function):
    return lambda h: jnp.sum(function(h) ** 2)


def scanned(function):
    body = lambda carry, k: (carry, jnp.sum(function(h_of(carry, k)) ** 2))
    h_of = lambda h, k: h * k
    return lambda h: jnp.sum(jax.lax.scan(body, h, jnp.arange(1.0, 3.0))[1])


FORWARD, REVERSE = jax.jacfwd, jax.jacrev
ORDERS = {
    "f": (FORWARD,),
    "r": (REVERSE,),
    "ff": (FORWARD, FORWARD),
    "fr": (FORWARD, REVERSE),
    "rf": (REVERSE, FORWARD),
    "rr": (REVERSE, REVERSE),
    "frr": (FORWARD, REVERSE, REVERSE),
    "rrr": (REVERSE, REVERSE, REVERSE),
}
AROUND = {
    "alone": squared,
    "jit": lambda function: squared(jax.jit(function)),
    "checkpoint": lambda function: squared(jax.checkpoint(function)),
    "scan": scanned,
}


@pytest.mark.parametrize(
    ("order", "around"),
    quick(
        [(order, around) for order in ORDERS for around in AROUND],
        keep=[("fr", "scan")],
    ),
)
def test_derivatives_in_both_modes(order, around):
    """JAX splits the body of a scan in two, and loses custom rules there."""

    def of(function):
        for derivative in reversed(ORDERS[order]):
            function = derivative(function)
        return function

    found, expected = (of(AROUND[around](function))(H) for function in (ridge, closed))
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_value_is_the_solvers_own():
    exact = jnp.asarray([0.1, 0.2, 0.3, 0.4, 0.7])
    near = gradhpo.implicit_solution(lambda w, h: exact, jax.grad(loss), lx.LU())
    np.testing.assert_array_equal(near(START, H), exact)
    np.testing.assert_array_equal(jax.jit(near)(START, H), exact)
    assert not np.any(jax.jacrev(SOLUTION)(START, H))  # the start does not act


@pytest.mark.thorough
def test_vmap_of_gradients():
    many = jnp.asarray([1.0, 2.0, 3.0])
    found, expected = (jax.vmap(jax.grad(squared(f)))(many) for f in (ridge, closed))
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.thorough
def test_traced_values_from_outside():
    """Solver and equation may close over them; so may a callback."""

    def outer(h):
        inside = gradhpo.implicit_solution(
            lambda w: by_numpy(w, h), lambda w: jax.grad(loss)(w, h), lx.LU()
        )
        return jnp.sum(inside(START) ** 2)

    np.testing.assert_allclose(jax.grad(outer)(H), jax.grad(squared(closed))(H), **CLOSE)
    np.testing.assert_allclose(jax.hessian(outer)(H), jax.hessian(squared(closed))(H), **CLOSE)


def test_a_solver_that_wants_numbers():
    def eager(w, h):
        return jnp.asarray(np.linalg.solve(np.asarray(X.T @ X) + float(h) * np.eye(5), X.T @ Y))

    numbers = gradhpo.implicit_solution(eager, jax.grad(loss), lx.LU())
    found = jax.grad(squared(lambda h: numbers(START, h)))(H)
    np.testing.assert_allclose(found, jax.grad(squared(closed))(H), **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "how", [None, lx.CG(rtol=1e-12, atol=1e-12), lx.Cholesky(), gradhpo.Neumann(2_000, 0.02)]
)
def test_every_kind_of_linear_solver(how):
    solution = gradhpo.implicit_solution(by_numpy, jax.grad(loss), how)
    for derivative in (jax.jacfwd, jax.jacrev):
        found = derivative(lambda h: solution(START, h))(H)
        np.testing.assert_allclose(found, jax.jacfwd(closed)(H), rtol=1e-8)  # iterative ones


@pytest.mark.thorough
def test_models_with_functions_in_float32_and_an_unsymmetric_fixed_point():
    class Model(eqx.Module):
        w: jax.Array
        act: object
        count: int

    turn = jnp.asarray([[0.0, 0.5], [-0.5, 0.2]], jnp.float32)
    step = lambda model, b, f: eqx.tree_at(lambda m: m.w, model, f(turn @ model.w) + b)

    def solve(model, b, f):
        body = lambda w, _: (step(eqx.tree_at(lambda m: m.w, model, w), b, f).w, None)
        return eqx.tree_at(lambda m: m.w, model, jax.lax.scan(body, model.w, None, length=80)[0])

    left = lambda m, b, f: eqx.tree_at(lambda m: m.w, m, m.w - step(m, b, f).w)
    model = Model(jnp.zeros(2, jnp.float32), jnp.tanh, 3)
    solution = gradhpo.implicit_solution(solve, left)
    b = jnp.asarray([0.3, -0.1], jnp.float32)
    of = lambda function: lambda b: jnp.sum(function(model, b, jnp.tanh).w ** 2)
    # Unrolled to its fixed point, in float32.
    np.testing.assert_allclose(jax.grad(of(solution))(b), jax.grad(of(solve))(b), rtol=1e-4)
    assert solution(model, b, jnp.tanh).act is jnp.tanh


@pytest.mark.thorough
def test_a_singular_equation_gives_nan():
    flat = gradhpo.implicit_solution(lambda w, h: w, lambda w, h: jnp.zeros(3) * w + h, None)
    assert np.all(np.isnan(jax.jacfwd(flat, argnums=1)(jnp.zeros(3), jnp.asarray(1.0))))


@pytest.mark.parametrize(
    ("solver", "optimality", "how", "said"),
    [
        (lambda w, h: w[:2], jax.grad(loss), None, "the solver must return params"),
        (lambda w, h: (w, 1), jax.grad(loss), None, "the solver must return params"),
        (by_numpy, loss, None, "must return a tree like the params"),
    ],
)
def test_what_the_functions_must_return(solver, optimality, how, said):
    with pytest.raises(ValueError, match=said):
        gradhpo.implicit_solution(solver, optimality, how)(START, H)
