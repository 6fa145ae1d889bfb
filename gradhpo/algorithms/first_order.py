"""What methods that take first derivatives alone cannot take, and what they leave out."""

from gradhpo.extend import Problem, UpdateFn, warn_once


def check_has_loss(name: str, update_fn: UpdateFn | None) -> None:
    """They compare training losses, which an update by hand does not show."""
    if update_fn is not None:
        raise ValueError(
            f"{name} compares values and gradients of the training loss, and an update_fn has "
            "none: pass inner_optimizer=optax.sgd(0.1) instead (with a grad_fn, if that is how "
            "the gradient is computed)"
        )


def warn_of_model_state(name: str, problem: Problem) -> None:
    """Of what training makes of the model state, they have no derivative."""
    if problem.phi.reads_state or problem.validation.reads_state:
        warn_once(
            f"{name} takes the model state as it is: the hypergradient leaves out what "
            "hyperparameters do to it (running statistics, a target network). "
            "UnrolledOptimizer differentiates through it",
            *problem.functions(),
        )
