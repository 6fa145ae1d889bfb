"""Hypergradients of other libraries' programs on the pages docs/how_to/from_*.md, and of ours."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.peers.environment import ROOT, Worker
from benchmarks.peers.implicit import PEERS as JAX
from benchmarks.peers.pytorch import PEERS as TORCH
from benchmarks.peers.workers.migration import flat
from benchmarks.rows import Kept, measured, taken


PAGES = ("from_jaxopt", "from_maml")
REQUIREMENTS = {
    "jaxopt": JAX["jaxopt"][1],
    "TorchOpt": TORCH["torchopt"][1],
    "higher": TORCH["higher"][1],
}
SHARED = "PyTorch"  # what the blocks of more than one library begin with
PART = re.compile(r"^## (.*?)\n|^```(py|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Pair(NamedTuple):
    """A program of another library, and ours, which follows it on the page.

    The first block of a page is the problem, for both. A block in `py` belongs to the library that
    its first line names, and blocks in `python` are ours, run one after the other: `ours` are all
    up to this pair. Both programs end in a `gradient`.
    """

    page: str
    title: str
    library: str
    problem: str
    theirs: str
    ours: tuple[str, ...]

    @property
    def changed(self) -> int:
        """How many lines differ: added or removed, the larger number."""
        theirs, ours = (
            [line for line in code.splitlines() if line.strip() and line != f"# {self.library}"]
            for code in (self.theirs, self.ours[-1])
        )
        signs = [line[0] for line in difflib.ndiff(theirs, ours)]
        return max(signs.count("+"), signs.count("-"))

    @property
    def settings(self) -> dict[str, str]:
        """The key of a saved row, which includes their program."""
        code = hashlib.sha256((self.problem + self.theirs).encode()).hexdigest()[:12]
        return {"page": self.page, "title": self.title, "library": self.library, "code": code}


def pairs_of(page: str) -> Iterator[Pair]:
    title, shared, ours, waiting = "", "", [], []
    for found in PART.finditer((ROOT / "docs" / "how_to" / f"{page}.md").read_text()):
        if found[1]:
            title = found[1]
        elif found[2] == "py":
            library = found[3].split("\n", 1)[0].removeprefix("# ")
            if library == SHARED:
                shared = found[3]
            else:
                waiting.append((library, shared + found[3]))
        else:
            ours.append(found[3])
            for who, theirs in waiting:
                yield Pair(page, title, who, ours[0], theirs, tuple(ours))
            waiting.clear()


def by_gradhpo(page: str) -> dict[str, list[float]]:
    """Title to the hypergradient of our program there; all programs of the page run in order."""
    found: dict[str, list[float]] = {}
    namespace: dict[str, Any] = {}
    done = 0
    with jax.enable_x64(True):
        for pair in pairs_of(page):
            for code in pair.ours[done:]:
                # Else the rest of this process would have it, too.
                code = code.replace('jax.config.update("jax_enable_x64", True)', "")
                exec(compile(code, page, "exec"), namespace)
            done = len(pair.ours)
            found[pair.title] = flat(namespace["gradient"])
    return found


def off(found: list[float], expected: list[float]) -> float:
    """The largest difference, relative to the largest number."""
    difference = [x - y for x, y in zip(found, expected, strict=True)]
    return float(np.abs(difference).max() / np.abs(expected).max())


def kept(file: Path | Kept | None) -> list[dict[str, Any]]:
    """A row for each pair, with the hypergradient by the other library."""
    pairs = [pair for page in PAGES for pair in pairs_of(page)]
    known = {str(pair.settings): pair for pair in pairs}

    def measure(row: Mapping[str, Any]) -> dict[str, Any]:
        pair = known[str(dict(row))]
        with Worker("migration.py", REQUIREMENTS[pair.library], JAX_PLATFORMS="cpu") as worker:
            gradient = worker.ask("run", codes=[pair.problem, pair.theirs])
            return {"gradient": gradient, "versions": worker.versions()}

    return measured([pair.settings for pair in pairs], measure, file)


def print_migration(file: Path | Kept | None = None) -> None:
    """Runs our programs now, and others only if their rows are missing."""
    rows = kept(file)
    ours = {page: by_gradhpo(page) for page in PAGES}
    print("\nPrograms on the pages docs/how_to/from_*.md: how many lines differ between theirs and")
    print("ours, and the largest difference of the hypergradients, relative, in float64\n")
    print(f"    {'':44}   lines  difference")
    pairs = [pair for page in PAGES for pair in pairs_of(page)]
    for pair in pairs:
        row = next((row for row in rows if pair.settings.items() <= row.items()), None)
        if row is not None:
            difference = off(ours[pair.page][pair.title], row["gradient"])
            name = f"{row['versions'][0]}: {pair.title}"
            print(f"    {name:44}{pair.changed:8}{difference:12.0e}")
    if rows:
        print(f"\n{taken(rows)}")
