"""The algorithm's memory, separate from metrics and notes, and running state carried along."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed
from test_contract import ADAM, OF_ANY_LOSS, build, train_loss, val_loss

import gradhpo


SGD = relaxed(optax.sgd(0.1))
LOSSES = gradhpo.LossFunctions(
    lambda w, h, batch: jnp.mean((w - h) ** 2) + 0 * jnp.sum(batch),
    lambda w, h, batch: jnp.mean((w - 1.0) ** 2) + 0 * jnp.sum(batch),
)
BATCH = jnp.zeros(2)


def online(**settings):
    return gradhpo.OnlineHypergradientOptimizer(SGD, SGD, **settings)


def test_what_has_moved_says_where_to():
    state = online().init(jnp.zeros(3), jnp.zeros(3))
    line = r'state\.get_metric\("theta"\)'
    with pytest.raises(KeyError, match=line):
        state.metadata["theta"]
    with pytest.raises(KeyError, match=line):
        state.metadata.get("theta", 0.0)
    with pytest.raises(ValueError, match=r"keeps in its memory.*lambda m: m\.theta"):
        state.update(metadata={"theta": jnp.zeros(())})
    assert state.get_metric("theta") == state.memory.theta
    assert state.get_metric("distilled") is state.memory.distilled


def test_unknown_metrics_are_named():
    state = online().init(jnp.zeros(3), jnp.zeros(3))
    with pytest.raises(KeyError, match=r"no metric 'valloss'; available: .*val_loss.*theta"):
        state.get_metric("valloss")
    with pytest.raises(KeyError, match=r"no 'valloss'; it has"):
        state.metadata["valloss"]
    assert state.get_metric("valloss", None) is None
    assert state.metadata.get("valloss", 3) == 3
    tasks = gradhpo.TaskBatched(online(), 2).init(jnp.zeros(3), jnp.zeros(3))
    assert tasks.get_metric("theta").shape == (2,)


def test_a_scalar_note_is_no_metric_of_a_run():
    optimizer = gradhpo.TaskBatched(online(estimation_period=None), 2)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = state.update(metadata={"note": jnp.asarray(3.0), "pair": jnp.arange(2.0)})
    batches = jnp.zeros((2, 2))
    state, history = gradhpo.run(
        optimizer, state, LOSSES, batches, batches, num_steps=3, progress=False
    )
    assert state.metadata["note"] == 3.0
    np.testing.assert_array_equal(state.metadata["pair"], [0.0, 1.0])
    assert "note" not in history
    assert "theta" in history


RUNNING = {
    "mean": jnp.arange(1.0, 4.0),
    "layers": [{"count": jnp.asarray(4, jnp.int32)}, {"seen": jnp.array([True, False])}],
}


def carrying(loss, returns=True):
    """A loss that passes the running state on."""
    if returns:
        return lambda w, h, batch, r: (loss(w, h, batch), r)
    return lambda w, h, batch, r: loss(w, h, batch)


CARRYING = carrying(train_loss), carrying(val_loss, returns=False)


def of_task(number):
    """Running state that differs between tasks."""
    return jax.tree.map(lambda x: x if x.dtype == bool else x + number, RUNNING)


@pytest.mark.parametrize(
    ("name", "tasks"),
    quick(
        [(name, tasks) for name in OF_ANY_LOSS if name != "tasks" for tasks in (None, 2)],
        keep=[("implicit", 2)],
    ),
)
def test_running_state_is_carried_everywhere(name, tasks, tmp_path):
    """Nothing reads it yet: every optimizer returns it unchanged, in every dtype."""
    optimizer, batch, running = build(name, ADAM, SGD), BATCH, RUNNING
    if tasks:
        optimizer, batch = gradhpo.TaskBatched(optimizer, tasks), jnp.zeros((tasks, 2))
        running = jax.tree.map(lambda *x: jnp.stack(x), *map(of_task, range(tasks)))
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -1.0))
    # With matching memory: forward mode also has a derivative of the running state.
    state = optimizer.adopt(state.update(model_state=running))

    def assert_carried(found, rejected=0):
        assert found.get_metric("rejected") == rejected
        assert eqx.tree_equal(found.model_state, running)

    step = lambda state, batch: optimizer.step(state, batch, BATCH, *CARRYING)
    if not tasks:
        state_after = step(state, batch)
        assert_carried(state_after)
        assert not np.array_equal(state_after.hyperparams, state.hyperparams)
        assert_carried(step(state_after, jnp.nan * batch), rejected=1)
        assert_carried(again := optimizer.adopt(state_after))
        assert (again.step, again.get_metric("val_loss")) == (1, state_after.get_metric("val_loss"))
    losses = gradhpo.LossFunctions(*CARRYING)
    # Chunks of one episode: one program for all of them.
    run = lambda num_steps: gradhpo.run(
        optimizer, state, losses, batch, batch, num_steps=num_steps, steps_per_episode=2,
        reptile_rate=0.5, chunk_size=2, checkpoint=tmp_path, progress=False,
    )[0]  # fmt: skip
    assert_carried(run(2))
    another = state.update(model_state=jax.tree.map(jnp.zeros_like, running))
    assert_carried(gradhpo.load_checkpoint(tmp_path, another)[0])
    assert_carried(run(4))


def test_running_state_that_is_not_finite_refuses_the_step():
    """Only if it has become so: earlier non-finite values are taken for a mask."""

    class Broken(gradhpo.OneStepOptimizer):
        def estimate(self, problem, memory):
            found = super().estimate(problem, memory)
            return eqx.tree_at(lambda x: x.z.r, found, found.z.r * jnp.nan)

    optimizer = Broken(SGD, SGD)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3)).update(model_state=jnp.ones(2))
    losses = carrying(LOSSES.train_loss), carrying(LOSSES.val_loss, returns=False)
    after = optimizer.step(state, BATCH, BATCH, *losses)
    assert after.get_metric("rejected") == 1
    np.testing.assert_array_equal(after.model_state, np.ones(2))
    np.testing.assert_array_equal(after.hyperparams, state.hyperparams)


class Counted(eqx.Module):
    number: jax.Array


def test_a_memory_that_is_not_finite_refuses_the_step():
    """Though everything else in the step is finite."""

    class Breaking(gradhpo.OneStepOptimizer):
        def init_memory(self, z, hyperparams, batch, key):
            return Counted(jnp.zeros(()))

        def estimate(self, problem, memory: Any):
            found = super().estimate(problem, None)
            memory = Counted(memory.number + jnp.where(memory.number < 1, 1, jnp.inf))
            return dataclasses.replace(found, memory=memory)

    optimizer = Breaking(SGD, SGD)
    step = lambda state: optimizer.step(state, BATCH, BATCH, LOSSES.train_loss, LOSSES.val_loss)
    state = step(optimizer.init(jnp.zeros(3), jnp.zeros(3)))
    after = step(state)
    assert (state.get_metric("rejected"), after.get_metric("rejected")) == (0, 1)
    assert (state.get_metric("number"), after.get_metric("number")) == (1, 1)
    np.testing.assert_array_equal(after.params, state.params)
    np.testing.assert_array_equal(after.hyperparams, state.hyperparams)


class Counting(gradhpo.OneStepOptimizer):
    """Counts refused steps too, in a memory of one problem."""

    def init_memory(self, z, hyperparams, batch, key):
        return Counted(jnp.zeros(()))

    def estimate(self, problem, memory: Any):
        found = super().estimate(problem, None)
        return dataclasses.replace(found, memory=Counted(memory.number + 1))

    def after_refusal(self, old, new):
        assert old.number.shape == new.number.shape == ()
        return new


@pytest.mark.parametrize(
    "wrap", [lambda x: gradhpo.TaskBatched(x, 2), lambda x: gradhpo.Population(x, 2)]
)
def test_a_wrapper_asks_for_the_memory_after_a_refusal_problem_by_problem(wrap):
    optimizer = wrap(Counting(SGD, SGD))
    tasks = isinstance(optimizer, gradhpo.TaskBatched)
    shape = (3,) if tasks else (2, 3)
    state = optimizer.init(jnp.zeros(shape), jnp.zeros(shape))
    batch = jnp.full((2, 2) if tasks else (2,), jnp.nan)
    train_loss = lambda w, h, batch: jnp.mean((w - h) ** 2) * jnp.sum(batch)
    after = optimizer.step(state, batch, BATCH, train_loss, LOSSES.val_loss)
    assert np.all(after.get_metric("rejected") == 1)
    np.testing.assert_array_equal(after.memory.of_each.number, np.ones(2))


@pytest.mark.parametrize(
    "wrap",
    [pytest.param(lambda x: x, marks=pytest.mark.thorough), lambda x: gradhpo.TaskBatched(x, 2)],
)
@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd,
        pytest.param(lambda rate: optax.adam(rate, eps_root=1e-8), marks=pytest.mark.thorough),
    ],
)
def test_a_checkpoint_under_any_wrapper_refuses_another_inner_rate(wrap, inner, tmp_path):
    def run(rate, num_steps):
        optimizer = wrap(gradhpo.OneStepOptimizer(relaxed(inner(rate)), SGD))
        state, batches = optimizer.init(jnp.zeros(3), jnp.zeros(3)), jnp.zeros((2, 2))
        gradhpo.run(
            optimizer, state, LOSSES, batches, batches, num_steps=num_steps, progress=False,
            checkpoint=tmp_path,
        )  # fmt: skip

    run(0.1, 2)
    run(0.1, 3)
    with pytest.raises(ValueError, match="the update of inner_optimizer"):
        run(0.2, 4)
