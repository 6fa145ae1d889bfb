"""An optimizer's estimate in one precision, which can be computed again nearby."""

import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.start import started
from gradhpo.core.state import BilevelState
from gradhpo.diagnostics.case import Case
from gradhpo.diagnostics.comparison import agreement
from gradhpo.diagnostics.nonfinite import finiteness
from gradhpo.diagnostics.reference import FAILURES
from gradhpo.utils.foreign import RANDOM
from gradhpo.utils.tracing import differentiation_explained


# Above this, an estimate depends on the step of its own differences.
MOST_STEP_ERROR = 0.01


class StepError(NamedTuple):
    """How much an estimate by finite differences changes with its own step, in relative terms.

    `halved`: from `epsilon` to half of it; `much_smaller`: the same at a hundredth of `epsilon`.
    """

    halved: float
    much_smaller: float

    @property
    def finding(self) -> str:
        """What is wrong with `epsilon`; empty if the estimate changes by at most 1 %."""
        if self.halved <= MOST_STEP_ERROR:
            return ""
        # The truncation error falls with the step, rounding grows.
        kind = "large" if self.much_smaller < self.halved else "small (rounding)"
        changed = "leaves NaN" if math.isnan(self.halved) else f"is {self.halved:.1%} away"
        return f"epsilon is too {kind}: the estimate with half of it {changed}"


class Estimated:
    """An optimizer on a case: its `hypergradient` and `val_loss`, and what else is computed there.

    Everything runs the one program that is compiled first, except `cast` and `watched`.
    """

    def __init__(self, case: Case, optimizer: Algorithm, sees_any: bool):
        self.case, self.optimizer, self._sees_any = case, optimizer, sees_any
        self._begun = case.begun(optimizer)
        self.program = None
        if sees_any:
            start = self._begun(case.start(optimizer))
            self.program = case.compile(case.at_end, optimizer, start=start)
            self.hypergradient, self.val_loss, _ = self.program()
        else:  # a `step` would raise an error
            self.hypergradient = jax.tree.map(jnp.zeros_like, case.state.hyperparams)
            self.val_loss = jnp.asarray(jnp.nan)

    def cast(self, dtype: Any) -> "Estimated":
        """The same with all floating-point arrays in one precision."""
        is_floating = lambda x: eqx.is_inexact_array(x) or _is_floats(x)
        # Placed, not computed: metrics may be NaN, which jax_debug_nans refuses.
        cast = lambda x: jax.device_put(np.asarray(x, dtype)) if is_floating(x) else x
        of_case = (self.case.state, self.case.train_batch, self.case.val_batch)
        (state, train_batch, val_batch), optimizer = jax.tree.map(cast, (of_case, self.optimizer))
        case = dataclasses.replace(
            self.case, state=state, train_batch=train_batch, val_batch=val_batch
        )
        return Estimated(case, optimizer, self._sees_any)

    def again(
        self, state: BilevelState | None = None, batches: tuple[PyTree, PyTree] | None = None
    ) -> tuple[PyTree, Array]:
        """Hypergradient and validation loss from another state, on other batches of the shapes."""
        assert self.program is not None
        case, optimizer = self.case, self.optimizer
        like = case.state, (case.train_batch, case.val_batch)
        given = case.state if state is None else state, like[1] if batches is None else batches
        state, (train, val) = jax.tree.map(_placed_as, given, like)
        case = dataclasses.replace(case, state=state, train_batch=train, val_batch=val)
        start = self._begun(case.start(optimizer), train, val)
        return self.program(optimizer, start, train, val)[:2]

    def at(self, hyperparams: PyTree) -> BilevelState:
        """The state at other hyperparameters, which may act in a fresh inner optimizer's state."""
        case = self.case
        given = self.optimizer, case.start(self.optimizer), case.train_batch, case.val_batch
        problem = case.problem(*given)
        z = started(problem.phi, problem.z, hyperparams)
        return dataclasses.replace(case.state, hyperparams=hyperparams, inner_opt_state=z.s)

    @property
    def draws_random_numbers(self) -> bool:
        return self.program is not None and self.program.has(RANDOM)

    def watched(self, notes: list[str]) -> dict[str, Any] | None:
        """What `finiteness` returns, or `None` and a note if derivatives do not exist."""
        case = self.case
        looking = lambda *arguments: finiteness(case.problem(*arguments), case.num_steps)
        try:
            with differentiation_explained("the exact hypergradient"):
                return case.compile(looking, self.optimizer)()
        except FAILURES as error:
            note = f"the exact hypergradient is not available here: {first_line(error)}"
            if note not in notes:
                notes.append(note)
            return None

    def step_error(self) -> StepError | None:
        """For a method of finite differences, whose step is traced: nothing else is compiled."""
        program, case, optimizer = self.program, self.case, self.optimizer
        if program is None or optimizer.with_difference_step(1.0) is None:
            return None

        def estimate(factor: float) -> PyTree:
            other = optimizer.with_difference_step(factor)
            assert other is not None
            return program(other, case.start(other), case.train_batch, case.val_batch)[0]

        def change_at(factor: float) -> float:
            found = {"": estimate(factor / 2)}
            return agreement(found, estimate(factor)).relative_error[""]

        return StepError(halved=change_at(1.0), much_smaller=change_at(0.01))


def _placed_as(x: Any, like: Any) -> Any:
    """Places arrays as those that a program was compiled with."""
    return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else x


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_floats(x: Any) -> bool:
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)
