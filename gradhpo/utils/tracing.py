"""Messages while tracing: a derivative is missing, or a job was traced again."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from gradhpo.utils.advice import on_missing_rule
from gradhpo.utils.foreign import NO_DERIVATIVE
from gradhpo.utils.warn import forget_warnings, warn_once


TAKES_ALL = "second derivatives of the training loss, or derivatives of the inner update"


@contextlib.contextmanager
def differentiation_explained(
    name: str, takes: str = TAKES_ALL, find: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Says what to write if the derivatives that a method `takes` do not exist.

    `find` is called then, and names the function that has none, or returns "".
    """
    try:
        yield
    except NO_DERIVATIVE as error:
        if on_missing_rule(str(error)) is None:
            raise
        function = find()
        advice = on_missing_rule(str(error), function)
        takes = f"the derivative of {function}" if function else takes
        raise ValueError(
            f"{name} takes {takes}, but JAX has none here: {advice}. What JAX says: "
            f"{str(error).splitlines()[0]}"
        ) from error


# Which jobs were traced, and how often, in this process. A function created again in a loop is
# another object every time, so nothing that the user holds could count its traces.
_WARN_AT = (5, 10, 20, 50, 100, 200, 500, 1_000)  # not at every trace: that would be noise
_traces: dict[Any, tuple[int, dict[str, int]]] = {}


def forget_traces() -> None:
    """Resets the counts of traces and of warnings."""
    _traces.clear()
    forget_warnings()


# How many programs were traced in this process, so that a call can tell whether it was the first.
_number = itertools.count(1)
_last = 0


def count_trace() -> None:
    """Called while a public call is traced."""
    global _last
    _last = next(_number)


def num_traces() -> int:
    """How many traces were counted."""
    return _last


def record_trace(
    what: str,
    optimizer: Any,
    state: PyTree,
    losses: Any,
    **batches: PyTree,
) -> None:
    """Called while a step or a chunk is traced: at the fifth trace of a job, says what changed.

    "A job" is one optimizer class with the same counts, the same state structure, and losses from
    the same source lines. Between its traces, a function object may have been created again, or the
    shape of a batch may have changed, without the user seeing it.
    """
    count_trace()
    without_functions = jax.tree.map(lambda x: None if callable(x) else x, optimizer)
    job = (
        what,
        str(jax.tree.structure(without_functions)),  # its hash passes over counts
        _fingerprint(without_functions),
        _fingerprint(eqx.filter(state, eqx.is_array)),
        _source(losses.train_loss),
        _source(losses.val_loss),
    )
    changing = {
        "the optimizer (a new optax object or update_fn)": optimizer,
        "train_loss_fn (a new function)": losses.train_loss,
        "val_loss_fn (a new function)": losses.val_loss,
        "the state (a new function in it, or a note that is not an array)": state,
    } | {f"{name} (its shapes, or a new function)": x for name, x in batches.items()}
    now = {name: _fingerprint(value) for name, value in changing.items()}
    count, before = _traces.get(job, (0, now))
    _traces[job] = (count + 1, now)
    if count + 1 in _WARN_AT:
        changed = [name for name in now if now[name] != before[name]]
        warn_once(
            f"{type(optimizer).__name__}: {what} was traced and compiled {count + 1} times for "
            f"the same job; changed since the last time: {', '.join(changed) or 'nothing'}"
            ". Create losses and optimizers once, outside the loop, and keep batch shapes fixed."
        )


def _fingerprint(tree: PyTree) -> int:
    """Equal for two trees that `filter_jit` would serve with one compiled program."""
    leaves, treedef = jax.tree.flatten(tree)
    described = tuple((jax.typeof(x) if eqx.is_array(x) else x) for x in leaves)
    return hash((treedef, described))


def _source(function: Any) -> tuple:
    """Where the code of a function, or of a module around one, was written."""
    codes = [getattr(x, "__code__", None) for x in [function, *jax.tree.leaves(function)]]
    return (type(function), *(code for code in codes if code is not None))
