"""beartype checks with readable messages."""

import collections
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

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
    positional, by_name = _parameters(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if by_name and len(args) > positional:
            first, value = by_name[0], _short(repr(args[positional]))
            raise TypeError(f"{_name(function)} takes {first} by name: write {first}={value}")
        try:
            return function(*args, **kwargs)
        except TypeCheckError as error:
            message = _for_people(function, str(error))
            if message is None:
                raise
        # Outside the handler: the earlier messages of beartype and jaxtyping help nobody.
        raise TypeError(message)

    return wrapper


def _parameters(function: Callable) -> tuple[int, list[str]]:
    """How many arguments may be passed by position, and which others by name alone."""
    of_kind: dict[Any, list[str]] = collections.defaultdict(list)
    for name, parameter in inspect.signature(function).parameters.items():
        of_kind[parameter.kind].append(name)
    by_position = of_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    takes_more = of_kind[inspect.Parameter.VAR_POSITIONAL]
    return len(by_position), [] if takes_more else of_kind[inspect.Parameter.KEYWORD_ONLY]


def _name(function: Callable) -> str:
    return function.__qualname__.removesuffix(".__init__").lstrip("_")


def _for_people(function: Callable, complaint: str) -> str | None:
    """One sentence from the checker's report, or `None` if it is about something else."""
    found = refused_argument(complaint)
    if found is None:
        return None
    parameter, value, expected = found
    name = _name(function)
    instead = INSTEAD.get(parameter) or ("one real number" if "Real[" in expected else None)
    instead = f"; pass {instead}" if instead else f" (expected {expected})"
    return f"{name}: argument {parameter} must not be {_short(value)}{instead}"


def _short(text: str) -> str:
    return text if len(text) < 100 else text[:100] + "..."
