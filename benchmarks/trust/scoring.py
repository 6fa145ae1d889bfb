"""How well a hypergradient predicts retraining, by hand: for trainings with other batches too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from benchmarks.trust.problems import Config, Problem


def retrained(config: Config, problem: Problem, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Perturbations [count, n], and the losses of all queries [count + 1, queries], own first."""
    weights = problem.state.hyperparams
    keys = jax.random.split(jax.random.key(config.seed + 100), count)
    moved = jnp.stack([weights, *(problem.perturb(key, weights) for key in keys)])
    inner, losses, w0 = config.optimizer(), problem.losses, problem.state.params

    def train(weights, seed):
        batches = problem.batches(seed)

        def step(carry, t):
            w, s = carry
            gradient = jax.grad(losses.train_loss)(w, weights, batches(t))
            updates, s = inner.update(gradient, s, w)
            return (optax.apply_updates(w, updates), s), None

        (w, _), _ = jax.lax.scan(step, (w0, inner.init(w0)), jnp.arange(config.steps))
        return jax.vmap(lambda query: losses.val_loss(w, weights, query))(problem.queries)

    seeds = jnp.arange(count + 1) * config.live
    train = jax.jit(jax.vmap(train, in_axes=(0, 0 if config.live else None)))
    found = train(moved, seeds if config.live else seeds[0])
    return np.asarray(moved[1:] - weights, np.float64), np.asarray(found, np.float64)


def scores(config: Config, problem: Problem, count: int) -> np.ndarray:
    """Rank correlation of predicted and true changes for each query."""
    delta, losses = retrained(config, problem, count)
    replayed = gradhpo.replay(
        problem.optimizer, problem.state, problem.batches(0), problem.queries, problem.losses,
        num_steps=config.steps, queries=True, progress=False,
    )  # fmt: skip
    g = np.asarray(replayed.hypergradient, np.float64)
    from gradhpo.diagnostics.nearby import spearman

    with np.errstate(all="ignore"):
        predicted, true = delta @ g.T, losses[1:] - losses[0]
    return np.asarray([spearman(a, b) for a, b in zip(predicted.T, true.T, strict=True)])
