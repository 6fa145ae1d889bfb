"""The results of optimizers, schedules and user functions for numbers that we choose.

A rate, a momentum or a bound is hidden in a function, but shows in its results: for gradients of
many sizes, at counts near and far, and close to the parameters and hyperparameters of the start,
which may be 0.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.inner_state import Start
from gradhpo.core.state import BilevelState, inner_state, with_inner_state
from gradhpo.core.wrapper import algorithm_of
from gradhpo.utils.description import UNKNOWN, described_responses
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.placement import placed
from gradhpo.utils.settings import outer_rate
from gradhpo.utils.sums import spread


# Sizes of successive gradients, and by how much all counts move on before each.
_SIZES = (1e-8, 1e-6, 1e-4, 1e-2, 1, 1e2, 1, 1e3, 1e-2, 10, 0.1, 1, 30, 0.3, 3, 1)
_JUMPS = (0, 0, 0, 0, 0, 0, 4, 10, 20, 50, 100, 300, 500, 4_000, 15_000, 80_000)
_STEPS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1_597, 2_584, 4_181,
          6_765, 10_946, 17_711, 28_657, 46_368, 75_025, 121_393, 196_418, 317_811)  # fmt: skip
# Entries of every leaf of an update. An optimizer treats the others in the same way.
_ENTRIES = 4096


def inner_response(optimizer: BilevelOptimizer, state: BilevelState) -> Any:
    """Successive updates by the inner optimizer; `None` with an `update_fn`."""
    if algorithm_of(optimizer).inner_optimizer is None:
        return None
    w, s = inner_state(state).w, state.inner_opt_state
    return _told(lambda: _successive(w, s, lambda *given: _inner(optimizer, state, *given)))


def outer_response(optimizer: BilevelOptimizer, state: BilevelState) -> Any:
    """Successive updates by the outer optimizer; `None` without one."""
    if optimizer.outer_optimizer is None:
        return None
    like, s = state.hyperparams, state.outer_opt_state
    return _told(lambda: _successive(like, s, lambda *given: _outer(optimizer, state, *given)))


def function_response(optimizer: BilevelOptimizer, state: BilevelState, batch: PyTree) -> Any:
    """The result of a `grad_fn` or an `update_fn` for a batch, at two points."""
    places = (1, 0), (0, 1)
    made = lambda: [_function(optimizer, state, batch, np.asarray(x, np.float32)) for x in places]
    return _told(lambda: described_responses(inner_state(state).w, made()))


def start_response(start: Start, hyperparams: PyTree) -> Any:
    """The parameters that a `start_fn` makes, at two points."""

    def told() -> Any:
        made = [_started(start, hyperparams, np.asarray(share, np.float32)) for share in (0, 1)]
        return described_responses(made[0], [jax.tree.leaves(tree) for tree in made])

    return _told(told)


def schedule_response(schedule: Callable) -> Any:
    """The values of a schedule of the outer rate, at steps near and far."""

    def told() -> Any:
        rates = np.asarray(_rates(schedule))
        return {"kind": "a schedule"} | described_responses(rates[0], [[x] for x in rates])

    return _told(told)


def _told(compute: Callable[[], Any]) -> Any:
    """`UNKNOWN` if a function needs more than it gets here, which must not end a run."""
    try:
        return compute()
    except Exception:
        return UNKNOWN


def _successive(like: PyTree, opt_state: PyTree, update: Callable) -> Any:
    directions, found = (_direction(like, 0), _direction(like, 10**6)), []
    for number, (size, jump) in enumerate(zip(_SIZES, _JUMPS, strict=True)):
        probe = _Probe(
            sizes=np.asarray([size * math.cos(number), size * math.sin(number)], np.float32),
            beside=np.asarray(number % 2, np.float32),
            jump=np.asarray(jump, np.int32),
        )
        entries, opt_state = update(opt_state, probe, directions)
        found.append(entries)
    return described_responses(like, found)


class _Probe(NamedTuple):
    """One of the successive updates: shares of two gradients, whether nearby, and the delay."""

    sizes: Any
    beside: Any
    jump: Any


def _direction(like: PyTree, start: int) -> PyTree:
    """Made on the host: within a program it would be compiled into everything that uses it."""

    def made(number: int, x: Array) -> Array:
        values = np.resize(spread((_ENTRIES,), start + 7919 * number, np), x.shape)
        values = values.astype(x.dtype)
        return placed(values, x.sharding) if x.committed else jnp.asarray(values)

    leaves, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, list(itertools.starmap(made, enumerate(leaves))))


@compiled
def _inner(
    optimizer: BilevelOptimizer, state: BilevelState, s: PyTree, probe: _Probe, directions: PyTree
) -> tuple[list[Array], PyTree]:
    z = inner_state(state)
    here = with_inner_state(state, z._replace(w=_beside(z.w, 1), s=_moved_on(s, probe)))
    here = here.update(hyperparams=_beside(state.hyperparams, probe.beside))
    updates, new = optimizer._inner_response(here, _gradient(probe, directions))
    return _entries(updates), cast_like(new, s)


@compiled
def _outer(
    optimizer: BilevelOptimizer, state: BilevelState, s: PyTree, probe: _Probe, directions: PyTree
) -> tuple[list[Array], PyTree]:
    here = state.update(
        hyperparams=_beside(state.hyperparams, probe.beside), outer_opt_state=_moved_on(s, probe)
    )
    updates, new = optimizer._outer_response(here, _gradient(probe, directions))
    return _entries(updates), cast_like(new, s)


def _gradient(probe: _Probe, directions: PyTree) -> PyTree:
    def mixed(x: Array, y: Array) -> Array:
        wide = probe.sizes[0] * x.astype(np.float32) + probe.sizes[1] * y.astype(np.float32)
        return wide.astype(x.dtype)

    return jax.tree.map(mixed, *directions)


def _moved_on(opt_state: PyTree, probe: _Probe) -> PyTree:
    """All counts some steps later."""
    is_count = lambda x: jnp.issubdtype(x.dtype, jnp.signedinteger)
    return jax.tree.map(lambda x: x + probe.jump.astype(x.dtype) if is_count(x) else x, opt_state)


def _beside(tree: PyTree, share: Any) -> PyTree:
    """Nearby values, none of them 0; unchanged at a `share` of 0."""

    def moved(x: Array) -> Array:
        by = np.float32(0.2) * jnp.abs(x).astype(np.float32) + np.float32(0.02)
        return x + (share * by * spread(x.shape, 5 * 10**8)).astype(x.dtype)

    return jax.tree.map(moved, tree)


def _entries(tree: PyTree) -> list[Array]:
    return [jnp.ravel(x)[:_ENTRIES] for x in jax.tree.leaves(tree)]


@compiled
def _function(
    optimizer: BilevelOptimizer, state: BilevelState, batch: PyTree, place: Any
) -> list[Array]:
    z = inner_state(state)
    w, hyperparams = _beside(z.w, place[0]), _beside(state.hyperparams, place[1])
    here = with_inner_state(state, z._replace(w=w)).update(hyperparams=hyperparams)
    made, is_params = optimizer._function_response(here, batch)
    if not is_params:
        return _entries(made)
    # With a share of the parameters, so that their rounding makes no difference.
    moves = _entries(jax.tree.map(jnp.subtract, made, w))
    pairs = zip(moves, _entries(w), strict=True)
    return [jnp.concatenate([move, 0.01 * x]) for move, x in pairs]


@compiled
def _started(start: Start, hyperparams: PyTree, share: Any) -> PyTree:
    made = start.function(start.key, _beside(hyperparams, share))
    return eqx.filter(made, eqx.is_inexact_array)


@compiled
def _rates(schedule: Callable) -> Array:
    rate_at = lambda step: jnp.asarray(outer_rate(schedule(step)))
    return jax.lax.map(rate_at, jnp.asarray(_STEPS, np.int32))
