"""The loop of a run: chunks of many steps, each one compiled scan."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.measured import without_aux
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.core.vanishing import explain_zeros
from gradhpo.core.wrapper import algorithm_of
from gradhpo.data.sources import Feed, as_source
from gradhpo.training.agreement import affordable, go_together
from gradhpo.training.callbacks import Callbacks
from gradhpo.training.checkpoint import Checkpoint
from gradhpo.training.chunk import chunk_shapes
from gradhpo.training.driver import Driver
from gradhpo.training.history import History
from gradhpo.training.identity import identity
from gradhpo.training.keeper import Keeper
from gradhpo.training.members import Shown
from gradhpo.training.recorded import check_monitored, check_record, recorded_names
from gradhpo.training.report import not_finite_at_first, write_report
from gradhpo.training.start import make_start
from gradhpo.training.stopping import Interrupts, Stopped
from gradhpo.utils.advice import on_nan_derivative, on_nan_loss
from gradhpo.utils.coordinates import num_coordinates
from gradhpo.utils.description import described
from gradhpo.utils.processes import check_alike, is_first, is_shared
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.settings import (
    check_count,
    check_episodes,
    check_outer_rate,
    check_rate_schedule,
    outer_rate,
)
from gradhpo.utils.sums import checksum
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import muted, warn, warn_once


# Numbers, batches of iterators and metrics move between host and device on purpose.
@jax.transfer_guard("allow")
@checked
def run(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    losses: LossFunctions,
    train_data: Any,
    val_data: Any,
    *,
    num_steps: int,
    steps_per_episode: int | None = None,
    reptile_rate: RealScalarLike = 1.0,
    lr_hyper: RealScalarLike | Callable | None = None,
    chunk_size: int = 100,
    callbacks: Sequence[Callable] = (),
    max_rejections: int = 10,
    progress: bool | str = True,
    checkpoint: str | Path | Checkpoint | None = None,
    record: Callable | None = None,
    start_fn: Callable | None = None,
    key: Array | None = None,
    data_sharding: NamedSharding | None = None,
) -> tuple[BilevelState, History]:
    r"""Runs many outer steps, as chunks of one compiled `lax.scan` each.

    Every step draws `optimizer.num_inner_steps` training batches (as a `BatchStack`) and one
    validation batch. Python runs only between chunks; the caller's state is left intact. Each chunk
    overwrites the state before it, as a donated scan does, unless something may still read that
    state: a callback, a checkpoint that is due, or `run` itself, which returns it after an
    `eqx.error_if` in a loss.

    **Arguments:**

    - `optimizer`, `state`: an optimizer, and a state from its `init` or from an earlier run, which
        is continued (batch numbers follow `state.step`).
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `train_data`, `val_data`: a traceable function `index -> batch` such as
        [`ArrayData`][gradhpo.ArrayData]; an iterator (see [`iterate`][gradhpo.iterate]); or a
        pytree of arrays, one batch for all steps.
    - `num_steps`: outer steps to take, at least 1, including the steps of a resumed checkpoint.
    - `steps_per_episode`: restart the inner problem after this number of steps, a divisor of
        `num_steps`. After each episode its initial parameters $\phi$ move towards its final ones
        $w$, $\phi \leftarrow \phi - r\,(\phi - w)$ with $r$ = `reptile_rate`; the next episode
        starts from $\phi$ with a new inner optimizer state, and the memory of the algorithm starts
        a new episode. `None` (the default): one long training.
    - `reptile_rate`: in [0, 1]. 1, the default, continues from $w$; 0 is a cold restart from where
        the run started. The state returned after whole episodes has been restarted too: its
        parameters are $\phi$. To get parameters trained with the final hyperparameters, run one
        more episode without `steps_per_episode`. A run that was stopped within an episode returns
        the state at that point.
    - `lr_hyper`: for `outer_optimizer=None`, a number or a traceable schedule `step -> rate`.
    - `chunk_size`: steps per compiled call, default 100, rounded down to whole episodes if one
        fits. An iterator's chunk is kept under 64 MiB (but holds a whole episode for an algorithm
        that looks ahead, [`OnlineHypergradientOptimizer`][gradhpo.OnlineHypergradientOptimizer]).
    - `callbacks`: called as `callback(state, metrics)` after each chunk, where `metrics` is a dict
        of arrays `[steps in the chunk]`; `True` stops the run, `False` and `None` continue it, and
        anything else is an error. A state stays valid after the call. A callback's method
        `end(state, history)`, if it has one, is called with what `run` returns, when everything is
        saved; `run` raises what it raises. Built-in:
        [`EarlyStopping`][gradhpo.EarlyStopping], [`BestState`][gradhpo.BestState],
        [`TimeLimit`][gradhpo.TimeLimit], [`JSONLinesLogger`][gradhpo.JSONLinesLogger],
        [`CSVLogger`][gradhpo.CSVLogger].
    - `max_rejections`: stop after this many consecutive steps were rejected as non-finite; default
        10.
    - `progress`: show a progress bar, default `True`; a string labels it.
    - `checkpoint`: a directory (or a [`Checkpoint`][gradhpo.Checkpoint]) to save the run in;
        default `None`. If it already holds a run, `run` resumes it, and the result is bit for bit
        that of an uninterrupted run; `state` must then be the state that the run started from.
    - `record`: a traceable function `state -> {name: array}`, evaluated after each outer update and
        stacked in the history, shape `[steps, ...]`; default `None`. Hyperparameters of shape `()`
        are recorded without it, as `hyperparams.decay`, or as `hyperparams` if there is only one.
    - `start_fn`, `key`: a traceable function `(key, hyperparams) -> params` for new parameters at
        the start of each episode, the first included, and the key from which every episode gets its
        own; default `None`. Hyperparameters that act in it (a learned initial point, the scale of
        an initialisation) are differentiated by methods that go back to the start of the episode,
        [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer] with `steps_per_episode=1` above all.
    - `data_sharding`: how the arrays of every batch are spread over devices, such as
        `NamedSharding(mesh, PartitionSpec("data"))`, which divides the examples; default `None`:
        every device gets whole batches, unless [`ArrayData`][gradhpo.ArrayData] or your function of
        the index spreads them. If several processes (`jax.distributed`) share the state, each
        passes its part of every batch, and with iterators this argument is required.

    **Returns:** `(state, history)`, see [`History`][gradhpo.History]. Ctrl-C also returns them,
    after at most two chunks that the device has already; a second Ctrl-C raises.

    **Raises:** `TypeError` or `ValueError` for misuse, before the first step is taken, and any
    failure within the first chunk. A later failure (an iterator, a callback, the device) ends the
    run: a warning says so, and `run` returns the state and history so far. If the device fails
    while overwriting the last state, they are the given state and an empty history.

    ```python
    train_loss = lambda w, h, batch: jnp.mean((w - h) ** 2 * batch)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    state, history = gradhpo.run(
        optimizer,
        optimizer.init(jnp.zeros(3), jnp.zeros(3)),
        gradhpo.LossFunctions(train_loss, val_loss),
        gradhpo.ArrayData(jnp.ones((10, 3)), batch_size=5, key=jax.random.key(0)),
        jnp.ones(3),
        num_steps=50,
        progress=False,
    )
    ```

    ??? cite "Reference"

        Episodes: Reptile, Nichol et al., *On First-Order Meta-Learning Algorithms*, 2018,
        arXiv:1803.02999.
    """
    check_count("num_steps", num_steps)
    check_count("chunk_size", chunk_size)
    check_count("max_rejections", max_rejections)
    check_episodes(num_steps, steps_per_episode, reptile_rate, int(state.step))
    check_outer_rate(optimizer, lr_hyper)
    if callable(lr_hyper):
        check_rate_schedule(lr_hyper)
    rate = lr_hyper if callable(lr_hyper) else outer_rate(lr_hyper)
    shared = is_shared(state)
    if shared:
        check_alike(
            num_steps=num_steps,
            chunk_size=chunk_size,
            steps_per_episode=steps_per_episode,
            reptile_rate=described(reptile_rate),
            lr_hyper="a function" if callable(rate) else described(rate),
            max_rejections=max_rejections,
            checkpoint=checkpoint is not None,
            key=key if key is None else f"checksum {checksum(key)}",
            optimizer=described(optimizer),
        )
    feed = Feed(
        as_source(train_data, "train_data", optimizer.num_inner_steps, data_sharding),
        as_source(val_data, "val_data", None, data_sharding),
    )
    if shared:
        feed.check_spread()
    missing = algorithm_of(optimizer).without_episodes
    if missing and steps_per_episode is None and is_first(shared):
        warn_once(missing)
    start = make_start(start_fn, key, state, optimizer, steps_per_episode, reptile_rate)
    watching = Callbacks(callbacks)
    names = check_record(optimizer, state, record)
    state = without_aux(state)
    check_monitored(watching.monitored, [*recorded_names(optimizer, state), *names])
    keeper = None
    if checkpoint is not None:
        settings = {"steps_per_episode": steps_per_episode, "reptile_rate": reptile_rate}
        settings |= {"record": ", ".join(names), "monitored": ", ".join(watching.monitored)}
        about = identity(optimizer, state, feed, lr_hyper=rate, start=start, **settings)
        keeper = Keeper(Checkpoint.of(checkpoint), about, shared)
    driver = Driver(
        optimizer=optimizer,
        losses=losses,
        rate=rate,
        record_fn=record,
        start_fn=start,
        steps_per_episode=steps_per_episode,
        reptile_rate=jnp.asarray(reptile_rate, jnp.result_type(float)),
        max_rejections=max_rejections,
        feed=feed,
        callbacks=watching,
        shows=Shown(optimizer.num_members is not None, frozenset([*names, *watching.monitored])),
        keeper=keeper,
        state=state,
    )
    started = time.perf_counter()
    # In any case, unused batches go back and the directory is released.
    with (
        contextlib.closing(feed),
        contextlib.closing(keeper) if keeper else contextlib.nullcontext(),
        muted(not is_first(shared)),
    ):
        driver.begin(num_steps)
        taken = driver.record.taken
        # An estimate from the batches of an episode cannot wait for later batches.
        whole = feed.from_host and optimizer.reads_ahead
        size = affordable(feed, chunk_size, shared)
        shapes = chunk_shapes(num_steps, size, steps_per_episode, whole, taken)
        shown = progress if is_first(shared) else False
        bar = ProgressBar(num_steps, done=taken, shown=shown, monitored=watching.monitored)
        with Interrupts() as interrupts, bar:
            if shared:
                ending = go_together(driver, shapes, bar, interrupts)
            else:
                ending = driver.go(shapes, bar, interrupts)
            driver.finish(ending)
    history = _history(driver, ending, num_steps, time.perf_counter() - started)
    watching.end(driver.state, history)
    return driver.state, history


def _history(driver: Driver, ending: Stopped, num_steps: int, seconds: float) -> History:
    """What the run has to report, with a warning if it did not end as intended."""
    record, metrics = driver.record, driver.record.metrics()
    remark = _remark(driver, metrics) if record.taken else ""
    unwritten = [] if driver.keeper is None else driver.keeper.failures
    inner = driver.state.inner_opt_state
    at_first = not_finite_at_first(record)
    advice = on_nan_derivative(inner), driver.refusal or on_nan_loss(inner, at_first)
    saved = None if driver.keeper is None else driver.keeper.saved_step
    behind = saved if saved != record.taken else None
    logs = driver.callbacks.unwritten
    alone = driver.optimizer is algorithm_of(driver.optimizer)
    examples = driver.feed.val_examples if alone and driver.optimizer.tunes else None
    said = write_report(
        ending,
        record,
        num_steps,
        seconds,
        remark,
        advice,
        unwritten,
        logs,
        behind,
        driver.callbacks.monitored,
        (examples, num_coordinates(driver.state.hyperparams)),
        driver.callbacks.why(ending.reason),
    )
    if driver.reptile_rate != 1 and record.taken % (driver.steps_per_episode or 1) == 0:
        said += " The parameters are those at the start of the next episode."
    said += driver.lost
    if driver.zeros:
        said += f" In every step, {explain_zeros(driver.optimizer, driver.state, driver.zeros)}."
    # A run that ends in refused steps has stopped moving: with fixed data, for good.
    stuck, unmeant = record.in_a_row > 0, ending.reason in ("rejected", "data exhausted")
    alarming = stuck or unmeant or ending.error or remark or unwritten or logs
    if alarming and is_first(driver.shared):
        warn(said, RuntimeWarning)
    return History(metrics, ending.reason, said, ending.error)


def _remark(driver: Driver, metrics: dict[str, np.ndarray]) -> str:
    """The algorithm's remarks. A failing report must not lose a completed run."""
    try:
        return driver.optimizer.remarks(driver.before, metrics, 1)
    except Exception as error:
        name = type(driver.optimizer).__name__
        return f"The remarks of {name} failed: {type(error).__name__}: {error}"
