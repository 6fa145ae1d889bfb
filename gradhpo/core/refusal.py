"""A step whose results are not finite is refused as a whole: which of them those are."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.interface import InnerProblems
from gradhpo.core.outer import Estimate
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.utils.trees import finite_leaves
from gradhpo.utils.validation import THE_WHOLE_TREE, leaf_names


class Attempt(NamedTuple):
    """What a step would make of a state."""

    estimate: Estimate
    hyperparams: PyTree
    outer_opt_state: PyTree


def finite_parts(
    optimizer: InnerProblems, state: BilevelState, attempt: Attempt
) -> dict[str, PyTree]:
    """For each part of the result, which of its leaves are finite, or infinite as before."""
    estimate, old = attempt.estimate, inner_state(state)
    outer, old_outer = attempt.outer_opt_state, state.outer_opt_state
    memories = [optimizer.finite_part(x) for x in (estimate.memory, state.memory)]
    return {
        "hypergradient": finite_leaves(estimate.hypergradient),
        "hyperparams": finite_leaves(attempt.hyperparams),
        "params": finite_leaves(estimate.z.w, unless_as_in=old.w),
        "inner_opt_state": finite_leaves(estimate.z.s, unless_as_in=old.s),
        "model_state": finite_leaves(estimate.z.r, unless_as_in=old.r),
        "outer_opt_state": finite_leaves(outer, unless_as_in=old_outer),
        "memory": finite_leaves(*memories),
    }


def why_refused(finite: dict[str, PyTree]) -> str:
    """The reason if it is nothing but the state of an optimizer; otherwise empty."""
    bad = [
        f"{part}{name.removeprefix(THE_WHOLE_TREE)}"
        for part, leaves in finite.items()
        for name, fine in zip(leaf_names(leaves), jax.tree.leaves(leaves), strict=True)
        if not np.all(fine)
    ]
    if bad and all(name.startswith("model_state") for name in bad):
        return (
            "From the first step on everything else is finite, and the new model state that "
            f"train_loss_fn returns is not: {', '.join(bad[:5])}."
        )
    if not bad or not all(name.startswith(("inner_opt_state", "outer_opt_state")) for name in bad):
        return ""
    return (
        "From the first step on everything else is finite, and the optimizer's own state is not: "
        f"{', '.join(bad[:5])}. Its init or its update makes a NaN or an infinity there; only an "
        "infinity that stays as it is is accepted: start from a finite number."
    )
