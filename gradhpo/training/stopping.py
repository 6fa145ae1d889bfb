"""How a run ends before its last step."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from gradhpo.core.algorithm import Algorithm
from gradhpo.utils.foreign import is_out_of_memory, runtime_check


_MEMORY = (
    "gradhpo.plan(optimizers, ...) tells in advance what memory a step needs. Smaller batches need "
    "less, and (with an iterator, whose batches wait on the device) so does a smaller chunk_size."
)


class Stopped(Exception):
    """The run ends here, with what was done so far."""

    def __init__(self, reason: str, error: Exception | None = None):
        self.reason, self.error = reason, error


@contextlib.contextmanager
def failing(reason: str, *, may_return: bool, advice: str = "") -> Iterator[None]:
    """A failure inside ends the run; it is raised as is while there is nothing to return.

    `advice` says how to reduce memory.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            reason = "out of memory"
            error.add_note(f"{_MEMORY} {advice}".strip())
        checked = runtime_check(error)
        if checked is not None and not may_return:
            raise checked from error
        if not may_return:
            raise
        if checked is not None:
            reason = "loss error"
        raise Stopped(reason, checked or error) from error


def how_to_save_memory(algorithm: Algorithm) -> str:
    """For the report of a run that ran out of memory."""
    smaller = algorithm.with_less_memory()
    if smaller is None:
        return ""
    names = [field.name for field in dataclasses.fields(smaller)]
    changed = [x for x in names if getattr(smaller, x) is not getattr(algorithm, x)]
    settings = ", ".join(f"{name}={getattr(smaller, name)!r}" for name in changed)
    return f"{type(algorithm).__name__} needs less memory with {settings}."


class Interrupts:
    """Inside, Ctrl-C asks the run to stop after the current chunk; a second one raises.

    A handler that the user has set is left alone, and outside the main thread there are none.
    """

    asked = False

    def __enter__(self) -> "Interrupts":
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(
            AttributeError, OSError, ValueError
        ):  # no console, or a closed one
            sys.stderr.write(
                "\ngradhpo.run: stopping after the current chunk, with the results so far; "
                "interrupt again to raise KeyboardInterrupt at once\n"
            )
