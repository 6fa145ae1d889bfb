"""Compiled calls that return at once, while the device is still at work."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


_ARRAY = object()  # where one stood


def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles like `eqx.filter_jit`, which waits for the result (to explain its runtime errors).

    Arguments are positional; what of them is no array is static. The result holds arrays only.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(static: Any, arrays: list[Any]) -> Any:
        others, treedef = static
        found = iter(arrays)
        leaves = [next(found) if x is _ARRAY else x for x in others]
        return function(*jax.tree.unflatten(treedef, leaves))

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        # One flattening of all: eqx.partition and eqx.combine take many, a millisecond in sum.
        leaves, treedef = jax.tree.flatten(arguments)
        arrays = [x for x in leaves if eqx.is_array(x)]
        return compiled((tuple(_ARRAY if eqx.is_array(x) else x for x in leaves), treedef), arrays)

    return call
