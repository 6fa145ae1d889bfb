"""The same mathematics as plain JAX programs, written for this one job.

SGD with momentum inside, gradient descent outside; no optax, no gradhpo. A step takes the losses as
functions of (weights, hyperparameters, batch), its state and its batches. It has the same metrics
and the same refusal of non-finite results, so that only the library's overhead differs.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.costs.problem import MOMENTUM, OUTER_RATE, RATE, Job


tree = jax.tree.map


def norm(x):
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(x)))


def losses(job: Job):
    """The losses as functions of (weights, hyperparameters, batch)."""
    _, static = eqx.partition(job.params, eqx.is_inexact_array)
    train = lambda w, h, batch: job.train_loss(eqx.combine(w, static), h, batch)
    val = lambda w, h, batch: job.val_loss(eqx.combine(w, static), h, batch)
    return train, val


def init(job: Job):
    w = eqx.filter(job.params, eqx.is_inexact_array)
    counters = (jnp.zeros((), jnp.int32), jnp.zeros(()))
    return w, tree(jnp.zeros_like, w), job.hyperparams, counters


def init_distilled(job: Job):
    w, m, h, (count, rejected) = init(job)
    return w, m, h, (count, rejected, w, jnp.zeros(()), jnp.asarray(0.1))


def sgd(w, m, g):
    m = tree(lambda m, g: MOMENTUM * m + g, m, g)
    return tree(lambda w, m: w - RATE * m, w, m), m


def finish(old, w, m, hypergradient, train_value, val_value, memory=()):
    """The outer update, the refusal of non-finite results, and the metrics.

    The fourth part of the state holds two counters and then the method's own memory.
    """
    old_w, old_m, old_h, (step, rejected, *old_memory) = old
    h = tree(lambda h, g: h - OUTER_RATE * g, old_h, hypergradient)
    new = (w, m, h, hypergradient, memory)
    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
    pick = lambda new, before: tree(lambda a, b: jnp.where(good, a, b), new, before)
    w, m, h, memory = pick((w, m, h, memory), (old_w, old_m, old_h, tuple(old_memory)))
    rejected = rejected + (1 - good.astype(rejected.dtype))
    metrics = (train_value, val_value, norm(hypergradient), norm(w), norm(h), rejected)
    return (w, m, h, (step + 1, rejected, *memory)), metrics


def first_order(train, val, state, batch, val_batch):
    w, m, h, _ = state
    value, g = jax.value_and_grad(train)(w, h, batch)
    w, m = sgd(w, m, g)
    val_value, direct = jax.value_and_grad(val, argnums=1)(w, h, val_batch)
    return finish(state, w, m, direct, value, val_value)


def one_step(train, val, state, batch, val_batch):
    w, m, h, _ = state
    both = lambda w: jax.value_and_grad(train, argnums=(0, 1))(w, h, batch)
    (value, (g, _)), push = jax.linearize(both, w)
    new_w, m = sgd(w, m, g)
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(new_w, h, val_batch)
    _, (_, mixed) = push(tree(lambda a: -RATE * a, alpha))
    return finish(state, new_w, m, tree(jnp.add, direct, mixed), value, val_value)


def t1_t2(train, val, state, batch, val_batch):
    w, m, h, _ = state
    value, g = jax.value_and_grad(train)(w, h, batch)
    new_w, m = sgd(w, m, g)
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(new_w, h, val_batch)
    v = tree(lambda a: -RATE * a, alpha)
    scale = 0.01 / norm(v)
    at = lambda s: jax.grad(train, argnums=1)(tree(lambda w, v: w + s * scale * v, w, v), h, batch)
    quotient = tree(lambda a, b: (a - b) / (2 * scale), at(1.0), at(-1.0))
    return finish(state, new_w, m, tree(jnp.add, direct, quotient), value, val_value)


def hyper_distill(train, val, state, batch, val_batch):
    """Its memory is w*, the step count of the episode, and theta."""
    discount = 0.99
    w, m, h, (_, _, w_star, t, theta) = state
    t = t + 1
    total = (1 - discount**t) / (1 - discount)
    share = discount * (1 - discount ** (t - 1)) / (1 - discount**t)
    new_star = tree(lambda old, w: share * old + (1 - share) * w, w_star, w)
    value, g = jax.value_and_grad(train)(w, h, batch)
    new_w, m = sgd(w, m, g)
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(new_w, h, val_batch)
    by_h = lambda w: jax.grad(train, argnums=1)(w, h, batch)
    _, mixed = jax.jvp(by_h, (new_star,), (tree(lambda a: -RATE * a, alpha),))
    hypergradient = tree(lambda d, x: d + theta * total * x, direct, mixed)
    memory = (new_star, t, theta)
    return finish(state, new_w, m, hypergradient, value, val_value, memory)
