"""Solvers of benchopt's benchmark_bilevel on its simulated quadratic, without benchopt's runner.

Its classes run step by step and unmodified. A request changes only the constants and exponents of
the step sizes, in the solver's initial state.
"""

import functools
import importlib
import inspect
import json
import os
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import serve


made: dict[str, Any] = {}


def load(root: str, path: str, **problem: Any) -> dict[str, Any]:
    """Draws the quadratic of a clone of the benchmark, and saves its matrices."""
    sys.path.insert(0, root)
    os.chdir(tempfile.mkdtemp())  # it keeps what it draws in the current directory
    drawn = importlib.import_module("datasets.simulated").Dataset.get_instance(**problem).get_data()
    objective = importlib.import_module("objective").Objective.get_instance(random_state=2442)
    objective.set_data(**drawn)
    made.update(objective.get_objective())
    arrays = {
        f"{level}_{name}": np.asarray(x)
        for level in ("inner", "outer")
        for name, x in inspect.getclosurevars(made[f"f_{level}"].__wrapped__).nonlocals.items()
    }
    np.savez(path, inner_start=made["inner_var0"], outer_start=made["outer_var0"], **arrays)
    return {"jax": jax.__version__, "dtype": str(arrays["inner_cross"].dtype)}


def solver(name: str, **parameters: Any) -> Any:
    found = importlib.import_module(f"solvers.{name}").Solver.get_instance(
        eval_freq=1, random_state=1, **parameters
    )
    found.set_objective(**made)
    return found


@functools.cache
def kept_solver(name: str, parameters: str) -> Any:
    """The same one for every seed, so that only the first compiles."""
    return solver(name, **json.loads(parameters))


def started(chosen: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The initial state, with the exponents of its step sizes replaced by `exponents`."""
    carry = chosen.init()
    if "exponents" in changes:
        carry["state_lr"]["exponents"] = jnp.array(changes["exponents"])
    return carry


def iterates(
    name: str, steps: int, parameters: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """Inner and outer variables after each of the first steps, on all of the data.

    `changes`: `exponents`; `divide`, whether the rate of the inner variable is divided by the
    multiplier of F2SA.
    """
    if name == "bome":  # it always uses all of the data, and runs in Python
        return of_bome(steps, parameters)
    chosen = solver(name, batch_size="full", **parameters)
    carry, inner, outer, multipliers = started(chosen, changes), [], [], []
    rates = carry["state_lr"]["constants"]
    for _ in range(steps):
        multiplier = float(carry.get("lmbda", 1.0))
        if changes.get("divide"):
            carry["state_lr"]["constants"] = rates.at[0].divide(multiplier)
        carry = chosen.one_epoch(carry, 1)
        inner.append(carry["inner_var"].tolist())
        outer.append(carry["outer_var"].tolist())
        multipliers.append(multiplier)
    return {"inner": inner, "outer": outer, "multipliers": multipliers}


def of_bome(steps: int, parameters: dict[str, Any]) -> dict[str, Any]:
    of_file = importlib.import_module("solvers.bome").Solver
    found = of_file.get_instance(random_state=1, **parameters)
    found.set_objective(**made)
    inner, outer = [], []

    def goes_on() -> bool:
        inner.append(found.inner_var.tolist())
        outer.append(found.outer_var.tolist())
        return len(inner) <= steps

    found.run(goes_on)
    return {"inner": inner[1:], "outer": outer[1:], "multipliers": []}


def timed(
    name: str, seed: int, chunks: int, chunk: int, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Seconds since the start, and the outer variable, after each chunk of compiled steps."""
    chosen = kept_solver(name, json.dumps(parameters))
    jax.block_until_ready(chosen.one_epoch(chosen.init(), chunk))  # compiled
    carry = chosen.init()
    # As its own `set_objective` draws them.
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    for level, key in zip(("inner", "outer"), keys, strict=True):
        sampler = carry[f"state_{level}_sampler"]
        carry[f"state_{level}_sampler"] = {**sampler, "key": key}
    seconds, outer = [], []
    start = time.perf_counter()
    for _ in range(chunks):
        carry = chosen.one_epoch(carry, chunk)
        outer.append(np.asarray(carry["outer_var"]))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "outer": [x.tolist() for x in outer]}


if __name__ == "__main__":
    serve(load=load, iterates=iterates, timed=timed)
