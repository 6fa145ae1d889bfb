"""Natural hypergradients against their formula in NumPy, and the Fisher matrix against Hessians."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed

import gradhpo
from gradhpo.algorithms import fisher


MOMENTUM = relaxed(optax.sgd(0.1, momentum=0.9))
ADAM = relaxed(optax.adam(0.05))
FEATURES, CLASSES, BATCH, STEPS, INNER_STEPS = 4, 3, 8, 20, 3
RHO, BETA = 0.05, 0.9
RATE = relaxed(optax.sgd(0.1))


# -- its formula, written out ----------------------------------------------------------------------


def penalty(w, h):
    """One for each feature, and one for the biases."""
    of_weights = jnp.sum(jnp.exp(h["features"])[:, None] * w["weights"] ** 2)
    return of_weights / 2 + jnp.exp(h["biases"]) * jnp.sum(w["biases"] ** 2) / 2


def cross_entropy(w, h, batch):
    x, labels = batch
    logits = x @ w["weights"] + w["biases"][None]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def train_loss(w, h, batch):
    return cross_entropy(w, h, batch) + penalty(w, h)


def drawn(size, seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=(size, FEATURES))
    truth = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    chances = np.exp(x @ truth) / np.sum(np.exp(x @ truth), axis=1, keepdims=True)
    return x, np.asarray([random.choice(CLASSES, p=p) for p in chances], np.int32)


def of_each(w, batch):
    """Gradients of single examples: of the weights `[examples, features, classes]`, and biases."""
    x, labels = batch
    scores = np.exp(x @ w["weights"] + w["biases"])
    off = scores / scores.sum(axis=1, keepdims=True) - np.eye(CLASSES)[labels]
    return x[:, :, None] * off[:, None, :], off


def row_of(weights, biases):
    return np.concatenate([biases, weights.reshape(-1)])  # in the order of a dict's leaves


def fisher_of(kept, structure, curvature):
    """The whole matrix that a structure stands for, with damping and penalty."""
    if structure == "dense":
        matrix = kept["rows"]
    else:
        matrix = np.diag(np.diag(kept["rows"]))
    if structure == "kronecker":
        left, right = kept["left"], kept["right"]
        matrix[CLASSES:, CLASSES:] = np.kron(left, right) / np.trace(left)
    return matrix + np.diag(RHO + curvature)


def by_hand(structure, inner, per_example=False, factor_every=1):
    """Hyperparameters and parameters after 20 steps of the equations, in NumPy but for optax."""
    w = {"weights": np.zeros((FEATURES, CLASSES)), "biases": np.zeros(CLASSES)}
    h = {"features": np.full(FEATURES, -2.0), "biases": np.asarray(-3.0)}
    s, val = inner.init(w), drawn(30, seed=1)
    total = {"rows": 0.0, "left": 0.0, "right": 0.0}
    k, matrix = 0, None
    for step in range(STEPS):
        for t in range(INNER_STEPS):
            batch = drawn(BATCH, seed=100 + INNER_STEPS * step + t)
            decays = np.exp(h["features"])[:, None], np.exp(h["biases"])
            weights, biases = of_each(w, batch)
            weights, biases = weights + decays[0] * w["weights"], biases + decays[1] * w["biases"]
            mean = weights.mean(axis=0), biases.mean(axis=0)
            pairs = list(zip(weights, biases, strict=True)) if per_example else [mean]
            share = 1 / BATCH if per_example else BATCH
            new = {
                "rows": share * sum(np.outer(row_of(*p), row_of(*p)) for p in pairs),
                "left": share * sum(g @ g.T for g, _ in pairs),
                "right": share * sum(g.T @ g for g, _ in pairs),
            }
            total = {name: BETA * total[name] + (1 - BETA) * new[name] for name in total}
            k += 1
            updates, s = inner.update({"weights": mean[0], "biases": mean[1]}, s, w)
            w = {name: np.asarray(w[name] + updates[name]) for name in w}
        weights, biases = (x.mean(axis=0) for x in of_each(w, val))
        decays = np.repeat(np.exp(h["features"]), CLASSES), np.full(CLASSES, np.exp(h["biases"]))
        if step % factor_every == 0:
            kept = {name: x / (1 - BETA**k) for name, x in total.items()}
            matrix = fisher_of(kept, structure, np.concatenate(decays[::-1]))
        q = np.linalg.solve(matrix, row_of(weights, biases))
        of_weights = (q[CLASSES:] * decays[0]).reshape(FEATURES, CLASSES) * w["weights"]
        g = {
            "features": -of_weights.sum(axis=1),
            "biases": -np.sum(q[:CLASSES] * decays[1] * w["biases"]),
        }
        h = {name: h[name] - 0.1 * g[name] for name in h}
    return w, h


@pytest.mark.parametrize(
    ("structure", "inner", "settings"),
    quick(
        [
            *((kind, inner, {}) for kind in fisher.STRUCTURES for inner in (MOMENTUM, ADAM)),
            *((kind, MOMENTUM, {"per_example": True}) for kind in fisher.STRUCTURES),
            *((kind, MOMENTUM, {"factor_every": 3}) for kind in fisher.STRUCTURES),
        ],
        keep=[("dense", ADAM, {}), ("kronecker", MOMENTUM, {"factor_every": 3})],
    ),
)
def test_it_equals_its_formula_over_twenty_steps(structure, inner, settings):
    optimizer = gradhpo.NHGDOptimizer(
        inner,
        RATE,
        INNER_STEPS,
        decay=BETA,
        damping=RHO,
        structure=structure,
        penalty=penalty,
        **settings,
    )
    w = {"weights": jnp.zeros((FEATURES, CLASSES)), "biases": jnp.zeros(CLASSES)}
    h = {"features": jnp.full(FEATURES, -2.0), "biases": jnp.asarray(-3.0)}
    state = optimizer.init(w, h)
    val = drawn(30, seed=1)
    for step in range(STEPS):
        seeds = range(100 + INNER_STEPS * step, 100 + INNER_STEPS * (step + 1))
        stack = gradhpo.BatchStack.of([drawn(BATCH, seed) for seed in seeds])
        state = optimizer.step(state, stack, val, train_loss, cross_entropy)
    # Rounding alone: 60 inner steps, and solves with a condition number below 1e3.
    assert_same((state.params, state.hyperparams), by_hand(structure, inner, **settings), 1e-10)
