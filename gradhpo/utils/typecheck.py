"""beartype checks with readable messages."""

import collections
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from gradhpo.utils.advice import also_called, expected_kind, instead_of, lacking
from gradhpo.utils.foreign import is_transformation, refused_argument


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
            raise TypeError(_on_position(_name(function, args), by_name[0], args[positional]))
        try:
            return function(*args, **kwargs)
        except TypeCheckError as error:
            message = _on_value(function, args, kwargs, str(error))
            if message is None:
                raise
        except TypeError:
            message = _on_call(function, args, kwargs)
            if message is None:
                raise
        # Outside the handlers: the earlier messages help nobody.
        raise TypeError(message)

    return wrapper


def _parameters(function: Callable) -> tuple[int, list[str]]:
    """How many arguments may be passed by position, and which others only by name."""
    of_kind: dict[Any, list[str]] = collections.defaultdict(list)
    for name, parameter in inspect.signature(function).parameters.items():
        of_kind[parameter.kind].append(name)
    by_position = of_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    takes_more = of_kind[inspect.Parameter.VAR_POSITIONAL]
    return len(by_position), [] if takes_more else of_kind[inspect.Parameter.KEYWORD_ONLY]


def _name(function: Callable, args: tuple) -> str:
    if function.__name__ == "__init__":
        return type(args[0]).__name__
    return function.__qualname__.lstrip("_")


def _on_position(name: str, first: str, value: Any) -> str:
    """For an argument too many: the next one goes by name, unless it is a second optimizer."""
    lacks = lacking(name, "outer_optimizer") if is_transformation(value) else None
    return lacks or f"{name} takes {first} by name: write {first}={_short(repr(value))}"


def _on_value(function: Callable, args: tuple, kwargs: dict, complaint: str) -> str | None:
    """One sentence from the checker's report, or `None` if it is about something else."""
    found = refused_argument(complaint)
    if found is None:
        return None
    parameter, shown, expected = found
    shown = shown if len(shown) < 100 else shown[:100] + "..."
    given = inspect.signature(function).bind(*args, **kwargs).arguments.get(parameter)
    kind, instead = expected_kind(parameter, expected), instead_of(parameter, given, expected)
    instead = f": pass {instead}" if instead else ""
    return f"{_name(function, args)}: {parameter} must be {kind}, got {shown}{instead}"


def _on_call(function: Callable, args: tuple, kwargs: dict) -> str | None:
    """What is wrong with the arguments themselves, or `None` if the function can be called."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
        return None
    except TypeError as error:
        said = str(error)
    name, parameters = _name(function, args), dict(signature.parameters)
    if next(iter(parameters), None) == "self":
        del parameters["self"]
        args = args[1:]
    positional = [x.name for x in parameters.values() if x.kind == x.POSITIONAL_OR_KEYWORD]
    given = dict(zip(positional, args, strict=False)) | kwargs
    required = [x.name for x in parameters.values() if x.default is x.empty]
    missing = [x for x in required if x not in given]
    unknown = [x for x in kwargs if x not in parameters]
    if unknown:
        lacks = lacking(name, unknown[0])
        if lacks:
            return lacks
        meant = _closest(unknown[0], [*missing, *parameters])
        hint = f" (did you mean {meant}?)" if meant else ""
        return f"{name} has no argument {unknown[0]}{hint}; it takes {', '.join(parameters)}"
    written = [x if x in positional else f"{x}=..." for x in required]
    written += [f"{x}=..." for x in kwargs if x not in required]
    write = f"write {name}({', '.join(written)})"
    if missing:
        skipped = _skipped(given, parameters)
        got = ", ".join(f"{x}={_kind(value)}" for x, value in given.items())
        return f"{name} needs {skipped or ', '.join(missing)}; it got {got or 'nothing'}: {write}"
    return f"{name}: {said}: {write}, and everything else by name"


def _skipped(given: dict[str, Any], parameters: dict[str, inspect.Parameter]) -> str | None:
    """The argument that was forgotten: its place holds what another one takes."""
    takes = {
        x.name: x.annotation
        for x in parameters.values()
        if inspect.isclass(x.annotation) and x.annotation not in (Any, inspect.Parameter.empty)
    }
    for name, value in given.items():
        if not isinstance(value, takes.get(name, object)):
            if isinstance(value, tuple(takes.values())):
                return name
    return None


def _closest(unknown: str, names: list[str]) -> str | None:
    """The argument that an unknown name probably means."""
    others = [name for name in names if name in also_called(unknown)]
    return next(iter(others or difflib.get_close_matches(unknown, names, n=1)), None)


def _kind(value: Any) -> str:
    return "Array" if isinstance(value, jax.Array) else type(value).__name__


def _short(text: str) -> str:
    return text if len(text) < 100 else text[:100] + "..."
