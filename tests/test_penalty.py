"""F2SA and BOME: their formulas, their bias, and losses that cannot be differentiated twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed
from single_loops import (
    BY_HAND,
    FEATURES,
    HEAVY_BALL,
    PLAIN,
    data,
    quadratic,
    quartic,
    quartic_at,
    squares,
    squares_at,
)

import gradhpo


STEPS = 20


def followed(optimizer, problem):
    """The state after 20 steps, and the length of every hypergradient."""
    state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a))
    val, norms = tuple(map(jnp.asarray, problem.val)), []
    for k in range(STEPS):
        state = optimizer.step(state, problem.stack(k), val, quartic, squares)
        norms.append(state.metadata["hypergrad_norm"])
    return state, norms


@pytest.mark.parametrize(
    ("inner", "inner_steps", "schedule"),
    quick(
        [("momentum", 3, False), ("Adam", 1, True), ("Adam", 3, True)],
        keep=[("Adam", 3, True)],
    ),
)
def test_f2sa_is_its_formula(inner, inner_steps, schedule):
    """Section 14 in NumPy, over 20 steps with mini-batches: only rounding differs, 1e-10."""
    problem = data(STEPS, inner_steps)
    # Not one of optax's, which are in float32.
    rising = lambda k: 5 + 3 * jnp.sqrt(k.astype(jnp.float64))
    penalty, at_step = (rising, lambda k: 5 + 3 * np.sqrt(k)) if schedule else (8.0, lambda k: 8.0)
    inner_optimizer, by_hand = BY_HAND[inner]
    outer_optimizer, outer_by_hand = BY_HAND["Adam"]
    optimizer = gradhpo.PenaltyOptimizer(
        inner_optimizer, outer_optimizer, penalty=penalty, inner_steps=inner_steps
    )
    state, norms = followed(optimizer, problem)

    z = y = problem.w
    a, z_step, y_step, a_step = problem.a, by_hand(), by_hand(), outer_by_hand()
    for k in range(STEPS):
        for t in range(inner_steps):
            batch = problem.batch(k, t)
            z = z_step(z, quartic_at(z, a, batch).gradient)
            alpha, _ = squares_at(y, a, problem.val)
            y = y_step(y, quartic_at(y, a, batch).gradient + alpha / at_step(k))
        of_y, of_z = (quartic_at(w, a, batch).by_a for w in (y, z))
        g = squares_at(y, a, problem.val)[1] + at_step(k) * (of_y - of_z)
        a = a_step(a, g)
        np.testing.assert_allclose(norms[k], np.linalg.norm(g), rtol=1e-10)
    np.testing.assert_allclose(state.params, z, rtol=1e-10)
    np.testing.assert_allclose(state.memory.penalised.w, y, rtol=1e-10)
    np.testing.assert_allclose(state.hyperparams, a, rtol=1e-10)
    assert np.linalg.norm(y - z) > 0.001


@pytest.mark.parametrize(
    ("inner", "inner_steps"), quick([("momentum", 4), ("Adam", 1)], keep=[("momentum", 4)])
)
def test_bome_is_its_formula(inner, inner_steps):
    """Section 14 in NumPy, over 20 steps with mini-batches: only rounding differs, 1e-10."""
    problem = data(STEPS, inner_steps)
    inner_optimizer, by_hand = BY_HAND[inner]
    outer_optimizer, outer_by_hand = BY_HAND["Adam"]
    optimizer = gradhpo.BOMEOptimizer(
        inner_optimizer, outer_optimizer, inner_steps=inner_steps, control=0.7
    )
    state, norms = followed(optimizer, problem)

    z, a, z_step, a_step, multipliers = problem.w, problem.a, by_hand(), outer_by_hand(), []
    for k in range(STEPS):
        trial, trial_step = z, by_hand()
        for t in range(inner_steps):
            batch = problem.batch(k, t)
            trial = trial_step(trial, quartic_at(trial, a, batch).gradient)
        at_z, (alpha, direct) = quartic_at(z, a, batch), squares_at(z, a, problem.val)
        q = np.concatenate([at_z.gradient, at_z.by_a - quartic_at(trial, a, batch).by_a])
        f = np.concatenate([alpha, direct])
        multipliers.append(max(0.7 * q @ q - f @ q, 0) / (q @ q))
        direction = f + multipliers[-1] * q
        z, a = z_step(z, direction[:FEATURES]), a_step(a, direction[FEATURES:])
        np.testing.assert_allclose(norms[k], np.linalg.norm(direction[FEATURES:]), rtol=1e-10)
    np.testing.assert_allclose(state.params, z, rtol=1e-10)
    np.testing.assert_allclose(state.hyperparams, a, rtol=1e-10)
    np.testing.assert_allclose(state.get_metric("multiplier"), multipliers[-1], rtol=1e-10)
    assert len({x > 0 for x in multipliers}) == 2  # it is both active and released


def test_f2sa_has_the_bias_of_its_penalty():
    """On a quadratic: the penalised problem in closed form, with an error of order 1/penalty."""
    problem = quadratic()
    a, sgd, errors = np.ones(4), relaxed(optax.sgd(0.2)), []
    exact = problem.hypergradient(a)
    for penalty in (10.0, 100.0, 1_000.0):
        optimizer = gradhpo.PenaltyOptimizer(sgd, penalty=penalty, inner_steps=400)
        state = optimizer.init(jnp.zeros(6), jnp.asarray(a))
        losses = gradhpo.LossFunctions(problem.train_loss, problem.val_loss)
        g = optimizer.compute_hypergradient(state, None, None, losses)
        b = problem.j @ a + problem.c
        share = 1 / penalty
        y = np.linalg.solve(problem.h + share * problem.q, b + share * problem.q @ problem.t)
        expected = problem.rho * a - penalty * problem.j.T @ (y - np.linalg.solve(problem.h, b))
        np.testing.assert_allclose(g, expected, rtol=1e-8)  # .9^400 remains, times the penalty
        errors.append(np.linalg.norm(g - exact) / np.linalg.norm(exact))
    np.testing.assert_allclose(errors, [0.186, 0.0243, 0.00252], rtol=0.01)  # about 1/10 each time


@pytest.mark.thorough
@pytest.mark.parametrize(("inner_steps", "error"), [(10, 0.178), (100, 0.043)])
def test_bome_ends_as_far_from_the_solution_as_its_docstring_says(inner_steps, error):
    """It has the error of the trial: the distance to the solution, to the page's digits."""
    problem = quadratic()
    sgd = lambda rate: relaxed(optax.sgd(rate))
    optimizer = gradhpo.BOMEOptimizer(sgd(0.1), sgd(0.01), inner_steps=inner_steps)
    losses = gradhpo.LossFunctions(problem.train_loss, problem.val_loss)
    state, _ = gradhpo.run(
        optimizer, optimizer.init(jnp.zeros(6), jnp.zeros(4)), losses, None, None,
        num_steps=4_000, chunk_size=4_000, progress=False,
    )  # fmt: skip
    distance = np.linalg.norm(state.hyperparams - problem.solution)
    np.testing.assert_allclose(distance, error, atol=1e-3)


# -- no second derivative ---------------------------------------------------------------------


@jax.custom_jvp
def once(x):
    """The identity; a derivative through it is a mistake."""
    return x


@once.defjvp
def _never(primals, tangents):
    raise AssertionError("a second derivative was traced")


def _root(x):
    """By Newton's method until it converges, a number of steps that reverse mode cannot know."""
    improves = lambda state: jnp.abs(state[0] - state[1]) > 1e-12
    newton = lambda state: ((state[0] + x / state[0]) / 2, state[0])
    return jax.lax.while_loop(improves, newton, (jnp.maximum(x, 1.0), jnp.zeros_like(x)))[0]


@jax.custom_vjp
def root(x):
    return _root(x)


def _root_and_residual(x):
    y = _root(x)
    return y, y


def _pull_root(y, bar):
    return (once(bar / (2 * y)),)


root.defvjp(_root_and_residual, _pull_root)


def rooted(w, h, batch):
    return root(1 + jnp.sum((w - h["seen"]) ** 2))


def distance(w, h, batch):
    return jnp.sum((w - 1) ** 2)


CLASSES = quick([gradhpo.PenaltyOptimizer, gradhpo.BOMEOptimizer], keep=[gradhpo.PenaltyOptimizer])
each = pytest.mark.parametrize("cls", CLASSES)


@each
def test_works_where_no_second_derivative_exists(cls):
    """Checks do not trace one either, even for an unseen hyperparameter or a tuned rate."""
    optimizer = cls(lambda h: optax.sgd(h["rate"]), inner_steps=3)
    start = optimizer.init(jnp.zeros(3), {"seen": jnp.zeros(3), "rate": jnp.asarray(0.5)})
    losses = gradhpo.LossFunctions(rooted, distance)
    with pytest.warns(UserWarning, match=r"hypergradient of 0 for hyperparams \['rate'\]: the opt"):
        state, _ = gradhpo.run(
            optimizer, start, losses, None, None, num_steps=200, lr_hyper=0.05, progress=False
        )
    # Both optima are at 1.
    np.testing.assert_allclose(state.hyperparams["seen"], np.ones(3), atol=0.1)
    assert state.hyperparams["rate"] == 0.5
    other = gradhpo.SOBAOptimizer(PLAIN, adjoint_optimizer=PLAIN)
    start = other.adopt(start)
    with pytest.raises(AssertionError, match="second derivative"):
        other.step(start, None, None, losses, lr_hyper=0.05)


@pytest.mark.thorough
@each
def test_a_gradient_by_hand_is_the_same(cls):
    problem, found = data(STEPS, 3), []
    for grad_fn in (None, jax.grad(quartic)):
        optimizer = cls(HEAVY_BALL, BY_HAND["Adam"][0], inner_steps=3, grad_fn=grad_fn)
        found.append(followed(optimizer, problem)[0])
    by_loss, by_hand = found
    np.testing.assert_allclose(by_hand.hyperparams, by_loss.hyperparams, rtol=1e-10)  # rounding
    np.testing.assert_allclose(by_hand.params, by_loss.params, rtol=1e-10)
    np.testing.assert_allclose(
        by_hand.metadata["train_loss"], by_loss.metadata["train_loss"], rtol=1e-10
    )


@pytest.mark.thorough
def test_episodes_and_refusals():
    """y restarts with the parameters; steps are counted, refused or not."""
    optimizer = gradhpo.PenaltyOptimizer(HEAVY_BALL, BY_HAND["Adam"][0], inner_steps=3)
    problem = data(STEPS, 3)
    state, _ = followed(optimizer, problem)
    again = optimizer.restart(state, jnp.zeros(FEATURES), reptile_rate=0.0)
    np.testing.assert_array_equal(again.memory.penalised.w, np.zeros(FEATURES))
    assert again.memory.steps_taken == STEPS
    nothing = jax.tree.map(lambda x: jnp.nan * x, problem.stack(0))
    refused = optimizer.step(state, nothing, problem.val, quartic, squares)
    assert refused.metadata["rejected"] == 1
    assert refused.memory.steps_taken == STEPS + 1
    np.testing.assert_array_equal(refused.memory.penalised.w, state.memory.penalised.w)


def test_a_multiplier_of_zero_is_no_mistake(recwarn):
    """Descending validation alone brings z closer to the inner optimum, here also at 1."""
    optimizer = gradhpo.BOMEOptimizer(PLAIN)
    state = optimizer.init(jnp.zeros(3), jnp.ones(3))
    loss = lambda w, h, batch: 0.1 * jnp.sum((w - h) ** 2)
    state = optimizer.step(state, None, None, loss, distance, lr_hyper=0.1)
    assert state.get_metric("multiplier") == 0
    np.testing.assert_array_equal(state.hyperparams, np.ones(3))
    at_optimum = optimizer.step(
        state.update(params=state.hyperparams), None, None, loss, distance, lr_hyper=0.1
    )
    assert at_optimum.get_metric("multiplier") == 0  # no gradient of q: not 0/0
    assert at_optimum.metadata["rejected"] == 0
    assert not recwarn.list


def test_a_model_state_is_taken_as_it_is():
    """It says so; y has a separate one."""
    optimizer = gradhpo.PenaltyOptimizer(PLAIN, penalty=1.0)
    state = optimizer.init(jnp.zeros(3), jnp.ones(3), model_state=jnp.zeros(3))

    def train_loss(w, h, batch, r):
        return jnp.sum((w - h) ** 2), 0.9 * r + 0.1 * w

    val_loss = lambda w, h, batch, r: jnp.sum((w - 2) ** 2) + 0.1 * jnp.sum(r**2)
    with pytest.warns(UserWarning, match="PenaltyOptimizer uses the model state as it is"):
        state = optimizer.step(state, None, None, train_loss, val_loss, lr_hyper=0.1)
    state = optimizer.step(state, None, None, train_loss, val_loss, lr_hyper=0.1)
    assert np.all(state.memory.penalised.r > state.model_state)


def test_what_they_refuse():
    for cls in (gradhpo.PenaltyOptimizer, gradhpo.BOMEOptimizer):
        with pytest.raises(ValueError, match=f"{cls.__name__} compares values and gradients"):
            cls(update_fn=lambda w, h, batch: w)
        needs_loss = cls(relaxed(optax.lbfgs()))
        state = needs_loss.init(jnp.zeros(3), jnp.zeros(3))
        with pytest.raises(ValueError, match="Transformations that need the loss"):
            needs_loss.step(state, None, None, quartic_of_none, distance, lr_hyper=0.1)
    with pytest.raises(ValueError, match="penalty must be positive"):
        gradhpo.PenaltyOptimizer(PLAIN, penalty=0.0)
    with pytest.raises(TypeError, match="penalty must be"):
        gradhpo.PenaltyOptimizer(PLAIN, penalty="large")
    with pytest.raises(ValueError, match="control must be positive"):
        gradhpo.BOMEOptimizer(PLAIN, control=-1.0)


def quartic_of_none(w, h, batch):
    return jnp.sum((w - h) ** 4)
