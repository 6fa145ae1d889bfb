"""What the first chunk of a run shows about hyperparameters that do not move."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState
from gradhpo.core.vanishing import warn_of_zeros
from gradhpo.training.chunk import Chunk
from gradhpo.training.record import looks_finite
from gradhpo.utils.processes import numbers
from gradhpo.utils.settings import outer_rate


def zeros_and_refusal(
    optimizer: BilevelOptimizer,
    rate: Any,
    chunk: Chunk,
    state: BilevelState,
    metrics: Mapping[str, np.ndarray],
    moved: np.ndarray,
) -> tuple[list[int], str]:
    """Leaves with a hypergradient of 0, and why every step was refused if no metric says so.

    `state` is the one before the chunk, and `moved` says which leaves ever had another one.
    """
    refused = np.min(metrics["rejected"][-1] - numbers(state.metadata["rejected"]))
    unexplained = refused == len(metrics["rejected"]) and looks_finite(metrics)
    if not unexplained and np.all(moved):
        return [], ""
    inputs = chunk.first_inputs(state)
    zeros = warn_of_zeros(optimizer, inputs, moved)
    if not unexplained:
        return zeros, ""
    now = rate(state.step) if callable(rate) else rate
    return zeros, optimizer._why_refused(inputs, outer_rate(now))
