"""The loop that owns a run: chunks of many steps, each one compiled scan."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer, advance
from gradhpo.core.state import METRICS, BilevelState
from gradhpo.core.types import LossFunctions, RealScalarLike
from gradhpo.training.data import Fetched, Host, as_source
from gradhpo.training.history import History
from gradhpo.utils.logging import progress_bar
from gradhpo.utils.tracing import record_trace
from gradhpo.utils.typecheck import checked, warn
from gradhpo.utils.validation import check_count, check_outer_rate, outer_rate


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
    lr_hyper: RealScalarLike | Callable | None = None,
    chunk_size: int = 100,
    callbacks: Sequence[Callable] = (),
    max_rejections: int = 10,
    progress: bool = True,
) -> tuple[BilevelState, History]:
    """Runs many outer steps, as chunks of one compiled `lax.scan` each.

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
    - `lr_hyper`: for `outer_optimizer=None`, a number or a traceable schedule `step -> rate`.
    - `chunk_size`: steps per compiled call. An iterator's chunk is kept under 64 MiB.
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
    check_outer_rate(optimizer.outer_optimizer is not None, lr_hyper)
    rate = lr_hyper if callable(lr_hyper) else outer_rate(lr_hyper)
    train = as_source(train_data, "train_data", optimizer.num_inner_steps)
    val = as_source(val_data, "val_data", None)
    hosts = [source for source in (train, val) if isinstance(source, Host)]
    if hosts:
        needed = sum(host.bytes_per_step() for host in hosts)
        chunk_size = max(1, min(chunk_size, _MOST_BYTES_FETCHED // max(needed, 1)))

    recorded: list[dict[str, np.ndarray]] = []
    rejections = _Rejections(float(state.metadata["rejected"]), max_rejections)
    stop_reason, data_error, taken, started = "num_steps", "", 0, time.perf_counter()
    with progress_bar(num_steps, shown=progress) as bar:
        while taken < num_steps:
            length = min(chunk_size, num_steps - taken)
            try:
                fetched_train, fetched_val, available = _fetch(train, val, length)
            except Exception as error:
                # A loader that fails in the night must not take the run with it.
                if not recorded:
                    raise
                stop_reason, data_error = "data error", f"{type(error).__name__}: {error}"
                break
            if available:
                state, stacked = _run_chunk(
                    optimizer, state, losses, fetched_train, fetched_val, rate, available
                )
                metrics = {name: np.asarray(values) for name, values in stacked.items()}
                recorded.append(metrics)
                taken += available
                bar.advance(available, metrics)
                rejections.count(metrics["rejected"])
                # All are called: a logger after the one that stops must not miss a chunk.
                if any([_is_true(callback(state, metrics)) for callback in callbacks]):
                    stop_reason = "callback"
                    break
                if rejections.too_many:
                    stop_reason = "rejected"
                    break
            if available < length:
                stop_reason = "data exhausted"
                break
    if not recorded:
        raise ValueError("the data iterators end before the first step has all its batches")
    metrics = {name: np.concatenate([m[name] for m in recorded]) for name in recorded[0]}
    seconds = time.perf_counter() - started
    report = _report(stop_reason, taken, num_steps, seconds, rejections, data_error)
    if stop_reason in ("rejected", "data exhausted", "data error"):
        warn(report, RuntimeWarning)
    return state, History(metrics, stop_reason, report)


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


@eqx.filter_jit
def _run_chunk(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    losses: LossFunctions,
    train: Any,
    val: Any,
    lr_hyper: Callable | Array | None,
    length: int,
) -> tuple[BilevelState, dict[str, Array]]:
    """`length` outer steps, and their metrics stacked."""
    record_trace(
        f"run (chunks of {length})",
        optimizer,
        state,
        losses.train_loss,
        losses.val_loss,
        train_data=train,
        val_data=val,
        lr_hyper=lr_hyper,
    )
    # The metrics of a step are outputs, not inputs of the next: carrying them as well makes
    # the compiler copy them at every step (20 us on a CPU, a fifth of a short step).
    measured = {name: state.metadata[name] for name in METRICS if name != "rejected"}
    arrays, static = eqx.partition(_without(state, measured), eqx.is_array)

    def body(arrays: PyTree, position: Array):
        state = eqx.combine(arrays, static).update(metadata=measured)
        new = advance(
            optimizer,
            state,
            train.stack(state.step, position, optimizer.num_inner_steps),
            val.batch(state.step, position),
            losses.train_loss,
            losses.val_loss,
            outer_rate(lr_hyper(state.step) if callable(lr_hyper) else lr_hyper),
        )
        metrics = {
            name: value
            for name, value in new.metadata.items()
            if eqx.is_inexact_array(value) and value.shape == ()
        }
        return eqx.filter(_without(new, measured), eqx.is_array), metrics

    arrays, metrics = jax.lax.scan(body, arrays, jnp.arange(length))
    last = {name: metrics[name][-1] for name in measured}
    return eqx.combine(arrays, static).update(metadata=last), metrics


def _without(state: BilevelState, names: Iterable[str]) -> BilevelState:
    kept = {name: value for name, value in state.metadata.items() if name not in names}
    return dataclasses.replace(state, metadata=kept)


class _Rejections:
    """Counts rejected steps, and those in a row."""

    def __init__(self, before: float, most_in_a_row: int):
        self._last, self._most = before, most_in_a_row
        self.total, self.in_a_row, self.longest = 0, 0, 0

    @property
    def too_many(self) -> bool:
        return self.longest >= self._most

    def count(self, cumulative: np.ndarray) -> None:
        for value in cumulative:
            rejected = value > self._last
            self._last = value
            self.total += int(rejected)
            self.in_a_row = self.in_a_row + 1 if rejected else 0
            self.longest = max(self.longest, self.in_a_row)


def _report(
    stop_reason: str,
    taken: int,
    num_steps: int,
    seconds: float,
    rejections: _Rejections,
    data_error: str,
) -> str:
    why = {
        "num_steps": "All steps were taken.",
        "callback": "A callback stopped the run.",
        "data error": f"A data source failed: {data_error}",
        "data exhausted": (
            "An iterator ended; gradhpo.iterate(loader) starts a loader again at its end."
        ),
        "rejected": (
            f"{rejections.longest} steps in a row came out non-finite and were rejected: they left "
            "no trace in the state. Usual causes: a learning rate too high (inner or "
            "outer), NaN in the data, or Adam's square root at a gradient of exactly 0 (use "
            "optax.adam(..., eps_root=1e-16))."
        ),
    }[stop_reason]
    return (
        f"{taken} of {num_steps} steps in {seconds:.1f} s, {rejections.total} rejected as "
        f"non-finite. {why}"
    )
