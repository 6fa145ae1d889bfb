"""What a traced program depends on, and what it does with it."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params
from jaxtyping import PyTree

from gradhpo.utils.foreign import (
    BRANCHES,
    LOOPS,
    MAXIMA,
    NO_DERIVATIVE,
    RANDOM,
    STOP_GRADIENT,
    name_of_operation,
)


def contains(program: Jaxpr, kind: Callable[[str], bool]) -> bool:
    """Whether an operation of this kind, by its name, is anywhere in a traced program."""
    return any(
        kind(eqn.primitive.name)
        or any(contains(inner, kind) for inner in jaxprs_in_params(eqn.params))
        for eqn in program.eqns
    )


def bytes_computed(program: Jaxpr) -> int:
    """The size of all intermediate values of a traced program, times the trip counts of loops.

    A loop without a fixed trip count counts once. The compiler keeps less, as it fuses.
    """

    def of(eqn: Any) -> int:
        inner = [bytes_computed(part) for part in jaxprs_in_params(eqn.params)]
        if not inner:
            return sum(_bytes_of(x.aval) for x in eqn.outvars)
        most = max(inner) if eqn.primitive.name in BRANCHES else sum(inner)
        return eqn.params.get("length", 1) * most

    return sum(map(of, program.eqns))


def _bytes_of(aval: Any) -> int:
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", ())) * itemsize


class Readings(NamedTuple):
    """Which leaves of its argument the results of a function depend on.

    `program` is `None` if it cannot be read; then everything counts as read.
    """

    program: Jaxpr | None
    argument: Any  # its structure
    results: PyTree  # their numbers

    def by(self, select: Callable[[PyTree], PyTree] = lambda results: results) -> PyTree:
        """Marks the leaves of the argument that some of the results depend on; by default all."""
        read = [True] * self.argument.num_leaves
        if self.program is not None:
            selected = set(jax.tree.leaves(select(self.results)))
            needed = [number in selected for number in range(len(self.program.outvars))]
            read = _read(self.program, needed, by_derivative=False)
        return jax.tree.unflatten(self.argument, read)


def readings(
    function: Callable[[PyTree], Any], argument: PyTree, *, by_derivative: bool = True
) -> Readings:
    """Reads where the derivative of `function` can be non-zero, from the traced linear program.

    What no operation on the way to a result takes as input has a derivative of exactly 0
    everywhere. Unless `by_derivative`, reads what it depends on at all. A function without a
    forward derivative (an opaque callback, a `custom_vjp`) cannot be read.
    """
    leaves, treedef = jax.tree.flatten(argument)
    program, results = None, None

    def probe(*leaves):
        nonlocal program, results
        of_leaves = lambda *xs: function(jax.tree.unflatten(treedef, xs))
        push = jax.linearize(of_leaves, *leaves)[1] if by_derivative else of_leaves
        closed, shapes = jax.make_jaxpr(push, return_shape=True)(*leaves)
        numbers, structure = range(len(closed.jaxpr.outvars)), jax.tree.structure(shapes)
        program, results = closed.jaxpr, jax.tree.unflatten(structure, numbers)

    with contextlib.suppress(*NO_DERIVATIVE):
        # A separate trace, so that nothing of this reaches the surrounding program.
        jax.eval_shape(probe, *leaves)
    return Readings(program, treedef, results)


def visible_leaves(function: Callable[[PyTree], Any], tree: PyTree) -> PyTree:
    """Marks the leaves of `tree` in which the derivative of `function` can be non-zero."""
    return readings(function, tree).by()


def inputs_read(program: Jaxpr, *, by_derivative: bool) -> list[bool]:
    """For each input, whether the results depend on it, through a derivative or at all."""
    return _read(program, [True] * len(program.outvars), by_derivative)


def _read(program: Jaxpr, needed: Sequence[bool], by_derivative: bool) -> list[bool]:
    live = {v for v, here in zip(program.outvars, needed, strict=True) if here and _is_variable(v)}
    for eqn in reversed(program.eqns):
        results = [v in live for v in eqn.outvars]
        if not any(results) or (by_derivative and eqn.primitive.name == STOP_GRADIENT):
            continue
        read = [True] * len(eqn.invars)
        inside = list(jaxprs_in_params(eqn.params))
        if len(inside) == 1 and eqn.primitive.name not in LOOPS:
            [inner] = inside
            if (len(inner.invars), len(inner.outvars)) == (len(eqn.invars), len(eqn.outvars)):
                read = _read(inner, results, by_derivative)
        live |= {v for v, here in zip(eqn.invars, read, strict=True) if here and _is_variable(v)}
    return [v in live for v in program.invars]


def _is_variable(v: object) -> bool:
    return not isinstance(v, Literal)


# How a value depends on marked inputs: not at all, only through maxima, or otherwise.
_NOT, _BY_MAXIMA, _OTHERWISE = range(3)
Meets: TypeAlias = Callable[[str, list[int]], bool]  # an operation and the levels that it takes


def stops_a_function_of(
    program: Jaxpr, marked: Sequence[bool], by: Sequence[str] = (STOP_GRADIENT,)
) -> bool:
    """Whether an operation `by` comes between marked inputs and the result of a traced program.

    It is harmless on a maximum: softmax and logsumexp subtract one, which changes nothing.
    """
    return _meets(program, marked, lambda name, of: name in by and of[0] == _OTHERWISE)


def draws_with(program: Jaxpr, marked: Sequence[bool]) -> bool:
    """Whether random numbers that the result needs are drawn with something made of the inputs."""
    return _meets(program, marked, lambda name, of: name in RANDOM and any(of))


def _meets(program: Jaxpr, marked: Sequence[bool], meets: Meets) -> bool:
    return _followed(program, [_OTHERWISE if mark else _NOT for mark in marked], meets)[1]


def _followed(program: Jaxpr, levels: list[int], meets: Meets) -> tuple[list[int], bool]:
    """The levels of the results, and whether an operation on the way meets the marked inputs."""
    level = dict(zip(program.invars, levels, strict=True))
    of = lambda v: level.get(v, _NOT) if _is_variable(v) else _NOT
    found, live = False, _needed(program)
    for eqn in program.eqns:
        before = [of(v) for v in eqn.invars]
        after = [max(before, default=_NOT)] * len(eqn.outvars)
        is_live = any(v in live for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            after, found_inside = _inside(
                eqn.primitive.name, inner, before, len(eqn.outvars), meets
            )
            found |= found_inside and is_live
        if eqn.primitive.name in MAXIMA:
            after = [min(x, _BY_MAXIMA) for x in after]
        found |= is_live and meets(name_of_operation(eqn), before)
        for v, x in zip(eqn.outvars, after, strict=True):
            level[v] = max(level.get(v, _NOT), x)
    return [of(v) for v in program.outvars], found


def _inside(
    name: str, inner: Jaxpr, before: list[int], results: int, meets: Meets
) -> tuple[list[int], bool]:
    """The same inside an operation that contains a program."""
    most = max(before, default=_NOT)
    if name in BRANCHES:
        before = before[1:]
    if len(before) != len(inner.invars):
        before = [most] * len(inner.invars)
    after, found = _followed(inner, before, meets)
    if name in LOOPS:  # the results of one iteration are the inputs of the next
        after, found = _followed(inner, [max(x, *after) if x else x for x in before], meets)
        after = [max(after, default=_NOT)] * results
    return (after if len(after) == results else [most] * results), found


def _needed(program: Jaxpr) -> set:
    """The variables that the results need."""
    live = set(filter(_is_variable, program.outvars))
    for eqn in reversed(program.eqns):
        if any(v in live for v in eqn.outvars):
            live |= set(filter(_is_variable, eqn.invars))
    return live
