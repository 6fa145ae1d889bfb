"""Three problems on scikit-learn's data, with 2, 109 and 1,000 hyperparameters.

Searchers see a unit cube: `place` turns its points into hyperparameters, and all start in the
middle. A fit is `steps` steps of the inner optimizer from the given start.
"""

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import logit
from jaxtyping import Array, PyTree
from sklearn.datasets import load_diabetes, load_digits

import gradhpo


class Case(NamedTuple):
    """Everything that depends on the seed."""

    params: PyTree  # at the start of every fit
    train: Any  # a function from step index to batch, or one batch for all steps
    val: Any
    test: Any


class Problem(NamedTuple):
    title: str
    space: str  # its bounds, in words
    size: int
    steps: int
    case: Callable[[int], Case]
    place: Callable[[Array], PyTree]
    inner: Callable[[PyTree], optax.GradientTransformation]
    losses: gradhpo.LossFunctions
    accuracy: Callable | None
    optimizer: gradhpo.BilevelOptimizer
    recipe: str  # that optimizer, in words
    cold: bool  # restart every fit, or carry the parameters on
    trials: int = 100  # of random search, one fit each
    tpe_trials: int = 100
    outer_fits: int = 30  # inner steps of gradhpo, in fits
    tied: bool = False  # the hyperparameters can share one value
    alone: Callable[[Case], Case] | None = None  # training on the validation set


class Repeated(eqx.Module):
    """Repeats the batches of the first fit, so that all fits minimise the same function."""

    batches: gradhpo.ArrayData
    period: int = eqx.field(static=True)

    def __call__(self, index: Array) -> Any:
        return self.batches(index % self.period)


def between(low: float, high: float) -> Callable[[Array], Array]:
    """Maps [0, 1] to logarithms."""
    return lambda x: np.log(low) + x * (np.log(high) - np.log(low))


def within(place: Callable[[Array], PyTree], size: int) -> optax.GradientTransformation:
    """Projects the outer optimizer's updates onto the space that the others search."""
    low, high = place(jnp.zeros(size)), place(jnp.ones(size))
    move = lambda step, x, low, high: jnp.clip(x + step, low, high) - x
    return optax.stateless(lambda steps, x: jax.tree.map(move, steps, x, low, high))


def shuffled_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    random = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = random.permutation(len(x))
    return (x[order] / 16).astype(np.float32), y[order], random


def cross_entropies(net: eqx.nn.MLP, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y)


def cross_entropy(net: eqx.nn.MLP, hyperparams: PyTree, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropies(net, *batch))


def accuracy(net: eqx.nn.MLP, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(jnp.argmax(jax.vmap(net)(batch[0]), axis=1) == batch[1])


# --- 2: learning rate and weight decay ---------------------------------------------------------


def rate_and_decay() -> Problem:
    steps, rates, decays = 300, between(1e-4, 1.0), between(1e-6, 1e-1)

    def case(seed: int) -> Case:
        x, y, _ = shuffled_digits(seed)
        keys = jax.random.split(jax.random.key(seed))
        part = lambda rows: (jnp.asarray(x[rows]), jnp.asarray(y[rows]))
        train = gradhpo.ArrayData(part(slice(300)), 50, keys[0])
        net = eqx.nn.MLP(64, 10, 32, 1, activation=jnp.tanh, key=keys[1])
        return Case(net, Repeated(train, steps), part(slice(300, 600)), part(slice(600, None)))

    def penalised(net: eqx.nn.MLP, hyperparams: PyTree, batch: tuple[Array, Array]) -> Array:
        decay = jnp.exp(hyperparams["log_decay"]) * gradhpo.tree_l2_norm(net) ** 2
        return cross_entropy(net, hyperparams, batch) + decay

    place = lambda x: {"log_rate": rates(x[0]), "log_decay": decays(x[1])}
    inner = lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.9)
    outer = optax.chain(gradhpo.sign_descent(1.0, tolerance=0.0), within(place, 2))
    return Problem(
        title="2: learning rate, weight decay",
        space="rate 1e-4 to 1, decay 1e-6 to 1e-1, logarithmic",
        size=2,
        steps=steps,
        case=case,
        place=place,
        inner=inner,
        losses=gradhpo.LossFunctions(penalised, cross_entropy),
        accuracy=accuracy,
        optimizer=gradhpo.ForwardModeOptimizer(inner, outer, unroll_steps=steps),
        recipe="ForwardModeOptimizer over a whole fit, cold restarts, sign_descent(1.0)",
        cold=True,
    )


# --- 109: a penalty for each feature -----------------------------------------------------------


def quadratic_for_each_sex(x: np.ndarray) -> np.ndarray:
    """Products of up to two of nine measurements, alone and times sex: 109 features."""
    measured, sex = np.delete(x, 1, axis=1), x[:, 1:2]
    pairs = combinations_with_replacement(range(measured.shape[1]), 2)
    products = [measured[:, i] * measured[:, j] for i, j in pairs]
    quadratic = np.column_stack([measured, *products])
    return np.column_stack([quadratic, sex, sex * quadratic])


def penalties() -> Problem:
    size, steps, log_l2 = 109, 2_000, between(1e-4, 1e2)

    def case(seed: int) -> Case:
        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(x))
        train, val, test = np.split(order, [150, 300])
        scaled = lambda x: (x - x[train].mean(0)) / x[train].std(0)
        x, y = scaled(quadratic_for_each_sex(scaled(x))), scaled(y)
        part = lambda rows: (jnp.asarray(x[rows], jnp.float32), jnp.asarray(y[rows], jnp.float32))
        return Case(jnp.zeros(size), part(train), part(val), part(test))

    def squared_error(w: Array, hyperparams: PyTree, batch: tuple[Array, Array]) -> Array:
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def penalised(w: Array, hyperparams: PyTree, batch: tuple[Array, Array]) -> Array:
        penalty = jnp.sum(jnp.exp(hyperparams["log_l2"]) * w**2)
        return (squared_error(w, hyperparams, batch) + penalty) / 2

    def inner(hyperparams: PyTree) -> optax.GradientTransformation:
        """The rate of each weight is set by its penalty; the data's curvature is below 30."""
        rates = 1 / (30 + jnp.exp(hyperparams["log_l2"]))
        scaled = optax.stateless(lambda gradient, _: -rates * gradient)
        return optax.chain(scaled, optax.trace(0.9, nesterov=True))

    place = lambda x: {"log_l2": log_l2(x)}
    outer = optax.chain(optax.adam(1.0, b1=0.5), within(place, size))
    return Problem(
        title="109: a penalty for each feature",
        space="each penalty 1e-4 to 1e2, logarithmic",
        size=size,
        steps=steps,
        case=case,
        place=place,
        inner=inner,
        losses=gradhpo.LossFunctions(penalised, squared_error),
        accuracy=None,
        optimizer=gradhpo.ImplicitOptimizer(inner, outer, inner_steps=steps),
        recipe="ImplicitOptimizer, each fit from the weights of the last, adam(1.0, b1=0.5)",
        cold=False,
        tied=True,
    )


# --- 1,000: a weight for each training example -------------------------------------------------


def example_weights() -> Problem:
    size, steps, wrong = 1_000, 400, 400

    def case(seed: int) -> Case:
        x, y, random = shuffled_digits(seed)
        given, corrupted = y[:size].copy(), random.permutation(size)[:wrong]
        given[corrupted] = (given[corrupted] + random.integers(1, 10, wrong)) % 10
        keys = jax.random.split(jax.random.key(seed))
        arrays = (jnp.asarray(x[:size]), jnp.asarray(given), jnp.arange(size))
        part = lambda rows: (jnp.asarray(x[rows]), jnp.asarray(y[rows]))
        return Case(
            eqx.nn.MLP(64, 10, 128, 1, key=keys[1]),
            gradhpo.ArrayData(arrays, 100, keys[0]),
            part(slice(size, size + 400)),
            part(slice(size + 400, None)),
        )

    def weighted(net: eqx.nn.MLP, logits: Array, batch: tuple[Array, Array, Array]) -> Array:
        x, y, index = batch
        return jnp.mean(jax.nn.sigmoid(logits[index]) * cross_entropies(net, x, y))

    def alone(case: Case) -> Case:
        arrays = (*case.val, jnp.arange(len(case.val[1])))
        return case._replace(train=arrays)

    sgd = optax.sgd(0.05, momentum=0.9)
    return Problem(
        title="1,000: a weight for each example",
        space="each weight 0 to 1; 400 validation examples",
        size=size,
        steps=steps,
        case=case,
        place=lambda x: logit(jnp.clip(x, 1e-6, 1 - 1e-6)),
        inner=lambda logits: sgd,
        losses=gradhpo.LossFunctions(weighted, cross_entropy),
        accuracy=accuracy,
        optimizer=gradhpo.UnrolledOptimizer(sgd, optax.adam(0.05), unroll_steps=20),
        recipe="UnrolledOptimizer over 20 steps (2 epochs) of one long training, adam(0.05)",
        cold=False,
        tpe_trials=30,  # half a second each, to draw 1,000 numbers
        alone=alone,
    )


PROBLEMS = (rate_and_decay, penalties, example_weights)
