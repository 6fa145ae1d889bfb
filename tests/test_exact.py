"""Every hypergradient against central finite differences, exact formulas or closed forms."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, quick, relative_error
from problems import CALLABLE, FIXED, OUTER, PROBLEMS, make, relaxed, stack_of, warmed

import gradhpo
from gradhpo.core.bisection import bisection


# Two pairs in the quick suite, all of them in the thorough one.
COMBINATIONS = quick(
    [(p, o) for p in PROBLEMS for o in FIXED],
    keep=[("loss", "adamw"), ("layers", "momentum")],
)


@pytest.mark.parametrize(("problem_name", "optimizer_name"), COMBINATIONS)
def test_one_step_equals_finite_differences(problem_name, optimizer_name, getkey):
    problem, inner = make(problem_name, optimizer_name, getkey())
    optimizer = gradhpo.OneStepOptimizer(inner, OUTER)
    arguments = warmed(optimizer, problem, problem.train_batch)
    found = optimizer.compute_hypergradient(*arguments)
    exact = gradhpo.finite_difference_hypergradient(optimizer, *arguments)
    assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize(("problem_name", "optimizer_name"), COMBINATIONS)
def test_unrolled_equals_finite_differences(problem_name, optimizer_name, getkey):
    problem, inner = make(problem_name, optimizer_name, getkey())
    optimizer = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=7)
    stack = stack_of(problem, 7, getkey())  # a different mini-batch at every inner step
    arguments = warmed(optimizer, problem, stack)
    found = optimizer.compute_hypergradient(*arguments)
    exact = gradhpo.finite_difference_hypergradient(optimizer, *arguments)
    assert relative_error(found, exact) < 1e-6


@pytest.mark.thorough
@pytest.mark.parametrize(("problem_name", "optimizer_name"), COMBINATIONS)
def test_t1_t2_is_near_the_exact_one_step_value_in_every_component(
    problem_name, optimizer_name, getkey
):
    inner_steps = 3
    problem, inner = make(problem_name, optimizer_name, getkey())
    exact = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=inner_steps, truncation=1)
    stack = stack_of(problem, inner_steps, getkey())
    arguments = warmed(exact, problem, stack)
    expected = flat(exact.compute_hypergradient(*arguments))
    for settings in ({}, {"perturb": "hyperparams", "epsilon": 1e-4}):
        optimizer = gradhpo.T1T2Optimizer(inner, OUTER, inner_steps=inner_steps, **settings)
        found = flat(optimizer.compute_hypergradient(*arguments))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.max(np.abs(expected)))


def test_t1_t2_is_its_own_formula_written_out(getkey):
    """DARTS equations 7 and 8 in NumPy, on a least-squares problem with a weight per row."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(6, 3)), random.normal(size=6)
    w0, a, rate, epsilon = random.normal(size=3), random.normal(size=6), 0.05, 0.01

    def gradient_a(w):  # of sum_i exp(a_i) r_i^4 / 4 with r = x w - y
        return np.exp(a) * (x @ w - y) ** 4 / 4

    w1 = w0 - rate * x.T @ (np.exp(a) * (x @ w0 - y) ** 3)
    alpha = 2 * (w1 - 1)
    step = epsilon / np.linalg.norm(alpha)
    mixed = (gradient_a(w0 + step * alpha) - gradient_a(w0 - step * alpha)) / (2 * step)
    expected = 0.2 * a - rate * mixed

    def train_loss(w, a, batch):
        return jnp.sum(jnp.exp(a) * (batch[0] @ w - batch[1]) ** 4) / 4

    val_loss = lambda w, a, batch: jnp.sum((w - 1) ** 2) + 0.1 * jnp.sum(a**2)
    optimizer = gradhpo.T1T2Optimizer(optax.sgd(rate), optax.sgd(0.1), epsilon=epsilon)
    state = optimizer.init(jnp.asarray(w0), jnp.asarray(a))
    arguments = (state, (jnp.asarray(x), jnp.asarray(y)), None, train_loss, val_loss)
    np.testing.assert_allclose(optimizer.compute_hypergradient(*arguments), expected, rtol=1e-10)


def test_t1_t2_with_adam_has_the_adaptation_of_sama():
    """Its published factor: du/dg of Adam, late in training and without its eps.

    SAMA takes the difference of training losses at the end of the step, T1-T2 at its start, like
    DARTS; a step apart, they differ by about the rate.
    """
    random = np.random.default_rng(0)
    x, y = random.normal(size=(6, 3)), random.normal(size=6)
    w0, a = random.normal(size=3), random.normal(size=6)
    rate, epsilon, b1, b2 = 0.01, 0.01, 0.9, 0.99
    m_old, v_old = random.normal(size=3), 1 + random.uniform(size=3)

    def gradient_a(w):  # of sum_i exp(a_i) r_i^4 / 4 with r = x w - y
        return np.exp(a) * (x @ w - y) ** 4 / 4

    g = x.T @ (np.exp(a) * (x @ w0 - y) ** 3)
    v = b2 * v_old + (1 - b2) * g**2
    w1 = w0 - rate * (b1 * m_old + (1 - b1) * g) / np.sqrt(v)
    factor = rate * ((1 - b1) * b2 * v_old - b1 * (1 - b2) * g * m_old) / np.sqrt(v) ** 3
    direction = factor * 2 * (w1 - 1)
    step = epsilon / np.linalg.norm(direction)

    def published(at):
        plus, minus = (gradient_a(at + sign * step * direction) for sign in (1, -1))
        return -(plus - minus) / (2 * step)

    def train_loss(w, a, batch):
        return jnp.sum(jnp.exp(a) * (batch[0] @ w - batch[1]) ** 4) / 4

    val_loss = lambda w, a, batch: jnp.sum((w - 1) ** 2)
    adam = relaxed(optax.adam(rate, b1, b2, eps=0.0))
    optimizer = gradhpo.T1T2Optimizer(adam, optax.sgd(0.1), epsilon=epsilon)
    state = optimizer.init(jnp.asarray(w0), jnp.asarray(a))
    moments, rest = state.inner_opt_state
    late = moments._replace(
        count=jnp.asarray(100_000, jnp.int32), mu=jnp.asarray(m_old), nu=jnp.asarray(v_old)
    )
    state = state.update(inner_opt_state=(late, rest))
    arguments = (state, (jnp.asarray(x), jnp.asarray(y)), None, train_loss, val_loss)
    found = optimizer.compute_hypergradient(*arguments)
    # Differences of 0.01, of numbers near 1: rounding is about 1e-13 of them.
    np.testing.assert_allclose(found, published(w0), rtol=1e-9)
    apart = np.linalg.norm(found - published(w1)) / np.linalg.norm(found)
    assert 0 < apart < 10 * rate


def test_t1_t2_by_hyperparameters_needs_no_derivative_of_the_update(getkey):
    """An opaque update, with vector and scalar leaves: each coordinate gets its own value."""

    def update(w, h):
        return np.asarray(w) * np.asarray(h["a"]) + np.asarray(h["b"])

    def update_fn(params, hyperparams, batch):
        shape = jax.ShapeDtypeStruct(params.shape, params.dtype)
        return jax.pure_callback(update, shape, params, hyperparams, vmap_method="sequential")

    params = jnp.array([1.0, -2.0, 3.0])
    hyperparams = {"a": jnp.array([0.5, 0.6, 0.7]), "b": jnp.array(0.1)}
    val_loss = lambda w, h, batch: jnp.sum(w**2)
    train_loss = lambda w, h, batch: jnp.sum(w)
    optimizer = gradhpo.T1T2Optimizer(
        outer_optimizer=optax.sgd(0.1), perturb="hyperparams", epsilon=1e-4, update_fn=update_fn
    )
    state = optimizer.init(params, hyperparams)
    found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    after = np.asarray(params) * np.asarray(hyperparams["a"]) + 0.1
    np.testing.assert_allclose(found["a"], 2 * after * params, rtol=1e-9)
    np.testing.assert_allclose(found["b"], np.sum(2 * after), rtol=1e-9)


def test_t1_t2_of_a_vanishing_validation_gradient_is_zero_not_nan():
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: 0 * jnp.sum(w)
    optimizer = gradhpo.T1T2Optimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.ones(2), jnp.zeros(2))
    with pytest.warns(UserWarning, match="is exactly 0"):
        found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    np.testing.assert_array_equal(found, np.zeros(2))


@pytest.mark.parametrize(
    ("rate", "fixed_point"), [(0.0, 2.0), (0.3, 1.25), (0.5, 1.0), (0.7, 2 / 2.4)]
)
def test_darts_toy_goes_to_its_fixed_point(rate, fixed_point):
    r"""L_val = aw - 2a + 1, L_train = w^2 - 2aw + a^2 from (a, w) = (2, -2): w = a = 2/(1+2xi)."""
    train_loss = lambda w, a, batch: w**2 - 2 * a * w + a**2
    val_loss = lambda w, a, batch: a * w - 2 * a + 1

    # As in DARTS: the look-ahead with rate xi gives the hypergradient; w moves at another rate.
    @jax.jit
    def advance(w, a, batch):
        return w - 0.5 * jax.grad(train_loss)(w, a, batch)

    if rate == 0:  # the direct term at the final w
        optimizer = gradhpo.FOOptimizer(optax.sgd(0.5), optax.sgd(0.05))
    else:
        optimizer = gradhpo.T1T2Optimizer(optax.sgd(rate), optax.sgd(0.05))
    state = optimizer.init(jnp.asarray(-2.0), jnp.asarray(2.0))
    for _ in range(400):
        if rate > 0:
            state = state.update(params=advance(state.params, state.hyperparams, None))
        state = optimizer.step(state, None, None, train_loss, val_loss)
    np.testing.assert_allclose(state.hyperparams, fixed_point, rtol=1e-3)


# -- UnrolledOptimizer ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer_name", "checkpoints", "store"),
    quick(
        [("momentum", n, "device") for n in (1, 2, 3, 5, 7, 11)]
        + [("adam", "sqrt", "device"), ("adamw", "sqrt", "device")]
        + [("adam", "log", "device"), ("adamw", "log", "device")]
        + [("adam", kept, "host") for kept in (None, 3)],
        keep=[("adam", "sqrt", "device")],
    ),
)
def test_kept_states_change_nothing(optimizer_name, checkpoints, store, getkey):
    problem, inner = make("layers", optimizer_name, getkey())
    plain = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=11)
    saving = dataclasses.replace(plain, checkpoints=checkpoints, store=store)
    arguments = warmed(plain, problem, stack_of(problem, 11, getkey()))
    stepped, expected = (optimizer.step(*arguments) for optimizer in (saving, plain))
    assert relative_error(stepped.hyperparams, expected.hyperparams) < 1e-12
    for name in ("train_loss", "val_loss", "hypergrad_norm", "param_norm"):
        np.testing.assert_allclose(stepped.get_metric(name), expected.get_metric(name), rtol=1e-12)


@pytest.mark.parametrize("steps", quick([1, 2, 3, 8, 29], keep=[8]))
def test_bisection_of_few_steps(steps, getkey):
    problem, inner = make("layers", "adam", getkey())
    plain = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=steps)
    arguments = warmed(plain, problem, stack_of(problem, steps, getkey()))
    found, expected = (
        dataclasses.replace(plain, checkpoints=kept).compute_hypergradient(*arguments)
        for kept in ("log", None)
    )
    assert relative_error(found, expected) < 1e-13


def test_bisection_visits_the_steps_from_the_last_to_the_first():
    for steps in range(1, 130):
        schedule = bisection(steps)
        slots: dict[int, int] = {int(slot): t for t, slot in enumerate(schedule.forward)}
        left, advanced = steps, 0
        for t, source, target, pulls in zip(*schedule.backward, strict=True):
            assert slots[source] == t
            assert target < schedule.num_slots == int(np.log2(steps)) + 1
            if pulls:
                left -= 1
                assert t == left
            else:
                slots[target] = t + 1
                advanced += 1
        assert left == 0
        if steps.bit_count() == 1:
            assert advanced == steps * np.log2(steps) / 2 - steps + 1


@pytest.mark.parametrize("settings", [{"checkpoints": "log"}, {"store": "host"}])
def test_kept_states_of_tasks(settings):
    plain = gradhpo.UnrolledOptimizer(optax.sgd(0.1), OUTER, unroll_steps=5)
    loss = lambda w, h, batch: jnp.sum(jnp.cosh(w - h) * batch)
    tasks = [
        gradhpo.TaskBatched(optimizer, num_tasks=2)
        for optimizer in (dataclasses.replace(plain, **settings), plain)
    ]
    state = tasks[0].init(jnp.zeros(3), jnp.arange(3.0))
    batch = jnp.arange(1.0, 7.0).reshape(2, 3)
    found, expected = (
        optimizer.compute_hypergradient(state, batch, batch, loss, loss) for optimizer in tasks
    )
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.fixture(scope="module")
def frozen_at_first():
    """Arguments over six steps, and the hypergradient by plain JAX: (h, steps kept) -> gradient.

    The hyperparameters are frozen in all but the last steps.
    """
    problem, inner = make("optimizer", "momentum", jax.random.key(0))
    stack = stack_of(problem, 6, jax.random.key(1))
    optimizer = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=6)
    state, *_ = arguments = warmed(optimizer, problem, stack)
    w, frozen = eqx.partition(state.params, eqx.is_inexact_array)

    def only_if(live, tree):
        return jax.tree.map(lambda x: jnp.where(live, x, jax.lax.stop_gradient(x)), tree)

    def truncated(h, kept):
        def step(z, at_step):
            t, batch = at_step
            w, s = only_if(t != 6 - kept, z)
            at = only_if(t >= 6 - kept, h)
            loss = lambda w: problem.train_loss(eqx.combine(w, frozen), at, batch)
            updates, s = inner(at).update(jax.grad(loss)(w), s, w)
            return (optax.apply_updates(w, updates), s), None

        (w_end, _), _ = jax.lax.scan(
            step, (w, state.inner_opt_state), (jnp.arange(6), stack.batches)
        )
        return problem.val_loss(eqx.combine(w_end, frozen), h, problem.val_batch)

    return arguments, jax.jit(jax.grad(truncated))


@pytest.mark.parametrize(
    ("kept", "checkpoints"),
    quick(
        [(1, None), (2, None), (4, None), (6, None), (4, "sqrt"), (5, 2), (5, "log")],
        keep=[(4, "sqrt")],
    ),
)
def test_truncation_keeps_the_last_terms_of_the_sum(kept, checkpoints, frozen_at_first):
    arguments, by_hand = frozen_at_first
    optimizer = gradhpo.UnrolledOptimizer(
        CALLABLE["momentum"], OUTER, unroll_steps=6, truncation=kept, checkpoints=checkpoints
    )
    expected = by_hand(arguments[0].hyperparams, kept)
    assert relative_error(optimizer.compute_hypergradient(*arguments), expected) < 1e-11


def test_unrolled_over_one_step_is_one_step(getkey):
    problem, inner = make("optimizer", "adam", getkey())
    one = gradhpo.OneStepOptimizer(inner, OUTER)
    arguments = warmed(one, problem, problem.train_batch)
    unrolled = gradhpo.UnrolledOptimizer(inner, OUTER)
    found, expected = (o.compute_hypergradient(*arguments) for o in (unrolled, one))
    assert relative_error(found, expected) < 1e-13


def test_unrolled_through_an_update_fn(getkey):
    problem, _ = make("dicts", "sgd", getkey())

    def update_fn(params, hyperparams, batch):
        gradient = jax.grad(problem.train_loss)(params, hyperparams, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    by_hand = gradhpo.UnrolledOptimizer(outer_optimizer=OUTER, update_fn=update_fn, unroll_steps=5)
    by_optax = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(0.1)), OUTER, unroll_steps=5)
    rest = (problem.train_batch, problem.val_batch, problem.train_loss, problem.val_loss)
    found, expected = (
        o.compute_hypergradient(o.init(problem.params, problem.hyperparams), *rest)
        for o in (by_hand, by_optax)
    )
    assert relative_error(found, expected) < 1e-12


# -- closed forms -------------------------------------------------------------------------


def quadratic(size=4, seed=0):
    random = np.random.default_rng(seed)
    root = random.normal(size=(size, size))
    return root @ root.T / size + 0.3 * np.eye(size), random.normal(size=size), random


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_gradient_descent_on_a_quadratic(steps):
    r"""dw_T/d eta = -T P^(T-1) H (w_0 - w*), dw_T/dw_0 = P^T, dw_T/db = sum_k eta P^k."""
    hessian, b, random = quadratic()
    w0, target, rate = random.normal(size=4), random.normal(size=4), 0.1
    optimum = np.linalg.solve(hessian, b)
    p = np.eye(4) - rate * hessian
    power = np.linalg.matrix_power
    w_end = optimum + power(p, steps) @ (w0 - optimum)
    alpha = w_end - target
    expected = {
        "rate": -steps * alpha @ power(p, steps - 1) @ hessian @ (w0 - optimum),
        "start": power(p, steps) @ alpha,
        "b": rate * sum(power(p, k) for k in range(steps)) @ alpha,
    }
    h_array = jnp.asarray(hessian)

    # The initial point as a hyperparameter: w = start + delta, and delta is trained.
    def train_loss(delta, h, batch):
        w = h["start"] + delta
        return w @ h_array @ w / 2 - h["b"] @ w

    val_loss = lambda delta, h, batch: jnp.sum((h["start"] + delta - target) ** 2) / 2
    optimizer = gradhpo.UnrolledOptimizer(
        lambda h: optax.sgd(h["rate"]), optax.sgd(0.1), unroll_steps=steps
    )
    hyperparams = {"rate": jnp.asarray(rate), "start": jnp.asarray(w0), "b": jnp.asarray(b)}
    state = optimizer.init(jnp.zeros(4), hyperparams)
    found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12)


def test_long_unrolling_reaches_the_implicit_ridge_derivative():
    """One penalty per feature: dF/d log(l_j) = -l_j q_j w_j with q = (A + L)^-1 g."""
    random = np.random.default_rng(1)
    x, v = random.normal(size=(30, 5)), random.normal(size=(20, 5))
    y, u = random.normal(size=30), random.normal(size=20)
    penalty = np.exp(random.normal(size=5) - 1)
    a = x.T @ x / 30 + np.diag(penalty)
    w = np.linalg.solve(a, x.T @ y / 30)
    q = np.linalg.solve(a, v.T @ (v @ w - u) / 20)

    def train_loss(w, h, batch):
        x, y = batch
        return jnp.mean((x @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(h) * w**2) / 2

    val_loss = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    optimizer = gradhpo.UnrolledOptimizer(
        optax.sgd(0.3), optax.sgd(0.1), unroll_steps=2_000, checkpoints="sqrt"
    )
    state = optimizer.init(jnp.zeros(5), jnp.log(jnp.asarray(penalty)))
    found = optimizer.compute_hypergradient(
        state,
        jax.tree.map(jnp.asarray, (x, y)),
        jax.tree.map(jnp.asarray, (v, u)),
        train_loss,
        val_loss,
    )
    np.testing.assert_allclose(found, -penalty * q * w, rtol=1e-9)


def test_long_unrolling_reaches_the_derivative_of_example_weights():
    """Hyper-cleaning in closed form: dF/da_i = -s'(a_i)(x_i w - y_i)(x_i q)/n."""
    random = np.random.default_rng(2)
    n, c = 25, 0.1
    x, v = random.normal(size=(n, 4)), random.normal(size=(15, 4))
    y, u, a = random.normal(size=n), random.normal(size=15), random.normal(size=n)
    s = 1 / (1 + np.exp(-a))
    hessian = x.T @ (s[:, None] * x) / n + c * np.eye(4)
    w = np.linalg.solve(hessian, x.T @ (s * y) / n)
    q = np.linalg.solve(hessian, v.T @ (v @ w - u) / 15)
    expected = -s * (1 - s) * (x @ w - y) * (x @ q) / n

    def train_loss(w, a, batch):
        x, y = batch
        return jnp.mean(jax.nn.sigmoid(a) * (x @ w - y) ** 2) / 2 + c * jnp.sum(w**2) / 2

    val_loss = lambda w, a, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.5), optax.sgd(0.1), unroll_steps=1_000)
    state = optimizer.init(jnp.zeros(4), jnp.asarray(a))
    found = optimizer.compute_hypergradient(
        state,
        jax.tree.map(jnp.asarray, (x, y)),
        jax.tree.map(jnp.asarray, (v, u)),
        train_loss,
        val_loss,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_hypergradient_descent_on_the_rate():
    """Baydin 2018: one step, the same loss on both levels: dL/d eta = -g_1 . g_0."""
    loss = lambda w, h, batch: jnp.sum(jnp.cosh(w) * jnp.arange(1.0, 4.0))
    optimizer = gradhpo.OneStepOptimizer(lambda h: optax.sgd(h), optax.sgd(0.1))
    w, rate = jnp.array([0.3, -0.5, 0.9]), jnp.asarray(0.05)
    state = optimizer.init(w, rate)
    found = optimizer.compute_hypergradient(state, None, None, loss, loss)
    gradient = jax.grad(loss)
    g0 = gradient(w, rate, None)
    np.testing.assert_allclose(found, -g0 @ gradient(w - rate * g0, rate, None), rtol=1e-12)


def test_the_step_of_finite_differences_grows_with_the_hyperparameter():
    """For a cube, the quotient's error is exactly the squared step, epsilon max(1, |h|)."""
    cube = lambda w, h, batch: jnp.sum(h**3) + 0 * w
    h, epsilon = np.array([-20.0, -0.5, 0.3, 50.0]), 0.01
    optimizer = gradhpo.FOOptimizer(optax.sgd(0.1))
    state = optimizer.init(jnp.ones(()), jnp.asarray(h))
    found = gradhpo.finite_difference_hypergradient(
        optimizer, state, None, None, cube, cube, epsilon=epsilon
    )
    step = epsilon * np.array([20.0, 1.0, 1.0, 50.0])
    np.testing.assert_allclose(found, 3 * h**2 + step**2, rtol=1e-9)


def test_chosen_coordinates_of_the_finite_differences(getkey):
    problem, inner = make("layers", "sgd", getkey())
    optimizer = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=3)
    arguments = warmed(optimizer, problem, problem.train_batch)
    whole = gradhpo.finite_difference_hypergradient(optimizer, *arguments)
    some = gradhpo.finite_difference_hypergradient(
        optimizer, *arguments, coordinates=np.array([4, 0, 17])
    )
    np.testing.assert_array_equal(some, flat(whole)[[4, 0, 17]])
