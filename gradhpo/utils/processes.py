"""Several processes of one program (`jax.distributed`): arrays of one, and arrays of all."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Literal
from jaxtyping import PyTree

from gradhpo.utils.validation import THE_WHOLE_TREE, leaf_names


def check_shared(state: PyTree, **batches: PyTree) -> None:
    """Refuses batches of one process beside a state that all of them share.

    JAX takes such a batch for one that is the same everywhere, and does not look. Functions among
    the leaves are sources, `index -> batch`.
    """
    if jax.process_count() == 1 or not any(map(_is_shared, jax.tree.leaves(state))):
        return
    for name, batch in batches.items():
        for leaf_name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True):
            if any(map(_is_local, _arrays_of(leaf))):
                raise ValueError(
                    f"{name}{leaf_name.removeprefix(THE_WHOLE_TREE)} is an array of this process "
                    f"alone, and the state is shared by {jax.process_count()} processes: each "
                    "would train on a batch of its own, and their parameters would drift apart. "
                    "Join the parts into one array, "
                    "jax.make_array_from_process_local_data(sharding, part), or put what all have "
                    "alike on all devices, jax.device_put(x, sharding); or make an independent "
                    "state in every process, of arrays of its own"
                )


def _arrays_of(leaf: Any) -> Iterator[Any]:
    """A leaf; or the arrays that a function of an index has closed over."""
    if eqx.is_array(leaf) or not callable(leaf):
        yield leaf
        return
    program = jax.make_jaxpr(leaf)(jnp.zeros((), jnp.int32))
    yield from program.consts
    for eqn in program.jaxpr.eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, Literal) and jnp.ndim(v.val))


def _is_shared(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and not x.is_fully_addressable


def _is_local(x: Any) -> bool:
    return eqx.is_array(x) and not isinstance(x, Tracer) and not _is_shared(x)
