"""Trainings on both sides: finite differences along a random direction of every leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.diagnostics.case import Case
from gradhpo.diagnostics.checkup import FiniteDifference
from gradhpo.diagnostics.metasmooth import downhill, smoothness_along
from gradhpo.utils.validation import leaf_names


# Steps of the differences, relative to the largest number of a leaf (1 at least). Of two next to
# one another the pair that agrees best is believed, up to ten times what it disagrees by.
_EPSILONS = np.array([1e-3, 1e-4, 1e-5, 1e-6])


def train_around(case: Case, optimizer: Any, hypergradient: PyTree, step_size: float) -> Any:
    """Trainings beside the hyperparameters, for every leaf and epsilon, and two steps downhill."""

    def function(optimizer, start, train_batch, val_batch, hypergradient, epsilons, step_size):
        problem = case.problem(optimizer, start, train_batch, val_batch)
        phi, validation, z, hyperparams = problem
        leaves, treedef = jax.tree.flatten(hyperparams)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        directions = [
            jax.random.rademacher(key, x.shape, x.dtype) * jnp.max(jnp.abs(x), initial=1.0)
            for key, x in zip(keys, leaves, strict=True)
        ]

        def loss(leaves):
            moved = jax.tree.unflatten(treedef, leaves)
            end, _, _ = phi.rollout(z, moved, 0, case.num_steps)
            return validation.loss(end.w, moved)

        def difference(at):
            chosen, epsilon = at
            ways = [
                jnp.where(chosen == i, epsilon, 0).astype(x.dtype) * x
                for i, x in enumerate(directions)
            ]
            plus = loss([x + d for x, d in zip(leaves, ways, strict=True)])
            minus = loss([x - d for x, d in zip(leaves, ways, strict=True)])
            return (plus - minus).astype(epsilon.dtype) / (2 * epsilon)

        grid = jnp.meshgrid(jnp.arange(len(leaves)), epsilons, indexing="ij")
        found = jax.lax.map(difference, tuple(x.reshape(-1) for x in grid))
        towards = downhill(hypergradient)
        smoothness, moved = smoothness_along(problem, case.num_steps, towards, step_size)
        return {
            "differences": found.reshape(len(leaves), len(epsilons)),
            "directions": jax.tree.unflatten(treedef, directions),
            "loss": loss(leaves),
            "smoothness": smoothness,
            "moved": moved,
        }

    dtype = jnp.result_type(float)
    more = hypergradient, jnp.asarray(_EPSILONS, dtype), jnp.asarray(step_size, dtype)
    return jax.tree.map(np.asarray, case.compile(function, optimizer, *more)())


def compared(around: Any, hypergradient: PyTree) -> dict[str, FiniteDifference]:
    """Leaf to the derivative by the exact hypergradient beside the differences."""
    rows = zip(
        leaf_names(hypergradient),
        jax.tree.leaves(hypergradient),
        jax.tree.leaves(around["directions"]),
        around["differences"],
        strict=True,
    )
    loss = around["loss"]
    # A loss that is returned in float32 is known to that, whatever it was computed in.
    rounding = 4 * np.finfo(loss.dtype).eps * abs(float(loss)) / _EPSILONS
    return {
        leaf: _compared(float(np.vdot(g, direction)), differences, rounding, abs(float(loss)))
        for leaf, g, direction, differences in rows
    }


def _compared(
    derivative: float, differences: np.ndarray, rounding: np.ndarray, loss: float
) -> FiniteDifference:
    gaps = 10 * np.abs(np.diff(differences))
    uncertainty = gaps + rounding[1:]
    usable = np.isfinite(uncertainty)
    # No difference at all, over a small step, is what a loss rounded inside would show as well.
    usable &= (differences[1:] != 0) | (differences[0] == 0) & (derivative == 0)
    if not np.any(usable):
        erratic = not np.all(np.isfinite(differences[1:])) and bool(np.isfinite(loss))
        return FiniteDifference(derivative, float(differences[1]), float("inf"), erratic)
    best = int(np.argmin(np.where(usable, uncertainty, np.inf)))
    difference = float(differences[best + 1])
    size = max(abs(derivative), abs(difference))
    erratic = bool(gaps[best] > max(0.1 * size, rounding[best + 1], 1e-6 * loss))
    return FiniteDifference(derivative, difference, float(uncertainty[best]), erratic)
