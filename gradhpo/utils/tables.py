"""Numbers and tables as text."""

import math
from collections.abc import Sequence


OPEN_LOOPS = ">: loops in linear solvers, and loops of a length known only at run time, count once"


class Report:
    """Shown as its text where nothing prints it, as at the end of a notebook's cell."""

    def __repr__(self) -> str:
        return str(self)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of aligned cells: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float, digits: int = 3) -> str:
    """A plain number of a few digits; a dash for a missing one."""
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def flops_of(value: float, *, at_least: bool = False) -> str:
    """`1.2 G`: floating-point operations."""
    if math.isnan(value):
        return "-"
    sign = ">" if at_least else ""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{sign}{value / size:.3g} {prefix}"
    return f"{sign}{value:.0f}"


def bytes_of(value: int) -> str:
    """`1.2 MiB`."""
    for power, prefix in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        # 1,000 and more do not fit into three digits.
        if value >= min(1024**power, max(1024, 999.5 * 1024 ** (power - 1))):
            return f"{value / 1024**power:.3g} {prefix}"
    return f"{value:.0f} B"


def seconds_of(value: float) -> str:
    """`1.2 ms`."""
    if math.isnan(value):
        return "-"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"
