"""SOBA and AmIGO, and implicit differentiation with a batch for every product (stocBiO)."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed
from single_loops import (
    BY_HAND,
    FEATURES,
    PLAIN,
    RATE,
    data,
    quadratic,
    quartic,
    quartic_at,
    squares,
    squares_at,
)

import gradhpo


STEPS = 20


def soba_by_hand(problem, w_step, v_step, a_step, inner_steps, adjoint_steps, repeat):
    """Every outer step of section 14, with the hypergradients."""
    w, a, v, hypergradients = problem.w, problem.a, np.zeros(FEATURES), []
    for k in range(STEPS):
        batch = lambda t, k=k: problem.batch(k, 0 if repeat else t)
        if inner_steps == adjoint_steps == 1:
            at, (alpha, direct) = quartic_at(w, a, batch(0)), squares_at(w, a, problem.val)
            g = direct + v @ at.mixed
            w, v = w_step(w, at.gradient), v_step(v, at.hessian @ v + alpha)
        else:
            for t in range(inner_steps):
                w = w_step(w, quartic_at(w, a, batch(t)).gradient)
            alpha, direct = squares_at(w, a, problem.val)
            for j in range(adjoint_steps):
                v = v_step(v, quartic_at(w, a, batch(j % inner_steps)).hessian @ v + alpha)
            g = direct + v @ quartic_at(w, a, batch(inner_steps - 1)).mixed
        a = a_step(a, g)
        hypergradients.append(g)
    return w, a, v, hypergradients


@pytest.mark.parametrize(
    ("inner", "adjoint", "inner_steps", "adjoint_steps", "repeat"),
    quick(
        [
            ("momentum", "Adam", 1, 1, False),
            ("Adam", "momentum", 1, 1, False),
            ("momentum", "Adam", 3, 5, False),
            ("momentum", "momentum", 3, 2, True),
            ("Adam", "Adam", 1, 2, False),
        ],
        keep=[("momentum", "Adam", 1, 1, False), ("momentum", "Adam", 3, 5, False)],
    ),
)
def test_is_its_formula(inner, adjoint, inner_steps, adjoint_steps, repeat):
    """Over 20 steps with mini-batches. Only rounding differs: 1e-10."""
    problem = data(STEPS, inner_steps)
    (inner_optimizer, w_step), (adjoint_optimizer, v_step) = BY_HAND[inner], BY_HAND[adjoint]
    optimizer = gradhpo.SOBAOptimizer(
        inner_optimizer,
        BY_HAND["Adam"][0],
        inner_steps=inner_steps,
        adjoint_steps=adjoint_steps,
        adjoint_optimizer=adjoint_optimizer,
    )
    state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a))
    norms = []
    for k in range(STEPS):
        stack = problem.stack(k)
        batch = stack.at(0) if repeat or inner_steps == 1 else stack
        val = tuple(map(jnp.asarray, problem.val))
        state = optimizer.step(state, batch, val, quartic, squares)
        norms.append(state.metadata["hypergrad_norm"])
    steps = w_step(), v_step(), BY_HAND["Adam"][1]()
    w, a, v, found = soba_by_hand(problem, *steps, inner_steps, adjoint_steps, repeat)
    np.testing.assert_allclose(state.params, w, rtol=1e-10)
    np.testing.assert_allclose(state.hyperparams, a, rtol=1e-10)
    np.testing.assert_allclose(state.memory.adjoint, v, rtol=1e-10)
    np.testing.assert_allclose(norms, [np.linalg.norm(g) for g in found], rtol=1e-10)
    assert np.linalg.norm(v) > 0.01


def test_reaches_the_solution_of_a_quadratic():
    """To 1e-10: in 2,000 steps the slowest direction, of curvature 1, shrinks by .98^2000."""
    problem = quadratic()
    problem = problem._replace(j=0.3 * problem.j, rho=1.0)
    sgd = relaxed(optax.sgd(0.1))
    optimizer = gradhpo.SOBAOptimizer(sgd, relaxed(optax.sgd(0.02)), adjoint_optimizer=sgd)
    state = optimizer.init(jnp.zeros(6), jnp.zeros(4))
    losses = gradhpo.LossFunctions(problem.train_loss, problem.val_loss)
    state, _ = gradhpo.run(
        optimizer, state, losses, None, None, num_steps=2_000, chunk_size=2_000, progress=False
    )
    np.testing.assert_allclose(state.hyperparams, problem.solution, atol=1e-10)
    w = np.linalg.solve(problem.h, problem.j @ problem.solution + problem.c)
    np.testing.assert_allclose(state.params, w, atol=1e-10)
    assert state.get_metric("inner_residual") < 1e-9
    assert state.get_metric("linear_residual") < 1e-9


@pytest.mark.parametrize("repeat", quick([False, True], keep=[False]))
def test_stocbio_takes_another_batch_for_every_product(repeat):
    """A cold Neumann series of 7 products over 4 batches, for 20 steps: only rounding, 1e-10."""
    inner_steps, terms, rate = 4, 8, 0.02
    problem = data(STEPS, inner_steps)
    inner_optimizer, w_step = BY_HAND["momentum"]
    outer_optimizer, a_step = BY_HAND["Adam"]
    solver = gradhpo.Neumann(terms, rate, fresh_batches=True)
    optimizer = gradhpo.ImplicitOptimizer(
        inner_optimizer, outer_optimizer, linear_solver=solver, inner_steps=inner_steps
    )
    state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a))
    val = tuple(map(jnp.asarray, problem.val))
    w, a, w_step, a_step = problem.w, problem.a, w_step(), a_step()
    for k in range(STEPS):
        stack = problem.stack(k)
        state = optimizer.step(state, stack.at(0) if repeat else stack, val, quartic, squares)
        batch = lambda t, k=k: problem.batch(k, 0 if repeat else t)
        for t in range(inner_steps):
            w = w_step(w, quartic_at(w, a, batch(t)).gradient)
        alpha, direct = squares_at(w, a, problem.val)
        term, q = alpha, rate * alpha
        for j in range(terms - 1):
            term = term - rate * quartic_at(w, a, batch(j % inner_steps)).hessian @ term
            q = q + rate * term
        g = direct - q @ quartic_at(w, a, batch(inner_steps - 1)).mixed
        np.testing.assert_allclose(state.metadata["hypergrad_norm"], np.linalg.norm(g), rtol=1e-10)
        a = a_step(a, g)
    np.testing.assert_allclose(state.hyperparams, a, rtol=1e-10)
    np.testing.assert_allclose(state.memory.adjoint, q, rtol=1e-10)


def test_where_fresh_batches_cannot_be_had():
    solver = gradhpo.Neumann(3, 0.1, fresh_batches=True)
    with pytest.raises(ValueError, match="leave one out"):
        gradhpo.ImplicitOptimizer(PLAIN, None, solver, inner_steps=2, curvature_batches=2)
    operator = lx.MatrixLinearOperator(jnp.eye(2))
    with pytest.raises(ValueError, match=r"only gradhpo\.ImplicitOptimizer"):
        lx.linear_solve(operator, jnp.ones(2), solver)


def adjoint_of(problem, optimizer, steps=20):
    state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a))
    val = tuple(map(jnp.asarray, problem.val))
    found = []
    for _ in range(steps):
        state = optimizer.step(state, problem.stack(0).at(0), val, quartic, squares, lr_hyper=0.01)
        found.append(state.hyperparams)
    return np.stack(found), state


@pytest.mark.parametrize(("inner_steps", "adjoint_steps"), quick([(1, 1), (2, 3)], keep=[(1, 1)]))
def test_an_update_fn_has_the_equation_of_its_fixed_point(inner_steps, adjoint_steps):
    """A descent step's adjoint is v / rate: the same hypergradients at 1 / rate times the step."""
    problem = data(1, 1)
    steps = {"inner_steps": inner_steps, "adjoint_steps": adjoint_steps}
    by_optax = gradhpo.SOBAOptimizer(PLAIN, adjoint_optimizer=PLAIN, **steps)
    update_fn = lambda w, a, batch: w - RATE * jax.grad(quartic)(w, a, batch)
    by_hand = gradhpo.SOBAOptimizer(
        update_fn=update_fn, adjoint_optimizer=relaxed(optax.sgd(1.0)), **steps
    )
    (found, state), (expected, other) = (adjoint_of(problem, o) for o in (by_hand, by_optax))
    np.testing.assert_allclose(found, expected, rtol=1e-10)  # rounding
    np.testing.assert_allclose(RATE * state.memory.adjoint, other.memory.adjoint, rtol=1e-10)
    assert np.ptp(found, axis=0).min() > 1e-4


def test_a_grad_fn_is_transposed():
    """For a field Bw - a with an asymmetric Jacobian: dF/da = B^-T (w* - 1)."""
    b = np.array([[1.0, 0.8, 0.0], [-0.5, 1.2, 0.3], [0.2, 0.0, 0.9]])
    field = lambda w, a, batch: b @ w - a
    sgd = relaxed(optax.sgd(0.3))
    optimizer = gradhpo.SOBAOptimizer(sgd, None, 100, 100, adjoint_optimizer=sgd, grad_fn=field)
    loss = lambda w, a, batch: jnp.sum((w - 1) ** 2) / 2
    a = np.array([1.0, -2.0, 0.5])
    state = optimizer.init(jnp.zeros(3), jnp.asarray(a))
    g = optimizer.compute_hypergradient(state, None, None, loss, loss)
    expected = np.linalg.solve(b.T, np.linalg.solve(b, a) - 1)
    np.testing.assert_allclose(g, expected, rtol=1e-9)  # (1 - .3 eigenvalue)^100 remains


@pytest.mark.thorough
def test_a_model_state_is_taken_where_it_settles():
    """As in implicit differentiation; validation reads only an average of the parameters."""

    def train_loss(w, a, batch, r):
        return jnp.sum(jnp.cosh(w - a)) + 0.1 * jnp.sum(w**2), 0.5 * r + 0.5 * w

    val_loss = lambda w, a, batch, r: jnp.sum((r - 1) ** 2)
    sgd, found = relaxed(optax.sgd(0.3)), []
    for optimizer in (
        gradhpo.SOBAOptimizer(sgd, None, 200, 200, adjoint_optimizer=sgd),
        gradhpo.ImplicitOptimizer(sgd, inner_steps=200, linear_solver=lx.LU()),
    ):
        start = {"model_state": jnp.zeros(3)}
        state = optimizer.init(jnp.zeros(3), jnp.array([0.5, -1.0, 2.0]), **start)
        found.append(optimizer.compute_hypergradient(state, None, None, train_loss, val_loss))
    np.testing.assert_allclose(*found, rtol=1e-8)  # the default solver's tolerance for r
    assert np.all(np.abs(found[0]) > 0.1)


@pytest.mark.thorough
def test_episodes_keep_the_adjoint():
    problem = data(1, 1)
    optimizer = gradhpo.SOBAOptimizer(PLAIN, adjoint_optimizer=BY_HAND["Adam"][0])
    _, state = adjoint_of(problem, optimizer, steps=3)
    again = optimizer.restart(state, jnp.zeros(FEATURES), reptile_rate=0.0)
    np.testing.assert_array_equal(again.params, np.zeros(FEATURES))
    np.testing.assert_array_equal(again.memory.adjoint, state.memory.adjoint)
    assert again.memory.adjoint_state[0].count == 3


def test_the_first_hypergradient_may_be_zero_without_a_warning(recwarn):
    loss = lambda w, a, batch: jnp.sum((w - a) ** 2)
    val_loss = lambda w, a, batch: jnp.sum((w - 1) ** 2)
    optimizer = gradhpo.SOBAOptimizer(PLAIN, adjoint_optimizer=PLAIN)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, loss, val_loss, lr_hyper=0.1)
    np.testing.assert_array_equal(state.hyperparams, np.zeros(3))
    state = optimizer.step(state, None, None, loss, val_loss, lr_hyper=0.1)
    assert np.all(state.hyperparams > 0)
    assert not recwarn.list


def test_what_it_refuses():
    with pytest.raises(TypeError, match="needs adjoint_optimizer"):
        gradhpo.SOBAOptimizer(PLAIN)
    with pytest.raises(TypeError, match=r"adjoint_optimizer must be an optax transformation"):
        gradhpo.SOBAOptimizer(PLAIN, adjoint_optimizer=0.1)
    with pytest.raises(ValueError, match="adjoint_steps must be at least 1"):
        gradhpo.SOBAOptimizer(PLAIN, adjoint_steps=0, adjoint_optimizer=PLAIN)
    polyak = gradhpo.SOBAOptimizer(PLAIN, adjoint_optimizer=relaxed(optax.polyak_sgd()))
    state = polyak.init(jnp.zeros(3), jnp.zeros(3))
    loss = lambda w, a, batch: jnp.sum((w - a) ** 2)
    with pytest.raises(ValueError, match="the adjoint optimizer cannot be called"):
        polyak.step(state, None, None, loss, loss, lr_hyper=0.1)
