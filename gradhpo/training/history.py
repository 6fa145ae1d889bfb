"""What `run` recorded, step by step."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradhpo.training.members import lowest


if TYPE_CHECKING:
    from matplotlib.axes import Axes


class History(Mapping[str, np.ndarray]):
    """Metrics of a run: a mapping from a metric's name to an array `[steps]`.

    The names are `"train_loss"`, `"val_loss"`, `"hypergrad_norm"`, `"param_norm"`,
    `"hyperparam_norm"` and `"rejected"` (how many so far) as in
    [`BilevelState`][gradhpo.BilevelState], `[steps, members]` for a
    [`Population`][gradhpo.Population]; the scalars in the algorithm's memory (`"theta"`,
    `"linear_residual"`); and the metrics that losses return, `"train_accuracy"` and
    `"val_accuracy"` for `{"accuracy": ...}`. Looking up another name raises `KeyError`.

    **Fields:**

    - `metrics` (of the constructor alone): name to array, what the mapping holds.
    - `stop_reason`: `"num_steps"`; a callback's `stop_reason` (`"early stopping"`, `"time limit"`)
        or `"callback"`; `"interrupted"`; `"rejected"`; `"data exhausted"`; or what failed: `"data
        error"`, `"callback error"`, `"loss error"` (`eqx.error_if` in one), `"device error"`,
        `"out of memory"`.
    - `report`: a few sentences on how the run went.
    - `error`: the exception that ended the run, or `None`.

    ```python
    history = gradhpo.History({"val_loss": np.array([2.0, 1.0])}, "num_steps", "")
    assert history["val_loss"][-1] == 1.0
    ```
    """

    def __init__(
        self,
        metrics: Mapping[str, np.ndarray],
        stop_reason: str,
        report: str,
        error: Exception | None = None,
    ):
        self._metrics = dict(metrics)
        self.stop_reason = stop_reason
        self.report = report
        self.error = error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._metrics:
            raise KeyError(f"no metric {name!r}; available: {', '.join(self._metrics)}")
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def __repr__(self) -> str:
        steps = max(map(len, self._metrics.values()), default=0)
        return f"History({steps} steps, {', '.join(self)}; stopped: {self.stop_reason})"

    def plot(self, *metrics: str, ax: "Axes | None" = None, **kwargs: Any) -> "Axes":
        """Plots metrics over steps with matplotlib; for a population, a fan of its members.

        **Arguments:** names of `metrics`, by default both losses; `ax` to draw into, by default a
        new one; everything else goes to `ax.plot`.

        **Returns:** `ax`.

        **Raises:** `KeyError` for a name that is not a metric, `ImportError` without matplotlib.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        for name in metrics or ("train_loss", "val_loss"):
            steps, values = np.arange(1, len(self[name]) + 1), self[name]
            if values.ndim == 2:  # all members, and the lowest of them
                color = kwargs.get("color", f"C{len(ax.lines) % 10}")
                fan: dict[str, Any] = {"lw": 0.7, "alpha": 0.4} | kwargs | {"color": color}
                ax.plot(steps, values, **fan)
                if name.startswith("hyperparams"):  # none of them is the best for being low
                    ax.plot([], [], label=name, **(kwargs | {"color": color}))
                    continue
                values, name = lowest(values), f"{name}, lowest"
                ax.plot(steps, values, label=name, **(kwargs | {"color": color}))
                continue
            ax.plot(steps, values, label=name, **kwargs)
        ax.set_xlabel("step")
        ax.legend()
        return ax
