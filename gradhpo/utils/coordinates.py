"""A pytree as one vector of numbers: its length, unit vectors, and work on it in blocks."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.utils.placement import sharded_like


# Number of coordinates that are processed in parallel: enough to fill the vector units, few enough
# that as many copies of parameters and activations fit into memory.
_AT_ONCE = 16


def num_coordinates(tree: PyTree) -> int:
    """How many numbers the arrays of a tree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def ravel(tree: PyTree, dtype: jnp.dtype) -> Array:
    """All numbers of a tree in the order of its leaves, shape `[num_coordinates]`."""
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(tree)])


def unravel(row: Array, like: PyTree) -> PyTree:
    """The tree of `like`'s shapes and dtypes whose `ravel` is `row`."""
    leaves, treedef = jax.tree.flatten(like)
    parts = [
        row[first : first + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
        for first, leaf in zip(_offsets(leaves), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def unit_vector(coordinate: ArrayLike, like: PyTree) -> PyTree:
    """The tree of `like`'s shapes and dtypes with a 1 at one coordinate, else 0."""
    leaves, treedef = jax.tree.flatten(like)
    parts = [
        sharded_like(_one_at(coordinate - first, leaf), leaf)
        for first, leaf in zip(_offsets(leaves), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def _one_at(coordinate: ArrayLike, like: Any) -> Array:
    return (jnp.arange(like.size) == coordinate).reshape(like.shape).astype(like.dtype)


def map_in_blocks(function: Callable[[Any], PyTree], over: PyTree) -> PyTree:
    """`function` of every row of `over` (along the leading axes), a block of rows at a time."""
    leaves = jax.tree.leaves(over)
    if any(leaf.size == 0 for leaf in leaves):
        return jax.vmap(function)(over)  # jax.lax.map cannot cut an empty array into blocks
    count = len(leaves[0])
    return jax.lax.map(function, over, batch_size=min(count, _AT_ONCE))


def _offsets(leaves: list[Any]) -> list[int]:
    return list(itertools.accumulate((leaf.size for leaf in leaves[:-1]), initial=0))
