"""The reports as figures."""

import itertools
from typing import Any

import numpy as np


# Pictures side by side.
_MOST_SCATTERED = 6
BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0"


def figure(columns: int, *, height: float, width: float, sharey: bool = False) -> tuple[Any, Any]:
    """A matplotlib figure with its axes side by side; matplotlib is imported only here."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib: pip install matplotlib; str(report) needs nothing"
        ) from error
    made, axes = plt.subplots(
        1, columns, figsize=(width, height), sharey=sharey, layout="constrained", squeeze=False
    )
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return made, axes[0]


def _log_scale(axis: Any, values: Any) -> None:
    """Plain numbers at few positions; matplotlib's own minor labels overlap."""
    from matplotlib import ticker

    values = np.asarray([x for x in values if np.isfinite(x) and x > 0])
    decades = np.log10(values.max() / values.min()) if len(values) else 0
    subs = (1, 2, 5) if decades < 1 else (1, 3) if decades < 2 else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def draw_comparison(report: Any) -> Any:
    """For a `HypergradientComparison`: cosine, length, time and memory, one row per optimizer."""
    names = [name for name in report.hypergradients if not report.sees_none(name)]
    rows = np.arange(len(names))
    made, (cosine, norm, seconds, memory) = figure(
        4, height=1.6 + 0.42 * len(names), width=12.0, sharey=True
    )
    cosine.axvline(1, color=GREY, lw=0.8)
    cosine.axvline(0, color=GREY, lw=0.8)
    if len(report.per_leaf) > 1:
        first = True
        for leaf, of_leaf in report.per_leaf.items():
            seen = [leaf not in report.unseen.get(name, ()) for name in names]
            values = [of_leaf.cosine[name] for name in names]
            x, y = np.asarray(values)[seen], rows[seen]
            label = "of one leaf" if first else None
            cosine.plot(x, y, "|", color=ORANGE, ms=11, mew=1.6, label=label)
            first = False
    cosine.plot([report.cosine[n] for n in names], rows, "o", color=BLUE, label="of all together")
    if len(report.per_leaf) > 1:
        made.legend(*cosine.get_legend_handles_labels(), fontsize=8, loc="outside lower left",
                    ncols=2, frameon=False)  # fmt: skip
    cosine.set(
        xlim=(-1.08, 1.08),
        xticks=(-1, -0.5, 0, 0.5, 1),
        xlabel="cosine",
        yticks=rows,
        yticklabels=names,
    )
    cosine.invert_yaxis()
    norm.axvline(1, color=GREY, lw=0.8)
    lengths = [report.norm_ratio[n] for n in names]
    norm.plot(lengths, rows, "o", color=BLUE)
    norm.set(xscale="log", xlabel="norm / norm of the reference (log)")
    _log_scale(norm.xaxis, [*lengths, 1])
    training = report.costs["training alone"].seconds
    seconds.barh(rows, [report.seconds[n] / training for n in names], color=BLUE, height=0.55)
    seconds.set(xlabel="time / time of training alone")
    seconds.axvline(1, color=GREY, lw=0.8)
    needed = np.array([report.temporary_bytes[n] for n in names])
    size, unit = (2**20, "MiB") if needed.max(initial=0) >= 2**20 else (2**10, "KiB")
    memory.barh(rows, needed / size, color=BLUE, height=0.55)
    memory.set(xlabel=f"temporary memory, {unit}")
    for ax in (norm, seconds, memory):
        ax.tick_params(axis="y", length=0)
    title = f"{report.num_steps} inner steps, compared with {report.reference_name}"
    blind = [name for name in report.hypergradients if report.sees_none(name)]
    title += f"; seeing none: {', '.join(blind)}" if blind else ""
    made.suptitle(title, fontsize=11)
    return made


def draw_noise(report: Any) -> Any:
    """For a `HypergradientNoise`: mean squared error, split into bias and variance."""
    names = list(report.overall)
    rows = np.arange(len(names))
    bias = np.square([report.overall[name].bias for name in names])
    variance = np.square([report.overall[name].noise for name in names])
    made, (cosine, error, ratio) = figure(
        3, height=1.6 + 0.42 * len(names), width=12.0, sharey=True
    )
    cosine.plot([x.cosine for x in report.overall.values()], rows, "o", color=BLUE)
    cosine.axvline(0, color=GREY, lw=0.8)
    cosine.axvline(1, color=GREY, lw=0.8)
    cosine.set(xlim=(-1.08, 1.08), xticks=(-1, -0.5, 0, 0.5, 1), xlabel="cosine of the means")
    cosine.set(yticks=rows, yticklabels=names)
    cosine.invert_yaxis()
    error.barh(rows, bias, color=ORANGE, height=0.55, label="bias, squared")
    error.barh(rows, variance, left=bias, color=BLUE, height=0.55, label="variance of a draw")
    error.set(xlabel="squared error, relative to the exact mean")
    error.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    ratios = list(report.signal_to_noise.values())
    ratio.plot(ratios, rows, "o", color=BLUE)
    ratio.axvline(1, color=GREY, lw=0.8)
    ratio.set(xscale="log", xlabel="signal / noise of a draw (log)")
    _log_scale(ratio.xaxis, [*ratios, 1])
    for ax in (error, ratio):
        ax.tick_params(axis="y", length=0)
    made.suptitle(f"{report.num_draws} draws, {report.num_steps} inner steps", fontsize=11)
    return made


def draw_horizon(report: Any) -> Any:
    """For a `Horizon`: the share of every inner step, and the cosine of every truncation."""
    steps = np.arange(1, report.num_steps + 1)
    made, (share, cosine) = figure(2, height=3.8, width=11.0)
    share.axhline(0, color=GREY, lw=0.8)
    share.bar(steps, report.share["exact"], color=GREY, width=1.0, label="exact")
    styles = itertools.cycle([("s", GREEN), ("-", ORANGE), ("--", BLUE)])
    others = [name for name in report.share if name != "exact"]
    for name, (style, color) in zip(others, styles, strict=False):
        shown = report.share[name] != 0
        share.plot(steps[shown], report.share[name][shown], style, color=color, label=name)
    made.suptitle(
        f"Where the hypergradient of {report.num_steps} inner steps comes from", fontsize=11
    )
    share.set(xlabel="inner step", ylabel="share of the exact hypergradient")
    share.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    cosine.axhline(1, color=GREY, lw=0.8)
    cosine.plot(steps, report.cosine_of_last, color=BLUE, label="cosine with the exact one")
    cosine.plot(steps, report.length_of_last, "--", color=ORANGE, label="length / its length")
    cosine.set(xlabel="last inner steps kept (truncation)")
    cosine.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    for ax in (share, cosine):
        ax.xaxis.get_major_locator().set_params(integer=True)
    lowest = np.min(report.cosine_of_last, where=np.isfinite(report.cosine_of_last), initial=0)
    longest = np.max(report.length_of_last, where=np.isfinite(report.length_of_last), initial=1)
    cosine.set(ylim=(lowest - 0.02, 1.04 * longest))
    return made


def draw_retraining(report: Any) -> Any:
    """For a `RetrainingScore`: predicted against true changes, one picture per estimator."""
    names = [name for name, changes in report.predicted.items() if np.any(changes)]
    shown = names[:_MOST_SCATTERED]
    made, axes = figure(max(1, len(shown)), height=3.6, width=max(4.0, 3.2 * len(shown)))
    for ax, name in zip(axes, shown, strict=False):
        finite = np.isfinite(report.true) & np.isfinite(report.predicted[name])
        x, y = report.true[finite], report.predicted[name][finite]
        ends = np.array([np.min(x, initial=0), np.max(x, initial=0)])
        ax.plot(ends, ends, color=GREY, lw=0.8)
        ax.plot(x, y, ".", color=BLUE, ms=4, alpha=0.5, mew=0, rasterized=len(x) > 5_000)
        ax.set(xlabel="true change of the loss")
        ax.set_title(f"{name}: {report.score[name]:.3f}", fontsize=10)
        ax.locator_params(nbins=4)
    axes[0].set(ylabel="predicted change")
    title = f"{report.num_retrainings} retrainings, {report.true.shape[1]} queries"
    left_out = [name for name in report.predicted if name not in shown]
    title += f"; not shown: {', '.join(left_out)}" if left_out else ""
    made.suptitle(title, fontsize=11)
    return made
