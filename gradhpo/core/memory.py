"""An algorithm's memory from outside: its entries, and which of its parts fit another one."""

import dataclasses
from typing import Any, NoReturn

import equinox as eqx
import jax
from jaxtyping import PyTree

from gradhpo.core.types import METRICS


class Memory(eqx.Module):
    """Base class of what an algorithm carries from step to step: arrays in named fields.

    ```python
    class Draws(gradhpo.extend.Memory):
        count: jax.Array

    memory = Draws(jnp.zeros((), jnp.int32))
    ```
    """

    def __getitem__(self, name: str) -> NoReturn:
        raise TypeError(
            f"the memory of an algorithm is not a dict: write state.memory.{path_to(self, name)}, "
            f'or state.get_metric("{name}")'
        )


class MemoryOfEach(Memory):
    """The memory of a wrapper, around the wrapped optimizer's memory; other fields are its own.

    - `of_each`: the memory of the wrapped optimizer, every leaf with one more leading axis.
    """

    of_each: eqx.AbstractVar[PyTree]


def entries_of(memory: PyTree) -> dict[str, PyTree]:
    """The contents of an algorithm's memory, by the names of its fields; through wrappers as well.

    Does not look into modules in it: they may be trees like the user's own parameters.
    """
    if not isinstance(memory, eqx.Module):
        return {}
    entries = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    return entries_of(memory.of_each) | entries if isinstance(memory, MemoryOfEach) else entries


def path_to(memory: PyTree, name: str) -> str:
    """How to write an entry of a memory: `theta`, or `of_each.theta`."""
    if isinstance(memory, MemoryOfEach) and not hasattr(memory, name):
        return f"of_each.{path_to(memory.of_each, name)}"
    return name


def check_memory(name: str, memory: PyTree) -> None:
    """A first memory is `None` or a module of arrays, none of them under the name of a metric."""
    made = f"{name}.init_memory"
    if memory is None:
        return
    if not isinstance(memory, eqx.Module):
        raise TypeError(
            f"{made} returned a {type(memory).__name__}: return a gradhpo.extend.Memory, whose "
            "field names are those in state.memory and in the history"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(memory):
        if not eqx.is_array(leaf):
            raise TypeError(
                f"{made} returned {leaf!r} at {jax.tree_util.keystr(path)}, which is not an array: "
                "write jnp.asarray(...), or keep it in a field of the algorithm"
            )
    taken = [field for field in entries_of(memory) if field in METRICS]
    if taken:
        raise ValueError(
            f"{made} returned a memory with the field {taken[0]}, which is the name of a metric of "
            "every step: rename the field"
        )


def kept_where_it_fits(found: PyTree, expected: PyTree) -> PyTree:
    """The parts of a memory that have the structure, shape and dtype of another memory's parts.

    The other memory's parts replace the rest; if it has `None`, anything fits.
    """
    one_level = lambda tree: jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
    (parts, kind), (others, expected_kind) = one_level(found), one_level(expected)
    if kind != expected_kind:
        return expected
    if jax.tree_util.treedef_is_leaf(kind):
        return found if _kind_of(found) == _kind_of(expected) else expected
    pairs = zip(parts, others, strict=True)
    kept = [x if y is None else kept_where_it_fits(x, y) for x, y in pairs]
    return jax.tree.unflatten(kind, kept)


def _kind_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def are_the_same(a: PyTree, b: PyTree) -> bool:
    """Whether two trees hold exactly the same leaves."""
    (a, kind_of_a), (b, kind_of_b) = map(jax.tree.flatten, (a, b))
    return kind_of_a == kind_of_b and all(x is y for x, y in zip(a, b, strict=True))
