"""How every public call is compiled: it returns at once, while the device is still at work.

`eqx.filter_jit` waits for the result (to explain runtime errors), and takes a millisecond for the
many leaves of a model: more than a small step itself.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


_ARRAY = object()  # where one stood


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function of positional arguments; what of them is no array is static.

    The result holds arrays only.
    """
    program = _program(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return program(*_split(arguments))

    return call


def compiled_update(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function that returns its first argument with other arrays in it."""

    @functools.wraps(function)
    def arrays_after(first: Any, *rest: Any) -> list[Any]:
        (before, old), _ = _split(first)
        (after, new), arrays = _split(function(first, *rest))
        if old != new or [x is _ARRAY for x in before] != [x is _ARRAY for x in after]:
            raise ValueError(f"{function.__name__} does not keep the structure of the state")
        return arrays

    program = _program(arrays_after)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        (others, treedef), arrays = _split(arguments)
        new = iter(program((others, treedef), arrays))
        first = treedef.children()[0]
        leaves = [next(new) if x is _ARRAY else x for x in others[: first.num_leaves]]
        return jax.tree.unflatten(first, leaves)

    return call


def _split(tree: Any) -> tuple[tuple[tuple[Any, ...], Any], list[Any]]:
    """What is static, hashable, and the arrays.

    One flattening of all: `eqx.partition` and `eqx.combine` take many.
    """
    leaves, treedef = jax.tree.flatten(tree)
    are_arrays = list(map(eqx.is_array, leaves))
    others = tuple(_ARRAY if y else x for x, y in zip(leaves, are_arrays, strict=True))
    return (others, treedef), list(itertools.compress(leaves, are_arrays))


def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # its name is that of the program, for profilers
    def joined(static: Any, arrays: list[Any]) -> Any:
        others, treedef = static
        found = iter(arrays)
        leaves = [next(found) if x is _ARRAY else x for x in others]
        return function(*jax.tree.unflatten(treedef, leaves))

    del joined.__wrapped__  # its signature is its own
    return jax.jit(joined, static_argnums=0)
