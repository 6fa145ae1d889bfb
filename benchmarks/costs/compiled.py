"""The compiler's figures: flops, bytes and temporary memory, against hand-written programs.

The compiler counts a scan's body once, for any length, so the figure of a step is the sum of its
loop bodies and the code outside them. Only compilation is timed here.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import optax

import gradhpo
from benchmarks.costs.functional import print_functional_units
from benchmarks.costs.problem import MOMENTUM, RATE, job
from benchmarks.costs.programs import (
    ALGORITHMS,
    VALIDATION_GRADIENTS,
    call_program,
    checkpointed_program,
    exact_programs,
    gradients_per_outer_step,
    gradients_per_step,
    scanned_program,
    step_programs,
)
from benchmarks.rows import Kept, measured, measured_when


def flops_row(name: str, batch_size: int, depth: int) -> dict[str, Any]:
    programs = step_programs(name, batch_size, depth)
    flops, theirs = (p.flops_with_loops_once for p in programs)
    read, by_hand = (p.bytes_with_loops_once for p in programs)
    costs = [p.cost for p in programs]
    # Loops inside a linear solver are hidden from the count.
    hidden = any(cost.at_least for cost in costs)
    held = [p.temporary_bytes / 2**10 for p in programs]
    return {
        "flops": [float(f"{x:.3g}") for x in (flops, theirs)],
        "ratio": round(flops / theirs, 3),
        "in_all": None if hidden else round(costs[0].flops / costs[1].flops, 3),
        "bytes": round(read / by_hand, 3),
        "KiB": [round(x) for x in held],
        "memory": round(held[0] / held[1], 2),
    }


SIZES = (128, 1), (32, 1), (1_000, 1), (128, 3)  # batch and hidden layers; quickly, the first


def print_flops(quick: bool = False, file: Path | Kept | None = None) -> None:
    print(
        "\nThe compiled step, library / hand-written: flops with loop bodies counted once, and\n"
        "in total; bytes read and written, with bodies once; temporary memory in KiB"
    )
    print(f"  {'':35} {'flops':>19}  ratio in all  bytes {'memory':>15}  ratio")
    rows = []
    for batch_size, depth in SIZES[:1] if quick else sorted(SIZES, key=lambda size: size[::-1]):
        if depth > 1:
            print(f"  {depth} hidden layers:")
        for name in ALGORITHMS:
            setting = {"name": name, "batch_size": batch_size, "depth": depth}
            (row,) = measured([setting], lambda x: flops_row(**x), file)
            in_all = "-" if row["in_all"] is None else f"{row['in_all']:.3f}"
            print(
                f"  batch {batch_size:5}  {name:22} {row['flops'][0]:9.3g} {row['flops'][1]:9.3g}"
                f" {row['ratio']:6.3f} {in_all:>6} {row['bytes']:6.3f}"
                f" {row['KiB'][0]:8} {row['KiB'][1]:6} {row['memory']:6.2f}",
                flush=True,
            )
            rows.append(row)
    print(measured_when(rows))


def print_units() -> None:
    print(
        "\nFlops of an inner step less one validation gradient, in training gradients (batch 128)"
    )
    for name in ALGORITHMS:
        if name in ("ForwardMode(20)", "ImplicitOptimizer(20)", *VALIDATION_GRADIENTS):
            continue  # their own loops, over hyperparameters and solver steps, are in `roads`
        units = (f"{gradients_per_step(name, 128, depth):6.2f}" for depth in (1, 3, 6))
        print(f"  {name:22} 1, 3, 6 hidden layers: {' '.join(units)}")
    print_outer_units()
    print_functional_units()


def print_outer_units() -> None:
    print("\nFlops of an outer step with one inner step, less validation's")
    for name, count in VALIDATION_GRADIENTS.items():
        units = (f"{gradients_per_outer_step(name, 128, depth):6.2f}" for depth in (1, 3, 6))
        print(f"  {name:22} 1, 3, 6 hidden layers: {' '.join(units)}   ({count} and a loss)")


def print_memory() -> None:
    print(
        "\nTemporary memory of the exact hypergradient, MLP 64-128-10, T = 20, in MiB: gradhpo,\n"
        "and jax.grad through lax.scan, with jax.checkpoint on its body and without"
    )
    for activation in ("tanh", "relu"):
        for batch_size in (32, 128, 1_000):
            for name in ("SGD", "Adam"):
                programs = exact_programs(name, batch_size, activation=activation)
                held = [p.temporary_bytes / 2**20 for p in programs]
                shown = (f"{x:8.2f} ({x / held[0]:4.1f} x)" for x in held[1:])
                print(f"  {activation}  batch {batch_size:5}  {name:5} {held[0]:8.2f}", *shown)
    ours = {
        f"checkpoints={x}": lambda steps, x=x: checkpointed_program(steps, x)
        for x in (None, "sqrt", "log")
    }
    by_jax = {
        "jax.grad, checkpointed body": scanned_program,
        "  and segments of root T": lambda steps: scanned_program(steps, math.isqrt(steps)),
    }
    print("  batch 32, SGD with momentum, T steps")
    for name, program in (ours | by_jax).items():
        small, large = (program(steps).temporary_bytes for steps in (100, 10_000))
        print(
            f"    {name:28} T = 100: {small / 2**20:.2f}   T = 10,000: {large / 2**20:.2f}   "
            f"{large / small:.1f} times"
        )


COMPILED = {
    "GreedyOptimizer": lambda sgd, t: gradhpo.GreedyOptimizer(sgd, unroll_steps=t),
    "T1T2Optimizer": lambda sgd, t: gradhpo.T1T2Optimizer(sgd, inner_steps=t),
    "UnrolledOptimizer": lambda sgd, t: gradhpo.UnrolledOptimizer(sgd, unroll_steps=t),
    "  with checkpoints": lambda sgd, t: gradhpo.UnrolledOptimizer(
        sgd, unroll_steps=t, checkpoints="sqrt"
    ),
    "  with bisection": lambda sgd, t: gradhpo.UnrolledOptimizer(
        sgd, unroll_steps=t, checkpoints="log"
    ),
    "DrMADOptimizer": lambda sgd, t: gradhpo.DrMADOptimizer(sgd, unroll_steps=t),
    "ForwardModeOptimizer": lambda sgd, t: gradhpo.ForwardModeOptimizer(sgd, unroll_steps=t),
    "ImplicitOptimizer": lambda sgd, t: gradhpo.ImplicitOptimizer(sgd, inner_steps=t),
}


def seconds_to_compile(name: str, steps: int) -> float:
    """Traces and compiles again: the optax object is new, so no cache applies."""
    optimizer = COMPILED[name](optax.sgd(RATE, momentum=MOMENTUM), steps)
    the_job = job(32, num_weights=8)
    state, batch = optimizer.init(the_job.params, the_job.hyperparams), the_job.train_data(0)
    start = time.perf_counter()
    call_program(optimizer.compute_hypergradient, the_job, state, batch)
    return time.perf_counter() - start


def print_compile_times(repeats: int = 5) -> None:
    print(f"\nSeconds to trace and compile a hypergradient, medians of {repeats}")
    for name in COMPILED:
        lengths = (10, 100, 1_000)
        times = [[seconds_to_compile(name, steps) for steps in lengths] for _ in range(repeats)]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        print(
            f"  {name:22}"
            + "".join(f"  T = {t:5}: {x:.2f}" for t, x in zip(lengths, medians, strict=True))
            + f"   1,000 / 10: {medians[-1] / medians[0]:.2f}"
        )
