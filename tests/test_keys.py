"""Keys in a batch used for several steps: typed ones differ, others raise a warning."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import quick

import gradhpo


SGD = optax.sgd(0.1)
LEGACY, TYPED = jax.random.PRNGKey(0), jax.random.key(0)
UNROLLED = gradhpo.UnrolledOptimizer(SGD, SGD, unroll_steps=3)
ONE = gradhpo.OneStepOptimizer(SGD, SGD)
W, H = jnp.ones(3), jnp.zeros(3)
WORDS = r"is a key made by jax\.random\.PRNGKey.*draw the same random numbers.*jax\.random\.key"


def noisy(w, h, batch):
    return jnp.mean((w * (1 + jax.random.normal(batch["key"], (3,))) - h) ** 2)


def in_a_loop(w, h, batch):
    draw = lambda total, key: (total + jnp.sum(w * jax.random.uniform(key, (3,)) - h) ** 2, None)
    keys = jax.random.split(jax.random.fold_in(batch["key"], 3), 4)
    return jax.lax.scan(draw, jnp.zeros(()), keys)[0]


def in_a_branch(w, h, batch):
    return jax.lax.cond(jnp.sum(w) > 0, lambda: noisy(w, h, batch), lambda: jnp.sum((w - h) ** 2))


def without(w, h, batch):
    return jnp.mean((w - h) ** 2) + 0 * jnp.sum(batch["key"].astype(w.dtype))


def beside(w, h, batch):
    """Two labels and a typed key."""
    noise = jax.random.normal(batch["typed"], (3,))
    return jnp.sum((w + noise - h)[batch["key"]] ** 2) + jnp.sum((w - h) ** 2)


def val_loss(w, h, batch):
    return jnp.sum((w - 2.0) ** 2)


def update(w, h, batch):
    return w - 0.1 * jax.grad(noisy)(w, h, batch)


def step(loss=noisy, optimizer=UNROLLED, batch=None):
    batch = {"key": LEGACY} if batch is None else batch
    return optimizer.step(optimizer.init(W, H), batch, None, loss, val_loss)


def run(optimizer=ONE, batch=None):
    losses = gradhpo.LossFunctions(noisy, val_loss)
    batch = {"key": LEGACY} if batch is None else batch
    settings = {"num_steps": 2, "progress": False}
    return gradhpo.run(optimizer, optimizer.init(W, H), losses, batch, None, **settings)


BY_HAND = gradhpo.UnrolledOptimizer(outer_optimizer=SGD, update_fn=update, unroll_steps=3)
TASKS = gradhpo.TaskBatched(UNROLLED, 2)

REPEATED = {
    "inner steps": step,
    "in a loop": lambda: step(in_a_loop),
    "in a branch": lambda: step(in_a_branch),
    "in an update_fn": lambda: step(optimizer=BY_HAND),
    "on tasks": lambda: step(optimizer=TASKS, batch={"key": jax.random.split(LEGACY)}),
    "in a run": run,
}


@pytest.mark.parametrize(
    "where", quick(list(REPEATED), keep=["inner steps", "in a loop", "in a run"])
)
def test_a_key_that_repeats_its_noise_is_named(where):
    with pytest.warns(UserWarning, match=rf"train_batch\['key'\] {WORDS}"):
        REPEATED[where]()


FINE = {
    "a typed key": lambda: step(batch={"key": TYPED}),
    "a key for each step": lambda: step(
        batch=gradhpo.BatchStack({"key": jax.random.split(LEGACY, 3)})
    ),
    "one inner step": lambda: step(optimizer=ONE),
    "two labels": lambda: step(without, batch={"key": jnp.arange(2, dtype=jnp.uint32)}),
    "two labels beside a typed key": lambda: step(
        beside, batch={"key": jnp.arange(2, dtype=jnp.uint32), "typed": TYPED}
    ),
    "a run with a typed key": lambda: run(batch={"key": TYPED}),
    "a run with a key from the index": lambda: run(batch=lambda i: {"key": jax.random.PRNGKey(i)}),
}


@pytest.mark.parametrize(
    "what",
    quick(list(FINE), keep=["a typed key", "one inner step", "two labels"]),
)
def test_nothing_is_said_of_other_leaves(what):
    FINE[what]()  # warnings are errors
