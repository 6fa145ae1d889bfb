"""Timed loops: `gradhpo.run`, loops over `step`, both written by hand, and plain training."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import gradhpo
from benchmarks.costs.handwritten import init, losses
from benchmarks.costs.handwritten_unrolled import plain_training
from benchmarks.costs.problem import OUTER_RATE, Job, job
from benchmarks.costs.programs import ALGORITHMS, exact_programs, inputs
from benchmarks.rows import Kept, measured, measured_when
from benchmarks.timed import alternating


# Upper bounds on the work per inner step in training gradients, including the validation gradient.
# First order takes only the direct part of that gradient here.
PROMISED = {
    "FOOptimizer": 2.0,
    "OneStepOptimizer": 4.0,
    "T1T2Optimizer": 4.0,
    "GreedyOptimizer(20)": 4.0,
    "HyperDistill": 5.0,
    "UnrolledOptimizer(20)": 3.0,
    "  with checkpoints": 4.0,
    "DrMADOptimizer(20)": 3.0,
}


def running(name: str, the_job: Job, num_steps: int):
    """`gradhpo.run` of `num_steps` steps in one chunk."""
    optimizer = ALGORITHMS[name].optimizer
    state = optimizer.init(the_job.params, the_job.hyperparams)
    both = gradhpo.LossFunctions(the_job.train_loss, the_job.val_loss)

    def go():
        new, _ = gradhpo.run(
            optimizer, state, both, the_job.train_data, the_job.val_batch,
            num_steps=num_steps, chunk_size=num_steps, lr_hyper=OUTER_RATE, progress=False,
        )  # fmt: skip
        jax.block_until_ready(new.hyperparams)

    return go


def scanning(step, start, the_job: Job, inner: int, num_steps: int):
    """One hand-written scan over the same batches of `step(carry, batches, val_batch)`."""
    batch_size = the_job.train_data.batch_size

    @jax.jit
    def scanned(carry, arrays, key, val_batch):
        data = gradhpo.ArrayData(arrays, batch_size, key)

        def body(carry, _):
            count = carry[3][0]
            if inner == 1:
                return step(carry, data(count), val_batch)
            return step(carry, jax.vmap(data)(count * inner + jnp.arange(inner)), val_batch)

        return jax.lax.scan(body, carry, None, length=num_steps)

    def go():
        data = the_job.train_data
        (_, _, h, _), metrics = scanned(start, data.arrays, data.key, the_job.val_batch)
        jax.block_until_ready((h, metrics))

    return go


def loop_pair(name: str, batch_size: int, num_steps: int):
    """`gradhpo.run` and one hand-written scan over the same steps and the same batches."""
    pair = ALGORITHMS[name]
    the_job = job(batch_size, num_weights=pair.num_weights)
    start, inner = pair.init(the_job), pair.optimizer.num_inner_steps
    by_hand = scanning(pair.write(the_job), start, the_job, inner, num_steps)
    return running(name, the_job, num_steps), by_hand


def step_pair(name: str, batch_size: int, num_steps: int):
    """Python loops over `optimizer.step` and over a hand-written `jax.jit`, on one batch."""
    given, pair = inputs(name, batch_size), ALGORITHMS[name]
    the_job = given.job
    by_hand = jax.jit(pair.write(the_job))

    def ours():
        state = given.state
        for _ in range(num_steps):
            state = pair.optimizer.step(
                state, given.ours, the_job.val_batch, the_job.train_loss, the_job.val_loss,
                lr_hyper=OUTER_RATE,
            )  # fmt: skip
        jax.block_until_ready(state.hyperparams)

    def theirs():
        carry = given.carry
        for _ in range(num_steps):
            carry, _ = by_hand(carry, given.by_hand, the_job.val_batch)
        jax.block_until_ready(carry[2])

    return ours, theirs


def loop_row(name: str, batch_size: int, inner_steps: int, repeats: int) -> dict[str, Any]:
    """Microseconds of a step of `run` and of loops over `step`, and the same by hand."""
    num_steps = inner_steps // ALGORITHMS[name].optimizer.num_inner_steps
    found = {}
    for what, pair, steps in (("run", loop_pair, num_steps), ("step", step_pair, num_steps // 10)):
        compared = alternating(*pair(name, batch_size, steps), repeats=repeats)
        times = [round(1e6 * x / steps) for x in compared[:2]]
        found[what] = times + [round(x, 3) for x in compared[2:]]
    return found


def print_loops(
    names: Sequence[str] = tuple(ALGORITHMS),
    batch_sizes: Sequence[int] = (32, 128),
    inner_steps: int = 4_000,
    repeats: int = 11,
    file: Path | Kept | None = None,
) -> None:
    print("\ngradhpo.run / a hand-written lax.scan, and a Python loop over step / over jax.jit")
    print(f"  {'us a step, medians, and of the ratios':37} {'run':>14} {'':23} {'step':>12}")
    measure = lambda x: loop_row(**x, inner_steps=inner_steps, repeats=repeats)
    rows = []
    for name, batch_size in itertools.product(names, batch_sizes):
        (row,) = measured([{"name": name, "batch_size": batch_size}], measure, file)
        cells = ""
        for what in ("run", "step"):
            ours, by_hand, ratio, low, high = row[what]
            cells += f"  {ours:8} {by_hand:8} {ratio:6.3f} ({low:.2f} to {high:.2f})"
        print(f"  {name:22} batch {batch_size:4}{cells}", flush=True)
        rows.append(row)
    print(measured_when(rows))


def plain_pair(name: str, batch_size: int, depth: int, num_steps: int):
    """`gradhpo.run`, and training without hypergradients over the same inner steps."""
    inner = ALGORITHMS[name].optimizer.num_inner_steps
    the_job = job(batch_size, depth=depth, val_size=batch_size)
    train, _ = losses(the_job)

    def step(carry, batches, _):
        stack = batches if inner > 1 else jax.tree.map(lambda x: x[None], batches)
        (w, m, h, (count, rejected)), value = plain_training(train, carry, stack)
        return (w, m, h, (count + 1, rejected)), value

    by_hand = scanning(step, init(the_job), the_job, inner, num_steps)
    return running(name, the_job, num_steps), by_hand


def print_plain() -> None:
    print("\nTime of an inner step / of plain training; validation batches as large as the others")
    jobs = ((128, 1), (1_000, 1), (128, 3))
    heads = (f"{n}, {depth} hidden" for n, depth in jobs)
    print(f"  {'batch:':22}  promise  " + "".join(f"{head:>26}" for head in heads))
    for name, most in PROMISED.items():
        print(f"  {name:22} {most:6.1f}   ", end="")
        inner = ALGORITHMS[name].optimizer.num_inner_steps
        for batch_size, depth in jobs:
            num_steps = (400 if batch_size == 1_000 else 2_000) // inner
            found = alternating(*plain_pair(name, batch_size, depth, num_steps), repeats=11)
            shown = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
            print(f"{shown:>26}", end="", flush=True)
        print()


def print_exact() -> None:
    print(
        "\nExact hypergradient, T = 20: time of gradhpo / jax.grad through lax.scan, with\n"
        "jax.checkpoint on its body and without; and their memory / ours"
    )
    for activation, depth in (("tanh", 1), ("relu", 3)):
        print(f"  {activation}, hidden layers: {depth}")
        for batch_size in (32, 128, 1_000):
            for name in ("SGD", "Adam"):
                ours, *others = exact_programs(name, batch_size, activation=activation, depth=depth)
                print(f"    batch {batch_size:5}  {name:5}", end="")
                for other in others:
                    found = alternating(ours, other, repeats=21 if depth == 1 else 11)
                    less = other.temporary_bytes / ours.temporary_bytes
                    print(
                        f" {1e3 * found.first:8.2f} /{1e3 * found.second:8.2f} ms"
                        f"  {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})  {less:4.1f} x",
                        end="",
                        flush=True,
                    )
                print()
