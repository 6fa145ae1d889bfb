"""The exact hypergradient with the inner update of any algorithm."""

import equinox as eqx
import optax

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.checkpoints import unrolled
from gradhpo.core.inner_rule import NOT_DIFFERENTIATED
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem
from gradhpo.core.types import GradFn, InnerOptimizer, InnerSolver, UpdateFn
from gradhpo.core.visibility import Sees


class ExactHypergradient(Algorithm):
    """Reverse mode through `num_steps` inner steps, all kept or in `num_segments` segments."""

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    num_steps: int = eqx.field(static=True, default=1)
    num_segments: int | None = eqx.field(static=True, default=None)
    inner_solver: InnerSolver | None = None
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "num_steps"

    @property
    def sees(self) -> Sees:
        return "updates" if self.num_steps > 1 else "last update"

    @property
    def differentiates_init(self) -> bool:
        return True

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        return unrolled(problem, 0, self.num_steps, self.num_segments)


def with_its_update(
    algorithm: Algorithm, num_steps: int, num_segments: int | None = None
) -> ExactHypergradient:
    """The exact hypergradient of this number of an algorithm's inner steps."""
    return ExactHypergradient(
        algorithm.inner_optimizer,
        num_steps=num_steps,
        num_segments=num_segments,
        inner_solver=algorithm.inner_solver,
        grad_fn=algorithm.grad_fn,
        update_fn=algorithm.update_fn,
    )


def check_has_path(name: str, algorithm: Algorithm) -> None:
    """Checks that training is a path of inner steps, which can be differentiated."""
    if algorithm.inner_solver is not None:
        raise ValueError(f"{name} differentiates a path of inner steps. {NOT_DIFFERENTIATED}")
