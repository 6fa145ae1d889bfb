"""The host's work in a run: batches from an iterator, logs, checkpoints; and a long run."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradhpo
from benchmarks.costs.loops import loop_pair
from benchmarks.costs.problem import OUTER_RATE, Model, job, train_loss, val_loss
from benchmarks.costs.programs import ALGORITHMS
from benchmarks.timed import alternating


NUM_STEPS, EVERY = 1_000, 100
BATCH_SIZE = 400  # about a millisecond a step


@contextlib.contextmanager
def recorders(number: int = 3) -> Iterator[dict]:
    """Checkpoints, and the first `number` of these: a log, another log, the best state."""
    with tempfile.TemporaryDirectory() as directory:
        callbacks = [
            gradhpo.JSONLinesLogger(f"{directory}/log.jsonl"),
            gradhpo.CSVLogger(f"{directory}/log.csv"),
            gradhpo.BestState(),
        ]
        checkpoint = gradhpo.Checkpoint(directory, every_steps=EVERY)
        yield {"callbacks": callbacks[:number], "checkpoint": checkpoint}


def print_host() -> None:
    print(f"\nWhat the host adds, chunks of {EVERY} steps, batches of {BATCH_SIZE}")
    the_job = job(BATCH_SIZE)
    optimizer = ALGORITHMS["OneStepOptimizer"].optimizer
    losses = gradhpo.LossFunctions(the_job.train_loss, the_job.val_loss)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    x, y, index = map(np.asarray, the_job.train_data.arrays)

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        random = np.random.default_rng(0)
        while True:
            chosen = random.integers(len(x), size=BATCH_SIZE)
            yield x[chosen], y[chosen], index[chosen]

    def go(data, num_steps: int, **settings) -> None:
        gradhpo.run(
            optimizer, state, losses, data, the_job.val_batch, num_steps=num_steps,
            chunk_size=EVERY, lr_hyper=OUTER_RATE, progress=False, **settings,
        )  # fmt: skip

    def recorded(number: int, num_steps: int) -> None:
        with recorders(number) as settings:
            go(the_job.train_data, num_steps, **settings)

    many = 5 * NUM_STEPS  # the fixed cost of a run is measured below
    plain = functools.partial(go, the_job.train_data)
    logged, everything = functools.partial(recorded, 1), functools.partial(recorded, 3)
    by_hand = loop_pair("OneStepOptimizer", BATCH_SIZE, NUM_STEPS)[1]
    scan = lambda num_steps: by_hand()
    pairs = {
        "hand-written lax.scan / itself": (scan, scan, NUM_STEPS, 41),
        "ArrayData / hand-written lax.scan": (plain, scan, NUM_STEPS, 41),
        "NumPy iterator / hand-written lax.scan": (
            lambda num_steps: go(batches(), num_steps), scan, NUM_STEPS, 41,
        ),
        f"a log and checkpoints every {EVERY} steps / without": (logged, plain, many, 11),
        f"two logs, best state, checkpoints every {EVERY} / without": (everything, plain, many, 11),
    }  # fmt: skip
    print(f"  {'us a step; median and quartiles of the ratios':57}")
    for name, (first, second, steps, repeats) in pairs.items():
        a, b, ratio, low, high = alternating(
            functools.partial(first, steps), functools.partial(second, steps), repeats
        )
        print(
            f"  {name:57} {1e6 * a / steps:5.0f} {1e6 * b / steps:5.0f}   {ratio:.3f}"
            f" ({low:.2f} to {high:.2f})",
            flush=True,
        )
    once = alternating(lambda: plain(1), lambda: logged(1), 41)
    print(f"  a run of one step {1e3 * once.first:.1f} ms, with both {1e3 * once.second:.1f} ms")


def print_night(num_steps: int = 10_000) -> None:
    """Example weights on digits, with logs and checkpoints; counts traces."""
    traces = []

    def counted(params, hyperparams, batch) -> jax.Array:
        traces.append(1)
        return train_loss(params, hyperparams, batch)

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    net = eqx.nn.MLP(64, 10, 128, 1, key=jax.random.key(0))
    model = Model(net, jnp.zeros(1_000))
    params, hyperparams = gradhpo.partition(model, lambda m: m.weights)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.05, momentum=0.9), optax.adam(0.01))
    data = gradhpo.ArrayData((x[:1_000], y[:1_000], np.arange(1_000)), 100, jax.random.key(1))
    state = optimizer.init(params, hyperparams)
    losses = gradhpo.LossFunctions(counted, val_loss)

    def go(steps: int) -> tuple[gradhpo.History, float, int]:
        traces.clear()
        started = time.perf_counter()
        with recorders() as settings:
            _, history = gradhpo.run(
                optimizer, state, losses, data, (x[1_000:1_200], y[1_000:1_200]),
                num_steps=steps, chunk_size=EVERY, progress=False, **settings,
            )  # fmt: skip
        return history, time.perf_counter() - started, len(traces)

    _, first, of_one_chunk = go(EVERY)
    history, seconds, again = go(num_steps)
    val = history["val_loss"]
    print(f"\nDigits, 1,000 example weights, two logs and checkpoints every {EVERY} steps")
    print(f"  {EVERY:6} steps {first:5.1f} s, the training loss was traced {of_one_chunk} times")
    print(f"  {num_steps:6} steps {seconds:5.1f} s, {again} times")
    print(
        f"  validation loss {val[0]:.2f} -> {val[-1]:.3f}, {history['rejected'][-1]:.0f} rejected"
    )
