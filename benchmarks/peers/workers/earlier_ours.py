"""The job of the earlier package's tutorial with this library."""

import dataclasses
import functools
from collections.abc import Callable

import earlier_job
import jax
import optax
from earlier_formula import SPREAD, THETA, exact, points, read_hypergradient
from earlier_job import (
    BATCH_SIZE,
    EPISODES,
    ESTIMATION_PERIOD,
    GAMMA,
    OUTER_RATE,
    STEPS,
    count_compilations,
    decayed,
    loss,
    start,
    update,
)
from worker import resident_mib, seconds, serve

import gradhpo


compiled = count_compilations()
LOSSES = gradhpo.LossFunctions(loss, loss)


def rates_inside(rates: dict) -> optax.GradientTransformation:
    """`update` as an inner optimizer that depends on the hyperparameters."""
    scale = lambda gradient, _: jax.tree.map(lambda r, g: -jax.nn.softplus(r) * g, rates, gradient)
    return optax.stateless(scale)


def make(algorithm: str, **settings) -> gradhpo.BilevelOptimizer:
    adam = optax.adam(OUTER_RATE)
    if algorithm == "HyperDistill":
        settings = {"gamma": GAMMA, "estimation_period": ESTIMATION_PERIOD, **settings}
        return gradhpo.OnlineHypergradientOptimizer(memory_size=1, update_fn=update, **settings)
    if algorithm == "one step":
        return gradhpo.OneStepOptimizer(update_fn=update)
    if algorithm == "T1-T2":
        return gradhpo.T1T2Optimizer(perturb="hyperparams", update_fn=update, **settings)
    if algorithm == "T1-T2, weights":
        return gradhpo.T1T2Optimizer(rates_inside)
    return gradhpo.GreedyOptimizer(None, adam, unroll_steps=STEPS, gamma=GAMMA, update_fn=update)


@functools.cache
def prepared(algorithm: str) -> Callable[[], gradhpo.BilevelState]:
    """The whole job: 60 episodes in `gradhpo.run`, with its defaults."""
    optimizer = make(algorithm)
    greedy = algorithm == "greedy"
    data = [
        gradhpo.ArrayData(arrays, BATCH_SIZE, key, replacement=True, hold=hold)
        for arrays, key, hold in zip(
            earlier_job.arrays(), jax.random.split(jax.random.key(0)),
            (STEPS if greedy else 1, 1), strict=True,
        )
    ]  # fmt: skip
    steps = 1 if greedy else STEPS
    settings = {} if greedy else {"lr_hyper": decayed}
    state = optimizer.init(*start())

    def go() -> gradhpo.BilevelState:
        new, history = gradhpo.run(
            optimizer, state, LOSSES, *data, num_steps=EPISODES * steps, steps_per_episode=steps,
            progress=False, **settings,
        )  # fmt: skip
        assert history.stop_reason == "num_steps", history.report
        return jax.block_until_ready(new)

    return go


def job(algorithm: str) -> dict:
    """Seconds of a whole job, compilations of its chunk so far, and peak memory."""
    elapsed = seconds(lambda: prepared(algorithm)())
    return {
        "seconds": elapsed,
        "compiled": compiled["jit(run_episodes)"],
        "peak": resident_mib("VmHWM"),
    }


def hypergradient(algorithm: str, at_step: int) -> list[list[float]]:
    """At step `at_step`: as `step` applies it, and as `compute_hypergradient` returns it."""
    greedy = algorithm == "greedy"
    settings = {}
    if algorithm == "HyperDistill":
        settings = {"distillation_weight": THETA, "estimation_period": None}
    if algorithm == "T1-T2":
        settings = {"epsilon": 1e-4}  # as in 0.1.3
    optimizer = make(algorithm, **settings)
    if greedy:
        optimizer = dataclasses.replace(optimizer, outer_optimizer=optax.sgd(1.0))
    train, val = points(STEPS if greedy else at_step, same_batch=greedy)
    state = optimizer.init(*start(SPREAD))
    return read_hypergradient(optimizer, state, loss, train, val, greedy)


serve(job=job, hypergradient=hypergradient, exact=exact)
