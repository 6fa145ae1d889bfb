"""Implicit differentiation at the solution of a foreign solver."""

import warnings

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix
import pytest
from helpers import assert_same, quick
from sklearn.linear_model import Lasso, LogisticRegression
from test_implicit import TIGHT, data, logistic, ridge

import gradhpo
from gradhpo.extend import solve_system


OUTER = optax.sgd(0.1)
X, Y, V, U, _ = data()
TRAIN, VAL = (jnp.asarray(X), jnp.asarray(Y)), (jnp.asarray(V), jnp.asarray(U))


def fit(w, h, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2


def penalised(w, h, batch):
    return fit(w, h, batch) + jnp.sum(jnp.exp(h) * w**2) / 2


LOSSES = gradhpo.LossFunctions(penalised, fit)


def by_numpy(w, h, batch):
    """The ridge solution, in a callback that cannot be differentiated."""
    x, y = batch
    a = x.T @ x / y.size + jnp.diag(jnp.exp(h))
    solve = lambda a, b: np.linalg.solve(a, b[..., None])[..., 0]
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)
    return jax.pure_callback(solve, like, a, x.T @ y / y.size, vmap_method="broadcast_all")


def solved(inner_solver=by_numpy, outer_optimizer=OUTER, **settings):
    settings = {"linear_solver": lx.LU()} | settings
    return gradhpo.ImplicitOptimizer(
        outer_optimizer=outer_optimizer, inner_solver=inner_solver, **settings
    )


SOLVED = solved()


def started(optimizer=SOLVED, h=0.0):
    return optimizer.init(jnp.zeros(5), jnp.full(5, h))


def closed(h=0.0):
    """The solution, and the hypergradient there."""
    a = X.T @ X / len(Y) + np.exp(h) * np.eye(5)
    w = np.linalg.solve(a, X.T @ Y / len(Y))
    return w, -np.exp(h) * w * np.linalg.solve(a, V.T @ (V @ w - U) / len(U))


# -- what solvers find -----------------------------------------------------------------------------


def test_a_callback_is_differentiated_by_the_training_loss():
    w, expected = closed()
    state = SOLVED.step(started(), TRAIN, VAL, LOSSES)
    assert state.inner_opt_state == ()
    # Two direct solves of a system with a condition number below 100.
    np.testing.assert_allclose(state.params, w, rtol=1e-12)
    np.testing.assert_allclose(state.hyperparams, -0.1 * expected, rtol=1e-11)
    # The metrics are those at the solution, and its residual is rounding.
    np.testing.assert_allclose(
        state.metadata["train_loss"], penalised(state.params, jnp.zeros(5), TRAIN), rtol=1e-12
    )
    assert state.get_metric("inner_residual") < 1e-13
    assert state.get_metric("optimality_gap") < 1e-13


def test_by_optimistix():
    problem = logistic()

    def solve(w, h, batch):
        solver = optimistix.BFGS(rtol=1e-12, atol=1e-12)
        loss = lambda w, h: problem.train_loss(w, h, batch)
        return optimistix.minimise(loss, solver, w, h, max_steps=1_000).value

    check_against(problem, solve)


@pytest.mark.thorough
def test_by_lbfgs_in_a_loop_until_it_converges():
    problem = ridge()

    def solve(w, h, batch):
        method, value = optax.lbfgs(), lambda w: problem.train_loss(w, h, batch)
        look = optax.value_and_grad_from_state(value)

        def step(carry):
            w, s, _ = carry
            loss, gradient = look(w, state=s)
            more = {"value": loss, "grad": gradient, "value_fn": value}
            updates, s = method.update(gradient, s, w, **more)
            return optax.apply_updates(w, updates), s, jnp.linalg.norm(gradient)

        goes_on = lambda carry: carry[2] > 1e-11
        return jax.lax.while_loop(goes_on, step, (w, method.init(w), jnp.inf))[0]

    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and numbers
        check_against(problem, solve)


@pytest.mark.thorough
def test_by_scikit_learn():
    problem = logistic()
    x, y, _, _, _ = data(2)
    labels = y > 0

    def solve(w, h, batch):
        # sum of losses + |w|^2 / (2 C) is 30 times ours with one penalty for all, here by features.
        def call(penalties):
            scale = np.sqrt(penalties)
            fitted = LogisticRegression(
                C=1 / 30, fit_intercept=False, solver="newton-cholesky", tol=1e-12
            )
            return fitted.fit(x / scale, labels).coef_[0] / scale

        return jax.pure_callback(call, jax.ShapeDtypeStruct(w.shape, w.dtype), h["l2"])

    check_against(problem, solve)


def check_against(problem, solve):
    """To a solver's tolerance, times the condition of H."""
    optimizer = solved(solve)
    state = optimizer.init(jnp.zeros(5), jax.tree.map(jnp.asarray, problem.hyperparams))
    arguments = state, None, None, problem.train_loss, problem.val_loss
    np.testing.assert_allclose(optimizer.step(*arguments).params, problem.w, rtol=1e-8, atol=1e-9)
    [(name, expected)] = problem.expected.items()
    found = optimizer.compute_hypergradient(*arguments)[name]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


def lasso(w, h, batch):
    """Scikit-learn's, whose loss is ours: |Xw - y|^2 / (2 n) + alpha |w|_1."""

    def call(x, y, alpha):
        fitted = Lasso(alpha=float(alpha), fit_intercept=False, tol=1e-14, max_iter=100_000)
        return fitted.fit(x, y).coef_

    like = jax.ShapeDtypeStruct(w.shape, w.dtype)
    return jax.pure_callback(call, like, *batch, jnp.exp(h), vmap_method="sequential")


def proximal(w, h, batch):
    w = w - 0.3 * jax.grad(fit)(w, h, batch)
    return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - 0.3 * jnp.exp(h))


@pytest.mark.thorough
def test_the_lasso_by_the_equation_of_its_fixed_point():
    optimizer = solved(lasso, update_fn=proximal)
    h = np.log(0.5)
    state = optimizer.init(jnp.zeros(5), jnp.asarray(h))
    found = optimizer.compute_hypergradient(state, TRAIN, VAL, fit, fit)
    after = optimizer.step(state, TRAIN, VAL, fit, fit)
    assert after.get_metric("inner_residual") < 1e-12  # coordinate descent, to its tolerance
    w = np.asarray(after.params)
    active = w != 0
    assert 0 < active.sum() < 5
    x, v = X[:, active], V[:, active]
    slope = -np.linalg.solve(x.T @ x / 30, np.sign(w[active])) * np.exp(h)
    # Both are exact at this w, which is the solution to 1e-12.
    np.testing.assert_allclose(found, (v @ w[active] - U) @ v @ slope / 20, rtol=1e-8)


def sparse(features, active, examples=400, alpha=0.1):
    """A lasso with a known solution: the data follow from the signs on its support."""
    random = np.random.default_rng(0)
    x = random.normal(size=(examples, features)) * np.where(np.arange(features) < active, 1, 0.5)
    w = np.where(np.arange(features) < active, random.choice([-1.0, 1.0], features), 0)
    on, signs = x[:, :active], w[:active]
    left = examples * alpha * on @ np.linalg.solve(on.T @ on, signs)
    assert np.max(np.abs(x[:, active:].T @ left)) < examples * alpha  # so that they stay out
    slope = -alpha * np.linalg.solve(on.T @ on / examples, signs)
    return (jnp.asarray(x), jnp.asarray(x @ w + left)), jnp.asarray(w), slope


@pytest.mark.parametrize(("features", "active"), quick([(60, 5), (10_000, 50)], keep=[(60, 5)]))
def test_only_the_support_of_a_sparse_solution_is_solved(features, active):
    batch, w, slope = sparse(features, active)
    known = lambda params, h, batch: w
    toward = jnp.asarray(np.random.default_rng(1).normal(size=features))
    val_loss = lambda w, h, batch: jnp.sum((w - toward) ** 2) / 2
    h = jnp.log(jnp.asarray(0.1))
    expected = np.sum((np.asarray(w - toward))[:active] * slope)
    found = {}
    for most in (active, active - 1):
        support = gradhpo.Support(max_active=most)
        optimizer = solved(known, update_fn=proximal, linear_solver=support)
        state = optimizer.init(jnp.zeros(features), h)
        found[most] = optimizer.step(state, batch, None, fit, val_loss)
    end = found[active]
    assert end.get_metric("inner_residual") < 1e-12
    # A direct solve of a system with a condition number below 10.
    np.testing.assert_allclose(end.hyperparams, h - 0.1 * expected, rtol=1e-8)
    assert end.get_metric("linear_failures") == 0
    assert end.get_metric("linear_residual") < 1e-10
    assert end.get_metric("linear_iterations") == active
    assert found[active - 1].get_metric("linear_failures") == 1


@pytest.mark.thorough
def test_support_is_for_fixed_points_with_zeros_that_stay():
    state = started()
    for settings in ({}, {"update_fn": lambda w, h, b: w - 0.1 * jax.grad(penalised)(w, h, b)}):
        optimizer = solved(lambda w, h, batch: w, linear_solver=gradhpo.Support(5), **settings)
        after = optimizer.step(state, TRAIN, VAL, LOSSES)  # all are 0, and none of them stays
        assert after.get_metric("linear_failures") == 1
    system = {"symmetric": False, "guess": jnp.zeros(3), "shift": jnp.zeros(())}
    with pytest.raises(ValueError, match="which parameters are 0"):
        solve_system(lambda v: v, jnp.ones(3), gradhpo.Support(3), **system)


def test_a_gradient_written_by_hand_beside_it():
    """Decay that is not in the loss: the equation is that of `grad_fn`."""
    h = jnp.zeros(5)
    decayed = lambda w, h, batch: jax.grad(fit)(w, h, batch) + jnp.exp(h) * w
    state = SOLVED.init(jnp.zeros(5), h)
    found = solved(grad_fn=decayed).compute_hypergradient(state, TRAIN, VAL, fit, fit)
    np.testing.assert_allclose(found, closed()[1], rtol=1e-11)


@pytest.mark.thorough
def test_it_starts_from_the_current_parameters():
    """And is called once: one step of gradient descent is a valid solver."""
    descend = lambda w, h, batch: w - 0.1 * jax.grad(penalised)(w, h, batch)
    optimizer = solved(descend)
    by_optax = gradhpo.ImplicitOptimizer(optax.sgd(0.1), OUTER, lx.LU())
    state, other = started(optimizer), started(by_optax)
    for _ in range(3):
        state = optimizer.step(state, TRAIN, VAL, LOSSES)
        other = by_optax.step(other, TRAIN, VAL, LOSSES)
    np.testing.assert_allclose(state.params, other.params, rtol=1e-12)
    np.testing.assert_allclose(state.hyperparams, other.hyperparams, rtol=1e-12)


@pytest.mark.thorough
def test_running_state():
    """A solver of models with a state returns the state at its solution too."""

    def loss(w, h, batch, r):
        return penalised(w, h, batch), 0.5 * r + 0.5 * jnp.sum(w)

    solve = lambda w, h, batch, r: ((new := by_numpy(w, h, batch)), 2 * jnp.sum(new) - r)
    val_loss = lambda w, h, batch, r: fit(w, h, batch) + r**2
    optimizer = solved(solve)
    w, _ = closed()
    state = optimizer.init(jnp.zeros(5), jnp.zeros(5), model_state=jnp.asarray(np.sum(w)))
    state = optimizer.step(state, TRAIN, VAL, loss, val_loss)
    np.testing.assert_allclose(state.model_state, np.sum(w), rtol=1e-12)
    a = X.T @ X / 30 + np.eye(5)
    alpha = V.T @ (V @ w - U) / 20 + 2 * np.sum(w)  # the state settles at the sum of w
    np.testing.assert_allclose(state.hyperparams, 0.1 * w * np.linalg.solve(a, alpha), rtol=1e-9)
    stateless = solved(lambda w, h, batch, r: by_numpy(w, h, batch))
    with pytest.raises(ValueError, match=r"inner_solver got a model state.*\(params, new_model"):
        stateless.compute_hypergradient(state, TRAIN, VAL, loss, val_loss)


# -- other features --------------------------------------------------------------------------------


def test_a_run_is_its_steps_and_goes_on_from_a_checkpoint(tmp_path):
    state = started()
    run = lambda steps, solver=SOLVED, **settings: gradhpo.run(
        solver, state, LOSSES, TRAIN, VAL, num_steps=steps, progress=False, **settings
    )
    end, history = run(4)
    by_hand = state
    for _ in range(4):
        by_hand = SOLVED.step(by_hand, TRAIN, VAL, LOSSES)
    np.testing.assert_allclose(end.hyperparams, by_hand.hyperparams, rtol=1e-12)
    assert history["val_loss"][-1] < history["val_loss"][0]
    run(2, checkpoint=tmp_path / "kept", chunk_size=2)
    resumed, _ = run(4, checkpoint=tmp_path / "kept", chunk_size=2)
    assert_same(resumed.hyperparams, end.hyperparams, rtol=1e-14)
    with pytest.raises(ValueError, match="inner_solver"):
        run(6, solved(lambda w, h, batch: w), checkpoint=tmp_path / "kept")


@pytest.mark.thorough
def test_tasks_and_populations():
    """Both map it: the callback says how by `vmap_method`."""
    tasks = gradhpo.TaskBatched(SOLVED, num_tasks=2)
    pairs = [jax.tree.map(lambda x: jnp.stack([x, 2 * x]), batch) for batch in (TRAIN, VAL)]
    state = tasks.init(jnp.zeros(5), jnp.zeros(5))
    found = tasks.compute_hypergradient(state, *pairs, LOSSES)
    of = lambda i: [jax.tree.map(lambda x: x[i], pair) for pair in pairs]
    alone = [SOLVED.compute_hypergradient(started(), *of(i), LOSSES) for i in range(2)]
    np.testing.assert_allclose(found, (alone[0] + alone[1]) / 2, rtol=1e-12)
    population = gradhpo.Population(SOLVED, num_members=2)
    state = population.init(jnp.zeros((2, 5)), jnp.stack([jnp.zeros(5), jnp.ones(5)]))
    state = population.step(state, TRAIN, VAL, LOSSES)
    expected = [h - 0.1 * closed(h)[1] for h in (0.0, 1.0)]
    np.testing.assert_allclose(state.hyperparams, expected, rtol=1e-10)


@pytest.mark.thorough
def test_diagnostics_that_need_no_path():
    arguments = started(), TRAIN, VAL
    report = gradhpo.check_hypergradient(SOLVED, *arguments, LOSSES)
    assert report.verdict == "trusted"
    assert report.healthy
    [check] = report.finite_differences.values()
    assert not check.contradicts
    # Solves with another penalty: differences of the solutions contradict the equation.
    wrong = solved(lambda w, h, batch: by_numpy(w, 0.3 * h, batch))
    report = gradhpo.check_hypergradient(wrong, started(wrong, 1.0), TRAIN, VAL, LOSSES)
    assert report.verdict != "trusted"
    assert any("inner_solver has not solved its equation" in text for text in report.findings)
    exact = gradhpo.finite_difference_hypergradient(SOLVED, *arguments, penalised, fit)
    np.testing.assert_allclose(exact, closed()[1], rtol=1e-7)  # central differences
    compared = gradhpo.compare_hypergradients(
        {"solved": SOLVED}, *arguments, LOSSES, reference=exact
    )
    assert compared.cosine["solved"] > 1 - 1e-12
    planned = gradhpo.plan({"solved": SOLVED}, *arguments, LOSSES, horizons=[1, 10])
    assert [row.num_steps for row in planned.rows] == [1]


def test_what_goes_along_a_path_says_that_there_is_none():
    arguments = SOLVED, started(), TRAIN, VAL, LOSSES
    with pytest.raises(ValueError, match=r"replay differentiates a path.*not differentiated"):
        gradhpo.replay(*arguments, num_steps=2, progress=False)
    with pytest.raises(ValueError, match="explain_horizon differentiates a path"):
        gradhpo.explain_horizon(*arguments)
    with pytest.raises(ValueError, match=r"pass reference=.*inner_solver is called and not"):
        gradhpo.compare_hypergradients({"solved": SOLVED}, *arguments[1:])
    of = lambda h: SOLVED.compute_hypergradient(arguments[1].update(hyperparams=h), *arguments[2:])
    for jacobian in (jax.jacfwd, jax.jacrev):
        with pytest.raises(ValueError, match="inner_solver is called and not differentiated"):
            jacobian(of)(jnp.zeros(5))


def test_a_solver_that_stops_early_is_reported():
    short = solved(lambda w, h, batch: w - 0.01 * jax.grad(penalised)(w, h, batch))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, history = gradhpo.run(
            short, started(short), LOSSES, TRAIN, VAL, num_steps=4, progress=False
        )
    assert history["inner_residual"][-1] > 0.1  # from 0, by four steps of 0.01
    assert "tighter tolerances and more iterations in inner_solver" in history.report
    assert any("optimality_gap" in str(warning.message) for warning in caught)


def test_hyperparameters_that_its_equation_lacks_are_named():
    state = SOLVED.init(jnp.zeros(5), jnp.zeros(5))
    with pytest.raises(ValueError, match="sees none of the hyperparameters"):
        SOLVED.compute_hypergradient(state, TRAIN, VAL, fit, fit)


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"inner_optimizer": optax.sgd(0.1)}, ValueError, "both inner_optimizer and inner_solver"),
        ({"inner_steps": 5}, ValueError, "called once per step"),
        ({"grad_fn": penalised, "update_fn": proximal}, ValueError, "either alone defines the eq"),
        ({"inner_solver": 3}, TypeError, "inner_solver must be a function, got 3.*optimistix"),
    ],
)
def test_settings_that_contradict_each_other(settings, error, said):
    with pytest.raises(error, match=said):
        gradhpo.ImplicitOptimizer(**({"inner_solver": by_numpy} | settings))


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (lambda w, h, batch: w[:3], "inner_solver must return params of the structure and shapes"),
        (lambda w, h, batch: {"w": w}, "inner_solver must return params of the structure"),
        (lambda w, h, batch: (w, 3), "return the new params alone"),
        (lambda w, h, batch: w.astype(jnp.float32), "of the dtypes that it got"),
        (lambda w, h: w, r"inner_solver .*batch"),
    ],
)
def test_what_a_solver_must_return(solver, said):
    with pytest.raises((ValueError, TypeError), match=said):
        solved(solver).compute_hypergradient(started(), TRAIN, VAL, LOSSES)


@pytest.mark.thorough
def test_an_iterative_linear_solver_starts_warm_as_ever():
    optimizer = solved(linear_solver=lx.CG(**TIGHT))
    state = optimizer.step(started(optimizer), TRAIN, VAL, LOSSES)
    first = state.get_metric("linear_iterations")
    again = optimizer.step(state.update(hyperparams=jnp.zeros(5)), TRAIN, VAL, LOSSES)
    assert again.get_metric("linear_iterations") < first
