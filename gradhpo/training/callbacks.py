"""The callbacks of a run together: started, called, asked whether to stop, and restored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.state import BilevelState
from gradhpo.training.monitor import Monitor
from gradhpo.utils.validation import check_arity


class Callbacks:
    """Functions `(state, metrics) -> bool | None`.

    A callback with a memory also has `start(state, resumed) -> memory` and the attribute `memory`,
    a pytree of arrays with a fixed structure. It may have `stopped`, whether it has stopped the run
    for good, and `stop_reason`.
    """

    def __init__(self, callbacks: Sequence[Callable]):
        for number, callback in enumerate(callbacks):
            if not callable(callback) or isinstance(callback, type):
                name = getattr(callback, "__name__", "")
                hint = f"; make one of it: callbacks=[gradhpo.{name}(...)]"
                raise TypeError(
                    f"callbacks[{number}] must be a function (state, metrics) -> bool | None, got "
                    f"{callback!r}{hint if isinstance(callback, type) else ''}"
                )
            check_arity(callback, f"callbacks[{number}]", "state, metrics")
            if hasattr(callback, "memory") and not callable(getattr(callback, "start", None)):
                raise TypeError(
                    f"callbacks[{number}] has the attribute memory, which run keeps in checkpoints,"
                    " and no method start(state, resumed) that returns the first one: add it, or "
                    "rename the attribute"
                )
        self._all: list[Any] = list(callbacks)
        self._monitors = [callback for callback in self._all if isinstance(callback, Monitor)]
        self._remembering = [callback for callback in self._all if hasattr(callback, "memory")]

    @property
    def names(self) -> list[str]:
        """Callbacks with a memory, by their classes."""
        return [type(callback).__name__ for callback in self._remembering]

    def start(self, state: BilevelState, resumed: bool) -> None:
        """Before the first step, or before continuing the steps of an earlier session."""
        for callback in self._all:
            if hasattr(callback, "memory"):
                callback.memory = callback.start(state, resumed)
            elif callable(getattr(callback, "start", None)):
                callback.start(state, resumed)
        self._kinds = [_kind(memory) for memory in self.memory]

    @property
    def remembering(self) -> list[Any]:
        """Callbacks with a memory."""
        return list(self._remembering)

    @property
    def memory(self) -> list[PyTree]:
        """What they remember."""
        return [callback.memory for callback in self._remembering]

    @property
    def monitored(self) -> list[str]:
        """The names of what monitors measure."""
        return [name for monitor in self._monitors for name in monitor.names]

    def measure(self, state: BilevelState) -> tuple[dict[str, float], Exception | None]:
        """What monitors measure at the end of a chunk, `nan` for what failed; and the failure."""
        values: dict[str, float] = dict.fromkeys(self.monitored, np.nan)
        for monitor in self._monitors:
            try:
                values |= monitor.measure(state)
            except Exception as error:
                return values, error
        return values, None

    def stopped(self) -> str | None:
        """Why a resumed run has nothing left to do."""
        return next((_reason(c) for c in self._all if getattr(c, "stopped", False)), None)

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> str | None:
        """Calls all of them, since a logger after the one that stops must not miss a chunk."""
        # Each gets its own dict to add to.
        answers = [_is_true(callback(state, dict(metrics))) for callback in self._all]
        for callback, kind in zip(self._remembering, self._kinds, strict=True):
            if _kind(callback.memory) != kind:
                raise TypeError(
                    f"the memory of {type(callback).__name__} has changed its structure, shapes or "
                    f"dtypes since start(state, resumed): it was {kind}, and is "
                    f"{_kind(callback.memory)}; checkpoints need one structure"
                )
        stopping = [c for c, stops in zip(self._all, answers, strict=True) if stops]
        return _reason(stopping[0]) if stopping else None


def _kind(memory: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(memory)
    return treedef, [(x.shape, x.dtype) if eqx.is_array(x) else type(x) for x in leaves]


def _reason(callback: Any) -> str:
    return getattr(callback, "stop_reason", "callback")


def _is_true(answer: Any) -> bool:
    """Whether a callback returned `True`; comparisons of metrics return a NumPy boolean."""
    return isinstance(answer, (bool, np.bool_, jax.Array)) and bool(np.all(answer))
