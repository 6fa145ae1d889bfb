"""What a run writes down as it goes: the metrics of every step, and which were rejected."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.types import METRICS
from gradhpo.training.members import every_member
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.processes import is_shared
from gradhpo.utils.trees import tree_l2_norm


def norm_of(tree: PyTree, num_members: int | None = None) -> float:
    """The norm of parameters, on the host if possible, as each model would be another program.

    For a population, the lowest of its members.
    """
    if is_shared(tree):
        return float(_norm_in_place(tree, num_members))
    rows = [np.asarray(x, float).reshape(num_members or 1, -1) for x in jax.tree.leaves(tree)]
    return float(np.sqrt(np.min(sum(np.sum(np.square(x), axis=1) for x in rows))))


@compiled
def _norm_in_place(tree: PyTree, num_members: int | None) -> Array:
    return tree_l2_norm(tree) if num_members is None else jnp.min(jax.vmap(tree_l2_norm)(tree))


class Columns:
    """Metrics step by step: one array for each name, with room for more.

    Not a list of pieces: for a million chunks their headers alone would take a gigabyte.
    """

    def __init__(self):
        self._room: dict[str, np.ndarray] = {}
        self.length = 0

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """The rows of one more chunk, copied."""
        end = self.length + len(next(iter(metrics.values())))
        for name, values in metrics.items():
            of_one = values.shape[1:]
            room = self._room.get(name, np.empty((0, *of_one), values.dtype))
            if len(room) < end:
                larger = np.empty((max(2 * len(room), end), *of_one), room.dtype)
                larger[: self.length] = room[: self.length]
                self._room[name] = room = larger
            room[self.length : end] = values
        self.length = end

    def since(self, row: int) -> dict[str, np.ndarray]:
        """All rows from one on."""
        return {name: room[row : self.length] for name, room in self._room.items()}


class Record:
    """The metrics of all steps, and which of them were rejected as non-finite."""

    def __init__(
        self,
        first_step: int,
        rejected_before: np.ndarray,
        norm_at_start: float,
        shows: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda metrics: metrics,
    ):
        self._first, self.norm_at_start, self._shows = first_step, norm_at_start, shows
        self.columns = Columns()
        self._last = self._rejected_before = rejected_before
        self.taken = self.resumed_at = 0
        self.rejected: list[int] = []  # which steps, as `state.step` counts them
        self.in_a_row = self.longest = 0
        self.of_derivatives = 0  # rejected though both losses were finite

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """The steps of one more chunk."""
        self.columns.add(metrics)
        if np.array_equal(metrics["rejected"][-1], self._last):  # as nearly always
            self.taken += len(metrics["rejected"])
            self.in_a_row = 0
            return
        losses = np.isfinite(metrics["train_loss"]) & np.isfinite(metrics["val_loss"])
        only_derivative = every_member(losses & ~np.isfinite(metrics["hypergrad_norm"]))
        counted = np.concatenate([np.asarray(self._last)[None], metrics["rejected"]])
        self._last = counted[-1]
        refused = every_member(np.diff(counted, axis=0) > 0)
        for rejected, derivative in zip(refused, only_derivative, strict=True):
            self.taken += 1
            self.in_a_row = self.in_a_row + 1 if rejected else 0
            self.longest = max(self.longest, self.in_a_row)
            if rejected:
                self.rejected.append(self._first + self.taken)
                self.of_derivatives += int(derivative)

    def emptied(self) -> "Record":
        """The record of the same run before its first step."""
        return Record(self._first, self._rejected_before, self.norm_at_start, self._shows)

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
        return self.columns.since(0) or {name: np.zeros(0) for name in METRICS}

    def shown(self) -> dict[str, np.ndarray]:
        """The same as callbacks see them, with one value for each step."""
        return self._shows(self.metrics())


def looks_finite(metrics: Mapping[str, np.ndarray]) -> bool:
    """Whether nothing in the metrics says why steps are refused."""
    names = ("train_loss", "val_loss", "hypergrad_norm")
    return all(np.all(np.isfinite(metrics[name])) for name in names)
