"""Episodes of `run`: restarts, Reptile, re-estimation, and independence of the chunks."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed

import gradhpo


X = jax.random.normal(jax.random.key(0), (40, 3), jnp.float32)
# Created once: tests of the same optimizer share its compiled programs.
SGD = relaxed(optax.sgd(0.05, momentum=0.9))
OUTER = relaxed(optax.sgd(0.05))


def train_loss(w, h, batch):
    return jnp.mean((batch @ w - 1) ** 2) + jnp.sum(jnp.exp(h) * w**2)


def val_loss(w, h, batch):
    return jnp.mean((batch @ w - 0.5) ** 2) + 0.01 * jnp.sum(h**2)


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


def data():
    return gradhpo.ArrayData(X.astype(float), batch_size=8, key=jax.random.key(1))


def val_data():
    """A different batch at every step, of another size."""
    return gradhpo.ArrayData(X.astype(float), batch_size=5, key=jax.random.key(3))


def hyperdistill(period=2, **settings):
    return gradhpo.OnlineHypergradientOptimizer(SGD, OUTER, estimation_period=period, **settings)


def start(optimizer, **examples):
    return optimizer.init(jnp.full(3, 0.1), jnp.full(3, -3.0), **examples)


def run(optimizer, state=None, source=None, val=None, **settings):
    state = start(optimizer) if state is None else state
    settings = {"num_steps": 24, "steps_per_episode": 6, "progress": False} | settings
    source = data() if source is None else source
    val = X[:10].astype(float) if val is None else val
    return gradhpo.run(optimizer, state, LOSSES, source, val, **settings)


def assert_close(found, expected, rtol=1e-12):
    assert_same(found, expected, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("rate", quick([0.0, 0.3, 1.0], keep=[0.3]))
def test_is_what_a_loop_by_hand_does(rate):
    """Six steps, Reptile, a new optimizer state, a new clock; theta before episodes 0, 2, ...

    Theta is for the end of the episode, so it takes the validation batch of its last step.
    """
    optimizer, source, val = hyperdistill(), data(), val_data()
    found, history = run(optimizer, val=val, reptile_rate=rate)
    state, thetas = start(optimizer), []
    for episode in range(4):
        stack = gradhpo.BatchStack.of([source(6 * episode + t) for t in range(6)])
        if episode % 2 == 0:
            state = optimizer.estimate_theta(state, stack, val(6 * episode + 5), *losses())
        begun = state
        for t in range(6):
            state = optimizer.step(state, stack.at(t), val(6 * episode + t), *losses())
            thetas.append(state.memory.theta)
        phi = begun.params - rate * (begun.params - state.params)
        by_hand = state.update(
            params=phi,
            inner_opt_state=start(optimizer).inner_opt_state,
            memory=eqx.tree_at(lambda m: m.t, state.memory, jnp.zeros((), jnp.int32)),
            fresh=True,
        )
        state = optimizer.restart(state, begun.params, rate)
        assert_close(state, by_hand)
    assert_close(found, state, rtol=1e-10)
    np.testing.assert_allclose(history["theta"], thetas, rtol=1e-10)
    assert len(set(np.round(history["theta"], 12).tolist())) == 2


def losses():
    return LOSSES.train_loss, LOSSES.val_loss


@pytest.mark.thorough
def test_chunks_and_sources_make_no_difference():
    """Chunks of several episodes, of one, of parts of one; arrays, or an iterator over them."""
    optimizer = hyperdistill()
    source, val = data(), val_data()
    examples = {"batch": source(0), "key": jax.random.key(2)}
    results = [
        run(optimizer, start(optimizer, **examples), val=val, chunk_size=chunk_size)
        for chunk_size in (100, 4)
    ]
    # Iterators: in chunks of two episodes, and of one where 4 steps are too few for it.
    for chunk_size in (12, 4):
        iterators = map(source, itertools.count()), map(val, itertools.count())
        begun = start(optimizer, **examples)
        results.append(run(optimizer, begun, *iterators, chunk_size=chunk_size))
    for state, history in results[1:]:
        assert_close(state, results[0][0], rtol=1e-10)
        assert_close(dict(history), dict(results[0][1]), rtol=1e-10)


@pytest.mark.thorough
def test_a_run_in_two_parts_is_one_run():
    optimizer = hyperdistill(period=3)
    whole, _ = run(optimizer, reptile_rate=0.5)
    part, _ = run(optimizer, reptile_rate=0.5, num_steps=12)
    part, _ = run(optimizer, part, reptile_rate=0.5, num_steps=12)
    assert_close(part, whole)


@pytest.mark.parametrize("chunk_size", quick([12, 3], keep=[3]))
def test_one_trace_for_the_whole_run(chunk_size):
    traces = []

    def counted(w, h, batch):
        traces.append(1)
        return train_loss(w, h, batch)

    optimizer = hyperdistill()
    counts = []
    for num_steps in (12, 120):
        traces.clear()
        gradhpo.run(
            optimizer, start(optimizer), gradhpo.LossFunctions(counted, val_loss), data(),
            X[:10].astype(float), num_steps=num_steps, steps_per_episode=6,
            chunk_size=chunk_size, progress=False,
        )  # fmt: skip
        counts.append(len(traces))
    # A step and an estimate of theta, each traced a few times; the second run reuses everything.
    assert 0 < counts[0] <= 20
    assert counts[1] == 0


@pytest.mark.thorough
def test_every_optimizer_restarts():
    """Cold restarts from the same point with frozen hyperparameters: every episode is the same."""
    for optimizer in (
        gradhpo.GreedyOptimizer(relaxed(optax.adam(0.1, eps_root=1e-16)), unroll_steps=2),
        gradhpo.OnlineHypergradientOptimizer(relaxed(optax.adam(0.1, eps_root=1e-16))),
    ):
        state = start(optimizer)
        after, history = run(
            optimizer, state, X.astype(float), lr_hyper=0.0, num_steps=9, steps_per_episode=3,
            reptile_rate=0.0,
        )  # fmt: skip
        values = history["val_loss"].reshape(3, 3)
        np.testing.assert_allclose(values, np.broadcast_to(values[0], (3, 3)), rtol=1e-12)
        assert len(set(values[0].tolist())) == 3
        assert_close(after.params, state.params)
        assert_close(after.inner_opt_state, state.inner_opt_state)


def test_an_inner_optimizer_of_the_hyperparameters_restarts_at_the_new_ones():
    inner = lambda h: relaxed(optax.sgd(jnp.exp(h["log_rate"]), momentum=0.9))
    optimizer = gradhpo.OneStepOptimizer(inner, relaxed(optax.sgd(0.1)))
    state = optimizer.init(jnp.ones(3), {"log_rate": jnp.asarray(-3.0)})
    loss = lambda w, h, batch: jnp.mean((batch @ w - 1) ** 2)
    state, history = gradhpo.run(
        optimizer, state, gradhpo.LossFunctions(loss, loss), data(), X[:10].astype(float),
        num_steps=20, steps_per_episode=5, reptile_rate=0.0, progress=False,
    )  # fmt: skip
    assert state.hyperparams["log_rate"] != -3.0
    np.testing.assert_array_equal(state.params, np.ones(3))
    assert history.stop_reason == "num_steps"


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: gradhpo.TaskBatched(x, 2)])
def test_the_inner_optimizer_begins_where_the_episode_does(wrap):
    """A memory that stores parameters gets the new start's, after Reptile's update."""
    pulled = lambda g, anchor, w: (-0.1 * g - 0.05 * (w - anchor), anchor)
    inner = optax.GradientTransformation(lambda w: w, pulled)
    optimizer = wrap(gradhpo.OneStepOptimizer(inner, OUTER))
    begun = start(optimizer)
    batch = jnp.stack([X[:8], X[8:16]]).astype(float) if begun.params.ndim == 2 else data()(0)
    ended = optimizer.step(begun, batch, batch, *losses())
    assert_close(ended.inner_opt_state, begun.params)
    state = optimizer.restart(ended, begun.params, 0.25)
    moved = np.mean(np.atleast_2d(ended.params - begun.params), axis=0)
    assert np.all(np.abs(moved) > 1e-3)
    assert_close(state.params, np.asarray(begun.params) + 0.25 * moved)
    assert_close(state.inner_opt_state, state.params)


def test_an_iterator_that_ends_within_an_episode_leaves_whole_ones():
    optimizer = hyperdistill()
    source = data()
    batches = iter([source(i) for i in range(15)])
    with pytest.warns(RuntimeWarning, match="An iterator ended"):
        state, history = run(optimizer, source=batches, chunk_size=100)
    assert state.step == 12
    assert history.stop_reason == "data exhausted"


def test_steps_by_hand_before_a_run_leave_no_stale_clock():
    """Six steps without a restart, then episodes: the same as after a restart."""
    optimizer, source = hyperdistill(), data()
    state = start(optimizer)
    for i in range(6):
        state = optimizer.step(state, source(i), X[:10].astype(float), *losses())
    assert state.memory.t == 6
    clock = jnp.zeros((), jnp.int32)
    restarted = state.update(memory=eqx.tree_at(lambda m: m.t, state.memory, clock))
    found, expected = (run(optimizer, s, num_steps=6)[1] for s in (state, restarted))
    assert_close(dict(found), dict(expected))


def test_a_run_without_episodes_says_that_theta_is_never_fitted():
    with pytest.warns(UserWarning, match="never fits the theta.*pass steps_per_episode"):
        run(hyperdistill(), num_steps=2, steps_per_episode=None)


def test_the_report_says_what_was_refused_and_what_was_restarted():
    optimizer = hyperdistill(period=1)
    bad = jnp.full_like(X[:8].astype(float), jnp.nan)
    with pytest.warns(RuntimeWarning, match="1 estimates of theta"):
        _, history = run(optimizer, source=bad, num_steps=6, max_rejections=3, reptile_rate=0.0)
    assert "at the start of the next episode" in history.report


def test_estimation_period_none_keeps_the_weight():
    optimizer = hyperdistill(period=None, distillation_weight=0.25)
    _, history = run(optimizer)
    np.testing.assert_array_equal(history["theta"], 0.25)
    optimizer = hyperdistill(normalize=True, distillation_weight=0.25)
    _, history = run(optimizer)
    np.testing.assert_array_equal(history["theta"], 0.25)
