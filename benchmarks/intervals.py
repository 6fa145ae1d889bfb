"""Means over seeds and their 95 % intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half the 95 % t-interval of the mean over the first axis, the seeds."""
    count = len(values)
    if count == 1:
        return np.full(values.shape[1:], np.inf)
    return stats.t.ppf(0.975, count - 1) * values.std(axis=0, ddof=1) / np.sqrt(count)


def with_interval(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """`"mean ± half of the interval"`; for a single seed, only its value."""
    array = scale * np.asarray(values, float)
    if len(array) == 1:
        return f"{array[0]:.{digits}f}"
    return f"{array.mean():.{digits}f} ± {half_interval(array):.{digits}f}"


def paired(values: Mapping[int, float], others: Mapping[int, float], digits: int = 2) -> str:
    """The difference between two methods, seed by seed, over the seeds that both have."""
    common = values.keys() & others.keys()
    differences = [values[seed] - others[seed] for seed in common]
    return with_interval(differences, digits) if len(common) > 1 else "-"
