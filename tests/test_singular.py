"""Implicit differentiation where H is singular: fewer examples in a batch than parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed

import gradhpo
from gradhpo.extend import choose_solver, solve_system
from gradhpo.solvers.conjugate import ConjugateGradients
from gradhpo.solvers.least_squares import GuardedGMRES


# From hyperparameters of 0, one outer step shows the hypergradient.
SGD, OUTER = optax.sgd(0.01), optax.sgd(1.0)


def weighted(w, h, batch):
    """A weight for each example."""
    x, y = batch
    return jnp.mean(jax.nn.sigmoid(h) * (x @ w - y) ** 2) / 2


def error(w, h, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) / 2


LOSSES = gradhpo.LossFunctions(weighted, error)


def data(seed, features, examples, dtype=float, validation=200):
    random = np.random.default_rng(seed)
    shapes = ((examples, features), (examples,), (validation, features), (validation,))
    x, y, v, u = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    return (x, y), (v, u)


def by_pseudo_inverse(w, h, train, val):
    """The result of the minimum-norm solution, in NumPy, and the share of alpha that H sees."""
    (x, y), (v, u) = (tuple(np.asarray(a, np.float64) for a in pair) for pair in (train, val))
    w, weights = np.asarray(w, np.float64), 1 / (1 + np.exp(-np.asarray(h, np.float64)))
    hessian = x.T @ (weights[:, None] * x) / len(y)
    alpha = v.T @ (v @ w - u) / len(u)
    q = np.linalg.pinv(hessian, rcond=1e-10) @ alpha
    unseen = np.linalg.norm(alpha - hessian @ q) / np.linalg.norm(alpha)
    return -weights * (1 - weights) * (x @ w - y) * (x @ q) / len(y), unseen


def hypergradient(before, after):
    return before.hyperparams - after.hyperparams


DEFAULT, CG = None, lx.CG(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "examples", "solver"),
    [pytest.param(600, 128, DEFAULT, marks=pytest.mark.thorough), (50, 8, CG)],
)
def test_a_batch_smaller_than_the_parameters_has_the_smallest_norm_answer(
    features, examples, solver
):
    train, val = data(0, features, examples)
    optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER, solver)
    start = optimizer.init(jnp.zeros(features), jnp.zeros(examples))
    state = optimizer.step(start, train, val, weighted, error)
    found = hypergradient(start, state)
    expected, unseen = by_pseudo_inverse(state.params, start.hyperparams, train, val)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected)))
    np.testing.assert_allclose(state.get_metric("linear_residual"), unseen, rtol=1e-6)
    assert state.metadata["rejected"] == 0
    assert state.get_metric("linear_failures") == 1
    assert np.all(np.asarray(state.memory.adjoint) == 0)


@jax.custom_vjp
def same(x):
    return x


same.defvjp(lambda x: (x, None), lambda _, bar: (bar,))


def with_custom_vjp(w, h, batch):
    return weighted(same(w), h, batch)


def with_detach(w, h, batch):
    return weighted(w + 0 * gradhpo.detach(w), h, batch)


def step_of_sgd(w, h, batch):
    return w - 0.01 * jax.grad(weighted)(w, h, batch)


NOT_SYMMETRIC = {
    "grad_fn": ({"grad_fn": jax.grad(weighted)}, weighted),
    "update_fn": ({"inner_optimizer": None, "update_fn": step_of_sgd}, weighted),
    "custom_vjp": ({}, with_custom_vjp),
    "detach": ({}, with_detach),
}


@pytest.mark.parametrize("route", quick(list(NOT_SYMMETRIC), keep=["grad_fn"]))
def test_a_system_that_need_not_be_symmetric_has_the_same_answer(route):
    """GMRES would give 1e15 times as much."""
    settings, loss = NOT_SYMMETRIC[route]
    train, val = data(0, 20, 6)
    optimizer = gradhpo.ImplicitOptimizer(
        **({"inner_optimizer": SGD} | settings), outer_optimizer=OUTER
    )
    start = optimizer.init(jnp.ones(20), jnp.zeros(6))
    state = optimizer.step(start, train, val, loss, error)
    expected, unseen = by_pseudo_inverse(state.params, start.hyperparams, train, val)
    np.testing.assert_allclose(hypergradient(start, state), expected, rtol=1e-8)
    np.testing.assert_allclose(state.get_metric("linear_residual"), unseen, rtol=1e-6)
    assert (state.get_metric("linear_failures"), state.get_metric("rejected")) == (1, 0)
    assert np.all(np.asarray(state.memory.adjoint) == 0)


@pytest.mark.thorough
def test_in_float32_too(as_a_user_has_it):
    """lineax.CG would continue for 100 products, to a hypergradient a million times too long."""
    features, examples = 1_000, 32
    train, val = data(1, features, examples, jnp.float32)
    optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER)
    start = optimizer.init(jnp.zeros(features), jnp.zeros(examples))
    state = optimizer.step(start, train, val, weighted, error)
    found = hypergradient(start, state)
    expected, unseen = by_pseudo_inverse(state.params, start.hyperparams, train, val)
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
    np.testing.assert_allclose(state.get_metric("linear_residual"), unseen, rtol=1e-3)
    assert state.get_metric("linear_failures") == 1


@pytest.mark.thorough
def test_a_run_on_such_batches_is_complete_and_says_why_it_failed():
    train, val = data(2, 40, 100)
    by_example = lambda w, h, batch: weighted(w, h[batch[2]], batch[:2])
    source = gradhpo.ArrayData((*train, jnp.arange(100)), 8, jax.random.key(0))
    optimizer = gradhpo.ImplicitOptimizer(SGD, relaxed(optax.adam(0.01)), inner_steps=5)
    state = optimizer.init(jnp.zeros(40), jnp.zeros(100))
    losses = gradhpo.LossFunctions(by_example, error)
    settings = {"num_steps": 10, "progress": False}
    said = r"failed 10 times: H is singular.*fewer examples.*curvature_batches.*smallest norm.*%"
    with pytest.warns(RuntimeWarning, match=said):
        _, history = gradhpo.run(optimizer, state, losses, source, val, **settings)
    assert history.stop_reason == "num_steps"
    assert history["rejected"][-1] == 0
    assert np.all(np.isfinite(history["hypergrad_norm"]))
    assert np.all(history["linear_residual"] < 1)
    # What the report advises: 10 batches of 8 see all 40 directions.
    enough = dataclasses.replace(optimizer, inner_steps=10, curvature_batches=10)
    _, history = gradhpo.run(enough, state, losses, source, val, **settings)
    assert history["linear_failures"][-1] == 0
    assert "linear" not in history.report


def test_a_direct_solver_that_leaves_more_than_it_solves_has_failed():
    """LU of a matrix that is singular up to rounding; the SVD handles it."""
    train, val = data(0, 20, 8)
    of = lambda solver: gradhpo.ImplicitOptimizer(SGD, OUTER, solver)
    start = of(None).init(jnp.zeros(20), jnp.zeros(8))
    by_lu, by_svd = (
        of(solver).step(start, train, val, weighted, error) for solver in (lx.LU(), lx.SVD())
    )
    assert by_lu.get_metric("linear_residual") > 1
    assert by_lu.get_metric("linear_failures") == 1
    assert by_svd.get_metric("linear_failures") == 0
    expected, _ = by_pseudo_inverse(by_svd.params, start.hyperparams, train, val)
    np.testing.assert_allclose(hypergradient(start, by_svd), expected, rtol=1e-9)


# -- the solver --------------------------------------------------------------------------------


def solve(matrix, vector, y0=None, **settings):
    solver = ConjugateGradients(lx.CG(**({"rtol": 1e-12, "atol": 1e-12} | settings)))
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), lx.positive_semidefinite_tag)
    options = {} if y0 is None else {"y0": jnp.asarray(y0)}
    return lx.linear_solve(operator, jnp.asarray(vector), solver, options=options, throw=False)


def of_rank(rank, size, seed=0):
    random = np.random.default_rng(seed)
    root = random.normal(size=(rank, size))
    vector = random.normal(size=size)
    return root.T @ root / rank, vector / np.linalg.norm(vector)


@pytest.mark.parametrize(("rank", "size"), quick([(1, 2), (8, 50), (60, 200)], keep=[(8, 50)]))
def test_of_a_singular_matrix_it_is_the_pseudo_inverse(rank, size):
    matrix, vector = of_rank(rank, size)
    found = solve(matrix, vector)
    expected = np.linalg.pinv(matrix, rcond=1e-10) @ vector
    assert np.linalg.norm(found.value - expected) < 1e-6 * np.linalg.norm(expected)
    assert found.result == lx.RESULTS.singular
    # With a right-hand side in the range, nothing is wrong.
    inside = matrix @ vector
    consistent = solve(matrix, inside)
    assert consistent.result == lx.RESULTS.successful
    expected = np.linalg.pinv(matrix, rcond=1e-10) @ inside
    np.testing.assert_allclose(consistent.value, expected, rtol=1e-8, atol=1e-10)


def test_a_start_keeps_what_a_singular_matrix_does_not_see():
    """Of all solutions, the nearest one."""
    matrix, vector = of_rank(8, 50)
    inverse = np.linalg.pinv(matrix, rcond=1e-10)
    start = np.ones(50)
    found = solve(matrix, matrix @ vector, y0=start)
    unseen = start - inverse @ (matrix @ start)
    np.testing.assert_allclose(found.value, inverse @ matrix @ vector + unseen, rtol=1e-8)
    assert found.result == lx.RESULTS.successful


def spread(rank, size, condition, symmetric):
    """Singular values between 1 and 1 / `condition`, and 0."""
    random = np.random.default_rng(0)
    left, right = np.linalg.qr(random.normal(size=(2, size, size)))[0]
    values = np.concatenate([np.geomspace(1, 1 / condition, rank), np.zeros(size - rank)])
    vector = random.normal(size=size)
    matrix = (left * values) @ (left if symmetric else right).T
    return matrix, vector / np.linalg.norm(vector), np.linalg.pinv(matrix, rcond=1e-12)


@pytest.mark.parametrize(
    ("condition", "error"), [(1e3, 1e-2), pytest.param(1e6, 1, marks=pytest.mark.thorough)]
)
def test_products_that_end_first_leave_nothing_long_that_the_matrix_does_not_see(condition, error):
    """With it, 30 times too long at 1e3; at 1e6 cut short, which the result reports."""
    matrix, vector, inverse = spread(64, 200, condition, symmetric=True)
    found, expected = solve(matrix, vector, max_steps=100), inverse @ vector
    assert np.linalg.norm(found.value - expected) < error * np.linalg.norm(expected)
    settled = found.result == lx.RESULTS.singular
    assert bool(settled) == (condition == 1e3)
    assert bool(settled) == (np.linalg.norm(vector - matrix @ found.value) < 1)


@pytest.mark.thorough
@pytest.mark.parametrize("symmetric", [True, False])
def test_gmres_gives_way_where_its_answer_is_too_long(symmetric):
    """Its residual shows nothing: below 1, for an answer of 1e15 if the matrix is symmetric."""
    matrix, vector, inverse = spread(20, 50, 100, symmetric)
    solver = choose_solver(None, jnp.zeros(50), symmetric=False)
    assert isinstance(solver, GuardedGMRES)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    by = lambda solver, b: lx.linear_solve(operator, jnp.asarray(b), solver, throw=False)
    found, expected = by(solver, vector), inverse @ vector
    np.testing.assert_allclose(found.value, expected, rtol=1e-8, atol=1e-9)
    assert found.result == lx.RESULTS.breakdown
    assert np.linalg.norm(by(solver.settings, vector).value) > 2 * np.linalg.norm(expected)


@pytest.mark.thorough
def test_gmres_that_ends_in_time_is_left_alone():
    """Converged, or cut short with a small residual."""
    matrix, vector = of_rank(300, 100)
    solver = choose_solver(None, jnp.zeros(100), symmetric=False)
    assert isinstance(solver, GuardedGMRES)
    short = dataclasses.replace(solver, settings=dataclasses.replace(solver.settings, max_steps=2))
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    for ours in (solver, short):
        found, plain = (
            lx.linear_solve(operator, jnp.asarray(vector), x, throw=False)
            for x in (ours, ours.settings)
        )
        np.testing.assert_array_equal(found.value, plain.value)
        assert found.result == plain.result


def test_products_of_a_solve_from_a_good_start():
    """One for the multiple of the start, whose image is then known, and one for each step.

    `lineax.CG` recomputes the residual after every ten steps.
    """
    matrix, vector = of_rank(300, 30)
    calls = []

    def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.asarray(matrix) @ v

    guess = jnp.asarray(np.linalg.solve(matrix, vector) + 1e-3)
    solver = choose_solver(None, guess, symmetric=True)
    settings = {"symmetric": True, "guess": guess, "shift": jnp.zeros(())}
    solution = jax.jit(lambda b: solve_system(product, b, solver, **settings))(jnp.asarray(vector))
    jax.effects_barrier()
    steps = int(solution.iterations)
    assert len(calls) == 1 + steps + (steps - 1) // 10


@pytest.mark.parametrize(
    "settings", quick([{}, {"stabilise_every": 1}, {"max_steps": 40}], keep=[{}])
)
def test_of_a_regular_matrix_it_is_what_lineax_gives(settings):
    """For a large multiple, where it checks only the residual, not the last move."""
    matrix, vector = of_rank(300, 100)
    tight, large = {"rtol": 1e-12, "atol": 1e-12} | settings, 2.0**14
    operator = lx.MatrixLinearOperator(large * jnp.asarray(matrix), lx.positive_semidefinite_tag)
    theirs = lx.linear_solve(operator, jnp.asarray(vector), lx.CG(**tight), throw=False)
    ours = solve(matrix, vector, **settings)
    np.testing.assert_allclose(ours.value, large * theirs.value, rtol=1e-12, atol=1e-13)
    assert int(ours.stats["num_steps"]) == int(theirs.stats["num_steps"])
    assert ours.result == theirs.result


@pytest.mark.thorough
def test_negative_curvature_never_leaves_more_than_there_was():
    """Conjugate gradients on an indefinite matrix, cut short where their residual is large."""
    random = np.random.default_rng(1)
    rotation = np.linalg.qr(random.normal(size=(80, 80)))[0]
    matrix = rotation @ np.diag(np.linspace(-1, 2, 80)) @ rotation.T
    vector = rotation @ np.ones(80) / np.sqrt(80)
    left, broken = [], []
    for steps in range(1, 40, 9):
        found = solve(matrix, vector, max_steps=steps)
        left.append(np.linalg.norm(vector - matrix @ found.value))
        broken.append(bool(found.result == lx.RESULTS.breakdown))
    assert max(left) <= 1 + 1e-12
    assert any(broken)
    assert not all(broken)


def test_without_curvature_there_is_no_answer_but_0():
    found = solve(np.zeros((3, 3)), np.ones(3))
    np.testing.assert_array_equal(found.value, np.zeros(3))
    assert found.result == lx.RESULTS.singular
    # Nor at a pivot of 0 of a regular matrix.
    found = solve(np.asarray([[0.0, 1.0], [1.0, 0.0]]), np.asarray([1.0, 0.0]))
    np.testing.assert_array_equal(found.value, np.zeros(2))
    assert found.result != lx.RESULTS.successful


# -- several batches ---------------------------------------------------------------------------


def batches(count, features=12, examples=5):
    pairs = [data(seed, features, examples)[0] for seed in range(count)]
    return gradhpo.BatchStack.of(pairs), pairs, data(99, features, examples)[1]


def of_several(pairs, w, h, val):
    """The hypergradient with H and the mixed derivative as means over these batches, in NumPy."""
    loss = lambda w, h: sum(weighted(w, h, pair) for pair in pairs) / len(pairs)
    gradient = jax.grad(loss)
    derivatives = lambda w, h: (
        *jax.jacobian(gradient, (0, 1))(w, h),
        gradient(w, h),
        jax.grad(error)(w, h, val),
    )
    hessian, mixed, residual, alpha = map(np.asarray, jax.jit(derivatives)(w, h))
    return -np.linalg.solve(hessian, alpha) @ mixed, np.linalg.norm(residual)


def test_curvature_of_several_batches_is_their_mean():
    stack, pairs, val = batches(6)
    optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER, lx.LU(), inner_steps=6, curvature_batches=4)
    state = optimizer.init(jnp.ones(12), jnp.zeros(5))
    after = optimizer.step(state, stack, val, weighted, error)
    found = hypergradient(state, after)
    expected, residual = of_several(pairs[2:], after.params, state.hyperparams, val)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(after.get_metric("inner_residual"), residual, rtol=1e-12)
    assert after.get_metric("linear_failures") == 0
    # H of the last batch alone is singular.
    last = dataclasses.replace(optimizer, linear_solver=None, curvature_batches=1)
    assert last.step(state, stack, val, weighted, error).get_metric("linear_failures") == 1


def test_a_fixed_point_of_several_batches():
    stack, pairs, val = batches(6)
    update_fn = lambda w, h, batch: w - 0.01 * jax.grad(weighted)(w, h, batch)
    optimizer = gradhpo.ImplicitOptimizer(
        None, OUTER, lx.LU(), inner_steps=6, curvature_batches=4, update_fn=update_fn
    )
    state = optimizer.init(jnp.ones(12), jnp.zeros(5))
    after = optimizer.step(state, stack, val, weighted, error)
    expected, _ = of_several(pairs[2:], after.params, state.hyperparams, val)
    np.testing.assert_allclose(hypergradient(state, after), expected, rtol=1e-10)


@pytest.mark.thorough
def test_one_batch_for_all_inner_steps_counts_once():
    train, val = data(0, 5, 30)
    one = gradhpo.ImplicitOptimizer(SGD, OUTER, inner_steps=4)
    several = dataclasses.replace(one, curvature_batches=4)
    states = [
        x.step(x.init(jnp.zeros(5), jnp.zeros(30)), train, val, weighted, error)
        for x in (one, several)
    ]
    assert_same(*states)


def test_more_batches_than_inner_steps_are_refused():
    with pytest.raises(
        ValueError, match=r"curvature_batches=4 .* inner_steps=3: write inner_steps=4"
    ):
        gradhpo.ImplicitOptimizer(SGD, inner_steps=3, curvature_batches=4)
    with pytest.raises(ValueError, match="curvature_batches must be at least 1"):
        gradhpo.ImplicitOptimizer(SGD, curvature_batches=0)
    shorter = gradhpo.ImplicitOptimizer(SGD, inner_steps=8, curvature_batches=4).with_num_steps(2)
    assert (shorter.inner_steps, shorter.curvature_batches) == (2, 2)


def test_a_subclass_of_cg_is_used_as_it_is():
    """It may solve differently, or count."""

    class Doubled(lx.CG):
        def compute(self, state, vector, options):
            value, result, stats = super().compute(state, vector, options)
            return jax.tree.map(lambda x: 2 * x, value), result, stats

    zeros = jnp.zeros(3)
    system = {"symmetric": True, "guess": zeros, "shift": jnp.zeros(())}
    product = lambda v: jnp.arange(1.0, 4.0) * v
    value = [
        solve_system(product, jnp.ones(3), solver(1e-12, 1e-12), **system).value
        for solver in (lx.CG, Doubled)
    ]
    np.testing.assert_allclose(value[1], 2 * value[0], rtol=1e-12)  # rounding
