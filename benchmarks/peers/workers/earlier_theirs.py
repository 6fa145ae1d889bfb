"""The tutorial's job with `gradhpo` 0.1.3 from the package index, in its own environment."""

import functools
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from earlier_formula import SPREAD, THETA, flat, points, read_hypergradient
from earlier_job import (
    EPISODES,
    ESTIMATION_PERIOD,
    GAMMA,
    OUTER_RATE,
    STEPS,
    count_compilations,
    decayed,
    iterators,
    loss,
    start,
    update,
)
from worker import resident_mib, seconds, serve

import gradhpo


assert gradhpo.__version__ == "0.1.3", gradhpo.__file__
compiled = count_compilations()


def loss_of_update(w: dict, rates: dict, batch: tuple) -> jax.Array:
    """A loss whose gradient is rate * gradient, for greedy, which takes no `update_fn` there.

    Gradient descent at rate 1 then takes the same steps and has the same dPhi/dlambda.
    """
    gradient = jax.lax.stop_gradient(jax.grad(loss)(w, rates, batch))
    terms = jax.tree.map(lambda w, r, g: jnp.vdot(w, jax.nn.softplus(r) * g), w, rates, gradient)
    return sum(jax.tree.leaves(terms))


def make(algorithm: str, outer: optax.GradientTransformation | None):
    """The optimizer, and the training loss for it."""
    common = {"outer_optimizer": outer, "update_fn": update}
    if algorithm == "HyperDistill":
        distilled = {"gamma": GAMMA, "estimation_period": ESTIMATION_PERIOD, "T": STEPS}
        return gradhpo.OnlineHypergradientOptimizer(**common, **distilled), loss
    if algorithm == "one step":
        return gradhpo.OneStepOptimizer(**common), loss
    if algorithm == "T1-T2":
        return gradhpo.T1T2Optimizer(**common, gamma=GAMMA, T=STEPS), loss
    settings = {"unroll_steps": STEPS, "gamma": GAMMA}
    return gradhpo.GreedyOptimizer(optax.sgd(1.0), outer, **settings), loss_of_update


class Enough(Exception):
    """The time budget is spent."""


def prepare(algorithm: str, outer: optax.GradientTransformation | None) -> Callable[..., object]:
    """Its own `run` of the whole job. The outer rate is the tutorial's `lr_hyper`, unless given."""
    optimizer, train_loss = make(algorithm, outer)
    settings = {"lr_hyper": OUTER_RATE} if outer is None else {}
    if algorithm == "one step":
        settings["T"] = STEPS
    state = optimizer.init(*start())

    def go(callback: Callable | None = None) -> None:
        train, val = iterators()
        new = optimizer.run(
            state, EPISODES, get_train_batch=train, get_val_batch=val, train_loss_fn=train_loss,
            val_loss_fn=loss, callback=callback, **settings,
        )  # fmt: skip
        jax.block_until_ready((new.params, new.hyperparams))

    return go


def memory_maps() -> int | None:
    """How many this process has; `None` off Linux."""
    try:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return None


def seconds_of_theta(state: gradhpo.BilevelState) -> float:
    """The time of one fit of theta, after compilation."""
    optimizer, train_loss = make("HyperDistill", None)
    train, val = iterators()
    data = [train() for _ in range(STEPS)], val()
    return seconds(lambda: optimizer.estimate_theta(state, *data, train_loss, loss))


def job(algorithm: str, budget: float) -> dict:
    """After each episode: seconds, compilations of `step`, MiB, memory maps.

    No episode starts that would probably exceed `budget` seconds.
    """
    episodes: list[tuple[float, int, float | None, int | None]] = []
    began = time.perf_counter()
    theta = 0.0

    def note(episode: int, state: gradhpo.BilevelState) -> None:
        nonlocal theta
        jax.block_until_ready(state.params)
        now = time.perf_counter() - began - theta
        episodes.append((now, compiled["jit(step)"], resident_mib(), memory_maps()))
        if algorithm == "HyperDistill" and not theta:
            theta = seconds_of_theta(state)  # not part of the job
        ends = [0.0, *(episode[0] for episode in episodes)]
        if now + max(b - a for a, b in itertools.pairwise(ends)) > budget:
            raise Enough

    failed = ""
    try:
        # Greedy has no lr_hyper; the tutorial gives it Adam.
        prepare(algorithm, optax.adam(OUTER_RATE) if algorithm == "greedy" else None)(note)
    except Enough:
        pass
    except Exception as error:
        failed = f"{type(error).__name__}: {error}".splitlines()[0]
    peak = resident_mib("VmHWM")
    return {"episodes": episodes, "theta": theta, "peak": peak, "failed": failed}


@functools.cache
def prepared(algorithm: str) -> Callable[..., object]:
    return prepare(
        algorithm, optax.adam(OUTER_RATE) if algorithm == "greedy" else optax.sgd(decayed)
    )


def again(algorithm: str) -> dict:
    """The whole job with the outer rate inside an optax optimizer, hidden from `step`.

    Compiled programs are then reused in the next episode, and in the next job.
    """
    return {"seconds": seconds(prepared(algorithm)), "compiled": compiled["jit(step)"]}


def hypergradient(algorithm: str, at_step: int) -> list[list[float]]:
    """At step `at_step`: as `step` applies it, and as `compute_hypergradient` returns it."""
    greedy = algorithm == "greedy"
    optimizer, train_loss = make(algorithm, optax.sgd(1.0) if greedy else None)
    train, val = points(STEPS if greedy else at_step, same_batch=greedy)
    state = optimizer.init(*start(SPREAD))
    if algorithm == "HyperDistill":
        state = state.update(metadata={"theta": THETA})
    return read_hypergradient(optimizer, state, train_loss, train, val, greedy)


def greedy_of_the_tutorial() -> list[float]:
    """Greedy as the tutorial calls it: neither the losses nor the inner optimizer see the rates."""
    settings = {"unroll_steps": STEPS, "gamma": GAMMA}
    inner, outer = optax.sgd(OUTER_RATE), optax.adam(OUTER_RATE)
    optimizer = gradhpo.GreedyOptimizer(inner, outer, **settings)
    train, val = points(1, same_batch=True)
    state = optimizer.init(*start(SPREAD))
    return flat(optimizer.compute_hypergradient(state, train[0], val, loss, loss))


serve(
    job=job,
    again=again,
    hypergradient=hypergradient,
    greedy_of_the_tutorial=greedy_of_the_tutorial,
)
