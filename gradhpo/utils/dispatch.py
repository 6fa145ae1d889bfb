"""How every public call is compiled: it returns immediately, while the device is still working.

`eqx.filter_jit` waits for the result (to explain runtime errors), and takes a millisecond for a
model with many leaves: more than a small step itself.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp


_T = TypeVar("_T", bound=Callable)
_ARRAY = object()  # where one stood


@jax.tree_util.register_pytree_node_class
class _Static:
    """The non-array part of a result: known once it is traced, and part of its structure."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), self.value

    @classmethod
    def tree_unflatten(cls, value: Any, _: Any) -> "_Static":
        return cls(value)


def compiled(function: _T) -> _T:
    """Compiles a function of positional arguments.

    Everything that is not an array is static, in the arguments and in the result. An array that
    is returned unchanged is not an output of the program, which would copy it: the caller gets the
    array that was passed.
    """

    @functools.wraps(function)  # profilers show this name for the program
    def on_arrays(static: Any, given: list[Any]) -> tuple[_Static, list[Any]]:
        static, arrays = _split(function(*_joined(static, given)))
        places = {id(x): place for place, x in enumerate(given)}
        found = [places.get(id(x)) for x in arrays]
        made = [x for x, place in zip(arrays, found, strict=True) if place is None]
        return _Static((static, found)), made

    del on_arrays.__wrapped__  # it has a different signature
    program = jax.jit(on_arrays, static_argnums=0)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        static, given = _split(arguments)
        about, made = program(static, given)
        static, places = about.value
        new = iter(made)
        arrays = [next(new) if place is None else _as_jax(given[place]) for place in places]
        return _joined(static, arrays)

    return call  # pyright: ignore[reportReturnType]


def _as_jax(x: Any) -> jax.Array:
    """The array that was passed; a copy of a NumPy array, which the caller may write to."""
    return x if isinstance(x, jax.Array) else jnp.array(x)


def _split(tree: Any) -> tuple[tuple[tuple[Any, ...], Any], list[Any]]:
    """The static parts, hashable, and the arrays.

    Flattens everything once: `eqx.partition` and `eqx.combine` flatten many times.
    """
    leaves, treedef = jax.tree.flatten(tree)
    are_arrays = list(map(eqx.is_array, leaves))
    others = tuple(_ARRAY if y else x for x, y in zip(leaves, are_arrays, strict=True))
    return (others, treedef), list(itertools.compress(leaves, are_arrays))


def _joined(static: tuple[tuple[Any, ...], Any], arrays: list[Any]) -> Any:
    others, treedef = static
    found = iter(arrays)
    return jax.tree.unflatten(treedef, [next(found) if x is _ARRAY else x for x in others])
