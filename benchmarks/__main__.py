"""`python -m benchmarks [table ...]`: prints all tables, or those that are named.

With `--save` the output of each table is also written to `benchmarks/results/<table>.txt`.
"""

import argparse
import contextlib
import datetime
import functools
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
from benchmarks.peers import benchopt, budget, earlier, implicit, pytorch, suboptimality
from benchmarks.trust import calibration


RESULTS = Path(__file__).parent / "results"
TABLES = {
    # costs
    "flops": compiled.print_flops,
    "loop": loops.print_loops,
    "compile": compiled.print_compile_times,
    "memory": compiled.print_memory,
    "run_memory": run_memory.print_run_memory,
    "exact": loops.print_exact,
    "networks": networks.print_networks,
    "convolutions": convolutions.print_convolutions,
    "units": compiled.print_units,
    "distilled": methods.print_distilled,
    "roads": methods.print_roads,
    "natural": natural.print_natural,
    "plain": loops.print_plain,
    "host": host.print_host,
    "night": host.print_night,
    "scaling": scaling.print_scaling,
    "devices": devices.print_devices,
    "replay": replays.print_replay,
    "accuracy": accuracy.print_accuracy,
    "trust": calibration.print_trust,
    "gpu": gpu.print_gpu,
    # peers
    "earlier": earlier.print_earlier,
    "torch": pytorch.print_pytorch,
    "implicit": implicit.print_implicit,
    "benchopt": benchopt.print_benchopt,
    "suboptimality": suboptimality.print_suboptimality,
    "budget": budget.print_budget,
}
# About the device and not about ratios on it: made on request, and saved under the device's name.
OF_A_GPU = {"gpu"}
# A table may save more than its text.
SAVING = TABLES | {
    "budget": functools.partial(budget.print_budget, figure=budget.FIGURE),
    "trust": functools.partial(calibration.print_trust, rows=calibration.ROWS),
}


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

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
    """The tables to print: those that are named, or all but those of a GPU."""
    named = given.tables or [name for name in TABLES if name not in OF_A_GPU]
    return [name for name in named if name not in given.without]


def refused(names: list[str], backend: str) -> list[str]:
    """The tables that must not be saved on this backend."""
    return [name for name in names if (name in OF_A_GPU) != (backend == "gpu")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--without", nargs="+", default=[], choices=TABLES, metavar="table")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULTS.name}/ as well")
    parser.add_argument("--minutes", type=float, default=8.0, help="that `gpu` may take (8)")
    parser.add_argument("--quick", action="store_true", help="a few rows of `trust`, unjudged")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(TABLES):
        parser.error(f"no table is called {', '.join(unknown)}; there are {', '.join(TABLES)}")
    names = names_of(given)
    if OF_A_GPU & set(names):
        # Its processes share the GPU with this one, which JAX would give most of the memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.save and given.quick:
        parser.error("--quick makes no table to save")
    if given.save and (wrong := refused(names, jax.default_backend())):
        parser.error(
            f"{', '.join(sorted(OF_A_GPU))} is saved on a GPU, all other tables on a CPU; run "
            f"{', '.join(wrong)} without --save to print yours"
        )
    jax.config.update("jax_compilation_cache_dir", None)  # compiling is measured too
    print(machine())
    tables, failed = SAVING if given.save else TABLES, []
    tables = tables | {"gpu": functools.partial(gpu.print_gpu, given.minutes)}
    if given.quick:
        tables = tables | {"trust": functools.partial(calibration.print_trust, quick=True)}
    for name in names:
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(Tee()) as printed:
                tables[name]()
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
