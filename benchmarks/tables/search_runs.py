"""Searches for an architecture, what they find on the way, and training runs of what is found."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import gradhpo
from benchmarks.tables.search_network import (
    BATCH,
    EDGES,
    FREE,
    OPERATIONS,
    Data,
    Fading,
    Loss,
    Network,
    cross_entropy,
    load,
    shares_of,
)


RATE, DECAY = 0.05, 3e-4
ALONG = (25, 100, 400, 1600)  # outer steps after which architectures are trained
CHUNK = 50  # outer steps between two curvatures
WINDOW, GROWTH = 3, 0.75  # of curvatures, to stop
RETRAINED = 300  # steps
INNER = optax.sgd(RATE, momentum=0.9)
OUTER = optax.adam(0.03, b1=0.5)
# Created once, so that each compiles once.
FIRST, SECOND = "first order", "second order"
EXACT, IMPLICIT = "exact, 3 steps", "implicit, 4 terms"
METHODS = {
    FIRST: gradhpo.FOOptimizer(INNER, OUTER),
    SECOND: gradhpo.T1T2Optimizer(INNER, OUTER),
    EXACT: gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=3),
    IMPLICIT: gradhpo.ImplicitOptimizer(INNER, OUTER, linear_solver=gradhpo.Neumann(4, RATE)),
}
FIXED = gradhpo.FixedOptimizer(INNER)


class Search(NamedTuple):
    """A method, and what is changed in its losses."""

    method: str
    decay: float = DECAY
    penalty: float = 0.0
    auxiliary: float = 0.0
    sigmoids: float = 0.0


def letters(alpha: np.ndarray) -> str:
    """On each edge the operation with the largest share; zero cannot be chosen, as in DARTS."""
    return "".join(OPERATIONS[i] for i in alpha[:, : OPERATIONS.index("0")].argmax(1))


def num_free(architecture: str) -> int:
    """How many edges have an operation without parameters."""
    return sum(letter in FREE for letter in architecture)


def recorded(state: gradhpo.BilevelState) -> dict[str, Array]:
    return {"alpha": state.hyperparams.alpha}


@jax.jit
def curvature(alpha: Array, params: Network, sigmoids: Array, batch: tuple) -> Array:
    """The largest eigenvalue of the Hessian of the validation loss by `alpha`."""
    x, y = batch

    def loss(flat):
        shares = shares_of(flat.reshape(alpha.shape), sigmoids)
        return cross_entropy(params(x, shares, jnp.zeros(())), y)

    return jnp.linalg.eigvalsh(jax.hessian(loss)(alpha.reshape(-1)))[-1]


def stopped(curvatures: np.ndarray, window: int = WINDOW, growth: float = GROWTH) -> int:
    """The point before the largest eigenvalue grows, by its mean over a window; else the last."""
    means = np.convolve(curvatures, np.ones(window) / window, mode="valid")
    for now in range(window, len(means)):
        if means[now - window] / means[now] < growth:
            return now - 1  # `window` points before the last one in this mean
    return len(curvatures) - 1


def losses_of(search: Search) -> gradhpo.LossFunctions:
    decay, *others = (jnp.asarray(x, jnp.float32) for x in search[1:])
    zero = jnp.zeros(())
    penalty, auxiliary, sigmoids = others
    return gradhpo.LossFunctions(
        Loss(decay, zero, auxiliary, sigmoids), Loss(zero, penalty, auxiliary, sigmoids)
    )


def batches(pair: tuple[Array, Array], seed: int, until: int) -> Fading:
    data = gradhpo.ArrayData(pair, BATCH, jax.random.key(seed))
    return Fading(data, jnp.asarray(until, jnp.float32))


def started(optimizer: gradhpo.BilevelOptimizer, seed: int, alpha: Array | None = None) -> Any:
    params, hyperparams = gradhpo.partition(Network(jax.random.key(seed)), lambda m: m.alpha)
    if alpha is not None:
        hyperparams = jax.tree.map(lambda _: alpha, hyperparams)
    return optimizer.init(params, hyperparams)


def searched(
    search: Search, seed: int, along: tuple[int, ...] = ALONG, watched: bool = True
) -> Mapping[str, Any]:
    """Architectures along a search; if `watched`, with the curvature after each chunk."""
    optimizer, data, losses = METHODS[search.method], load(seed), losses_of(search)
    steps, inner = along[-1], optimizer.num_inner_steps
    some = jax.tree.map(lambda x: x[:100], data.val)
    sigmoids = losses.val_loss.sigmoids
    found = []

    def look(state: gradhpo.BilevelState, metrics: dict) -> None:
        found.append(float(curvature(state.hyperparams.alpha, state.params, sigmoids, some)))

    state, history = gradhpo.run(
        optimizer,
        started(optimizer, seed),
        losses,
        batches(data.train, 2 * seed, steps * inner),
        batches(data.val, 2 * seed + 1, steps),
        num_steps=steps,
        chunk_size=min(CHUNK, steps),
        callbacks=[look] if watched else [],
        progress=False,
        record=recorded,
    )
    alphas = np.asarray(history["alpha"])
    shares = shares_of(jnp.asarray(alphas), sigmoids)
    free = shares[..., 2:5].sum(-1).mean(-1)
    kept: dict[str, Any] = {
        "architectures": {str(step): letters(alphas[step - 1]) for step in along},
        "free share": {str(step): float(free[step - 1]) for step in along},
        "rejected": int(state.metadata["rejected"]),
        "validation loss": float(np.mean(history["val_loss"][-25:])),
    }
    if watched:
        stop = (stopped(np.asarray(found)) + 1) * min(CHUNK, steps)
        kept |= {"stop": stop, "stopped": letters(alphas[stop - 1]), "curvatures": found}
    return kept


@jax.jit
def accuracy(params: Network, shares: Array, pair: tuple[Array, Array]) -> Array:
    x, y = pair
    return jnp.mean(jnp.argmax(params(x, shares, jnp.zeros(())), axis=1) == y)


def retrained(architecture: str, seed: int, steps: int = RETRAINED) -> Mapping[str, float]:
    """Accuracies of an architecture, trained from scratch on the training set."""
    data: Data = load(seed)
    chosen = np.full((EDGES, len(OPERATIONS)), -1e9, np.float32)
    chosen[np.arange(EDGES), [OPERATIONS.index(x) for x in architecture]] = 0
    alpha = jnp.asarray(chosen)
    state, _ = gradhpo.run(
        FIXED,
        started(FIXED, 100 + seed, alpha),
        losses_of(Search("")),
        batches(data.train, 2 * seed, 1),
        batches(data.val, 2 * seed + 1, 1),
        num_steps=steps,
        chunk_size=steps,
        progress=False,
    )
    shares = shares_of(alpha, jnp.zeros(()))
    of = lambda pair: float(accuracy(state.params, shares, pair))
    return {"validation": of(data.val), "test": of(data.test)}
