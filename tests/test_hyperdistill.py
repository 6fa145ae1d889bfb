"""HyperDistill against algorithms 3 and 4 of its paper, written out in NumPy.

The transcription knows a step only by its Jacobians: `phi(z, h, i)` is one inner step with
batch i on a flat z = (w, s), and A, B and alpha are dense matrices. It shares no code with the
library.
"""

import dataclasses
import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from jax.flatten_util import ravel_pytree
from problems import Problem, make, relaxed, stack_of

import gradhpo
from gradhpo.algorithms.discount import past_share
from gradhpo.algorithms.distilled import Distilled


class Flat(NamedTuple):
    """A problem as functions of flat vectors."""

    phi: object  # (z, h, counts before the step, batch) -> z after it
    val_loss: object  # (w, h) -> scalar
    z0: np.ndarray
    size_w: int
    h0: np.ndarray
    d: "Jacobians"


def flattened(problem, inner):
    w, frozen = eqx.partition(problem.params, eqx.is_inexact_array)
    build = lambda h: inner if isinstance(inner, optax.GradientTransformation) else inner(h)
    s = build(problem.hyperparams).init(w)
    s_inexact, _ = eqx.partition(s, eqx.is_inexact_array)
    z0, unravel_z = ravel_pytree((w, s_inexact))
    h0, unravel_h = ravel_pytree(problem.hyperparams)

    def phi(z, h, count, batch):
        (w, s_inexact), hyperparams = unravel_z(z), unravel_h(h)
        loss = lambda w: problem.train_loss(eqx.combine(w, frozen), hyperparams, batch)
        counts = eqx.filter(s, eqx.is_inexact_array, inverse=True)
        counts = jax.tree.map(lambda x: jnp.asarray(count, x.dtype), counts)
        updates, new = build(hyperparams).update(
            jax.grad(loss)(w), eqx.combine(s_inexact, counts), w
        )
        new = eqx.filter(new, eqx.is_inexact_array)
        return ravel_pytree((optax.apply_updates(w, updates), new))[0]

    size_w = ravel_pytree(w)[0].size

    def val_loss(w, h):
        (w, _) = unravel_z(jnp.concatenate([w, jnp.zeros(z0.size - size_w)]))
        return problem.val_loss(eqx.combine(w, frozen), unravel_h(h), problem.val_batch)

    d = Jacobians(phi, val_loss)
    return Flat(jax.jit(phi), jax.jit(val_loss), np.asarray(z0), size_w, np.asarray(h0), d)


class Jacobians:
    """A, B, alpha and the direct term as dense arrays, from two programs."""

    def __init__(self, phi, val_loss):
        self.of_phi = jax.jit(jax.jacrev(phi, (0, 1)))
        self.of_val_loss = jax.jit(jax.grad(val_loss, (0, 1)))

    def a(self, *at):
        return self.of_phi(*at)[0]

    def b(self, *at):
        return self.of_phi(*at)[1]

    def alpha(self, *at):
        return self.of_val_loss(*at)[0]

    def direct(self, *at):
        return self.of_val_loss(*at)[1]


@jax.numpy_dtype_promotion("standard")
def episode(flat, batches, gamma, theta, rate):
    """Algorithm 3, one episode: the p_t, w*_t and g_t of every step."""
    d, z, h, w_star = flat.d, flat.z0, flat.h0, None
    shares, points, hypergradients = [], [], []
    for t in range(1, len(batches) + 1):
        w_prev, s_prev = z[: flat.size_w], z[flat.size_w :]
        p = (gamma - gamma**t) / (1 - gamma**t)
        w_star = w_prev if t == 1 else p * w_star + (1 - p) * w_prev
        z = np.asarray(flat.phi(z, h, t - 1, batches[t - 1]))
        alpha = np.asarray(d.alpha(z[: flat.size_w], h))
        b = np.asarray(d.b(np.concatenate([w_star, s_prev]), h, t - 1, batches[t - 1]))
        v = alpha @ b[: flat.size_w]
        norm = np.linalg.norm(v) * (1 - gamma**t) / (1 - gamma)
        g = np.asarray(d.direct(z[: flat.size_w], h)) + theta * norm * v / np.linalg.norm(v)
        shares.append(p)
        points.append(w_star)
        hypergradients.append(g)
        h = h - rate * g
    return shares, points, hypergradients


@jax.numpy_dtype_promotion("standard")
def linear_estimation(flat, batches, gamma, choose=None):
    """Algorithm 4: the sums x'y and x'x. `choose(d_star, d, p, draw)` mixes the data."""
    d, h, total = flat.d, flat.h0, len(batches)
    z = flat.z0
    for t in range(total):
        before_end, z = z, np.asarray(flat.phi(z, h, t, batches[t]))
    z_0, z_end = flat.z0, z
    alpha_end = np.asarray(d.alpha(z_end[: flat.size_w], h))
    bar = np.concatenate([alpha_end, np.zeros(z_0.size - flat.size_w)])
    line = lambda t: (1 - t / total) * z_0 + (t / total) * z_end
    second_order, w_star, d_star, xs, ys = 0.0, None, None, [], []
    for t in range(total, 0, -1):
        s = total - t + 1
        before = line(t - 1)
        second_order = second_order + bar @ np.asarray(d.b(before, h, t - 1, batches[t - 1]))
        bar = bar @ np.asarray(d.a(before, h, t - 1, batches[t - 1]))
        p = (1 - gamma ** (s - 1)) / (1 - gamma**s)
        w_before = before[: flat.size_w]
        w_star = w_before if s == 1 else p * w_star + (1 - p) * w_before
        d_star = batches[t - 1] if choose is None else choose(d_star, batches[t - 1], p, s)
        at = np.concatenate([w_star, before_end[flat.size_w :]])  # the true s_{T-1}
        v = alpha_end @ np.asarray(d.b(at, h, total - 1, d_star))[: flat.size_w]
        xs.append(np.linalg.norm(v) * (1 - gamma**s) / (1 - gamma))
        ys.append(v / np.linalg.norm(v) @ second_order)
    return np.dot(xs, ys), np.dot(xs, xs)


def quadratic():
    """L_train = w'Hw/2 - w'(Ja + c) H, c of the batch; L_val with a direct term."""
    random = np.random.default_rng(0)
    matrix, target = random.normal(size=(3, 3)), random.normal(size=3)
    coupling, start, h = random.normal(size=(3, 2)), random.normal(size=3), random.normal(size=2)

    def train_loss(w, a, batch):
        rows, c = batch
        return jnp.mean((rows @ w) ** 2) / 2 + 0.1 * w @ w - w @ (coupling @ a + jnp.mean(c, 0))

    def val_loss(w, a, batch):
        return jnp.sum((matrix @ w - target) ** 2) / 2 + 0.05 * a @ a

    params, hyperparams = jnp.asarray(start), jnp.asarray(h)
    return Problem(params, hyperparams, None, None, train_loss, val_loss)


def quadratic_batches(count):
    random = np.random.default_rng(1)
    rows, c = random.normal(size=(count, 4, 3)), random.normal(size=(count, 4, 3))
    return gradhpo.BatchStack((jnp.asarray(rows), jnp.asarray(c)))


# Created once: tests of the same problem share its compiled programs.
@functools.cache
def problem_named(name):
    if name == "MLP, adam":
        problem, inner = make("optimizer", "adam", jax.random.key(0))
    else:
        momentum = 0.9 if name == "quadratic, momentum" else None
        problem, inner = quadratic(), relaxed(optax.sgd(0.05 if momentum else 0.1, momentum))
    return problem, inner, flattened(problem, inner)


def batches_of(problem, count):
    if problem.train_batch is None:
        return quadratic_batches(count)
    return stack_of(problem, count, jax.random.key(1))


NAMES = ["quadratic", "quadratic, momentum", "MLP, adam"]


@pytest.mark.parametrize("name", quick(list(NAMES), keep=["quadratic", "quadratic, momentum"]))
def test_an_episode_is_algorithm_3(name):
    problem, inner, flat = problem_named(name)
    stack = batches_of(problem, 6)
    batches = [stack.at(t) for t in range(6)]
    optimizer = gradhpo.OnlineHypergradientOptimizer(inner, distillation_weight=0.3, gamma=0.9)
    state = optimizer.init(problem.params, problem.hyperparams)
    shares, points, expected = episode(flat, batches, 0.9, theta=0.3, rate=0.02)
    for t, batch in enumerate(batches, start=1):
        arguments = (state, batch, problem.val_batch, problem.train_loss, problem.val_loss)
        g = optimizer.compute_hypergradient(*arguments)
        state = optimizer.step(*arguments, lr_hyper=0.02)
        assert state.memory.t == t
        np.testing.assert_allclose(past_share(0.9, t), shares[t - 1], rtol=1e-12, atol=1e-15)
        w_star = ravel_pytree(state.memory.distilled.w_star)[0]
        np.testing.assert_allclose(w_star, points[t - 1], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(ravel_pytree(g)[0], expected[t - 1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", quick(list(NAMES), keep=["quadratic", "quadratic, momentum"]))
def test_theta_is_algorithm_4(name):
    problem, inner, flat = problem_named(name)
    stack = batches_of(problem, 7)
    batches = [stack.at(t) for t in range(7)]
    optimizer = gradhpo.OnlineHypergradientOptimizer(inner, gamma=0.9, memory_size=2)
    state = optimizer.init(problem.params, problem.hyperparams)
    arguments = (problem.val_batch, problem.train_loss, problem.val_loss)
    xy, xx = linear_estimation(flat, batches, 0.9)
    after = optimizer.estimate_theta(state, stack, *arguments)
    np.testing.assert_allclose(after.memory.theta, xy / xx, rtol=1e-10)
    np.testing.assert_allclose(after.memory.sum_xy[0], xy, rtol=1e-10)
    np.testing.assert_allclose(after.memory.sum_xx[0], xx, rtol=1e-10)
    for unchanged in ("params", "hyperparams", "inner_opt_state", "step"):
        old, new = (jax.tree.leaves(getattr(s, unchanged)) for s in (state, after))
        assert all(x is y or bool(jnp.all(x == y)) for x, y in zip(old, new, strict=True))

    # Pooled with the previous estimate, dropping the oldest.
    shorter = gradhpo.BatchStack(jax.tree.map(lambda x: x[:3], stack.batches))
    xy_2, xx_2 = linear_estimation(flat, batches[:3], 0.9)
    after = optimizer.estimate_theta(after, shorter, *arguments)
    np.testing.assert_allclose(after.memory.theta, (xy + xy_2) / (xx + xx_2), rtol=1e-10)
    after = optimizer.estimate_theta(after, shorter, *arguments)
    np.testing.assert_allclose(after.memory.theta, xy_2 / xx_2, rtol=1e-10)


def test_theta_without_memory():
    """At gamma = 0 the distilled point is the last one, and every factor is 1."""
    problem, inner, flat = problem_named("quadratic")
    stack = batches_of(problem, 7)
    batches = [stack.at(t) for t in range(7)]
    optimizer = gradhpo.OnlineHypergradientOptimizer(inner, gamma=0.0)
    state = optimizer.init(problem.params, problem.hyperparams)
    losses = (problem.train_loss, problem.val_loss)
    theta = optimizer.estimate_theta(state, stack, None, *losses).memory.theta
    xy, xx = linear_estimation(flat, batches, 1e-300)
    np.testing.assert_allclose(theta, xy / xx, rtol=1e-10)


def test_theta_with_distilled_data_is_algorithm_4_with_these_draws():
    problem, inner, flat = problem_named("quadratic")
    stack = batches_of(problem, 7)
    batches = [stack.at(t) for t in range(7)]
    chain = [jax.random.key(3)]

    def choose(d_star, batch, p, s):
        key, draw = jax.random.split(chain[-1])
        chain.append(key)
        fresh = np.asarray(jax.random.uniform(draw, (4,), jnp.float64)) < 1 - p
        if s == 1:
            assert fresh.all()
            return batch
        pick = lambda new, old: np.where(fresh[:, None], new, old)
        return jax.tree.map(pick, batch, d_star)

    xy, xx = linear_estimation(flat, batches, 0.9, choose)
    optimizer = gradhpo.OnlineHypergradientOptimizer(inner, gamma=0.9)
    state = optimizer.init(
        problem.params, problem.hyperparams, batch=batches[0], key=jax.random.key(3)
    )
    after = optimizer.estimate_theta(state, stack, None, problem.train_loss, problem.val_loss)
    np.testing.assert_allclose(after.memory.theta, xy / xx, rtol=1e-10)
    assert jnp.all(after.memory.distilled.key == jax.random.key_data(chain[-1]))


def test_the_product_is_taken_on_the_distilled_data():
    plain, inner, _ = problem_named("quadratic")
    stack = batches_of(plain, 5)
    optimizer = gradhpo.OnlineHypergradientOptimizer(inner, distillation_weight=0.7, gamma=0.8)
    # Curvature that depends on the hyperparameters and the rows, so that B depends on D*.
    train_loss = lambda w, a, batch: (
        plain.train_loss(w, a, batch) + jnp.mean(jnp.sin(batch[0]) @ w) * jnp.sum(a**3)
    )
    problem = plain._replace(train_loss=train_loss)
    flat = flattened(problem, inner)
    d = flat.d
    state = optimizer.init(
        problem.params, problem.hyperparams, batch=stack.at(0), key=jax.random.key(0)
    )
    mixed = False
    for t in range(5):
        arguments = (state, stack.at(t), None, problem.train_loss, problem.val_loss)
        g = optimizer.compute_hypergradient(*arguments)
        before, state = state, optimizer.step(*arguments, lr_hyper=0.0)
        of_now, of_past = stack.at(t)[0], before.memory.distilled.d_star[0]
        rows, w_star = state.memory.distilled.d_star[0], state.memory.distilled.w_star
        new = np.asarray(jnp.all(rows == of_now, axis=1))
        assert np.all(new | np.asarray(jnp.all(rows == of_past, axis=1)))
        mixed |= bool(new.any() and not new.all())
        alpha = np.asarray(d.alpha(state.params, flat.h0))
        v = alpha @ np.asarray(d.b(w_star, flat.h0, t, state.memory.distilled.d_star))
        expected = d.direct(state.params, flat.h0) + 0.7 * (1 - 0.8 ** (t + 1)) / (1 - 0.8) * v
        np.testing.assert_allclose(g, expected, rtol=1e-10)
    assert mixed


@pytest.mark.parametrize("gamma", quick([0.0, 0.7, 1.0], keep=[0.7]))
def test_distilled_data_has_the_shares_of_the_distilled_point_in_expectation(gamma):
    """Slots that hold step i's examples, over 4,000 draws: gamma^(t-i) / sum, within 5 sigma."""
    steps, slots, repeats = 5, 8, 4_000
    state = Distilled(jnp.zeros(1), jnp.zeros((slots, 1)), None)

    def shares(key):
        distilled = Distilled(state.w_star, state.d_star, jax.random.key_data(key))
        for t in range(1, steps + 1):
            batch = jnp.full((slots, 1), float(t))
            distilled = distilled.add(jnp.full(1, float(t)), batch, past_share(gamma, t))
        counts = jnp.stack([jnp.mean(distilled.d_star == t) for t in range(1, steps + 1)])
        return counts, distilled.w_star[0]

    found, w_star = jax.vmap(shares)(jax.random.split(jax.random.key(0), repeats))
    weights = np.array([float(gamma) ** (steps - i) for i in range(1, steps + 1)])
    expected = weights / weights.sum()
    sigma = np.sqrt(expected * (1 - expected) / (slots * repeats))
    assert np.all(np.abs(np.mean(np.asarray(found, float), axis=0) - expected) <= 5 * sigma + 1e-12)
    np.testing.assert_allclose(w_star, expected @ np.arange(1, steps + 1), rtol=1e-12)


@pytest.mark.parametrize("optimizer_name", quick(["momentum", "adam"], keep=["momentum"]))
def test_without_memory_it_is_one_step(optimizer_name, getkey):
    problem, inner = make("optimizer", optimizer_name, getkey())
    outer = relaxed(optax.adam(0.05))
    ours = gradhpo.OnlineHypergradientOptimizer(inner, outer, gamma=0.0, distillation_weight=1.0)
    theirs = gradhpo.OneStepOptimizer(inner, outer)
    a, b = (o.init(problem.params, problem.hyperparams) for o in (ours, theirs))
    stack = stack_of(problem, 4, getkey())
    for t in range(4):
        rest = (stack.at(t), problem.val_batch, problem.train_loss, problem.val_loss)
        found, expected = (
            ours.compute_hypergradient(a, *rest),
            theirs.compute_hypergradient(b, *rest),
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), found, expected
        )
        a, b = ours.step(a, *rest), theirs.step(b, *rest)


def test_at_gamma_one_the_factor_is_t_and_the_point_the_mean():
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2) / 2
    val_loss = lambda w, h, batch: jnp.sum(w)
    optimizer = gradhpo.OnlineHypergradientOptimizer(
        optax.sgd(0.1), optax.sgd(0.0), gamma=1.0, distillation_weight=1.0
    )
    state = optimizer.init(jnp.ones(2), jnp.zeros(2))
    visited = []
    for t in range(1, 6):
        visited.append(state.params)
        g = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
        state = optimizer.step(state, None, None, train_loss, val_loss)
        np.testing.assert_allclose(g, t * 0.1 * np.ones(2), rtol=1e-12)
        np.testing.assert_allclose(state.memory.distilled.w_star, np.mean(visited, 0), rtol=1e-12)
    batches = gradhpo.BatchStack(jnp.zeros((5, 1)))
    theta = optimizer.estimate_theta(state, batches, None, train_loss, val_loss).memory.theta
    # y_s = sum_{k<s} .9^k .1 |1|, x_s = .1 s |1|
    x = 0.1 * np.arange(1, 6)
    y = 0.1 * np.cumsum(0.9 ** np.arange(5))
    np.testing.assert_allclose(theta, x @ y / (x @ x), rtol=1e-12)


def test_next_to_gamma_one_float32_keeps_its_digits():
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2) / 2
    val_loss = lambda w, h, batch: jnp.sum(w)
    gamma = np.float32(1 - 2**-20)
    optimizer = gradhpo.OnlineHypergradientOptimizer(
        optax.sgd(0.1), optax.sgd(0.0), gamma=gamma, distillation_weight=1.0
    )
    state = optimizer.init(jnp.ones(2, jnp.float32), jnp.zeros(2, jnp.float32))
    late = eqx.tree_at(lambda m: m.t, state.memory, jnp.asarray(999, jnp.int32))
    state = state.update(memory=late)
    g = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    exact = (1 - float(gamma) ** 1_000) / (1 - float(gamma))
    np.testing.assert_allclose(g, 0.1 * exact * np.ones(2), rtol=1e-5)


def test_the_rule_for_a_validation_loss_without_the_hyperparameters(getkey):
    problem, inner = make("layers", "momentum", getkey())
    without = gradhpo.model_loss(lambda model, batch: jnp.mean(model.net.layers[1].weight ** 2))
    optimizer = gradhpo.OnlineHypergradientOptimizer(inner, gamma=0.9, normalize=True)
    plain = gradhpo.OnlineHypergradientOptimizer(inner, gamma=0.9)
    state = optimizer.init(problem.params, problem.hyperparams)
    arguments = (state, problem.train_batch, problem.val_batch, problem.train_loss, without)
    g, v = (o.compute_hypergradient(*arguments) for o in (optimizer, plain))
    np.testing.assert_allclose(gradhpo.tree_l2_norm(g), 1.0, rtol=1e-12)
    cosine = gradhpo.tree_dot(g, v) / gradhpo.tree_l2_norm(v)
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-12)


def test_an_estimate_that_says_nothing_or_is_not_finite_keeps_theta():
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
    flat = lambda w, h, batch: 0 * jnp.sum(w) + jnp.sum(h**2)
    val_loss = lambda w, h, batch: jnp.sum(w**2)
    optimizer = gradhpo.OnlineHypergradientOptimizer(
        optax.sgd(0.1), optax.sgd(0.1), distillation_weight=0.4
    )
    state = optimizer.init(jnp.ones(2), jnp.zeros(2))
    good = gradhpo.BatchStack(jnp.ones((5, 2)))
    bad = gradhpo.BatchStack(jnp.ones((5, 2)).at[3].set(jnp.nan))
    nothing = optimizer.estimate_theta(state, good, None, train_loss, flat)
    assert nothing.memory.theta == 0.4
    assert nothing.memory.theta_rejected == 0
    refused = optimizer.estimate_theta(state, bad, None, train_loss, val_loss)
    assert refused.memory.theta == 0.4
    assert refused.memory.theta_rejected == 1
    assert np.all(np.isfinite(refused.memory.sum_xx))
    fitted = optimizer.estimate_theta(refused, good, None, train_loss, val_loss)
    assert fitted.memory.theta != 0.4


def test_estimating_traces_once(getkey):
    traces = []

    def train_loss(w, h, batch):
        traces.append(1)
        return jnp.sum((w - h) ** 2 * batch)

    val_loss = lambda w, h, batch: jnp.sum(w**2)
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.ones(2), jnp.zeros(2))
    state = optimizer.estimate_theta(
        state, gradhpo.BatchStack(jnp.ones((5, 2))), 0.0, train_loss, val_loss
    )
    first = len(traces)
    for i in range(5):
        optimizer = dataclasses.replace(optimizer, gamma=0.9 - 0.1 * i)
        batches = gradhpo.BatchStack((1.0 + i) * jnp.ones((5, 2)))
        state = optimizer.estimate_theta(state, batches, float(i), train_loss, val_loss)
    assert len(traces) == first


@pytest.mark.thorough
def test_keys_and_scalars_of_a_batch_are_those_of_the_step():
    """Dropout: D* keeps examples, never a key."""

    def train_loss(w, h, batch):
        x, scale, key = batch
        noise = jax.random.normal(key, (2,), x.dtype)
        return scale * jnp.mean((x @ (w * noise) - jnp.sum(h)) ** 2)

    val_loss = lambda w, h, batch: jnp.sum(w**2)
    x = jnp.ones((4, 2))
    batch = (x, jnp.asarray(0.5), jax.random.key(7))
    settings = {"gamma": 0.9, "distillation_weight": 1.0}
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), **settings)
    kept = optimizer.init(jnp.ones(2), jnp.ones(2), batch=batch, key=jax.random.key(0))
    plain = optimizer.init(jnp.ones(2), jnp.ones(2))
    for _ in range(3):  # one batch of equal examples: D* = D, and the same key
        arguments = (batch, None, train_loss, val_loss)
        a, b = (optimizer.compute_hypergradient(s, *arguments) for s in (kept, plain))
        np.testing.assert_allclose(a, b, rtol=1e-13)
        kept, plain = (optimizer.step(s, *arguments, lr_hyper=0.1) for s in (kept, plain))
