"""The hypergradient by central differences of the whole inner optimization."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inputs import Inputs, LossFunctions, both_losses
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFn
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.processes import check_shared
from gradhpo.utils.settings import check_setting
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import warn


@checked
def finite_difference_hypergradient(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn | LossFunctions,
    val_loss_fn: LossFn | None = None,
    *,
    coordinates: Int[ArrayLike, " n"] | Sequence[int] | None = None,
    epsilon: Real[ArrayLike, ""] | None = None,
) -> PyTree | Float[Array, " n"]:
    r"""The hypergradient by central differences of the whole inner training.

    For $F(\lambda) = L_{\mathrm{val}}(w_T(\lambda), \lambda)$

    $$g_i \approx \frac{F(\lambda + h_i e_i) - F(\lambda - h_i e_i)}{2 h_i},\qquad
    h_i = \mathtt{epsilon}\cdot\max(1, |\lambda_i|).$$

    $w_T(\lambda)$ is the result of the optimizer's `num_inner_steps` inner steps from `state`, so
    this is the exact hypergradient of that many steps up to rounding and $O(\epsilon^2)$, at the
    cost of two inner optimizations per coordinate. (`OnlineHypergradientOptimizer` looks further
    back than the one step that it takes: compare it with an `UnrolledOptimizer` over the episode.)
    Use float64: in lower precision the differences are mostly rounding noise, and a warning says
    so.

    **Arguments:**

    - `optimizer`: any.
    - `state`: from its `init` or `step`.
    - `train_batch`: any pytree of arrays, used for every inner step, or a
        [`BatchStack`][gradhpo.BatchStack] with one batch per inner step.
    - `val_batch`: any pytree of arrays.
    - `train_loss_fn`, `val_loss_fn`: `(params, hyperparams, batch) -> scalar`, or one
        [`LossFunctions`][gradhpo.LossFunctions] in place of both.
    - `coordinates`: indices into the hyperparameters flattened in the order of
        `jax.tree.leaves`, shape `[n]`; `None` (the default) takes all of them.
    - `epsilon`: step relative to $\max(1, |\lambda_i|)$, shape `()`; `None` (the default) is the
        cube root of the machine precision, 6e-6 in float64.

    **Returns:** an array of shape `[n]` for `n` coordinates, in their order; a tree like
    `state.hyperparams` for `None`.

    **Raises:** `ValueError` for coordinates out of range or `epsilon <= 0`; what
    [`step`][gradhpo.BilevelOptimizer.step] raises for losses and batches.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=5)
    with jax.enable_x64(True):  # or for the whole program, by jax.config.update
        state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
        hypergradient = gradhpo.finite_difference_hypergradient(
            optimizer, state, None, None, train_loss, val_loss
        )
    ```
    """
    losses = both_losses("finite_difference_hypergradient", train_loss_fn, val_loss_fn)
    check_shared(state, train_batch=train_batch, val_batch=val_batch)
    flat, unravel = ravel_pytree(state.hyperparams)
    if flat.dtype != jnp.float64:
        warn(
            f"finite differences in {flat.dtype} may be mostly rounding noise; switch to float64: "
            'jax.config.update("jax_enable_x64", True) at the start, and float64 arrays'
        )
    chosen = jnp.arange(flat.size) if coordinates is None else jnp.asarray(coordinates, int)
    if not bool(jnp.all((chosen >= 0) & (chosen < flat.size))):
        raise ValueError(f"coordinates must lie in 0 to {flat.size - 1}, got {chosen}")
    if epsilon is None:
        epsilon = float(jnp.finfo(flat.dtype).eps) ** (1 / 3)
    check_setting("epsilon", jnp.asarray(epsilon), lambda x: x > 0, "positive")
    differences = _differences(
        optimizer,
        state,
        as_batch(train_batch, "train_batch"),
        as_batch(val_batch, "val_batch"),
        *losses,
        chosen,
        jnp.asarray(epsilon, flat.dtype),
    )
    return unravel(differences) if coordinates is None else differences


@compiled
def _differences(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
    chosen: Int[Array, " n"],
    epsilon: Float[Array, ""],
) -> Float[Array, " n"]:
    flat, unravel = ravel_pytree(state.hyperparams)

    def outer(flat_hyperparams):
        at = state.update(hyperparams=unravel(flat_hyperparams))
        losses = LossFunctions(train_loss_fn, val_loss_fn)
        return optimizer._outer_loss(Inputs(at, train_batch, val_batch, losses))

    def difference(i):
        step = epsilon * jnp.maximum(1, jnp.abs(flat[i]))
        plus, minus = flat.at[i].add(step), flat.at[i].add(-step)
        # The step that was really taken, after rounding.
        return (outer(plus) - outer(minus)) / (plus[i] - minus[i])

    return jax.lax.map(difference, chosen)
