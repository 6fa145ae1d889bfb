"""Rows of a long table, kept as they are measured, so that it can stop and go on."""

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
    """A file of rows, of which none is measured now."""

    path: Path


def measured(
    settings: Sequence[Mapping[str, Any]],
    measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    file: Path | Kept | None = None,
) -> list[Row]:
    """For each of `settings`, all with the same names, a row of these and of what is measured.

    With a file, a line of JSON for each row is written to it as soon as the row is known, and rows
    that it has are not measured again. A row is known by its settings alone: to measure it anew,
    after a change of the program, delete its line. With `Kept`, rows that the file lacks are left
    out, and their number is printed. A row also says how many seconds it took, when it was made,
    and with which jax.
    """
    names = list(settings[0]) if settings else []
    if isinstance(file, Kept):
        known = _saved(file.path, names)
        found = [known[key] for x in settings if (key := _key(x, names)) in known]
        if len(found) < len(settings):
            print(f"\nUNFINISHED: {len(found)} of {len(settings)} rows; --save goes on")
        return found
    known, found = {} if file is None else _saved(file, names), []
    for i, wanted in enumerate(settings):
        row = known.get(_key(wanted, names))
        if row is None:
            _say(f"{i + 1} of {len(settings)}: {', '.join(map(str, wanted.values()))}")
            row = _measured_now(wanted, measure)
            if file is not None:
                with file.open("a") as opened:
                    opened.write(json.dumps(row) + "\n")
        found.append(row)
    return found


def taken(rows: Sequence[Row]) -> str:
    """How long the rows took in all, when they were made, and with which jax."""
    dates = sorted({row["made"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(sorted({row["jax"] for row in rows}))
    minutes = sum(row["took"] for row in rows) / 60
    return f"the rows took {minutes:.1f} minutes in all; measured {when}, jax {versions}"


def measured_when(rows: Sequence[Row]) -> str:
    """On which days rows with a `name` were measured, and which of them on the last."""
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
    return json.loads(json.dumps(row))  # as the file gives it back


def _saved(file: Path, names: Sequence[str]) -> dict[str, Row]:
    """The rows of the file that have these settings, by them.

    A last line without an end is what a program was writing when it was killed: it is removed.
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
