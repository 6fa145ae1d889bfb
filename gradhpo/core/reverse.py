r"""Reverse mode through a sequence of inner steps, from wherever their states come."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inner import Carry, InnerUpdate
from gradhpo.utils.gradients import accumulation_dtype, tree_lerp, tree_zeros_like


Cotangent: TypeAlias = tuple[PyTree, PyTree, PyTree]  # of (w, s, hyperparams)


def cotangent_at_end(alpha: PyTree, s: PyTree, hyper_bar: PyTree) -> Cotangent:
    """Where the way back starts: the outer loss sees the parameters, not the state.

    Many small terms are added up for the hyperparameters: in bfloat16 the sum would stall.
    """
    wide = accumulation_dtype(hyper_bar)
    s_bar = tree_zeros_like(eqx.filter(s, eqx.is_inexact_array))
    return alpha, s_bar, jax.tree.map(lambda x: x.astype(wide), hyper_bar)


def pull_step(
    phi: InnerUpdate, z: Carry, hyperparams: PyTree, t: ArrayLike, bar: Cotangent
) -> Cotangent:
    r"""Adds $\bar z B_t$ to $\bar\lambda$ and takes $\bar z$ to $\bar z A_t$."""
    w_bar, s_bar, hyper_bar = bar
    _, _, pull = phi.vjp(z, hyperparams, t)
    w_bar, s_bar, contribution = pull(w_bar, s_bar)
    add = lambda total, x: total + x.astype(total.dtype)
    return w_bar, s_bar, jax.tree.map(add, hyper_bar, contribution)


def pull_through(
    phi: InnerUpdate,
    state_at: Callable[[PyTree, Array], Carry],
    kept: PyTree,
    first: ArrayLike,
    num_steps: int,
    hyperparams: PyTree,
    bar: Cotangent,
) -> Cotangent:
    """All the way back through steps `first`, `first + 1`, ..., of which `kept` is stacked.

    `state_at(kept of one step, its number)` is the state before that step.
    """

    def body(bar, at):
        kept, t = at
        return pull_step(phi, state_at(kept, t), hyperparams, t, bar), None

    steps = first + jnp.arange(num_steps)
    bar, _ = jax.lax.scan(body, bar, (kept, steps), length=num_steps, reverse=True)
    return bar


class Line(eqx.Module):
    r"""The straight line from $z_0$ to $z_T$ that stands in for the inner states (DrMAD).

    Parameters and optimizer state are interpolated alike: Adam's moments of the start with
    parameters of the end would be a point that no training ever visits. What is not a
    floating-point number cannot be interpolated and is kept as it was before each step; in
    most optimizers that is a step count, four bytes a step.
    """

    start: Carry
    end: Carry
    num_steps: int = eqx.field(static=True)

    def at(self, kept: PyTree, t: ArrayLike) -> Carry:
        """The state before step `t`, from 0; `kept` is `not_interpolated` of that state."""
        share = t / self.num_steps
        start, end = (eqx.filter(z, eqx.is_inexact_array) for z in (self.start, self.end))
        return eqx.combine(tree_lerp(start, end, share), kept)


def not_interpolated(z: Carry) -> PyTree:
    """What a [`Line`][gradhpo.core.reverse.Line] needs to have kept of every state."""
    return eqx.filter(z, eqx.is_inexact_array, inverse=True)


def along_a_line(
    phi: InnerUpdate, z: Carry, hyperparams: PyTree, num_steps: int
) -> tuple[Carry, Carry, Array, Line, PyTree]:
    """Steps from 0 on: `(z_{T-1}, z_T, last loss, line, kept)`, the last for `line.at`."""

    def body(carry, t):
        z, _ = carry
        new_z, loss = phi.step(z, hyperparams, t, want_loss=t == num_steps - 1)
        return (new_z, z), (loss, not_interpolated(z))

    (end, before), (losses, kept) = jax.lax.scan(body, (z, z), jnp.arange(num_steps))
    return before, end, losses[-1], Line(z, end, num_steps), kept
