"""What a call of `retraining_score` keeps in a directory for other calls to continue from."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.exact import with_its_update
from gradhpo.core.state import BilevelState
from gradhpo.core.wrapper import algorithm_of
from gradhpo.data.source import Source
from gradhpo.data.sources import Feed, as_source
from gradhpo.diagnostics.queries import Setting
from gradhpo.training.boundaries import Boundaries, Caller, InDirectory, InMemory
from gradhpo.training.identity import identity
from gradhpo.training.responses import function_response, inner_response
from gradhpo.training.segments import Training
from gradhpo.utils.description import UNKNOWN, described, described_arrays, described_function


_CALLER = Caller("retraining", "retraining_score", "directory")


def kept_in(
    directory: str | Path | None,
    first: Algorithm,
    state: BilevelState,
    source: Source,
    setting: Setting,
    change: Callable,
    keys: Array,
) -> Boundaries:
    """Blocks of losses, and hypergradients by the name of their optimizer.

    They belong to one training run, from one state on the same data, and to one sequence of
    changes; the number of changes and the other estimators may differ.
    """
    if directory is None:
        return InMemory()
    exact = with_its_update(first, min(setting.num_steps, 2))
    start = exact._adopt(state, keep_memory=True)
    feed = Feed(source, as_source(setting.queries, "queries", None))
    about = identity(exact, start, feed, None, None, num_steps=setting.num_steps)
    training = Training(exact, setting.losses, setting.queries, queries=True)
    about["losses"] = described_arrays(training.responses(start, setting.part))
    # Two keys show whether the changes are the same.
    changed = [change(keys[number], state.hyperparams) for number in range(2)]
    about["the changed hyperparameters"] = described_arrays(changed)
    return InDirectory(Path(directory), about, False, _CALLER)


def estimator_of(
    optimizer: BilevelOptimizer, start: BilevelState, setting: Setting
) -> dict[str, Any]:
    """What distinguishes one estimator from another, as JSON: `described` leaves out functions."""
    algorithm = algorithm_of(optimizer)
    found = described(optimizer) | {
        "the update of inner_optimizer": inner_response(optimizer, start)
    }
    functions = {"grad_fn": algorithm.grad_fn, "update_fn": algorithm.update_fn}
    for name, function in functions.items():
        if function is not None:
            batch = setting.batches.at(jnp.zeros((), jnp.int32))
            response = function_response(optimizer, start, batch)
            found[name] = described_function(function) if response == UNKNOWN else response
    # The outer optimizer has no part in a hypergradient, and the others are described above.
    told = {"inner_optimizer", "outer_optimizer", *functions}
    found |= {name: described_function(x) for name, x in _functions(algorithm) if name not in told}
    if not type(algorithm).__module__.startswith("gradhpo."):
        found["estimate"] = described_function(type(algorithm).estimate)
    return found


def _functions(module: eqx.Module, prefix: str = "") -> Iterator[tuple[str, Callable]]:
    """All fields that are functions, by name, also of modules inside."""
    for field in dataclasses.fields(module):
        name, value = prefix + field.name, getattr(module, field.name)
        if isinstance(value, eqx.Module):
            yield from _functions(value, f"{name}.")
        elif callable(value):
            yield name, value
