"""Rank correlations of predicted with true changes, and how well they are known."""

from collections.abc import Mapping

import numpy as np


# Enough that the ends of an interval move by a tenth of its half-width with other resamples.
_RESAMPLES = 1_000
_LEVELS = (2.5, 97.5)


class Scores:
    """Scores of several predictions of the same changes, from the same resamples.

    `per_query[name]`, of shape `[queries]`, is `nan` where the correlation does not exist: true or
    predicted changes are all equal or not finite. In `score[name]`, the mean, a query without true
    changes is left out, and one without usable predictions counts as 0; `nan` if all are without.
    """

    def __init__(
        self, true: np.ndarray, predicted: Mapping[str, np.ndarray], random: np.random.Generator
    ):
        """All of shape `[retrainings, queries]`."""
        self.per_query: dict[str, np.ndarray] = {}
        self.score: dict[str, float] = {}
        self.interval: dict[str, tuple[float, float]] = {}
        count, queries = true.shape
        self.measurable = np.array([varies(column) for column in true.T], bool)
        if count < 3 or not np.any(self.measurable):
            for name in predicted:
                self.per_query[name] = np.full(queries, np.nan)
                self.score[name], self.interval[name] = np.nan, (np.nan, np.nan)
            return
        # Row 0 is the sample itself; then how often a resample has each retraining.
        drawn = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        counts = np.concatenate([np.ones((1, count), int), drawn])
        found = {name: np.full((len(counts), queries), np.nan) for name in predicted}
        for query in np.flatnonzero(self.measurable):
            of_true = _centred_ranks(true[:, query], counts)
            for name, changes in predicted.items():
                column = changes[:, query]
                ranks = _centred_ranks(column, counts) if varies(column) else 0 * of_true
                found[name][:, query] = _correlations(of_true, ranks, counts)
        for name, rows in found.items():
            usable = self.measurable & [varies(column) for column in predicted[name].T]
            self.per_query[name] = np.where(usable, rows[0], np.nan)
            means = _means(rows) if np.any(usable) else np.full(len(rows), np.nan)
            self.score[name] = float(means[0])
            self.interval[name] = _interval(means)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of the ranks, ties in the middle; `nan` if one of the two is constant."""
    counts = np.ones((1, len(x)), int)
    if not (varies(x) and varies(y)):
        return float("nan")
    return float(_correlations(_centred_ranks(x, counts), _centred_ranks(y, counts), counts)[0])


def varies(x: np.ndarray) -> bool:
    """Whether numbers can be ranked: all finite, and not all equal."""
    return bool(np.all(np.isfinite(x)) and np.any(x != x[0])) if len(x) else False


def _means(rows: np.ndarray) -> np.ndarray:
    """Means over the queries for which a resample has a correlation."""
    there = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.sum(np.where(there, rows, 0), axis=1) / np.sum(there, axis=1)


def _interval(means: np.ndarray) -> tuple[float, float]:
    """The interval of the first number, by the spread of the others.

    The others lie lower: a resample has some retrainings twice, and its ranks are coarser.
    """
    if np.isnan(means[0]):
        return np.nan, np.nan
    shift = means[0] - np.nanmedian(means[1:])
    low, high = np.clip(np.nanpercentile(means[1:], _LEVELS) + shift, -1, 1)
    return float(low), float(high)


def _centred_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks minus their mean; a sample has each value `counts` times, `[samples, values]`.

    Without sorting every sample: the rank of a value is the number of those below it and half of
    its equals.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    equals = np.add.reduceat(counts[:, order], np.flatnonzero(begins), axis=1)
    ranks = np.cumsum(equals, axis=1) - (equals - 1) / 2
    found = np.empty(counts.shape)
    found[:, order] = ranks[:, np.cumsum(begins) - 1]
    return found - (len(values) + 1) / 2


def _correlations(true: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each sample: `nan` if its true changes are equal, 0 if only the predicted ones are."""
    both, of_true, of_predicted = (
        np.sum(counts * x * y, axis=1)
        for x, y in ((true, predicted), (true, true), (predicted, predicted))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        found = both / np.sqrt(of_true * of_predicted)
    return np.where(of_true == 0, np.nan, np.where(of_predicted == 0, 0.0, found))
