"""FixedOptimizer trains and leaves the hyperparameters unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import relaxed

import gradhpo


ADAM = relaxed(optax.adam(0.1, eps_root=1e-8))
SGD = optax.sgd(0.1)
W, H = jnp.array([0.3, 0.1, -0.4]), jnp.zeros(3)


def train_loss(w, h, batch):
    return jnp.sum((w - h) ** 2 * batch)


def val_loss(w, h, batch):
    return jnp.sum((w - 1.0) ** 2)


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
DATA = gradhpo.ArrayData(jnp.arange(1.0, 31.0).reshape(10, 3), 1, jax.random.key(0))
of_one = lambda i: DATA(i)[0]


def run(optimizer, state, **settings):
    return gradhpo.run(optimizer, state, LOSSES, of_one, None, progress=False, **settings)


@pytest.mark.parametrize("steps", [1, 3])
def test_is_training_by_hand(steps):
    optimizer = gradhpo.FixedOptimizer(ADAM, inner_steps=steps)
    state, history = run(optimizer, optimizer.init(W, H), num_steps=4)
    w, s = W, ADAM.init(W)
    for t in range(4 * steps):
        loss, gradient = jax.value_and_grad(train_loss)(w, H, of_one(t))
        updates, s = ADAM.update(gradient, s, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(state.params, w, rtol=1e-12)
    assert_same(state.hyperparams, H)
    assert_same(state.inner_opt_state, s, rtol=1e-12)
    np.testing.assert_allclose(history["train_loss"][-1], loss, rtol=1e-12)
    np.testing.assert_allclose(history["val_loss"][-1], val_loss(w, H, None), rtol=1e-12)
    assert not np.any(history["hypergrad_norm"])
    assert "exactly 0" not in history.report


def test_takes_the_steps_of_an_optimizer_that_tunes_by_0():
    """The untuned baseline of the same run, batch by batch."""
    tuning = gradhpo.GreedyOptimizer(ADAM, optax.sgd(0.0), unroll_steps=2)
    fixed = gradhpo.FixedOptimizer(ADAM, inner_steps=2)
    episodes = dict(num_steps=6, steps_per_episode=3, reptile_rate=0.5)
    expected, its = run(tuning, tuning.init(W, H), **episodes)
    found, ours = run(fixed, fixed.init(W, H), **episodes)
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-12)
    for metric in ("train_loss", "val_loss", "param_norm"):
        np.testing.assert_allclose(ours[metric], its[metric], rtol=1e-12)


@pytest.mark.thorough
def test_warm_up_and_final_training():
    fixed = gradhpo.FixedOptimizer(ADAM)
    tuning = gradhpo.OneStepOptimizer(ADAM, relaxed(optax.adam(0.1)))
    state, _ = run(fixed, fixed.init(W, H), num_steps=5)
    tuned, _ = run(tuning, tuning.adopt(state), num_steps=5)
    assert tuned.step == 10
    assert tuned.inner_opt_state[0].count == 10
    assert np.all(tuned.hyperparams != 0)
    again = fixed.restart(fixed.adopt(tuned), W, reptile_rate=0.0)
    final, _ = run(fixed, again, num_steps=3)
    assert_same(final.hyperparams, tuned.hyperparams)
    assert final.inner_opt_state[0].count == 3


def test_with_a_checkpoint_tasks_and_plan(tmp_path):
    fixed = gradhpo.TaskBatched(gradhpo.FixedOptimizer(ADAM), 2)
    batch = jnp.ones((2, 3))
    at = lambda steps: gradhpo.run(
        fixed,
        fixed.init(W, H),
        LOSSES,
        batch,
        None,
        num_steps=steps,
        progress=False,
        checkpoint=tmp_path,
    )
    at(2)
    state, history = at(4)
    assert state.step == 4
    assert len(history["val_loss"]) == 4
    one = gradhpo.FixedOptimizer(ADAM)
    plan = gradhpo.plan({"fixed": one}, one.init(W, H), W, None, LOSSES, horizons=[2])
    assert plan["fixed", 2].optimizer.num_inner_steps == 2


def test_line_searches_train_too():
    optimizer = gradhpo.FixedOptimizer(relaxed(optax.lbfgs()), inner_steps=20)
    state = optimizer.step(optimizer.init(W, H), jnp.ones(3), None, train_loss, val_loss)
    np.testing.assert_allclose(state.params, H, atol=1e-8)


def test_what_it_refuses():
    optimizer = gradhpo.FixedOptimizer(ADAM)
    state = optimizer.init(W, H)
    with pytest.raises(TypeError, match=r"computes no hypergradient: use another optimizer.*adopt"):
        optimizer.compute_hypergradient(state, W, None, train_loss, val_loss)
    with pytest.raises(ValueError, match="FixedOptimizer leaves the hyperparameters as they are"):
        optimizer.step(state, W, None, train_loss, val_loss, lr_hyper=0.1)
    with pytest.raises(ValueError, match="leave lr_hyper out"):
        run(optimizer, state, num_steps=1, lr_hyper=0.1)
    with pytest.raises(TypeError, match="outer_optimizer"):
        gradhpo.FixedOptimizer(ADAM, outer_optimizer=optax.sgd(0.1))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    with pytest.raises(TypeError, match="leaves the hyperparameters as they are"):
        gradhpo.compare_hypergradients({"fixed": optimizer}, state, W, None, losses)
    with pytest.raises(TypeError, match="leaves the hyperparameters as they are"):
        gradhpo.check_hypergradient(optimizer, state, W, None, losses)


@pytest.mark.parametrize("outer", [(SGD,), {"outer_optimizer": SGD}])
def test_says_that_it_has_no_outer_optimizer(outer):
    positional, by_name = (outer, {}) if isinstance(outer, tuple) else ((), outer)
    with pytest.raises(TypeError, match=r"has no outer_optimizer: leave it out, FixedOptimizer\("):
        gradhpo.FixedOptimizer(SGD, *positional, **by_name)
    with pytest.raises(TypeError, match="takes inner_steps by name: write inner_steps=10"):
        gradhpo.FixedOptimizer(SGD, 10)
