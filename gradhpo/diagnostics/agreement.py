r"""How near an estimate of a hypergradient comes to another one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.utils.validation import leaf_names


@dataclasses.dataclass(frozen=True)
class Agreement:
    r"""Of estimates $g$, by name, with a reference $r$. Computed in float64.

    - `cosine`: $g \cdot r / (\|g\| \|r\|)$; `nan` where one of them is 0.
    - `norm_ratio`: $\|g\| / \|r\|$.
    - `relative_error`: $\|g - r\| / \|r\|$.
    - `sign_agreement`: share of the coordinates with the same sign, of those where one of the
        two is not 0.
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
    """Leaf of the hyperparameters to the agreement there."""
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
    """Of unit-sized rows, so that squares of tiny or huge numbers neither vanish nor overflow."""

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
