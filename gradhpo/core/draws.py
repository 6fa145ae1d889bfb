"""Random numbers as a function of the state, so that a resumed run draws the same ones."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.utils.keys import key_of_numbers, numbers_of_key


# Draws between two `redrawn` states with consecutive numbers; both wrap around together.
_APART = 2**16


class Draws(eqx.Module):
    """A stream of PRNG keys, for the memory of an algorithm.

    - `numbers`: the data of the key, two of dtype uint32, so that a state can be serialised.
    - `count`: how many keys were drawn.

    ```python
    draws = gradhpo.extend.Draws.create(jax.random.key(0))
    key, draws = draws.next()
    ```
    """

    numbers: Array
    count: Array

    @classmethod
    def create(cls, key: Array | None) -> "Draws":
        """From the key that `init` was given; without one, from `jax.random.key(0)`."""
        key = jax.random.key(0) if key is None else key_of_numbers(numbers_of_key(key))
        return cls(jax.random.bits(key, (2,), jnp.uint32), jnp.zeros((), jnp.int32))

    def next(self) -> tuple[Array, "Draws"]:
        """A typed key, and the stream after it."""
        key = jax.random.fold_in(key_of_numbers(self.numbers), self.count)
        return key, dataclasses.replace(self, count=self.count + 1)


def random_directions(
    sample: Callable[..., Array], key: Array, hyperparams: PyTree, num: int
) -> PyTree:
    """Random trees like the hyperparameters, leaves `[num, ...]`.

    `sample(key, shape, dtype)` draws: `jax.random.normal`, or `jax.random.rademacher` for signs.
    """
    leaves, structure = jax.tree.flatten(hyperparams)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        sample(key, (num, *leaf.shape), leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def mean_along(weights: Array, directions: PyTree) -> PyTree:
    r"""The mean of directions `[n, ...]`, each times its weight of shape `[n]`.

    This is $\frac1n \sum_i c_i v_i$.
    """
    mean = lambda v: jnp.tensordot(weights.astype(v.dtype), v, 1) / weights.shape[0]
    return jax.tree.map(mean, directions)


def redrawn(memory: PyTree, number: ArrayLike) -> PyTree:
    """The memory with other random numbers for every `number`; 0 leaves it unchanged.

    Works under wrappers, which add axes.
    """
    is_draws = lambda x: isinstance(x, Draws)
    offset = jnp.asarray(number, jnp.int32) * _APART
    move = lambda x: dataclasses.replace(x, count=x.count + offset) if is_draws(x) else x
    return jax.tree.map(move, memory, is_leaf=is_draws)
