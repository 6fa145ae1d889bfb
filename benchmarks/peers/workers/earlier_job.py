"""The job of the earlier package's tutorial, for that package and ours.

A learning rate for each parameter of an MLP 10-32-5, softplus(lambda), in plain gradient descent:
five Gaussian clusters, a fifth of the training labels drawn at random, clean validation labels.
Needs only jax and NumPy.
"""

import collections
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


EPISODES, STEPS = 60, 20  # inner steps of an episode, and of greedy's horizon
BATCH_SIZE = 128
OUTER_RATE = 3e-3
GAMMA = 0.99
ESTIMATION_PERIOD = 10
FEATURES, WIDTH, CLASSES = 10, 32, 5


def arrays() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """500 training and 200 validation examples, in the default precision of this process."""
    random = np.random.default_rng(42)
    centres = 2 * random.normal(size=(CLASSES, FEATURES))

    def draw(number: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(CLASSES, size=number)
        x = centres[labels] + 0.5 * random.normal(size=(number, FEATURES))
        wrong = random.random(number) < noise
        labels = np.where(wrong, random.integers(CLASSES, size=number), labels)
        return x.astype(jnp.result_type(float)), labels.astype(np.int32)

    return draw(500, 0.2), draw(200, 0.0)


def batches(data: tuple[np.ndarray, np.ndarray], seed: int) -> Iterator:
    """Drawn with replacement by NumPy, the cheapest way outside a compiled program."""
    random = np.random.default_rng(seed)
    while True:
        chosen = random.integers(len(data[1]), size=BATCH_SIZE)
        yield data[0][chosen], data[1][chosen]


def start(spread: float = 0.0) -> tuple[dict, dict]:
    """Parameters, and lambda for rates of 0.05; with a `spread` the rates differ."""
    random = np.random.default_rng(0)
    make = lambda *shape: np.sqrt(2 / shape[0]) * random.normal(size=shape)
    w = {
        "w1": make(FEATURES, WIDTH), "b1": np.zeros(WIDTH),
        "w2": make(WIDTH, CLASSES), "b2": np.zeros(CLASSES),
    }  # fmt: skip
    middle = np.log(np.expm1(0.05))
    rates = {name: middle + spread * random.normal(size=leaf.shape) for name, leaf in w.items()}
    as_jax = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, float), tree)
    return as_jax(w), as_jax(rates)


def loss(w: dict, rates: dict, batch: tuple) -> jax.Array:
    x, labels = batch
    scores = jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]
    log_p = jax.nn.log_softmax(scores)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


def update(w: dict, rates: dict, batch: tuple) -> dict:
    gradient = jax.grad(loss)(w, rates, batch)
    return jax.tree.map(lambda w, r, g: w - jax.nn.softplus(r) * g, w, rates, gradient)


def decayed(step: jax.Array) -> jax.Array:
    """The outer rate of the earlier `run`, which falls by 1/60 after each episode."""
    return OUTER_RATE * (1 - (step // STEPS) / EPISODES)


def count_compilations() -> collections.Counter:
    """Counts the compilations of each program by its name, from now on."""
    names: collections.Counter = collections.Counter()

    def listen(event: str, seconds: float, **about: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names[about.get("fun_name", "")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


def iterators() -> tuple[Callable, Callable]:
    """Functions without arguments that draw a batch, as the earlier `run` expects."""
    train, val = arrays()
    first, second = batches(train, seed=1), batches(val, seed=2)
    return lambda: next(first), lambda: next(second)
