"""What the compiler says: flops, bytes and temporary memory, against hand-written programs.

A scan body counts once in the compiler's flops whatever its length, so the figure of a step
is the sum of its loop bodies and of what is outside them. Nothing is timed here but the
compilation.
"""

import statistics
import time

import optax

import gradhpo
from benchmarks.algorithms import (
    ALGORITHMS,
    checkpointed_program,
    exact_programs,
    gradients_per_step,
    hypergradient_inputs,
    hypergradient_program,
    step_programs,
)
from benchmarks.problem import MOMENTUM, RATE, job


def print_flops() -> None:
    print(
        "\nThe compiled step, library / hand-written: flops with bodies of loops counted once,\n"
        "and in all; bytes read and written, bodies once; temporary memory in KiB"
    )
    print(f"  {'':35} {'flops':>19}  ratio in all  bytes {'memory':>15}  ratio")
    for batch_size, depth in ((32, 1), (128, 1), (1_000, 1), (128, 3)):
        if depth > 1:
            print(f"  {depth} hidden layers:")
        for name in ALGORITHMS:
            programs = step_programs(name, batch_size, depth)
            flops, theirs = (p.flops_with_loops_once for p in programs)
            read, by_hand = (p.bytes_with_loops_once for p in programs)
            costs = [p.cost for p in programs]
            # Loops inside a linear solver are hidden from the count.
            hidden = any(cost.at_least for cost in costs)
            in_all = "-" if hidden else f"{costs[0].flops / costs[1].flops:.3f}"
            held = [p.temporary_bytes / 2**10 for p in programs]
            print(
                f"  batch {batch_size:5}  {name:22} {flops:9.3g} {theirs:9.3g}"
                f" {flops / theirs:6.3f} {in_all:>6} {read / by_hand:6.3f}"
                f" {held[0]:8.0f} {held[1]:6.0f} {held[0] / held[1]:6.2f}",
                flush=True,
            )


def print_units() -> None:
    print(
        "\nFlops of an inner step less one validation gradient, in training gradients (batch 128)"
    )
    for name in ALGORITHMS:
        if name in ("ForwardMode(20)", "ImplicitOptimizer(20)"):
            continue  # their own loops, over hyperparameters and solver steps, are in `roads`
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


COMPILED = {
    "GreedyOptimizer": lambda sgd, steps: gradhpo.GreedyOptimizer(sgd, unroll_steps=steps),
    "T1T2Optimizer": lambda sgd, steps: gradhpo.T1T2Optimizer(sgd, inner_steps=steps),
    "UnrolledOptimizer": lambda sgd, steps: gradhpo.UnrolledOptimizer(sgd, unroll_steps=steps),
    "  with checkpoints": lambda sgd, steps: gradhpo.UnrolledOptimizer(
        sgd, unroll_steps=steps, checkpoints="sqrt"
    ),
    "DrMADOptimizer": lambda sgd, steps: gradhpo.DrMADOptimizer(sgd, unroll_steps=steps),
    "ForwardModeOptimizer": lambda sgd, steps: gradhpo.ForwardModeOptimizer(
        sgd, unroll_steps=steps
    ),
    "ImplicitOptimizer": lambda sgd, steps: gradhpo.ImplicitOptimizer(sgd, inner_steps=steps),
}


def seconds_to_compile(name: str, steps: int) -> float:
    """Trace and compile anew: nothing comes from a cache, since the optax object is new."""
    optimizer = COMPILED[name](optax.sgd(RATE, momentum=MOMENTUM), steps)
    the_job = job(32, num_weights=8)
    given = hypergradient_inputs(optimizer, the_job)
    start = time.perf_counter()
    hypergradient_program(optimizer, the_job, given)
    return time.perf_counter() - start


def print_compile_times(repeats: int = 5) -> None:
    print(f"\nSeconds to trace and compile a hypergradient, medians of {repeats}")
    for name in COMPILED:
        seconds = {10: [], 100: [], 1_000: []}
        for _ in range(repeats):
            for steps, times in seconds.items():
                times.append(seconds_to_compile(name, steps))
        median = {steps: statistics.median(times) for steps, times in seconds.items()}
        print(
            f"  {name:22}"
            + "".join(f"  T = {steps:5}: {value:.2f}" for steps, value in median.items())
            + f"   1,000 / 10: {median[1_000] / median[10]:.2f}"
        )
