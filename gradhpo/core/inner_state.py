"""What inner steps change, and where those of an episode begin."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.utils.freezing import like_trained


class InnerState(NamedTuple):
    r"""$z = (w, s, r)$, or a cotangent of it, in which `None` parts count as 0.

    - `w`: the floating-point part of the parameters.
    - `s`: the inner optimizer's state; `()` with an `update_fn`.
    - `r`: running state of the model; `None` if it has none.
    """

    w: PyTree
    s: PyTree = None
    r: PyTree = None


class Start(eqx.Module):
    r"""Initial parameters of an episode: `function(key, hyperparams)`, by their episode's key."""

    function: Callable[[Array, PyTree], PyTree]
    key: Array
    steps_per_episode: int = eqx.field(static=True)

    def __call__(self, hyperparams: PyTree, w: PyTree) -> PyTree:
        """The floating-point part of the parameters, with the structure of `w`."""
        return like_trained(w, self.function(self.key, hyperparams))

    def at(self, step: Array) -> "Start":
        """That of the episode to which an outer step belongs."""
        return self.folded(step // self.steps_per_episode)

    def folded(self, number: ArrayLike) -> "Start":
        """With a key of its own for every number."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))
