"""A row of the table `gpu`, in a separate process, because peak memory is counted per process.

    python -m benchmarks.costs.gpu_row 110M 16 "all states"

Each line that it prints is JSON, and adds fields to the row.
"""

import json
import statistics
import sys
import time
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

import gradhpo
from benchmarks.costs.gpt import SIZES, adamw, gpt
from benchmarks.costs.handwritten_unrolled import plain_unrolled_hypergradient
from benchmarks.costs.programs import hypergradient_program
from benchmarks.peers.workers.worker import seconds
from gradhpo.diagnostics.cost import Program


ALL, ON_HOST, SQRT, LOG = "all states", 'all states, store="host"', "sqrt states", "log states"
BY_JAX = "jax.grad, checkpointed scan"
SETTINGS: dict[str, dict[str, Any]] = {
    ALL: {},
    ON_HOST: {"store": "host"},
    SQRT: {"checkpoints": "sqrt"},
    LOG: {"checkpoints": "log"},
}


def program(size: str, steps: int, kept: str) -> Program:
    """The exact hypergradient by one of `SETTINGS`, or `BY_JAX`."""
    job = gpt(SIZES[size])
    if kept == BY_JAX:
        hypergradient = plain_unrolled_hypergradient(job, adamw, steps, checkpoint=True)
        given = job.params, job.hyperparams, job.train_data(0), job.val_batch
        return Program(hypergradient, *given)
    optimizer = gradhpo.UnrolledOptimizer(adamw, unroll_steps=steps, **SETTINGS[kept])
    return hypergradient_program(optimizer, job)


def peak_bytes() -> int | None:
    """Peak device memory of this process's arrays and programs."""
    found = jax.devices()[0].memory_stats()
    return None if found is None else found["peak_bytes_in_use"]


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def measure(size: str, steps: int, kept: str) -> None:
    start = time.perf_counter()
    made = program(size, steps, kept)
    tell(
        compiling=time.perf_counter() - start,
        temporary=made.temporary_bytes,
        host=made.host_bytes,
    )
    before = peak_bytes()
    found, _ = ravel_pytree(made())
    tell(found=found.tolist())
    times: list[float] = []
    while len(times) < 3 and sum(times) < 6:
        times.append(seconds(made))
    peak = peak_bytes()
    # While it tries out kernels, the compiler may hold more memory than the program does.
    tell(
        seconds=statistics.median(times),
        runs=len(times),
        peak=peak,
        at_most=peak is not None and peak == before,
    )
    if kept != LOG:  # every visit would count the more expensive of its two branches
        tell(flops=made.cost.flops)


def main() -> None:
    size, steps, kept = sys.argv[1:]
    try:
        measure(size, int(steps), kept)
    except jax.errors.JaxRuntimeError as error:
        full = "RESOURCE_EXHAUSTED" in str(error)
        tell(failed="out of memory" if full else str(error).splitlines()[0])


if __name__ == "__main__":
    main()
