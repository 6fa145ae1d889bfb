"""gradhpo on a GPU in minutes: correctness, memory and time of a large model, loops, tests.

Every part runs in a separate process with a time limit: one that runs out of memory, hangs or
crashes loses only its own lines. Without a GPU, a tiny model runs on the CPU instead.
"""

import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.costs.gpt import SIZES, num_params
from benchmarks.costs.gpu_row import ALL, BY_JAX, LOG, ON_HOST, SQRT
from benchmarks.limited import Clock, Ended, python
from gradhpo.utils.tables import bytes_of, flops_of


# The most important rows come first: states that fit on the device, then states that fit only on
# the host. Rows are compared with the first row of the same number of steps.
ROWS = [
    (16, BY_JAX), (16, ALL), (16, ON_HOST), (64, SQRT), (64, ON_HOST), (64, ALL), (16, SQRT),
    (64, LOG), (16, LOG), (64, BY_JAX), (4, BY_JAX), (4, ALL),
]  # fmt: skip
LOOPS = ["OneStepOptimizer", "UnrolledOptimizer(20)", "GreedyOptimizer(20)"]
TESTS = "tests/test_contract.py"

# The share of the time by which each part must end, and the seconds it needs.
NUMBERS_END, ROWS_END, LOOPS_END = 0.2, 0.62, 0.75
A_ROW, A_LOOP, A_TEST = 40, 30, 20
LONGEST_ROW, LONGEST_TESTS = 130, 180


def print_gpu(minutes: float = 8.0) -> None:
    clock = Clock(minutes)
    large = jax.default_backend() == "gpu"
    if large:
        print(f"\n{card()}; jax {jax.__version__}; at most {minutes:g} minutes")
    else:
        print("\nNothing below is about a GPU: JAX found none. A tiny model runs on the CPU.")
    numbers = "-m", "benchmarks.costs.gpu_numbers"
    print_part("numbers", numbers, clock, NUMBERS_END, A_TEST, JAX_ENABLE_X64="1")
    print_rows("110M" if large else "tiny", clock)
    call = f"print_loops({LOOPS}, [128], inner_steps=1_000, repeats=3)"
    loops = "-c", f"from benchmarks.costs.loops import *; {call}"
    print_part("loops", loops, clock, LOOPS_END, A_LOOP)
    print_tests(clock)


def card() -> str:
    """Name, memory and driver as reported by the driver; otherwise what JAX knows."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    if said.strip():
        return f"{said.splitlines()[0]} (driver)"
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return f"{device.device_kind}, {bytes_of(limit)} for JAX"


def print_part(
    name: str, arguments: Sequence[str], clock: Clock, end: float, needs: float, **environment: str
) -> None:
    """Prints a process's output, if enough seconds are left in its share of the time."""
    if clock.left(end) < needs:
        print(f"\n({name}: skipped, no time left)")
        return
    done = python(*arguments, limit=clock.left(end), **environment)
    print(f"\n{done.stdout.strip(chr(10))}", flush=True)
    if done.failure:
        print(f"({name}: {done.failure})", flush=True)


# Rows


def print_rows(size: str, clock: Clock) -> None:
    model = SIZES[size]
    print(
        f"\nExact hypergradient by {2 * model.layers + 2} rates and decays, through AdamW; a"
        f" transformer of {num_params(model) / 1e6:.3g} M parameters:\n"
        f"{model.layers} recomputed layers of {model.width}, {model.words:,} words,"
        f" {model.rows} x {model.length} tokens a step; forward pass in {model.dtype}.\n"
        f"An inner state, in float32, takes {bytes_of(12 * num_params(model))}. Last column: the"
        " largest difference to the\nfirst row with as many steps, by its largest number"
    )
    print(
        f"  steps {'':30}{'temporary':>11}{'peak':>13}{'on host':>11}{'s':>9}{'flops':>8}"
        f"{'s to compile':>14}{'difference':>12}"
    )
    skipped, first = [], {}
    with tempfile.TemporaryDirectory() as folder:
        environment = of_rows(folder)
        for steps, kept in ROWS:
            if clock.left(ROWS_END) < A_ROW:
                skipped.append(f"{steps} {kept}")
                continue
            limit = min(LONGEST_ROW, clock.left(LOOPS_END))
            given = ("-m", "benchmarks.costs.gpu_row", size, str(steps), kept)
            row = row_of(python(*given, limit=limit, **environment))
            if "found" in row:
                row["expected"] = first.setdefault(steps, row["found"])
            print(f"  {steps:5} {kept:30}{columns(row)}", flush=True)
    if skipped:
        print(f"  skipped, no time left: {'; '.join(skipped)}")


def of_rows(folder: str) -> dict[str, str]:
    """The environment of a row: the whole card and host memory; kernels are chosen once for all."""
    if jax.default_backend() != "gpu":
        return {}
    found = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        # No compilation takes that long, so only the choice of kernels is cached.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
        # 64 states need 79 and XLA's limit is 64. It takes all of this at once: ask for no more.
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "88",
        # Without preallocation, the allocator found no room for arrays of 22 GiB on 80 GB.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    }
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the old name; setting both is an error
        found["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    kept = set(found) - {"XLA_PYTHON_CLIENT_PREALLOCATE"}  # `python -m benchmarks` has set it
    return found | {name: os.environ[name] for name in kept if name in os.environ}


def row_of(done: Ended) -> dict[str, Any]:
    """Everything it reported, and how it failed."""
    row: dict[str, Any] = {"failed": done.failure} if done.failure else {}
    for line in done.stdout.splitlines():
        if line.startswith("{") and line.endswith("}"):  # the last one may be cut off
            row |= json.loads(line)
    return row


def columns(row: dict[str, Any]) -> str:
    of = lambda name, show: "" if row.get(name) is None else show(row[name])
    peak = of("peak", bytes_of)
    if row.get("at_most"):
        peak = f"<= {peak}"
    difference = ""
    if "found" in row:
        found, expected = np.array(row["found"]), np.array(row["expected"])
        difference = f"{np.max(np.abs(found - expected)) / np.max(np.abs(expected)):.0e}"
    return (
        f"{of('temporary', bytes_of):>11}{peak:>13}{of('host', bytes_of):>11}"
        f"{of('seconds', lambda x: f'{x:.3g}'):>9}{of('flops', flops_of):>8}"
        f"{of('compiling', lambda x: f'{x:.1f}'):>14}{difference:>12}   {row.get('failed', '')}"
    ).rstrip()


# Tests


def print_tests(clock: Clock) -> None:
    """The contract tests of all optimizers: pytest's last line, and the failures."""
    limit = min(LONGEST_TESTS, clock.left())
    if importlib.util.find_spec("pytest") is None:
        print(f"\n{TESTS} did not run: there is no pytest")
        return
    if limit < A_TEST:
        print(f"\n{TESTS}: skipped, no time left")
        return
    several = importlib.util.find_spec("xdist") is not None
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if several else []
    # Tells conftest.py not to set the flags of the CPU compiler.
    platforms = {"JAX_PLATFORMS": "cuda,cpu"} if jax.default_backend() == "gpu" else {}
    without = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # the second complains about workers
    command = ("-m", "pytest", "-q", *without, *workers, *TESTS.split())
    done = python(*command, limit=limit, **platforms)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(f"\n{TESTS}: {(lines or ['nothing was printed'])[-1].strip('= ')}")
    if done.failure:
        print(f"({done.failure})")
    for line in failed[:20]:
        print(f"  {line[:160]}", flush=True)
