"""Small training sets for the digits, and what a network learns from them.

Every set is images and label distributions. A network is trained on it by gradient descent on all
of its images at once, from a random start.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits


CLASSES, PIXELS = 10, 64
TRAIN, VAL = 1_100, 300  # of 1,797 digits; the others are the test set
RATES = (0.1, 0.3, 1.0, 3.0)  # of every set that is not distilled
TRIED = 5  # starts for a choice of rate and steps, and at a time
Part = tuple[Array, Array]


class Digits(NamedTuple):
    train: Part
    val: Part
    test: Part


class Network(NamedTuple):
    """A perceptron with one hidden layer."""

    width: int = 64
    activation: str = "relu"

    def start(self, key: Array, hyperparams: Any = None) -> dict[str, Array]:
        """Normal weights of variance 1 / inputs, and no biases."""
        first, second = jax.random.split(key)
        scaled = lambda key, n, m: jax.random.normal(key, (n, m), jnp.float32) / np.float32(n**0.5)
        return {
            "first": scaled(first, PIXELS, self.width),
            "bias": jnp.zeros(self.width, jnp.float32),
            "second": scaled(second, self.width, CLASSES),
            "shift": jnp.zeros(CLASSES, jnp.float32),
        }

    def __call__(self, w: dict[str, Array], x: Array) -> Array:
        hidden = getattr(jax.nn, self.activation)(x @ w["first"] + w["bias"])
        return hidden @ w["second"] + w["shift"]

    def loss(self, w: dict[str, Array], x: Array, labels: Array) -> Array:
        return jnp.mean(optax.losses.softmax_cross_entropy(self(w, x), labels))

    def accuracy(self, w: dict[str, Array], x: Array, y: Array) -> Array:
        return jnp.mean(jnp.argmax(self(w, x), axis=1) == y, dtype=jnp.float32)


def digits(seed: int) -> Digits:
    """scikit-learn's, in an order of this seed; mean 0 and variance 1 over all pixels to train."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    x = (x - x[:TRAIN].mean()) / x[:TRAIN].std()
    parts = slice(TRAIN), slice(TRAIN, TRAIN + VAL), slice(TRAIN + VAL, None)
    return Digits(*((jnp.asarray(x[part]), jnp.asarray(y[part])) for part in parts))


# -- chosen and averaged ---------------------------------------------------------------------------


def classes_of(part: Part) -> list[np.ndarray]:
    x, y = (np.asarray(a) for a in part)
    return [x[y == c] for c in range(CLASSES)]


def labels_of(each: int) -> Array:
    """Classes of `each` images in a row."""
    return jnp.repeat(jnp.arange(CLASSES, dtype=jnp.int32), each)


def at_random(part: Part, each: int, seed: int) -> np.ndarray:
    """Images [classes * each, pixels] of the training set, without repetition."""
    random = np.random.default_rng(seed)
    chosen = [x[random.choice(len(x), each, replace=False)] for x in classes_of(part)]
    return np.concatenate(chosen)


def herded(x: np.ndarray, count: int) -> list[int]:
    """Herding (Welling 2009), greedily as in iCaRL (Rebuffi et al. 2017), without repetition.

    The k-th choice is the i with the least |mean(x) - (x_i + sum of the chosen) / k|, in pixels.
    """
    mean, total, chosen = x.mean(0), np.zeros_like(x[0]), []
    for k in range(1, count + 1):
        far = np.linalg.norm(mean - (x + total) / k, axis=1)
        far[chosen] = np.inf
        chosen.append(int(np.argmin(far)))
        total = total + x[chosen[-1]]
    return chosen


def by_herding(part: Part, each: int, seed: int) -> np.ndarray:
    return np.concatenate([x[herded(x, each)] for x in classes_of(part)])


def by_k_means(part: Part, each: int, seed: int) -> np.ndarray:
    """Centres of each class; of one, its mean."""
    fit = lambda x: KMeans(each, n_init=10, random_state=seed).fit(x).cluster_centers_
    return np.concatenate([fit(x) for x in classes_of(part)]).astype(np.float32)


SETS = {"random": at_random, "herding": by_herding, "k-means": by_k_means}


# -- trained on ------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Accuracies after every `period` steps, `periods` times; `batch` images a step, or all."""

    period: int = 10
    periods: int = 10
    batch: int | None = None


@functools.partial(jax.jit, static_argnames=("network", "schedule"))
def accuracies(
    network: Network, keys: Array, x: Array, labels: Array, rate: Array, parts: tuple[Part, ...],
    schedule: Schedule,
) -> Array:  # fmt: skip
    """[keys, parts of the data, periods] of networks trained from the starts of these keys."""

    def one(key):
        start, drawing = jax.random.split(key)

        def step(w, i):
            chosen = jnp.arange(len(x))
            if schedule.batch is not None:
                drawn = jax.random.fold_in(drawing, i)
                chosen = jax.random.randint(drawn, (schedule.batch,), 0, len(x))
            g = jax.grad(network.loss)(w, x[chosen], labels[chosen])
            return jax.tree.map(lambda w, g: w - rate * g, w, g), None

        def many(w, steps):
            w, _ = jax.lax.scan(step, w, steps)
            return w, jnp.stack([network.accuracy(w, *part) for part in parts])

        steps = jnp.arange(schedule.period * schedule.periods).reshape(schedule.periods, -1)
        return jax.lax.scan(many, network.start(start), steps)[1].T

    return jax.lax.map(one, keys)


class Trained(NamedTuple):
    accuracies: list[float]  # test, of fresh starts
    rate: float
    steps: int


def keys_of(seed: int, first: int, count: int) -> Array:
    numbers = jnp.arange(first, first + count)
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)


def trained_on(
    network: Network, data: Digits, x: Array, labels: Array, seed: int, starts: int,
    schedule: Schedule, rate: float | None = None, steps: int | None = None,
) -> Trained:  # fmt: skip
    """Test accuracies of fresh starts, which are the same for every set of this seed.

    Without a rate and steps, takes the grid's with the best mean validation accuracy of `TRIED`
    other starts.
    """

    def at(rate: float, first: int) -> np.ndarray:
        keys, parts = keys_of(seed, first, TRIED), (data.val, data.test)
        found = accuracies(network, keys, x, labels, jnp.float32(rate), parts, schedule)
        return np.asarray(found)

    if rate is None or steps is None:
        means = np.stack([at(r, 0)[:, 0].mean(0) for r in RATES])
        i, j = np.unravel_index(np.argmax(means), means.shape)
        rate, steps = RATES[i], int(schedule.period * (j + 1))
    firsts = range(TRIED, TRIED + starts, TRIED)
    found = np.concatenate([at(rate, first)[:, 1] for first in firsts])
    found = found[:, steps // schedule.period - 1]
    return Trained([round(float(a), 5) for a in found], rate, steps)
