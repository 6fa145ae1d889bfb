"""What the clock says: ratios within one process, medians of alternating runs."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import gradhpo
from benchmarks.compiled import ALGORITHMS, exact_programs, init_by_hand
from benchmarks.peers.worker import seconds
from benchmarks.problem import OUTER_RATE, job


class Compared(NamedTuple):
    """Median seconds of each, and median and quartiles of the ratios within a pair."""

    first: float
    second: float
    ratio: float
    low: float
    high: float


def by_turns(first: Callable[[], float], second: Callable[[], float], repeats: int) -> Compared:
    """Compares what two functions return, seconds as a rule, calling them by turns."""
    first(), second()
    measured: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for which in order:
            measured[which].append((first, second)[which]())
    ratios = [a / b for a, b in zip(*measured, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Compared(*map(statistics.median, measured), middle, low, high)


def alternating(first: Callable, second: Callable, repeats: int) -> Compared:
    """Times both by turns."""
    return by_turns(lambda: seconds(first), lambda: seconds(second), repeats)


def loop_pair(name: str, batch_size: int, num_steps: int):
    """`gradhpo.run` and one hand-written scan over the same steps and the same batches."""
    optimizer, write = ALGORITHMS[name]
    the_job = job(batch_size)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    losses = gradhpo.LossFunctions(the_job.train_loss, the_job.val_loss)
    inner = optimizer.num_inner_steps

    def ours():
        new, _ = gradhpo.run(
            optimizer, state, losses, the_job.train_data, the_job.val_batch,
            num_steps=num_steps, chunk_size=num_steps, lr_hyper=OUTER_RATE, progress=False,
        )  # fmt: skip
        jax.block_until_ready(new.hyperparams)

    step = write(the_job)

    @jax.jit
    def scanned(carry, arrays, key, val_batch):
        data = gradhpo.ArrayData(arrays, batch_size, key)

        def body(carry, _):
            count = carry[3][0]
            if inner == 1:
                return step(carry, data(count), val_batch)
            return step(carry, jax.vmap(data)(count * inner + jnp.arange(inner)), val_batch)

        return jax.lax.scan(body, carry, None, length=num_steps)

    start = init_by_hand(name, the_job)

    def theirs():
        data = the_job.train_data
        (_, _, h, _), metrics = scanned(start, data.arrays, data.key, the_job.val_batch)
        jax.block_until_ready((h, metrics))

    return ours, theirs


def print_loops() -> None:
    print("\nSteady state of gradhpo.run against a hand-written lax.scan")
    for name in ALGORITHMS:
        for batch_size in (32, 128):
            num_steps = 60 if "(20)" in name else 1_000
            a, b, ratio, *_ = alternating(*loop_pair(name, batch_size, num_steps), repeats=21)
            print(
                f"  {name:22} batch {batch_size:4}  {1e6 * a / num_steps:8.0f} us a step"
                f"  {1e6 * b / num_steps:8.0f} us by hand  ratio {ratio:.3f}"
            )


def print_exact() -> None:
    print("\nExact hypergradient, T = 20: time of gradhpo / jax.grad through a plain lax.scan")
    for batch_size in (32, 128, 1_000):
        for name in ("SGD", "Adam"):
            a, b, ratio, *_ = alternating(*exact_programs(name, batch_size), repeats=21)
            print(
                f"  batch {batch_size:5}  {name:5} {1e3 * a:8.2f} ms  {1e3 * b:8.2f} ms"
                f"  ratio {ratio:.2f}"
            )
