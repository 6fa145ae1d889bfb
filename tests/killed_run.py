"""A run in a separate process that can be killed at any moment, or during a write."""

import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo


jax.config.update("jax_enable_x64", True)  # as in the tests, where they import this
# NumPy, unlike the data in ridge.py: JAX arrays would start JAX before the processes fork.
X = np.random.default_rng(0).normal(size=(40, 3))
Y = X[:, 0]
CHUNK, EPISODE = 5, 10


def train_loss(w, h, batch):
    x, y = batch
    return jnp.mean(jnp.square(x @ w - y)) + jnp.sum(jnp.exp(h) * jnp.square(w))


def val_loss(w, h, batch):
    x, y = batch
    return jnp.mean(jnp.square(x @ w - y))


def shuffled(seed):
    """A loader that cannot seek, so that it is replayed."""
    random = np.random.default_rng(seed)
    while True:
        chosen = random.choice(len(X), 8)
        yield X[chosen], Y[chosen]


def optimizer():
    outer = optax.chain(gradhpo.moving_average(3), optax.adam(0.05))
    return gradhpo.OneStepOptimizer(optax.adam(0.05, eps_root=1e-16), outer)


def start(optimizer):
    return optimizer.init(jnp.zeros(3), jnp.full(3, -2.0))


def train(directory, num_steps):
    """Everything with a memory: episodes, Adam, a shuffling loader, loggers, the best state."""
    ours = optimizer()
    directory = Path(directory)
    best = gradhpo.BestState()
    loggers = [
        gradhpo.JSONLinesLogger(directory / "log.jsonl"),
        gradhpo.CSVLogger(directory / "log.csv", every=3),
    ]
    state, history = gradhpo.run(
        ours,
        start(ours),
        gradhpo.LossFunctions(train_loss, val_loss),
        shuffled(0),
        gradhpo.ArrayData((X, Y), 16, jax.random.key(1)),
        num_steps=num_steps,
        steps_per_episode=EPISODE,
        reptile_rate=0.5,
        chunk_size=CHUNK,
        callbacks=[best, *loggers],
        checkpoint=gradhpo.Checkpoint(directory, every_steps=CHUNK),
        progress=False,
    )
    return state, history, best


class Shuffled:
    """The same batches in every pass."""

    def __iter__(self):
        return shuffled(0)


def replay(directory, num_steps):
    """A whole run for one hypergradient, forward and back."""
    ours = optimizer()
    return gradhpo.replay(
        ours,
        start(ours),
        Shuffled(),
        (X, Y),
        gradhpo.LossFunctions(train_loss, val_loss),
        num_steps=num_steps,
        segment=7,
        store=directory,
        progress=False,
    )


def killed_within_a_write(call, directory, num_steps, function=train):
    """Runs, and kills this process just before or after its `call`-th change on disk."""
    left = [call]

    def counted(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    function(directory, num_steps)
