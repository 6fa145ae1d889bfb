"""The loop that owns a run: chunks of many steps, each one compiled scan."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFunctions, RealScalarLike
from gradhpo.training.chunk import Chunk, chunk_shapes
from gradhpo.training.history import History
from gradhpo.training.report import Rejections, keeps_second_moments, report
from gradhpo.training.sources import Fetched, Host, as_source
from gradhpo.utils.logging import progress_bar
from gradhpo.utils.settings import check_count, check_episodes, check_outer_rate, outer_rate
from gradhpo.utils.typecheck import checked, warn, warn_once


# Batches of an iterator wait on the host for one chunk; more than this would only cost memory.
_MOST_BYTES_FETCHED = 64 * 2**20


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
    progress: bool = True,
) -> tuple[BilevelState, History]:
    r"""Runs many outer steps, as chunks of one compiled `lax.scan` each.

    Every step draws `optimizer.num_inner_steps` training batches (as a `BatchStack`) and one
    validation batch. Python runs between chunks only; the caller's state is left intact.

    **Arguments:**

    - `optimizer`, `state`: an optimizer, and a state from its `init` or from an earlier run,
        which is continued (batch numbers follow `state.step`).
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `train_data`, `val_data`: a traceable function `index -> batch` such as
        [`ArrayData`][gradhpo.ArrayData]; an iterator (see [`iterate`][gradhpo.iterate]); or a
        pytree of arrays, one batch for all steps.
    - `num_steps`: outer steps to take, at least 1.
    - `steps_per_episode`: restart the inner problem after so many steps, a divisor of
        `num_steps`: the parameters at the start of an episode move by
        $\phi \leftarrow \phi - \mathtt{reptile\_rate}\,(\phi - w)$ towards those at its end, all
        start again from $\phi$, with a new inner optimizer state, and the memory of the
        algorithm with a new episode. `None`: one long training.
    - `reptile_rate`: in [0, 1]. 1 goes on from $w$, 0 is a cold restart from where the run
        began. The state that is returned after whole episodes has been restarted too: its
        parameters are $\phi$. To have those of a training with the final hyperparameters, run
        one more episode without `steps_per_episode`. A run that was stopped within an episode
        returns the state as it stands.
    - `lr_hyper`: for `outer_optimizer=None`, a number or a traceable schedule `step -> rate`.
    - `chunk_size`: steps per compiled call, rounded down to whole episodes where one fits. An
        iterator's chunk is kept under 64 MiB (but holds a whole episode for an algorithm that
        looks ahead, [`OnlineHypergradientOptimizer`][gradhpo.OnlineHypergradientOptimizer]).
    - `callbacks`: called as `callback(state, metrics)` after each chunk, `metrics` being a dict
        of arrays `[steps in the chunk]`; one that returns `True` stops the run.
    - `max_rejections`: stop after so many steps in a row were rejected as non-finite.
    - `progress`: show a progress bar.

    **Returns:** `(state, history)`, see [`History`][gradhpo.History].

    **Raises:** `TypeError` or `ValueError` for misuse, before the first step is taken. What
    fails later (an iterator) ends the run: state and history so far are returned.

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
    """
    check_count("num_steps", num_steps)
    check_count("chunk_size", chunk_size)
    check_count("max_rejections", max_rejections)
    check_episodes(num_steps, steps_per_episode, reptile_rate, int(state.step))
    check_outer_rate(optimizer.outer_optimizer is not None, lr_hyper)
    rate = lr_hyper if callable(lr_hyper) else outer_rate(lr_hyper)
    train = as_source(train_data, "train_data", optimizer.num_inner_steps)
    val = as_source(val_data, "val_data", None)
    hosts = [source for source in (train, val) if isinstance(source, Host)]
    if hosts:
        needed = sum(host.bytes_per_step() for host in hosts)
        chunk_size = max(1, min(chunk_size, _MOST_BYTES_FETCHED // max(needed, 1)))
    if optimizer._reads_ahead and steps_per_episode is None:
        warn_once(
            "run without steps_per_episode never fits the theta of OnlineHypergradientOptimizer, "
            "which happens where an episode begins: pass steps_per_episode, or estimation_period="
            "None to the optimizer if distillation_weight (or your own estimate_theta) is meant"
        )
    # An estimate from the batches of an episode cannot wait for those that are still to come.
    whole = bool(hosts) and optimizer._reads_ahead
    shapes = chunk_shapes(num_steps, chunk_size, steps_per_episode, whole)

    recorded: list[dict[str, np.ndarray]] = []
    rejections = Rejections(float(state.metadata["rejected"]), max_rejections)
    stop_reason, data_error, taken, started = "num_steps", "", 0, time.perf_counter()
    before = optimizer._scalars(state.memory)
    start = eqx.filter(state.params, eqx.is_inexact_array)
    reptile = jnp.asarray(reptile_rate, jnp.result_type(float))
    with progress_bar(num_steps, shown=progress) as bar:
        for episodes, length in shapes:
            wanted = episodes * length
            try:
                fetched_train, fetched_val, available = _fetch(train, val, wanted)
            except Exception as error:
                # A loader that fails in the night must not take the run with it.
                if not recorded:
                    raise
                stop_reason, data_error = "data error", f"{type(error).__name__}: {error}"
                break
            exhausted = available < wanted
            if exhausted and steps_per_episode is None:
                length = available
            elif exhausted:
                episodes = available // length
            if episodes * length:
                chunk = Chunk(optimizer, losses, fetched_train, fetched_val, rate)
                if steps_per_episode is None:
                    state, stacked = chunk.run_steps(state, length)
                else:
                    state, start, stacked = chunk.run_episodes(
                        state, start, reptile, episodes, length, steps_per_episode
                    )
                metrics = {name: np.asarray(values) for name, values in stacked.items()}
                recorded.append(metrics)
                taken += episodes * length
                bar.advance(episodes * length, metrics)
                rejections.count(metrics)
                # All are called: a logger after the one that stops must not miss a chunk.
                if any([_is_true(callback(state, metrics)) for callback in callbacks]):
                    stop_reason = "callback"
                    break
                if rejections.too_many:
                    stop_reason = "rejected"
                    break
            if exhausted:
                stop_reason = "data exhausted"
                break
    if not recorded:
        raise ValueError(
            "the data iterators end before the first step (with an algorithm that looks ahead, the "
            "first episode) has all its batches"
        )
    metrics = {name: np.concatenate([m[name] for m in recorded]) for name in recorded[0]}
    seconds = time.perf_counter() - started
    restarted = reptile_rate != 1 and taken % (steps_per_episode or 1) == 0
    remark = optimizer._remarks(before, metrics)
    like_adam = keeps_second_moments(state.inner_opt_state)
    said = report(stop_reason, taken, num_steps, seconds, rejections, data_error, remark, like_adam)
    if restarted:
        said += " The parameters are those that the next episode starts from."
    # A run that ends in refused steps has stopped moving: with fixed data, for good.
    stuck = rejections.in_a_row > 0
    if stop_reason in ("rejected", "data exhausted", "data error") or remark or stuck:
        warn(said, RuntimeWarning)
    return state, History(metrics, stop_reason, said)


def _is_true(answer: Any) -> bool:
    """Whether a callback said `True`; comparisons of metrics say it as a NumPy boolean."""
    return isinstance(answer, (bool, np.bool_, jax.Array)) and bool(np.all(answer))


def _fetch(train: Any, val: Any, length: int) -> tuple[Any, Any, int]:
    """What the chunk sees of both sources, and how many steps they suffice for."""
    train, train_steps = train.fetch(length) if isinstance(train, Host) else (train, length)
    val, val_steps = val.fetch(length) if isinstance(val, Host) else (val, length)
    available = min(train_steps, val_steps)
    cut = lambda source: (
        jax.tree.map(lambda x: x[:available], source) if isinstance(source, Fetched) else source
    )
    return cut(train), cut(val), available
