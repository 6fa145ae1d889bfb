"""Hand-written programs, continued: single-loop and first-order methods."""

import jax
import jax.numpy as jnp

from benchmarks.costs.handwritten import finish, init, norm, sgd, tree
from benchmarks.costs.handwritten_unrolled import at, length, train_steps
from benchmarks.costs.problem import RATE, Job


PENALTY, CONTROL = 10.0, 0.5


def init_soba(job: Job):
    w, m, h, counters = init(job)
    return w, m, h, (*counters, tree(jnp.zeros_like, w), jnp.zeros(()), jnp.zeros(()))


def soba(train, val, state, batch, val_batch):
    """Its memory is the adjoint and two residuals."""
    w, m, h, (_, _, v, *_) = state
    both = lambda w: jax.value_and_grad(train, argnums=(0, 1))(w, h, batch)
    (value, (g, _)), push = jax.linearize(both, w)
    new_w, m = sgd(w, m, g)
    alpha, direct = jax.grad(val, argnums=(0, 1))(w, h, val_batch)
    _, (by_w, mixed) = push(v)
    left = tree(jnp.add, by_w, alpha)
    v = tree(lambda v, x: v - RATE * x, v, left)
    memory = (v, norm(g), norm(left) / norm(alpha))
    g = tree(jnp.add, direct, mixed)
    return finish(state, new_w, m, g, value, val(new_w, h, val_batch), memory)


def init_f2sa(job: Job):
    w, m, h, counters = init(job)
    return w, m, h, (*counters, w, m, jnp.zeros((), jnp.int32))


def f2sa(train, val, state, batches, val_batch):
    """Its memory is the penalised parameters with their momentum, and a count."""
    w, m, h, (_, _, y, y_momentum, count) = state

    def body(carry, t):
        w, m, y, y_momentum = carry
        value, g = jax.value_and_grad(train)(w, h, at(batches, t))
        of_y = jax.grad(train)(y, h, at(batches, t))
        alpha = jax.grad(val)(y, h, val_batch)
        of_y = tree(lambda g, a: g + a / PENALTY, of_y, alpha)
        return (*sgd(w, m, g), *sgd(y, y_momentum, of_y)), value

    steps = jnp.arange(length(batches))
    (w, m, y, y_momentum), values = jax.lax.scan(body, (w, m, y, y_momentum), steps)
    by_h = lambda w: jax.grad(train, argnums=1)(w, h, at(batches, steps[-1]))
    direct = jax.grad(val, argnums=1)(y, h, val_batch)
    g = tree(lambda d, y, z: d + PENALTY * (y - z), direct, by_h(y), by_h(w))
    memory = (y, y_momentum, count + 1)
    return finish(state, w, m, g, values[-1], val(w, h, val_batch), memory)


def init_bome(job: Job):
    w, m, h, counters = init(job)
    return w, m, h, (*counters, jnp.zeros(()))


def bome(train, val, state, batches, val_batch):
    """Its memory is the multiplier."""
    w, m, h, _ = state
    (trial, _), _ = train_steps(train, h, (w, tree(jnp.zeros_like, w)), batches)
    last = at(batches, length(batches) - 1)
    value, (q_w, of_w) = jax.value_and_grad(train, argnums=(0, 1))(w, h, last)
    q_h = tree(jnp.subtract, of_w, jax.grad(train, argnums=1)(trial, h, last))
    alpha, direct = jax.grad(val, argnums=(0, 1))(w, h, val_batch)
    dot = lambda a, b: sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))
    q, f = (q_w, q_h), (alpha, direct)
    multiplier = jnp.maximum(CONTROL * dot(q, q) - dot(f, q), 0) / dot(q, q)
    along = lambda f, q: tree(lambda f, q: f + multiplier * q, f, q)
    w, m = sgd(w, m, along(alpha, q_w))
    g = along(direct, q_h)
    return finish(state, w, m, g, value, val(w, h, val_batch), (multiplier,))
