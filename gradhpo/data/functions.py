"""Functions of the index as sources: traced once, so they must take an index without a value."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gradhpo.data.source import Generated
from gradhpo.utils.repeatable import check_repeatable
from gradhpo.utils.validation import check_arity


def check_function(function: Callable, name: str) -> None:
    """Checks that it can be traced with an index, and returns the same batch each time."""
    check_arity(function, name, "index")
    program = check_repeatable(
        Generated(function),
        (jax.ShapeDtypeStruct((), jnp.int32),),
        f"{name}(index)",
        made="batch of the same index",
        values="its index, which is traced: {said}. For mini-batches of arrays pass "
        "gradhpo.ArrayData(arrays, batch_size, key); in a function, write "
        "jax.lax.dynamic_slice_in_dim(x, index * 8, 8) for x[index * 8 : index * 8 + 8], with "
        "jnp.asarray(x) if x is a NumPy array; for batches made in Python pass a generator, "
        "batches() and not batches",
        draws="a next batch, in Python, and a compiled run would draw them once for all steps. "
        "Pass gradhpo.ArrayData(arrays, batch_size, key) for random mini-batches; in a function "
        "use jax.random.fold_in(key, index); or pass a generator, whose batches are made in "
        "Python",
    )
    if not program.jaxpr.outvars:
        raise ValueError(
            f"{name}(index) returned no array: return the batch of this index, or pass {name}=None "
            "if the loss reads none"
        )
