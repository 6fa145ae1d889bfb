"""What an optimizer has to know of its inner problems, be they one or many."""

import abc
from collections.abc import Mapping

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradhpo.core.inputs import Inputs
from gradhpo.core.outer import Estimate
from gradhpo.core.state import BilevelState
from gradhpo.core.types import MetricDict


class InnerProblems(eqx.Module):
    """The abstract half of `BilevelOptimizer`.

    `Algorithm` fills it in for one inner problem, wrappers for several. Names without an underscore
    are those that an algorithm may change.
    """

    @property
    @abc.abstractmethod
    def num_inner_steps(self) -> int:
        """How many inner steps, and so training batches, one `step` takes."""

    @property
    @abc.abstractmethod
    def tunes(self) -> bool:
        """Whether a step moves the hyperparameters."""

    @property
    @abc.abstractmethod
    def reads_ahead(self) -> bool:
        """Whether the batches of an episode are looked at before it is run."""

    @abc.abstractmethod
    def finite_part(self, memory: PyTree) -> PyTree:
        """What of a new memory must be finite for a step to be accepted. Only selects."""

    @abc.abstractmethod
    def after_refusal(self, old: PyTree, new: PyTree) -> PyTree:
        """The memory after a refused step, put together from both. Only selects."""

    @abc.abstractmethod
    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """What the report of a run should add; metrics are means over so many `copies`."""

    # What wrappers and the other parts of the library ask of an optimizer of any number of inner
    # problems.

    @abc.abstractmethod
    def _init_state(
        self, params: PyTree, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> BilevelState:
        """The state at step 0, of leaves that were checked."""

    @abc.abstractmethod
    def _adopt(self, state: BilevelState, *, keep_memory: bool) -> BilevelState:
        """As `adopt`; or with the memory kept as far as it fits."""

    @abc.abstractmethod
    def _solve(self, inputs: Inputs) -> Estimate:
        """Advances the inner problem by `num_inner_steps`; the hypergradient at its end."""

    @abc.abstractmethod
    def _seen(self, inputs: Inputs) -> list[bool]:
        """For each leaf of the hyperparameters whether this method can see it."""

    @abc.abstractmethod
    def _outer_loss(self, inputs: Inputs) -> Array:
        """The validation loss after `num_inner_steps` inner steps."""

    @abc.abstractmethod
    def _begin_episode(self, inputs: Inputs, num_steps: int) -> BilevelState:
        """The state once the algorithm knows of an episode of `num_steps` steps, not yet run."""

    @abc.abstractmethod
    def _fit(self, inputs: Inputs) -> BilevelState:
        """The state with what the algorithm estimates from a whole episode, a `BatchStack`."""

    @abc.abstractmethod
    def _restart(
        self, state: BilevelState, start: PyTree, reptile_rate: Float[Array, ""]
    ) -> BilevelState:
        """The state at the start of the next episode; the last one started from `start`."""

    @abc.abstractmethod
    def _inner_response(self, state: BilevelState, gradient: PyTree) -> PyTree:
        """What the inner optimizer makes of a gradient; `None` beside an `update_fn`."""

    @abc.abstractmethod
    def _param_norm(self, w: PyTree) -> Array:
        """The metric `param_norm`."""

    @abc.abstractmethod
    def _scalars(self, memory: PyTree) -> MetricDict:
        """What of the memory is a metric: the scalars in it."""
