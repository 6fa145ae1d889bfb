"""Smoothing of hypergradients over time, for which optax has no transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked


class MovingAverageState(NamedTuple):
    """The number of updates so far, and the last `window` of them, overwritten oldest first."""

    number: Int[Array, ""]
    last: PyTree


@checked
def moving_average(window: int) -> optax.GradientTransformation:
    r"""The mean of the last `window` updates, for `optax.chain` before an outer optimizer.

    Hypergradients of mini-batches are noisy;

    $$\bar g_t = \frac 1n \sum_{i=0}^{n-1} g_{t-i},\qquad n = \min(\mathtt{window}, t),$$

    has a variance up to `window` times smaller and lags by half a window. Unlike `optax.ema` it
    forgets completely: an outlier has no effect after `window` steps. It keeps `window` copies of
    the hyperparameters.

    **Arguments:**

    - `window`: number of updates, at least 1.

    **Returns:** an `optax.GradientTransformation`.

    **Raises:** `ValueError` for `window < 1`.

    ```python
    outer = optax.chain(
        optax.clip_by_global_norm(1.0), gradhpo.moving_average(10), optax.sgd(0.1)
    )
    ```
    """
    check_count("window", window)

    def init(params: PyTree) -> MovingAverageState:
        # Made of the hyperparameters, so that it is spread over devices as they are.
        zero = lambda x: jnp.zeros_like(x, jnp.result_type(x))
        empty = lambda x: jnp.broadcast_to(zero(x), (window, *jnp.shape(x)))
        last = jax.tree.map(empty, params)
        return MovingAverageState(jnp.zeros((), jnp.int32), last)

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, MovingAverageState]:
        slot = state.number % window
        put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, slot, 0)
        last = jax.tree.map(lambda old, new: put(old, new.astype(old.dtype)), state.last, updates)
        # From one full window on it wraps around, so that a long run does not overflow it.
        number = jnp.where(state.number + 1 < 2 * window, state.number + 1, window)
        filled = jnp.minimum(number, window)
        means = jax.tree.map(lambda x: jnp.sum(x, axis=0) / filled.astype(x.dtype), last)
        return means, MovingAverageState(number, last)

    return optax.GradientTransformation(init, update)
