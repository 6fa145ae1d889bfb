"""A row of the table `gpu`, in a process of its own: the peak of memory is that of a process.

    python -m benchmarks.costs.gpu_row 110M 16 "all states"

Each line that it prints is JSON, and adds to what is known about the row.
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
    """The most that arrays and programs of this process have held on the device at once."""
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
    # The compiler tries kernels out on arrays of its own, and may hold more than the program does.
    tell(
        seconds=statistics.median(times),
        runs=len(times),
        peak=peak,
        at_most=peak is not None and peak == before,
    )
    if kept != LOG:  # of its two branches, the more expensive one would count at every visit
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
