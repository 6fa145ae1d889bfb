"""Means over the batches of several inner steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inner_optimizer import cast_like
from gradhpo.utils.placement import zeros_of
from gradhpo.utils.trees import accumulation_dtype


def mean_over_steps(
    function: Callable[[PyTree, PyTree, ArrayLike], tuple[PyTree, PyTree]],
    w: PyTree,
    hyperparams: PyTree,
    last: ArrayLike,
    count: int,
) -> tuple[PyTree, PyTree]:
    """The mean of `function` over the last `count` steps, in a loop: programs do not grow with it.

    `function` returns what to average, and more, which is returned only for a single step.
    Sums, of cotangents too, are in float32 at least.
    """
    if count == 1:
        return function(w, hyperparams, last)
    at = w, hyperparams
    wide = jax.tree.map(widened, at)
    made = jax.eval_shape(lambda w, h: function(w, h, last)[0], *at)

    def body(total, t):
        w, hyperparams = cast_like(wide, at)
        new, _ = function(w, hyperparams, t)
        return jax.tree.map(lambda x, y: x + widened(y), total, new), None

    sums = jax.eval_shape(lambda x: jax.tree.map(widened, x), made)
    total, _ = jax.lax.scan(body, zeros_of(sums), last - jnp.arange(count))
    return cast_like(jax.tree.map(lambda x: x / count, total), made), None


def widened(x: Array) -> Array:
    """In the dtype that sums are taken in."""
    return x.astype(accumulation_dtype(x))
