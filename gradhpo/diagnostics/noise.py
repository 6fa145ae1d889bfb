"""Statistics of an estimate over many draws, and the report of `compare_over_batches`."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.diagnostics.drawing import draw_noise
from gradhpo.utils.tables import Report, aligned, number


@dataclasses.dataclass(frozen=True)
class Moments:
    r"""Statistics of one estimate over draws of the data.

    Lengths are relative to $\|\bar r\|$. With $\bar g$ the mean, $\Sigma$ the covariance between
    draws, and $\bar r$ the mean of the reference:

    - `mean`, `standard_error`: trees like the hyperparameters; the error of the mean.
    - `cosine`: of $\bar g$ with $\bar r$.
    - `bias`: $\|\bar g - \bar r\|/\|\bar r\|$, and `bias_error`, the length of its standard error:
        these draws cannot show a bias below it.
    - `noise`: $\sqrt{\operatorname{tr}\Sigma}/\|\bar r\|$, for a single draw.
    - `signal_to_noise`: $\|\mathrm{E}\,g\|/\sqrt{\operatorname{tr}\Sigma}$ for a single draw, with
        $\|\mathrm{E}\,g\|^2$ estimated by $\|\bar g\|^2 - \operatorname{tr}\Sigma/n$ (0 if that is
        negative).
    - `draws_needed`: the square of its inverse. The mean of this many draws (or batches larger by
        this factor) has as much signal as noise; `inf` if no signal was found.
    """

    mean: PyTree
    standard_error: PyTree
    cosine: float
    bias: float
    bias_error: float
    noise: float
    signal_to_noise: float
    draws_needed: float


@dataclasses.dataclass(frozen=True, repr=False)
class HypergradientNoise(Report):
    """What [`compare_over_batches`][gradhpo.compare_over_batches] found.

    **Fields:**

    - `overall`: maps the name of an optimizer (and `"reference"`) to its
        [moments][gradhpo.diagnostics.noise.Moments]; `mean`, `standard_error`, `signal_to_noise`,
        `bias` and `draws_needed` are the figures of `overall` by name.
    - `per_leaf`: maps each leaf of the hyperparameters to the same.
    - `unseen`: leaves that an optimizer cannot see, if there are any.
    - `nonfinite`: number of draws left out because an optimizer's hypergradient or the reference
        was not finite there.
    - `failed`: why an optimizer does not work on this problem. `remarks`: other facts about it.
    - `num_draws`, `num_steps`.
    """

    num_draws: int
    num_steps: int
    overall: dict[str, Moments]
    per_leaf: dict[str, dict[str, Moments]]
    unseen: dict[str, tuple[str, ...]]
    nonfinite: dict[str, int]
    failed: dict[str, str]
    remarks: dict[str, str]

    @property
    def mean(self) -> dict[str, PyTree]:
        """Mean over the draws, a tree like the hyperparameters."""
        return {name: x.mean for name, x in self.overall.items()}

    @property
    def standard_error(self) -> dict[str, PyTree]:
        """Standard error of the mean, a tree like the hyperparameters."""
        return {name: x.standard_error for name, x in self.overall.items()}

    @property
    def signal_to_noise(self) -> dict[str, float]:
        """For a single draw."""
        return {name: x.signal_to_noise for name, x in self.overall.items()}

    @property
    def bias(self) -> dict[str, float]:
        """Distance of the mean to the mean of the reference, relative to its length."""
        return {name: x.bias for name, x in self.overall.items()}

    @property
    def draws_needed(self) -> dict[str, float]:
        """The mean of this many draws has as much signal as noise."""
        return {name: x.draws_needed for name, x in self.overall.items()}

    def __str__(self) -> str:
        head = ["", "cosine", "bias", "noise", "signal/noise", "draws needed"]
        rows = [
            [
                name,
                number(x.cosine),
                f"{number(x.bias)} ± {number(x.bias_error)}",
                number(x.noise),
                number(x.signal_to_noise),
                "< 1" if x.draws_needed < 1 else number(x.draws_needed, 1),
            ]
            for name, x in self.overall.items()
        ]
        text = (
            f"Hypergradients after {self.num_steps} inner steps over {self.num_draws} draws of the "
            "data; bias and noise in lengths of the reference's mean; draws needed: how many "
            "draws to average, or how many times as large a batch, for as much signal as noise\n\n"
        )
        notes = [
            f"{name} does not see {', '.join(leaves)}, which counts as bias"
            for name, leaves in self.unseen.items()
        ]
        notes += [
            f"{name}: {count} of {self.num_draws} draws are not finite and left out"
            for name, count in self.nonfinite.items()
        ]
        notes += [f"{name}: {why}" for name, why in (self.failed | self.remarks).items()]
        return "\n\n".join([text + aligned([head, *rows]), *notes])

    def plot(self) -> Any:
        """A `matplotlib` figure: squared error split into bias and variance."""
        return draw_noise(self)


def finite_draws(draws: PyTree) -> np.ndarray:
    return np.all(np.isfinite(_rows(draws)), axis=1)


def moments_of(draws: PyTree, reference: PyTree) -> Moments:
    """For trees whose leaves have an extra leading axis, the draws."""
    g, r = _rows(draws), _rows(reference)
    count = len(g)
    if count < 2:
        nothing = jax.tree.map(lambda x: np.full(x.shape[1:], np.nan), draws)
        return Moments(nothing, nothing, *[math.nan] * 6)
    mean, expected = g.mean(axis=0), r.mean(axis=0)
    length, expected_length = np.linalg.norm(mean), np.linalg.norm(expected)
    variance = np.sum(g.var(axis=0, ddof=1))
    signal = max(mean @ mean - variance / count, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Moments(
            mean=jax.tree.map(lambda x: x.mean(axis=0), draws),
            standard_error=jax.tree.map(lambda x: x.std(axis=0, ddof=1) / np.sqrt(count), draws),
            cosine=float(np.float64(mean @ expected) / (length * expected_length)),
            bias=float(np.linalg.norm(mean - expected) / expected_length),
            bias_error=float(
                np.sqrt(np.sum((g - r).var(axis=0, ddof=1)) / count) / expected_length
            ),
            noise=float(np.sqrt(variance) / expected_length),
            signal_to_noise=float(np.sqrt(signal / variance)),
            draws_needed=float(variance / np.float64(signal)),
        )


def _rows(draws: PyTree) -> np.ndarray:
    leaves = jax.tree.leaves(draws)
    return np.concatenate(
        [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in leaves], axis=1
    )
