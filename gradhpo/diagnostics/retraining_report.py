"""The report of `retraining_score`: how well changes are predicted, and which examples help."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.diagnostics.compare import another_training, trains_otherwise
from gradhpo.diagnostics.drawing import draw_retraining
from gradhpo.diagnostics.perturbations import selected
from gradhpo.diagnostics.predictions import Predictions
from gradhpo.diagnostics.retrain import Retrained
from gradhpo.diagnostics.score import Scores, varies
from gradhpo.utils.settings import check_count
from gradhpo.utils.tables import Report, aligned, number, seconds_of


@dataclasses.dataclass(frozen=True, repr=False)
class RetrainingScore(Report):
    r"""What [`retraining_score`][gradhpo.retraining_score] found.

    **Fields** (dicts by the name of the estimator, unless stated otherwise):

    - `score`: rank correlation of predicted with true changes, a mean over the queries.
    - `interval`: its 95 % interval, (low, high): percentiles of 1,000 bootstrap resamples of the
        retrainings, moved so that their median is the score. (Resamples have ties, which lower it.)
    - `per_query`: the correlation of every query, an array `[queries]`; `nan` if there is none.
    - `predicted`: changes of the losses as predicted, an array `[retrainings, queries]`.
    - `true`: the changes found by retraining, one array; `nan` in retrainings that are not finite.
    - `losses`: the losses of the queries before any change, one array `[queries]`.
    - `hypergradients`: trees like the hyperparameters, with a leading axis, the queries.
    - `seconds`: for the hypergradients of all queries, without compilation; `nan` where none were
        computed. `retraining_seconds`: for all training runs, one number.
    - `nonfinite`: the numbers of the retrainings that are not finite, one tuple.
    - `unseen`: leaves that an estimator cannot see, if there are any; `blind` are the estimators
        that see none.
    - `failed`: why an estimator does not work on this problem. It has no score.
    - `remarks`: other facts about an estimator.
    - `num_retrainings`, `num_steps`.
    """

    num_retrainings: int
    num_steps: int
    score: dict[str, float]
    interval: dict[str, tuple[float, float]]
    per_query: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    true: np.ndarray
    losses: np.ndarray
    hypergradients: dict[str, PyTree]
    seconds: dict[str, float]
    retraining_seconds: float
    nonfinite: tuple[int, ...]
    unseen: dict[str, tuple[str, ...]]
    blind: tuple[str, ...]
    failed: dict[str, str]
    remarks: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        count = self.true.shape[1]
        head = (
            f"Rank correlation of predicted with true changes of the loss, over "
            f"{self.num_retrainings} retrainings of {self.num_steps} inner steps, as a mean over "
            f"{count} quer{'ies' if count > 1 else 'y'}; retraining took "
            f"{seconds_of(self.retraining_seconds)} in total"
        )
        rows = [["", "score", "95 % interval", "lowest query", "time"]]
        rows += [self._row(name) for name in self.score]
        rows += [[name, "does not work here", "", "", ""] for name in self.failed]
        notes = [self.on_nonfinite()] if self.nonfinite else []
        if not np.all(np.isfinite(self.losses)):
            notes.append("training is not finite at the hyperparameters themselves")
        kept = np.delete(self.true, self.nonfinite, axis=0)
        if len(kept) < 3:
            notes.append("a score needs at least three finite retrainings")
        unmeasured = sum(not varies(column) for column in kept.T)
        if unmeasured:
            notes.append(
                f"{unmeasured} of {count} queries are left out: all retrainings change their loss "
                "equally, or it is not finite"
            )
        notes += [
            f"{name} does not see {', '.join(leaves)}"
            for name, leaves in self.unseen.items()
            if name not in self.blind
        ]
        notes += [f"{name}: {why}" for name, why in self.failed.items()]
        notes += [f"{name} {why}" for name, all_of in self.remarks.items() for why in all_of]
        return "\n\n".join([head, aligned(rows), *(["\n".join(notes)] if notes else [])])

    def _row(self, name: str) -> list[str]:
        if name in self.blind:
            return [name, "sees no hyperparameter", "", "", ""]
        of_queries = self.per_query[name][~np.isnan(self.per_query[name])]
        return [
            name,
            number(self.score[name]),
            " to ".join(map(number, self.interval[name])),
            number(float(np.min(of_queries))) if len(of_queries) else "-",
            seconds_of(self.seconds[name]),
        ]

    def plot(self) -> Any:
        """A `matplotlib` figure: predicted against true changes, of all queries together."""
        return draw_retraining(self)

    def on_nonfinite(self) -> str:
        """The note on retrainings that are not finite."""
        return (
            f"{len(self.nonfinite)} of {self.num_retrainings} retrainings are not finite and left "
            "out; the score covers the others"
        )

    def most_helpful(
        self,
        query: int,
        count: int = 10,
        name: str | None = None,
        where: Callable[[PyTree], PyTree] = lambda h: h,
    ) -> np.ndarray:
        """The examples whose weight lowers the loss of a query most, most helpful first.

        **Arguments:**

        - `query`: its number.
        - `count`: how many, default 10: fewer if fewer help.
        - `name`: the estimator whose hypergradient to use; default: the first.
        - `where`: selects the leaf of the hyperparameters with an entry for each example along axis
            0; further axes are summed over. By default it is the only leaf.

        **Returns:** numbers of examples, an array of at most `count` integers.

        **Raises:** `KeyError` for an unknown `name`, `IndexError` for a `query` out of range,
        `TypeError` or `ValueError` if `where` does not select such a leaf, and for `count` below 1.
        """
        return self._largest(-self._effect(query, name, where), count)

    def most_harmful(
        self,
        query: int,
        count: int = 10,
        name: str | None = None,
        where: Callable[[PyTree], PyTree] = lambda h: h,
    ) -> np.ndarray:
        """The examples whose weight raises the loss of a query most, most harmful first.

        **Arguments:**

        - `query`: its number.
        - `count`: how many, default 10: fewer if fewer harm.
        - `name`: the estimator whose hypergradient to use; default: the first.
        - `where`: selects the leaf of the hyperparameters with an entry for each example along axis
            0; further axes are summed over. By default it is the only leaf.

        **Returns:** numbers of examples, an array of at most `count` integers.

        **Raises:** `KeyError` for an unknown `name`, `IndexError` for a `query` out of range,
        `TypeError` or `ValueError` if `where` does not select such a leaf, and for `count` below 1.
        """
        return self._largest(self._effect(query, name, where), count)

    def _largest(self, effect: np.ndarray, count: int) -> np.ndarray:
        """The numbers of the largest positive entries."""
        check_count("count", count)
        order = np.argsort(-effect, kind="stable")
        return order[effect[order] > 0][:count]

    def _effect(self, query: int, name: str | None, where: Callable) -> np.ndarray:
        """The derivative of a query's loss with respect to the weight of every example."""
        if name is None:
            name = next(iter(self.hypergradients), "")
        if name not in self.hypergradients:
            there = ", ".join(map(repr, self.hypergradients)) or "none"
            raise KeyError(f"no estimator {name!r} with hypergradients; available: {there}")
        num_queries = self.true.shape[1]
        if not -num_queries <= query < num_queries:
            raise IndexError(f"query={query} is out of range: there are {num_queries} queries")
        of_query = jax.tree.map(lambda g: np.asarray(g)[query], self.hypergradients[name])
        leaf = np.asarray(selected(where, of_query, "where"), np.float64)
        return leaf.sum(axis=tuple(range(1, leaf.ndim)))


def report_of(
    found: Predictions,
    predicted: dict[str, np.ndarray],
    retrained: Retrained,
    random: np.random.Generator,
    num_steps: int,
) -> RetrainingScore:
    """The report, from the losses of training runs, the first without a change."""
    base, after = retrained.losses[0], retrained.losses[1:]
    known = np.isfinite(base)
    finite = retrained.finite[1:] & np.all(np.isfinite(after[:, known]), axis=1)
    with np.errstate(invalid="ignore"):
        true = np.where(finite[:, None], after - base, np.nan)
    scores = Scores(true[finite], {name: x[finite] for name, x in predicted.items()}, random)
    return RetrainingScore(
        num_retrainings=len(after),
        num_steps=num_steps,
        score=scores.score,
        interval=scores.interval,
        per_query=scores.per_query,
        predicted=predicted,
        true=true,
        losses=base,
        hypergradients=found.hypergradients,
        seconds={name: found.seconds[name] for name in predicted},
        retraining_seconds=retrained.seconds,
        nonfinite=tuple(np.flatnonzero(~finite).tolist()),
        unseen={name: leaves for name, leaves in found.unseen.items() if leaves},
        blind=tuple(found.blind),
        failed=found.failed,
        remarks={
            name: said
            for name in predicted
            if (said := tuple(_remarks(name, found, scores, predicted, base)))
        },
    )


def _remarks(
    name: str,
    found: Predictions,
    scores: Scores,
    predicted: dict[str, np.ndarray],
    base: np.ndarray,
) -> Iterator[str]:
    """What the numbers alone do not show about an estimator."""
    columns = predicted[name].T[scores.measurable]
    broken = sum(not np.all(np.isfinite(column)) for column in columns)
    constant = sum(not varies(column) for column in columns) - broken
    why = {
        "predicts nothing finite (gradhpo.check_hypergradient says why)": broken,
        "predicts the same change for all retrainings": constant,
    }
    for what, count in why.items() if name not in found.blind else ():
        if 0 < count < len(columns):
            yield f"{what} in {count} of {len(base)} queries, which count{'s' * (count == 1)} as 0"
        elif count:
            yield f"{what}, so it has no score"
    expected = float(np.mean(base))
    if name in found.val_losses and np.isfinite(expected):
        reached = found.val_losses[name]
        if trains_otherwise(reached, expected):
            yield another_training(reached, expected)
