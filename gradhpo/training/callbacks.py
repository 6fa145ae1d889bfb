"""The callbacks of a run together: started, called, asked whether to stop, and restored."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.measured import without_aux_in
from gradhpo.core.state import BilevelState
from gradhpo.training.history import History
from gradhpo.training.monitor import Monitor
from gradhpo.utils.description import differences, shown
from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import check_arity
from gradhpo.utils.warn import noted


class Callbacks:
    """Functions `(state, metrics) -> bool | None`.

    A callback with a memory also has `start(state, resumed) -> memory` and the attribute `memory`,
    a pytree of arrays with a fixed structure. It may have `identity`, which distinguishes its
    memory from other memories of its class; `stopped`, whether it has stopped the run for good;
    `stop_reason`; `why`, the report's explanation of the stop; `reads_states`, false if it reads
    only scalars and never stops a run, so that the run keeps no state for it; and a method
    `end(state, history)`, called with what `run` is about to return.
    """

    def __init__(self, callbacks: Sequence[Callable]):
        for number, callback in enumerate(callbacks):
            if not callable(callback) or isinstance(callback, type):
                name = getattr(callback, "__name__", "")
                hint = f"; create an instance: callbacks=[gradhpo.{name}(...)]"
                raise TypeError(
                    f"callbacks[{number}] must be a function (state, metrics) -> bool | None, got "
                    f"{callback!r}{hint if isinstance(callback, type) else ''}"
                )
            check_arity(callback, f"callbacks[{number}]", "state, metrics")
            if hasattr(callback, "memory") and not callable(getattr(callback, "start", None)):
                raise TypeError(
                    f"callbacks[{number}] has the attribute memory, which run keeps in checkpoints,"
                    " but no method start(state, resumed) that returns its first value: add it, or "
                    "rename the attribute"
                )
        self._all: list[Any] = list(callbacks)
        self._monitors = [callback for callback in self._all if isinstance(callback, Monitor)]
        self._remembering = [callback for callback in self._all if hasattr(callback, "memory")]
        self._identities = [_identity(callback) for callback in self._remembering]

    @property
    def identities(self) -> list[dict[str, Any]]:
        """What distinguishes the callbacks with a memory, as JSON can hold it."""
        return self._identities

    def start(self, state: BilevelState, resumed: bool) -> None:
        """Before the first step, or before continuing the steps of an earlier session."""
        for callback in self._all:
            if hasattr(callback, "memory"):
                callback.memory = callback.start(state, resumed)
                _check_can_be_kept(callback)
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

    def remember(self, change: Callable[[PyTree], PyTree]) -> None:
        """Changes what they remember."""
        for callback in self._remembering:
            callback.memory = change(callback.memory)

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

    @property
    def read_states(self) -> bool:
        """Whether one may read the states that it is given, keep them, or stop at one."""
        return any(getattr(callback, "reads_states", True) for callback in self._all)

    @property
    def unwritten(self) -> list[str]:
        """What loggers could not write, for the report."""
        said = (getattr(callback, "unwritten", None) for callback in self._all)
        return [text for text in said if isinstance(text, str)]

    def stopped(self) -> str | None:
        """Why a resumed run has nothing left to do."""
        return next((_reason(c) for c in self._all if getattr(c, "stopped", False)), None)

    def why(self, reason: str) -> str | None:
        """The explanation of the callback that stopped a run."""
        stopping = [c for c in self._all if getattr(c, "stopped", False) and _reason(c) == reason]
        said = getattr(stopping[0], "why", None) if stopping else None
        return said if isinstance(said, str) else None

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> str | None:
        """Calls all of them, since a logger after the one that stops must not miss a chunk."""
        # Each gets its own dict to add to.
        answers = []
        for number, callback in enumerate(self._all):
            with noted(f"callbacks[{number}] ({_name(callback)}), called as (state, metrics)"):
                answers.append(callback(state, dict(metrics)))
        for callback, kind in zip(self._remembering, self._kinds, strict=True):
            if _kind(callback.memory) != kind:
                raise TypeError(
                    f"the memory of {type(callback).__name__} has changed its structure, shapes or "
                    f"dtypes since start(state, resumed): it was {kind}, and is "
                    f"{_kind(callback.memory)}; checkpoints need one structure"
                )
        stops = [self._stops(number, answer) for number, answer in enumerate(answers)]
        stopping = [c for c, stop in zip(self._all, stops, strict=True) if stop]
        return _reason(stopping[0]) if stopping else None

    def end(self, state: BilevelState, history: History) -> None:
        """Called last: all are called, and then `run` raises what one of them raised."""
        _end([c for c in self._all if callable(getattr(c, "end", None))], state, history)

    def _stops(self, number: int, answer: Any) -> bool:
        """Accepts NumPy's and JAX's booleans, which comparisons of metrics and states give."""
        if answer is None:
            return False
        is_boolean = isinstance(answer, bool) or (
            isinstance(answer, (np.bool_, np.ndarray, jax.Array))
            and answer.dtype == bool
            and answer.shape == ()
        )
        if not is_boolean:
            which = f"callbacks[{number}] ({_name(self._all[number])})"
            raise TypeError(
                f"{which} returned {_short(answer)}: return True to stop the run, and False or "
                "None to continue; measurements belong in extra= of a logger, or in metric= of "
                "gradhpo.BestState or gradhpo.EarlyStopping"
            )
        return bool(answer)


def _end(callbacks: list[Any], state: BilevelState, history: History) -> None:
    if callbacks:
        try:
            callbacks[0].end(state, history)
        finally:
            _end(callbacks[1:], state, history)


def _name(callback: Any) -> str:
    return getattr(callback, "__name__", type(callback).__name__)


def _identity(callback: Any) -> dict[str, Any]:
    kind, own = type(callback).__name__, getattr(callback, "identity", None)
    try:
        return {"kind": kind, "identity": json.loads(json.dumps(own))}
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the attribute identity of {kind} must consist of numbers and strings, which JSON can "
            f"hold ({error}): it distinguishes the memories of two callbacks of the same class"
        ) from None


def called(identity: Mapping[str, Any]) -> str:
    """A callback as a message names it: `BestState(metric=val_loss)`."""
    kind, own = identity["kind"], identity["identity"]
    if own is None:
        return kind
    parts = own.items() if isinstance(own, dict) else [("identity", own)]
    return f"{kind}({', '.join(f'{name}={shown(value)}' for name, value in parts)})"


def are_one(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two callbacks have the same memory."""
    return a["kind"] == b["kind"] and not differences(a["identity"], b["identity"])


def _check_can_be_kept(callback: Any) -> None:
    """Functions are part of the program; the run itself has the rest of a state."""
    is_state = lambda x: isinstance(x, BilevelState)
    for path, leaf in jax.tree_util.tree_leaves_with_path(callback.memory, is_leaf=is_state):
        if not (eqx.is_array_like(leaf) or is_key(leaf) or is_state(leaf) or callable(leaf)):
            raise TypeError(
                f"the memory of {type(callback).__name__} holds {_short(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'its root'}, which a checkpoint cannot keep: a "
                "memory must be a pytree of arrays, without strings and objects (for a model, "
                "eqx.filter(model, eqx.is_array))"
            )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"a {type(value).__name__}"


def _kind(memory: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(without_aux_in(memory))
    return treedef, [(x.shape, x.dtype) if eqx.is_array(x) else type(x) for x in leaves]


def _reason(callback: Any) -> str:
    return getattr(callback, "stop_reason", "callback")
