"""What methods that use only first derivatives refuse, and what they leave out."""

from gradhpo.extend import Problem, UpdateFn, warn_once


def check_has_loss(name: str, update_fn: UpdateFn | None) -> None:
    """Refuses a hand-written update, which does not show the training losses to compare."""
    if update_fn is not None:
        raise ValueError(
            f"{name} compares values and gradients of the training loss, and an update_fn has "
            "none: pass inner_optimizer=optax.sgd(0.1) instead (with a grad_fn, if that is how "
            "the gradient is computed)"
        )


def warn_of_model_state(name: str, problem: Problem) -> None:
    """They do not differentiate what training does to the model state."""
    if problem.phi.reads_state or problem.validation.reads_state:
        warn_once(
            f"{name} uses the model state as it is: the hypergradient leaves out the effect of "
            "hyperparameters on it (running statistics, a target network). "
            "UnrolledOptimizer differentiates through it",
            *problem.functions(),
        )
