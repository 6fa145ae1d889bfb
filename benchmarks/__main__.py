"""`python -m benchmarks [table ...]`: all tables, or the named ones."""

import argparse
import os
import platform

import equinox
import jax
import optax

import gradhpo
from benchmarks import accuracy, compiled, distilled, earlier, host, roads, timed


TABLES = {
    "flops": compiled.print_flops,
    "units": compiled.print_units,
    "memory": compiled.print_memory,
    "compile": compiled.print_compile_times,
    "distilled": distilled.print_distilled,
    "roads": roads.print_roads,
    "accuracy": accuracy.print_accuracy,
    "loop": timed.print_loops,
    "exact": timed.print_exact,
    "host": host.print_host,
    "night": host.print_night,
    "earlier": earlier.print_earlier,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="default: all")
    chosen = parser.parse_args().tables or list(TABLES)
    print(
        f"gradhpo {gradhpo.__version__}, jax {jax.__version__}, equinox {equinox.__version__}, "
        f"optax {optax.__version__}, Python {platform.python_version()}, "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    for name in chosen:
        TABLES[name]()


if __name__ == "__main__":
    main()
