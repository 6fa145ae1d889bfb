"""Hypergradients near the checked one: at other hyperparameters, draws, and last bits."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.batches import BatchStack
from gradhpo.core.state import BilevelState
from gradhpo.diagnostics.precision import Estimated
from gradhpo.diagnostics.score import spearman
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.freezing import trained
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.validation import leaf_names


# Hypergradients at perturbed hyperparameters, and from batches that are drawn again.
NEIGHBOURS, REDRAWS = 4, 3
# Perturbations over which predictions are compared: only products, no training.
DIRECTIONS = 500
_AT_ONCE = 2**20  # numbers
# A leaf is behind a disagreement if it accounts for this part of it.
_LEAST_CLOSED = 0.5
# Leaves with a smaller part in the spread of the predictions say nothing about the others.
_LEAST_EFFECT = 0.1

Perturb = Callable[[Array, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Nearby:
    """Flattened hypergradients by name, each a list of arrays, and the validation losses there.

    `parts` maps the same names to the products with `DIRECTIONS` perturbations, leaf by leaf:
    `[perturbations, leaves]`.
    """

    hypergradients: dict[str, list[np.ndarray]]
    val_losses: dict[str, list[float]]
    perturbations: list[np.ndarray]
    parts: dict[str, list[np.ndarray]]
    leaves: list[str]
    num_moving: int  # numbers that some perturbation moves
    resolution: float  # of the validation losses, relative

    @functools.cached_property
    def predictions(self) -> dict[str, list[np.ndarray]]:
        """The predicted changes, `[perturbations]`."""
        return {name: list(map(_total, of_name)) for name, of_name in self.parts.items()}

    @property
    def agreements(self) -> dict[str, list[float]]:
        """Rank correlations of all predictions with the hypergradient's own.

        The exact one is compared with the estimate in the best precision, `"best"`.
        """
        return {
            name: [spearman(self.predictions[_mate(name)][0], other) for other in of_name]
            for name, of_name in self.predictions.items()
            if name not in ("own", "best")
        }

    def leaf_behind(self, name: str, threshold: float, reported: float | None = None) -> str | None:
        """The leaf behind a disagreement, if it is the only one.

        With its part as predicted, the others agree best, and at least half of the gap between
        the agreement and 1 closes. Without the leaf on both sides, as much closes: otherwise the
        other leaves are as wrong. (This is not asked if they have hardly any effect.)

        `None` if there is only one leaf, if none meets this, or from an agreement of `threshold`
        on. A `reported` agreement that is lower, because noise of the loss counts, widens the gap.
        """
        own, others = self.parts[_mate(name)][0], self.parts[name]
        whole = _total(own)
        found = _agreement(whole, map(_total, others))
        if len(self.leaves) == 1 or found >= threshold:
            return None
        rests = [_rests(x) for x in others]
        with np.errstate(invalid="ignore", over="ignore"):
            repaired = [
                _agreement(whole, [rest[:, i] + own[:, i] for rest in rests])
                for i in range(len(self.leaves))
            ]
        i = int(np.argmax(repaired))
        gap = 1 - min(found, found if reported is None else _or_lowest(reported))
        least = found + _LEAST_CLOSED * gap
        if repaired[i] < least:
            return None
        own_rest = _total(np.delete(own, i, axis=1))
        without = _agreement(own_rest, [rest[:, i] for rest in rests])
        matters = np.std(own_rest) > _LEAST_EFFECT * np.std(whole)
        return self.leaves[i] if without >= least or not matters else None


def _agreement(own: np.ndarray, others: Iterable[np.ndarray]) -> float:
    """The mean rank correlation with the others; the lowest if one of them has none."""
    return _or_lowest(float(np.mean([spearman(own, x) for x in others])))


def _or_lowest(agreement: float) -> float:
    return -1.0 if math.isnan(agreement) else agreement


def _rests(parts: np.ndarray) -> np.ndarray:
    """Totals without each leaf, `[perturbations, leaves]`.

    From the sums before and after it: a total minus the part of a leaf that is huge, infinite or
    NaN would lose the others.
    """
    nothing = np.zeros((len(parts), 1))
    with np.errstate(invalid="ignore", over="ignore"):
        before = np.cumsum(np.hstack([nothing, parts[:, :-1]]), axis=1)
        after = np.cumsum(np.hstack([nothing, parts[:, :0:-1]]), axis=1)[:, ::-1]
        return before + after


def _total(parts: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinities of both signs
        return np.sum(parts, axis=1)


def _mate(name: str) -> str:
    """The predictions that `name` is compared with."""
    return "best" if name == "exact" else "own"


def look_nearby(run: Estimated, perturb: Perturb, others: Mapping[str, PyTree]) -> Nearby:
    """All nearby hypergradients, by the estimate's program; `others` are compared as well."""
    state, case = run.case.state, run.case
    hyperparams = state.hyperparams
    moved = _perturbed(perturb, hyperparams)
    ways: dict[str, list[tuple]] = {
        "own": [],
        "perturbed": [(run.at(moved(k)), None) for k in range(NEIGHBOURS)],
        "repeated": [(state, None)],
        "rounded": [(_one_bit_on(state), None)],
    }
    batches = case.train_batch, case.val_batch
    if has_keys(batches):
        ways["other keys"] = [(state, fold_keys(batches, 1))]
    if has_keys(batches) or isinstance(case.train_batch, BatchStack):
        ways["redrawn"] = [(state, _redrawn(batches, k + 1)) for k in range(REDRAWS)]
    found = {name: [run.again(*way) for way in of_name] for name, of_name in ways.items()}
    found["own"] = [(run.hypergradient, run.val_loss)]
    found |= {name: [(g, np.asarray(np.nan))] for name, g in others.items()}
    flattened = {name: [flat(g) for g, _ in pairs] for name, pairs in found.items()}
    parts = {name: [[] for _ in made] for name, made in flattened.items()}
    ends = np.cumsum([x.size for x in jax.tree.leaves(hyperparams)])[:-1]
    moving = np.zeros(len(flattened["own"][0]), bool)
    for deltas in _many(perturb, hyperparams):
        moving |= np.any(deltas != 0, axis=0)
        for name, made in flattened.items():
            for kept, g in zip(parts[name], made, strict=True):
                kept.append(_by_leaf(g, deltas, ends))
    return Nearby(
        hypergradients=flattened,
        val_losses={name: [float(loss) for _, loss in pairs] for name, pairs in found.items()},
        perturbations=[_change(flat(moved(k)), flat(hyperparams)) for k in range(NEIGHBOURS)],
        parts={name: [np.concatenate(kept) for kept in made] for name, made in parts.items()},
        leaves=leaf_names(hyperparams),
        num_moving=int(np.sum(moving)),
        resolution=float(jnp.finfo(run.val_loss.dtype).eps),
    )


@functools.cache  # one function, so that nothing is compiled again
def by_steps(step_size: float) -> Perturb:
    """The default perturbation: every number moves by a normal one of this size."""

    def perturb(key: Array, hyperparams: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(hyperparams)
        keys = jax.random.split(key, len(leaves))
        move = lambda key, x: (
            x + jnp.asarray(step_size, x.dtype) * jax.random.normal(key, x.shape, x.dtype)
        )
        return jax.tree.unflatten(treedef, map(move, keys, leaves))

    return perturb


def has_keys(tree: PyTree) -> bool:
    """Whether it holds typed PRNG keys."""
    return any(map(is_key, jax.tree.leaves(tree)))


def flat(tree: PyTree) -> np.ndarray:
    """All numbers in float64."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.ravel(np.asarray(x).astype(np.float64)) for x in leaves])


def _perturbed(perturb: Perturb, hyperparams: PyTree) -> Callable[[int], PyTree]:
    """The perturbations by number."""
    return lambda k: _draw(perturb, jax.random.fold_in(jax.random.key(0), k), hyperparams)


@compiled
def _draw(perturb: Perturb, key: Array, hyperparams: PyTree) -> PyTree:
    return perturb(key, hyperparams)


@compiled
def _draw_many(perturb: Perturb, keys: Array, hyperparams: PyTree) -> PyTree:
    return jax.lax.map(lambda key: perturb(key, hyperparams), keys)


def _many(perturb: Perturb, hyperparams: PyTree) -> Iterator[np.ndarray]:
    """Further perturbations, `[perturbations, numbers]`, a few megabytes in one program."""
    old = flat(hyperparams)
    at_once = max(1, min(DIRECTIONS, _AT_ONCE // old.size))
    size = math.ceil(DIRECTIONS / math.ceil(DIRECTIONS / at_once))
    keys = jax.random.split(jax.random.key(1), DIRECTIONS)
    for first in range(0, DIRECTIONS, size):
        # The last part is filled up: another size would be another program.
        numbers = np.minimum(np.arange(first, first + size), DIRECTIONS - 1)
        found = jax.tree.leaves(_draw_many(perturb, keys[numbers], hyperparams))
        new = [np.asarray(x).astype(np.float64).reshape(size, -1) for x in found]
        yield _change(np.concatenate(new, axis=1), old)[: DIRECTIONS - first]


def _change(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The difference; an infinity that stays is no change."""
    with np.errstate(invalid="ignore"):
        return np.where(new == old, 0, new - old)


def _by_leaf(g: np.ndarray, deltas: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Products within each leaf, `[perturbations, leaves]`."""
    split = zip(np.split(g, ends), np.split(deltas, ends, axis=1), strict=True)
    return np.stack([_products(*of_leaf) for of_leaf in split], axis=1)


def _products(g: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Products over the numbers that move: non-finite numbers elsewhere do not count."""
    finite = np.isfinite(g)
    if np.all(finite):
        return deltas @ g
    found = deltas[:, finite] @ g[finite]
    return np.where(np.any(deltas[:, ~finite] != 0, axis=1), np.nan, found)


def _one_bit_on(state: BilevelState) -> BilevelState:
    """Changes every parameter by its last bit, up or down at random."""
    random = np.random.default_rng(0)

    def move(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        way = np.where(random.random(x.shape) < 0.5, -np.inf, np.inf)
        moved = jnp.nextafter(x, jnp.asarray(way, x.dtype))
        # A 0 gets the last bit of the largest number in the leaf; an infinity (a mask) stays.
        largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0)
        bit = (jnp.finfo(x.dtype).eps * jnp.where(largest == 0, 1, largest)).astype(x.dtype)
        moved = jnp.where(x == 0, jnp.copysign(bit, jnp.asarray(way, x.dtype)), moved)
        return jnp.where(jnp.isfinite(x), moved, x)

    params = eqx.combine(jax.tree.map(move, trained(state.params)), state.params)
    return dataclasses.replace(state, params=params)


def _redrawn(batches: tuple[PyTree, PyTree], number: int) -> tuple[PyTree, PyTree]:
    """The batches with other random keys; a stack's batches in another order."""
    train, val = fold_keys(batches, number)
    if isinstance(train, BatchStack):
        order = np.random.default_rng(number).permutation(train.num_steps)
        train = jax.tree.map(lambda x: x[order], train)
    return train, val
