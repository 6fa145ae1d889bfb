"""Whether training responds to a step of the hyperparameters smoothly, as its derivative says."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.problem import Problem
from gradhpo.core.start import started
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.diagnostics.case import Case, check_one_problem
from gradhpo.utils.settings import check_setting
from gradhpo.utils.structure import check_same_structure
from gradhpo.utils.trees import all_finite
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import without_warnings


# Steps of the differences, relative to the largest number of a leaf (at least 1). The pair of
# neighbouring steps that agrees best is used, with ten times its disagreement as uncertainty.
_EPSILONS = np.array([1e-3, 1e-4, 1e-5, 1e-6])
# Steps that only show up to where the derivative holds.
_WIDE = np.array([1e-1, 1e-2])
_HOLDS = 0.1  # within this share of the larger of the two


class FiniteDifference(NamedTuple):
    """The derivative along a random direction of one leaf, in float64.

    `derivative` comes from the exact hypergradient, `difference` from training runs on both sides,
    known up to `uncertainty` (`inf` if they say nothing). `erratic` if differences over several
    steps contradict each other, so that nothing was checked. `width` is the largest of the steps
    1e-1 to 1e-6, relative to the largest number of the leaf (at least 1), up to which differences
    stay within 10 % of the derivative; 0 if there is none.
    """

    derivative: float
    difference: float
    uncertainty: float
    erratic: bool
    width: float

    @property
    def contradicts(self) -> bool:
        """Whether the two differ by more than `uncertainty` and a thousandth of the larger one."""
        size = max(abs(self.derivative), abs(self.difference))
        return abs(self.derivative - self.difference) > 1e-3 * size + self.uncertainty


@checked
def metasmoothness(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    direction: PyTree = None,
    step_size: RealScalarLike = 0.1,
) -> float:
    r"""How well a derivative predicts what training does, from three training runs: in [-1, 1].

    With the final parameters $w(\lambda)$ of training, $\Delta_1 = w(\lambda + hv) - w(\lambda)$,
    $\Delta_2 = w(\lambda + 2hv) - w(\lambda + hv)$ and $d = |\Delta_1 + \Delta_2|$,

    $$S = \operatorname{sign}(\Delta_1)^\top \operatorname{diag}(d/\|d\|_1)
    \operatorname{sign}(\Delta_2):$$

    This is 1 if every parameter continues in the direction in which it started, and near 0 if the
    second step is unrelated to the first, so that following a derivative by a step of that size is
    useless. Larger batches, smooth activations, normalisation and smaller inner learning rates
    raise it; so does a smaller `step_size`.

    **Arguments:**

    - `optimizer`: any except `TaskBatched`.
    - `state`: where to start: from `init`, or from the middle of a run.
    - `train_batch`: a [`BatchStack`][gradhpo.BatchStack], whose length is the number of inner
        steps; or one batch for all inner steps of the optimizer.
    - `val_batch`: one validation batch, any pytree of arrays.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `direction`: $v$, a tree like the hyperparameters. `None`: minus the signs of the optimizer's
        hypergradient, the direction of the first step of an outer Adam.
    - `step_size`: $h > 0$, the size of an outer step; pass your own: 0.1 (the default) is usual for
        the logarithm of a learning rate, and large for the rate itself.

    **Returns:** $S$; `nan` if no parameter moves, if one of the training runs diverges, or if the
    hypergradient to follow is not finite.

    **Raises:** `ValueError` for `step_size <= 0` or a `direction` that is not a tree like the
    hyperparameters; `TypeError` for `TaskBatched`; what [`step`][gradhpo.BilevelOptimizer.step]
    raises for losses and batches.

    ```python
    loss = lambda w, h, batch: jnp.sum((w - jnp.sin(h)) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), unroll_steps=10)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    losses = gradhpo.LossFunctions(loss, val_loss)
    assert gradhpo.metasmoothness(optimizer, state, None, None, losses) > 0.99
    ```

    ??? cite "Reference"

        Engstrom et al., *Optimizing ML Training with Metagradient Descent*, 2025,
        arXiv:2503.13751, definition 2.
    """
    check_one_problem("metasmoothness", optimizer)
    check_setting("step_size", jnp.asarray(step_size), lambda x: x > 0, "positive")
    case = Case.create(state, train_batch, val_batch, losses, {type(optimizer).__name__: optimizer})
    if direction is not None:
        check_same_structure(
            direction, state.hyperparams, "direction", "Pass a tree like state.hyperparams."
        )

    def smoothness(optimizer, start, train_batch, val_batch, direction, step_size):
        arguments = (optimizer, start, train_batch, val_batch)
        usable = jnp.asarray(True)
        if direction is None:
            begun = case.begin(*arguments)
            g, _, _ = case.at_end(optimizer, begun, train_batch, val_batch)
            usable = all_finite(g)
            direction = downhill(g)
        problem = case.problem(*arguments)
        found, _ = smoothness_along(problem, case.num_steps, direction, step_size)
        return jnp.where(usable, found, jnp.nan)

    size = jnp.asarray(step_size, jnp.result_type(float))
    with without_warnings():
        return float(case.compile(smoothness, optimizer, direction, size)())


def downhill(hypergradient: PyTree) -> PyTree:
    """The direction of the first step of an outer Adam; 0 where it is not finite."""
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), -jnp.sign(g), 0), hypergradient)


def difference(x: Array, y: Array) -> Array:
    """`x - y`, and 0 where an infinity (a mask) is unchanged."""
    return jnp.where(x == y, 0, x - y)


def smoothness_along(
    problem: Problem, num_steps: int, direction: PyTree, step_size: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Metasmoothness, inside a compiled program; and the total movement of the parameters."""
    phi, _, z, hyperparams = problem

    def trained(count):
        move = lambda h, v: h + (count * step_size).astype(h.dtype) * v
        moved = jax.tree.map(move, hyperparams, direction)
        return phi.rollout(started(phi, z, moved), moved, 0, num_steps)[0].w

    first, second, third = (
        [x[i] for x in jax.tree.leaves(jax.lax.map(trained, jnp.arange(3, dtype=step_size.dtype)))]
        for i in range(3)
    )
    agreeing = total = jnp.zeros(())
    for a, b, c in zip(first, second, third, strict=True):
        moved = jnp.abs(difference(c, a))
        agreeing += jnp.sum(jnp.sign(difference(b, a)) * jnp.sign(difference(c, b)) * moved)
        total += jnp.sum(moved)
    return agreeing / total, total


def train_around(case: Case, optimizer: Any, hypergradient: PyTree, step_size: float) -> Any:
    """Training runs nearby, for every leaf and epsilon, and two steps downhill."""

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
            end, _, _ = phi.rollout(started(phi, z, moved), moved, 0, case.num_steps)
            return validation.loss(end, moved)

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
    epsilons = jnp.asarray(np.concatenate([_WIDE, _EPSILONS]), dtype)
    more = hypergradient, epsilons, jnp.asarray(step_size, dtype)
    return jax.tree.map(np.asarray, case.compile(function, optimizer, *more)())


def compared(around: Any, hypergradient: PyTree) -> dict[str, FiniteDifference]:
    """Maps each leaf to its derivative from the exact hypergradient and from differences."""
    rows = zip(
        leaf_names(hypergradient),
        jax.tree.leaves(hypergradient),
        jax.tree.leaves(around["directions"]),
        around["differences"],
        strict=True,
    )
    loss = around["loss"]
    # A loss returned in float32 is known only to that precision, even if computed in float64.
    steps = np.concatenate([_WIDE, _EPSILONS])
    rounding = 4 * np.finfo(loss.dtype).eps * abs(float(loss)) / steps
    return {
        leaf: _compared(float(np.vdot(g, direction)), differences, rounding, abs(float(loss)))
        for leaf, g, direction, differences in rows
    }


def _compared(
    derivative: float, differences: np.ndarray, rounding: np.ndarray, loss: float
) -> FiniteDifference:
    width = _width(derivative, differences, rounding)
    differences, rounding = differences[len(_WIDE) :], rounding[len(_WIDE) :]
    gaps = 10 * np.abs(np.diff(differences))
    uncertainty = gaps + rounding[1:]
    usable = np.isfinite(uncertainty)
    # A loss that is rounded inside would also show no difference at all over a small step.
    usable &= (differences[1:] != 0) | (differences[0] == 0) & (derivative == 0)
    if not np.any(usable):
        erratic = not np.all(np.isfinite(differences[1:])) and bool(np.isfinite(loss))
        return FiniteDifference(derivative, float(differences[1]), float("inf"), erratic, width)
    best = int(np.argmin(np.where(usable, uncertainty, np.inf)))
    difference = float(differences[best + 1])
    size = max(abs(derivative), abs(difference))
    erratic = bool(gaps[best] > max(0.1 * size, rounding[best + 1], 1e-6 * loss))
    return FiniteDifference(derivative, difference, float(uncertainty[best]), erratic, width)


def _width(derivative: float, differences: np.ndarray, rounding: np.ndarray) -> float:
    """The largest step up to which all differences agree with the derivative."""
    size = np.maximum(abs(derivative), np.abs(differences))
    agree = np.abs(differences - derivative) <= _HOLDS * size + rounding
    steps = np.concatenate([_WIDE, _EPSILONS])
    held = np.logical_and.accumulate(agree[::-1])[::-1]  # at this step and all smaller ones
    return float(steps[held][0]) if np.any(held) else 0.0
