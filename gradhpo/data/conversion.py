"""What loaders yield, as arrays: NumPy, JAX, and other libraries' arrays through NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import strong


def native_dtype(dtype: Any) -> Any:
    """In this machine's byte order, which JAX assumes for all arrays."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def as_array(x: Any, which: str) -> np.ndarray | Array:
    """What a loader yields, as an array: tensors of other libraries through NumPy."""
    if isinstance(x, jax.Array) and is_key(x):
        return x
    try:
        is_number = isinstance(x, (bool, int, float, complex))
        array = x if isinstance(x, jax.Array) else np.asarray(strong(x) if is_number else x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{which} holds a {type(x).__name__} that is no array: {error}") from error
    if array.dtype.kind not in "biufc" and not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(
            f"{which} holds a {type(x).__name__} with dtype {array.dtype}: a batch is a pytree of "
            "numbers; leave text and objects out, or encode them"
        )
    return array
