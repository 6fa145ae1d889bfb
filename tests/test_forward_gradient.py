"""Forward gradients against (g·v) v with the exact g, and their mean and memory."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, quick, relative_error
from problems import OUTER, make, stack_of, warmed
from single_loops import BY_HAND, MOMENTUM, RATE, data, quartic, quartic_at, squares, squares_at

import gradhpo
from gradhpo.extend import random_directions


def drawn_signs(state, hyperparams, num):
    key, _ = state.memory.draws.next()
    return random_directions(jax.random.rademacher, key, hyperparams, num)


@pytest.mark.parametrize(
    ("problem_name", "optimizer_name"),
    quick(
        [("optimizer", "adam"), ("optimizer", "momentum"), ("dicts", "momentum")],
        keep=[("dicts", "momentum")],
    ),
)
def test_every_draw_is_the_exact_hypergradient_along_its_directions(
    problem_name, optimizer_name, getkey
):
    problem, inner = make(problem_name, optimizer_name, getkey())
    stack = stack_of(problem, 20, getkey())
    exact = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=20)
    g = exact.compute_hypergradient(*warmed(exact, problem, stack))
    optimizer = gradhpo.ForwardGradientOptimizer(inner, OUTER, unroll_steps=20, num_directions=3)
    arguments = warmed(optimizer, problem, stack)
    found = optimizer.compute_hypergradient(*arguments)
    v = drawn_signs(arguments[0], problem.hyperparams, 3)
    slopes = sum(
        np.reshape(a, (3, -1)) @ np.ravel(b) for a, b in zip(*map(leaves, (v, g)), strict=True)
    )
    expected = jax.tree.map(lambda x: np.tensordot(slopes, np.asarray(x), 1) / 3, v)
    assert relative_error(found, expected) < 1e-10


leaves = jax.tree.leaves


@pytest.mark.thorough
def test_twenty_steps_with_momentum_are_a_loop_in_numpy():
    """Mini-batches, and tangents of parameters and velocity: only rounding, 1e-10."""
    steps, inner_steps, num = 20, 3, 2
    problem = data(steps, inner_steps)
    (inner, w_step), (outer, a_step) = BY_HAND["momentum"], BY_HAND["Adam"]
    optimizer = gradhpo.ForwardGradientOptimizer(
        inner, outer, unroll_steps=inner_steps, num_directions=num
    )
    state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a), key=jax.random.key(4))
    val = tuple(map(jnp.asarray, problem.val))
    w, a, w_step, a_step = problem.w, problem.a, w_step(), a_step()
    for k in range(steps):
        v = np.asarray(drawn_signs(state, state.hyperparams, num))
        state = optimizer.step(state, problem.stack(k), val, quartic, squares)
        w_dot = velocity_dot = np.zeros((num, len(w)))
        for t in range(inner_steps):
            at = quartic_at(w, a, problem.batch(k, t))
            velocity_dot = MOMENTUM * velocity_dot + w_dot @ at.hessian + v @ at.mixed.T
            w, w_dot = w_step(w, at.gradient), w_dot - RATE * velocity_dot
        alpha, direct = squares_at(w, a, problem.val)
        g = (w_dot @ alpha + v @ direct) @ v / num
        a = a_step(a, g)
        np.testing.assert_allclose(state.metadata["hypergrad_norm"], np.linalg.norm(g), rtol=1e-10)
    np.testing.assert_allclose(state.params, w, rtol=1e-10)
    np.testing.assert_allclose(state.hyperparams, a, rtol=1e-10)


def in_the_init(w, h, batch):
    return jnp.sum((w - h["to"]) ** 2 * jnp.arange(1.0, 4.0)) / 2


def distance(w, h, batch):
    return jnp.sum((w - 1.0) ** 2) / 2


def test_where_training_starts_counts():
    """The initial velocity of this rule is a hyperparameter: only the first step sees it."""

    def rule(h):
        init = lambda w: h["velocity"]
        update = lambda g, s, w=None: (jax.tree.map(lambda s: -0.1 * s, 0.9 * s + g), 0.9 * s + g)
        return optax.GradientTransformation(init, update)

    h = {"to": jnp.ones(3), "velocity": jnp.asarray([1.0, 2.0, -1.0])}
    optimizer = gradhpo.ForwardGradientOptimizer(rule, unroll_steps=5)
    exact = gradhpo.UnrolledOptimizer(rule, unroll_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = optimizer.init(jnp.zeros(3), h, key=jax.random.key(3))
        found = optimizer.compute_hypergradient(state, None, None, in_the_init, distance)
    g = exact.compute_hypergradient(exact.init(jnp.zeros(3), h), None, None, in_the_init, distance)
    assert np.all(np.abs(g["velocity"]) > 1e-3)
    v = jax.tree.map(lambda x: x[0], drawn_signs(state, h, 1))
    expected = jax.tree.map(lambda x: gradhpo.tree_dot(g, v) * x, v)
    assert relative_error(found, expected) < 1e-12


def test_the_mean_is_the_exact_hypergradient_and_the_variance_is_known():
    target, rates = jnp.arange(5.0), jnp.asarray([0.3, 0.2, 0.1, 0.05, 0.02])
    loss = lambda w, h, batch: jnp.sum(rates * (w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - target) ** 2) / 2
    optimizer = gradhpo.ForwardGradientOptimizer(optax.sgd(0.5), unroll_steps=6, num_directions=2)
    exact = gradhpo.UnrolledOptimizer(optax.sgd(0.5), unroll_steps=6)
    w, h = jnp.zeros(5), jnp.ones(5)
    g = exact.compute_hypergradient(exact.init(w, h), None, None, loss, val_loss)

    def one(key):
        state = optimizer.init(w, h, key=key)
        return optimizer.compute_hypergradient(state, None, None, loss, val_loss)

    draws = np.asarray(eqx.filter_vmap(one)(jax.random.split(jax.random.key(0), 10_000)))
    error = draws.std(0) / 100
    np.testing.assert_array_less(np.abs(draws.mean(0) - g), 4 * error)  # once in 3,000 seeds
    variance = np.sum((draws - np.asarray(g)) ** 2, 1).mean()
    # (H - 1) |g|²/b; the relative error of this mean is about 1.4 %.
    np.testing.assert_allclose(variance, 4 * np.sum(g**2) / 2, rtol=0.06)


@pytest.mark.thorough
def test_no_reverse_mode_and_memory_flat_in_the_horizon():
    """A while loop has no pullback. Only the bytes of the steps' losses add up."""

    def update_fn(w, h, batch):
        return jax.lax.while_loop(
            lambda c: c[1] < 3, lambda c: (c[0] - 0.1 * (c[0] - h), c[1] + 1), (w, 0)
        )[0]

    h, loss = jnp.linspace(-1, 1, 40), lambda w, h, batch: jnp.sum((w - 2.0) ** 2) / 2
    losses = gradhpo.LossFunctions(loss, loss)
    optimizers = {
        str(b): gradhpo.ForwardGradientOptimizer(update_fn=update_fn, num_directions=b)
        for b in (1, 16)
    }
    state = optimizers["1"].init(jnp.zeros(40), h)
    planned = gradhpo.plan(optimizers, state, None, None, losses, horizons=[10, 1_000])
    used = lambda b, t: planned[str(b), t].cost.temporary_bytes
    assert used(1, 1_000) - used(1, 10) <= 2 * 8 * 990
    # 15 more directions, each with a tangent of w and itself; XLA keeps a few copies.
    assert 15 * 40 * 8 <= used(16, 10) - used(1, 10) <= 10 * 15 * 40 * 8


def test_a_refused_step_spends_its_draw_and_every_step_draws():
    optimizer = gradhpo.ForwardGradientOptimizer(optax.sgd(0.1), OUTER)
    loss = lambda w, h, batch: jnp.sum((w - h + batch) ** 2)
    state = optimizer.init(jnp.zeros(4), jnp.ones(4), key=jax.random.key(1))
    found = []
    for batch in (0.0, jnp.nan, 0.0):
        signs = drawn_signs(state, state.hyperparams, 1)
        found.append(flat(signs))
        state = optimizer.step(state, batch, None, loss, distance)
    assert state.get_metric("rejected") == 1
    assert state.memory.draws.count == 3
    assert not np.array_equal(found[0], found[1]) or not np.array_equal(found[1], found[2])


def test_compare_over_batches_reports_the_noise_of_the_directions():
    """On fixed batches all noise comes from the estimator, and its size is known."""
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2) / 2
    losses = gradhpo.LossFunctions(loss, distance)
    inner = optax.sgd(0.5)
    optimizers = {
        "exact": gradhpo.UnrolledOptimizer(inner, unroll_steps=4),
        "forward": gradhpo.ForwardGradientOptimizer(inner, unroll_steps=2),
    }
    state = optimizers["forward"].init(jnp.zeros(5), jnp.linspace(2.0, 3.0, 5))
    report = gradhpo.compare_over_batches(
        {"exact": optimizers["exact"], "forward": optimizers["forward"]},
        state, None, None, losses, num_draws=2_000, num_steps=4,
    )  # fmt: skip
    assert report.signal_to_noise["exact"] > 1e6
    # The squared ratio is 1/(H - 1), with a relative error of about 6 % here.
    np.testing.assert_allclose(report.signal_to_noise["forward"] ** 2, 1 / 4, rtol=0.25)


def test_misuse():
    with pytest.raises(ValueError, match="num_directions"):
        gradhpo.ForwardGradientOptimizer(optax.sgd(0.1), num_directions=0)
    with pytest.raises(ValueError, match="unroll_steps"):
        gradhpo.ForwardGradientOptimizer(optax.sgd(0.1), unroll_steps=0)


@pytest.mark.thorough
def test_tasks_and_members_have_their_own_draws():
    optimizer = gradhpo.ForwardGradientOptimizer(optax.sgd(0.1), OUTER)
    tasks = gradhpo.TaskBatched(optimizer, num_tasks=3)
    state = tasks.init(jnp.zeros(4), jnp.ones(4), key=jax.random.key(0))
    numbers = np.asarray(state.memory.of_each.draws.numbers)
    assert len(np.unique(numbers[:, 0])) == 3
    members = gradhpo.Population(optimizer, num_members=2)
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    spread = lambda key, h: h + jax.random.normal(key, h.shape)
    state = members.init(jnp.zeros(4), jnp.ones(4), spread=spread, key=jax.random.key(0))
    state = members.step(state, None, None, loss, distance)
    alike = members.init(jnp.zeros(4), jnp.ones(4), spread=lambda key, h: h)
    found = members.compute_hypergradient(alike, None, None, loss, distance)
    assert not np.allclose(found[0], found[1])  # the same problem, other directions
    assert np.all(np.isfinite(state.hyperparams))
    assert dataclasses.is_dataclass(members.of_member(state, 1).memory)
