"""Which public class to use instead: outside `algorithms/`, only texts in this file name them.

Everything else about an algorithm, the algorithm says itself.
"""

from gradhpo.utils import foreign


# Which classes differentiate what, from the narrowest to the widest.
WHO_SEES = {
    "optimum": "ImplicitOptimizer",
    "last update": "OneStepOptimizer, T1T2Optimizer, GreedyOptimizer, "
    "OnlineHypergradientOptimizer (HyperDistill)",
    "updates": "UnrolledOptimizer, DrMADOptimizer, ForwardModeOptimizer",
    "init": "UnrolledOptimizer without truncation, DrMADOptimizer, ForwardModeOptimizer",
}

IGNORES_SIZE = (
    "the step of the inner optimizer ignores the size of the training gradient (Lion, sign "
    "descent). Train with optax.adam(..., eps_root=1e-16) or optax.sgd, or tune what the inner "
    "optimizer takes itself, such as its rate"
)

NEEDS_THE_LOSS = (
    "Transformations that need the loss (optax.lbfgs, optax.polyak_sgd) fit as inner_optimizer of "
    "ImplicitOptimizer, FOOptimizer and T1T2Optimizer(perturb='hyperparams'), which do not "
    "differentiate the update; for other methods write an update_fn"
)

_ODE = (
    "around an ODE solve pass adjoint=diffrax.DirectAdjoint() and a small max_steps: the gradients "
    "of diffrax's other adjoints cannot be differentiated again"
)
_MISSING_RULES = {
    foreign.NO_REVERSE: f"{_ODE}; instead of a while_loop use lax.scan, or "
    "ForwardModeOptimizer with an update_fn",
    foreign.NO_FORWARD: f"{_ODE}; instead of your own custom_vjp write a custom_jvp, or use "
    "UnrolledOptimizer",
    foreign.NO_TANGENT: _ODE,
    foreign.NO_CALLBACK_DERIVATIVE: "for an opaque function use T1T2Optimizer(update_fn=..., "
    "perturb='hyperparams')",
}


def on_missing_rule(said: str) -> str | None:
    """What to write if JAX `said` that a differentiation rule is missing."""
    return next((advice for rule, advice in _MISSING_RULES.items() if rule in said), None)


_LOSS = (
    "a function (params, hyperparams, batch) -> scalar; the order of arguments is (state, "
    "train_batch, val_batch, train_loss_fn, val_loss_fn)"
)
# By the name of the argument.
INSTEAD = {
    "optimizer": "an optimizer such as gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.01))",
    "optimizers": "a dict of name to optimizer: {'one step': gradhpo.OneStepOptimizer(inner)}",
    "state": "what optimizer.init(params, hyperparams) or optimizer.step(...) returned",
    "losses": "gradhpo.LossFunctions(train_loss, val_loss)",
    "train_loss_fn": _LOSS,
    "val_loss_fn": _LOSS,
    "train_batches": "gradhpo.BatchStack.of([b1, b2, ...]), one batch for each step of an episode",
    "callbacks": "a list of functions (state, metrics) -> bool | None: callbacks=[callback]",
    "where": "a function of the model: lambda m: m.log_weight_decay",
    "inner_optimizer": "an optax transformation such as optax.sgd(0.1), or a function of the "
    "hyperparameters that returns one",
    "outer_optimizer": "an optax transformation such as optax.adam(0.01) (for an optax.MultiSteps "
    "its .gradient_transformation()), or None",
    "update_fn": "a function (params, hyperparams, batch) -> params",
    "coordinates": "whole numbers, e.g. [0, 1, 2]",
    "linear_solver": "a lineax solver such as lineax.CG(rtol=1e-5, atol=1e-5), gradhpo.Neumann(20, "
    "0.1), or None",
    "key": "jax.random.key(0)",
    "checkpoint": 'the path of a directory, "runs/digits", or gradhpo.Checkpoint("runs/digits")',
    "loader": "a list of batches or a data loader; call a generator function, and pass an "
    "ArrayData to run directly",
    "batch_size": "a whole number, after the arrays as one pytree: ArrayData((x, y), 128, key)",
}
