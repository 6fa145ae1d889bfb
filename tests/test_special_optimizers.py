"""Inner optimizers of optax that need more than a gradient, and the docs' code for them."""

import ast
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat
from problems import relaxed

import gradhpo


PAGE = (Path(__file__).parents[1] / "docs" / "hyperparameters.md").read_text()
X = jax.random.normal(jax.random.key(0), (2, 20, 3))
TRAIN, VAL = ((x, jnp.sin(jnp.sum(x, axis=1))) for x in X)
W, H = jnp.asarray([0.3, -0.2, 0.5]), {"rate": jnp.asarray(-2.0), "decay": jnp.asarray(-3.0)}


def from_the_page(*wanted):
    """The objects that a block of the page defines under these names."""
    [block] = [
        x for x in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f" {wanted[0]}(" in x
    ]
    parts = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    definitions = [part for part in ast.parse(block).body if isinstance(part, parts)]
    names = {"jax": jax, "jnp": jnp, "optax": optax}
    exec(compile(ast.Module(definitions, []), "hyperparameters.md", "exec"), names)
    return [names[name] for name in wanted]


def error(w, h, batch):
    return jnp.mean((jnp.tanh(batch[0] @ w) - batch[1]) ** 2)


def penalised(w, h, batch):
    return error(w, h, batch) + jnp.exp(h["decay"]) * jnp.sum(w**2)


def agree(inner, w, train_loss, val_loss, steps=7):
    """Reverse mode, forward mode and finite differences of the same inner steps."""
    reverse = gradhpo.UnrolledOptimizer(inner, optax.sgd(0.1), unroll_steps=steps)
    forward = gradhpo.ForwardModeOptimizer(inner, optax.sgd(0.1), unroll_steps=steps)
    state, arguments = reverse.init(w, H), (TRAIN, VAL, train_loss, val_loss)
    found = reverse.compute_hypergradient(state, *arguments)
    other = forward.compute_hypergradient(forward.init(w, H), *arguments)
    np.testing.assert_allclose(flat(other), flat(found), rtol=1e-10)
    exact = gradhpo.finite_difference_hypergradient(reverse, state, *arguments)
    np.testing.assert_allclose(flat(found), flat(exact), rtol=1e-6)
    assert np.all(flat(found) != 0)
    return reverse.step(state, *arguments)


def trained(rule, steps, **more):
    """A hand-written loop, as optax documents it."""
    w = W
    state = rule.init(w)
    for _ in range(steps):
        updates, state = rule.update(jax.grad(penalised)(w, H, TRAIN), state, w, **more)
        w = optax.apply_updates(w, updates)
    return w


# -- optax.lookahead ---------------------------------------------------------------------------

LOOKAHEAD = lambda h: relaxed(
    optax.lookahead(optax.adam(jnp.exp(h["rate"]), eps_root=1e-16), 3, 0.5)
)


@pytest.mark.thorough
def test_lookahead_trains_its_fast_parameters_and_validates_the_slow_ones():
    w = optax.LookaheadParams.init_synced(W)
    of_fast = lambda p, h, batch: penalised(p.fast, h, batch)
    of_slow = lambda p, h, batch: error(p.slow, h, batch)
    found = agree(LOOKAHEAD, w, of_fast, of_slow).params
    # As optax documents it.
    rule = LOOKAHEAD(H)
    by_hand: Any = w
    state = rule.init(by_hand)
    for _ in range(7):
        gradient = jax.grad(penalised)(by_hand.fast, H, TRAIN)
        updates, state = rule.update(gradient, state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    np.testing.assert_allclose(flat(found), flat(by_hand), rtol=1e-12)


def test_lookahead_of_plain_parameters_says_what_to_write():
    optimizer = gradhpo.UnrolledOptimizer(LOOKAHEAD, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"LookaheadParams.init_synced.*params.fast.*params.slow"):
        optimizer.init(W, H)


# -- optax.contrib.schedule_free ---------------------------------------------------------------

SCHEDULE_FREE = lambda h: optax.contrib.schedule_free_sgd(jnp.exp(h["rate"]))


@pytest.mark.thorough
def test_schedule_free_is_validated_at_its_average_by_the_lines_of_the_page():
    averaged, both = from_the_page("averaged", "Both")
    inner = lambda h: relaxed(averaged(SCHEDULE_FREE(h)))
    of_trained = lambda p, h, batch: penalised(p.trained, h, batch)
    of_average = lambda p, h, batch: error(p.average, h, batch)
    found = agree(inner, both(W, W), of_trained, of_average).params
    rule, y = relaxed(SCHEDULE_FREE(H)), W
    state = rule.init(y)
    for _ in range(7):
        updates, state = rule.update(jax.grad(penalised)(y, H, TRAIN), state, y)
        y = optax.apply_updates(y, updates)
    x = optax.contrib.schedule_free_eval_params(state, y)
    np.testing.assert_allclose(found.trained, y, rtol=1e-12)
    np.testing.assert_allclose(found.average, x, rtol=1e-10)
    assert not np.allclose(x, y)


def test_schedule_free_alone_is_warned_about():
    optimizer = gradhpo.UnrolledOptimizer(SCHEDULE_FREE, optax.sgd(0.1))
    with pytest.warns(UserWarning, match=r"schedule_free.*average.*docs/hyperparameters.md"):
        optimizer.init(W, H)


# -- optax.contrib.sophia ----------------------------------------------------------------------


def sophia(h):
    settings = {"b2": 0.5, "eps": 0.05, "gamma": 1.0, "clip_threshold": 50.0, "update_interval": 2}
    return relaxed(optax.contrib.sophia(jnp.exp(h["rate"]), weight_decay=0.0, **settings))


@pytest.mark.thorough
def test_sophia_is_given_the_loss_and_differentiated_through_its_curvature():
    state = agree(sophia, W, penalised, error)
    by_hand = trained(sophia(H), 7, obj_fn=lambda w: penalised(w, H, TRAIN))
    np.testing.assert_allclose(state.params, by_hand, rtol=1e-12)
    assert np.all(np.asarray(state.inner_opt_state[0].nu) > 0.05)  # above eps: it is the divisor


SOPHIAS = [
    gradhpo.T1T2Optimizer(sophia, inner_steps=3),
    pytest.param(
        gradhpo.T1T2Optimizer(sophia, inner_steps=3, perturb="hyperparams"),
        marks=pytest.mark.thorough,
    ),
    pytest.param(gradhpo.GreedyOptimizer(sophia, unroll_steps=3), marks=pytest.mark.thorough),
    pytest.param(gradhpo.OnlineHypergradientOptimizer(sophia), marks=pytest.mark.thorough),
    gradhpo.ImplicitOptimizer(sophia, inner_steps=3),
]


@pytest.mark.parametrize("optimizer", SOPHIAS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.filterwarnings("ignore:.*gives a hypergradient of 0 for")
def test_other_methods_take_sophia(optimizer):
    of_both = lambda w, h, batch: error(w, h, batch) + h["rate"] ** 2
    state = optimizer.step(optimizer.init(W, H), TRAIN, VAL, penalised, of_both, lr_hyper=0.1)
    assert state.metadata["rejected"] == 0
    assert state.metadata["hypergrad_norm"] > 0


# -- optax.radam -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_radam_by_the_lines_of_the_page_has_the_derivative_that_optax_s_has_not():
    [ours] = from_the_page("radam")
    inner = lambda h: relaxed(ours(jnp.exp(h["rate"])))
    theirs = lambda h: relaxed(optax.radam(jnp.exp(h["rate"]), eps_root=1e-16))
    state = agree(inner, W, penalised, error, steps=9)  # rectified from the sixth step on
    optimizer = gradhpo.UnrolledOptimizer(theirs, optax.sgd(0.1), unroll_steps=9)
    arguments = (TRAIN, VAL, penalised, error)
    found = optimizer.compute_hypergradient(optimizer.init(W, H), *arguments)
    assert not np.any(np.isfinite(flat(found)))
    np.testing.assert_allclose(state.params, trained(theirs(H), 9), rtol=1e-12)
