"""How close estimates of a hypergradient are to a reference, and the report about it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.diagnostics.cost import Cost
from gradhpo.diagnostics.drawing import draw_comparison
from gradhpo.utils.tables import (
    OPEN_LOOPS,
    Report,
    aligned,
    bytes_of,
    flops_of,
    number,
    seconds_of,
)
from gradhpo.utils.validation import leaf_names


# The report's text shows at most this many leaves.
_MOST_LEAVES = 12


@dataclasses.dataclass(frozen=True)
class Agreement:
    r"""Agreement of estimates $g$, by name, with a reference $r$. Computed in float64.

    - `cosine`: $g \cdot r / (\|g\| \|r\|)$; `nan` if one of them is 0.
    - `norm_ratio`: $\|g\| / \|r\|$.
    - `relative_error`: $\|g - r\| / \|r\|$.
    - `sign_agreement`: share of the coordinates with the same sign, among those where at least one
        of the two is not 0.
    """

    cosine: dict[str, float]
    norm_ratio: dict[str, float]
    relative_error: dict[str, float]
    sign_agreement: dict[str, float]


def agreement(estimates: Mapping[str, PyTree], reference: PyTree) -> Agreement:
    """Over all coordinates together."""
    rows, r = {name: _row(tree) for name, tree in estimates.items()}, _row(reference)
    of_each = lambda measure: {name: float(measure(row, r)) for name, row in rows.items()}
    with np.errstate(invalid="ignore", divide="ignore"):
        return Agreement(*map(of_each, (_cosine, _norm_ratio, _relative_error, _sign_agreement)))


def agreement_by_leaf(estimates: Mapping[str, PyTree], reference: PyTree) -> dict[str, Agreement]:
    """Maps each leaf of the hyperparameters to the agreement there."""
    split = {name: jax.tree.leaves(tree) for name, tree in estimates.items()}
    return {
        leaf: agreement({name: leaves[i] for name, leaves in split.items()}, part)
        for i, (leaf, part) in enumerate(
            zip(leaf_names(reference), jax.tree.leaves(reference), strict=True)
        )
    }


def _row(tree: PyTree) -> np.ndarray:
    leaves = [np.asarray(leaf).astype(np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def _scaled(measure: Callable) -> Callable:
    """For rows scaled to unit size, so that squares neither vanish nor overflow."""

    def of_scaled(g: np.ndarray, r: np.ndarray) -> Any:
        size = max(np.max(np.abs(g), initial=0), np.max(np.abs(r), initial=0))
        return measure(g / size, r / size) if size > 0 else np.float64(np.nan)

    return of_scaled


@_scaled
def _norm_ratio(g: np.ndarray, r: np.ndarray) -> Any:
    return np.linalg.norm(g) / np.linalg.norm(r)


@_scaled
def _relative_error(g: np.ndarray, r: np.ndarray) -> Any:
    return np.linalg.norm(g - r) / np.linalg.norm(r)


def _cosine(g: np.ndarray, r: np.ndarray) -> Any:
    unit = lambda x: x / np.max(np.abs(x), initial=0)
    g, r = unit(g), unit(r)
    return g @ r / (np.linalg.norm(g) * np.linalg.norm(r))


def _sign_agreement(g: np.ndarray, r: np.ndarray) -> Any:
    counted = (g != 0) | (r != 0)
    if not np.any(counted) or not np.all(np.isfinite(g) & np.isfinite(r)):
        return np.nan
    return np.mean(np.sign(g[counted]) == np.sign(r[counted]))


@dataclasses.dataclass(frozen=True, repr=False)
class HypergradientComparison(Report):
    r"""What [`compare_hypergradients`][gradhpo.compare_hypergradients] found.

    **Fields** (dicts by the name of the optimizer, unless stated otherwise):

    - `cosine`, `norm_ratio`, `relative_error`, `sign_agreement`: over all coordinates, for the
        estimate $g$ and the reference $r$: $g \cdot r/(\|g\|\|r\|)$, $\|g\|/\|r\|$,
        $\|g - r\|/\|r\|$, and the share of equal signs where at least one of the two is not 0.
    - `per_leaf`: maps each leaf of the hyperparameters to the same four.
    - `flops`, `temporary_bytes`, `seconds`: for the whole horizon. `costs` has more, including
        also of `"training alone"` and of the `"reference"`.
    - `metrics`: the optimizers' own metrics, if any, at the end of the horizon.
    - `unseen`: leaves that an optimizer cannot see, if there are any.
    - `failed`: why an optimizer does not work on this problem. It is in no other dict.
    - `remarks`: other facts about an estimate.
    - `hypergradients`, and `reference`, one tree: what was compared.
    - `num_steps`: inner steps of the horizon.
    """

    num_steps: int
    reference_name: str
    on_one_batch: bool
    reference: PyTree
    hypergradients: dict[str, PyTree]
    overall: Agreement
    per_leaf: dict[str, Agreement]
    costs: dict[str, Cost]
    metrics: dict[str, dict[str, float]]
    unseen: dict[str, tuple[str, ...]]
    failed: dict[str, str]
    remarks: dict[str, str]

    @property
    def cosine(self) -> dict[str, float]:
        """Cosine of the angle with the reference; `nan` if one of the two is 0."""
        return self.overall.cosine

    @property
    def norm_ratio(self) -> dict[str, float]:
        """Length, relative to the reference's."""
        return self.overall.norm_ratio

    @property
    def relative_error(self) -> dict[str, float]:
        """Distance to the reference, relative to its length."""
        return self.overall.relative_error

    @property
    def sign_agreement(self) -> dict[str, float]:
        """Share of the coordinates with the sign of the reference."""
        return self.overall.sign_agreement

    @property
    def flops(self) -> dict[str, float]:
        """Floating-point operations of the whole horizon."""
        return {name: cost.flops for name, cost in self.costs.items()}

    @property
    def temporary_bytes(self) -> dict[str, int]:
        """Memory of the whole horizon, excluding arguments and results."""
        return {name: cost.temporary_bytes for name, cost in self.costs.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Time of the whole horizon."""
        return {name: cost.seconds for name, cost in self.costs.items()}

    def sees_none(self, name: str) -> bool:
        """Whether an optimizer sees none of the hyperparameters."""
        return len(self.unseen.get(name, ())) == len(self.per_leaf)

    def __str__(self) -> str:
        parts = [
            f"Hypergradients after {self.num_steps} inner steps"
            f"{' on a single batch' * self.on_one_batch}, compared with "
            f"{self.reference_name}; costs cover the whole horizon, with an estimate at "
            "every step of an optimizer",
            aligned([_HEADER, *map(self._row, self._names())]),
        ]
        if len(self.per_leaf) > 1:
            parts += self._by_leaf()
        notes = [
            f"{name} does not see {', '.join(leaves)}"
            for name, leaves in self.unseen.items()
            if not self.sees_none(name)
        ]
        for name, own in self.metrics.items():
            told = ", ".join(f"{metric} {number(value)}" for metric, value in own.items())
            notes.append(f"{name} ends with {told}")
        notes += self._about_the_reference()
        notes += [f"{name}: {why}" for name, why in (self.failed | self.remarks).items()]
        if any(self.costs[name].at_least for name in self.costs):
            notes.append(OPEN_LOOPS)
        return "\n\n".join(parts + (["\n".join(notes)] if notes else []))

    def plot(self) -> Any:
        """A `matplotlib` figure: agreement, length and costs, one row per optimizer."""
        return draw_comparison(self)

    def _about_the_reference(self) -> list[str]:
        leaves = dict(zip(self.per_leaf, jax.tree.leaves(self.reference), strict=True))
        says = "gradhpo.check_hypergradient says why"
        bad = [leaf for leaf, x in leaves.items() if not np.all(np.isfinite(x))]
        zero = [leaf for leaf, x in leaves.items() if not np.any(x)]
        return [
            *([f"the reference is not finite in {', '.join(bad)}: {says}"] if bad else []),
            *([f"the reference is 0 in {', '.join(zero)}: {says}"] if zero else []),
        ]

    def _names(self) -> list[str]:
        extra = [name for name in ("training alone", "reference") if name in self.costs]
        return [*extra, *self.hypergradients, *self.failed]

    def _row(self, name: str) -> list[str]:
        if name in self.failed:
            return [name, "does not work here", *[""] * 6]
        if name in self.hypergradients and self.sees_none(name):
            return [name, "sees none", *[""] * 6]
        measures = (self.cosine, self.norm_ratio, self.relative_error, self.sign_agreement)
        measured = [number(x[name]) if name in x else "" for x in measures]
        cost, training = self.costs[name], self.costs["training alone"]
        return [
            name,
            *measured,
            flops_of(cost.flops, at_least=cost.at_least),
            bytes_of(cost.temporary_bytes),
            f"{seconds_of(cost.seconds)} ({cost.seconds / training.seconds:.1f} x)",
        ]

    def _by_leaf(self) -> list[str]:
        names = [name for name in self.hypergradients if not self.sees_none(name)]
        shown = list(self.per_leaf)[:_MOST_LEAVES]

        lengths = dict(zip(self.per_leaf, jax.tree.leaves(self.reference), strict=True))

        def table(title: str, measure: str, **first: dict[str, str]) -> str:
            def cell(leaf: str, name: str) -> str:
                if leaf in self.unseen.get(name, ()):
                    return "unseen"
                return number(getattr(self.per_leaf[leaf], measure)[name])

            rows = [
                [leaf, *(x[leaf] for x in first.values()), *(cell(leaf, name) for name in names)]
                for leaf in shown
            ]
            return aligned([[title, *first, *names], *rows])

        norms = {leaf: f"{np.linalg.norm(x):.2g}" for leaf, x in lengths.items()}
        tables = [
            table("cosine", "cosine"),
            table("norm ratio", "norm_ratio", **{"length of reference": norms}),
        ]
        hidden = len(self.per_leaf) - len(shown)
        return tables + ([f"and {hidden} more leaves in report.per_leaf"] if hidden else [])


_HEADER = [
    "", "cosine", "norm ratio", "rel. error", "same signs", "flops", "memory", "time"
]  # fmt: skip
