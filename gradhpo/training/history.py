"""What `run` recorded, step by step."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradhpo.core.types import METRICS


if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Record:
    """The metrics of all steps, and which of them were rejected as non-finite."""

    def __init__(self, first_step: int, rejected_before: float, norm_at_start: float):
        self._first, self.norm_at_start = first_step, norm_at_start
        self._pieces: list[dict[str, np.ndarray]] = []
        self._last = rejected_before
        self.taken = self.resumed_at = 0
        self.rejected: list[int] = []  # which steps, as `state.step` counts them
        self.in_a_row = self.longest = 0
        self.of_derivatives = 0  # rejected though both losses were finite

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """The steps of one more chunk."""
        self._pieces.append(metrics)
        if metrics["rejected"][-1] == self._last:  # as nearly always
            self.taken += len(metrics["rejected"])
            self.in_a_row = 0
            return
        losses = np.isfinite(metrics["train_loss"]) & np.isfinite(metrics["val_loss"])
        only_derivative = losses & ~np.isfinite(metrics["hypergrad_norm"])
        for value, derivative in zip(metrics["rejected"], only_derivative, strict=True):
            self.taken += 1
            rejected = value > self._last
            self._last = value
            self.in_a_row = self.in_a_row + 1 if rejected else 0
            self.longest = max(self.longest, self.in_a_row)
            if rejected:
                self.rejected.append(self._first + self.taken)
                self.of_derivatives += int(derivative)

    def resume(self, metrics: dict[str, np.ndarray]) -> None:
        """The steps that an earlier session took."""
        if metrics:
            self.add(metrics)
        self.resumed_at = self.taken

    @property
    def may_return(self) -> bool:
        """Whether this session has taken a step that would be lost if it raised."""
        return self.taken > self.resumed_at

    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric over all steps."""
        if not self._pieces:
            return {name: np.zeros(0) for name in METRICS}
        # One piece from now on: a reader of a long run joins it once.
        joined = {name: np.concatenate([p[name] for p in self._pieces]) for name in self._pieces[0]}
        self._pieces = [joined]
        return joined


class History(Mapping[str, np.ndarray]):
    """Metrics of a run: a mapping from a metric's name to an array `[steps]`.

    `"train_loss"`, `"val_loss"`, `"hypergrad_norm"`, `"param_norm"`, `"hyperparam_norm"` and
    `"rejected"` (how many so far) as in [`BilevelState`][gradhpo.BilevelState], and the scalars in
    the memory of the algorithm (`"theta"`, `"linear_residual"`). Looking up another name raises
    `KeyError`.

    **Fields:**

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
            raise KeyError(f"no metric {name!r}; there are {', '.join(self._metrics)}")
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def __repr__(self) -> str:
        steps = max(map(len, self._metrics.values()), default=0)
        return f"History({steps} steps, {', '.join(self)}; stopped: {self.stop_reason})"

    def plot(self, *metrics: str, ax: "Axes | None" = None, **kwargs: Any) -> "Axes":
        """Draws metrics over steps with matplotlib.

        **Arguments:** names of `metrics`, by default both losses; `ax` to draw into, by default a
        new one; everything else goes to `ax.plot`.

        **Returns:** `ax`.

        **Raises:** `KeyError` for a name that is not a metric, `ImportError` without matplotlib.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        for name in metrics or ("train_loss", "val_loss"):
            ax.plot(np.arange(1, len(self[name]) + 1), self[name], label=name, **kwargs)
        ax.set_xlabel("step")
        ax.legend()
        return ax
