"""Which members of a population one of them descends from."""

import numpy as np


def lineage(parent: np.ndarray, number: int) -> np.ndarray:
    """For each step, the member from which the one with this number at the end descends.

    `parent`, shape `[steps, members]`, has the member that each one copied at the end of a step.
    """
    line = np.full(len(parent), number)
    for step in range(len(parent) - 2, -1, -1):
        line[step] = parent[step, line[step + 1]]
    return line


def lowest_at_the_end(parent: np.ndarray, loss: np.ndarray) -> int:
    """The member with the lowest loss in the last step, of those that it measured and kept."""
    measured = (parent[-1] == np.arange(parent.shape[1])) & np.isfinite(loss[-1])
    return int(np.argmin(np.where(measured, loss[-1], np.inf)))
