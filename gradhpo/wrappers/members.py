"""What each member of a population owns, and what all of them share."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.inner_state import InnerState
from gradhpo.core.memory import MemoryOfEach
from gradhpo.core.metadata import Metadata
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.core.types import METRICS


class PopulationMemory(MemoryOfEach):
    """What [`Population`][gradhpo.Population] carries over.

    - `key`: the numbers of the PRNG key for exploits.
    - `mean_val_loss`: the running mean of the validation loss that members are ranked by, shape
        `[members]`; infinite for a member whose last step was refused.
    - `num_losses`: the number of losses in that mean, shape `[members]`, int32.
    - `parent`: the member that each one was at the end of the last step, before it was replaced:
        its own number, or the number of the member it has copied; shape `[members]`, int32.
    - `origin`: the same since the start of the episode.
    - `mutation`: what the mutation has learned; `()` if it learns nothing.
    - `of_each`: the memory of the wrapped optimizer, every leaf with a leading member axis.
    """

    key: Array
    mean_val_loss: Array
    num_losses: Array
    parent: Array
    origin: Array
    mutation: PyTree
    of_each: PyTree


class Member(NamedTuple):
    """The part of a state that belongs to one member, or to all of them, stacked."""

    z: InnerState
    hyperparams: PyTree
    outer_opt_state: PyTree
    memory: Any
    fresh: Array
    metrics: Metadata


def memory_of(memory: Any, num_members: int) -> PopulationMemory:
    """The memory, if the state was made for this many members, which its arrays do not show."""
    if isinstance(memory, PopulationMemory) and memory.parent.shape == (num_members,):
        return memory
    found = "without a member axis"
    if isinstance(memory, PopulationMemory):
        found = f"for {memory.parent.shape[0]} members"
    raise ValueError(
        f"the state was made {found}, and Population has num_members={num_members}: make it with "
        "this optimizer's init(params, hyperparams, spread=...)"
    )


def part_of(state: BilevelState, memory: Any) -> Member:
    """A member's own part of a state of the wrapped optimizer, or all members' parts, stacked."""
    notes = [name for name in state.metadata if name not in (*METRICS, *state.metadata.aux)]
    own = state.hyperparams, state.outer_opt_state, memory, state.fresh
    return Member(inner_state(state), *own, state.metadata.without(notes))


def with_part(state: BilevelState, own: Member, memory: Any = ...) -> BilevelState:
    """A state with the part of one member, or of all together with their common `memory`."""
    return dataclasses.replace(
        state,
        params=eqx.combine(own.z.w, state.params),
        hyperparams=own.hyperparams,
        inner_opt_state=own.z.s,
        outer_opt_state=own.outer_opt_state,
        model_state=own.z.r,
        memory=own.memory if memory is ... else memory,
        fresh=own.fresh,
        metadata=state.metadata | own.metrics,
    )


def check_member_axis(tree: PyTree, what: str, num_members: int) -> None:
    """Checks that every array has a leading member axis."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if eqx.is_array(leaf) and leaf.shape[:1] != (num_members,):
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} has shape {leaf.shape}; Population with "
                f"num_members={num_members} needs the members first, [{num_members}, ...]: stack "
                "their arrays, or pass the arrays of one member with spread=function, where "
                "function(key, hyperparams) returns the hyperparameters of a member"
            )


def numbered(num_members: int) -> Array:
    """The numbers of all members."""
    return jnp.arange(num_members, dtype=jnp.int32)
