"""Warnings that point at the user's line, each given once."""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the first line outside this library and the packages below it."""
    if _is_muted:
        return
    beneath = {"gradhpo", "equinox", "jax", "jaxtyping", "beartype", "contextlib", "functools"}
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame) in beneath:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def muted(is_muted: bool) -> Iterator[None]:
    """Inside, no warning: another process of the same program gives it."""
    global _is_muted
    before, _is_muted = _is_muted, _is_muted or is_muted
    try:
        yield
    finally:
        _is_muted = before


_is_muted = False


def place_of(function: Any) -> str:
    """Where the user wrote a function, "loss at model.py:12"; for other objects their type."""
    function = inspect.unwrap(function) if callable(function) else function
    function = getattr(function, "func", function)  # of a functools.partial
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function).__qualname__
    name = function.__qualname__.rpartition("<locals>.")[2]
    return f"{name} at {Path(code.co_filename).name}:{code.co_firstlineno}"


# What was said in this process. Every compilation finds the same thing again, and no user object
# outlives them all. Python's registry of warnings is global state of the same kind, but it
# counts by line, and one line of a user's program may trigger several warnings.
_said: set[tuple[str, ...]] = set()


def warn_once(message: str, *about: Any) -> None:
    """A warning that is given once per process: tracing again finds the same thing again.

    It is given again for functions that are written elsewhere.
    """
    key = (message, *map(place_of, about))
    if key not in _said:
        _said.add(key)
        warn(message)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppresses warnings whose content is in a report, so that they can be given later."""
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


@contextlib.contextmanager
def noted(place: str) -> Iterator[None]:
    """An error inside a user's function gets a note that says where it was called."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {place}")
        raise
