"""beartype checks with messages for people, and warnings that point at the user's line."""

import contextlib
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped


_T = TypeVar("_T", bound=Callable)

_COMPLAINT = re.compile(
    r"checking the parameters of gradhpo\..*?parameter '(?P<parameter>\w+)'\.\n"
    r"Actual value: (?P<value>.*?)\nExpected type: (?P<expected>.*?)\n-----",
    re.DOTALL,
)
# What to write instead, by the name of the argument.
_REMEDIES = {
    "optimizer": "an optimizer such as gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.01))",
    "optimizers": "a dict of name to optimizer: {'one step': gradhpo.OneStepOptimizer(inner)}",
    "state": "what optimizer.init(params, hyperparams) or optimizer.step(...) returned",
    "losses": "gradhpo.LossFunctions(train_loss, val_loss)",
    "train_loss_fn": "a function (params, hyperparams, batch) -> scalar; the order of arguments is "
    "(state, train_batch, val_batch, train_loss_fn, val_loss_fn)",
    "val_loss_fn": "a function (params, hyperparams, batch) -> scalar; the order of arguments is "
    "(state, train_batch, val_batch, train_loss_fn, val_loss_fn)",
    "train_batches": "gradhpo.BatchStack.of([b1, b2, ...]), one batch for each step of an episode",
    "callbacks": "a list of functions (state, metrics) -> bool | None: callbacks=[callback]",
    "where": "a function of the model: lambda m: m.log_weight_decay",
    "inner_optimizer": "an optax transformation such as optax.sgd(0.1), or a function of the "
    "hyperparameters that returns one",
    "outer_optimizer": "an optax transformation such as optax.adam(0.01) (of an optax.MultiSteps "
    "its .gradient_transformation()), or None",
    "update_fn": "a function (params, hyperparams, batch) -> params",
    "coordinates": "whole numbers, e.g. [0, 1, 2]",
    "linear_solver": "a lineax solver such as lineax.CG(rtol=1e-5, atol=1e-5), gradhpo.Neumann(20, "
    "0.1), or None",
    "key": "jax.random.key(0)",
    "checkpoint": 'the path of a directory, "runs/digits", or gradhpo.Checkpoint("runs/digits")',
    "loader": "a list of batches or a data loader; call a generator function, and give an "
    "ArrayData to run as it is",
    "batch_size": "a whole number, after the arrays as one pytree: ArrayData((x, y), 128, key)",
}


def checked(thing: _T) -> _T:
    """Checks annotations of a function, or of a module's constructor, at every call.

    Goes directly on the `def` or `class`, under `filter_jit`.
    """
    typed = jaxtyped(typechecker=beartype)(thing)
    if inspect.isclass(typed):
        typed.__init__ = _explained(typed.__init__)  # pyright: ignore[reportAttributeAccessIssue]
        return typed  # pyright: ignore[reportReturnType]
    return _explained(typed)  # pyright: ignore[reportReturnType]


def _explained(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except TypeCheckError as error:
            message = _for_people(function, str(error))
            if message is None:
                raise
        # Outside the handler: what beartype and jaxtyping said before helps nobody.
        raise TypeError(message)

    return wrapper


def _for_people(function: Callable, complaint: str) -> str | None:
    """One sentence of the checker's page, or `None` if it is about something else."""
    found = _COMPLAINT.search(complaint)
    if found is None:
        return None
    name = function.__qualname__.removesuffix(".__init__").lstrip("_")
    value = " ".join(found["value"].split())
    value = value if len(value) < 100 else value[:100] + "..."
    expected = re.sub(r"(\w+\.)+(?=\w)|<class '|'>|\.$", "", found["expected"])
    remedy = _REMEDIES.get(found["parameter"])
    remedy = f"; pass {remedy}" if remedy else f" (expected {expected})"
    return f"{name}: argument {found['parameter']} must not be {value}{remedy}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the first line outside this library and those beneath it."""
    beneath = {"gradhpo", "equinox", "jax", "jaxtyping", "beartype", "contextlib", "functools"}
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame) in beneath:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_said: set[str] = set()


def warn_once(message: str) -> None:
    """A warning that is given once in a process: tracing again finds the same thing again."""
    if message not in _said:
        _said.add(message)
        warn(message)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps quiet what a report says instead, and lets it be said later."""
    said = set(_said)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _said.clear()
        _said.update(said)


def forget_warnings() -> None:
    """Lets every warning be given once more."""
    _said.clear()


def _package(frame: Any) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
