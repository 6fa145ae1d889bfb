"""Whether two trees agree in structure, shapes and dtypes, and where they do not."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradhpo.utils.validation import THE_WHOLE_TREE, leaf_names, strong


def have_same_structure(a: PyTree, b: PyTree) -> bool:
    """Whether two trees agree in structure, shapes and dtypes."""

    def describe(tree):
        kinds = [(getattr(x, "shape", x), getattr(x, "dtype", x)) for x in jax.tree.leaves(tree)]
        return jax.tree.structure(tree), kinds

    return describe(a) == describe(b)


def check_same_structure(found: PyTree, expected: PyTree, what: str, remedy: str) -> None:
    """Checks that two trees agree in structure, shapes and dtypes."""
    if not have_same_structure(found, expected):
        raise ValueError(
            f"{what} does not fit this optimizer. {remedy}\n{where_they_differ(found, expected)}"
        )


_MOST_SHOWN = 8


def where_they_differ(found: PyTree, expected: PyTree) -> str:
    """The leaves in which two trees differ, a line each: where, expected, found."""
    trees = [dict(zip(leaf_names(x), jax.tree.leaves(x), strict=True)) for x in (expected, found)]
    lines = []
    for name in dict.fromkeys(itertools.chain(*trees)):
        here = [_leaf_shown(tree[name]) if name in tree else "nothing" for tree in trees]
        if here[0] != here[1]:
            lines.append(f"  {name}: expected {here[0]}, found {here[1]}")
    if not lines:  # the same leaves in other containers
        kinds = [_cut(str(jax.tree.structure(x))) for x in (expected, found)]
        lines = [f"  The leaves agree, but not their containers: expected {kinds[0]},"]
        lines.append(f"  found {kinds[1]}")
    more = len(lines) - _MOST_SHOWN
    return "\n".join([*lines[:_MOST_SHOWN], *([f"  and {more} more"] if more > 0 else [])])


def _leaf_shown(leaf: Any) -> str:
    return _cut(" ".join(eqx.tree_pformat(leaf, struct_as_array=True).split()))


def _cut(text: str) -> str:
    return text if len(text) < 200 else text[:200] + "..."


def fitted(what: str, new: PyTree, old: PyTree) -> PyTree:
    """A tree with the structure, shapes and dtypes of another one; numbers become arrays.

    If the other one is `None`, anything fits.
    """
    if old is None:
        return new
    remedy = (
        "Structure, shapes and dtypes of a state are fixed by init: make a new one with "
        "init(params, hyperparams), or with the adopt(state) of another optimizer"
    )
    leaves, structure = jax.tree.flatten(new)
    expected, expected_structure = jax.tree.flatten(old)
    if structure != expected_structure:
        raise ValueError(
            f"{what} differs in structure from the state's. {remedy}\n{where_they_differ(new, old)}"
        )
    leaves = [_as_array_like(x, y) for x, y in zip(leaves, expected, strict=True)]
    for name, x, y in zip(leaf_names(old), leaves, expected, strict=True):
        found, kind = _kind(x), _kind(y)
        if found != kind:
            shown = lambda kind: f"of shape {kind[0]} and dtype {kind[1]}" if kind else "no array"
            name = name.removeprefix(THE_WHOLE_TREE)
            raise ValueError(
                f"{what}{name} is {shown(found)}, but should be {shown(kind)}. {remedy}"
            )
    return jax.tree.unflatten(structure, leaves)


_HOLDS = {bool: jnp.bool_, int: jnp.number, float: jnp.inexact}


def _as_array_like(x: Any, other: Any) -> Any:
    if type(x) in _HOLDS and eqx.is_array(other):
        fits = jnp.issubdtype(other.dtype, _HOLDS[type(x)])
        return jnp.asarray(x, other.dtype) if fits else strong(x)
    is_ours = isinstance(x, jax.Array) and not jax.typeof(x).weak_type
    return x if is_ours or not eqx.is_array(x) else strong(x)


def _kind(x: Any) -> tuple[tuple[int, ...], Any] | None:
    return (x.shape, x.dtype) if eqx.is_array(x) else None
