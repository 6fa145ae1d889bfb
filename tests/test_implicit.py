"""Implicit differentiation against the closed forms of the inner optimum."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import quick

import gradhpo
from benchmarks.costs.methods import iterations
from benchmarks.costs.problem import job


class Closed(NamedTuple):
    """A problem at its inner optimum, and the derivative of the outer loss there."""

    w: np.ndarray
    hyperparams: dict
    train_loss: object
    val_loss: object
    expected: dict
    rate: float  # of a convergent Neumann series, 1 / largest curvature


def data(seed=0, features=5):
    random = np.random.default_rng(seed)
    x, v = random.normal(size=(30, features)), random.normal(size=(20, features))
    truth = random.normal(size=features)
    y, u = x @ truth + random.normal(size=30), v @ truth + random.normal(size=20)
    return x, y, v, u, random


def half_mse(x, y):
    x, y = jnp.asarray(x), jnp.asarray(y)
    return lambda w, h, batch: jnp.mean((x @ w - y) ** 2) / 2


def ridge():
    """Section 8.1: one penalty per feature."""
    x, y, v, u, random = data()
    penalty = np.exp(random.normal(size=5) - 1)
    a = x.T @ x / 30 + np.diag(penalty)
    w = np.linalg.solve(a, x.T @ y / 30)
    q = np.linalg.solve(a, v.T @ (v @ w - u) / 20)
    fit = half_mse(x, y)
    train_loss = lambda w, h, batch: fit(w, h, batch) + jnp.sum(jnp.exp(h["log"]) * w**2) / 2
    return Closed(
        w,
        {"log": np.log(penalty)},
        train_loss,
        half_mse(v, u),
        {"log": -penalty * q * w},
        1 / np.linalg.eigvalsh(a)[-1],
    )


def quadratic():
    """Section 8.2, with a direct term."""
    random = np.random.default_rng(1)
    root, j, c = random.normal(size=(4, 4)), random.normal(size=(4, 3)), random.normal(size=4)
    h, q_matrix = root @ root.T / 4 + 0.3 * np.eye(4), np.diag([1.0, 2.0, 3.0, 4.0])
    a, target, rho = random.normal(size=3), random.normal(size=4), 0.7
    w = np.linalg.solve(h, j @ a + c)
    expected = rho * a + j.T @ np.linalg.solve(h, q_matrix @ (w - target))
    hj, jj, cj, qj, tj = map(jnp.asarray, (h, j, c, q_matrix, target))
    train_loss = lambda w, a, batch: w @ hj @ w / 2 - w @ (jj @ a["a"] + cj)
    val_loss = lambda w, a, batch: (w - tj) @ qj @ (w - tj) / 2 + rho * jnp.sum(a["a"] ** 2) / 2
    rate = 1 / np.linalg.eigvalsh(h)[-1]
    return Closed(w, {"a": a}, train_loss, val_loss, {"a": expected}, rate)


def logistic():
    """Section 8.5: Newton's method to the optimum."""
    x, y, v, u, random = data(2)
    y, u, penalty = (y > 0) * 1.0, (u > 0) * 1.0, np.exp(random.normal(size=5) - 1)
    w = np.zeros(5)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = x.T @ ((p * (1 - p))[:, None] * x) / 30 + np.diag(penalty)
        w = w - np.linalg.solve(hessian, x.T @ (p - y) / 30 + penalty * w)
    q = np.linalg.solve(hessian, v.T @ (1 / (1 + np.exp(-v @ w)) - u) / 20)

    def cross_entropy(x, y):
        x, y = jnp.asarray(x), jnp.asarray(y)
        return lambda w, h, batch: jnp.mean(optax.sigmoid_binary_cross_entropy(x @ w, y))

    fit = cross_entropy(x, y)
    train_loss = lambda w, h, batch: fit(w, h, batch) + jnp.sum(h["l2"] * w**2) / 2
    rate = 1 / np.linalg.eigvalsh(hessian)[-1]
    return Closed(w, {"l2": penalty}, train_loss, cross_entropy(v, u), {"l2": -q * w}, rate)


def cleaning():
    """Section 8.6: one weight per training example."""
    x, y, v, u, random = data(3)
    a, c = random.normal(size=30), 0.1
    s = 1 / (1 + np.exp(-a))
    hessian = x.T @ (s[:, None] * x) / 30 + c * np.eye(5)
    w = np.linalg.solve(hessian, x.T @ (s * y) / 30)
    q = np.linalg.solve(hessian, v.T @ (v @ w - u) / 20)
    xj, yj = jnp.asarray(x), jnp.asarray(y)

    def train_loss(w, h, batch):
        weighted = jax.nn.sigmoid(h["a"]) * (xj @ w - yj) ** 2
        return jnp.mean(weighted) / 2 + c * jnp.sum(w**2) / 2

    expected = {"a": -s * (1 - s) * (x @ w - y) * (x @ q) / 30}
    rate = 1 / np.linalg.eigvalsh(hessian)[-1]
    return Closed(w, {"a": a}, train_loss, half_mse(v, u), expected, rate)


def at(problem, optimizer):
    as_arrays = jax.tree.map(jnp.asarray, problem.hyperparams)
    state = optimizer.init(jnp.asarray(problem.w), as_arrays)
    return state, None, None, problem.train_loss, problem.val_loss


# Created once: tests of the same functions share compiled programs.
SGD, OUTER = optax.sgd(1e-3), optax.sgd(0.1)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("make", quick([ridge, quadratic, logistic, cleaning], keep=[ridge]))
def test_closed_forms_with_every_kind_of_solver(make):
    problem = make()
    solvers = [
        lx.CG(**TIGHT),
        lx.GMRES(**TIGHT),
        lx.LU(),
        lx.Cholesky(),
        gradhpo.Neumann(3_000, problem.rate),
        None,
    ]
    [(name, expected)] = problem.expected.items()
    for solver in solvers:
        optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER, linear_solver=solver)
        found = optimizer.compute_hypergradient(*at(problem, optimizer))[name]
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10, err_msg=str(solver))
    # Damping, and a full-rank Nystrom approximation, which is only damping.
    damped = gradhpo.ImplicitOptimizer(SGD, OUTER, lx.LU(), damping=0.03)
    nystrom = gradhpo.Nystrom(len(problem.w), 0.01, jax.random.key(0))
    both = gradhpo.ImplicitOptimizer(SGD, OUTER, nystrom, damping=0.02)
    expected, found = (o.compute_hypergradient(*at(problem, o))[name] for o in (damped, both))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@functools.cache
def proximal():
    """Section 8.4: the step of ISTA, its rate for l2 up to 0.1, the losses, the data."""
    x, y, v, u, _ = data(4, features=8)
    a, b = x.T @ x / 30, x.T @ y / 30
    rate = 1 / (np.linalg.eigvalsh(a)[-1] + 0.1)
    aj, bj = jnp.asarray(a), jnp.asarray(b)

    def step(w, h, batch):
        moved = w - rate * (aj @ w - bj + h["l2"] * w)
        return jnp.sign(moved) * jax.nn.relu(jnp.abs(moved) - rate * h["l1"])

    return step, rate, half_mse(x, y), half_mse(v, u), (a, b, v, u)


def elastic_net(l1, l2):
    """With penalties for each feature: ISTA to the optimum, in NumPy."""
    step, rate, loss, val_loss, (a, b, v, u) = proximal()
    w = np.zeros(8)
    for _ in range(5_000):
        moved = w - rate * (a @ w - b + l2 * w)
        w = np.sign(moved) * np.maximum(np.abs(moved) - rate * l1, 0)
    s = w != 0
    q = np.zeros(8)
    q[s] = np.linalg.solve((a + np.diag(l2))[np.ix_(s, s)], (v.T @ (v @ w - u) / 20)[s])
    expected = {"l1": -q * np.sign(w), "l2": -q * w}
    return Closed(w, {"l1": l1, "l2": l2}, loss, val_loss, expected, rate), step, s


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_lasso_and_elastic_net_through_a_proximal_step(l2):
    problem, step, support = elastic_net(np.full(8, 0.25), np.full(8, l2))
    assert 0 < support.sum() < 8
    for solver in (None, lx.GMRES(**TIGHT), lx.LU(), gradhpo.Neumann(3_000, 1.0)):
        optimizer = gradhpo.ImplicitOptimizer(None, OUTER, linear_solver=solver, update_fn=step)
        found = optimizer.compute_hypergradient(*at(problem, optimizer))
        for name, expected in problem.expected.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-8, atol=1e-10)
            assert np.all(np.asarray(found[name])[~support] == 0)


@pytest.mark.thorough
def test_one_neumann_term_is_one_step_with_the_mixed_derivative_at_the_end():
    problem = cleaning()
    w, eta = jnp.asarray(problem.w) + 0.3, 0.05
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(eta), optax.sgd(0.1), gradhpo.Neumann(1, eta), inner_steps=3
    )
    state, *rest = at(problem._replace(w=np.asarray(w)), optimizer)
    found = optimizer.compute_hypergradient(state, *rest)["a"]
    for _ in range(3):
        w = w - eta * jax.grad(problem.train_loss)(w, state.hyperparams, None)
    alpha = jax.grad(problem.val_loss)(w, state.hyperparams, None)
    along = lambda h: jnp.vdot(alpha, jax.grad(problem.train_loss)(w, h, None))
    np.testing.assert_allclose(found, -eta * jax.grad(along)(state.hyperparams)["a"], rtol=1e-10)


@pytest.mark.thorough
def test_metrics_tell_how_far_from_the_optimum_and_how_well_the_system_was_solved():
    problem = ridge()
    start = problem._replace(w=problem.w + 1.0)
    residuals = []
    for steps in (1, 10, 300):
        optimizer = gradhpo.ImplicitOptimizer(
            optax.sgd(0.3),
            optax.sgd(0.0),
            lx.CG(rtol=1e-9, atol=1e-9, max_steps=3),
            inner_steps=steps,
        )
        state = optimizer.step(*at(start, optimizer))
        gradient = jax.grad(problem.train_loss)(state.params, state.hyperparams, None)
        metrics = vars(state.memory)
        np.testing.assert_allclose(metrics["inner_residual"], jnp.linalg.norm(gradient), rtol=1e-9)
        residuals.append(float(metrics["inner_residual"]))
        # Three iterations in five dimensions: cut short, which is not a failure.
        assert metrics["linear_iterations"] == 3
        assert metrics["linear_failures"] == 0
        hessian = jax.hessian(problem.train_loss)(state.params, state.hyperparams, None)
        alpha = jax.grad(problem.val_loss)(state.params, state.hyperparams, None)
        left = jnp.linalg.norm(alpha - hessian @ metrics["adjoint"]) / jnp.linalg.norm(alpha)
        np.testing.assert_allclose(metrics["linear_residual"], left, rtol=1e-9)
        change = jnp.abs(jnp.vdot(metrics["adjoint"], gradient)) / state.metadata["val_loss"]
        np.testing.assert_allclose(metrics["optimality_gap"], change, rtol=1e-9)
        assert left > 1e-6
    assert residuals[0] > 10 * residuals[1] > 100 * residuals[2]


@pytest.mark.thorough
def test_training_that_does_not_converge_is_reported():
    """A penalty makes H regular, so the system has a solution, but it is meaningless."""
    random = np.random.default_rng(9)
    x, v, truth = *random.normal(size=(2, 200, 10)), random.normal(size=10)
    train, val = (x, x @ truth + random.normal(size=200) / 2), (v, v @ truth)
    error = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    ridge = lambda w, h, batch: error(w, h, batch) + jnp.exp(h) * jnp.sum(w**2) / 2
    losses = gradhpo.LossFunctions(ridge, error)

    def reported(rate, steps, batch_size):
        optimizer = gradhpo.ImplicitOptimizer(optax.sgd(rate), optax.sgd(1e-4), inner_steps=steps)
        state = optimizer.init(jnp.zeros(10), jnp.asarray(-3.0))
        source = gradhpo.ArrayData(train, batch_size, jax.random.key(1)) if batch_size else train
        settings = {"num_steps": 4, "progress": False}
        _, history = gradhpo.run(optimizer, state, losses, source, val, **settings)
        assert history["linear_failures"][-1] == 0
        return "Training has not converged" in history.report

    assert not reported(0.1, 100, None)
    for case in ((0.02, 300, 5), (1e-4, 5, None)):
        with pytest.warns(RuntimeWarning, match=r"validation loss by \d+%.*more inner_steps"):
            assert reported(*case)


@pytest.mark.thorough
def test_a_penalty_does_not_make_a_small_batch_representative():
    """The figures of docs/implicit.md: ten draws of batches of 5 for 10 parameters."""
    random = np.random.default_rng(9)
    x, v, truth = *random.normal(size=(2, 200, 10)), random.normal(size=10)
    y, val = x @ truth + random.normal(size=200) / 2, (v, v @ truth)
    error = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    ridge = lambda w, h, batch: error(w, h, batch) + jnp.sum(jnp.exp(h) * w**2) / 2
    h = jnp.full(10, -3.0)

    def at_the_optimum(h):
        return error(jnp.linalg.solve(x.T @ x / 200 + jnp.diag(jnp.exp(h)), x.T @ y / 200), h, val)

    exact = jax.grad(at_the_optimum)(h)

    def found(rate, batch):
        optimizer = gradhpo.ImplicitOptimizer(optax.sgd(rate), inner_steps=300)
        state = optimizer.init(jnp.zeros(10), h)
        return optimizer.compute_hypergradient(state, batch, val, ridge, error)

    np.testing.assert_allclose(found(0.1, (x, y)), exact, rtol=1e-6)
    lengths, cosines = [], []
    for seed in range(10):
        drawn = np.random.default_rng(seed).integers(0, 200, (300, 5))
        g = found(0.02, gradhpo.BatchStack((jnp.asarray(x[drawn]), jnp.asarray(y[drawn]))))
        lengths.append(jnp.linalg.norm(g) / jnp.linalg.norm(exact))
        cosines.append(g @ exact / jnp.linalg.norm(g) / jnp.linalg.norm(exact))
    np.testing.assert_allclose([min(lengths), max(lengths)], [8.5, 32.5], rtol=0.02)
    np.testing.assert_allclose([min(cosines), max(cosines)], [0.21, 0.95], atol=0.01)


def test_damping_adds_to_that_of_a_low_rank_solver():
    """With two of five columns sampled: the other directions are divided by both."""
    problem, found = ridge(), []
    for of_solver, of_optimizer in ((0.1, 0.3), (0.4, 0.0)):
        nystrom = gradhpo.Nystrom(2, of_solver, jax.random.key(0))
        optimizer = gradhpo.ImplicitOptimizer(SGD, OUTER, nystrom, damping=of_optimizer)
        found.append(optimizer.compute_hypergradient(*at(problem, optimizer))["log"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_with_minibatches_the_system_is_that_of_the_last_one():
    """At fixed parameters, so that the other batches leave no trace."""
    curvature = jnp.array([[1.0, 2.0, 3.0], [2.0, 0.5, 1.0], [0.7, 3.0, 0.2]])
    train_loss = lambda w, h, batch: jnp.sum(batch * w**2 + jnp.exp(h) * w**2 - batch**2 * w * h)
    val_loss = lambda w, h, batch: jnp.sum((w - batch) ** 2)
    still, solver = optax.sgd(0.0), lx.LU()

    def found(inner_steps, train_batch):
        optimizer = gradhpo.ImplicitOptimizer(still, None, solver, inner_steps=inner_steps)
        state = optimizer.init(jnp.array([1.0, -1.0, 0.5]), jnp.array([0.1, -0.3, 0.2]))
        at_zero = jnp.zeros(3)
        return optimizer.compute_hypergradient(state, train_batch, at_zero, train_loss, val_loss)

    of_stack = found(3, gradhpo.BatchStack(curvature))
    np.testing.assert_allclose(of_stack, found(1, curvature[2]), rtol=1e-12)
    assert not np.allclose(of_stack, found(1, curvature[0]), rtol=0.1)


@pytest.mark.thorough
def test_the_last_adjoint_is_a_good_place_to_start():
    """On a slowly moving problem: CG needs less than half of the iterations."""
    assert iterations(0.01, warm=True) < 0.5 * iterations(0.01, warm=False)


@pytest.mark.parametrize(
    ("solver", "damping"),
    [
        pytest.param(gradhpo.Neumann(50, 0.5), 0, marks=pytest.mark.thorough),
        (gradhpo.Nystrom(3, 0.1, jax.random.key(0)), 0.1),
    ],
)
def test_settings_made_under_x64_serve_without_it(as_a_user_has_it, solver, damping):
    """The inner optimum is h, its curvature 2: the derivative of |w - 1|^2 is 2 (h - 1)."""
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1) ** 2)
    assert "float64" in [str(x.dtype) for x in jax.tree.leaves(solver)]
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.5), optax.sgd(0.1), solver)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, 2.0))
    found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 2.0 * 2 / (2 + damping), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("solver", [None, lx.LU(), gradhpo.Neumann(300, 10.0)])
def test_a_singular_or_diverging_system_ends_in_a_report(solver):
    """The validation loss depends on a direction that no training example sees."""
    x = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    train_loss = lambda w, h, batch: jnp.mean((x @ w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 3.0) ** 2)
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.sgd(1e-3), linear_solver=solver)
    state = optimizer.init(jnp.zeros(2), jnp.zeros(()))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    with pytest.warns(RuntimeWarning, match=r"linear solver failed.*(damping|step_size)"):
        _, history = gradhpo.run(optimizer, state, losses, None, None, num_steps=20, progress=False)
    assert history["linear_failures"][-1] > 0
    assert "linear solver failed" in history.report
    # What the report advises.
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.sgd(1e-3), damping=0.1)
    _, history = gradhpo.run(optimizer, state, losses, None, None, num_steps=20, progress=False)
    assert history["linear_failures"][-1] == history["rejected"][-1] == 0


def test_what_only_changes_the_way_is_not_seen_and_the_start_counts_for_nothing():
    problem = ridge()
    train_loss = lambda w, h, batch: problem.train_loss(w + h["start"], h, batch)
    val_loss = lambda w, h, batch: problem.val_loss(w + h["start"], h, batch)
    hyperparams = {k: jnp.asarray(x) for k, x in problem.hyperparams.items()}
    hyperparams |= {"start": jnp.ones(5), "rate": jnp.asarray(0.1)}
    optimizer = gradhpo.ImplicitOptimizer(lambda h: optax.sgd(h["rate"]), optax.sgd(0.1), lx.LU())
    state = optimizer.init(jnp.asarray(problem.w) - 1.0, hyperparams)
    with pytest.warns(UserWarning, match=r"of 0 for hyperparams \['rate'\].*UnrolledOptimizer"):
        found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    np.testing.assert_allclose(found["start"], np.zeros(5), atol=1e-12)
    np.testing.assert_allclose(found["log"], problem.expected["log"], rtol=1e-9)
    assert found["rate"] == 0


def test_a_custom_vjp_in_the_loss_makes_the_system_unsymmetric():
    """Gradient reversal: training finds the zero of a field that is not a gradient."""

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    train_loss = lambda w, h, batch: jnp.sum(w**2) + 0.3 * w[0] * reverse(w[1]) - jnp.sum(h * w)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    field = lambda w, h: jax.grad(train_loss)(w, h, None)
    h = jnp.asarray([0.5, -0.2])
    jacobian = jax.jacobian(field)(jnp.zeros(2), h)
    assert not np.allclose(jacobian, jacobian.T)
    w = jnp.linalg.solve(jacobian, h)
    np.testing.assert_allclose(field(w, h), 0, atol=1e-12)
    expected = 2 * (w - 1) @ jnp.linalg.inv(jacobian)
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    found = optimizer.compute_hypergradient(optimizer.init(w, h), None, None, train_loss, val_loss)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    by_cg = dataclasses.replace(optimizer, linear_solver=lx.CG(**TIGHT))
    with pytest.raises(ValueError, match=r"lineax.CG.*symmetric.*lineax.GMRES"):
        by_cg.compute_hypergradient(by_cg.init(w, h), None, None, train_loss, val_loss)


@pytest.mark.thorough
def test_imaml_is_a_proximal_inner_problem_for_each_task():
    """Meta-gradient (I + H/c)^-1 grad L_test, averaged over tasks; H is that of the data only."""
    random = np.random.default_rng(6)
    x, y = random.normal(size=(3, 10, 4)), random.normal(size=(3, 10))
    v, u = random.normal(size=(3, 6, 4)), random.normal(size=(3, 6))
    theta, c = random.normal(size=4), 0.5
    expected = np.zeros(4)
    for i in range(3):
        h = x[i].T @ x[i] / 10
        w = np.linalg.solve(h + c * np.eye(4), x[i].T @ y[i] / 10 + c * theta)
        alpha = v[i].T @ (v[i] @ w - u[i]) / 6
        expected += np.linalg.solve(np.eye(4) + h / c, alpha) / 3

    error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    train_loss = lambda w, theta, batch: error(w, batch) + c / 2 * jnp.sum((w - theta) ** 2)
    val_loss = lambda w, theta, batch: error(w, batch)
    cg = lx.CG(rtol=1e-12, atol=1e-12, max_steps=5)
    one = gradhpo.ImplicitOptimizer(optax.sgd(0.3), optax.sgd(0.1), cg, inner_steps=300)
    optimizer = gradhpo.TaskBatched(one, num_tasks=3)
    state = optimizer.init(jnp.zeros(4), jnp.asarray(theta))
    train, val = ((jnp.asarray(a), jnp.asarray(b)) for a, b in ((x, y), (v, u)))
    found = optimizer.compute_hypergradient(state, train, val, train_loss, val_loss)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    after = optimizer.step(state, train, val, train_loss, val_loss)
    assert after.memory.of_each.adjoint.shape == (3, 4)


@pytest.mark.thorough
def test_the_default_solver_in_float32_with_thousands_of_parameters(as_a_user_has_it):
    """lineax.CG by itself calls a curvature of 0.2 singular for 10,000 parameters."""
    size, curvature = 10_000, 0.2
    train_loss = lambda w, h, batch: curvature * jnp.sum((w - h) ** 2) / 2
    val_loss = lambda w, h, batch: jnp.sum((w - 2.0) ** 2) / 2
    for solver in (None, lx.CG(rtol=1e-5, atol=1e-5, norm=gradhpo.tree_l2_norm)):
        optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.sgd(0.1), solver)
        state = optimizer.init(jnp.ones(size), jnp.ones(size))
        state = optimizer.step(state, None, None, train_loss, val_loss)
        assert state.metadata["rejected"] == state.get_metric("linear_failures") == 0
        assert state.get_metric("linear_residual") < 1e-4
        np.testing.assert_allclose(state.hyperparams, 1.1, rtol=1e-4)  # g = alpha = -1


@pytest.mark.thorough
def test_the_default_solver_on_a_network_in_float32(as_a_user_has_it):
    """The MLP of the benchmarks, 9,610 parameters, with damping against negative curvature."""
    the_job = job(100)
    penalised = lambda w, h, batch: (
        the_job.train_loss(w, h, batch) + (1e-2 * gradhpo.tree_l2_norm(w.net) ** 2)
    )
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(0.3), optax.sgd(1e-3), inner_steps=200, damping=0.1
    )
    state = optimizer.init(the_job.params, the_job.hyperparams)
    batches = (the_job.train_data(0), the_job.val_batch)
    state = optimizer.step(state, *batches, penalised, the_job.val_loss)
    assert state.metadata["rejected"] == state.get_metric("linear_failures") == 0
    assert state.get_metric("linear_residual") < 1e-2


@functools.cache
def moving():
    """A quadratic problem: its Hessian, two validation gradients, both losses."""
    random = np.random.default_rng(7)
    root = random.normal(size=(30, 30))
    hessian = jnp.asarray(root @ root.T / 30 + 0.1 * np.eye(30))
    target = jnp.asarray(random.normal(size=(2, 30)))
    train_loss = lambda w, h, batch: w @ hessian @ w / 2 - h @ w
    val_loss = lambda w, h, batch: batch[0] * jnp.vdot(batch[1], w)
    return hessian, target, (train_loss, val_loss)


def shrinking(factor, solver):
    """The hypergradient with a validation gradient `factor` times the previous step's."""
    hessian, target, losses = moving()
    optimizer = gradhpo.ImplicitOptimizer(OUTER, None, solver)
    state = optimizer.init(jnp.zeros(30), jnp.zeros(30))
    first, second = (jnp.asarray(1.0), target[0]), (jnp.asarray(factor), target[1])
    state = optimizer.step(state, None, first, *losses, lr_hyper=0.0)
    found = optimizer.compute_hypergradient(state, None, second, *losses)
    return found, jnp.linalg.solve(hessian, factor * target[1])


@pytest.mark.parametrize("factor", quick([1.0, 1e-3, -1e-3], keep=[-1e-3]))
def test_a_warm_start_does_no_harm_where_the_validation_gradient_changes(factor):
    """Five iterations of CG: cut short, and no worse for the warm start."""
    found, exact = shrinking(factor, lx.CG(rtol=1e-9, atol=1e-9, max_steps=5))
    assert jnp.linalg.norm(found - exact) < 0.9 * jnp.linalg.norm(exact)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is exactly 0")
def test_no_validation_gradient_no_hypergradient():
    for solver in (None, lx.CG(rtol=1e-6, atol=1e-6, max_steps=5), lx.GMRES(**TIGHT)):
        found, _ = shrinking(0.0, solver)
        np.testing.assert_array_equal(found, np.zeros(30))


def test_failures_are_those_of_this_run_and_counted_over_tasks():
    """One task of four is singular; a later run without failures reports nothing."""
    train_loss = lambda w, h, batch: jnp.sum(batch * (w - h) ** 2) / 2
    val_loss = lambda w, h, batch: jnp.sum((w - 2.0) ** 2) / 2
    # A series that diverges for the task with large curvature, but stays finite.
    one = gradhpo.ImplicitOptimizer(optax.sgd(1e-3), optax.sgd(1e-9), gradhpo.Neumann(4, 1.0))
    optimizer = gradhpo.TaskBatched(one, num_tasks=4)
    curvatures = jnp.asarray([[1.0], [0.5], [4.0], [1.0]])
    state = optimizer.init(jnp.zeros(1), jnp.zeros(1))  # the end of training
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    settings = {"num_steps": 3, "progress": False}
    with pytest.warns(RuntimeWarning, match="linear solver failed 3 times"):
        state, _ = gradhpo.run(optimizer, state, losses, curvatures, None, **settings)
    _, history = gradhpo.run(optimizer, state, losses, curvatures / 4, None, **settings)
    assert "linear solver" not in history.report


@pytest.mark.thorough
def test_a_system_that_only_rounding_keeps_from_being_singular_is_reported(as_a_user_has_it):
    """Two copies of one feature, and a validation loss that tells them apart."""
    random = np.random.default_rng(8)
    x = random.normal(size=(40, 4))
    x = jnp.asarray(np.hstack([x, x[:, :1]]), jnp.float32)
    y = jnp.asarray(random.normal(size=40), jnp.float32)
    train_loss = lambda w, h, batch: jnp.mean((x @ w - y) ** 2) + jnp.exp(h) * w[1] ** 2
    val_loss = lambda w, h, batch: jnp.sum((w - jnp.arange(5.0)) ** 2)
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    settings = {"num_steps": 5, "progress": False}
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.adam(1e-3), inner_steps=50)
    state = optimizer.init(jnp.zeros(5), jnp.zeros(()))
    with pytest.warns(RuntimeWarning, match="linear s.*damping=1e-3"):
        gradhpo.run(optimizer, state, losses, None, None, **settings)
    damped = dataclasses.replace(optimizer, damping=0.1)
    _, history = gradhpo.run(damped, state, losses, None, None, **settings)
    assert "linear" not in history.report


def test_an_inner_training_that_diverges_is_not_the_solvers_fault():
    problem = ridge()
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(30.0), optax.sgd(0.1), inner_steps=500)
    state, *_ = at(problem, optimizer)
    losses = gradhpo.LossFunctions(problem.train_loss, problem.val_loss)
    with pytest.warns(RuntimeWarning, match="learning rate is too high"):
        _, history = gradhpo.run(optimizer, state, losses, None, None, num_steps=3, progress=False)
    assert "linear" not in history.report
