"""Penalised regression, the same for every library: losses and a proximal step.

All functions take `(w, h, batch)`; `h` holds log penalties and broadcasts against the weights. For
the elastic net, `h[0]` are the l1 and `h[1]` the l2 penalties.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array
    curvature: jax.Array  # the largest of the unpenalised loss


class Losses(NamedTuple):
    """The loss to minimise or the step whose fixed point we seek, and the validation loss."""

    train: Callable
    val: Callable
    step: Callable | None = None


def squared_error(w, h, batch: Batch) -> jax.Array:
    return jnp.mean((batch.x @ w - batch.y) ** 2) / 2


def cross_entropy(w, h, batch: Batch) -> jax.Array:
    return -jnp.mean(jnp.sum(batch.y * jax.nn.log_softmax(batch.x @ w), axis=1))


def ridge(w, h, batch: Batch) -> jax.Array:
    return squared_error(w, h, batch) + jnp.sum(jnp.exp(h) * w**2) / 2


def logistic(w, h, batch: Batch) -> jax.Array:
    return cross_entropy(w, h, batch) + jnp.sum(jnp.exp(h) * w**2) / 2


def proximal_step(w, h, batch: Batch) -> jax.Array:
    """A gradient step on the squared error, then the proximal operator of the elastic net."""
    rate, (l1, l2) = 1 / batch.curvature, jnp.exp(h)
    moved = w - rate * jax.grad(squared_error)(w, h, batch)
    return jnp.sign(moved) * jax.nn.relu(jnp.abs(moved) - rate * l1) / (1 + rate * l2)


LOSSES = {
    "ridge": Losses(ridge, squared_error),
    "logistic": Losses(logistic, cross_entropy),
    "elastic net": Losses(squared_error, squared_error, proximal_step),
}
