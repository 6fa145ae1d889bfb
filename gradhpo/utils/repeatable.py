"""User functions that are traced once: they must return the same for the same arguments."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from gradhpo.utils.foreign import needs_a_value


def check_repeatable(
    function: Callable, args: tuple, call: str, *, made: str, values: str, draws: str
) -> ClosedJaxpr:
    """The traced program: it is the same when traced twice, and needs no value of its arguments.

    `call` is how it is called, and `made` what it makes; `values` and `draws` say what to write.
    """
    first, second = (_traced(function, args, call, values) for _ in range(2))
    if not _alike(first, second):
        raise ValueError(
            f"{call} made another {made} when it was called again: it draws random numbers "
            f"(NumPy's, Python's), or {draws}"
        )
    return first


def _traced(function: Callable, args: tuple, call: str, values: str) -> ClosedJaxpr:
    is_traced = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    arrays, rest = eqx.partition(args, is_traced)

    def arrays_of(arrays: tuple) -> Any:
        return eqx.filter(function(*eqx.combine(arrays, rest)), eqx.is_array_like)

    try:
        return jax.make_jaxpr(arrays_of)(arrays)
    except Exception as error:
        if not needs_a_value(error):
            error.add_note(f"gradhpo called {call} with traced arguments.")
            raise
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{call} needs the value of {values.format(said=said)}") from error


def _alike(first: ClosedJaxpr, second: ClosedJaxpr) -> bool:
    pairs = zip(_constants(first), _constants(second), strict=False)
    same_program = len(first.jaxpr.eqns) == len(second.jaxpr.eqns)
    return same_program and all(x is y or _equal(x, y) for x, y in pairs)


def _equal(x: Any, y: Any) -> bool:
    if type(x) is not type(y) or np.shape(x) != np.shape(y):
        return False
    if isinstance(x, str):
        return x == y
    if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    return bool(np.all((x == y) | ((x != x) & (y != y))))  # NaN is NaN


def _constants(program: Any) -> Iterator[Any]:
    """All numbers in a traced program: arrays, literals and settings of operations."""
    if isinstance(program, (ClosedJaxpr, Jaxpr)):  # one class since JAX 0.12
        yield from getattr(program, "consts", ())
        program = getattr(program, "jaxpr", program)
        for eqn in program.eqns:
            yield from (x.val for x in eqn.invars if isinstance(x, Literal))
            yield from _constants(tuple(eqn.params.values()))
        yield from (x.val for x in program.outvars if isinstance(x, Literal))
    elif isinstance(program, (tuple, list)):
        for part in program:
            yield from _constants(part)
    elif isinstance(program, (bool, int, float, complex, str)) or eqx.is_array(program):
        yield program
