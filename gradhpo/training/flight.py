"""A chunk on its way: on the device, and then its metrics on the host."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array

from gradhpo.core.inner_state import InnerState
from gradhpo.core.state import BilevelState
from gradhpo.training.chunk import Chunk
from gradhpo.training.refused import Refused
from gradhpo.utils.processes import numbers


def on_host(x: Array) -> np.ndarray:
    """A copy: a view of a device array, as a CPU gives, would keep the whole array alive."""
    copy = np.array(numbers(x))
    copy.flags.writeable = False  # several callbacks are given it
    return copy


def at_the_end(values: Mapping[str, float], length: int) -> dict[str, np.ndarray]:
    """One value for each step of a chunk: `nan` except for the last."""
    return {name: np.array([*[np.nan] * (length - 1), x]) for name, x in values.items()}


@dataclasses.dataclass
class Flight:
    """A chunk on the device: its future results, and where its data end."""

    chunk: Chunk
    state: BilevelState
    start: InnerState
    reached: InnerState | None  # what the last step left, if it differs from the state's
    metrics: dict[str, Array]
    moved: Array  # for each leaf of the hyperparameters whether its hypergradient was ever not 0
    refused: Refused
    positions: dict[str, Any]
    may_return: bool  # whether there are steps to return if this one fails
    taken: int  # steps of the run at its end
    due: bool | None = None  # whether a checkpoint is, once that is decided

    @property
    def measured(self) -> BilevelState:
        """The state whose parameters were measured last.

        If an episode has ended, `state` is already at the start of the next one.
        """
        if self.reached is None:
            return self.state
        params = eqx.combine(self.reached.w, self.state.params)
        return self.state.update(params=params, model_state=self.reached.r)
