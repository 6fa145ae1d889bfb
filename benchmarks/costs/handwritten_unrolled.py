"""Hand-written programs, continued: methods that go through many inner steps.

Each takes a stack of batches, one for each inner step.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.costs.handwritten import finish, init, losses, norm, sgd, tree
from benchmarks.costs.problem import MOMENTUM, RATE, Job


SEGMENTS = 5  # of 20 inner steps, rounded up from their root
TERMS = 20


def length(batches):
    return len(jax.tree.leaves(batches)[0])


def at(batches, t):
    """One of a stack, by index: a scan over part of the stack would copy that part."""
    return tree(lambda x: x[t], batches)


def train_steps(train, h, start, batches):
    """The final parameters and momentum, and the losses."""

    def body(carry, t):
        value, g = jax.value_and_grad(train)(carry[0], h, at(batches, t))
        return sgd(*carry, g), value

    return jax.lax.scan(body, start, jnp.arange(length(batches)))


def plain_training(train, state, batches):
    """Training without a hypergradient."""
    w, m, h, counters = state
    (w, m), values = train_steps(train, h, (w, m), batches)
    return (w, m, h, counters), values[-1]


def greedy(train, val, state, batches, val_batch):
    discount = 0.9
    w, m, h, _ = state

    def advance(w, m, batch):
        both = lambda w: jax.value_and_grad(train, argnums=(0, 1))(w, h, batch)
        (value, (g, _)), push = jax.linearize(both, w)
        return *sgd(w, m, g), value, push

    def mixed(push, alpha):
        return push(tree(lambda a: -RATE * a, alpha))[1][1]

    def body(carry, t):
        w, m, total = carry
        w, m, _, push = advance(w, m, at(batches, t))
        term = mixed(push, jax.grad(val)(w, h, val_batch))
        return (w, m, tree(lambda t, x: discount * t + x, total, term)), None

    start = (w, m, tree(jnp.zeros_like, h))
    last = length(batches) - 1
    (w, m, total), _ = jax.lax.scan(body, start, jnp.arange(last))
    w, m, value, push = advance(w, m, at(batches, last))
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)
    add = lambda d, t, x: d + discount * t + x
    g = tree(add, direct, total, mixed(push, alpha))
    return finish(state, w, m, g, value, val_value)


def forward_pass(train, h, start, batches, steps):
    """The end, the last training loss, and the states before each step; `steps` are indices."""

    def body(carry, t):
        value, g = jax.value_and_grad(train)(carry[0], h, at(batches, t))
        return sgd(*carry, g), (value, carry)

    end, (values, kept) = jax.lax.scan(body, start, steps)
    return end, values[-1], kept


def backward_pass(train, h, bar, kept, batches, steps, state_of=lambda kept: kept):
    """Takes the cotangents of (w, m, h) at the end to the start."""

    def body(carry, kept_at):
        w_bar, m_bar, h_bar = carry
        kept, t = kept_at
        batch = at(batches, t)
        w, _ = state_of(kept)
        g_bar = tree(lambda w_bar, m_bar: m_bar - RATE * w_bar, w_bar, m_bar)
        both = lambda w: jax.grad(train, argnums=(0, 1))(w, h, batch)
        _, (by_w, by_h) = jax.jvp(both, (w,), (g_bar,))
        m_bar = tree(lambda x: MOMENTUM * x, g_bar)
        return (tree(jnp.add, w_bar, by_w), m_bar, tree(jnp.add, h_bar, by_h)), None

    return jax.lax.scan(body, bar, (kept, steps), reverse=True)[0]


def unrolled(train, val, state, batches, val_batch):
    w, m, h, _ = state
    steps = jnp.arange(length(batches))
    (w, m), value, kept = forward_pass(train, h, (w, m), batches, steps)
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)
    start = (alpha, tree(jnp.zeros_like, alpha), direct)
    _, _, g = backward_pass(train, h, start, kept, batches, steps)
    return finish(state, w, m, g, value, val_value)


def checkpointed(train, val, state, batches, val_batch):
    w, m, h, _ = state
    segments = jnp.arange(length(batches)).reshape(SEGMENTS, -1)

    def segment(carry, steps):
        end, value, _ = forward_pass(train, h, carry, batches, steps)
        return end, (value, carry)

    (w, m), (values, starts) = jax.lax.scan(segment, (w, m), segments)
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)

    def back(bar, segment):
        start, steps = segment
        _, _, kept = forward_pass(train, h, start, batches, steps)
        return backward_pass(train, h, bar, kept, batches, steps), None

    start = (alpha, tree(jnp.zeros_like, alpha), direct)
    (_, _, g), _ = jax.lax.scan(back, start, (starts, segments), reverse=True)
    return finish(state, w, m, g, values[-1], val_value)


def dr_mad(train, val, state, batches, val_batch):
    w, m, h, _ = state
    number, first = length(batches), (w, m)
    steps = jnp.arange(number)
    last, values = train_steps(train, h, first, batches)
    w, m = last
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)
    between = lambda t: tree(lambda a, b: (1 - t / number) * a + t / number * b, first, last)
    start = (alpha, tree(jnp.zeros_like, alpha), direct)
    _, _, g = backward_pass(train, h, start, steps, batches, steps, between)
    return finish(state, w, m, g, values[-1], val_value)


def init_forward(job: Job):
    """Its memory is the tangents of (w, m)."""
    w, m, h, (count, rejected) = init(job)
    zeros = tree(lambda x: jnp.zeros((len(h.weights), *x.shape)), (w, m))
    return w, m, h, (count, rejected, zeros)


def forward_mode(train, val, state, batches, val_batch):
    w, m, h, (_, _, old_tangents) = state
    units = tree(lambda x: jnp.eye(len(x)), h)

    def body(carry, t):
        (w, m), tangents = carry

        def update(w, m, h):
            value, g = jax.value_and_grad(train)(w, h, at(batches, t))
            return sgd(w, m, g), value

        z, push, value = jax.linearize(update, w, m, h, has_aux=True)
        return (z, jax.vmap(push)(*tangents, units)), value

    start = ((w, m), old_tangents)
    ((w, m), tangents), values = jax.lax.scan(body, start, jnp.arange(length(batches)))
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)
    along = lambda z, a: jnp.tensordot(z, a, a.ndim)
    through = sum(jax.tree.leaves(tree(along, tangents[0], alpha)))
    g = tree(lambda d: d + through, direct)
    return finish(state, w, m, g, values[-1], val_value, (tangents,))


def init_implicit(job: Job):
    """Its memory is the adjoint, the count of diverged series, and the damping."""
    w, m, h, (count, rejected) = init(job)
    return w, m, h, (count, rejected, tree(jnp.zeros_like, w), jnp.zeros(()), jnp.zeros(()))


def implicit(train, val, state, batches, val_batch):
    w, m, h, (_, _, _, failures, damping) = state
    steps = jnp.arange(length(batches))
    (w, m), value, _ = forward_pass(train, h, (w, m), batches, steps)
    val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)
    last = at(batches, steps[-1])
    both = lambda w: jax.grad(train, argnums=(0, 1))(w, h, last)
    (residual, _), push = jax.linearize(both, w)

    def product(v):
        by_w, by_h = push(v)
        return tree(lambda x, v: x + damping * v, by_w, v), by_h

    size = norm(alpha)
    unit = tree(lambda a: a / size, alpha)

    def body(carry, _):
        term, total, _ = carry
        before = norm(term)
        term = tree(lambda x, y: x - RATE * y, term, product(term)[0])
        return (term, tree(jnp.add, total, term), before), None

    carry = (unit, unit, norm(unit))
    (term, total, before), _ = jax.lax.scan(body, carry, None, length=TERMS - 1)
    failed = (norm(term) > norm(unit)) & (norm(term) > before)
    q = tree(lambda x: RATE * x, total)
    reached, mixed = product(q)
    g = tree(lambda d, x: d - size * x, direct, mixed)
    adjoint = tree(lambda x: jnp.where(failed, 0, size * x), q)
    memory = (adjoint, failures + failed, damping)
    state, metrics = finish(state, w, m, g, value, val_value, memory)
    left = norm(tree(jnp.subtract, unit, reached))
    return state, (*metrics, norm(residual), left)


def plain_unrolled_hypergradient(
    job: Job, inner_optimizer, steps: int, *, checkpoint: bool = False, segment: int | None = None
):
    """`jax.grad` through a plain `lax.scan` of optax steps: the obvious way to write it.

    `inner_optimizer` may be a function of the hyperparameters. With `checkpoint` the body is under
    `jax.checkpoint`, the next thing to try when memory is short. With a `segment`, a divisor of
    `steps`, so is each segment of this many steps, in a scan over segments.
    """
    train, val = losses(job)
    fixed = isinstance(inner_optimizer, optax.GradientTransformation)

    def hypergradient(w, h, batch, val_batch):
        def outer(h):
            inner = inner_optimizer if fixed else inner_optimizer(h)

            def body(carry, _):
                w, s = carry
                updates, s = inner.update(jax.grad(train)(w, h, batch), s, w)
                return (optax.apply_updates(w, updates), s), None

            if checkpoint:
                body = jax.checkpoint(body, prevent_cse=False)
            length = segment or steps
            scanned = lambda carry, _: jax.lax.scan(body, carry, None, length=length)
            start = w, inner.init(w)
            if segment:
                of_segment = jax.checkpoint(scanned, prevent_cse=False)
                (w_end, _), _ = jax.lax.scan(of_segment, start, None, length=steps // segment)
            else:
                (w_end, _), _ = scanned(start, None)
            return val(w_end, h, val_batch)

        return jax.grad(outer)(h)

    return hypergradient
