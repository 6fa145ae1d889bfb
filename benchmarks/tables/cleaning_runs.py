"""One run of data cleaning: a method, its losses, and measurements of the weights it finds."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from sklearn.metrics import roc_auc_score

import gradhpo
from benchmarks.tables.cleaning_data import (
    TRAIN,
    Data,
    Network,
    accuracy,
    cross_entropy,
    load_data,
    val_loss,
)


HORIZON, OUTER_STEPS = 10, 200
RATE, MOMENTUM, OUTER_RATE, GAMMA, TERMS = 0.1, 0.9, 0.1, 0.9, 6
INNER = optax.sgd(RATE, momentum=MOMENTUM)
NONE, LAST, IMPLICIT, GREEDY = "no tuning", "T1-T2", "IFT(5)", "greedy"
EXACT, LINE, DISTILLED = "exact", "DrMAD", "HyperDistill"
SETTINGS = "scale", "normalised", "horizon", "momentum"  # of a row, beside its method
START = 0.5  # of every weight: the sigmoid of 0


def weighted_loss(net: Network, hyperparams: Array, batch: tuple) -> Array:
    """The mean of weighted losses, times the scale in the batch: 1,000 makes it the sum."""
    examples, scale = batch
    return scale * jnp.mean(jax.nn.sigmoid(hyperparams) * cross_entropy(net, examples))


def normalised_loss(net: Network, hyperparams: Array, batch: tuple) -> Array:
    """With weights whose mean stays where it was: they cannot shrink or grow as a whole."""
    examples, scale = batch
    weights = jax.nn.sigmoid(hyperparams)
    weights = START * weights / jnp.mean(weights)
    return scale * jnp.mean(weights * cross_entropy(net, examples))


LOSSES = {
    False: gradhpo.LossFunctions(weighted_loss, val_loss),
    True: gradhpo.LossFunctions(normalised_loss, val_loss),
}


@functools.cache  # so that each program compiles once
def optimizer_of(method: str, horizon: int, momentum: float) -> gradhpo.BilevelOptimizer:
    """With `horizon` inner steps in one outer step, whose rate is in proportion to it."""
    inner = INNER if momentum == MOMENTUM else optax.sgd(RATE, momentum=momentum or None)
    outer = optax.adam(OUTER_RATE * horizon / HORIZON)
    if method == NONE:
        return gradhpo.FixedOptimizer(inner, inner_steps=horizon)
    if method == LAST:
        return gradhpo.T1T2Optimizer(inner, outer, inner_steps=horizon)
    if method == IMPLICIT:
        terms = gradhpo.Neumann(TERMS, RATE)
        return gradhpo.ImplicitOptimizer(inner, outer, terms, inner_steps=horizon)
    if method == GREEDY:
        return gradhpo.GreedyOptimizer(inner, outer, unroll_steps=horizon, gamma=GAMMA)
    if method == EXACT:
        return gradhpo.UnrolledOptimizer(inner, outer, unroll_steps=horizon)
    if method == LINE:
        return gradhpo.DrMADOptimizer(inner, outer, unroll_steps=horizon)
    # An outer step for every inner one, each a tenth as long.
    assert method == DISTILLED
    return gradhpo.OnlineHypergradientOptimizer(inner, optax.adam(OUTER_RATE / HORIZON))


def mean_weight(state: gradhpo.BilevelState) -> dict[str, Array]:
    return {"mean_weight": jnp.mean(jax.nn.sigmoid(state.hyperparams))}


def trained(
    method: str,
    data: Data,
    seed: int,
    hyperparams: Array,
    *,
    scale: float = 1.0,
    normalised: bool = False,
    horizon: int = HORIZON,
    momentum: float = MOMENTUM,
    steps: int = HORIZON * OUTER_STEPS,
) -> tuple[gradhpo.BilevelState, gradhpo.History, float]:
    """The state after `steps` inner steps, what was recorded, and seconds of the processor.

    The seconds are twice the second half's: the first half compiles.
    """
    optimizer = optimizer_of(method, horizon, momentum)
    count = round(steps / optimizer.num_inner_steps)
    clock: list[float] = []
    state, history = gradhpo.run(
        optimizer,
        optimizer.init(Network(jax.random.key(seed)), hyperparams),
        LOSSES[normalised],
        (data.train, jnp.float32(scale)),
        data.val,
        num_steps=count,
        chunk_size=count // 2,
        callbacks=[lambda state, metrics: clock.append(time.process_time())],
        record=mean_weight,
        progress=False,
    )
    return state, history, 2 * (clock[1] - clock[0])


def row_of(wanted: Mapping[str, Any], steps: int = HORIZON * OUTER_STEPS) -> dict[str, Any]:
    """What the tables show of one run, and 21 points along the way."""
    data = load_data(wanted["noise"], wanted["seed"])
    settings: dict[str, Any] = {name: wanted[name] for name in SETTINGS if name in wanted}
    start = jnp.zeros(TRAIN, jnp.float32)
    settings["steps"] = steps
    state, history, seconds = trained(wanted["method"], data, wanted["seed"], start, **settings)
    weights = np.asarray(jax.nn.sigmoid(state.hyperparams))
    at = np.linspace(0, len(history["val_loss"]) - 1, 21).round().astype(int)
    row: dict[str, Any] = {
        "val": float(accuracy(state.params, data.val)),
        "test": float(accuracy(state.params, data.test)),
        "best_val": float(np.max(history["val_accuracy"])),
        "auroc": float(roc_auc_score(~data.wrong, weights)) if np.ptp(weights) else 0.5,
        "right": float(weights[~data.wrong].mean()),
        "wrong": float(weights[data.wrong].mean()),
        "fitted_wrong": float(_fitted(state, data)),
        "cpu_seconds": round(seconds, 1),
    }
    for name in ("mean_weight", "train_loss", "val_loss", "val_accuracy"):
        row[f"{name}s"] = [round(float(x), 4) for x in history[name][at]]
    if wanted.get("again"):
        row |= _again(data, wanted["seed"], state.hyperparams, settings)
    return row


def _fitted(state: gradhpo.BilevelState, data: Data) -> float:
    """The share of wrong labels that the network has memorised."""
    (x, y), wrong = data.train, data.wrong
    return float(accuracy(state.params, (x[..., wrong], y[wrong]))) if wrong.any() else 0.0


def _again(data: Data, seed: int, hyperparams: Array, settings: dict[str, Any]) -> dict[str, float]:
    """Accuracies from the same start, with the weights as they ended, and at a mean of 0.5."""
    found = {}
    for name, normalised in (("again", False), ("again_normalised", True)):
        given = settings | {"normalised": normalised, "horizon": HORIZON}
        state, history, _ = trained(NONE, data, seed, hyperparams, **given)
        found[f"{name}_test"] = float(accuracy(state.params, data.test))
        found[f"{name}_best"] = float(np.max(history["val_accuracy"]))
    return found
