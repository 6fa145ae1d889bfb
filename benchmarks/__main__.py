"""`python -m benchmarks [table ...]`: all tables, or the named ones.

With `--save` each table is also put in its place in `benchmarks/README.md`.
"""

import argparse
import contextlib
import datetime
import io
import os
import platform
import re
import sys
import time
import traceback
from pathlib import Path

import equinox
import jax
import optax

import gradhpo
from benchmarks import (
    accuracy,
    budget,
    compiled,
    distilled,
    earlier,
    host,
    implicit,
    loops,
    pytorch,
    roads,
    scaling,
)


README = Path(__file__).parent / "README.md"
TABLES = {
    # against hand-written JAX, and what the parts cost
    "flops": compiled.print_flops,
    "loop": loops.print_loops,
    "compile": compiled.print_compile_times,
    "memory": compiled.print_memory,
    "exact": loops.print_exact,
    "units": compiled.print_units,
    "distilled": distilled.print_distilled,
    "roads": roads.print_roads,
    # against plain training, and what the host adds
    "plain": loops.print_plain,
    "host": host.print_host,
    "night": host.print_night,
    # against other libraries
    "earlier": earlier.print_earlier,
    "torch": pytorch.print_pytorch,
    "implicit": implicit.print_implicit,
    # how costs grow, and what is had for them
    "scaling": scaling.print_scaling,
    "accuracy": accuracy.print_accuracy,
    "budget": budget.print_budget,
}


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def machine() -> str:
    device, cores = jax.devices()[0], os.cpu_count()
    name = device.device_kind
    if device.platform == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        name = found[1] if found else name
    return (
        f"gradhpo {gradhpo.__version__}, jax {jax.__version__}, equinox {equinox.__version__}, "
        f"optax {optax.__version__}, Python {platform.python_version()}\n"
        f"{name}, {cores} cores, {datetime.date.today().isoformat()}"
    )


def place_of(name: str) -> re.Pattern[str]:
    """Where a table stands in README, which must have one such place."""
    block = re.compile(rf"(<!-- {name} -->\n```text\n).*?(\n```\n)", re.DOTALL)
    if (count := len(block.findall(README.read_text()))) != 1:
        raise SystemExit(f"{README} has {count} places for the table {name!r}")
    return block


def save(name: str, printed: str) -> None:
    text = f"{machine()}\n\n{printed.strip(chr(10))}"
    put = lambda marks: marks[1] + text + marks[2]
    README.write_text(place_of(name).sub(put, README.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--without", nargs="+", default=[], choices=TABLES, metavar="table")
    parser.add_argument("--save", action="store_true", help="put the tables in README as well")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(TABLES):
        parser.error(f"no table is called {', '.join(unknown)}; there are {', '.join(TABLES)}")
    if given.save and jax.default_backend() != "cpu":
        parser.error("README has the tables of a CPU; without --save they are printed")
    chosen = [name for name in given.tables or TABLES if name not in given.without]
    if given.save:
        os.environ["GRADHPO_BENCHMARKS_SAVE"] = "1"  # pictures as well
        for name in chosen:
            place_of(name)
    jax.config.update("jax_compilation_cache_dir", None)  # compiling is measured too
    print(machine())
    failed = []
    for name in chosen:
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(Tee()) as printed:
                TABLES[name]()
        except Exception:  # hours of other tables must not be lost with this one
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"\n({name}: {(time.perf_counter() - started) / 60:.1f} minutes)")
        if given.save:
            save(name, printed.getvalue())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
