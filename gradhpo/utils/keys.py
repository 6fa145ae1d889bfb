"""PRNG keys that travel inside batches, and in memories."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree


def fold_keys(batch: PyTree, index: ArrayLike) -> PyTree:
    """Folds an index into every typed PRNG key of a batch, so that random draws differ."""
    return jax.tree.map(lambda x: _fold(x, index) if is_key(x) else x, batch)


def is_key(x: Any) -> bool:
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def numbers_of_key(key: Array) -> Array:
    """The numbers of a PRNG key, typed or legacy, for a state: typed keys cannot be serialised."""
    return jax.random.key_data(key) if is_key(key) else key


def key_of_numbers(numbers: Array) -> Array:
    """The typed key, of the kind with this many numbers."""
    kind = "threefry2x32" if numbers.shape[-1] == 2 else "rbg"
    return jax.random.wrap_key_data(numbers, impl=kind)


def looks_like_a_key(x: Any) -> bool:
    """Whether this may be a key made by `jax.random.PRNGKey`, which has no type of its own."""
    return eqx.is_array(x) and x.shape == (2,) and x.dtype == jnp.uint32


def _fold(keys: Array, index: ArrayLike) -> Array:
    folded = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys.reshape(-1))
    return folded.reshape(keys.shape)
