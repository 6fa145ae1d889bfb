"""Forward mode against reverse mode, finite differences and its own recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick, relative_error
from problems import OUTER, make, relaxed, stack_of, warmed

import gradhpo


@pytest.mark.parametrize(
    "optimizer_name", quick(["sgd", "momentum", "adam", "adamw"], keep=["adam"])
)
def test_forward_is_reverse_is_finite_differences(optimizer_name, getkey):
    """Learning rate, momentum or beta, and weight decay over 50 steps of different batches."""
    problem, inner = make("optimizer", optimizer_name, getkey())
    forward = gradhpo.ForwardModeOptimizer(inner, OUTER, unroll_steps=50)
    reverse = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=50)
    stack = stack_of(problem, 50, getkey())
    found = forward.compute_hypergradient(*warmed(forward, problem, stack))
    arguments = warmed(reverse, problem, stack)
    assert relative_error(found, reverse.compute_hypergradient(*arguments)) < 1e-10
    exact = gradhpo.finite_difference_hypergradient(reverse, *arguments)
    assert relative_error(found, exact) < 1e-6


@pytest.mark.thorough
def test_every_step_has_the_hypergradient_of_all_steps_so_far(getkey):
    problem, inner = make("optimizer", "adam", getkey())
    online = gradhpo.ForwardModeOptimizer(inner, None)
    losses = (problem.train_loss, problem.val_loss)
    stack = stack_of(problem, 6, getkey())
    first = state = online.init(problem.params, problem.hyperparams)
    for t in range(6):
        batch = (stack.at(t), problem.val_batch)
        found = online.compute_hypergradient(state, *batch, *losses)
        state = online.step(state, *batch, *losses, lr_hyper=0.0)
    whole = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=6)
    start = whole.init(problem.params, problem.hyperparams)
    expected = whole.compute_hypergradient(start, stack, problem.val_batch, *losses)
    assert relative_error(found, expected) < 1e-11
    # A new episode forgets the last one.
    restarted = online.restart(state, first.params, 0.0)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(restarted.memory.Z))


def test_real_time_is_its_own_recursion_written_out():
    """The hyperparameters move while Z is carried: each A and B takes their current values."""
    random = np.random.default_rng(0)
    root = random.normal(size=(4, 4))
    hessian, b, target = root @ root.T / 4 + np.eye(4), random.normal(size=4), random.normal(size=4)
    w, rate, z, outer = np.zeros(4), 0.1, np.zeros(4), 1e-3
    hj, bj, tj = map(jnp.asarray, (hessian, b, target))
    train_loss = lambda w, h, batch: w @ hj @ w / 2 - bj @ w
    val_loss = lambda w, h, batch: jnp.sum((w - tj) ** 2) / 2
    optimizer = gradhpo.ForwardModeOptimizer(lambda h: optax.sgd(h), None, unroll_steps=3)
    state = optimizer.init(jnp.zeros(4), jnp.asarray(0.1))
    for _ in range(5):
        state = optimizer.step(state, None, None, train_loss, val_loss, lr_hyper=outer)
        for _ in range(3):
            z = z - rate * hessian @ z - (hessian @ w - b)
            w = w - rate * (hessian @ w - b)
        rate = rate - outer * (w - target) @ z
        np.testing.assert_allclose(state.hyperparams, rate, rtol=1e-12)
        np.testing.assert_allclose(state.memory.Z.w[0], z, rtol=1e-12)


def test_more_hyperparameters_than_a_block_and_a_while_loop_inside():
    """Reverse mode has no rule for a while loop; a forward derivative is enough."""

    def update_fn(w, h, batch):
        return jax.lax.while_loop(
            lambda c: c[1] < 3, lambda c: (c[0] - 0.1 * (c[0] - h), c[1] + 1), (w, 0)
        )[0]

    h = jnp.linspace(-1, 1, 40)
    loss = lambda w, h, batch: jnp.sum((w - 2.0) ** 2) / 2
    forward = gradhpo.ForwardModeOptimizer(
        None, optax.sgd(0.1), unroll_steps=5, update_fn=update_fn
    )
    found = forward.compute_hypergradient(forward.init(jnp.zeros(40), h), None, None, loss, loss)
    share = 1 - 0.9**15  # w_T = share * h
    np.testing.assert_allclose(found, share * (share * h - 2.0), rtol=1e-12)
    reverse = gradhpo.UnrolledOptimizer(None, optax.sgd(0.1), unroll_steps=5, update_fn=update_fn)
    with pytest.raises(ValueError, match="ForwardModeOptimizer, which takes forward derivatives"):
        reverse.compute_hypergradient(reverse.init(jnp.zeros(40), h), None, None, loss, loss)


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_closed_forms_of_gradient_descent(steps):
    r"""dw_T/d eta = -T P^(T-1) H (w_0 - w*), dw_T/dw_0 = P^T."""
    random = np.random.default_rng(0)
    root = random.normal(size=(4, 4))
    hessian, w0 = root @ root.T / 4 + 0.3 * np.eye(4), random.normal(size=4)
    b, target = random.normal(size=4), random.normal(size=4)
    rate, optimum = 0.1, np.linalg.solve(hessian, b)
    p = np.eye(4) - rate * hessian
    power = np.linalg.matrix_power
    alpha = optimum + power(p, steps) @ (w0 - optimum) - target
    h_array = jnp.asarray(hessian)
    loss_of = lambda w: w @ h_array @ w / 2 - jnp.asarray(b) @ w
    train_loss = lambda delta, h, batch: loss_of(h["start"] + delta)
    val_loss = lambda delta, h, batch: jnp.sum((h["start"] + delta - target) ** 2) / 2
    optimizer = gradhpo.ForwardModeOptimizer(
        lambda h: optax.sgd(h["rate"]), optax.sgd(0.1), unroll_steps=steps
    )
    hyperparams = {"rate": jnp.asarray(rate), "start": jnp.asarray(w0)}
    state = optimizer.init(jnp.zeros(4), hyperparams)
    found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    by_rate = -steps * alpha @ power(p, steps - 1) @ hessian @ (w0 - optimum)
    np.testing.assert_allclose(found["rate"], by_rate, rtol=1e-9)
    np.testing.assert_allclose(found["start"], power(p, steps) @ alpha, rtol=1e-9, atol=1e-12)


# -- schedules with shared values ------------------------------------------------------------


def test_a_shared_schedule_is_found_by_signs():
    """Four windows of 25 steps: steep and flat directions want large rates, then a small one."""
    curvature = jnp.asarray([1.0, 0.1])
    noise = jax.random.normal(jax.random.key(0), (100, 2))
    train_loss = lambda w, h, batch: jnp.sum(curvature * (w - 0.3 * batch) ** 2) / 2
    val_loss = lambda w, h, batch: jnp.sum(curvature * w**2) / 2
    schedule = lambda h: lambda count: h[count // 25]
    inner = lambda h: relaxed(optax.sgd(schedule(h)))
    outer = optax.chain(optax.scale(1 / 25), gradhpo.sign_descent(0.1))
    optimizer = gradhpo.ForwardModeOptimizer(inner, outer, unroll_steps=100)
    state = optimizer.init(jnp.asarray([5.0, -3.0]), jnp.zeros(4))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    batches = lambda index: noise[index % 100]
    state, history = gradhpo.run(
        optimizer, state, losses, batches, None,
        num_steps=15, steps_per_episode=1, reptile_rate=0.0, progress=False,
    )  # fmt: skip
    assert history["rejected"][-1] == 0
    assert history["val_loss"][-1] < 0.02 * history["val_loss"][0]
    assert np.all(state.hyperparams > 0)
    assert state.hyperparams[-1] < np.max(state.hyperparams)


def test_sign_descent_halves_where_the_sign_flips_and_rests_in_the_end():
    outer = gradhpo.sign_descent({"a": 0.1, "b": 0.3}, tolerance=0.05)
    params = {"a": jnp.zeros(2), "b": {"c": jnp.asarray(1.0)}}
    state = outer.init(params)
    signs = [[1.0, 1.0], [1.0, -1.0], [0.0, -1.0], [-2.0, 5.0]]
    steps = [[0.1, 0.1], [0.1, 0.05], [0.1, 0.05], [0.05, 0.025]]
    for sign, step in zip(signs, steps, strict=True):
        g = {"a": 1e-6 * jnp.asarray(sign), "b": {"c": jnp.asarray(1e9)}}
        moves, state = outer.update(g, state, params)
        np.testing.assert_allclose(moves["a"], -np.asarray(step) * np.sign(sign), rtol=1e-12)
        np.testing.assert_allclose(moves["b"]["c"], -0.3)
    # Ten flips around 1: the step falls below a twentieth of the value, then it rests.
    x = {"a": jnp.ones(2), "b": {"c": jnp.asarray(1.0)}}
    for i in range(10):
        g = jax.tree.map(lambda p, i=i: jnp.full_like(p, (-1.0) ** i), x)
        moves, state = outer.update(g, state, x)
        x = optax.apply_updates(x, moves)
    assert all(np.all(np.asarray(m) == 0) for m in jax.tree.leaves(moves))


def test_sign_descent_moves_what_starts_far_from_zero():
    """A logarithm of -3 with first steps of 0.1: it may rest only after a flip."""
    outer = gradhpo.sign_descent(0.1)
    x = jnp.asarray(-3.0)
    state = outer.init(x)
    for _ in range(25):
        moves, state = outer.update(2 * (x + 1.0), state, x)
        x = optax.apply_updates(x, moves)
    np.testing.assert_allclose(x, -1.0, atol=0.05)
    assert moves == 0


def test_parameters_of_no_size_and_a_wrong_tree_of_steps():
    optimizer = gradhpo.ForwardModeOptimizer(lambda h: optax.sgd(h), optax.sgd(0.1))
    loss = lambda w, h, batch: jnp.sum(w["a"] ** 2) + jnp.sum(w["e"])
    state = optimizer.init({"a": jnp.ones(2), "e": jnp.zeros((0, 3))}, jnp.asarray(0.1))
    found = optimizer.compute_hypergradient(state, None, None, loss, loss)
    np.testing.assert_allclose(found, -2 * 2 * 0.8 * 2)
    with pytest.raises(ValueError, match=r"sign_descent\(step_size=.*structure of the hyperparam"):
        gradhpo.sign_descent({"rate": 0.1}).init({"rates": jnp.ones(2)})


def test_sign_descent_refuses_what_makes_no_sense():
    for arguments, name in (
        ((0.0,), "step_size"),
        ((0.1, 1.0), "decay"),
        ((0.1, 0.5, -1.0), "tol"),
    ):
        with pytest.raises(ValueError, match=name):
            gradhpo.sign_descent(*arguments)
    outer = gradhpo.sign_descent(0.1)
    with pytest.raises(ValueError, match="needs the hyperparameters"):
        outer.update(jnp.ones(2), outer.init(jnp.ones(2)))


CONTRIB = {
    "dog": optax.contrib.dog,
    "dadapt_adamw": optax.contrib.dadapt_adamw,
    "adopt": optax.contrib.adopt,
    "prodigy": optax.contrib.prodigy,
}


@pytest.mark.parametrize("name", quick(list(CONTRIB), keep=["adopt"]))
def test_an_optimizer_that_starts_from_a_square_root_of_0(name):
    """The derivative at its first state is infinite; multiplied by a Z of 0 it adds nothing."""
    inner = lambda h: relaxed(CONTRIB[name](h["rate"]))
    loss = lambda w, h, batch: jnp.sum((w - h["at"]) ** 2 * jnp.arange(1.0, 4.0))
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    w, h = jnp.asarray([1.5, 2.0, 3.0]), {"rate": jnp.asarray(0.5), "at": jnp.ones(3)}
    found = []
    for kind in (gradhpo.ForwardModeOptimizer, gradhpo.UnrolledOptimizer):
        optimizer = kind(inner, OUTER, unroll_steps=4)
        state = optimizer.init(w, h)
        found.append(optimizer.compute_hypergradient(state, None, None, loss, val_loss))
        assert optimizer.step(state, None, None, loss, val_loss).get_metric("rejected") == 0
    assert relative_error(*found) < 1e-7  # some of them keep parts of their state in float32
