"""TaskBatched(restart_every=): tasks restart one after another, in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import OUTER, relaxed

import gradhpo


EVERY, TASKS = 2, 3
STILL = relaxed(optax.sgd(0.0))  # tasks at fixed hyperparameters are independent
MOMENTUM = relaxed(optax.sgd(0.1, momentum=0.9))
TARGETS = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
START, HYPERPARAMS = jnp.ones(2), jnp.full(2, 0.5)


def train_loss(w, h, batch):
    return jnp.sum((w - h * batch) ** 2)


def val_loss(w, h, batch):
    return jnp.sum((w - batch) ** 2)


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


def restarting(single, **settings):
    return gradhpo.TaskBatched(single, TASKS, restart_every=EVERY, **settings)


@pytest.mark.thorough
def test_in_turn_by_hand():
    """Fourteen steps: after 2, 4, 6, ... tasks 0, 1, 2, 0, ... restart, memory included."""
    single = gradhpo.OnlineHypergradientOptimizer(MOMENTUM, STILL)
    optimizer = restarting(single)
    state = optimizer.init(START, HYPERPARAMS)
    first = single.init(START, HYPERPARAMS)
    alone = [first] * TASKS
    turns = {2: 0, 4: 1, 6: 2, 8: 0, 10: 1, 12: 2, 14: 0}
    for step in range(1, 15):
        state = optimizer.step(state, TARGETS, TARGETS, LOSSES)
        alone = [single.step(s, x, x, LOSSES) for s, x in zip(alone, TARGETS, strict=True)]
        trained = np.mean([s.metadata["param_norm"] for s in alone])  # before the restart
        np.testing.assert_allclose(state.metadata["param_norm"], trained, rtol=1e-12)
        if step in turns:
            turn = turns[step]
            alone[turn] = single.restart(alone[turn], first.params, reptile_rate=0.0)
            np.testing.assert_array_equal(state.params[turn], START)
            np.testing.assert_array_equal(state.memory.restarted_at >= 0, np.arange(3) == turn)
        own = lambda s: (s.params, s.inner_opt_state, s.memory)
        found = [own(optimizer.of_task(state, i)) for i in range(TASKS)]
        # Rounding: the same operations, on one task or three.
        assert_same(found, [own(s) for s in alone], rtol=1e-12, atol=1e-14)
    assert state.outer_opt_state == optimizer.init(START, HYPERPARAMS).outer_opt_state


class Normalised:
    """Running state: how many batches a model has seen."""

    @staticmethod
    def train_loss(w, h, batch, seen):
        return train_loss(w, h, batch), seen + 1.0

    @staticmethod
    def val_loss(w, h, batch, seen):
        return val_loss(w, h, batch)


def test_a_run_is_a_loop_over_step_and_goes_on_bit_for_bit(tmp_path):
    """With running state, averaged updates and an Adam for each task; everything compiles once."""
    traces = []

    def counted(*given):
        traces.append(1)
        return Normalised.train_loss(*given)

    losses = gradhpo.LossFunctions(counted, Normalised.val_loss)
    optimizer = restarting(gradhpo.OneStepOptimizer(MOMENTUM, OUTER), average="updates")
    begun = state = optimizer.init(START, HYPERPARAMS, model_state=jnp.zeros(()))
    state = optimizer.step(state, TARGETS, TARGETS, losses)
    once = len(traces)
    for _ in range(8):
        state = optimizer.step(state, TARGETS, TARGETS, losses)
    assert len(traces) == once
    # 9 steps: task 0 restarted after 8, task 1 after 4 and task 2 after 6.
    np.testing.assert_array_equal(state.model_state, [1.0, 5.0, 3.0])

    def run(num_steps, **settings):
        given = optimizer, begun, losses, TARGETS, TARGETS
        settings |= {"num_steps": num_steps, "chunk_size": 3, "progress": False}
        return gradhpo.run(*given, **settings)[0]

    whole = run(9)
    assert_same(whole, state, rtol=1e-12)  # rounding: another program
    run(6, checkpoint=tmp_path)
    assert_same(run(9, checkpoint=tmp_path), whole)


def test_a_task_that_is_not_finite_comes_back():
    """Its steps are refused until its turn; the others keep their state."""
    optimizer = restarting(gradhpo.OneStepOptimizer(MOMENTUM, OUTER))
    state = optimizer.init(START, HYPERPARAMS)
    state = optimizer.step(state, TARGETS, TARGETS, LOSSES)
    before = state = state.update(params=state.params.at[0].set(jnp.nan))
    state = optimizer.step(state, TARGETS, TARGETS, LOSSES)
    assert state.metadata["rejected"] == 1
    np.testing.assert_array_equal(state.params, before.params.at[0].set(START))
    np.testing.assert_array_equal(state.hyperparams, before.hyperparams)
    state = optimizer.step(state, TARGETS, TARGETS, LOSSES)
    assert state.metadata["rejected"] == 1
    assert np.all(np.isfinite(state.params))


def test_a_common_restart_moves_the_point():
    optimizer = restarting(gradhpo.OneStepOptimizer(MOMENTUM, STILL))
    begun = optimizer.init(START, HYPERPARAMS)
    state = optimizer.step(begun, TARGETS, TARGETS, LOSSES)
    state = optimizer.restart(state, begun.params, reptile_rate=0.25)
    common = state.params[0]
    assert not np.allclose(common, START)
    state = optimizer.step(state, TARGETS, TARGETS, LOSSES)
    np.testing.assert_array_equal(state.params[0], common)
    assert not np.any(np.all(np.asarray(state.params[1:]) == np.asarray(common), axis=1))


def test_an_adopted_state_restarts_where_it_would_have():
    optimizer = restarting(gradhpo.OneStepOptimizer(MOMENTUM, STILL))
    other = restarting(gradhpo.GreedyOptimizer(MOMENTUM, STILL))
    state = optimizer.step(optimizer.init(START, HYPERPARAMS), TARGETS, TARGETS, LOSSES)
    state = other.step(other.adopt(state), TARGETS, TARGETS, LOSSES)
    np.testing.assert_array_equal(state.params[0], START)
    for_good = gradhpo.TaskBatched(optimizer.optimizer, TASKS)
    state = for_good.step(for_good.adopt(state), TARGETS, TARGETS, LOSSES)
    for call in (optimizer.adopt, lambda s: optimizer.step(s, TARGETS, TARGETS, LOSSES)):
        with pytest.raises(ValueError, match="know where tasks begin, and TaskBatched has restart"):
            call(state)
    with pytest.raises(ValueError, match="restart_every must be at least 1"):
        gradhpo.TaskBatched(optimizer.optimizer, TASKS, restart_every=0)


# -- hyperparameters that act in the start -------------------------------------------------------


def start_fn(key, h):
    return h * jax.random.normal(key, (2,))


@pytest.mark.thorough
def test_a_task_that_restarts_alone_has_a_new_start_with_its_derivative():
    """One of two tasks restarts after every step, against `jax.grad` through a manual loop."""
    single = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(0.1)), relaxed(optax.sgd(0.05)), 2)
    optimizer = gradhpo.TaskBatched(single, 2, restart_every=1)
    targets, key = TARGETS[:2], jax.random.key(7)
    state, _ = gradhpo.run(
        optimizer, optimizer.init(START, HYPERPARAMS), LOSSES, targets, targets,
        num_steps=3, steps_per_episode=3, start_fn=start_fn, key=key, progress=False,
        callbacks=[seen := Last()], chunk_size=3,
    )  # fmt: skip
    episode = jax.random.fold_in(key, 0)
    keys = [jax.random.fold_in(episode, task) for task in range(2)]
    h, w = HYPERPARAMS, [None, None]

    def after_two(h, w, key, target):
        w = start_fn(key, h) if w is None else w
        for _ in range(2):
            w = w - 0.1 * jax.grad(train_loss)(w, h, target)
        return val_loss(w, h, target), w

    norms = []
    for step in range(1, 4):
        found = [
            jax.value_and_grad(after_two, has_aux=True)(h, w[i], keys[i], targets[i])
            for i in range(2)
        ]
        w = [aux for (_, aux), _ in found]
        g = (found[0][1] + found[1][1]) / 2
        norms.append(np.linalg.norm(g))
        h = h - 0.05 * g
        turn = (step - 1) % 2
        w[turn] = None
        keys[turn] = jax.random.fold_in(jax.random.fold_in(episode, step), turn)
    np.testing.assert_allclose(seen.norms, norms, rtol=1e-12)
    np.testing.assert_allclose(state.hyperparams, h, rtol=1e-12)
    anew = [start_fn(jax.random.fold_in(jax.random.fold_in(key, 1), i), h) for i in range(2)]
    np.testing.assert_allclose(state.params, anew, rtol=1e-12)  # the next episode's start


class Last:
    """The norms of the hypergradients of the last chunk."""

    def __call__(self, state, metrics):
        self.norms = metrics["hypergrad_norm"]
