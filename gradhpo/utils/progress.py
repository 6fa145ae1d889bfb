"""Progress of a run: a bar where one can be drawn, otherwise lines in a log."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import TqdmWarning


with warnings.catch_warnings():
    # In a notebook without ipywidgets the bar is text.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm


_SHOWN = {"train": "train_loss", "val": "val_loss", "|hypergrad|": "hypergrad_norm"}
_SECONDS_BETWEEN_LINES = 10.0
# While nothing has been timed: as tqdm's, but without clock and rate.
_COUNT = "{n_fmt}/{total_fmt}{postfix}"
_BAR, _LINE = "{l_bar}{bar}| " + _COUNT, "{desc}{percentage:3.0f}% " + _COUNT


class ProgressBar:
    """Counts steps and shows the last losses, with an estimate of the remaining time.

    The first chunk includes compilation and does not predict the others: the clock of the estimate
    starts after it, and a run of one chunk has none. Without a terminal or a notebook, a line is
    printed every ten seconds, and one at the end. `shown` may be a label; without one, the first
    line says `call`.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        shown: bool | str = True,
        monitored: Sequence[str] = (),
        call: str = "gradhpo.run",
    ):
        self._shown = _SHOWN | {name: name for name in monitored}
        if sys.stderr is None:  # a program without a console
            shown = False
        self._label = shown if isinstance(shown, str) else None
        self._name = self._label or call
        self._lines = shown is not False and not _can_draw()
        self._bar = tqdm(
            total=total, initial=done, disable=shown is False or self._lines, unit="step",
            dynamic_ncols=True, desc=self._label, bar_format=_BAR,
        )  # fmt: skip
        self._total, self._done, self._counted_from = total, done, done
        self._started = self._printed = time.monotonic()
        self._warm, self._last = False, ""
        if self._lines:
            with self._ignoring_the_terminal():
                resumed = f"resumed after {done} of {total} steps" if done else f"{total} steps"
                print(f"{self._name}: {resumed}, compiling", file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        with self._ignoring_the_terminal():
            if self._lines and self._last:
                self._print()
            self._bar.close()

    @contextlib.contextmanager
    def _ignoring_the_terminal(self) -> Iterator[None]:
        """A stream that was closed must not end the run."""
        try:
            yield
        except (OSError, ValueError):
            self._lines, self._bar.disable = False, True

    def advance(
        self, steps: int, metrics: Mapping[str, np.ndarray], more: Iterable[str] = ()
    ) -> None:
        """Advances by a chunk of steps with these metrics; `more` names those to show as well."""
        with self._ignoring_the_terminal():
            self._advance(steps, metrics, more)

    def _advance(self, steps: int, metrics: Mapping[str, np.ndarray], more: Iterable[str]) -> None:
        self._done += steps
        names = self._shown | {name: name for name in more}
        last = {short: metrics[name][-1] for short, name in names.items() if name in metrics}
        self._last = ", ".join(f"{short}={float(value):.3g}" for short, value in last.items())
        self._bar.set_postfix_str(self._last, refresh=False)
        if self._warm:
            self._bar.bar_format = None
            self._bar.update(steps)
        else:
            self._start_the_clock()
        if self._lines and time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print()
            self._last = ""

    def _start_the_clock(self) -> None:
        now = time.monotonic()
        if self._lines and now - self._started >= _SECONDS_BETWEEN_LINES:
            after = f"{self._done} of {self._total} steps after {now - self._started:.0f} s"
            print(f"{self._name}: {after}, including compilation", file=sys.stderr, flush=True)
            self._printed = now
        self._warm, self._counted_from, self._started = True, self._done, now
        if not self._bar.disable:
            self._bar.n = self._bar.initial = self._bar.last_print_n = self._done
            self._bar.start_t = self._bar.last_print_t = time.time()
            self._bar.refresh()

    def _print(self) -> None:
        now = time.monotonic()
        timed = self._done > self._counted_from
        line = tqdm.format_meter(
            self._done, self._total, now - self._started, unit="step",
            # 0: without a bar, in tqdm's own form.
            ncols=0 if timed else None, bar_format=_LINE,
            initial=self._counted_from, postfix=self._last,
            prefix="" if self._label is None else f"{self._label}: ",
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)
        self._printed = now


def _can_draw() -> bool:
    """Whether there is a notebook, or a terminal whose width is known."""
    if "ipykernel" in sys.modules:
        return True
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False
