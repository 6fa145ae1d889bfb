"""What the compiler says: flops and temporary memory, against hand-written programs.

A scan body counts once in the compiler's flops whatever its length, so the figure of a step
is the sum of its loop bodies and of what is outside them. Nothing is timed here but the
compilation.
"""

import functools
import statistics
import time

import equinox as eqx
import jax
import optax

import gradhpo
from benchmarks import handwritten
from benchmarks.problem import MOMENTUM, OUTER_RATE, RATE, Job, job
from gradhpo.diagnostics.cost import Program


SGD = optax.sgd(RATE, momentum=MOMENTUM)
STEPS = 20
ALGORITHMS = {
    "FOOptimizer": (gradhpo.FOOptimizer(SGD), handwritten.first_order),
    "OneStepOptimizer": (gradhpo.OneStepOptimizer(SGD), handwritten.one_step),
    "T1T2Optimizer": (gradhpo.T1T2Optimizer(SGD), handwritten.t1_t2),
    "GreedyOptimizer(20)": (gradhpo.GreedyOptimizer(SGD, unroll_steps=STEPS), handwritten.greedy),
    "HyperDistill": (gradhpo.OnlineHypergradientOptimizer(SGD), handwritten.hyper_distill),
    "UnrolledOptimizer(20)": (
        gradhpo.UnrolledOptimizer(SGD, unroll_steps=STEPS),
        handwritten.unrolled,
    ),
}


def init_by_hand(name: str, the_job: Job):
    distilled = name == "HyperDistill"
    return (handwritten.init_distilled if distilled else handwritten.init)(the_job)


def batches_for(the_job: Job, inner_steps: int):
    stack = gradhpo.BatchStack.of([the_job.train_data(i) for i in range(inner_steps)])
    return stack, jax.tree.map(lambda x: x[0], stack.batches)


@functools.cache
def step_programs(name: str, batch_size: int, *, depth: int = 1) -> tuple[Program, Program]:
    """Compiled step of the library and of the hand-written program, on the same batches."""
    optimizer, write = ALGORITHMS[name]
    the_job = job(batch_size, depth=depth)
    stack, single = batches_for(the_job, optimizer.num_inner_steps)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    losses = (the_job.train_loss, the_job.val_loss)
    step = lambda state, batch, val_batch: optimizer.step(
        state, batch, val_batch, *losses, lr_hyper=OUTER_RATE
    )
    many = optimizer.num_inner_steps > 1
    ours = Program(step, state, stack if many else single, the_job.val_batch)
    by_hand = write(the_job)
    batch = stack.batches if many else single
    return ours, Program(by_hand, init_by_hand(name, the_job), batch, the_job.val_batch)


@functools.cache
def gradient_programs(batch_size: int, *, depth: int = 1) -> tuple[Program, Program]:
    """One training and one validation gradient, by parameters and hyperparameters."""
    the_job = job(batch_size, depth=depth)
    train, val = handwritten.losses(the_job)
    w, h = eqx.filter(the_job.params, eqx.is_inexact_array), the_job.hyperparams
    both = lambda loss: jax.value_and_grad(loss, argnums=(0, 1))
    return Program(both(train), w, h, the_job.train_data(0)), Program(
        both(val), w, h, the_job.val_batch
    )


def unrolled_program(optimizer: gradhpo.UnrolledOptimizer, the_job: Job) -> Program:
    """The library's exact hypergradient, the batch reused for every inner step."""
    return Program(
        lambda state, batch, val_batch: optimizer.compute_hypergradient(
            state, batch, val_batch, the_job.train_loss, the_job.val_loss
        ),
        optimizer.init(the_job.params, the_job.hyperparams),
        the_job.train_data(0),
        the_job.val_batch,
    )


def exact_programs(
    optimizer_name: str, batch_size: int, *, activation: str = "tanh"
) -> tuple[Program, Program]:
    """Exact unrolling by the library, and by `jax.grad` through a plain scan."""
    inner = {"SGD": optax.sgd(RATE), "Adam": optax.adam(0.01, eps_root=1e-16)}[optimizer_name]
    the_job = job(batch_size, activation=activation)
    ours = unrolled_program(gradhpo.UnrolledOptimizer(inner, unroll_steps=STEPS), the_job)
    return ours, Program(
        handwritten.plain_unrolled_hypergradient(the_job, inner, STEPS),
        eqx.filter(the_job.params, eqx.is_inexact_array),
        the_job.hyperparams,
        the_job.train_data(0),
        the_job.val_batch,
    )


def checkpointed_program(steps: int, checkpoints) -> Program:
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=steps, checkpoints=checkpoints)
    return unrolled_program(optimizer, job(32))


def print_flops() -> None:
    print("\nFlops of a compiled step, library / hand-written (loop bodies counted once)")
    for batch_size in (32, 128, 1_000):
        for name in ALGORITHMS:
            ours, theirs = (p.flops_with_loops_once for p in step_programs(name, batch_size))
            ratio = ours / theirs
            print(f"  batch {batch_size:5}  {name:22} {ours:10.4g} {theirs:10.4g}  {ratio:6.3f}")


def gradients_per_step(name: str, batch_size: int, depth: int) -> float:
    """Flops of an inner step without its validation gradient, in training gradients."""
    train, val = gradient_programs(batch_size, depth=depth)
    # Greedy's program has its last step apart from the loop over the others.
    bodies = 2 if name.startswith("Greedy") else 1
    flops = step_programs(name, batch_size, depth=depth)[0].flops_with_loops_once / bodies
    return (flops - val.flops_with_loops_once) / train.flops_with_loops_once


def print_units() -> None:
    print(
        "\nFlops of an inner step less one validation gradient, in training gradients (batch 128)"
    )
    for name in ALGORITHMS:
        units = (f"{gradients_per_step(name, 128, depth):6.2f}" for depth in (1, 3, 6))
        print(f"  {name:22} 1, 3, 6 hidden layers: {' '.join(units)}")


def print_memory() -> None:
    print("\nTemporary memory of the exact hypergradient, MLP 64-128-10, T = 20, in MiB")
    for activation in ("tanh", "relu"):
        for batch_size in (32, 128, 1_000):
            for name in ("SGD", "Adam"):
                programs = exact_programs(name, batch_size, activation=activation)
                ours, plain = (p.temporary_bytes for p in programs)
                print(
                    f"  {activation}  batch {batch_size:5}  {name:5} gradhpo {ours / 2**20:6.2f}"
                    f"  jax.grad through lax.scan {plain / 2**20:6.2f}  {plain / ours:5.1f} x less"
                )
    sizes = {
        (steps, checkpoints): checkpointed_program(steps, checkpoints).temporary_bytes
        for steps in (100, 10_000)
        for checkpoints in (None, "sqrt")
    }
    for checkpoints in (None, "sqrt"):
        small, large = sizes[100, checkpoints], sizes[10_000, checkpoints]
        print(
            f"  batch 32, SGD with momentum, checkpoints={checkpoints!s:5} T = 100: "
            f"{small / 2**20:.2f}   T = 10,000: {large / 2**20:.2f}   {large / small:.1f} times"
        )


def seconds_to_compile(steps: int, checkpoints) -> float:
    """Trace and compile anew: nothing comes from a cache, since the optax object is new."""
    inner = optax.sgd(RATE, momentum=MOMENTUM)
    optimizer = gradhpo.UnrolledOptimizer(inner, unroll_steps=steps, checkpoints=checkpoints)
    the_job = job(32)
    start = time.perf_counter()
    unrolled_program(optimizer, the_job)
    return time.perf_counter() - start


def print_compile_times() -> None:
    print("\nSeconds to trace and compile UnrolledOptimizer's hypergradient, medians of 7")
    for checkpoints in (None, "sqrt"):
        seconds = {10: [], 100: [], 1_000: []}
        for _ in range(7):
            for steps, times in seconds.items():
                times.append(seconds_to_compile(steps, checkpoints))
        median = {steps: statistics.median(times) for steps, times in seconds.items()}
        print(
            f"  checkpoints={checkpoints!s:5}"
            + "".join(f"  T = {steps:5}: {value:.2f}" for steps, value in median.items())
            + f"  1,000 / 10: {median[1_000] / median[10]:.2f}"
        )
