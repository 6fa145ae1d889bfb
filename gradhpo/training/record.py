"""What has happened so far in a run."""

import numpy as np

from gradhpo.core.state import METRICS


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
