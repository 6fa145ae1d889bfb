"""Derivatives of hypergradients: closed forms, other methods, and differences, in both modes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed

import gradhpo


N, P = 30, 4
X, V = jax.random.normal(jax.random.key(0), (2, N, P))
Y, U = jax.random.normal(jax.random.key(1), (2, N))
PENALTY = jnp.asarray([-1.0, -0.5, 0.3, -2.0])


def train_loss(w, h, batch):
    return jnp.mean((X @ w - Y) ** 2) / 2 + jnp.sum(jnp.exp(h) * w**2) / 2


def val_loss(w, h, batch):
    return jnp.mean((V @ w - U) ** 2) / 2


def bent_loss(w, h, batch):
    """Not quadratic, so that H has derivatives with respect to w as well."""
    return train_loss(w, h, batch) + jnp.mean(jnp.cosh(0.5 * X @ w))


def bent_val_loss(w, h, batch):
    return val_loss(w, h, batch) + jnp.mean(jnp.tanh(V @ w) * jnp.sum(h))


def error_of_two(w, h, batch):
    """With a scale per feature, so that the null space moves."""
    return jnp.mean((X[:2] @ (jnp.exp(h) * w) - Y[:2]) ** 2)


LOSSES, BENT = (train_loss, val_loss), (bent_loss, bent_val_loss)


def hypergradient_of(optimizer, losses=LOSSES, start=None):
    """The hypergradient as a function of the hyperparameters, from one start."""
    w = jnp.zeros(P) if start is None else start
    state = optimizer.init(w, PENALTY)
    return lambda h: optimizer.compute_hypergradient(
        state.update(hyperparams=h), None, None, *losses
    )


def both_modes(function, h=PENALTY):
    forward, reverse = jax.jit(lambda h: (jax.jacfwd(function)(h), jax.jacrev(function)(h)))(h)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10, atol=1e-12)
    return forward


def differences(function, h=PENALTY, epsilon=1e-5):
    along = lambda e: (function(h + epsilon * e) - function(h - epsilon * e)) / (2 * epsilon)
    return jax.jit(jax.vmap(along, out_axes=1))(jnp.eye(len(h)))


def closed_form():
    r"""$-l_j q_j w_j$ with $dw/dl_k = -A^{-1} e_k w_k$, $dq/dl_k = A^{-1}(B dw/dl_k - e_k q_k)$."""
    penalty = np.exp(PENALTY)
    a, b = np.asarray(X.T @ X / N) + np.diag(penalty), np.asarray(V.T @ V / N)
    w = np.linalg.solve(a, X.T @ Y / N)
    q = np.linalg.solve(a, V.T @ (V @ w - U) / N)
    dw = -np.linalg.solve(a, np.diag(w))
    dq = np.linalg.solve(a, b @ dw - np.diag(q))
    gradient = -penalty * q * w
    by_penalty = -(dq * w[:, None] + q[:, None] * dw)
    return gradient, penalty[:, None] * penalty * by_penalty + np.diag(gradient)


SGD = optax.sgd(0.4)  # below 2 / (largest curvature)
TIGHT = {"rtol": 1e-13, "atol": 1e-13}
STEPS = 100  # to 1e-13 of the optimum
SOLVERS = {"default": None, "CG": lx.CG(**TIGHT)}


@pytest.mark.parametrize("name", quick(list(SOLVERS), keep=["default"]))
def test_implicit_outer_hessians_are_those_of_ridge_regression(name):
    optimizer = gradhpo.ImplicitOptimizer(SGD, linear_solver=SOLVERS[name], inner_steps=STEPS)
    gradient, hessian = closed_form()
    function = hypergradient_of(optimizer)
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if name == "default" else {"rtol": 1e-10}
    # Its value, and the derivative in each mode, which is symmetric.
    derivative = jax.jacrev if name == "default" else jax.jacfwd
    twice = lambda h: (function(h),) * 2
    found, value = jax.jit(derivative(twice, has_aux=True))(PENALTY)
    np.testing.assert_allclose(value, gradient, **tolerance)
    np.testing.assert_allclose(found, hessian, **tolerance)


def update_fn(w, h, batch):
    return w - 0.4 * jax.grad(bent_loss)(w, h, None)


@pytest.mark.thorough
def test_at_a_fixed_point_as_at_an_optimum():
    """When the inner steps converge: unrolled, implicit, and a fixed point."""
    gmres = lx.GMRES(**TIGHT)
    methods = {
        "implicit": gradhpo.ImplicitOptimizer(SGD, linear_solver=lx.LU(), inner_steps=STEPS),
        "fixed point": gradhpo.ImplicitOptimizer(None, None, gmres, STEPS, update_fn=update_fn),
    }
    found = {name: both_modes(hypergradient_of(x, BENT)) for name, x in methods.items()}
    found["unrolled"] = plain_hessian(STEPS)
    for name, hessian in found.items():
        np.testing.assert_allclose(hessian, found["unrolled"], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(hessian, hessian.T, rtol=1e-9, err_msg=name)


@pytest.mark.thorough
def test_short_of_the_optimum_it_is_the_derivative_of_what_is_computed():
    """Three steps: the same formula, written out with dense matrices, differentiated by JAX."""
    start = jnp.asarray([0.5, -1.0, 0.2, 0.8])

    @jax.jit
    def by_hand(h):
        w = start
        for _ in range(3):
            w = w - 0.4 * jax.grad(bent_loss)(w, h, None)
        hessian = jax.hessian(bent_loss)(w, h, None) + 0.1 * jnp.eye(P)
        mixed = jax.jacobian(jax.grad(bent_loss), 1)(w, h, None)
        alpha, direct = jax.grad(bent_val_loss, (0, 1))(w, h, None)
        return direct - jnp.linalg.solve(hessian, alpha) @ mixed

    optimizer = gradhpo.ImplicitOptimizer(SGD, inner_steps=3, damping=0.1, linear_solver=lx.LU())
    function = hypergradient_of(optimizer, BENT, start)
    np.testing.assert_allclose(function(PENALTY), by_hand(PENALTY), rtol=1e-12)
    np.testing.assert_allclose(both_modes(function), jax.jacobian(by_hand)(PENALTY), rtol=1e-10)


APPROXIMATE = {
    "Neumann": gradhpo.Neumann(4, 0.3),
    "Nystrom": gradhpo.Nystrom(2, 0.1, jax.random.key(0)),
}


@pytest.mark.parametrize("name", quick(list(APPROXIMATE), keep=[]))
def test_a_solver_that_is_no_inverse_has_its_own_derivative(name):
    optimizer = gradhpo.ImplicitOptimizer(
        SGD, inner_steps=3, linear_solver=APPROXIMATE[name], damping=0.05
    )
    function = hypergradient_of(optimizer, BENT)
    found = both_modes(function)
    np.testing.assert_allclose(found, differences(function), rtol=1e-7, atol=1e-9)
    # Not the derivative of the system's solution.
    exact = hypergradient_of(dataclasses.replace(optimizer, linear_solver=lx.LU()), BENT)
    assert not np.allclose(found, jax.jit(jax.jacfwd(exact))(PENALTY), rtol=1e-2)


@pytest.mark.thorough
def test_nystrom_of_dead_units_has_a_derivative():
    """Two rows of H are 0: two equal eigenvalues, whose eigenvectors have no derivative."""
    alive = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    of_alive = lambda w, h, batch: bent_loss(w * alive, h, batch)
    nystrom = gradhpo.Nystrom(4, 0.1, jax.random.key(0))
    optimizer = gradhpo.ImplicitOptimizer(SGD, inner_steps=3, linear_solver=nystrom)
    function = hypergradient_of(optimizer, (of_alive, val_loss))
    np.testing.assert_allclose(both_modes(function), differences(function), rtol=1e-7, atol=1e-9)


EXACT = {
    "unrolled": gradhpo.UnrolledOptimizer(SGD, unroll_steps=6),
    "with checkpoints": gradhpo.UnrolledOptimizer(SGD, unroll_steps=6, checkpoints="sqrt"),
    "bisected": gradhpo.UnrolledOptimizer(SGD, unroll_steps=6, checkpoints="log"),
    "forward mode": gradhpo.ForwardModeOptimizer(SGD, unroll_steps=6),
}


@functools.cache
def plain_hessian(steps):
    def outer(h):
        descend = lambda w, _: (w - 0.4 * jax.grad(bent_loss)(w, h, None), None)
        w, _ = jax.lax.scan(descend, jnp.zeros(P), length=steps)
        return bent_val_loss(w, h, None)

    return jax.jit(jax.hessian(outer))(PENALTY)


@pytest.mark.parametrize("name", quick(list(EXACT), keep=["unrolled"]))
def test_exact_methods_give_the_hessian_of_the_outer_loss(name):
    found = both_modes(hypergradient_of(EXACT[name], BENT))
    np.testing.assert_allclose(found, plain_hessian(6), rtol=1e-11, atol=1e-13)


@pytest.mark.thorough
def test_states_on_the_host_have_derivatives_in_forward_mode():
    optimizer = dataclasses.replace(EXACT["unrolled"], store="host")
    found = jax.jit(jax.jacfwd(hypergradient_of(optimizer, BENT)))(PENALTY)
    np.testing.assert_allclose(found, plain_hessian(6), rtol=1e-11, atol=1e-13)


@pytest.mark.thorough
def test_drmad_gives_it_where_its_line_is_the_path():
    """Over one step; over more, it is the derivative of an estimate, and not symmetric."""
    one, more = (gradhpo.DrMADOptimizer(SGD, unroll_steps=steps) for steps in (1, 6))
    np.testing.assert_allclose(
        both_modes(hypergradient_of(one, BENT)), plain_hessian(1), rtol=1e-11
    )
    found = both_modes(hypergradient_of(more, BENT))
    assert not np.allclose(found, found.T, rtol=1e-3)


@pytest.mark.thorough
def test_second_order_sensitivity_of_many_tasks_at_once():
    one = gradhpo.ImplicitOptimizer(SGD, inner_steps=2 * STEPS)
    tasks = gradhpo.TaskBatched(one, num_tasks=2)
    scale = jnp.asarray([1.0, 0.5])
    of_task = lambda w, h, batch: train_loss(w, h, None) * batch[0]
    arguments = (scale[:, None], scale[:, None], of_task, val_loss)
    state = tasks.init(jnp.zeros(P), PENALTY)
    function = lambda h: tasks.compute_hypergradient(state.update(hyperparams=h), *arguments)
    _, hessian = closed_form()  # scaling the training loss does not move its optimum
    found = jax.jit(jax.jacrev(function))(PENALTY)
    np.testing.assert_allclose(found, hessian, rtol=1e-6, atol=1e-8)


@pytest.mark.thorough
def test_a_truncated_solve_is_differentiated_as_the_solution_and_raises_nothing():
    """Two steps of CG in four dimensions: the derivative takes as many, from its own start."""
    solver = lx.CG(rtol=1e-13, atol=1e-13, max_steps=2)
    optimizer = gradhpo.ImplicitOptimizer(SGD, inner_steps=STEPS, linear_solver=solver)
    _, hessian = closed_form()
    found = jax.jit(jax.jacfwd(hypergradient_of(optimizer)))(PENALTY)
    assert np.linalg.norm(found - hessian) < 0.3 * np.linalg.norm(hessian)


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"grad_fn": jax.grad(error_of_two)}])
def test_a_solve_that_failed_has_no_derivative(settings):
    """Two examples for four parameters: a least-squares solution's derivative has other terms."""
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), inner_steps=3, **settings)
    function = hypergradient_of(optimizer, (error_of_two, val_loss))
    twice = lambda h: (function(h),) * 2
    found, value = jax.jit(jax.jacrev(twice, has_aux=True))(PENALTY)
    assert np.all(np.isfinite(value))
    assert np.all(np.isnan(found))


@pytest.mark.thorough
def test_no_validation_gradient_has_a_finite_derivative():
    """At alpha = 0 the system's right-hand side has no direction."""
    nothing = lambda w, h, batch: jnp.sum(h**2) + 0 * jnp.sum(w)
    function = hypergradient_of(
        gradhpo.ImplicitOptimizer(SGD, inner_steps=3), (train_loss, nothing)
    )
    found = jax.jit(jax.jacrev(function))(PENALTY)
    np.testing.assert_allclose(found, 2 * np.eye(P), atol=1e-12)


@pytest.mark.thorough
def test_a_warm_start_changes_no_derivative():
    """Iterations start from the last adjoint, which is treated as a constant."""
    optimizer = gradhpo.ImplicitOptimizer(SGD, optax.sgd(0.0), inner_steps=STEPS)
    state = optimizer.init(jnp.zeros(P), PENALTY)
    state = optimizer.step(state, None, None, *LOSSES)
    assert np.any(np.asarray(state.memory.adjoint) != 0)
    warm = lambda h: optimizer.compute_hypergradient(
        state.update(hyperparams=h), None, None, *LOSSES
    )
    _, hessian = closed_form()
    found = jax.jit(jax.jacfwd(warm))(PENALTY)
    np.testing.assert_allclose(found, hessian, rtol=1e-7, atol=1e-9)


@pytest.mark.thorough
def test_a_line_search_is_refused():
    """Its derivative is right after 10 steps, but 50 times too long after 30."""
    function = hypergradient_of(gradhpo.ImplicitOptimizer(relaxed(optax.lbfgs()), inner_steps=30))
    for differentiated in (jax.jacfwd(function), jax.jacrev(function)):
        with pytest.raises(ValueError, match=r"line search.*optax.sgd"):
            differentiated(PENALTY)
