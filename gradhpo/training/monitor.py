"""Functions of the state that a run evaluates after each chunk, in its history like a metric."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradhpo.core.state import BilevelState
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import noted


class Monitor:
    """Measures functions of the state after each chunk: a callback for `run`.

    Values appear in the history, in logs and in the progress bar under their names, one for each
    step: `nan` except where a chunk ended. `run` evaluates monitors before all other callbacks, so
    that [`EarlyStopping`][gradhpo.EarlyStopping] and [`BestState`][gradhpo.BestState] can watch
    them by name. `run(chunk_size=10)` sets how often it measures.

    For a third data set, whose loss is not minimised: put `loss` or `error` into its name
    (`"third_loss"`), and the report of the run says when it rises while the validation loss falls.
    It ignores values under other names, which may be better when they are higher.

    **Arguments:**

    - `functions`: name to a function `state -> number`. Compile what is expensive: `jax.jit`, or
        `eqx.filter_jit` for models. With `TaskBatched` the state has a task axis.

    **Raises:** `ValueError` for no functions; `TypeError` for one that is not a function. When
    `run` starts, `ValueError` for a name that is recorded already. Within a run, any error that a
    function raises, and `TypeError` for a value that is not a number, end the run as a callback
    does.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    test = gradhpo.Monitor({"test_loss": lambda state: jnp.sum((state.params - 0.9) ** 2)})
    stopping = gradhpo.EarlyStopping(patience=20, metric="test_loss")
    state, history = gradhpo.run(
        optimizer, optimizer.init(jnp.zeros(3), jnp.zeros(3)),
        gradhpo.LossFunctions(train_loss, val_loss), None, None,
        num_steps=500, chunk_size=10, callbacks=[test, stopping], progress=False,
    )
    assert history.stop_reason == "early stopping"
    print(history["test_loss"][9::10])  # at the ends of chunks
    ```
    """

    @checked
    def __init__(self, functions: Mapping[str, Callable[[BilevelState], Any]]):
        if not functions:
            raise ValueError('functions is empty: write Monitor({"test_loss": test_loss})')
        self._functions = dict(functions)

    def __repr__(self) -> str:
        return f"Monitor({', '.join(self._functions)})"

    @property
    def names(self) -> list[str]:
        """What it measures."""
        return list(self._functions)

    def measure(self, state: BilevelState) -> dict[str, float]:
        """The values at a state."""
        measured = {}
        for name, function in self._functions.items():
            with noted(f"Monitor {name!r}, called as function(state)"):
                value = function(state)
            measured[name] = _number(name, value)
        return measured

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> None:
        """Does nothing: `run` has measured already."""


def _number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind not in "fiub":
        if array.ndim and array.dtype != object:
            found = f"numbers of shape {array.shape}"
        else:
            found = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
        raise TypeError(f"Monitor: {name!r} returned {found}; return one real number")
    return float(array)
