"""Whether training is smooth enough in the hyperparameters for a hypergradient to mean much."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.problem import Problem
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.diagnostics.case import Case, check_one_problem
from gradhpo.utils.settings import check_setting
from gradhpo.utils.trees import all_finite
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_same_structure
from gradhpo.utils.warn import without_warnings


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
    r"""How far a derivative predicts what training does, in three trainings: in [-1, 1].

    With the parameters $w(\lambda)$ that training ends with, $\Delta_1 = w(\lambda + hv) -
    w(\lambda)$, $\Delta_2 = w(\lambda + 2hv) - w(\lambda + hv)$ and $d = |\Delta_1 + \Delta_2|$,

    $$S = \operatorname{sign}(\Delta_1)^\top \operatorname{diag}(d/\|d\|_1)
    \operatorname{sign}(\Delta_2):$$

    1 where every parameter moves on in the direction in which it began, near 0 where the second
    step has nothing to do with the first, so that following a derivative by a step of that size is
    of no use. Larger batches, smooth activations, normalisation and smaller inner learning rates
    raise it; so does a smaller `step_size`.

    **Arguments:**

    - `optimizer`, `state`, `train_batch`, `val_batch`, `losses`: as for
        [`compare_hypergradients`][gradhpo.compare_hypergradients]; not a `TaskBatched`.
    - `direction`: $v$, a tree like the hyperparameters. `None`: minus the signs of the
        optimizer's hypergradient, the way in which an outer Adam sets out.
    - `step_size`: $h > 0$, the size of an outer step; give your own: 0.1 is usual for the logarithm
        of a learning rate (the default), and large for the rate itself.

    **Returns:** $S$; `nan` where no parameter moves, where one of the trainings diverges, or where
    the hypergradient that is to be followed is not finite.

    **Raises:** `ValueError` for `step_size <= 0` or a `direction` that is no tree like the
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
    """The way in which an outer Adam sets out; not along what is not finite."""
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), -jnp.sign(g), 0), hypergradient)


def difference(x: Array, y: Array) -> Array:
    """`x - y`, and 0 where an infinity (a mask) stays what it is."""
    return jnp.where(x == y, 0, x - y)


def smoothness_along(
    problem: Problem, num_steps: int, direction: PyTree, step_size: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Metasmoothness, inside a compiled program; and how far the parameters move in all."""
    phi, _, z, hyperparams = problem

    def trained(count):
        move = lambda h, v: h + (count * step_size).astype(h.dtype) * v
        moved = jax.tree.map(move, hyperparams, direction)
        return phi.rollout(z, moved, 0, num_steps)[0].w

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
