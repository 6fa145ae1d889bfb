"""Implicit differentiation where H is singular: fewer examples in a batch than parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import relaxed

import gradhpo
from gradhpo.solvers.conjugate import ConjugateGradients


SGD, OUTER = optax.sgd(0.01), optax.sgd(1e-3)


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
    """What the smallest-norm solution gives, in NumPy, and the share of alpha that H sees."""
    (x, y), (v, u) = (tuple(np.asarray(a, np.float64) for a in pair) for pair in (train, val))
    w, weights = np.asarray(w, np.float64), 1 / (1 + np.exp(-np.asarray(h, np.float64)))
    hessian = x.T @ (weights[:, None] * x) / len(y)
    alpha = v.T @ (v @ w - u) / len(u)
    q = np.linalg.pinv(hessian, rcond=1e-10) @ alpha
    unseen = np.linalg.norm(alpha - hessian @ q) / np.linalg.norm(alpha)
    return -weights * (1 - weights) * (x @ w - y) * (x @ q) / len(y), unseen


DEFAULT, CG = None, lx.CG(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "examples", "solver"),
    [(20, 8, DEFAULT), (1_000, 8, DEFAULT), (600, 128, DEFAULT), (50, 8, CG)],
)
def test_a_batch_smaller_than_the_parameters_has_the_smallest_norm_answer(
    features, examples, solver
):
    train, val = data(0, features, examples)
    optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER, solver)
    start = optimizer.init(jnp.zeros(features), jnp.zeros(examples))
    state = optimizer.step(start, train, val, weighted, error)
    found = optimizer.compute_hypergradient(start, train, val, weighted, error)
    expected, unseen = by_pseudo_inverse(state.params, start.hyperparams, train, val)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected)))
    np.testing.assert_allclose(state.get_metric("linear_residual"), unseen, rtol=1e-6)
    assert state.metadata["rejected"] == 0
    assert state.get_metric("linear_failures") == 1
    assert np.all(np.asarray(state.memory.adjoint) == 0)


def test_in_float32_too(as_a_user_has_it):
    """Where lineax.CG goes on for 100 products, to a hypergradient a million times too long."""
    features, examples = 1_000, 32
    train, val = data(1, features, examples, jnp.float32)
    optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER)
    start = optimizer.init(jnp.zeros(features), jnp.zeros(examples))
    state = optimizer.step(start, train, val, weighted, error)
    found = optimizer.compute_hypergradient(start, train, val, weighted, error)
    expected, unseen = by_pseudo_inverse(state.params, start.hyperparams, train, val)
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
    np.testing.assert_allclose(state.get_metric("linear_residual"), unseen, rtol=1e-3)
    assert state.get_metric("linear_failures") == 1


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
    """LU of a matrix that only rounding keeps from being singular; the SVD is made for it."""
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
    found = of(lx.SVD()).compute_hypergradient(start, train, val, weighted, error)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


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


@pytest.mark.parametrize(("rank", "size"), [(1, 2), (4, 5), (8, 50), (60, 200)])
def test_of_a_singular_matrix_it_is_the_pseudo_inverse(rank, size):
    matrix, vector = of_rank(rank, size)
    found = solve(matrix, vector)
    expected = np.linalg.pinv(matrix, rcond=1e-10) @ vector
    assert np.linalg.norm(found.value - expected) < 1e-6 * np.linalg.norm(expected)
    assert found.result == lx.RESULTS.singular
    # With a right-hand side in the range there is nothing amiss.
    inside = matrix @ vector
    consistent = solve(matrix, inside)
    assert consistent.result == lx.RESULTS.successful
    expected = np.linalg.pinv(matrix, rcond=1e-10) @ inside
    np.testing.assert_allclose(consistent.value, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{}, {"max_steps": 3}, {"stabilise_every": 1}, {"max_steps": 40}]
)
def test_of_a_regular_matrix_it_is_what_lineax_gives(settings):
    """Of a large multiple, for which it looks at the residual alone, and not at the last move."""
    matrix, vector = of_rank(300, 100)
    tight, large = {"rtol": 1e-12, "atol": 1e-12} | settings, 2.0**14
    operator = lx.MatrixLinearOperator(large * jnp.asarray(matrix), lx.positive_semidefinite_tag)
    theirs = lx.linear_solve(operator, jnp.asarray(vector), lx.CG(**tight), throw=False)
    ours = solve(matrix, vector, **settings)
    np.testing.assert_allclose(ours.value, large * theirs.value, rtol=1e-12, atol=1e-13)
    assert int(ours.stats["num_steps"]) == int(theirs.stats["num_steps"])
    assert ours.result == theirs.result


def test_negative_curvature_never_leaves_more_than_there_was():
    """Conjugate gradients of an indefinite matrix, cut short where their residual is large."""
    random = np.random.default_rng(1)
    rotation = np.linalg.qr(random.normal(size=(80, 80)))[0]
    matrix = rotation @ np.diag(np.linspace(-1, 2, 80)) @ rotation.T
    vector = rotation @ np.ones(80) / np.sqrt(80)
    left, broken = [], []
    for steps in range(1, 40, 3):
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
    # Nor at a pivot of 0, of a matrix that is regular.
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
    hessian = np.asarray(jax.hessian(loss)(w, h))
    mixed = np.asarray(jax.jacobian(jax.grad(loss), 1)(w, h))
    alpha = np.asarray(jax.grad(error)(w, h, val))
    return -np.linalg.solve(hessian, alpha) @ mixed, np.linalg.norm(jax.grad(loss)(w, h))


def test_curvature_of_several_batches_is_their_mean():
    stack, pairs, val = batches(6)
    optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER, lx.LU(), inner_steps=6, curvature_batches=4)
    state = optimizer.init(jnp.ones(12), jnp.zeros(5))
    found = optimizer.compute_hypergradient(state, stack, val, weighted, error)
    after = optimizer.step(state, stack, val, weighted, error)
    expected, residual = of_several(pairs[2:], after.params, state.hyperparams, val)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(after.get_metric("inner_residual"), residual, rtol=1e-12)
    assert after.get_metric("linear_failures") == 0
    # Of the last batch alone H is singular.
    last = dataclasses.replace(optimizer, linear_solver=None, curvature_batches=1)
    assert last.step(state, stack, val, weighted, error).get_metric("linear_failures") == 1


def test_a_fixed_point_of_several_batches():
    stack, pairs, val = batches(6)
    update_fn = lambda w, h, batch: w - 0.01 * jax.grad(weighted)(w, h, batch)
    optimizer = gradhpo.ImplicitOptimizer(
        update_fn=update_fn, linear_solver=lx.LU(), inner_steps=6, curvature_batches=4
    )
    state = optimizer.init(jnp.ones(12), jnp.zeros(5))
    found = optimizer.compute_hypergradient(state, stack, val, weighted, error)
    after = optimizer.step(state, stack, val, weighted, error, lr_hyper=0.0)
    expected, _ = of_several(pairs[2:], after.params, state.hyperparams, val)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


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
