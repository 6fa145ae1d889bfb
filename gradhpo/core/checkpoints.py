r"""The exact hypergradient, and the inner states that it keeps on the way forward."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.bisection import bisection
from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.inner_state import InnerState
from gradhpo.core.measured import Loss
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem
from gradhpo.core.reverse import (
    Cotangent,
    cotangent_at_end,
    pull_step,
    pull_through,
    through_start,
)
from gradhpo.utils.memory_space import Space, from_space, to_space


Keep: TypeAlias = int | Literal["log"] | None


def unrolled(
    problem: Problem,
    first: int,
    steps: int,
    keep: Keep = None,
    space: Space = "device",
) -> Estimate:
    """The exact hypergradient of inner steps from number `first` on, and of `init` before step 0.

    It keeps every inner state; or the first of each of `keep` segments, which then run once more on
    the backward pass; or (`"log"`) the state at the start of each open interval of a bisection.
    """
    phi, validation, z, hyperparams = problem
    if keep is None:
        kept = _keeping_all(phi, z, hyperparams, first, steps, space)
    elif keep == "log":
        kept = _keeping_halves(phi, z, hyperparams, first, steps)
    else:
        kept = _keeping_starts(phi, z, hyperparams, first, steps, keep, space)
    z, train_loss, pull_back = kept
    val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
    bar = pull_back(cotangent_at_end(alpha, z, direct))
    if first == 0:
        bar = through_start(phi, problem.z, hyperparams, bar)
    return Estimate(z, cast_like(bar.hyperparams, direct), train_loss, val_loss)


# All run the steps forward, and return the end, the last training loss, and the backward pass.
Kept: TypeAlias = tuple[InnerState, Loss, Callable[[Cotangent], Cotangent]]


def _keeping_all(
    phi: InnerUpdate, z: InnerState, hyperparams: PyTree, first: int, steps: int, space: Space
) -> Kept:
    keep = lambda z: to_space(z, space)
    z, loss, before = phi.rollout(z, hyperparams, first, steps, keep=keep)
    state_at = lambda kept, t: from_space(kept, space)
    through = lambda bar: pull_through(phi, state_at, before, first, steps, hyperparams, bar)[0]
    return z, loss, through


def _keeping_starts(
    phi: InnerUpdate,
    z: InnerState,
    hyperparams: PyTree,
    first: int,
    steps: int,
    count: int,
    space: Space,
) -> Kept:
    end = first + steps - 1

    def forward(z, start, length):
        new_z, loss, _ = phi.rollout(z, hyperparams, start, length, loss_at=end)
        return new_z, (loss, to_space(z, space))

    def backward(bar, kept, start, length):
        z = from_space(kept, space)
        _, _, before = phi.rollout(z, hyperparams, start, length, keep=lambda z: z, loss_at=-1)
        return pull_through(phi, lambda z, t: z, before, start, length, hyperparams, bar)[0]

    groups, loss = [], jnp.asarray(jnp.nan)
    for starts, length in _segments(first, steps, count):
        body = lambda z, start, length=length: forward(z, start, length)
        z, (losses, before) = jax.lax.scan(body, z, starts)
        loss = losses[-1]
        groups.append((before, starts, length))

    def pull_back(bar):
        for before, starts, length in reversed(groups):
            body = lambda bar, at, length=length: (backward(bar, at[0], at[1], length), None)
            bar, _ = jax.lax.scan(body, bar, (before, starts), reverse=True)
        return bar

    return z, loss, pull_back


def _keeping_halves(
    phi: InnerUpdate, z: InnerState, hyperparams: PyTree, first: int, steps: int
) -> Kept:
    plan = bisection(steps)
    end = first + steps - 1
    number = lambda x: jnp.asarray(x).astype(int)

    def forward(carry, at):
        z, slots = carry
        t, slot = at
        slots = _put(slots, number(slot), z)
        new_z, loss, _ = phi.rollout(z, hyperparams, t, 1, loss_at=end)
        return (new_z, slots), loss

    slots = jax.tree.map(lambda x: jnp.broadcast_to(x, (plan.num_slots, *x.shape)), z)
    at = first + jnp.arange(steps), plan.forward
    (z, slots), losses = jax.lax.scan(forward, (z, slots), at)

    def visit(carry, at):
        bar, slots = carry
        t, source, target = first + number(at.step), number(at.source), number(at.target)
        take = lambda x: jax.lax.dynamic_index_in_dim(x, source, keepdims=False)
        z = jax.tree.map(take, slots)
        advance = lambda: (phi.rollout(z, hyperparams, t, 1, loss_at=-1)[0], bar)
        pull = lambda: (z, pull_step(phi, z, hyperparams, t, bar).bar)
        new_z, bar = jax.lax.cond(at.pulls, pull, advance)
        return (bar, _put(slots, target, new_z)), None

    return z, losses[-1], lambda bar: jax.lax.scan(visit, (bar, slots), plan.backward)[0][0]


def _put(slots: PyTree, number: Array, z: InnerState) -> PyTree:
    write = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number, 0)
    return jax.tree.map(write, slots, z)


def _segments(first: int, steps: int, count: int) -> list[tuple[Array, int]]:
    """`count` segments that cover the steps, in groups of equal length: (their starts, length).

    The lengths differ by at most 1, so there are at most two groups, and two programs.
    """
    short, longer = divmod(steps, count)
    middle = first + longer * (short + 1)
    groups = [
        (first + (short + 1) * jnp.arange(longer), short + 1),
        (middle + short * jnp.arange(count - longer), short),
    ]
    return [(starts, length) for starts, length in groups if starts.size]


def square_root(steps: int) -> int:
    """The number of segments with the least memory: the square root, rounded up."""
    return math.ceil(math.sqrt(steps))
