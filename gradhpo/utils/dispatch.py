"""Compiled calls that return at once, while the device is still at work."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles like `eqx.filter_jit`, which waits for the result (to explain its runtime errors).

    Arguments are positional; what of them is no array is static. The result holds arrays only.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(static: Any, arrays: Any) -> Any:
        leaves, treedef = static
        return function(*eqx.combine(arrays, jax.tree.unflatten(treedef, leaves)))

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        arrays, static = eqx.partition(arguments, eqx.is_array)
        leaves, treedef = jax.tree.flatten(static)
        return compiled((tuple(leaves), treedef), arrays)

    return call
