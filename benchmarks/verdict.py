"""The picture of the summary page, drawn from the saved table `results/budget.txt`.

    python -m benchmarks.verdict

writes `docs/images/verdict.png`: for each problem of `peers/budget.py`, the losses at the end of
every search, relative to the untuned model.
"""

import re
from pathlib import Path

import matplotlib


ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "budget.txt"
FIGURE = ROOT / "docs" / "images" / "verdict.png"
STYLE = ROOT / "docs" / "figures.mplstyle"
LABELS = {  # from the table to the picture; "retrained" comes after "gradhpo", and replaces it
    "gradhpo": "gradhpo",
    "retrained": "gradhpo",
    "random search": "random search",
    "Optuna's TPE": "Optuna's TPE",
    "all alike": "one shared penalty",
    "val. set alone": "validation set alone",
}
ROW = re.compile(
    r"  +(?P<name>\S.*?) +\d+ +[\d.]+ +[\d.]+ (?P<val>[\d.]+) \([^)]*\) (?P<test>[\d.]+) \("
)

Losses = dict[str, tuple[float, float]]  # by search: validation and test, 1 before tuning


def read(table: str) -> dict[str, Losses]:
    """The rows "at the end" of each problem, relative to "untuned"."""
    found: dict[str, Losses] = {}
    for block in re.split(r"\n  (?=[\d,]+: )", table)[1:]:
        title = block[: block.index(" (")]
        end = block[block.index("at the end") :]
        rows = {row["name"]: (float(row["val"]), float(row["test"])) for row in ROW.finditer(end)}
        val, test = rows.pop("untuned")
        found[title] = {LABELS[name]: (v / val, t / test) for name, (v, t) in rows.items()}
    return found


def draw(problems: dict[str, Losses], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
        names, y = {}, 0.0
        for title, rows in problems.items():
            axes.text(0.0, y, title, fontsize=12, weight="bold", va="center")
            for name, (val, test) in rows.items():
                y += 1
                color = "C0" if name == "gradhpo" else "0.45"
                axes.plot([val, test], [y, y], color=color, lw=1, zorder=1)
                axes.plot(test, y, "o", color=color, ms=9, mfc="white", mew=1.5)
                axes.plot(val, y, "o", color=color, ms=5)  # seen inside the other
                names[y] = name
            y += 1.5
        axes.axvline(1, color="0.7", lw=1, ls=":", zorder=0)
        axes.plot([], [], "o", color="0.45", ms=5, label="validation loss")
        axes.plot([], [], "o", color="0.45", ms=9, mfc="white", mew=1.5, label="test loss")
        axes.set(xlim=(0, 1.15), ylim=(y - 0.5, -0.8))
        axes.set_yticks(list(names), list(names.values()))
        axes.set_xlabel("loss after tuning / loss without", fontsize=12)
        axes.tick_params(labelsize=12)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, fontsize=12)
        figure.savefig(path, dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    draw(read(TABLE.read_text()), FIGURE)
