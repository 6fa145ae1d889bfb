"""The memory of an algorithm, looked at from outside: its entries, and what of it fits another."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


def entries_of(memory: PyTree) -> dict[str, PyTree]:
    """What an algorithm's memory holds, by the names of its fields, those of modules in it too."""
    if not isinstance(memory, eqx.Module):
        return {}
    fields = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    nested = [entries_of(value) for value in fields.values()]
    return {name: value for entries in [*nested, fields] for name, value in entries.items()}


def kept_where_it_fits(found: PyTree, expected: PyTree) -> PyTree:
    """The parts of a memory that have the structure, shape and dtype of those of another one.

    The other's parts stand in for the rest; where it has `None`, anything fits.
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
    """Whether two trees hold the very same leaves."""
    (a, kind_of_a), (b, kind_of_b) = map(jax.tree.flatten, (a, b))
    return kind_of_a == kind_of_b and all(x is y for x, y in zip(a, b, strict=True))
