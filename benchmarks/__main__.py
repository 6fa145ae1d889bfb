"""`python -m benchmarks [table ...]`: prints all tables, or the named ones.

With `--save` the output of each table is also written to `benchmarks/results/<table>.txt`.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox
import jax
import optax

import gradhpo
from benchmarks.costs import (
    accuracy,
    compiled,
    convolutions,
    devices,
    gpu,
    host,
    loops,
    methods,
    natural,
    networks,
    replays,
    run_memory,
    scaling,
)
from benchmarks.peers import (
    benchopt,
    bergson,
    budget,
    earlier,
    implicit,
    lasso,
    migration,
    pytorch,
    suboptimality,
)
from benchmarks.rows import Kept
from benchmarks.tables import (
    cleaning,
    cleaning_why,
    condensed,
    cosines,
    schedules,
    search,
    sinusoid,
)
from benchmarks.trust import calibration


RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    """Functions that print a table: in full, in quick form, to save it, and from saved rows."""

    whole: Callable[[], None]
    quick: Callable[[], None] | None = None
    saving: Callable[[], None] | None = None
    kept: Callable[[], None] | None = None


def in_rows(name: str, show: Callable[..., None]) -> Table:
    """A table whose rows are saved in a file next to its text, so that it can resume."""
    file = RESULTS / f"{name}.jsonl"
    forms = partial(show, quick=True), partial(show, file=file), partial(show, file=Kept(file))
    return Table(show, *forms)


def going_on(name: str, show: Callable[..., None]) -> Table:
    """The same, without a quick form."""
    return in_rows(name, show)._replace(quick=None)


COSTS = {
    "flops": in_rows("flops", compiled.print_flops),
    "loop": going_on("loop", loops.print_loops),
    "compile": Table(compiled.print_compile_times),
    "memory": Table(compiled.print_memory),
    "run_memory": Table(run_memory.print_run_memory),
    "exact": Table(loops.print_exact),
    "networks": Table(networks.print_networks),
    "convolutions": Table(convolutions.print_convolutions),
    "units": Table(compiled.print_units),
    "one_step": Table(
        methods.print_beside_one_step, partial(methods.print_beside_one_step, quick=True)
    ),
    "distilled": Table(methods.print_distilled),
    "roads": Table(methods.print_roads),
    "natural": Table(natural.print_natural),
    "plain": Table(loops.print_plain),
    "host": Table(host.print_host),
    "night": Table(host.print_night),
    "steps": Table(scaling.print_steps),
    "scaling": Table(scaling.print_scaling),
    "devices": Table(devices.print_devices),
    "replay": Table(replays.print_replay),
    "accuracy": Table(accuracy.print_accuracy),
    "gpu": Table(gpu.print_gpu),
}
TRUST = {"trust": in_rows("trust", calibration.print_trust)}
PEERS = {
    "earlier": Table(earlier.print_earlier),
    "torch": Table(pytorch.print_pytorch),
    "implicit": Table(implicit.print_implicit),
    "lasso": in_rows("lasso", lasso.print_lasso),
    "migration": going_on("migration", migration.print_migration),
    "bergson": in_rows("bergson", bergson.print_bergson),
    "benchopt": Table(benchopt.print_benchopt),
    "suboptimality": Table(suboptimality.print_suboptimality),
    "budget": Table(budget.print_budget, saving=partial(budget.print_budget, figure=budget.FIGURE)),
}
# Reproductions of published tables.
PUBLISHED = {
    "cleaning": in_rows("cleaning", cleaning.print_cleaning),
    "cleaning_why": in_rows("cleaning_why", cleaning_why.print_cleaning_why),
    "condensed": in_rows("condensed", condensed.print_condensed),
    "cosines": in_rows("cosines", cosines.print_cosines),
    "schedules": in_rows("schedules", schedules.print_schedules),
    "search": in_rows("search", search.print_search),
    "sinusoid": in_rows("sinusoid", sinusoid.print_sinusoid),
}
TABLES = COSTS | TRUST | PEERS | PUBLISHED
GROUPS = {"costs": COSTS, "peers": PEERS, "tables": PUBLISHED}
# About the device itself, not ratios on it: run on request, and saved under the device's name.
OF_A_GPU = {"gpu"}


class Tee(io.StringIO):
    """Records output while printing it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def machine() -> str:
    """Versions, machine and date: the header of every saved table."""
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


def file_of(name: str) -> Path:
    if name not in OF_A_GPU:
        return RESULTS / f"{name}.txt"
    card = re.sub(r"\W+", "-", jax.devices()[0].device_kind).lower()
    return RESULTS / name / f"{card}.txt"


def save(name: str, printed: str) -> None:
    file = file_of(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{machine()}\n\n{printed.strip(chr(10))}\n")


def names_of(given: argparse.Namespace) -> list[str]:
    """The tables to print: named tables and groups, or everything for a CPU."""
    every = [name for name in TABLES if name not in OF_A_GPU]
    named = [one for name in given.tables for one in GROUPS.get(name, [name])]
    names = [name for name in (named if given.tables else every) if name not in given.without]
    for form in ("quick", "kept"):
        if getattr(given, form):
            lacking = [name for name in names if getattr(TABLES[name], form) is None]
            names = [name for name in names if name not in lacking]
            if lacking and given.tables:
                print(f"(no {form} form: {', '.join(lacking)})")
    return names


def refused(names: list[str], backend: str) -> list[str]:
    """The tables that must not be saved on this backend."""
    return [name for name in names if (name in OF_A_GPU) != (backend == "gpu")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    choices = f"of {', '.join(TABLES)}; or a group of them: {', '.join(GROUPS)}"
    parser.add_argument("tables", nargs="*", metavar="table", help=choices)
    parser.add_argument("--without", nargs="+", default=[], choices=TABLES, metavar="table")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULTS.name}/ as well")
    parser.add_argument(
        "--kept", action="store_true", help="print tables from saved rows, without measuring"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of `gpu` (8)")
    parser.add_argument("--quick", action="store_true", help="quick forms, where there are any")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(TABLES) - set(GROUPS):
        parser.error(f"no table is called {', '.join(unknown)}; there are {', '.join(TABLES)}")
    names = names_of(given)
    if OF_A_GPU & set(names):
        # Its processes share the GPU with this one, to which JAX would give most of the memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.quick + given.kept + given.save > 1 and not (given.kept and given.save):
        parser.error("--quick cannot be combined with --save or --kept")
    if given.save and (wrong := refused(names, jax.default_backend())):
        parser.error(
            f"{', '.join(sorted(OF_A_GPU))} is saved on a GPU, all other tables on a CPU; run "
            f"{', '.join(wrong)} without --save to print only"
        )
    jax.config.update("jax_compilation_cache_dir", None)  # compiling is measured too
    print(machine())
    failed = []
    for name in names:
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(Tee()) as printed:
                shown_by(name, given)()
        except Exception:  # hours of other tables must not be lost with this one
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"\n({name}: {(time.perf_counter() - started) / 60:.1f} minutes)")
        if given.save:
            save(name, printed.getvalue())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def shown_by(name: str, given: argparse.Namespace) -> Callable[[], None]:
    """The function that prints a table with these arguments."""
    table = TABLES[name]
    if name in OF_A_GPU:
        return partial(gpu.print_gpu, given.minutes)
    if given.quick or given.kept:
        form = table.quick if given.quick else table.kept
        assert form is not None
        return form
    return (table.saving if given.save else None) or table.whole


if __name__ == "__main__":
    main()
