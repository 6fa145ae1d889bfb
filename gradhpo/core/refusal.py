"""A step with non-finite results is refused as a whole; this finds which results they are."""

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
    """The result of a step, before it is accepted or refused."""

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
    """The reason if only a model state or optimizer states are non-finite; otherwise empty."""
    bad = [
        f"{part}{name.removeprefix(THE_WHOLE_TREE)}"
        for part, leaves in finite.items()
        for name, fine in zip(leaf_names(leaves), jax.tree.leaves(leaves), strict=True)
        if not np.all(fine)
    ]
    if bad and all(name.startswith("model_state") for name in bad):
        return (
            "From the first step on, only the new model state that train_loss_fn returns is not "
            f"finite: {', '.join(bad[:5])}."
        )
    if not bad or not all(name.startswith(("inner_opt_state", "outer_opt_state")) for name in bad):
        return ""
    return (
        f"From the first step on, only the optimizer's own state is not finite: "
        f"{', '.join(bad[:5])}. Its init or update produces a NaN or an infinity there; only an "
        "infinity that never changes is accepted: start from a finite number."
    )
