"""What an optimizer must know about its inner problems, whether one or many."""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.inputs import Inputs
from gradhpo.core.outer import Estimate
from gradhpo.core.state import BilevelState
from gradhpo.core.types import Declared, MetricDict


class InnerProblems(eqx.Module):
    """The abstract half of `BilevelOptimizer`.

    `Algorithm` implements it for one inner problem, wrappers for several. Names without an
    underscore are those that an algorithm may override.
    """

    if TYPE_CHECKING:
        num_members = Declared[int | None]()
    else:
        num_members = None
    """How many sets of hyperparameters lead all arrays of a state; `None` for a single set."""

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
    def may_be_zero(self) -> bool:
        """Whether a hypergradient of exactly 0 is no sign of a mistake."""

    @property
    @abc.abstractmethod
    def reads_ahead(self) -> bool:
        """Whether the batches of an episode are read before it runs."""

    @abc.abstractmethod
    def finite_part(self, memory: PyTree) -> PyTree:
        """The part of a new memory that must be finite to accept a step. Only selects."""

    @abc.abstractmethod
    def after_refusal(self, old: PyTree, new: PyTree) -> PyTree:
        """The memory after a refused step, combined from both. Only selects."""

    @abc.abstractmethod
    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """What the report of a run should add; metrics are means over `copies` problems."""

    # What wrappers and the rest of the library need from an optimizer with any number of inner
    # problems.

    @abc.abstractmethod
    def _init_state(
        self,
        params: PyTree,
        hyperparams: PyTree,
        model_state: PyTree,
        batch: PyTree,
        key: Array | None,
    ) -> BilevelState:
        """The state at step 0, from leaves that were checked."""

    @abc.abstractmethod
    def _adopt(self, state: BilevelState, *, keep_memory: bool) -> BilevelState:
        """As `adopt`; or with as much of the memory as fits."""

    @abc.abstractmethod
    def _solve(self, inputs: Inputs) -> Estimate:
        """Advances the inner problem by `num_inner_steps`, and returns its hypergradient."""

    @abc.abstractmethod
    def _seen(self, inputs: Inputs) -> list[bool]:
        """For each leaf of the hyperparameters, whether this method can see it."""

    @abc.abstractmethod
    def _recomputes(self, inputs: Inputs) -> bool:
        """Whether second-derivative products recompute activations instead of keeping them."""

    @abc.abstractmethod
    def _outer_loss(self, inputs: Inputs) -> Array:
        """The validation loss after `num_inner_steps` inner steps."""

    @abc.abstractmethod
    def _begin_episode(self, inputs: Inputs, num_steps: int) -> BilevelState:
        """The state after the algorithm has read an episode of `num_steps` steps ahead."""

    @abc.abstractmethod
    def _fit(self, inputs: Inputs) -> BilevelState:
        """The state with what the algorithm estimates from a whole episode, a `BatchStack`."""

    @abc.abstractmethod
    def _restart(
        self, state: BilevelState, start: InnerState, reptile_rate: Float[Array, ""]
    ) -> BilevelState:
        """The state at the start of the next episode; the last one started from `start`."""

    @abc.abstractmethod
    def _restart_at(self, state: BilevelState, start: Start) -> BilevelState:
        """The state at the start of an episode with new initial parameters."""

    @abc.abstractmethod
    def _inner_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        """The updates of the inner optimizer for a gradient, and its next state."""

    @abc.abstractmethod
    def _function_response(self, state: BilevelState, batch: PyTree) -> tuple[PyTree, bool]:
        """What `grad_fn` or `update_fn` returns for a batch, and whether that is new params."""

    @abc.abstractmethod
    def _param_norm(self, w: PyTree) -> Array:
        """The metric `param_norm`."""

    @abc.abstractmethod
    def _scalars(self, memory: PyTree) -> MetricDict:
        """The part of the memory that serves as metrics: its scalars."""
