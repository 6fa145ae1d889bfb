"""Whole runs replayed: resident memory over the number of steps, and many queries at once."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from benchmarks.costs.problem import cross_entropy
from benchmarks.timed import by_turns


STEPS, SEGMENT, WIDTH, BATCH_SIZE = (500, 5_000), 25, 964, 32  # 10^6 parameters
QUERIES, QUERIED_STEPS = 20, 100
OPTIMIZER = gradhpo.OneStepOptimizer(optax.sgd(0.02, momentum=0.9))


class Weighted(eqx.Module):
    """A network and one weight for each training example."""

    net: eqx.nn.MLP
    logits: jax.Array


@gradhpo.model_loss
def train_loss(model: Weighted, batch: tuple) -> jax.Array:
    (x, y), indices = batch
    return jnp.mean(jax.nn.sigmoid(model.logits[indices]) * cross_entropy(model, x, y))


@gradhpo.model_loss
def val_loss(model: Weighted, batch: tuple) -> jax.Array:
    return jnp.mean(cross_entropy(model, *batch))


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


def problem(width: int, batch_size: int) -> tuple:
    """Optimizer, state, data and a validation batch with one example per query."""
    random = np.random.default_rng(0)
    draw = lambda n: (random.normal(size=(n, 64)).astype(np.float32), random.integers(10, size=n))
    net = eqx.nn.MLP(64, 10, width, 2, activation=jnp.tanh, key=jax.random.key(0))
    model = Weighted(net, jnp.zeros(1_000))
    state = OPTIMIZER.init(*gradhpo.partition(model, lambda model: model.logits))
    data = gradhpo.ArrayData(draw(1_000), batch_size, jax.random.key(1), with_indices=True)
    return OPTIMIZER, state, data, draw(QUERIES)


def resident() -> float:
    """The process's resident memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))


def measure(num_steps: int) -> dict[str, float]:
    """Peak resident memory, sampled after compilation, and seconds."""
    given = problem(WIDTH, BATCH_SIZE)
    settings = {"segment": SEGMENT, "progress": False}
    with tempfile.TemporaryDirectory() as directory:
        gradhpo.replay(*given, LOSSES, num_steps=2 * SEGMENT, store=f"{directory}/0", **settings)
        peak, over = 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.05):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        gradhpo.replay(*given, LOSSES, num_steps=num_steps, store=f"{directory}/1", **settings)
        took = time.perf_counter() - started
        over.set()
        watcher.join()
    return {"peak": peak, "seconds": took}


def rows() -> Iterator[tuple[int, dict[str, float]]]:
    for num_steps in STEPS:
        program = f"from benchmarks.costs.replays import *; print(json.dumps(measure({num_steps})))"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        yield num_steps, json.loads(done.stdout.splitlines()[-1])


def handwritten(state: gradhpo.BilevelState, data: gradhpo.ArrayData, val: tuple) -> jax.Array:
    """The same queries by `jax.vjp` of a checkpointed scan over segments, vmapped."""
    params, hyperparams = state.params, state.hyperparams
    w, static = eqx.partition(params, eqx.is_inexact_array)
    inner = OPTIMIZER.inner_optimizer
    assert isinstance(inner, optax.GradientTransformation)

    def trained(hyperparams):
        def step(carry, t):
            w, s = carry
            loss = lambda w: train_loss(eqx.combine(w, static), hyperparams, data(t))
            updates, s = inner.update(jax.grad(loss)(w), s, w)
            return (optax.apply_updates(w, updates), s), None

        def segment(carry, first):
            step_of = jax.checkpoint(step, prevent_cse=False)
            return jax.lax.scan(step_of, carry, first + jnp.arange(SEGMENT))

        of_segment = jax.checkpoint(segment, prevent_cse=False)
        starts = jnp.arange(0, QUERIED_STEPS, SEGMENT)
        return jax.lax.scan(of_segment, (w, inner.init(w)), starts)[0][0]

    def of_query(w, x, y):
        return val_loss(eqx.combine(w, static), hyperparams, (x[None], y[None]))

    end, pull = jax.vjp(trained, hyperparams)
    alphas = jax.vmap(jax.grad(of_query), in_axes=(None, 0, 0))(end, *val)
    return jax.vmap(lambda alpha: pull(alpha)[0])(alphas)


def print_replay() -> None:
    print(
        f"\nreplay: a run of T steps (MLP 64-{WIDTH}-{WIDTH}-10, 10^6 parameters, momentum, "
        f"batches of {BATCH_SIZE}),\nsegments of {SEGMENT} steps, states in a directory; memory "
        "is that of the process after compilation"
    )
    print("      T  peak resident  seconds  per step")
    for steps, found in rows():
        per_step = 1e3 * found["seconds"] / steps
        print(f"{steps:7,} {found['peak']:10.0f} MiB {found['seconds']:8.1f}  {per_step:5.1f} ms")

    optimizer, state, data, val = problem(256, 256)
    one = jax.tree.map(lambda x: x[:1], val)
    settings = {"num_steps": QUERIED_STEPS, "segment": SEGMENT, "progress": False}

    def replayed(val_batch: tuple, queries: bool = True) -> float:
        started = time.perf_counter()
        gradhpo.replay(optimizer, state, data, val_batch, LOSSES, queries=queries, **settings)
        return time.perf_counter() - started

    by_hand = eqx.filter_jit(handwritten)

    def timed_by_hand() -> float:
        started = time.perf_counter()
        jax.block_until_ready(by_hand(state, data, val))
        return time.perf_counter() - started

    print(
        f"\n{QUERIES} queries at once, {QUERIED_STEPS} steps (MLP 64-256-256-10, batches of 256): "
        "median of pairs"
    )
    many = by_turns(lambda: replayed(val), lambda: replayed(one, queries=False), repeats=5)
    hand = by_turns(lambda: replayed(val), timed_by_hand, repeats=5)
    print(f"  all at once              {many.first:6.2f} s")
    print(f"  one, {QUERIES} times            {QUERIES * many.second:6.2f} s")
    print(f"  of them, as a share      {many.ratio / QUERIES:6.2f}   (limit 0.6)")
    print(f"  a vmapped pullback       {hand.second:6.2f} s by hand, one program")
    print(f"  replay over it           {hand.ratio:6.2f}   (limit 1.1)")
