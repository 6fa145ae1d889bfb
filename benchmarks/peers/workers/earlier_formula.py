"""Each algorithm's own formula for its hypergradient, with full Jacobians.

Meant for float64. All are evaluated at one point: `at_step` inner steps from a start with scattered
rates, with a training batch per step (greedy: one for all) and one validation batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from earlier_job import GAMMA, STEPS, arrays, batches, loss, start, update
from jax.flatten_util import ravel_pytree


THETA = 0.55  # given to HyperDistill, so that it does not fit its own
SPREAD = 0.5  # of the rates, in softplus^-1


def points(at_step: int, same_batch: bool) -> tuple[list, tuple]:
    """The training batches of the steps, and the validation batch."""
    train, val = arrays()
    drawn = batches(train, seed=1)
    first = next(drawn)
    return [first, *(first if same_batch else next(drawn) for _ in range(at_step - 1))], (
        next(batches(val, seed=2))
    )


def exact(algorithm: str, at_step: int) -> list[float]:
    """The algorithm's own formula, with full Jacobians dPhi/dlambda."""
    w, rates = start(SPREAD)
    greedy = algorithm == "greedy"
    at_step = STEPS if greedy else at_step
    train, val = points(at_step, same_batch=greedy)
    path = [w]
    for batch in train:
        path.append(jax.jit(update)(path[-1], rates, batch))

    @jax.jit
    def product(after, at, batch):  # alpha_t dPhi(at, lambda; D_t)/dlambda
        alpha, _ = ravel_pytree(jax.grad(loss)(after, rates, val))
        flat, unravel = ravel_pytree(rates)
        phi = lambda flat: ravel_pytree(update(at, unravel(flat), batch))[0]
        return alpha @ jax.jacfwd(phi)(flat)

    t = at_step
    if greedy:
        terms = [GAMMA ** (t - i) * product(path[i], path[i - 1], train[i - 1]) for i in _to(t)]
        return sum(terms).tolist()
    if algorithm == "HyperDistill":
        weights = np.array([GAMMA ** (t - i) for i in _to(t)])
        shares = weights / weights.sum()
        mean = lambda *leaves: sum(p * leaf for p, leaf in zip(shares, leaves, strict=True))
        w_star = jax.tree.map(mean, *path[:t])
        return (THETA * weights.sum() * product(path[t], w_star, train[-1])).tolist()
    return product(path[t], path[t - 1], train[-1]).tolist()  # one step, T1-T2


def read_hypergradient(
    optimizer: Any, state: Any, train_loss: Callable, train: list, val: tuple, greedy: bool
) -> list[list[float]]:
    """At the last batch: as `step` applies it, and as `compute_hypergradient` returns it.

    With an outer rate of 1, the change of the rates shows the hypergradient; 0 changes nothing.
    Greedy lacks this argument.
    """
    if not greedy:
        for batch in train[:-1]:
            state = optimizer.step(state, batch, val, loss, loss, 0.0)
    last = (train[-1], val, train_loss, loss)
    new = optimizer.step(state, *last) if greedy else optimizer.step(state, *last, 1.0)
    applied = jax.tree.map(jnp.subtract, state.hyperparams, new.hyperparams)
    return [flat(applied), flat(optimizer.compute_hypergradient(state, *last))]


def _to(t: int) -> range:
    return range(1, t + 1)


def flat(tree: dict) -> list[float]:
    return np.asarray(ravel_pytree(tree)[0], float).tolist()
