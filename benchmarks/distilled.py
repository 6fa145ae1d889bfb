"""What HyperDistill and greedy cost: against one step, over the horizon, and theta's share."""

import functools
import time

import equinox as eqx
import jax
import optax

import gradhpo
from benchmarks.problem import MOMENTUM, OUTER_RATE, RATE, job
from benchmarks.timed import alternating
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.tracing import forget_traces


INNER = {
    "SGD": optax.sgd(RATE, momentum=MOMENTUM),
    "Adam": optax.adam(0.01, eps_root=1e-16),
}


@functools.cache
def step_flops(cls, optimizer_name: str, batch_size: int, depth: int = 1) -> float:
    forget_traces()  # one program for each shape is what is wanted here
    the_job = job(batch_size, depth=depth)
    optimizer = cls(INNER[optimizer_name])
    step = lambda state, batch, val_batch: optimizer.step(
        state, batch, val_batch, the_job.train_loss, the_job.val_loss, lr_hyper=OUTER_RATE
    )
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return Program(step, state, the_job.train_data(0), the_job.val_batch).flops_with_loops_once


def flops_ratio(optimizer_name: str, batch_size: int, depth: int = 1) -> float:
    """A step of HyperDistill, in steps of `OneStepOptimizer`."""
    ours, one_step = (
        step_flops(cls, optimizer_name, batch_size, depth)
        for cls in (gradhpo.OnlineHypergradientOptimizer, gradhpo.OneStepOptimizer)
    )
    return ours / one_step


def horizon_program(what: str, steps: int) -> Program:
    """Greedy, DrMAD or an estimate of theta over `steps` inner steps with a batch of 32 each."""
    the_job = job(32)
    stack = gradhpo.BatchStack(jax.vmap(the_job.train_data)(jax.numpy.arange(steps)))
    if what == "theta":
        optimizer = gradhpo.OnlineHypergradientOptimizer(INNER["SGD"])
        function = optimizer.estimate_theta
    else:
        cls = {"greedy": gradhpo.GreedyOptimizer, "DrMAD": gradhpo.DrMADOptimizer}[what]
        optimizer = cls(INNER["SGD"], unroll_steps=steps)
        function = optimizer.compute_hypergradient
    on = lambda state, batch, val: function(state, batch, val, the_job.train_loss, the_job.val_loss)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return Program(on, state, stack, the_job.val_batch)


def seconds_per_step(batch_size: int, period: int | None, episodes: int, steps: int):
    """A function that runs so many episodes, everything compiled by the first call."""
    the_job = job(batch_size)
    optimizer = gradhpo.OnlineHypergradientOptimizer(INNER["SGD"], estimation_period=period)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    losses = gradhpo.LossFunctions(the_job.train_loss, the_job.val_loss)

    def run():
        new, _ = gradhpo.run(
            optimizer, state, losses, the_job.train_data, the_job.val_batch,
            num_steps=episodes * steps, steps_per_episode=steps, chunk_size=episodes * steps,
            lr_hyper=OUTER_RATE, progress=False,
        )  # fmt: skip
        jax.block_until_ready(eqx.filter(new, eqx.is_array))

    return run


def print_distilled() -> None:
    print("\nFlops of a step of HyperDistill / of OneStepOptimizer")
    for name in INNER:
        ratios = [f"{flops_ratio(name, size):.2f}" for size in (32, 128, 1_000)]
        deep = flops_ratio(name, 128, depth=3)
        print(
            f"  {name:5} batches of 32, 128, 1,000: {' '.join(ratios)}   3 layers, 128: {deep:.2f}"
        )
    print("\nTemporary memory in KiB, and seconds to compile, over T = 10, 200, 1,000 steps of 32")
    for what in ("greedy", "DrMAD", "theta"):
        kilobytes, seconds = [], []
        for steps in (10, 200, 1_000):
            start = time.perf_counter()
            kilobytes.append(horizon_program(what, steps).temporary_bytes / 2**10)
            seconds.append(time.perf_counter() - start)
        print(
            f"  {what:7} " + " ".join(f"{x:8.1f}" for x in kilobytes)
            + "  KiB  " + " ".join(f"{x:5.2f}" for x in seconds) + "  s"
        )  # fmt: skip
    print("\nTime of a run with theta fitted every 50 episodes / never (episodes of 20 steps)")
    for batch_size in (32, 128):
        runs = [seconds_per_step(batch_size, period, 50, 20) for period in (50, None)]
        found = alternating(*runs, repeats=21)
        print(
            f"  batch {batch_size:4}  ratio {found.ratio:.3f} ({found.low:.2f} to {found.high:.2f})"
        )
