"""What the report of a run says about its linear solves."""

import lineax as lx
import numpy as np


# Used if a solver has no `advice`.
SINGULAR = (
    "H is singular, as it is where a batch has fewer examples than there are parameters, or not "
    "positive: use larger batches, curvature_batches, or damping=1e-3 or more"
)


def remark_on_solves(
    failures: float, residuals: np.ndarray, solver: lx.AbstractLinearSolver | None
) -> str:
    """How many solves of a run failed, or left a larger residual than they began with.

    A solver's attribute `advice` may say what to do, as that of [`Neumann`][gradhpo.Neumann].

    **Arguments:**

    - `failures`: how many solves failed.
    - `residuals`: the length of what each solve left over, relative to its right-hand side, shape
        `[steps]`.
    - `solver`: a `lineax` solver, or `None` for the default.

    **Returns:** a remark for [`Algorithm.remarks`][gradhpo.extend.Algorithm.remarks]; empty if
    there is nothing to say.

    ```python
    assert gradhpo.extend.remark_on_solves(0.0, np.array([0.01, 0.02]), None) == ""
    assert "failed 3 times" in gradhpo.extend.remark_on_solves(3.0, np.array([0.5, 0.2]), None)
    ```
    """
    advice = getattr(solver, "advice", None)
    if failures and advice is None:
        return (
            f"The linear solver failed {failures:.0f} times: {SINGULAR}. lineax.CG and the default "
            "then take the least-squares solution of the smallest norm, without what the batch "
            f"does not see (by the median of linear_residual, {np.median(residuals):.0%} of "
            "the validation gradient; above 100%, that solution was cut short). Do not trust "
            "the answers of other solvers."
        )
    why = advice or SINGULAR
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
