"""What a run of a population shows where one value is expected: the lowest of its members."""

import dataclasses
import warnings

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.types import MEMBERS


@dataclasses.dataclass(frozen=True)
class Shown:
    """The metrics of a chunk as callbacks, the progress bar and the report see them.

    A population's metrics, `[steps, members]`, appear twice: the lowest finite value of each step
    under their name, and all values under `members.<name>`. `others` names what belongs to no
    member.
    """

    is_population: bool
    others: frozenset[str] = frozenset()

    def __call__(self, metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not self.is_population:
            return metrics
        shown = {}
        for name, values in metrics.items():
            if name in self.others:
                shown[name] = values
                continue
            if np.issubdtype(values.dtype, np.inexact):  # not the numbers of members
                shown[name] = lowest(values)
            shown[MEMBERS + name] = values
        return shown


def lowest(values: np.ndarray) -> np.ndarray:
    """The lowest of the members at every step; NaN where all of them are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where all are NaN
        finite = np.where(np.isfinite(values), values, np.nan)
        return np.nanmin(finite, axis=1) if values.size else values[:, 0]


def of_one(optimizer: BilevelOptimizer, hyperparams: PyTree) -> PyTree:
    """The hyperparameters of one member, as the user's functions take them."""
    alone = optimizer.num_members is None
    return hyperparams if alone else jax.tree.map(lambda x: x[0], hyperparams)


def every_member(flags: np.ndarray) -> np.ndarray:
    """For each step, whether it is true of all members."""
    return np.asarray(np.all(flags.reshape(len(flags), -1), axis=1))


def any_member(flags: np.ndarray) -> np.ndarray:
    """For each leaf of the hyperparameters, whether it is true of any member."""
    return np.asarray(np.any(flags.reshape(-1, flags.shape[-1]), axis=0))
