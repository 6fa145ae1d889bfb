"""Neumann and Nystrom against dense linear algebra."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import quick

import gradhpo
from gradhpo.utils.coordinates import num_coordinates, ravel, unit_vector, unravel


def positive(size, seed=0):
    random = np.random.default_rng(seed)
    root = random.normal(size=(size, size))
    return root @ root.T / size + 0.3 * np.eye(size), random.normal(size=size)


def operator_of(matrix, *tags):
    return lx.MatrixLinearOperator(jnp.asarray(matrix), tags or lx.positive_semidefinite_tag)


def solve(matrix, vector, solver, **options):
    return lx.linear_solve(
        operator_of(matrix), jnp.asarray(vector), solver, options=options, throw=False
    )


@pytest.mark.parametrize("terms", [1, 2, 7, 400])
def test_neumann_is_its_partial_sum(terms):
    h, v = positive(5)
    eta, eye = 0.4, np.eye(5)
    expected = np.linalg.solve(h, (eye - np.linalg.matrix_power(eye - eta * h, terms)) @ v)
    found = solve(h, v, gradhpo.Neumann(terms, eta))
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)
    assert found.stats["num_steps"] == terms - 1
    assert found.result == lx.RESULTS.successful


def test_neumann_of_terms_that_grow_before_they_fall():
    a = np.asarray([[0.5, -100.0], [0.0, 0.5]])
    operator, v = lx.MatrixLinearOperator(jnp.asarray(a)), jnp.ones(2)
    found = lx.linear_solve(operator, v, gradhpo.Neumann(12, 1.0), throw=False)
    assert found.result == lx.RESULTS.successful


def test_neumann_that_diverges_says_so():
    h, v = positive(5)
    assert solve(h, v, gradhpo.Neumann(50, 100.0)).result == lx.RESULTS.breakdown


def test_neumann_of_terms_that_are_small_when_they_begin_to_grow():
    """A direction that would eventually diverge contributes little to a series this short."""
    found = solve(np.diag([1.0, 2.2]), [1.0, 0.01], gradhpo.Neumann(3, 1.0))
    np.testing.assert_allclose(found.value, [1.0, 0.01 * (1 - 1.2 + 1.2**2)], rtol=1e-12)
    assert found.result == lx.RESULTS.successful


def test_the_derivative_of_a_neumann_solve_is_the_transposed_series():
    """By the right-hand side; the operator is not symmetric."""
    random = np.random.default_rng(1)
    a, v, bar = np.eye(4) - 0.2 * random.normal(size=(4, 4)), *random.normal(size=(2, 4))
    operator, solver = lx.MatrixLinearOperator(jnp.asarray(a)), gradhpo.Neumann(3, 0.7)
    pull = jax.vjp(lambda v: lx.linear_solve(operator, v, solver).value, jnp.asarray(v))[1]
    step = np.eye(4) - 0.7 * a
    series = 0.7 * (np.eye(4) + step + step @ step)
    np.testing.assert_allclose(pull(jnp.asarray(bar))[0], series.T @ bar, rtol=1e-12)


def test_neumann_of_a_transposed_operator_and_a_tree():
    random = np.random.default_rng(1)
    a, v = np.eye(4) - 0.3 * random.normal(size=(4, 4)) / 2, random.normal(size=4)
    operator = lx.MatrixLinearOperator(jnp.asarray(a))
    found = lx.linear_solve(operator.T, jnp.asarray(v), gradhpo.Neumann(300, 1.0))
    np.testing.assert_allclose(found.value, np.linalg.solve(a.T, v), rtol=1e-10)
    mv = lambda tree: {"x": 2 * tree["x"], "y": 0.5 * tree["y"]}
    tree = {"x": jnp.ones(2), "y": jnp.ones((1, 3))}
    operator = lx.FunctionLinearOperator(mv, jax.eval_shape(lambda: tree))
    found = lx.linear_solve(operator, tree, gradhpo.Neumann(200, 0.5))
    np.testing.assert_allclose(found.value["x"], 0.5)
    np.testing.assert_allclose(found.value["y"], 2.0)


@pytest.mark.thorough
def test_nystrom_of_full_rank_is_the_damped_inverse(getkey):
    h, v = positive(12)
    expected = np.linalg.solve(h + 0.01 * np.eye(12), v)
    found = solve(h, v, gradhpo.Nystrom(12, 0.01, getkey()))
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)
    # The part of the operator that is a multiple of I is known, and adds to the damping.
    shifted = solve(h + 0.2 * np.eye(12), v, gradhpo.Nystrom(12, 0.01, getkey()), shift=0.2)
    expected = np.linalg.solve(h + 0.21 * np.eye(12), v)
    np.testing.assert_allclose(shifted.value, expected, rtol=1e-10)


def test_nystrom_is_its_own_formula_written_out(getkey):
    h, v = positive(12)
    rank, rho = 4, 0.05
    solver = gradhpo.Nystrom(rank, rho, getkey())
    # The columns, found from the required form of a row of the low-rank operator.
    state = solver.init(operator_of(h), {})
    low_rank = np.asarray(state.b.T @ (state.signs[:, None] * state.b))
    chosen = [i for i in range(12) if np.allclose(low_rank[i], h[i], atol=1e-9)]
    assert len(chosen) == rank
    c, m = h[chosen], h[np.ix_(chosen, chosen)]
    expected = v / rho - c.T @ np.linalg.solve(m + c @ c.T / rho, c @ v) / rho**2
    np.testing.assert_allclose(solve(h, v, solver).value, expected, rtol=1e-9)


@pytest.mark.parametrize("sign", quick([1, -1], keep=[-1]))
def test_nystrom_of_dead_units_and_negative_curvature(sign, getkey):
    h, v = positive(6)
    h = sign * h
    h[[1, 4]] = 0
    h[:, [1, 4]] = 0
    expected = np.linalg.solve(h + 0.01 * np.eye(6), v)
    found = solve(h, v, gradhpo.Nystrom(6, 0.01, getkey())).value
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.thorough
def test_nystrom_draws_different_columns(getkey):
    size = 1_000
    seen = set()
    for _ in range(3):
        solver = gradhpo.Nystrom(10, 0.1, getkey())
        diagonal = lx.DiagonalLinearOperator(jnp.arange(1.0, size + 1))
        rows = np.asarray(solver.init(diagonal, {}).b)
        columns = set(np.flatnonzero(np.abs(rows).sum(axis=0)))
        assert len(columns) == 10
        seen |= columns
    assert len(seen) > 20


def test_solvers_refuse_what_they_cannot_do(getkey):
    h, v = positive(3)
    with pytest.raises(ValueError, match="rank cannot be larger; write rank=3"):
        solve(h, v, gradhpo.Nystrom(4, 0.1, getkey()))
    plain = lx.MatrixLinearOperator(jnp.asarray(h))
    with pytest.raises(ValueError, match=r"needs a symmetric operator.*lineax.GMRES"):
        lx.linear_solve(plain, jnp.asarray(v), gradhpo.Nystrom(2, 0.1, getkey()))
    for arguments, message in (((0, 0.1), "terms"), ((2, 0.0), "step_size")):
        with pytest.raises(ValueError, match=message):
            gradhpo.Neumann(*arguments)
    for arguments, message in (((0, 0.1), "rank"), ((2, 0.0), "damping")):
        with pytest.raises(ValueError, match=message):
            gradhpo.Nystrom(*arguments, getkey())


def test_coordinates_are_those_of_the_row():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.asarray(7.0), "c": jnp.arange(2.0)}
    wide = jnp.dtype(jnp.float64)
    row = ravel(tree, wide)
    assert row.shape == (num_coordinates(tree),) == (9,)
    for x, y in zip(jax.tree.leaves(unravel(row, tree)), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(x, y)
    for i in range(9):
        np.testing.assert_array_equal(ravel(unit_vector(i, tree), wide), np.eye(9)[i])
