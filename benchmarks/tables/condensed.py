"""Dataset distillation beside selections: what a network learns from 10 to 100 images.

Wang et al., *Dataset Distillation*, 2018, arXiv:1811.10959; the images and one learning rate are
hyperparameters, as in Maclaurin et al., ICML 2015. Networks start at random, in distilling as in
the test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks.intervals import with_interval
from benchmarks.rows import Kept, Row, measured, taken
from benchmarks.tables.distilling import (
    INNER_STEPS,
    OUTER_RATE,
    OUTER_STEPS,
    VAL_BATCH,
    cost,
    distil,
)
from benchmarks.tables.small_sets import (
    CLASSES,
    RATES,
    SETS,
    TRAIN,
    VAL,
    Network,
    Schedule,
    at_random,
    digits,
    labels_of,
    trained_on,
)
from gradhpo.utils.tables import aligned


ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "images" / "condensed.png"
STYLE = ROOT / "docs" / "figures.mplstyle"
EACH = (1, 2, 5, 10)  # images of a class
FEW, MANY = Schedule(10, 10), Schedule(100, 10, batch=100)  # many: on all images
NETWORKS = {"same": Network(), "width 256": Network(256), "tanh": Network(64, "tanh")}
LONG = 300  # inner steps where costs are measured
DRAWN = 0  # the seed whose images are in the picture
LABELS = {
    "exact": "distilled", "soft": "distilled, soft labels", "truncated": "distilled, last 10 steps",
    "DrMAD": "distilled, DrMAD",
}  # fmt: skip


HEAD = f"""
scikit-learn's digits, 8 x 8: {TRAIN} to train, {VAL} to choose, the others to test, split by the
seed; a perceptron 64-64-10, relu, float32. Test accuracy in % of networks from fresh random starts:
mean of {{size.starts}} starts, 95 % interval over {{size.seeds}} seeds.
distilled: {INNER_STEPS} steps of gradient descent on all images, at the rate learned with them;
{{size.outer_steps}} outer steps of Adam ({OUTER_RATE}, cosine), hypergradients clipped,
each on {VAL_BATCH} training digits and from a new start; first images: as in `random`.
others: the rate (of {{rates}}) and the steps (every 10 up to 100) that are best on
the validation set; herding in pixels; k-means with one image a class: its mean.
"""


class Size(NamedTuple):
    seeds: int = 5
    starts: int = 20
    each: tuple[int, ...] = EACH
    others: tuple[str, ...] = ()  # `soft`, `truncated` or `DrMAD`, with one image a class
    outer_steps: int = OUTER_STEPS


QUICK = Size(1, 5, (1,), ("soft",), 100)


def settings_of(size: Size) -> list[dict[str, Any]]:
    """A row for each set of images, number of images and seed."""
    kinds = [("exact", size.each), *((name, size.each) for name in SETS)]
    kinds += [(name, (1,)) for name in size.others]
    rows = [(kind, each) for kind, every in kinds for each in every] + [("all", 0)]
    outer = lambda kind: 0 if kind in SETS or kind == "all" else size.outer_steps
    return [
        {"kind": kind, "each": each, "seed": seed, "outer_steps": outer(kind),
         "starts": size.starts}
        for kind, each in rows
        for seed in range(size.seeds)
    ]  # fmt: skip


def measure(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracies of fresh starts; each choice of rate and steps is by validation accuracy.

    `learned`: of a distilled set, at its own rate. On a network by name every set has the grid's.
    """
    kind, each, seed = (wanted[name] for name in ("kind", "each", "seed"))
    data, found = digits(seed), {}
    schedule = MANY if kind == "all" else FEW
    if kind == "all":
        x, classes = data.train
        labels = jnp.eye(CLASSES, dtype=jnp.float32)[classes]
    elif kind in SETS:
        x = jnp.asarray(SETS[kind](data.train, each, seed))
        labels = jnp.eye(CLASSES, dtype=jnp.float32)[labels_of(each)]
    else:
        method, first = "exact" if kind == "soft" else kind, at_random(data.train, each, seed)
        distilled = distil(
            data, first, seed, method, kind == "soft", outer_steps=wanted["outer_steps"]
        )
        x, labels, rate = distilled.images, distilled.labels, distilled.rate
        found |= {"rate": rate, "refused": distilled.refused}
        found["learned"] = trained_on(
            NETWORKS["same"], data, x, labels, seed, wanted["starts"], schedule,
            rate=rate, steps=INNER_STEPS,
        )._asdict()  # fmt: skip
    for name, network in NETWORKS.items():
        if name == "same" or each == 1:
            found[name] = trained_on(
                network, data, x, labels, seed, wanted["starts"], schedule
            )._asdict()
    found.setdefault("learned", found["same"])
    if kind == "exact" and seed == DRAWN and each == 1:
        found["images"] = np.round(np.asarray(x, float), 2).tolist()
    return found


def means(rows: list[Row], kind: str, each: int, where: str = "learned") -> list[float]:
    """One for each seed: over the starts. `learned`: at the set's own rate, if it has one."""
    chosen = [row for row in rows if (row["kind"], row["each"]) == (kind, each)]
    return [float(np.mean(row[where]["accuracies"])) for row in chosen]


def shown(values: list[float]) -> str:
    return with_interval(values, 1, 100) if values else "-"


def sets_table(rows: list[Row], size: Size) -> str:
    table = [["", *(f"{each} a class" for each in size.each)]]
    for kind in ("exact", "soft", "truncated", "DrMAD", *SETS):
        if kind not in SETS and kind not in ("exact", *size.others):
            continue
        cells = [shown(means(rows, kind, each)) for each in size.each]
        table.append([LABELS.get(kind, kind), *cells])
        if kind == "exact":
            cells = [shown(means(rows, kind, each, "same")) for each in size.each]
            table.append([f"{LABELS[kind]}, rate and steps of the grid", *cells])
    return aligned(table)


def transfer_table(rows: list[Row]) -> str:
    table = [["", "learned rate", *NETWORKS]]
    for kind in ("exact", *SETS):
        own = shown(means(rows, kind, 1)) if kind not in SETS else "-"
        table.append([LABELS.get(kind, kind), own, *(shown(means(rows, kind, 1, name))
                                                     for name in NETWORKS)])  # fmt: skip
    return aligned(table)


def costs_table(rows: list[Row]) -> str:
    table = [["", "ms (CPU)", "MiB", "cosine to the exact"]]
    for row in rows:
        table.append([row["method"], f"{row['ms']:.1f}", f"{row['mib']:.2f}",
                      f"{row['cosine']:.4f}"])  # fmt: skip
    return aligned(table)


def print_condensed(quick: bool = False, file: Path | Kept | None = None) -> None:
    """Rows that the file has are not measured again; with a file, there is a picture as well."""
    size = QUICK if quick else Size()
    rows = measured(settings_of(size), measure, file)
    methods = ("exact", 'exact, checkpoints="sqrt"', "truncated", "DrMAD")
    costs = measured([{"method": name, "steps": LONG} for name in methods], measure_cost, file)
    print(HEAD.format(size=size, rates=", ".join(map(str, RATES))))
    print(sets_table(rows, size))
    every = shown(means(rows, "all", 0))
    print(f"\nall {TRAIN} images, minibatches of {MANY.batch}, up to 1,000 steps: {every}")
    print("\nOne image a class, distilled for 64 units and relu, and other networks to train;")
    print("rate and steps of every set chosen on that network as above\n")
    print(transfer_table(rows))
    print(f"\nOne hypergradient, one image a class, of {LONG} inner steps, at the start\n")
    print(costs_table(costs))
    refused = sum(row.get("refused", 0) for row in rows)
    print(f"\n{refused} validation losses were not finite; {taken([*rows, *costs])}")
    if file is not None:
        save_figure(rows, FIGURE)


def measure_cost(wanted: Mapping[str, Any]) -> dict[str, float]:
    data = digits(0)
    return cost(wanted["method"], at_random(data.train, 1, 0), data, wanted["steps"])


def save_figure(rows: list[Row], path: Path) -> None:
    """Above the ten distilled images, below the means of their classes."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = next(row for row in rows if "images" in row and row["each"] == 1)
    means_of = SETS["k-means"](digits(DRAWN).train, 1, DRAWN)
    with plt.style.context(STYLE):
        made, grid = plt.subplots(2, CLASSES, figsize=(8, 1.9), layout="constrained")
        for row, images, name in zip(
            grid, (drawn["images"], means_of), ("distilled", "mean"), strict=True
        ):
            for axes, image in zip(row, np.reshape(images, (CLASSES, 8, 8)), strict=True):
                axes.imshow(image, cmap="gray")
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
            row[0].set_ylabel(name)
        made.savefig(path, dpi=100)
        plt.close(made)
