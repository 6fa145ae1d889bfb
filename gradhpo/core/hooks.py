"""What an algorithm may declare, and do beyond its estimate: everything has a default."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.inner_state import InnerState
from gradhpo.core.problem import Problem
from gradhpo.core.types import Declared, MetricDict, UpdateFn
from gradhpo.core.visibility import Sees
from gradhpo.utils.tracing import TAKES_ALL


Same = TypeVar("Same")  # typing.Self, which beartype knows only in classes


class Hooks(eqx.Module):
    """The part of [`Algorithm`][gradhpo.extend.Algorithm] that subclasses may override."""

    if TYPE_CHECKING:
        update_fn = Declared[UpdateFn | None]()

    # -- inner steps ---------------------------------------------------------------------------

    steps_field: ClassVar[str | None] = None
    """The name of the field that sets the number of inner steps of a `step`, at least 1.

    `None`, the default, is for algorithms that have their own `num_inner_steps`.
    """

    @property
    def num_inner_steps(self) -> int:
        """How many inner steps, and so training batches, one `step` takes.

        By default, the value of the field that `steps_field` names.
        """
        if self.steps_field is None:
            raise TypeError(
                f"{type(self).__name__} must say how many inner steps a step takes: with "
                "steps_field, the name of the field that counts them, or with num_inner_steps"
            )
        if self.steps_field not in (names := [field.name for field in dataclasses.fields(self)]):
            raise TypeError(
                f"steps_field of {type(self).__name__} must name one of its fields, which are "
                f"{', '.join(names)}; got {self.steps_field!r}"
            )
        return getattr(self, self.steps_field)

    def with_num_steps(self: Same, num_steps: int) -> Same | None:
        """The same optimizer with this number of inner steps; `None` if the number is fixed.

        By default it is fixed unless there is a `steps_field`, which is then replaced.
        """
        assert isinstance(self, Hooks)
        if self.steps_field is None:
            return None
        return dataclasses.replace(self, **{self.steps_field: num_steps})

    # -- what a method sees, and takes ---------------------------------------------------------

    @property
    def sees(self) -> Sees:
        """Where the method finds the hyperparameters; tracing names those it does not see.

        `"validation"`: only in the validation loss. `"optimum"`: also in the condition for the
        inner optimum. `"last update"`: also in how the last inner update changes the parameters.
        `"updates"`, the default: also in the effects of earlier updates. `"everything"`: in
        anything that has an effect, because updates are evaluated and not differentiated.
        """
        return "updates"

    @property
    def differentiates_gradient(self) -> bool:
        """Whether the method takes derivatives of the training gradient, or of `update_fn`.

        By default `True`, unless it `sees` only validation, or everything. With `False`, no check
        traces such derivatives: a first-order method works where second derivatives do not exist.
        """
        return self.sees not in ("validation", "everything")

    @property
    def differentiates_validation(self) -> bool:
        """Whether the method takes derivatives of the validation loss; default `True`."""
        return True

    @property
    def may_be_zero(self) -> bool:
        """Whether a hypergradient of exactly 0 may be right rather than a sign of a mistake.

        With `False`, the default, a warning names visible hyperparameters whose hypergradient is 0.
        """
        return False

    @property
    def differentiates_init(self) -> bool:
        """Whether the hypergradient includes how `init` depends on the hyperparameters.

        With `False`, the default, a warning while tracing names hyperparameters that act in the
        inner optimizer's `init`. [`unrolled`][gradhpo.extend.unrolled] from step 0 includes this
        dependence; [`pull_start`][gradhpo.extend.pull_start] and
        [`push_start`][gradhpo.extend.push_start] are for other algorithms.
        """
        return False

    @property
    def carries_start(self) -> bool:
        """Whether every step of an episode sees how the episode's start depends on the
        hyperparameters, as tangents carried from step to step do.

        With `False`, the default, only its first step does, and a warning while tracing names
        hyperparameters that act only there.
        """
        return False

    @property
    def passes_loss(self) -> bool:
        """Whether optax also gets the loss, which `optax.lbfgs` needs.

        Correct only if the inner update is not differentiated: its derivative would miss what optax
        does with the loss. By default `True` if the method `sees` only validation, or everything,
        or tunes nothing.
        """
        return not self.tunes or self.sees in ("validation", "everything")

    @property
    def derivatives(self) -> str:
        """The derivatives that the method takes, for the error message if one does not exist.

        The default follows from what the method differentiates and `sees`.
        """
        if not (self.tunes and self.differentiates_validation):
            return "first derivatives of the training loss"
        if not self.differentiates_gradient:
            return "first derivatives of both losses"
        if self.sees == "optimum":
            return (
                "derivatives of update_fn" if self.update_fn else "second derivatives of the loss"
            )
        return TAKES_ALL

    @property
    def tunes(self) -> bool:
        """Whether a step moves the hyperparameters; default `True`."""
        return True

    # -- memory --------------------------------------------------------------------------------

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> Any:
        """What carries over from step to step, at step 0: an `eqx.Module` of arrays, or `None`.

        Floating-point scalars among its fields are metrics. `batch` and `key` are the arguments of
        `init`. A field that is `None` without them may hold anything with them: states are checked
        against the memory that is made without them.
        """
        return None

    def restart_memory(self, memory: Any, z: InnerState, hyperparams: PyTree) -> Any:
        """The memory at the start of an episode, from `z`; by default it is unchanged."""
        return memory

    @property
    def reads_ahead(self) -> bool:
        """Whether `prepare` is called, for the batches of an episode; default `False`."""
        return False

    def prepare(self, problem: Problem, memory: Any, step: Array, num_steps: int) -> Any:
        """The memory for an episode of `num_steps` steps, if the method `reads_ahead`.

        `problem` has the batches of the whole episode; `step` counts the steps before it.
        """
        return memory

    def fit(self, problem: Problem, memory: Any, num_steps: int) -> Any:
        """The memory with an estimate from an episode, for methods that estimate on request."""
        raise TypeError(f"{type(self).__name__} has nothing to estimate from an episode")

    def finite_part(self, memory: Any) -> PyTree:
        """The part of a new memory that must be finite to accept a step; by default all of it.

        May only select leaves: under a wrapper every array has one more axis.
        """
        return memory

    def after_refusal(self, old: Any, new: Any) -> Any:
        """The memory after a refused step; by default the old one. May only select leaves."""
        return old

    # -- what others ask -----------------------------------------------------------------------

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """What the report of a run should add, or `""`; `run` also warns with it.

        `before` are the scalars of the memory at the start of the run, `metrics` the scalars of all
        steps, as means over `copies` of the inner problem.
        """
        return ""

    @property
    def without_episodes(self) -> str:
        """A warning for a run without `steps_per_episode`, or `""`."""
        return ""

    def with_less_memory(self: Same) -> Same | None:
        """The same optimizer with less memory, at more work; `None` if there is no such setting."""
        return None

    @property
    def memory_settings(self) -> dict[str, Any]:
        """The settings that save memory and are not the defaults, as `plan` shows them."""
        return {}

    def with_difference_step(self: Same, factor: float) -> Same | None:
        """The same optimizer with its finite-difference step scaled; `None` if it takes none."""
        return None

    @property
    def suspect(self) -> str:
        """What usually causes a non-finite estimate while the exact hypergradient is finite."""
        return "a product that only this method takes"
