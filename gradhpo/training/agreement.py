"""A run of several processes that share a state: all take the same chunks and end together.

Before each chunk they exchange what only one of them knows, or failed at.
"""

import collections
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gradhpo.data.sources import Feed
from gradhpo.training.driver import Driver
from gradhpo.training.flight import Flight
from gradhpo.training.stopping import Interrupts, Stopped, failing
from gradhpo.utils.processes import error_of_others, exchanged, is_first, said_of, together
from gradhpo.utils.progress import ProgressBar


# It cannot tell them: their devices work on that chunk, and would take a message for its part.
_ALONE = (
    "raised instead of returning the steps so far: the other processes may have begun this chunk, "
    "which cannot finish without this process; let it end, and restart all of them"
)


class _Outcome(NamedTuple):
    """How something ended in this process, if it failed."""

    reason: str = ""
    error: Exception | None = None
    raises: bool = False  # as there is nothing to return

    def said(self, about: str) -> dict[str, Any]:
        error = None if self.error is None else said_of(self.error)
        return {about: self.reason, f"{about} failed": error, f"{about} raises": self.raises}


def affordable(feed: Feed, chunk_size: int, shared: bool) -> int:
    """`feed.affordable`; of several processes the smallest, whose batches must be alike."""
    if not (shared and feed.from_host):
        return feed.affordable(chunk_size)
    with together(shared):
        size = feed.affordable(chunk_size)
    said = exchanged({"size": size, "kinds": feed.kinds()})
    for number, other in enumerate(said):
        for name, kind in said[0]["kinds"].items():
            if other["kinds"][name] != kind:
                raise ValueError(
                    f"{name} yields {kind} in process 0 and {other['kinds'][name]} in process "
                    f"{number}: the parts of a batch must have the same structure, shapes and "
                    "dtypes in all processes"
                )
    return min(x["size"] for x in said)


def go_together(
    driver: Driver, shapes: Iterable[tuple[int, int]], bar: ProgressBar, interrupts: Interrupts
) -> Stopped:
    """`Driver.go`, where several processes share the state.

    The callbacks, clock and interrupts of the first process count. An error, or the end of the
    data, in any process ends all. The devices work on one chunk while the hosts draw batches for
    the next.
    """
    shapes, flying = iter(shapes), collections.deque[Flight]()
    following, ending = next(shapes, None), None
    asked, first = False, is_first(shared=True)
    outcome = _attempt(driver._stop_if_over)
    while True:
        most = driver._handover.chunks_in_flight
        launches = following is not None and not (ending or asked) and len(flying) < most
        steps, data = 0, _Outcome()
        if launches and following and not (outcome.error or (first and outcome.reason)):
            steps, data = _draw(driver, *following, [*flying])
            outcome = data if data.raises else outcome
        said = exchanged(
            {
                "steps": steps,
                "interrupted": interrupts.asked,
                **_said_of_chunk(driver),
                **outcome.said("chunk"),
                **data.said("data"),
            }
        )
        # A chunk that failed in any of them is not kept.
        seen = [x["seen"] and x["taken"] == said[0]["taken"] for x in said]
        driver._callbacks_saw_all = all(seen)
        stopped = _ending(said, "chunk", outcome)
        if stopped is not None:
            return stopped
        asked = said[0]["interrupted"]
        if asked and (following or flying) and (driver.record.may_return or not flying):
            return Stopped("interrupted")
        if launches and following and not asked:
            steps, wanted = min(x["steps"] for x in said), following[0] * following[1]
            if steps < wanted:
                may_return = bool(steps or flying) or driver.record.may_return
                ending = _ending(said, "data", data) or driver._out_of_data(may_return)
            if steps:
                launched, failed = driver._launch(*following, [*flying], at_most=steps)
                if not launched and failed is not None and failed.error is not None:
                    failed.error.add_note(_ALONE)
                    raise failed.error
                flying.extend(launched)
                ending = ending if launched else failed
            following = next(shapes, None)
        if said[0]["save"] and (flying or (following and not ending)):
            driver.save("")
        if not flying:
            return ending or Stopped("num_steps")
        if len(flying) == most or not following or ending or asked:
            outcome = _attempt(driver._land, flying, bar)


def _said_of_chunk(driver: Driver) -> dict[str, Any]:
    taken, keeper = driver.record.taken, driver.keeper
    due = keeper is not None and keeper.is_due(taken)
    return {"taken": taken, "seen": driver._callbacks_saw_all, "save": due}


def _attempt(function: Callable, *arguments: Any) -> _Outcome:
    try:
        function(*arguments)
    except Stopped as stopped:
        return _Outcome(stopped.reason, stopped.error)
    except Exception as error:
        return _Outcome("", error, raises=True)
    return _Outcome()


def _draw(driver: Driver, episodes: int, length: int, before: list[Flight]) -> tuple[int, _Outcome]:
    """For how many steps this process has data, and what keeps it from having more."""
    may_return, found = bool(before) or driver.record.may_return, 0

    def draw() -> None:
        nonlocal found
        multiple = length if driver.steps_per_episode is not None else 1
        with failing("data error", may_return=may_return):
            found = driver.feed.draw(episodes * length, multiple, in_part=may_return)

    outcome = _attempt(draw)
    failure = driver.feed.failure
    if found and failure is not None and found < episodes * length:
        outcome = _Outcome("data error", failure)
    return found, outcome


def _ending(said: list[dict[str, Any]], about: str, mine: _Outcome) -> Stopped | None:
    """The ending that all processes agree on; raises if there is nothing to return."""
    failed = [x[f"{about} failed"] for x in said]
    numbers = [number for number, text in enumerate(failed) if text is not None]
    if not numbers:
        return Stopped(said[0][about]) if said[0][about] else None
    error = mine.error or error_of_others(failed)
    if any(x[f"{about} raises"] for x in said):
        raise error
    return Stopped(said[numbers[0]][about], error)
