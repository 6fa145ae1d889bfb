"""What the report of a run says of implicit differentiation: its solves, and its training."""

import numpy as np


# The share of itself by which the validation loss may still change, before the report says so.
_LARGE_GAP = 0.1
# Used if a solver has no `advice`.
ADVICE = (
    "H is singular, as it is where a batch has fewer examples than there are parameters, or not "
    "positive: use larger batches, curvature_batches, or damping=1e-3 or more"
)


def of_training(gaps: np.ndarray) -> str:
    """Whether training has converged, from the `optimality_gap` of every step."""
    gap = np.median(gaps[-max(1, len(gaps) // 4) :])
    if not gap > _LARGE_GAP:
        return ""
    return (
        "Training has not converged, or its last batch does not represent the others (nor may "
        "the model state have settled): training "
        f"on that batch to its optimum would change the validation loss by {gap:.0%} "
        "(optimality_gap, median of the last quarter of the steps), so the hypergradient may "
        "be wrong by any factor: use more inner_steps, larger batches, or curvature_batches."
    )


def of_solves(failures: float, residuals: np.ndarray, advice: str | None) -> str:
    """How many solves failed, and what `linear_residual` was left; `advice` is the solver's."""
    if failures and advice is None:
        return (
            f"The linear solver failed {failures:.0f} times: {ADVICE}. lineax.CG and the default "
            "then take the least-squares solution of the smallest norm, without what the batch "
            f"does not see (by the median of linear_residual, {np.median(residuals):.0%} of "
            "the validation gradient; above 100%, that solution was cut short); what other "
            "solvers give is not to be trusted."
        )
    why = advice or ADVICE
    if failures:
        return (
            f"The linear solver failed {failures:.0f} times; the hypergradients of those steps "
            f"cannot be trusted. In general {why}."
        )
    if np.mean(residuals > 1) > 0.5:
        return (
            f"In {np.sum(residuals > 1)} of {len(residuals)} steps the linear system was left "
            "with a residual larger than its right-hand side (linear_residual, median "
            f"{np.median(residuals):.0e}), so the adjoint is worse than none; {why}."
        )
    return ""
