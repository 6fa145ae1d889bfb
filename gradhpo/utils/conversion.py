"""Converts batches of NumPy arrays, PyTorch tensors, pandas objects or numbers to arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import native, strong


def as_batch(batch: PyTree, name: str) -> PyTree:
    """A batch as `step` takes it: numbers and arrays of other libraries become arrays.

    Numbers too, so that a new value does not recompile. All else (a function, a string) stays.
    """
    if type(batch) is list and any(is_container(x) for x in batch):
        raise TypeError(
            f"{name} is a list of {len(batch)} batches: pass gradhpo.BatchStack.of({name}), with "
            "one for each inner step, or a single one of them; a batch of several arrays is a tuple"
        )
    return jax.tree.map(lambda x: _number_or_array(x, name), batch)


def foreign_as_arrays(tree: PyTree, which: str) -> PyTree:
    """Arrays of other libraries, and in another byte order, as arrays; everything else stays."""
    return jax.tree.map(lambda x: as_array(x, which) if is_foreign(x) else x, tree)


def is_foreign(x: Any) -> bool:
    """Whether this can become an array but is not one that JAX takes directly."""
    if isinstance(x, jax.Array):
        return False
    if isinstance(x, np.ndarray):
        return not x.dtype.isnative
    return hasattr(x, "__array__") and not isinstance(x, np.generic)


def is_convertible(x: Any) -> bool:
    """Whether `as_array` can make an array of this."""
    return isinstance(x, (bool, int, float, complex, jax.Array)) or hasattr(x, "__array__")


def is_container(x: Any) -> bool:
    """Whether this holds leaves and is not one itself."""
    return x is not None and not jax.tree_util.all_leaves([x])


def as_array(x: Any, which: str) -> np.ndarray | Array:
    """One leaf of a batch as an array in the byte order of this machine, or an error."""
    if isinstance(x, jax.Array) and is_key(x):
        return x
    try:
        is_number = isinstance(x, (bool, int, float, complex))
        array = x if isinstance(x, jax.Array) else np.asarray(strong(x) if is_number else x)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(x).__name__
        raise TypeError(f"{which} holds a {kind} that is not an array: {error}") from error
    if array.dtype.kind not in "biufc" and not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(
            f"{which} holds a {type(x).__name__} with dtype {array.dtype}: a batch is a pytree of "
            "numbers; leave text and objects out, or encode them"
        )
    return array if isinstance(array, jax.Array) else native(array)


def _number_or_array(x: Any, which: str) -> Any:
    if isinstance(x, (bool, int, float, complex)):
        return np.asarray(x, jnp.result_type(x))
    return as_array(x, which) if is_foreign(x) else x
