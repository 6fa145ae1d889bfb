"""What inner steps change, and where an episode begins."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.utils.freezing import like_trained


class InnerState(NamedTuple):
    r"""The inner state, or a cotangent of it, in which `None` parts count as 0.

    In formulas $z = (w, s, r)$:

    - `w`: the floating-point part of the parameters.
    - `s`: the inner optimizer's state; `()` with an `update_fn`.
    - `r`: running state of the model; `None` if it has none.
    """

    w: PyTree
    s: PyTree = None
    r: PyTree = None


def differentiated(r: PyTree) -> tuple[PyTree, PyTree]:
    """The floating-point part of the running state, and the rest."""
    return eqx.partition(r, eqx.is_inexact_array)


def restarted(start: PyTree, end: PyTree, rate: ArrayLike) -> PyTree:
    """Running state for the next episode: from the start of the last one if the `rate` is 0.

    Otherwise from its end: averages with different counts cannot be interpolated.
    """
    return jax.tree.map(lambda x, y: jnp.where(jnp.asarray(rate) > 0, y, x), start, end)


class Start(eqx.Module):
    r"""Initial parameters of an episode: `function(key, hyperparams)`, by their episode's key.

    `r` is the running state that every episode starts with.
    """

    function: Callable[[Array, PyTree], PyTree]
    key: Array
    steps_per_episode: int = eqx.field(static=True)
    r: PyTree = None

    def __call__(self, hyperparams: PyTree, w: PyTree) -> PyTree:
        """The floating-point part of the parameters, with the structure of `w`."""
        return like_trained(w, self.function(self.key, hyperparams))

    def at(self, step: Array) -> "Start":
        """The start of the episode that an outer step belongs to."""
        return self.folded(step // self.steps_per_episode)

    def folded(self, number: ArrayLike) -> "Start":
        """The same with another key for every number."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))

    def of_one(self, number: ArrayLike) -> "Start":
        """The start of one of many inner problems, with its own key and running state."""
        r = jax.tree.map(lambda x: x[number], self.r)
        return dataclasses.replace(self.folded(number), r=r)
