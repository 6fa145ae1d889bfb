"""Rows of a long table, saved as they are measured, so that it can stop and resume."""

import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


Row = dict[str, Any]


class Kept(NamedTuple):
    """A file of saved rows; nothing is measured."""

    path: Path


def measured(
    settings: Sequence[Mapping[str, Any]],
    measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    file: Path | Kept | None = None,
) -> list[Row]:
    """For each of `settings`, all with the same names, a row with the setting and its measurements.

    With a file, each row is written to it as a line of JSON once measured, and rows already there
    are not measured again. Only its settings identify a row: after changing the program, delete its
    line to measure it again. A row with `failed` is returned but not saved, so that it is tried
    again. With `Kept`, rows missing from the file are left out, and counted in a printed line. A
    row also records its seconds, its date and its version of jax.
    """
    names = list(settings[0]) if settings else []
    if isinstance(file, Kept):
        known = _saved(file.path, names)
        found = [known[key] for x in settings if (key := _key(x, names)) in known]
        if len(found) < len(settings):
            print(f"\nUNFINISHED: {len(found)} of {len(settings)} rows; --save continues")
        return found
    known, found = {} if file is None else _saved(file, names), []
    for i, wanted in enumerate(settings):
        row = known.get(_key(wanted, names))
        if row is None:
            _say(f"{i + 1} of {len(settings)}: {', '.join(map(str, wanted.values()))}")
            row = _measured_now(wanted, measure)
            if file is not None and "failed" not in row:
                with file.open("a") as opened:
                    opened.write(json.dumps(row) + "\n")
        found.append(row)
    return found


def taken(rows: Sequence[Row]) -> str:
    """How long the rows took in total, when they were measured, and with which jax."""
    dates = sorted({row["made"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(sorted({row["jax"] for row in rows}))
    minutes = sum(row["took"] for row in rows) / 60
    return f"the rows took {minutes:.1f} minutes in all; measured {when}, jax {versions}"


def measured_when(rows: Sequence[Row]) -> str:
    """The days on which rows with a `name` were measured, and which rows on the last day."""
    days: dict[str, list[str]] = {}
    for row in rows:
        names = days.setdefault(row["made"], [])
        if row["name"].strip() not in names:
            names.append(row["name"].strip())
    *earlier, last = sorted(days)
    if not earlier:
        return f"measured {last}"
    return f"measured {last}: {', '.join(days[last])}; the others {', '.join(earlier)}"


def _measured_now(wanted: Mapping[str, Any], measure: Callable) -> Row:
    started = time.perf_counter()
    row = dict(wanted) | dict(measure(wanted))
    row |= {
        "took": round(time.perf_counter() - started, 2),
        "made": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }
    return json.loads(json.dumps(row))  # as read back from the file


def _saved(file: Path, names: Sequence[str]) -> dict[str, Row]:
    """The rows of the file with these settings, keyed by them.

    An incomplete last line, left by a program killed while writing, is removed.
    """
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    saved = [row for row in map(json.loads, whole.splitlines()) if row.keys() >= set(names)]
    return {_key(row, names): row for row in saved}


def _key(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps([row[name] for name in names])


def _say(text: str) -> None:
    print(f"  ({time.strftime('%H:%M')} {text})", file=sys.stderr, flush=True)
