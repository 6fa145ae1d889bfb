"""How accurate, and how expensive, each estimate of the hypergradient is on your problem."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.state import BilevelState
from gradhpo.diagnostics.case import Case, check_optimizers
from gradhpo.diagnostics.comparison import HypergradientComparison, agreement, agreement_by_leaf
from gradhpo.diagnostics.cost import Cost
from gradhpo.diagnostics.reference import FAILURES, exact_reference, reference_explained
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import without_warnings


# Validation losses that differ by more than this (in relative terms) are not due to rounding.
_SAME_LOSS = 1e-3


@checked
def compare_hypergradients(
    optimizers: Mapping[str, BilevelOptimizer],
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    reference: BilevelOptimizer | PyTree | None = None,
) -> HypergradientComparison:
    r"""Runs every estimator from one state on the same data, and compares the results.

    All estimators train through the same horizon of inner steps with the hyperparameters held
    fixed, and all hypergradients are taken at its end. An optimizer that takes fewer inner steps
    per `step` (one step, HyperDistill) takes as many `step`s as fit, as it would in a run that
    starts here: its memory starts a new episode, and HyperDistill fits $\theta$ first (unless
    `estimation_period=None`; its costs exclude the fit, which is due only once every several
    episodes). The state is left unchanged.

    **Arguments:**

    - `optimizers`: name to optimizer. All must have the inner optimizer (or `update_fn`) that the
        state was made with; outer optimizers do not matter.
    - `state`: where to start: from `init` of any of them, or from the middle of a run.
    - `train_batch`: a [`BatchStack`][gradhpo.BatchStack], whose length is the horizon; or one batch
        for all steps, where the longest optimizer sets the horizon.
    - `val_batch`: one validation batch, any pytree of arrays.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `reference`: what to compare with: an optimizer, or a tree like the hyperparameters (a closed
        form, finite differences). `None` (the default): the exact hypergradient of the whole
        horizon, by [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer].

    **Returns:** a [report][gradhpo.diagnostics.comparison.HypergradientComparison].
    `report.cosine[name]`, `.norm_ratio[name]`, `.relative_error[name]` and `.sign_agreement[name]`
    compare an estimate $g$ with the reference $r$ over all coordinates,

    $$\mathtt{cosine} = \frac{g\cdot r}{\|g\|\,\|r\|},\quad
    \mathtt{norm\_ratio} = \frac{\|g\|}{\|r\|},\quad
    \mathtt{relative\_error} = \frac{\|g - r\|}{\|r\|},$$

    (signs: the share that agrees); `report.per_leaf[leaf].cosine[name]` and so on do so leaf by
    leaf. `report.flops[name]`, `.temporary_bytes[name]` and `.seconds[name]` are the costs of the
    whole horizon, with an estimate at each `step` of the optimizer. `report.metrics[name]` holds
    what a method reports about itself at the end (residuals of a linear solver, theta).
    `str(report)` is a table, `report.plot()` a figure. `report.unseen[name]` lists hyperparameters
    that a method cannot see, and `report.failed[name]` methods that do not work on this problem,
    with the reason.

    **Raises:** `ValueError` for a horizon that is not a multiple of an optimizer's inner steps, no
    optimizers, an optimizer named `"reference"` or `"training alone"`, different numbers of tasks,
    or a `reference` of other shapes; `TypeError` for a list of batches; and what
    [`step`][gradhpo.BilevelOptimizer.step] raises for losses and batches.

    ```python
    train_loss = lambda w, h, batch: jnp.sum(jnp.arange(1.0, 4.0) * (w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    inner = optax.sgd(0.1)
    optimizers = {
        "one step": gradhpo.OneStepOptimizer(inner),
        "greedy": gradhpo.GreedyOptimizer(inner, unroll_steps=10),
    }
    state = optimizers["greedy"].init(jnp.zeros(3), jnp.zeros(3))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    report = gradhpo.compare_hypergradients(optimizers, state, None, None, losses)
    print(report)
    assert report.sign_agreement["greedy"] == 1.0
    ```
    """
    first = check_optimizers(optimizers)
    given = {"reference": reference} if isinstance(reference, BilevelOptimizer) else {}
    case = Case.create(state, train_batch, val_batch, losses, {**optimizers, **given})
    exact = exact_reference(first, state, case.num_steps)
    training = case.train(exact)
    trained_loss, seconds = training.timed()
    costs = {"training alone": dataclasses.replace(training.cost, seconds=seconds)}
    if reference is None or isinstance(reference, BilevelOptimizer):
        with reference_explained(given=reference is not None):
            made = _estimated(case, exact if reference is None else reference)
        expected, costs["reference"] = made.hypergradient, made.cost
    else:
        expected = _like(state.hyperparams, reference)

    found, metrics, unseen, failed, remarks = {}, {}, {}, {}, {}
    names = leaf_names(state.hyperparams)
    for name, optimizer in optimizers.items():
        try:
            with without_warnings():
                seen = case.seen(optimizer)
            unseen[name] = tuple(leaf for leaf, s in zip(names, seen, strict=True) if not s)
            if not any(seen):  # a `step` of it would raise an error that says so
                found[name] = jax.tree.map(np.zeros_like, expected)
                continue
            made = _estimated(case, optimizer)
        except FAILURES as error:
            failed[name] = str(error)
            continue
        found[name], costs[name], metrics[name] = made.hypergradient, made.cost, made.metrics
        remarks |= _remark(name, made, float(trained_loss))
    return HypergradientComparison(
        num_steps=case.num_steps,
        reference_name=_described(reference, case.num_steps),
        on_one_batch=not isinstance(train_batch, BatchStack) and case.num_steps > 1,
        reference=expected,
        hypergradients=found,
        overall=agreement(found, expected),
        per_leaf=agreement_by_leaf(found, expected),
        costs=costs,
        metrics={name: of_method for name, of_method in metrics.items() if of_method},
        unseen={name: leaves for name, leaves in unseen.items() if leaves},
        failed=failed,
        remarks=remarks,
    )


@dataclasses.dataclass(frozen=True)
class _Estimated:
    hypergradient: PyTree
    val_loss: float
    metrics: dict[str, float]
    cost: Cost


def _like(hyperparams: PyTree, reference: Any) -> PyTree:
    """The given reference, which may have another precision."""
    given = jax.tree.map(np.asarray, reference)
    shapes = [jax.tree.map(np.shape, tree) for tree in (given, hyperparams)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"reference must be an optimizer, or a tree like state.hyperparams with shapes "
            f"{shapes[1]}; its shapes are {shapes[0]}"
        )
    return given


def _estimated(case: Case, optimizer: BilevelOptimizer) -> _Estimated:
    with without_warnings():  # the report says what a method does not see
        program = case.estimate(optimizer)
        (hypergradient, val_loss, metrics), seconds = program.timed()
    cost = dataclasses.replace(program.cost, seconds=seconds)
    inexact = {name: x for name, x in metrics.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    metrics = {name: float(np.mean(x)) for name, x in inexact.items()}
    return _Estimated(jax.tree.map(np.asarray, hypergradient), float(val_loss), metrics, cost)


def _remark(name: str, made: _Estimated, trained_loss: float) -> dict[str, str]:
    """What the numbers alone do not show about an estimate."""
    leaves = jax.tree.leaves(made.hypergradient)
    if not all(np.all(np.isfinite(leaf)) for leaf in leaves):
        return {name: "not finite; gradhpo.check_hypergradient finds the source"}
    if trains_otherwise(made.val_loss, trained_loss):
        return {name: another_training(made.val_loss, trained_loss)}
    return {}


def trains_otherwise(val_loss: float, expected: float) -> bool:
    """Whether two validation losses differ by more than rounding explains."""
    apart = abs(val_loss - expected)
    return not math.isfinite(expected) or apart > _SAME_LOSS * max(abs(expected), 1e-30)


def another_training(val_loss: float, expected: float) -> str:
    """A remark if two losses differ at the end of what should be the same training."""
    return (
        f"reaches another validation loss ({val_loss:.4g}) than the first optimizer "
        f"({expected:.4g}); comparing them is meaningless unless both have the same inner update"
    )


def _described(reference: Any, num_steps: int) -> str:
    if reference is None:
        return f"the exact hypergradient of {num_steps} inner steps"
    if isinstance(reference, BilevelOptimizer):
        return type(reference).__name__
    return "the given reference"
