"""Where a NaN comes from: which leaf, which inner step, and the usual suspect."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.measured import loss_of
from gradhpo.core.problem import Problem
from gradhpo.core.reverse import PulledStep, cotangent_at_end, pull_through, through_start
from gradhpo.core.start import pull_start
from gradhpo.diagnostics.metasmooth import difference
from gradhpo.utils.trees import finite_leaves, tree_dot, tree_l2_norm


_INNER_OPTIMIZER = (
    "the derivative of the inner optimizer: a square root of exactly 0, as in Adam where a "
    "gradient is 0; give it eps_root=1e-16 (1e-8 for a method of finite differences in float32, "
    "1e-4 in float16). optax.zero_nans and optax.apply_if_finite do not make a derivative finite"
)
_SAFE = "jnp.where around a NaN branch (put a safe value inside the branch)"
_FIRST = f"a sqrt, a norm or a division at exactly 0 in that loss, or {_SAFE}"
_SECOND = (
    f"the second derivative of the training loss (or that of update_fn): a sqrt, a norm or a power "
    f"below 2 at exactly 0, or {_SAFE}"
)
_DATA = "the data: the batch holds a NaN or an infinity in its leaf {}"
_RANGE = "a log, an exp or a division that has left its range"
_DIVERGED = "training that diverges: a smaller learning rate, or clipped gradients"

# What can be non-finite in one inner step, in the order in which it is computed, and on the
# backward pass; each with its name and the usual suspect.
_FORWARD = {
    "train_loss": ("the training loss", _RANGE),
    "gradient": ("the training gradient", _FIRST),
    "params": ("the updated parameters", _DIVERGED),
    "inner_opt_state": ("the inner optimizer's state", _DIVERGED),
    "model_state": ("the new model state", _FIRST),
}
_VALIDATION = {
    "val_loss": ("the validation loss", _RANGE),
    "alpha": ("the validation gradient", _FIRST),
    "direct": ("the hyperparameter derivative of the validation loss", _FIRST),
}
_ON_THE_WAY = {"alpha": ("the validation gradient right after the step", _FIRST)}
_BACKWARD = {
    "through_optimizer": ("the cotangent of the training gradient", _INNER_OPTIMIZER),
    "state": ("the cotangent of the inner optimizer's state", _INNER_OPTIMIZER),
    "cotangent": ("the cotangent of the parameters", _SECOND),
    "term": ("what the step adds to the hypergradient", _SECOND),
}
_START = {"init": ("the derivative of the inner optimizer's init", _FIRST)}


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first non-finite number in training, validation, and the backward pass.

    - `what`: a training gradient, a cotangent, ...
    - `leaf`: its leaf; empty for a scalar.
    - `inner_step`: its inner step, from 0; `None` at validation.
    - `suspect`: the usual cause, with the remedy.
    """

    what: str
    leaf: str
    inner_step: int | None
    suspect: str

    def __str__(self) -> str:
        leaf = f" in {self.leaf}" if self.leaf else ""
        step = "" if self.inner_step is None else f" at inner step {self.inner_step} (from 0)"
        return f"not finite: {self.what}{leaf}{step}. The usual suspect is {self.suspect}"


def finiteness(problem: Problem, num_steps: int) -> dict[str, Any]:
    """The exact `hypergradient`, and whether each intermediate value is finite.

    Leaf by leaf; steps come first. `uphill`: whether one step from there, with a new optimizer
    state, increases its own training loss, to first order. `loss` and `moved`: the training loss,
    and the length of the update.
    """
    phi, validation, z, hyperparams = problem

    def forward(z, t):
        gradient = phi.gradient(z, hyperparams, t)
        new, loss = phi.step(z, hyperparams, t)
        # The rule itself, without the momentum that may carry a good step uphill for a while.
        fresh = z._replace(s=init_inner_state(phi.inner_optimizer, z.w, hyperparams))
        ruled, _ = phi.step(fresh, hyperparams, t, want_loss=False)
        found = {
            "batch": finite_leaves(phi.batch(t)),
            "train_loss": finite_leaves(loss_of(loss)),
            "gradient": finite_leaves(gradient),
            "params": finite_leaves(new.w, unless_as_in=z.w),
            "inner_opt_state": finite_leaves(new.s, unless_as_in=z.s),
            "model_state": finite_leaves(new.r, unless_as_in=z.r),
            "alpha": finite_leaves(validation.alpha(new, hyperparams).w),
            "uphill": tree_dot(jax.tree.map(difference, ruled.w, z.w), gradient) > 0,
            "loss": loss_of(loss),
            "moved": tree_l2_norm(jax.tree.map(difference, new.w, z.w)),
        }
        return new, (z, found)

    end, (kept, forward_found) = jax.lax.scan(forward, z, jnp.arange(num_steps))
    val_loss, alpha, direct = validation.value_and_grads(end, hyperparams)
    validation_found = {
        "val_batch": finite_leaves(validation.val_batch),
        "val_loss": finite_leaves(loss_of(val_loss)),
        "alpha": finite_leaves(alpha.w),
        "direct": finite_leaves(direct),
    }

    def look(step: PulledStep) -> dict[str, Any]:
        found = {}
        if phi.update_fn is None:
            gradient = phi.gradient(step.z, hyperparams, step.t)
            through = phi.optimizer_vjp(gradient, step.z, hyperparams, step.t, step.bar_after.z.w)
            found["through_optimizer"] = finite_leaves(through[0])
        return found | {
            "state": finite_leaves(step.bar.z.s),
            "cotangent": finite_leaves(step.bar.z.w),
            "term": finite_leaves(step.term),
        }

    bar = cotangent_at_end(alpha, end, direct)
    bar, backward_found = pull_through(
        phi, lambda z, _: z, kept, 0, num_steps, hyperparams, bar, look
    )
    start = pull_start(phi, z, hyperparams, bar.z)
    bar = through_start(phi, z, hyperparams, bar)
    return {
        "hypergradient": bar.hyperparams,
        "start": {"init": finite_leaves(start)},
        "forward": forward_found,
        "validation": validation_found,
        "backward": backward_found,
    }


def first_nonfinite(watched: Mapping[str, Any]) -> NonFinite | None:
    """The first non-finite value in `finiteness`, in the order of the exact computation."""
    num_steps = len(np.asarray(watched["forward"]["train_loss"]))
    onwards, back = range(num_steps), range(num_steps)[::-1]
    found = _first(watched["forward"], _FORWARD, onwards)
    if found is not None:
        return _blaming_data(found, watched["forward"]["batch"])
    found = _first(watched["validation"], _VALIDATION, [None])
    if found is not None:
        return _blaming_data(found, watched["validation"]["val_batch"])
    found = _first(watched["backward"], _BACKWARD, back)
    return _first(watched["start"], _START, [None]) if found is None else found


def in_the_estimate(watched: Mapping[str, Any], hypergradient: PyTree, suspect: str) -> NonFinite:
    """For an estimate that is not finite although the exact hypergradient is."""
    if watched:
        steps = range(len(np.asarray(watched["forward"]["train_loss"])))
        found = _first(watched["forward"], _ON_THE_WAY, steps)
        if found is not None:
            return found
    paths = jax.tree_util.tree_leaves_with_path(hypergradient)
    bad = [path for path, leaf in paths if not np.all(np.isfinite(leaf))]
    return NonFinite("the estimate itself", jax.tree_util.keystr(bad[0]), None, suspect)


def _blaming_data(found: NonFinite, batch: PyTree) -> NonFinite:
    """Data that are not finite are the suspect, but not a failure if they have no effect."""
    for path, finite in jax.tree_util.tree_leaves_with_path(batch):
        finite = np.asarray(finite)
        if not (finite if found.inner_step is None else finite[found.inner_step]):
            suspect = _DATA.format(jax.tree_util.keystr(path) or "(an array)")
            return dataclasses.replace(found, suspect=suspect)
    return found


def _first(found: Mapping[str, PyTree], kinds: Mapping[str, tuple], steps: Any) -> NonFinite | None:
    for step in steps:
        for name, (what, suspect) in kinds.items():
            for path, finite in jax.tree_util.tree_leaves_with_path(found.get(name)):
                finite = np.asarray(finite)
                if not (finite if step is None else finite[step]):
                    return NonFinite(what, jax.tree_util.keystr(path), step, suspect)
    return None
