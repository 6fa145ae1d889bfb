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
from jaxtyping import PyTree

from gradhpo.utils.freezing import is_frozen


_T = TypeVar("_T", bound=Callable)
_ARRAY = object()  # marks the place of one


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


def compiled(function: _T, gives_up: tuple[int, ...] = ()) -> _T:
    """Compiles a function of positional arguments.

    Everything that is not an array is static, in the arguments and in the result. An array that
    is returned unchanged is not an output of the program, which would copy it: the caller gets the
    array that was passed.

    The arguments with the numbers `gives_up` are donated: results overwrite their arrays, which are
    then gone, except for scalars and frozen leaves. No array may be in there twice.
    """

    @functools.wraps(function)  # profilers show this name for the program
    def on_arrays(static: Any, donated: list[Any], given: list[Any]) -> tuple[_Static, list[Any]]:
        static, goes = static
        arrays = {True: iter(donated), False: iter(given)}
        static, arrays = _split(function(*_joined(static, [next(arrays[x]) for x in goes])))
        places = {id(x): place for place, x in enumerate(given)}
        found = [places.get(id(x)) for x in arrays]
        made = [x for x, place in zip(arrays, found, strict=True) if place is None]
        return _Static((static, found)), made

    del on_arrays.__wrapped__  # it has a different signature
    program = jax.jit(on_arrays, static_argnums=0, donate_argnums=1)

    def prepared(arguments: tuple[Any, ...]) -> tuple[Any, list[Any], list[Any]]:
        static, arrays = _split(arguments)
        gone = {id(x) for number in gives_up for x in _given_up(arguments[number])}
        goes = tuple(id(x) in gone for x in arrays)
        stays = (not x for x in goes)
        return (
            (static, goes),
            list(itertools.compress(arrays, goes)),
            list(itertools.compress(arrays, stays)),
        )

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        static, donated, given = prepared(arguments)
        about, made = program(static, donated, given)
        static, places = about.value
        new = iter(made)
        arrays = [next(new) if place is None else _as_jax(given[place]) for place in places]
        return _joined(static, arrays)

    call.trace = lambda *arguments: program.trace(*prepared(arguments))  # pyright: ignore
    return call  # pyright: ignore[reportReturnType]


def traced(call: Any, *arguments: Any) -> Any:
    """A `compiled` function for these arguments, not run: a `jax.stages.Traced`.

    A call does not trace it again.
    """
    return call.trace(*arguments)


def copied(tree: PyTree) -> PyTree:
    """The tree with copies of the arrays that a call donates."""
    leaves, treedef = jax.tree.flatten(tree)
    gone = {id(x) for x in _given_up(tree)}
    with jax.debug_nans(False):  # what is not measured yet is NaN
        new = iter(_copies([x for x in leaves if id(x) in gone]))
    return jax.tree.unflatten(treedef, [next(new) if id(x) in gone else x for x in leaves])


def is_given_up(tree: PyTree) -> bool:
    """Whether an array of the tree was donated."""
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree))


@jax.jit
def _copies(arrays: list[Any]) -> list[jax.Array]:
    return [jnp.copy(x) for x in arrays]


def _given_up(tree: PyTree) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=is_frozen)
    return [x for x in leaves if not is_frozen(x) and eqx.is_array(x) and x.ndim]


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
