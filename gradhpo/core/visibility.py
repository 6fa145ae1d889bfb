"""Which hyperparameters a method can see, found from the traced program."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax

from gradhpo.core.problem import Problem
from gradhpo.utils.advice import WHO_SEES
from gradhpo.utils.tracing import visible_leaves
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import warn_once


# Where a method finds the hyperparameters: in the validation loss alone; also in the condition
# for the inner optimum; or in how the last inner update changes the parameters; also in what
# earlier updates leave in the optimizer's state; or (by evaluating updates instead of
# differentiating them) in whatever has an effect.
Sees: TypeAlias = Literal["validation", "optimum", "last update", "updates", "everything"]


def seen_by(sees: Sees, problem: Problem) -> list[bool]:
    """For each leaf of the hyperparameters whether a method that looks there can see it."""
    phi, validation, z, hyperparams = problem
    by_derivative = sees != "everything"
    found = lambda function, tree: jax.tree.leaves(
        visible_leaves(function, tree, by_derivative=by_derivative)
    )
    directly = found(lambda h: validation.loss(z.w, h), hyperparams)
    if sees == "validation" or all(directly):
        return directly
    by_weights = found(lambda w: validation.loss(w, hyperparams), z.w)
    if not any(by_weights):
        return directly
    if sees == "optimum":
        inner = lambda h: phi.optimality(z.w, h, 0)[0]
    else:
        result = (lambda z: z.w) if sees == "last update" else (lambda z: z)
        inner = lambda h: result(phi.step(z, h, 0, want_loss=False)[0])
    return [a or b for a, b in zip(directly, found(inner, hyperparams), strict=True)]


def check_visible(name: str, sees: Sees, problem: Problem) -> None:
    """Names the hyperparameters whose hypergradient by this method is identically 0."""
    seen = seen_by(sees, problem)
    if all(seen):
        return
    names = leaf_names(problem.hyperparams)
    # What each unseen leaf acts through, found only now: most programs never get here.
    through = {kind: seen_by(kind, problem) for kind in _NARROWER}
    of_weights = lambda w: problem.validation.loss(w, problem.hyperparams)
    blind = not any(jax.tree.leaves(visible_leaves(of_weights, problem.z.w)))
    groups: dict[str, list[str]] = {}
    for leaf, here, *elsewhere in zip(names, seen, *through.values(), strict=True):
        if not here:
            kinds: list[Sees] = [
                kind for kind, there in zip(_NARROWER, elsewhere, strict=True) if there
            ]
            groups.setdefault(_why(sees, kinds, blind), []).append(leaf)
    if not any(seen):
        whys = (f"{', '.join(leaves)}: {why}" for why, leaves in groups.items())
        raise ValueError(f"{name} sees none of the hyperparameters. {'; '.join(whys)}")
    for why, leaves in groups.items():
        warn_once(f"{name} gives a hypergradient of 0 for hyperparams {', '.join(leaves)}: {why}")


_NARROWER: tuple[Sees, ...] = ("optimum", "last update", "updates")
_LOOKS_ELSEWHERE: dict[Sees, str] = {
    "validation": "the validation loss does not depend on them, and this method looks nowhere else",
    "optimum": "the optimum of the training loss does not depend on them (settings of the inner "
    "optimizer change the way to it; a weight decay goes into the loss)",
    "last update": "they act on later updates alone, through the optimizer's state",
}


def _why(sees: Sees, acts_through: Sequence[Sees], blind: bool) -> str:
    """Why a leaf is not seen, and what would see it; `blind` validation sees no parameter."""
    if blind:
        return "the validation loss depends on neither the parameters nor on them"
    if not acts_through or sees not in _LOOKS_ELSEWHERE:
        return (
            "neither the validation loss nor the inner update depends on them, or they do where "
            "a derivative is cut off: stop_gradient, round, argmax, a cast to integers"
        )
    others = ", ".join(WHO_SEES[kind] for kind in acts_through)
    return f"{_LOOKS_ELSEWHERE[sees]}; {others} see them"
