"""The hypergradients of every query, and the changes of its loss that they predict."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState
from gradhpo.diagnostics.cost import Program, free_bytes, on_device
from gradhpo.diagnostics.perturbations import changes
from gradhpo.diagnostics.queries import Setting, hypergradients_of_queries
from gradhpo.diagnostics.reference import FAILURES
from gradhpo.diagnostics.retraining_kept import estimator_of
from gradhpo.training.boundaries import Boundaries
from gradhpo.utils.description import differences
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.structure import have_same_structure, where_they_differ
from gradhpo.utils.trees import tree_dot
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import without_warnings


@dataclasses.dataclass
class Predictions:
    """Hypergradients `[queries, ...]` by estimator name, and what the report says about each.

    `val_losses[name]` is the mean over the queries at the end of the estimator's own training.
    """

    hypergradients: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    val_losses: dict[str, float] = dataclasses.field(default_factory=dict)
    unseen: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    blind: list[str] = dataclasses.field(default_factory=list)  # which see nothing

    def predict(self, change: Callable, keys: Array, hyperparams: PyTree) -> dict[str, np.ndarray]:
        """The changes of the losses, `[retrainings, queries]`, to first order."""
        # One estimator after another: hypergradients of many queries may be large.
        along = lambda g: np.asarray(
            _predicted(change, keys, hyperparams, on_device(g)), np.float64
        )
        return {name: along(g) for name, g in self.hypergradients.items()}


@compiled
def _predicted(change: Callable, keys: Array, hyperparams: PyTree, hypergradients: PyTree) -> Array:
    def of_one(key: Array) -> Array:
        delta = changes(change, key, hyperparams)
        # What does not move counts for nothing, even where its derivative is not finite.
        moving = lambda g: jax.tree.map(lambda x, d: jnp.where(d == 0, 0, x), g, delta)
        return jax.vmap(lambda g: tree_dot(moving(g), delta))(hypergradients)

    return jax.lax.map(of_one, keys)


def estimated(
    named: Mapping[str, Any],
    state: BilevelState,
    setting: Setting,
    bar: ProgressBar,
    kept: Boundaries,
) -> Predictions:
    """The hypergradients of all estimators, one after another; from `kept` if they are there."""
    found = Predictions()
    zeros = lambda x: np.zeros((setting.num_queries, *x.shape), x.dtype)
    zeros = jax.tree.map(zeros, state.hyperparams), np.zeros(setting.num_queries)
    names = leaf_names(state.hyperparams)
    given = {  # checked before anything is compiled
        name: _like(name, x, state, setting.num_queries)
        for name, x in named.items()
        if not isinstance(x, BilevelOptimizer)
    }
    for name, optimizer in named.items():
        if name in given:
            found.hypergradients[name], found.seconds[name] = given[name], np.nan
            continue
        start = optimizer._adopt(state, keep_memory=True)
        about = estimator_of(optimizer, start, setting) if kept.lasts else None
        made = _earlier(name, about, zeros, kept)
        try:
            with without_warnings():  # the report says what a method does not see
                seen = optimizer._seen(setting.inputs(start, setting.query(0)))
                found.unseen[name] = tuple(x for x, s in zip(names, seen, strict=True) if not s)
                if not any(seen):  # a `step` of it would raise an error that says so
                    made = zeros, np.nan
                    found.blind.append(name)
                elif made is None:
                    made = _of_queries(optimizer, start, setting)
                    header = {"name": name, "optimizer": about, "seconds": made[1]}
                    kept.put("estimate", _number_of(name), made[0], header)
        except FAILURES as error:
            found.failed[name] = str(error)
            continue
        finally:
            bar.advance(setting.num_steps, {})
        (found.hypergradients[name], val_losses), found.seconds[name] = made
        if any(seen):
            found.val_losses[name] = float(np.mean(val_losses))
    return found


_Made: TypeAlias = tuple[tuple[PyTree, np.ndarray], float]  # with validation losses, and seconds


def _of_queries(optimizer: BilevelOptimizer, start: BilevelState, setting: Setting) -> _Made:
    program = _program(optimizer, start, setting)
    begun = time.perf_counter()
    made, val_losses = program()
    seconds = time.perf_counter() - begun
    return (jax.tree.map(np.asarray, made), np.asarray(val_losses, np.float64)), seconds


def _earlier(name: str, about: Any, like: PyTree, kept: Boundaries) -> _Made | None:
    """What an earlier call kept of the optimizer of this name, if it is the same one."""
    if _number_of(name) not in kept.numbers("estimate"):
        return None
    made, header = kept.get("estimate", _number_of(name), like)
    differing = differences(header["optimizer"], about, f"optimizers[{name!r}]")
    if header["name"] != name or differing:
        raise ValueError(
            f"there are hypergradients of another optimizer {kept.where}: "
            f"{'; '.join(differing)}: rename this one, or pass another directory"
        )
    return made, header["seconds"]


def _number_of(name: str) -> int:
    """The number of its file, which does not depend on the other optimizers."""
    return zlib.crc32(name.encode())


def _program(optimizer: BilevelOptimizer, start: BilevelState, setting: Setting) -> Program:
    """A program for as many queries as fit into memory; for one at a time if `vmap` fails."""
    of = lambda num: Program(
        functools.partial(hypergradients_of_queries, at_once=num), optimizer, start, setting
    )
    num, limit = setting.num_queries, free_bytes(start)
    try:
        program = of(num)
    except FAILURES:
        num, program = 1, None
    program = of(1) if program is None else program
    while num > 1 and program.temporary_bytes > limit:
        num = max(1, min(num - 1, int(num * limit / program.temporary_bytes)))
        program = of(num)
    return program


def _like(name: str, given: Any, state: BilevelState, num_queries: int) -> PyTree:
    """Hypergradients that were given, which may have another precision."""
    given = jax.tree.map(np.asarray, given)
    # Dtypes are not compared: they become the hyperparameters' dtypes.
    shaped = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
    expected = jax.tree.map(lambda x: shaped((num_queries, *x.shape)), state.hyperparams)
    found = jax.tree.map(lambda x: shaped(x.shape), given)
    if not have_same_structure(found, expected):
        raise ValueError(
            f"optimizers[{name!r}] must be an optimizer, or hypergradients like the "
            "hyperparameters, with an extra leading axis, the queries.\n"
            f"{where_they_differ(found, expected)}"
        )
    return jax.tree.map(lambda x, like: x.astype(like.dtype), given, state.hyperparams)
