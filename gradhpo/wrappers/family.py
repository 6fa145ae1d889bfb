"""The family tree of a population: who copied whom, and which lineage won."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.utils.lineage import lineage, lowest_at_the_end


def draw_family(history: Mapping[str, np.ndarray], ax: Any) -> Any:
    """Validation losses over steps: a grey line for each member, and an arrow for each copy.

    The lineage of the last step's best member is drawn in colour, back to its founder.
    """
    if "parent" not in history or np.ndim(history["parent"]) != 2:
        raise ValueError("the history records no exploits: run a Population with exploit_every")
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_family() needs matplotlib: pip install matplotlib") from error
    parent, loss = np.asarray(history["parent"]), np.asarray(history["val_loss"], float)
    steps = np.arange(1, len(parent) + 1)
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    for number in range(parent.shape[1]):
        ax.plot(steps, loss[:, number], color="#a0aec0", lw=0.8, zorder=1)
    for step, number in zip(*np.nonzero(parent != np.arange(parent.shape[1])), strict=True):
        ends = loss[step, number], loss[step, parent[step, number]]
        if np.all(np.isfinite(ends)):
            arrow = {"arrowstyle": "->", "color": "#dd6b20", "lw": 0.6, "alpha": 0.7}
            at = steps[step]
            ax.annotate("", (at, ends[0]), (at, ends[1]), arrowprops=arrow, zorder=2)
    line = lineage(parent, lowest_at_the_end(parent, loss))
    label = f"lineage of the best, from member {line[0]}"
    ax.plot(steps, loss[np.arange(len(line)), line], color="#2b6cb0", lw=1.6, label=label, zorder=3)
    ax.set(xlabel="step", ylabel="validation loss")
    ax.legend()
    return ax
