"""`adopt` takes a state from one optimizer to another, and refuses foreign states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import relaxed

import gradhpo


ADAM, OUTER = relaxed(optax.adam(0.1)), relaxed(optax.adam(0.01))
START = {"w": jnp.ones(3)}
BATCHES = gradhpo.BatchStack(jnp.ones((4, 3)))


def loss(w, h, batch):
    return jnp.sum((w["w"] - h) ** 2 * batch)


LOSSES = (loss, loss)
ONES = jnp.ones(3)
ONLINE = gradhpo.OnlineHypergradientOptimizer(ADAM, OUTER, estimation_period=None)
FIRST_ORDER = gradhpo.FOOptimizer(ADAM, OUTER)


@pytest.fixture(scope="module")
def after_two_steps():
    state = ONLINE.init(START, jnp.zeros(3))
    for _ in range(2):
        state = ONLINE.step(state, ONES, ONES, *LOSSES)
    return state.update(metadata={"note": jnp.array(7.0)})


def test_keeps_the_problem_and_makes_the_rest_anew(after_two_steps):
    state = after_two_steps
    there = FIRST_ORDER.adopt(state)
    kept = lambda s: (s.params, s.hyperparams, s.inner_opt_state, s.step, dict(s.metadata))
    assert_same(kept(there), kept(state))
    assert there.memory is None
    assert there.outer_opt_state[0].count == 0
    assert state.outer_opt_state[0].count == 2
    stepped = FIRST_ORDER.step(there, ONES, ONES, *LOSSES)
    assert stepped.step == 3
    assert stepped.get_metric("note") == 7
    back = ONLINE.adopt(stepped)
    assert back.memory.t == 0
    assert_same(back.memory.distilled.w_star, stepped.params)


def test_a_note_with_the_name_of_a_memory_is_refused():
    """It would hide the memory's entry of that name."""
    state = FIRST_ORDER.init(START, jnp.zeros(3)).update(metadata={"theta": jnp.array(7.0)})
    with pytest.raises(ValueError, match=r"notes called theta.*without\(\['theta'\]\)"):
        ONLINE.adopt(state)
    state = dataclasses.replace(state, metadata=state.metadata.without(["theta"]))
    assert ONLINE.adopt(state).get_metric("theta") != 7


def test_another_inner_optimizer_starts_anew(after_two_steps):
    momentum = relaxed(optax.sgd(0.1, momentum=0.9))
    state = gradhpo.OneStepOptimizer(momentum, OUTER).adopt(after_two_steps)
    assert_same(state.inner_opt_state, momentum.init(START))


def test_of_tasks():
    together = lambda single: gradhpo.TaskBatched(single, 2)
    state = together(ONLINE).init(START, jnp.zeros(3))
    batch = jnp.arange(6.0).reshape(2, 3)
    state = together(ONLINE).step(state, batch, batch, *LOSSES)
    there = together(FIRST_ORDER).adopt(state)
    assert_same(there.params, state.params)
    assert_same(there.inner_opt_state, state.inner_opt_state)
    assert there.memory.of_each is None
    assert together(FIRST_ORDER).step(there, batch, batch, *LOSSES).step == 2
    with pytest.raises(ValueError, match="holds several inner problems, and FOOptimizer takes one"):
        FIRST_ORDER.adopt(state)
    with pytest.raises(ValueError, match=r"made for 2 tasks, and TaskBatched has num_tasks=3"):
        gradhpo.TaskBatched(FIRST_ORDER, 3).adopt(state)


WAYS = {
    "step": lambda optimizer, state: optimizer.step(state, ONES, ONES, *LOSSES),
    "restart": lambda optimizer, state: optimizer.restart(state),
    "run": lambda optimizer, state: gradhpo.run(
        optimizer,
        state,
        gradhpo.LossFunctions(*LOSSES),
        ONES,
        ONES,
        num_steps=2,
        progress=False,
    ),
    "adopt": lambda optimizer, state: optimizer.adopt(state),
}


@pytest.mark.parametrize("way", ["step", "restart", "run"])
def test_a_foreign_state_is_refused_with_that_line(way, after_two_steps):
    for optimizer, state in (
        (FIRST_ORDER, after_two_steps),
        (ONLINE, FIRST_ORDER.init(START, jnp.zeros(3))),
    ):
        with pytest.raises(ValueError, match=r"(?s)state\.memory does not fit.*adopt\(state\)"):
            WAYS[way](optimizer, state)


@pytest.mark.parametrize("way", list(WAYS))
def test_tasks_refuse_the_state_of_one(way, after_two_steps):
    together = gradhpo.TaskBatched(ONLINE, 3)
    with pytest.raises(ValueError, match="the state was made without a task axis"):
        WAYS[way](together, after_two_steps)


def test_a_memory_is_not_a_dict(after_two_steps):
    with pytest.raises(TypeError, match=r"write state\.memory\.theta, or state\.get_metric"):
        after_two_steps.memory["theta"]
    of_tasks = gradhpo.TaskBatched(ONLINE, 2).init(START, jnp.zeros(3))
    with pytest.raises(TypeError, match=r"state\.memory\.of_each\.theta"):
        of_tasks.memory["theta"]


def test_estimate_theta_refuses_what_it_cannot_see():
    unseen = lambda w, h, batch: jnp.sum(w["w"] ** 2)
    state = ONLINE.init(START, jnp.zeros(3))
    with pytest.raises(ValueError, match="sees none of the hyperparameters"):
        ONLINE.estimate_theta(state, BATCHES, ONES, unseen, unseen)


def test_a_refused_step_of_any_kind_keeps_a_finite_memory(after_two_steps):
    """Everything that a step changes must be finite: theta and the distilled point."""
    bad = ONLINE.step(after_two_steps, jnp.full(3, jnp.nan), ONES, *LOSSES)
    assert bad.get_metric("rejected") == 1
    leaves = jax.tree.leaves(bad.memory)
    assert all(np.all(np.isfinite(x)) for x in leaves)
