"""beartype checks with readable messages."""

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from gradhpo.utils.advice import INSTEAD
from gradhpo.utils.foreign import refused_argument


_T = TypeVar("_T", bound=Callable)


def checked(thing: _T) -> _T:
    """Checks the annotations of a function, or of a module's constructor, at every call.

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
        # Outside the handler: the earlier messages of beartype and jaxtyping help nobody.
        raise TypeError(message)

    return wrapper


def _for_people(function: Callable, complaint: str) -> str | None:
    """One sentence from the checker's report, or `None` if it is about something else."""
    found = refused_argument(complaint)
    if found is None:
        return None
    parameter, value, expected = found
    name = function.__qualname__.removesuffix(".__init__").lstrip("_")
    value = value if len(value) < 100 else value[:100] + "..."
    instead = INSTEAD.get(parameter)
    instead = f"; pass {instead}" if instead else f" (expected {expected})"
    return f"{name}: argument {parameter} must not be {value}{instead}"
