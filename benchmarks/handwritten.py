"""The same mathematics as plain JAX programs, written for this one job.

SGD with momentum inside, gradient descent outside; no optax, no gradhpo. Each step has the
same metrics and the same refusal of non-finite results, so that only the library's own
overhead can make a difference.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.problem import MOMENTUM, OUTER_RATE, RATE, Job


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
    return w, m, h, (count, rejected, (w, jnp.zeros(()), jnp.asarray(0.1)))


def sgd(w, m, g):
    m = tree(lambda m, g: MOMENTUM * m + g, m, g)
    return tree(lambda w, m: w - RATE * m, w, m), m


def finish(old, w, m, hypergradient, train_value, val_value):
    """The outer update, the refusal of non-finite results, and the metrics."""
    old_w, old_m, old_h, (step, rejected) = old
    h = tree(lambda h, g: h - OUTER_RATE * g, old_h, hypergradient)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((w, m, h, hypergradient))]
    good = jnp.all(jnp.stack(finite))
    pick = lambda new, before: tree(lambda a, b: jnp.where(good, a, b), new, before)
    w, m, h = pick(w, old_w), pick(m, old_m), pick(h, old_h)
    rejected = rejected + (1 - good.astype(rejected.dtype))
    metrics = (train_value, val_value, norm(hypergradient), norm(w), norm(h), rejected)
    return (w, m, h, (step + 1, rejected)), metrics


def first_order(job: Job):
    train, val = losses(job)

    def step(state, batch, val_batch):
        w, m, h, _ = state
        value, g = jax.value_and_grad(train)(w, h, batch)
        w, m = sgd(w, m, g)
        val_value, direct = jax.value_and_grad(val, argnums=1)(w, h, val_batch)
        return finish(state, w, m, direct, value, val_value)

    return step


def one_step(job: Job):
    train, val = losses(job)

    def step(state, batch, val_batch):
        w, m, h, _ = state
        both = lambda w: jax.value_and_grad(train, argnums=(0, 1))(w, h, batch)
        (value, (g, _)), push = jax.linearize(both, w)
        new_w, m = sgd(w, m, g)
        val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(new_w, h, val_batch)
        _, (_, mixed) = push(tree(lambda a: -RATE * a, alpha))
        return finish(state, new_w, m, tree(jnp.add, direct, mixed), value, val_value)

    return step


def t1_t2(job: Job):
    train, val = losses(job)

    def step(state, batch, val_batch):
        w, m, h, _ = state
        value, g = jax.value_and_grad(train)(w, h, batch)
        new_w, m = sgd(w, m, g)
        val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(new_w, h, val_batch)
        v = tree(lambda a: -RATE * a, alpha)
        scale = 0.01 / norm(v)
        at = lambda s: jax.grad(train, argnums=1)(
            tree(lambda w, v: w + s * scale * v, w, v), h, batch
        )
        quotient = tree(lambda a, b: (a - b) / (2 * scale), at(1.0), at(-1.0))
        return finish(state, new_w, m, tree(jnp.add, direct, quotient), value, val_value)

    return step


def greedy(job: Job):
    train, val = losses(job)
    discount = 0.9

    def step(state, batches, val_batch):
        w, m, h, _ = state

        def advance(w, m, batch):
            both = lambda w: jax.value_and_grad(train, argnums=(0, 1))(w, h, batch)
            (value, (g, _)), push = jax.linearize(both, w)
            return *sgd(w, m, g), value, push

        def mixed(push, alpha):
            return push(tree(lambda a: -RATE * a, alpha))[1][1]

        def body(carry, batch):
            w, m, total = carry
            w, m, _, push = advance(w, m, batch)
            term = mixed(push, jax.grad(val)(w, h, val_batch))
            return (w, m, tree(lambda t, x: discount * t + x, total, term)), None

        start = (w, m, tree(jnp.zeros_like, h))
        before_last = tree(lambda x: x[:-1], batches)
        (w, m, total), _ = jax.lax.scan(body, start, before_last)
        w, m, value, push = advance(w, m, tree(lambda x: x[-1], batches))
        val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(w, h, val_batch)
        add = lambda d, t, x: d + discount * t + x
        g = tree(add, direct, total, mixed(push, alpha))
        return finish(state, w, m, g, value, val_value)

    return step


def hyper_distill(job: Job):
    """The fourth part of the state has the step count, the rejections, and (w*, t, theta)."""
    train, val = losses(job)
    discount = 0.99

    def step(state, batch, val_batch):
        w, m, h, (count, rejected, (w_star, t, theta)) = state
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
        base = (w, state[1], h, (count, rejected))
        (new_w, m, h, (count, rejected)), metrics = finish(
            base, new_w, m, hypergradient, value, val_value
        )
        good = rejected == state[3][1]
        pick = lambda new, before: tree(lambda a, b: jnp.where(good, a, b), new, before)
        memory = pick((new_star, t, theta), state[3][2])
        return (new_w, m, h, (count, rejected, memory)), metrics

    return step


def unrolled(job: Job):
    train, val = losses(job)

    def step(state, batches, val_batch):
        w, m, h, _ = state

        def forward(carry, batch):
            value, g = jax.value_and_grad(train)(carry[0], h, batch)
            return sgd(*carry, g), (value, carry)

        (new_w, new_m), (values, kept) = jax.lax.scan(forward, (w, m), batches)
        val_value, (alpha, direct) = jax.value_and_grad(val, argnums=(0, 1))(new_w, h, val_batch)

        def backward(carry, at):
            w_bar, m_bar, h_bar = carry
            (w, _), batch = at
            g_bar = tree(lambda w_bar, m_bar: m_bar - RATE * w_bar, w_bar, m_bar)
            both = lambda w: jax.grad(train, argnums=(0, 1))(w, h, batch)
            _, (by_w, by_h) = jax.jvp(both, (w,), (g_bar,))
            m_bar = tree(lambda x: MOMENTUM * x, g_bar)
            return (tree(jnp.add, w_bar, by_w), m_bar, tree(jnp.add, h_bar, by_h)), None

        start = (alpha, tree(jnp.zeros_like, alpha), direct)
        (_, _, g), _ = jax.lax.scan(backward, start, (kept, batches), reverse=True)
        return finish(state, new_w, new_m, g, values[-1], val_value)

    return step


def plain_unrolled_hypergradient(job: Job, inner_optimizer, steps: int):
    """`jax.grad` through a plain `lax.scan` of optax steps: what one writes first."""
    import optax

    train, val = losses(job)

    def hypergradient(w, h, batch, val_batch):
        def outer(h):
            def body(carry, _):
                w, s = carry
                updates, s = inner_optimizer.update(jax.grad(train)(w, h, batch), s, w)
                return (optax.apply_updates(w, updates), s), None

            (w_end, _), _ = jax.lax.scan(body, (w, inner_optimizer.init(w)), None, length=steps)
            return val(w_end, h, val_batch)

        return jax.grad(outer)(h)

    return hypergradient
