"""Where a NaN comes from: which leaf, which inner step, and the usual suspect."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.problem import Problem
from gradhpo.core.reverse import cotangent_at_end
from gradhpo.diagnostics.metasmooth import difference
from gradhpo.utils.gradients import tree_dot


_INNER_OPTIMIZER = (
    "the derivative of the inner optimizer: a square root of exactly 0, as in Adam where a "
    "gradient is 0; give it eps_root=1e-16 (with T1T2Optimizer in float32: 1e-8)"
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

# What can be non-finite in one inner step, in the order in which it is computed, and on the way
# back. Of each: how it is called, and the usual suspect.
_FORWARD = {
    "train_loss": ("the training loss", _RANGE),
    "gradient": ("the training gradient", _FIRST),
    "params": ("the updated parameters", _DIVERGED),
    "inner_opt_state": ("the inner optimizer's state", _DIVERGED),
}
_VALIDATION = {
    "val_loss": ("the validation loss", _RANGE),
    "alpha": ("the validation gradient", _FIRST),
    "direct": ("the derivative of the validation loss by the hyperparameters", _FIRST),
}
_ON_THE_WAY = {"alpha": ("the validation gradient right after the step", _FIRST)}
_BACKWARD = {
    "through_optimizer": ("the cotangent of the training gradient", _INNER_OPTIMIZER),
    "state": ("the cotangent of the inner optimizer's state", _INNER_OPTIMIZER),
    "cotangent": ("the cotangent of the parameters", _SECOND),
    "term": ("what the step adds to the hypergradient", _SECOND),
}


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first non-finite number on the way through training, validation, and back.

    - `what`: a training gradient, a cotangent, ...
    - `leaf`: the leaf of it; empty for a scalar.
    - `inner_step`: at which inner step, from 0; `None` at validation.
    - `suspect`: what usually causes that, with the remedy.
    """

    what: str
    leaf: str
    inner_step: int | None
    suspect: str

    def __str__(self) -> str:
        leaf = f" in {self.leaf}" if self.leaf else ""
        step = "" if self.inner_step is None else f" at inner step {self.inner_step} (from 0)"
        return f"not finite: {self.what}{leaf}{step}. The usual suspect is {self.suspect}"


def watch(problem: Problem, num_steps: int) -> dict[str, Any]:
    """The exact `hypergradient`, and for everything on the way to it whether it is finite.

    Leaf by leaf; steps come first. `uphill`: whether one step from there, with a new optimizer
    state, raises its own training loss, to first order.
    """
    phi, validation, z, hyperparams = problem

    def forward(z, t):
        (w, s), gradient = z, jax.grad(phi.train_loss)(z[0], hyperparams, t)
        new, loss = phi.step(z, hyperparams, t)
        # The rule itself, without the momentum that may carry a good one uphill for a while.
        fresh = init_inner_state(phi.inner_optimizer, w, hyperparams)
        (ruled, _), _ = phi.step((w, fresh), hyperparams, t, want_loss=False)
        found = {
            "batch": _finite(phi.batch(t)),
            "train_loss": _finite(loss),
            "gradient": _finite(gradient),
            "params": _finite(new[0], unless_as_in=w),
            "inner_opt_state": _finite(new[1], unless_as_in=s),
            "alpha": _finite(jax.grad(validation.loss)(new[0], hyperparams)),
            "uphill": tree_dot(jax.tree.map(difference, ruled, w), gradient) > 0,
        }
        return new, (z, found)

    end, (kept, forward_found) = jax.lax.scan(forward, z, jnp.arange(num_steps))
    val_loss, alpha, direct = validation.value_and_grads(end[0], hyperparams)
    validation_found = {
        "val_batch": _finite(validation.val_batch),
        "val_loss": _finite(val_loss),
        "alpha": _finite(alpha),
        "direct": _finite(direct),
    }

    def backward(bar, at):
        z, t = at
        found = {}
        if phi.update_fn is None:
            gradient = jax.grad(phi.train_loss)(z[0], hyperparams, t)
            found["through_optimizer"] = _finite(
                phi.optimizer_vjp(gradient, z, hyperparams, bar[0])[0]
            )
        _, _, pull = phi.vjp(z, hyperparams, t)
        w_bar, s_bar, term = pull(*bar[:2])
        total = jax.tree.map(lambda x, y: x + y.astype(x.dtype), bar[2], term)
        found |= {"state": _finite(s_bar), "cotangent": _finite(w_bar), "term": _finite(term)}
        return (w_bar, s_bar, total), found

    bar = cotangent_at_end(alpha, end[1], direct)
    (_, _, hypergradient), backward_found = jax.lax.scan(
        backward, bar, (kept, jnp.arange(num_steps)), reverse=True
    )
    return {
        "hypergradient": hypergradient,
        "forward": forward_found,
        "validation": validation_found,
        "backward": backward_found,
    }


def first_nonfinite(watched: Mapping[str, Any]) -> NonFinite | None:
    """What `watch` saw first, in the order of the exact computation."""
    num_steps = len(np.asarray(watched["forward"]["train_loss"]))
    onwards, back = range(num_steps), range(num_steps)[::-1]
    found = _first(watched["forward"], _FORWARD, onwards)
    if found is not None:
        return _blaming_data(found, watched["forward"]["batch"])
    found = _first(watched["validation"], _VALIDATION, [None])
    if found is not None:
        return _blaming_data(found, watched["validation"]["val_batch"])
    return _first(watched["backward"], _BACKWARD, back)


def in_the_estimate(watched: Mapping[str, Any], hypergradient: PyTree, method: Any) -> NonFinite:
    """Of an estimate that is not finite although the exact hypergradient is."""
    if watched:
        steps = range(len(np.asarray(watched["forward"]["train_loss"])))
        found = _first(watched["forward"], _ON_THE_WAY, steps)
        if found is not None:
            return found
    paths = jax.tree_util.tree_leaves_with_path(hypergradient)
    bad = [path for path, leaf in paths if not np.all(np.isfinite(leaf))]
    suspect = "a product that only this method takes"
    if hasattr(method, "epsilon"):
        suspect = f"a step lost in rounding: epsilon={float(method.epsilon):g} is too small"
    elif hasattr(method, "linear_solver"):
        suspect = "a singular linear system: pass damping=1e-3 or more"
    return NonFinite("the estimate itself", jax.tree_util.keystr(bad[0]), None, suspect)


def _blaming_data(found: NonFinite, batch: PyTree) -> NonFinite:
    """Data that are not finite are the suspect, but no failure where nothing comes of them."""
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


def _finite(tree: PyTree, unless_as_in: PyTree | None = None) -> PyTree:
    """Leaf by leaf; an infinity that was there before (a mask) is no failure."""
    tree = eqx.filter(tree, eqx.is_inexact_array)
    before = tree if unless_as_in is None else eqx.filter(unless_as_in, eqx.is_inexact_array)

    def of_leaf(x: Array, y: Array) -> Array:
        return jnp.all(jnp.isfinite(x) | ((x == y) & (unless_as_in is not None)))

    return jax.tree.map(of_leaf, tree, before)
