"""The collectives of a compiled program, with their sizes and how often each runs."""

import math
import re
from typing import NamedTuple


_COLLECTIVE = re.compile(
    r"= (?P<made>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\((?P<operands>.*?)\)"
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One array that devices exchange: `size` numbers in total, `times` per program.

    A loop whose length is known only at run time, such as a linear solver's, counts as one pass.
    """

    kind: str
    size: int
    times: int


def collectives(text: str) -> list[Collective]:
    """Parses them from the text of a compiled XLA program."""
    lines, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for line in lines.get(name, ()):
            if match := _COLLECTIVE.search(line):
                found.extend(Collective(match["kind"], size, times) for size in _sizes(match))
                continue
            trips = _TRIPS.search(line)
            for role, called in _CALLED.findall(line):
                inside = times * int(trips[1]) if role == "body" and trips else times
                for other in re.findall(r"%[\w.-]+", called):
                    visit(other, inside)

    visit(entry, 1)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if heading := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line):
            name = heading[2]
            entry = name if heading[1] else entry
            lines[name] = []
        elif name:
            lines[name].append(line)
    return lines, entry


def _sizes(match: re.Match) -> list[int]:
    """The larger of operand and result, for each array."""
    made, given = (
        [math.prod(map(int, filter(None, shape.split(",")))) for shape in _SHAPE.findall(text)]
        for text in (match["made"], match["operands"])
    )
    if match["kind"] == "all-to-all":
        return [max(sum(made), sum(given))]
    return [max(pair) for pair in zip(made, given or made, strict=True)]
