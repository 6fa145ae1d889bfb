"""Callbacks that watch a run: the best state, when to stop early, how long to continue.

A callback with a memory has `start(state, resumed) -> memory`, called before the first step, and
the attribute `memory`, a pytree of arrays with a fixed structure: `run` sets it, checkpoints keep
it. A resumed run gives it back only to a callback with the same `identity`.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.state import BilevelState
from gradhpo.utils.description import described_function
from gradhpo.utils.processes import numbers
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import noted, warn


# Names of metrics for which higher is better, unless negated.
_IS_SCORE = re.compile(
    r"^(?!.*(neg|minus|error|loss)).*(\b|_)(acc|accuracy|auc|auroc|score|f1)(\b|_)"
)


def watched_value(
    metric: str | Callable[[BilevelState], Any],
    state: BilevelState,
    metrics: Mapping[str, np.ndarray],
    of: str,
) -> float:
    """A metric, or a function of the state, at the end of a chunk; `of` names the reader."""
    if callable(metric):
        with noted(f"metric of {of}, called as metric(state)"):
            return float(metric(state))
    if metric not in metrics:
        raise ValueError(
            f"metric={metric!r} is not a metric of this run; available: {', '.join(metrics)}"
        )
    return float(metrics[metric][-1])


class Best(eqx.Module):
    """The lowest value so far, its step, and the state after that step."""

    value: np.ndarray
    step: np.ndarray
    rejected: np.ndarray  # the metric, at the end of the last chunk
    state: BilevelState


class BestState:
    """Keeps the state with the lowest validation loss: a callback for `run`.

    Looks only at the ends of chunks, where the state that belongs to the last loss is known (its
    parameters; the hyperparameters are one outer update ahead). Non-finite values and rejected
    steps do not count.

    **Arguments:**

    - `metric`: the name of a metric, default `"val_loss"`, or a function `state -> number`. Lower
        is better: a loss on all validation data if batches are noisy, an error rate, minus an
        accuracy. A name such as `"accuracy"` gives a warning.

    **Afterwards:** `.state`, `.value` and `.step` (`None`, `inf` and 0 if nothing counted).

    **Raises:** `TypeError` for a `metric` that is neither; `ValueError`, within a run, for a name
    that is not one of its metrics.

    ```python
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    losses, best = gradhpo.LossFunctions(loss, loss), gradhpo.BestState()
    state, history = gradhpo.run(
        optimizer, optimizer.init(jnp.zeros(3), jnp.ones(3)), losses, jnp.ones(3), jnp.ones(3),
        num_steps=20, chunk_size=5, callbacks=[best], progress=False,
    )
    assert best.value == history["val_loss"][best.step - 1]
    ```
    """

    @checked
    def __init__(self, metric: str | Callable[[BilevelState], Any] = "val_loss"):
        if isinstance(metric, str) and _IS_SCORE.search(metric.lower()):
            warn(
                f"metric={metric!r} looks like a score, but the lowest value counts as the best: "
                'measure the error rate, or minus the score under another name ("minus_score")'
            )
        self._metric = metric
        self.memory: Best | None = None

    @property
    def watched(self) -> str:
        """What it looks at, in a message."""
        return (
            getattr(self._metric, "__name__", "metric") if callable(self._metric) else self._metric
        )

    def __repr__(self) -> str:
        if self.memory is None or self.step == 0:
            return f"BestState({self.watched}, nothing yet)"
        return f"BestState({self.watched}={self.value:.4g} at step {self.step})"

    @property
    def identity(self) -> Any:
        """What the memory is about."""
        metric = self._metric
        return {"metric": described_function(metric) if callable(metric) else metric}

    def start(self, state: BilevelState, resumed: bool) -> Best:
        """The memory before the first step."""
        rejected = np.asarray(np.min(numbers(state.metadata["rejected"])), np.float64)
        return Best(np.asarray(np.inf), np.asarray(0), rejected, state)

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> None:
        assert self.memory is not None  # `run` starts a callback first
        value, best = self._value(state, metrics), self.memory
        rejected = np.append(best.rejected, metrics["rejected"])
        if np.isfinite(value) and value < float(best.value) and rejected[-1] == rejected[-2]:
            best = Best(np.asarray(value), np.asarray(int(state.step)), best.rejected, state)
        self.memory = dataclasses.replace(best, rejected=np.asarray(rejected[-1]))

    def _value(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> float:
        return watched_value(self._metric, state, metrics, type(self).__name__)

    @property
    def state(self) -> BilevelState | None:
        """The state at the end of that chunk; `None` if nothing counted."""
        return None if self.memory is None or self.step == 0 else self.memory.state

    @property
    def value(self) -> float:
        """The lowest value, or `inf`."""
        return np.inf if self.memory is None else float(self.memory.value)

    @property
    def step(self) -> int:
        """The step of the lowest value, or 0."""
        return 0 if self.memory is None else int(self.memory.step)


class EarlyStopping:
    """Stops a run whose validation loss has not fallen for a while: a callback for `run`.

    **Arguments:**

    - `patience`: steps without a new lowest value after which the run stops (at the end of a
        chunk), at least 1. It looks once per chunk, so make it several times the `chunk_size` of
        the run.
    - `metric`: the name of a metric, default `"val_loss"`, or a function `state -> number`. Lower
        is better.
    - `min_delta`: by how much a value must be below the lowest one to count, default 0.

    **Afterwards:** `.best`, a [`BestState`][gradhpo.BestState], and `.stopped`. The `stop_reason`
    of the history is `"early stopping"`.

    **Raises:** `ValueError` for `patience < 1` or a negative `min_delta`, and within a run for a
    name that is not one of its metrics; `TypeError` for a `metric` of another kind.

    ```python
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    stopping = gradhpo.EarlyStopping(patience=20)
    state, history = gradhpo.run(
        optimizer, optimizer.init(jnp.ones(3), jnp.ones(3)), gradhpo.LossFunctions(loss, loss),
        jnp.ones(3), jnp.ones(3), num_steps=1_000, chunk_size=5, callbacks=[stopping],
        progress=False,
    )
    assert history.stop_reason == "early stopping" and stopping.best.step == 5
    ```
    """

    stop_reason = "early stopping"

    @checked
    def __init__(
        self,
        patience: int,
        metric: str | Callable[[BilevelState], Any] = "val_loss",
        min_delta: float | int = 0.0,
    ):
        check_count("patience", patience)
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta}")
        self._patience, self._min_delta = patience, min_delta
        self.best = BestState(metric)
        self._seen = np.asarray([np.inf, 0.0, 0.0])

    @property
    def identity(self) -> Any:
        """What the memory is about; patience and `min_delta` may change when a run is resumed."""
        return self.best.identity

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self._patience}, {self.best!r})"

    # The value and step that patience counts from, the last step seen, and the best state.

    @property
    def memory(self) -> PyTree:
        """What checkpoints keep."""
        return self._seen, self.best.memory

    @memory.setter
    def memory(self, memory: PyTree) -> None:
        self._seen, self.best.memory = memory

    def start(self, state: BilevelState, resumed: bool) -> PyTree:
        """The memory before the first step."""
        step = float(state.step)
        return np.asarray([np.inf, step, step]), self.best.start(state, resumed)

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> bool:
        self.best(state, metrics)
        value, since, _ = self._seen
        step = float(state.step)
        if self.best.value < value - self._min_delta:
            value, since = self.best.value, step
        self._seen = np.asarray([value, since, step])
        return self.stopped

    @property
    def why(self) -> str:
        """For the report."""
        best, waited = self.best, f"no lower {self.best.watched} in {self._patience} steps"
        if best.state is None:
            return f"EarlyStopping: {waited}, and no finite value at all."
        return (
            f"EarlyStopping: {waited}. The lowest was {best.value:.3g}, after step {best.step}; "
            ".best.state has that state."
        )

    @property
    def stopped(self) -> bool:
        """Whether patience has run out: a run that is resumed there does not continue."""
        _, since, step = self._seen
        return bool(step - since >= self._patience)


class TimeLimit:
    """Stops a run at the end of the first chunk after `seconds`: a callback for `run`.

    Counts from the start of each call of `run`, including compilation. A run with a checkpoint
    continues when it is called again, with the full time again. The `stop_reason` of the history is
    `"time limit"`.

    **Arguments:**

    - `seconds`: positive.

    **Raises:** `ValueError` for `seconds` that are not positive.

    ```python
    limit = gradhpo.TimeLimit(seconds=8 * 3600)
    ```
    """

    stop_reason = "time limit"

    @checked
    def __init__(self, seconds: float | int):
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self._seconds, self._started = seconds, time.monotonic()

    def start(self, state: BilevelState, resumed: bool) -> None:
        """The clock starts."""
        self._started = time.monotonic()

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> bool:
        return time.monotonic() - self._started >= self._seconds
