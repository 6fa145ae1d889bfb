"""What implicit differentiation carries over, and what its metrics say of training."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.extend import Memory, accumulation_dtype


# The relative change of the validation loss above which the report speaks up.
_LARGE_GAP = 0.1


class ImplicitMemory(Memory):
    r"""What [`ImplicitOptimizer`][gradhpo.ImplicitOptimizer] carries over, with its solve metrics.

    - `adjoint`: the last $q$, a tree like the parameters; iterative solvers start from its best
        multiple.
    - `inner_residual`: $\|\nabla_w L_{\mathrm{train}}\|$ (or $\|w - \Phi(w)\|$) after the inner
        steps.
    - `optimality_gap`: $|q^\top \nabla_w L_{\mathrm{train}}| / |L_{\mathrm{val}}|$, the relative
        change of the validation loss, to first order, if training went on to the optimum of the
        last `curvature_batches`.
    - `linear_residual`: the residual of the linear system relative to its right-hand side.
    - `linear_iterations`: as the solver counts them (0 for direct solvers, cycles of 20 products
        for `lineax.GMRES`).
    - `linear_failures`: how many solves so far the solver gave up (singular, diverged), or ended
        with a `linear_residual` above 1, which is worse than no solve. Reaching `max_steps` is not
        a failure; nor is a residual of [`Neumann`][gradhpo.Neumann] or
        [`Nystrom`][gradhpo.Nystrom], which are not inverses.

    The metrics have the shape `()`.
    """

    adjoint: PyTree
    inner_residual: Array
    optimality_gap: Array
    linear_residual: Array
    linear_iterations: Array
    linear_failures: Array

    @classmethod
    def empty(cls, w: PyTree) -> "ImplicitMemory":
        """An adjoint of 0 for these parameters, and no metrics yet."""
        dtype = accumulation_dtype(w)
        # Placed, not computed: jax_debug_nans refuses to compute a NaN.
        unknown = jax.device_put(np.full((), np.nan, dtype))
        adjoint = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), w)
        return cls(adjoint, unknown, unknown, unknown, unknown, jnp.zeros((), dtype))


def on_training(gaps: np.ndarray, remedy: str) -> str:
    """Whether training has converged, from the `optimality_gap` of every step."""
    gap = np.median(gaps[-max(1, len(gaps) // 4) :])
    if not gap > _LARGE_GAP:
        return ""
    return (
        "Training has not converged, or its last batch does not represent the others, or the model "
        "state has not settled: training on that batch to its optimum would change the validation "
        f"loss by {gap:.0%} (optimality_gap, median of the last quarter of the steps), so the "
        f"hypergradient may be wrong by any factor: use {remedy}."
    )
