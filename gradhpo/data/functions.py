"""Functions of the index as sources: traced once, so they must take an index without a value."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from gradhpo.data.source import Generated
from gradhpo.utils.foreign import needs_a_value
from gradhpo.utils.validation import check_arity


def check_function(function: Callable, name: str) -> None:
    """It is traced with an index alone, and makes the same of it each time that it is traced."""
    check_arity(function, name, "index")
    first, second = (_traced(function, name) for _ in range(2))
    if not _alike(first, second):
        raise ValueError(
            f"{name}(index) made another batch of the same index when it was called again: it "
            "draws random numbers (NumPy's, Python's), or a next batch, in Python, and a compiled "
            "run would draw them once for all steps. Pass gradhpo.ArrayData(arrays, batch_size, "
            "key) for random minibatches; in a function take jax.random.fold_in(key, index); or "
            "pass a generator, whose batches are made in Python"
        )


def _traced(function: Callable, name: str) -> ClosedJaxpr:
    def arrays_of(index: Any) -> Any:
        return eqx.filter(Generated(function)(index), eqx.is_array_like)

    try:
        return jax.make_jaxpr(arrays_of)(jax.ShapeDtypeStruct((), jnp.int32))
    except Exception as error:
        if not needs_a_value(error):
            error.add_note(f"gradhpo called {name}(index) with a traced index.")
            raise
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name}(index) needs the value of its index, which is traced: {said}. For minibatches "
            "of arrays pass gradhpo.ArrayData(arrays, batch_size, key); in a function "
            "x[index * 8 : index * 8 + 8] is jax.lax.dynamic_slice_in_dim(x, index * 8, 8), of a "
            "jnp.asarray(x) where x is a NumPy array; batches that are made in Python come from a "
            "generator, which is passed called"
        ) from error


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
