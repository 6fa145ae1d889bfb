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

    Everything that is not an array is static, in the arguments and in the result.
    """

    @functools.wraps(function)  # profilers show this name for the program
    def on_arrays(static: Any, arrays: list[Any]) -> tuple[_Static, list[Any]]:
        static, arrays = _split(function(*_joined(static, arrays)))
        return _Static(static), arrays

    del on_arrays.__wrapped__  # it has a different signature
    program = jax.jit(on_arrays, static_argnums=0)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        static, arrays = program(*_split(arguments))
        return _joined(static.value, arrays)

    return call  # pyright: ignore[reportReturnType]


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
