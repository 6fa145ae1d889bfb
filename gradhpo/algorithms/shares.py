"""What short-horizon methods keep of the inner steps of an episode, for a diagram of them."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.extend import Algorithm


class StepWeights(NamedTuple):
    r"""The weight of each inner step by its age $T - t$, and the quantity that is weighted.

    `"exact"`: $\alpha_T A_T\cdots A_{t+1} B_t$. `"right after"`: $\alpha_t B_t$. `"estimate"`: the
    estimate at the end by `algorithm`, spread over the steps.
    """

    weights: Callable[[np.ndarray], np.ndarray]
    of: Literal["exact", "right after", "estimate"]
    algorithm: Algorithm | None = None


def short_horizons(
    algorithm: Algorithm, greedy_gamma: float, distill_gamma: float
) -> dict[str, StepWeights]:
    """One step, greedy and HyperDistill, with the inner update of `algorithm`."""
    rule = {
        "inner_optimizer": algorithm.inner_optimizer,
        "grad_fn": algorithm.grad_fn,
        "update_fn": algorithm.update_fn,
    }
    # Created for their checks as well.
    greedy = GreedyOptimizer(gamma=greedy_gamma, **rule)
    distilled = OnlineHypergradientOptimizer(gamma=distill_gamma, **rule)

    def spread(age: np.ndarray) -> np.ndarray:
        shares = float(distilled.gamma) ** age
        return shares / np.sum(shares)

    return {
        "one step": StepWeights(lambda age: (age == 0).astype(float), "exact"),
        "greedy": StepWeights(lambda age: float(greedy.gamma) ** age, "right after"),
        "HyperDistill": StepWeights(spread, "estimate", distilled),
    }
