"""Generalized greedy: the paper's toy table, its formula in NumPy, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import OUTER, compiled_bytes, relaxed

import gradhpo


# math: L_val(w_T) before the 1001st outer update, the paper's Figure 2. The column "IFT" is the
# implicit gradient with K + 1 Neumann terms and the inner rate.
TOY = {
    ("exact", 5): 4.089, ("IFT, K = 2", 5): 6.790, ("T1-T2", 5): 12.237,
    ("gamma .9", 5): 3.585, ("gamma .5", 5): 8.720, ("gamma .3", 5): 10.573,
    ("exact", 10): 1.666, ("IFT, K = 5", 10): 3.277, ("T1-T2", 10): 12.232,
    ("gamma .9", 10): 1.293, ("gamma .5", 10): 8.507, ("gamma .3", 10): 10.553,
}  # fmt: skip


TOY_INNER = optax.sgd(0.1)
TOY_LOSSES = gradhpo.LossFunctions(
    lambda w, a, batch: jnp.sum(jnp.array([2.0, 1.0]) * (w - a) ** 2) / 2,
    lambda w, a, batch: jnp.sum(w**2) + 10 * jnp.sum(jnp.sin(w) ** 2),
)


@pytest.mark.parametrize(
    ("method", "steps"), quick(list(TOY), keep=[case for case in TOY if case[1] == 5])
)
def test_toy_table(method, steps):
    inner = TOY_INNER
    if method == "exact":
        optimizer = gradhpo.UnrolledOptimizer(inner, unroll_steps=steps)
    elif method.startswith("IFT"):
        terms = int(method[-1]) + 1
        solver = gradhpo.Neumann(terms, 0.1)
        optimizer = gradhpo.ImplicitOptimizer(inner, None, solver, inner_steps=steps)
    elif method == "T1-T2":
        optimizer = gradhpo.T1T2Optimizer(inner, inner_steps=steps)
    else:
        gamma = float(method.removeprefix("gamma "))
        optimizer = gradhpo.GreedyOptimizer(inner, unroll_steps=steps, gamma=gamma)
    _, history = gradhpo.run(
        optimizer,
        optimizer.init(jnp.full(2, 2.0), jnp.ones(2)),
        TOY_LOSSES,
        jnp.zeros(1),
        jnp.zeros(1),
        num_steps=1_001,
        chunk_size=1_001,
        lr_hyper=1e-4,
        progress=False,
    )
    assert round(float(history["val_loss"][-1]), 3) == TOY[method, steps]


def test_restarted_far_from_a_minimum_it_points_uphill():
    """The warning in its docstring: outer rate 0.1, parameters reset in every outer step."""
    found = {}
    for name, cls in (("exact", gradhpo.UnrolledOptimizer), ("greedy", gradhpo.GreedyOptimizer)):
        optimizer = cls(TOY_INNER, unroll_steps=5)
        _, history = gradhpo.run(
            optimizer, optimizer.init(jnp.full(2, 2.0), jnp.ones(2)), TOY_LOSSES, None, None,
            num_steps=200, steps_per_episode=1, reptile_rate=0.0, lr_hyper=0.1, progress=False,
        )  # fmt: skip
        found[name] = history["val_loss"]
    assert found["exact"][-1] < found["exact"][0]
    assert found["greedy"][-1] > 2 * found["exact"][-1]


RATE, MOMENTUM = 0.002, 0.8
HEAVY_BALL = relaxed(optax.sgd(RATE, momentum=MOMENTUM))


def quartic(w, a, batch):
    return jnp.sum(jnp.exp(a) * (batch[0] @ w - batch[1]) ** 4) / 4


def squares(w, a, batch):
    return jnp.sum((batch[0] @ w - batch[1]) ** 2) + 0.1 * jnp.sum(a**2)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.9, 1.0])
def test_is_its_formula_with_minibatches_and_momentum(gamma):
    """Equation 6 in NumPy: every term with its own gamma^(T-t), no recursion."""
    random = np.random.default_rng(0)
    steps, n, d = 6, 5, 3
    x, y = random.normal(size=(steps, n, d)), random.normal(size=(steps, n))
    x_val, y_val = random.normal(size=(4, d)), random.normal(size=4)
    w, m, a = random.normal(size=d), random.normal(size=d), random.normal(size=n)

    def alpha(w):
        return 2 * x_val.T @ (x_val @ w - y_val)

    terms, velocity, point = [], m, w
    for t in range(steps):
        residual = x[t] @ point - y[t]
        # gradient sum_i e^{a_i} r_i^3 x_i; its derivative by a_i is e^{a_i} r_i^3 x_i
        mixed = x[t] * (np.exp(a) * residual**3)[:, None]
        velocity = MOMENTUM * velocity + mixed.sum(0)
        point = point - RATE * velocity
        terms.append(-RATE * mixed @ alpha(point))
    direct = 0.2 * a
    expected = direct + sum(gamma ** (steps - 1 - t) * terms[t] for t in range(steps))

    optimizer = gradhpo.GreedyOptimizer(HEAVY_BALL, OUTER, unroll_steps=steps, gamma=gamma)
    state = optimizer.init(jnp.asarray(w), jnp.asarray(a))
    state = state.update(
        inner_opt_state=jax.tree.map(
            lambda s: jnp.asarray(m) if s.shape == (d,) else s, state.inner_opt_state
        )
    )
    stack = gradhpo.BatchStack((jnp.asarray(x), jnp.asarray(y)))
    val_batch = (jnp.asarray(x_val), jnp.asarray(y_val))
    found = optimizer.compute_hypergradient(state, stack, val_batch, quartic, squares)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    after = optimizer.step(state, stack, val_batch, quartic, squares)
    np.testing.assert_allclose(after.params, point, rtol=1e-12)


@pytest.mark.parametrize("name", quick(["greedy", "theta", "DrMAD"], keep=["greedy"]))
def test_memory_does_not_grow_with_the_horizon(name):
    """Temporary memory for 10 and 1,000 steps; each step keeps a loss and a step count."""
    small, large = (compiled_bytes(name, steps) for steps in (10, 1_000))
    assert large <= small + 990 * 16


def test_gamma_one_and_steps_of_a_linear_problem_are_the_closed_form():
    """From w*, hyperparameter b of w'Hw/2 - b'w: eta (1 - g^T)/(1 - g) alpha."""
    h, b = jnp.array([[2.0, 0.5], [0.5, 1.0]]), jnp.array([1.0, -1.0])
    train_loss = lambda w, b, batch: w @ h @ w / 2 - b @ w
    val_loss = lambda w, b, batch: jnp.sum(w)
    start = jnp.linalg.solve(h, b)
    for gamma, total in ((0.7, (1 - 0.7**9) / 0.3), (1.0, 9.0)):
        optimizer = gradhpo.GreedyOptimizer(optax.sgd(0.1), OUTER, unroll_steps=9, gamma=gamma)
        found = optimizer.compute_hypergradient(
            optimizer.init(start, b), None, None, train_loss, val_loss
        )
        np.testing.assert_allclose(found, 0.1 * total * np.ones(2), rtol=1e-10)
