r"""Reverse mode through a sequence of inner steps, wherever their states come from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inner import InnerUpdate, Pull
from gradhpo.core.inner_state import InnerState
from gradhpo.core.measured import Loss
from gradhpo.core.start import pull_start
from gradhpo.utils.trees import accumulation_dtype, tree_lerp, tree_zeros_like


class Cotangent(NamedTuple):
    r"""The cotangents that the backward pass carries.

    $\bar z$ on the inner state, and $\bar\lambda$ on the hyperparameters.
    """

    z: InnerState
    hyperparams: PyTree


class PulledStep(NamedTuple):
    r"""One step of the backward pass, for `pull_through(observe=)`.

    The step that `pull` goes back through started at `z`, has number `t` and ended at `new_z`;
    `term` is its contribution to $\bar\lambda$, and `bar` the cotangent before it.
    """

    z: InnerState
    t: Array
    new_z: InnerState
    pull: Pull
    bar_after: Cotangent
    term: PyTree
    bar: Cotangent


def cotangent_at_end(alpha: InnerState, z: InnerState, hyper_bar: PyTree) -> Cotangent:
    """Start of the backward pass: the outer loss sees parameters and running state, and no `s`.

    The hyperparameters accumulate many small terms: in bfloat16 the sum would stall.
    """
    wide = accumulation_dtype(hyper_bar)
    s_bar = tree_zeros_like(eqx.filter(z.s, eqx.is_inexact_array))
    bar = jax.tree.map(lambda x: x.astype(wide), hyper_bar)
    return Cotangent(alpha._replace(s=s_bar), bar)


def pull_step(
    phi: InnerUpdate,
    z: InnerState,
    hyperparams: PyTree,
    t: ArrayLike,
    bar: Cotangent,
    over: Callable[[Pull], Pull] = lambda pull: pull,
) -> PulledStep:
    r"""The backward pass through one inner step.

    Adds $\bar z B_t$ to $\bar\lambda$ and takes $\bar z$ to $\bar z A_t$. With `over=jax.vmap` for
    many cotangents at once, which then have one more leading axis: the step is linearized once.
    """
    new_z, _, pull = phi.vjp(z, hyperparams, t)
    pull = over(pull)
    z_bar, term = pull(bar.z)
    total = jax.tree.map(lambda total, x: total + x.astype(total.dtype), bar.hyperparams, term)
    return PulledStep(z, jnp.asarray(t), new_z, pull, bar, term, Cotangent(z_bar, total))


def pull_through(
    phi: InnerUpdate,
    state_at: Callable[[PyTree, Array], InnerState],
    kept: PyTree,
    first: ArrayLike,
    num_steps: int,
    hyperparams: PyTree,
    bar: Cotangent,
    observe: Callable[[PulledStep], Any] = lambda step: None,
    over: Callable[[Pull], Pull] = lambda pull: pull,
) -> tuple[Cotangent, Any]:
    """The whole backward pass through steps `first`, `first + 1`, ..., with `kept` stacked.

    `state_at(kept of one step, its number)` is the state before that step; `over` is as in
    `pull_step`. Returns the cotangent at the start, and the results of `observe` for every step,
    stacked in the order of the steps.
    """

    def body(bar, at):
        kept, t = at
        step = pull_step(phi, state_at(kept, t), hyperparams, t, bar, over)
        return step.bar, observe(step)

    steps = first + jnp.arange(num_steps)
    return jax.lax.scan(body, bar, (kept, steps), length=num_steps, reverse=True)


def through_start(
    phi: InnerUpdate, z: InnerState, hyperparams: PyTree, bar: Cotangent
) -> Cotangent:
    """The last part of the backward pass: the hyperparameters' effect in the optimizer's `init`."""
    if phi.fresh is None:
        return bar
    term = pull_start(phi, z, hyperparams, bar.z)
    add = lambda total, x: total + x.astype(total.dtype)
    return bar._replace(hyperparams=jax.tree.map(add, bar.hyperparams, term))


class Line(eqx.Module):
    r"""The straight line from $z_0$ to $z_T$ that replaces the inner states (DrMAD).

    Parameters, optimizer state and running state are all interpolated: Adam's initial moments with
    final parameters would be a point that training never visits. Values that are not floating-point
    numbers cannot be interpolated and are kept from before each step; in most optimizers that is a
    step count, four bytes per step.
    """

    start: InnerState
    end: InnerState
    num_steps: int = eqx.field(static=True)

    def at(self, kept: PyTree, t: ArrayLike) -> InnerState:
        """The state before step `t`, from 0; `kept` is `not_interpolated` of that state."""
        share = t / self.num_steps
        start, end = (eqx.filter(z, eqx.is_inexact_array) for z in (self.start, self.end))
        return eqx.combine(tree_lerp(start, end, share), kept)


def not_interpolated(z: InnerState) -> PyTree:
    """What a [`Line`][gradhpo.core.reverse.Line] must keep of every state."""
    return eqx.filter(z, eqx.is_inexact_array, inverse=True)


def along_a_line(
    phi: InnerUpdate, z: InnerState, hyperparams: PyTree, num_steps: int
) -> tuple[InnerState, InnerState, Loss, Line, PyTree]:
    """Steps from 0 on: `(z_{T-1}, z_T, last loss, line, kept)`, where `kept` is for `line.at`."""

    def body(carry, t):
        z, _ = carry
        new_z, loss = phi.step(z, hyperparams, t, want_loss=t == num_steps - 1)
        return (new_z, z), (loss, not_interpolated(z))

    (end, before), (losses, kept) = jax.lax.scan(body, (z, z), jnp.arange(num_steps))
    return before, end, losses[-1], Line(z, end, num_steps), kept
