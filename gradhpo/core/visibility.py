"""Which hyperparameters a method can see, found from the traced program."""

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_state import InnerState
from gradhpo.core.problem import Problem
from gradhpo.core.start import acting_at_start, started
from gradhpo.utils.advice import IGNORES_SIZE, WHO_SEES
from gradhpo.utils.programs import readings, visible_leaves
from gradhpo.utils.validation import THE_WHOLE_TREE, leaf_names
from gradhpo.utils.warn import warn_once


# Where a method finds the hyperparameters: only in the validation loss; also in the condition for
# the inner optimum; or in how the last inner update changes the parameters; also in what earlier
# updates leave in the optimizer's state; or (by evaluating updates instead of differentiating them)
# in anything that has an effect.
Sees: TypeAlias = Literal["validation", "optimum", "last update", "updates", "everything"]


def seen_by(sees: Sees, problem: Problem, with_init: bool = False) -> list[bool]:
    """For each leaf of the hyperparameters, whether a method that looks there can see it.

    `with_init`: also those that act in the inner optimizer's `init`.
    """
    phi, validation, z, hyperparams = problem
    by_derivative = sees != "everything"
    at, evaluate = validation.of_differentiated(z)
    loss = lambda at, h: evaluate(at, h)[0]
    of_validation = readings(lambda x: loss(*x), (at, hyperparams), by_derivative=by_derivative)
    by_z, by_hyperparams = of_validation.by()
    reads_w, reads_r = (any(jax.tree.leaves(reads)) for reads in (by_z.w, by_z.r))
    by_hyperparams = jax.tree.leaves(by_hyperparams)
    ways = [by_hyperparams]
    looks_on = sees != "validation" or with_init
    if all(by_hyperparams) or not looks_on or not (reads_w or reads_r):
        return by_hyperparams
    if with_init and phi.fresh is not None:
        start = readings(lambda h: started(phi, z, h)[:2], hyperparams, by_derivative=by_derivative)
        ways.append(jax.tree.leaves(start.by()))
    # A solver has no path that could be differentiated: only its equation is.
    if sees == "optimum" or (phi.inner_solver is not None and sees in ("last update", "updates")):
        if not phi.differentiated:  # what the gradient reads, since its derivative may not exist
            read = readings(lambda h: phi.gradient(z, h, 0), hyperparams, by_derivative=False)
            return [any(seen) for seen in zip(*ways, jax.tree.leaves(read.by()), strict=True)]
        optimality = lambda h: phi.optimality(z, h, 0)[0]
        ways.append(jax.tree.leaves(visible_leaves(optimality, hyperparams)))
        if reads_r:
            new_r = lambda h: phi.step(z, h, 0, want_loss=False)[0].r
            ways.append(jax.tree.leaves(visible_leaves(new_r, hyperparams)))
    elif sees != "validation":
        read = {"w": reads_w, "s": False, "r": reads_r}
        ways.append(_seen_by_step(sees, phi, z, hyperparams, read))
    return [any(seen) for seen in zip(*ways, strict=True)]


def _seen_by_step(
    sees: Sees, phi: InnerUpdate, z: InnerState, hyperparams: PyTree, read: dict[str, bool]
) -> list[bool]:
    """The same for an inner step: by the parts of z that are `read` after it, or after later steps.

    What an update leaves in s must act later, for example: its sign has no derivative.
    """
    inexact, rest = eqx.partition(z, eqx.is_inexact_array)
    if not read["r"]:  # the parameters are read directly: their later effects add nothing
        inexact, rest = inexact._replace(w=None), rest._replace(w=z.w)

    def step(at):
        z, hyperparams = eqx.combine(at[0], rest), at[1]
        return phi.step(z, hyperparams, 0, want_loss=False)[0]

    by_derivative = sees != "everything" and phi.differentiated
    of_step = readings(step, (inexact, hyperparams), by_derivative=by_derivative)
    of_parts = lambda new: [getattr(new, part) for part, here in read.items() if here]
    for _ in read if sees != "last update" else ():
        before, _ = of_step.by(of_parts)
        read = {p: here or any(jax.tree.leaves(getattr(before, p))) for p, here in read.items()}
    if sees == "everything":
        return jax.tree.leaves(of_step.by()[1])
    return jax.tree.leaves(of_step.by(of_parts)[1])


def _sees_its_gradient(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> bool:
    """Whether the parameters depend on the training gradient by a derivative, also via the state.

    It may act one step late, as momentum may; what follows has gradients that are held.
    """
    loss = jnp.zeros(())

    def after(gradient):
        state = z
        for held in (gradient, z.w, z.w):  # a gradient is a tree like w
            state = phi.step_and_gradient(state, hyperparams, 0, (loss, held, state.r))[0]
        return state.w

    return any(jax.tree.leaves(visible_leaves(after, z.w)))


def where_it_is_cut(problem: Problem) -> str:
    """Where the derivative of hyperparameters that act on training may be lost."""
    phi, _, z, hyperparams = problem
    steps = phi.update_fn is phi.inner_solver is None
    if steps and not _sees_its_gradient(phi, z, hyperparams):
        return IGNORES_SIZE
    return (
        "look for a stop_gradient, a round, an argmax or a cast to integers on the way to them, or "
        "for a loss that reads a variable from outside in place of its argument hyperparams"
    )


def check_visible(name: str, sees: Sees, problem: Problem, with_init: bool) -> None:
    """Names the hyperparameters whose hypergradient by this method is identically or partly 0."""
    seen = seen_by(sees, problem, with_init)
    if not with_init and sees in ("last update", "updates", "everything"):
        _check_init(name, problem, seen)
    if all(seen):
        return
    names = leaf_names(problem.hyperparams)
    # How each unseen leaf acts, computed only now: most programs never need it.
    through = {kind: seen_by(kind, problem) for kind in _NARROWER}
    through[_INIT] = seen_by("validation", problem, True)
    at, evaluate = problem.validation.of_differentiated(problem.z)
    loss = lambda at, h: evaluate(at, h)[0]
    of_z = lambda at: loss(at, problem.hyperparams)
    blind = not any(jax.tree.leaves(visible_leaves(of_z, at)))
    groups: dict[str, list[str]] = {}
    for leaf, here, *elsewhere in zip(names, seen, *through.values(), strict=True):
        if not here:
            kinds = [kind for kind, there in zip(through, elsewhere, strict=True) if there]
            groups.setdefault(_why(sees, kinds, blind, problem), []).append(leaf)
    if not any(seen):
        whys = (f"{', '.join(leaves)}: {why}" for why, leaves in groups.items())
        raise ValueError(f"{name} sees none of the hyperparameters. {'; '.join(whys)}")
    for why, leaves in groups.items():
        zero = f"{name} gives a hypergradient of 0 for hyperparams {', '.join(leaves)}: {why}"
        warn_once(zero, *problem.functions())


def check_later_steps(name: str, sees: Sees, problem: Problem) -> None:
    """Names the hyperparameters that only the first step of an episode sees, at its start."""
    if problem.phi.fresh is None:
        return
    pairs = zip(seen_by(sees, problem, True), seen_by(sees, problem), strict=True)
    alone = [first and not later for first, later in pairs]
    names = list(itertools.compress(leaf_names(problem.hyperparams), alone))
    if names:
        warn_once(
            f"hyperparams {', '.join(names)} act {_where(problem)} alone, as far as {name} sees: "
            "their hypergradient is 0 in all but the first step of an episode. Pass "
            "steps_per_episode=1 to run, with the inner steps of a whole episode in each step",
            *problem.functions(),
        )


def _check_init(name: str, problem: Problem, seen: Sequence[bool]) -> None:
    """Names the entries of visible hyperparameters that also act in `init`."""
    acting = acting_at_start(problem.phi, problem.z, problem.hyperparams)
    entries = [
        entry
        for leaf, marks, here in zip(
            leaf_names(problem.hyperparams), jax.tree.leaves(acting), seen, strict=True
        )
        if here and np.any(marks)
        for entry in _entries(leaf, marks)
    ]
    if entries:
        warn_once(
            f"{name} ignores the effect of hyperparams {', '.join(entries)} {_where(problem)}; "
            f"{WHO_SEES[_INIT]} see it",
            *problem.functions(),
        )


def _where(problem: Problem) -> str:
    return "in the init of the inner optimizer" if problem.phi.start is None else "in start_fn"


def _entries(leaf: str, marks: np.ndarray) -> list[str]:
    """`leaf` if all of it is marked, otherwise its marked entries."""
    if np.all(marks):
        return [leaf]
    leaf = leaf.removeprefix(THE_WHOLE_TREE)
    found = [f"{leaf}{list(map(int, at))}" for at in np.argwhere(marks)]
    return found if len(found) <= 5 else [*found[:5], f"and {len(found) - 5} more of {leaf}"]


_INIT = "init"
_NARROWER: tuple[Sees, ...] = ("optimum", "last update", "updates")
_LOOKS_ELSEWHERE: dict[Sees, str] = {
    "validation": "the validation loss does not depend on them, and this method looks nowhere else",
    "optimum": "the optimum of the training loss does not depend on them (settings of the inner "
    "optimizer only change the way to it; put a weight decay into the loss)",
    "last update": "they act only on later updates, through what an update leaves for the next",
}


def _why(sees: Sees, acts_through: Sequence[str], blind: bool, problem: Problem) -> str:
    """Why a leaf is not seen, and what would see it; `blind` validation sees no parameter."""
    if blind:
        return "the validation loss depends neither on the parameters nor on them"
    if acts_through == [_INIT]:
        return f"they act {_where(problem)} alone; {WHO_SEES[_INIT]} see them"
    cut = acts_through == ["optimum"] and sees != "validation"
    if not acts_through or cut or sees not in _LOOKS_ELSEWHERE:
        return (
            "neither the validation loss nor the inner update has a derivative with respect to "
            f"them. If it should: {where_it_is_cut(problem)}"
        )
    others = ", ".join(WHO_SEES[kind] for kind in acts_through)
    return f"{_LOOKS_ELSEWHERE[sees]}; {others} {'see' if ',' in others else 'sees'} them"
