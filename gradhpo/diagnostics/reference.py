"""The exact hypergradient of a whole horizon, with the inner update of any optimizer."""

import contextlib
from collections.abc import Iterator

import equinox as eqx
import jax
import optax

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.checkpoints import square_root, unrolled
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem
from gradhpo.core.state import BilevelState
from gradhpo.core.types import GradFn, InnerOptimizer, UpdateFn
from gradhpo.core.visibility import Sees
from gradhpo.core.wrapper import algorithm_of, rewrapped
from gradhpo.utils.trees import inexact_bytes


# What a method raises while it is traced, compiled or run if it does not work on a problem.
FAILURES = (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError)
# Above this many bytes of inner states, some of them are recomputed instead of kept.
_MOST_BYTES_KEPT = 2**30


class ExactHypergradient(Algorithm):
    """Reverse mode through `num_steps` inner steps, all kept or in `num_segments` segments."""

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    num_steps: int = eqx.field(static=True, default=1)
    num_segments: int | None = eqx.field(static=True, default=None)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    @property
    def num_inner_steps(self) -> int:
        return self.num_steps

    @property
    def sees(self) -> Sees:
        return "updates" if self.num_steps > 1 else "last update"

    @property
    def differentiates_init(self) -> bool:
        return True

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        return unrolled(problem, 0, self.num_steps, self.num_segments)


def exact_reference(
    like: BilevelOptimizer, state: BilevelState, num_steps: int
) -> BilevelOptimizer:
    """For the inner problems of an optimizer, in memory that fits on most machines."""
    algorithm = algorithm_of(like)
    size = inexact_bytes((state.params, state.inner_opt_state, state.model_state))
    exact = ExactHypergradient(
        algorithm.inner_optimizer,
        num_steps=num_steps,
        num_segments=square_root(num_steps) if size * num_steps > _MOST_BYTES_KEPT else None,
        grad_fn=algorithm.grad_fn,
        update_fn=algorithm.update_fn,
    )
    return rewrapped(like, exact)


@contextlib.contextmanager
def reference_explained(given: bool) -> Iterator[None]:
    """Says what to pass if the default reference does not exist."""
    try:
        yield
    except FAILURES as error:
        if given:
            raise
        raise ValueError(
            "the default reference, the exact hypergradient, is not available here; pass "
            "reference=an optimizer (compare_hypergradients also takes an array: "
            f"gradhpo.finite_difference_hypergradient(...)). {type(error).__name__}: {error}"
        ) from error
