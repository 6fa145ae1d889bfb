"""Moves arrays between the memories of the device and its host, inside compiled programs."""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
from jaxtyping import PyTree


Space: TypeAlias = Literal["device", "host"]


def to_space(tree: PyTree, space: Space) -> PyTree:
    """The floating-point arrays in that memory; counts, flags and keys stay on the device."""
    return tree if space == "device" else _moved(tree, jax.memory.Space.Host)


def from_space(tree: PyTree, space: Space) -> PyTree:
    """What `to_space` put away, on the device."""
    return tree if space == "device" else _moved(tree, jax.memory.Space.Device)


def _moved(tree: PyTree, to: Any) -> PyTree:
    move = lambda x: jax.device_put(x, to) if eqx.is_inexact_array(x) else x
    return jax.tree.map(move, tree)
