"""Which public class to use instead: outside `algorithms/`, only texts in this file name them.

An algorithm says everything else about it itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.utils import foreign


# Which classes differentiate what, from the narrowest to the widest.
WHO_SEES = {
    "optimum": "ImplicitOptimizer, NHGDOptimizer, SOBAOptimizer, PenaltyOptimizer, BOMEOptimizer",
    "last update": "OneStepOptimizer, T1T2Optimizer, GreedyOptimizer, "
    "OnlineHypergradientOptimizer (HyperDistill)",
    "updates": "UnrolledOptimizer, DrMADOptimizer, ForwardModeOptimizer, ForwardGradientOptimizer",
    "init": "UnrolledOptimizer without truncation, DrMADOptimizer, ForwardModeOptimizer, "
    "ForwardGradientOptimizer, EvolutionOptimizer",
}

IGNORES_SIZE = (
    "the step of the inner optimizer ignores the size of the training gradient (Lion, sign "
    "descent). Train with optax.adam(..., eps_root=1e-16) or optax.sgd, or tune the inner "
    "optimizer's own settings, such as its rate"
)

NEEDS_THE_LOSS = (
    "Transformations that need the loss (optax.lbfgs, optax.polyak_sgd) fit as inner_optimizer of "
    "ImplicitOptimizer, NHGDOptimizer, FunctionalOptimizer, SOBAOptimizer, FOOptimizer, "
    "FixedOptimizer, EvolutionOptimizer and T1T2Optimizer(perturb='hyperparams'), which do not "
    "differentiate the update; "
    "for other methods write an update_fn"
)

_WARM_UP = (
    "A fresh Adam does this: train first, with gradhpo.FixedOptimizer and then adopt(state); or "
    "use a smaller inner rate"
)
_KINKS = (
    "Kinks (relu, abs) do this, as does an inner rate near the edge of stability: use a smaller "
    "inner rate, or smooth activations"
)


def on_narrow_derivative(inner_opt_state: PyTree) -> str:
    """Why a derivative may hold only for tiny steps, by the inner optimizer's state."""
    return _WARM_UP if foreign.keeps_second_moments(inner_opt_state) else _KINKS


def on_jumps(inner_opt_state: PyTree) -> str:
    """What to try where nearby training runs contradict each other."""
    of_adam = "with eps_root=1e-8, " if foreign.keeps_second_moments(inner_opt_state) else ""
    return f"check again with a shorter horizon, {of_adam}or with smooth activations"


_GUARDED = (
    "A guard in the inner optimizer (optax.zero_nans, optax.apply_if_finite) makes the update "
    "finite, but not its derivative: write jnp.where(bad, safe, x) inside the loss."
)


def on_nan_derivative(inner_opt_state: PyTree) -> str:
    """Why a derivative may not be finite where the losses are, by the inner optimizer's state."""
    if foreign.guards_updates(inner_opt_state):
        return _GUARDED
    if not foreign.keeps_second_moments(inner_opt_state):
        return (
            "Over many steps a derivative may overflow: too high a learning rate, a momentum or "
            "beta of 1 or more."
        )
    setting = _IN_HALF if _is_half(inner_opt_state) else "optax.adam(..., eps_root=1e-16)"
    return (
        "With Adam and its relatives it is the square root at a gradient of exactly 0 (a dead "
        f"unit, an input that is always 0): use {setting}."
    )


def on_nan_loss(inner_opt_state: PyTree, at_first: str) -> str:
    """Why a loss may not be finite, by the inner optimizer's state.

    `at_first`: the loss that was not finite in the first step, if one was not.
    """
    usual = (
        f"The {at_first} of the first step was not finite: look first for a NaN, "
        "an infinity or too large a number in its batch and in the initial parameters. If there "
        "is none, training diverged within that step: the inner learning rate is too high."
        if at_first
        else "Usual causes: too high a learning rate (inner or outer), a momentum of 1 or more, or "
        "NaN in the data."
    )
    if foreign.keeps_second_moments(inner_opt_state) and _is_half(inner_opt_state):
        return f"{usual} Adam's usual eps is 0 in float16: use {_IN_HALF}."
    return usual


_IN_HALF = (
    "parameters in float32, cast to float16 inside the loss (in float16 itself 1e-8 and 1e-16 are "
    "0, and optax.adam(..., eps_root=1e-4) is the least that keeps derivatives finite)"
)


def _is_half(inner_opt_state: PyTree) -> bool:
    return any(x.dtype == jnp.float16 for x in jax.tree.leaves(inner_opt_state))


# optax compares the peak with 0, in Python.
PEAK = (
    "For a tuned peak of optax.warmup_cosine_decay_schedule make a schedule with peak 1, "
    "unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps, decay_steps), and scale it: "
    "lambda hyperparams: optax.sgd(lambda count: hyperparams['peak'] * unit(count))"
)

_ODE = (
    "around an ODE solve pass adjoint=diffrax.DirectAdjoint() and a small max_steps: the gradients "
    "of diffrax's other adjoints cannot be differentiated again"
)
_SCAN = "instead of a while_loop use lax.scan"
# What JAX says, and what to write: by the function whose derivative does not exist, and "".
_MISSING_RULES = {
    foreign.NO_REVERSE: {
        "val_loss_fn": f"{_ODE}; {_SCAN}",
        "train_loss_fn": f"{_ODE}; {_SCAN}, or ForwardModeOptimizer with an update_fn that "
        "computes its gradient by jax.jacfwd",
        "update_fn": f"{_SCAN}, or ForwardModeOptimizer, which takes forward derivatives of it",
        "grad_fn": f"{_SCAN}, or ForwardModeOptimizer, which takes forward derivatives of it",
        "": f"{_ODE}; {_SCAN}",
    },
    foreign.NO_FORWARD: {
        "": f"{_ODE}; instead of your own custom_vjp write a custom_jvp, or use UnrolledOptimizer"
    },
    foreign.NO_TANGENT: {"": _ODE},
    foreign.NO_CALLBACK_DERIVATIVE: {
        "val_loss_fn": "around an opaque function write a jax.custom_vjp, or use "
        "EvolutionOptimizer, which differentiates no validation loss",
        "": "if the loss has a gradient nevertheless (a fused kernel with a custom_vjp), use "
        "PenaltyOptimizer or BOMEOptimizer, which take nothing else; for an opaque function use "
        "T1T2Optimizer(update_fn=..., perturb='hyperparams'), or EvolutionOptimizer",
    },
}


def on_missing_rule(said: str, of: str = "") -> str | None:
    """What to write if JAX `said` that a rule for the derivative `of` a function is missing."""
    advice = next((x for rule, x in _MISSING_RULES.items() if rule in said), None)
    return None if advice is None else advice.get(of, advice[""])


# Names of one thing in different classes.
_ALIKE = (
    {"inner_steps", "unroll_steps", "num_inner_steps", "num_unroll_steps"},
    {"lr_hyper", "hyper_lr", "outer_lr", "lr", "learning_rate"},
)


def also_called(name: str) -> set[str]:
    """The other names of an argument."""
    return {x for names in _ALIKE if name in names for x in names if x != name}


def lacking(name: str, argument: str) -> str | None:
    """What to say about an argument that a class lacks on purpose; `None` for any other."""
    return _LACKING.get((name, argument))


_LACKING = {
    ("FixedOptimizer", "outer_optimizer"): (
        "FixedOptimizer tunes nothing and has no outer_optimizer: leave it out, "
        "FixedOptimizer(inner_optimizer, inner_steps=10)"
    ),
}


def expected_kind(parameter: str, expected: str) -> str:
    """What an argument must be; `expected` is its type."""
    if parameter not in _KINDS and foreign.is_one_number(expected):
        return "one real number, of shape ()"
    return _KINDS.get(parameter, _TYPES.get(expected, expected))


_TYPES = {"int": "an int", "bool": "a bool", "str": "a str", "str | Path": "a str or a Path"}


# By the name of the argument.
_KINDS = {
    "optimizer": "an optimizer",
    "optimizers": "a dict of optimizers",
    "state": "a BilevelState",
    "losses": "LossFunctions",
    "train_loss_fn": "a function",
    "val_loss_fn": "a function",
    "train_batches": "a BatchStack",
    "callbacks": "a list of functions",
    "where": "a function",
    "frozen": "a function",
    "inner_optimizer": "an optax transformation or a function",
    "outer_optimizer": "an optax transformation or None",
    "adjoint_optimizer": "an optax transformation",
    "update_fn": "a function",
    "inner_solver": "a function",
    "coordinates": "whole numbers",
    "linear_solver": "a solver",
    "key": "a PRNG key",
    "folds": "a number of folds, or np.asarray(folds), the whole number of each example's fold",
    "checkpoint": "a directory",
    "loader": "an iterable of batches",
    "metric": "the name of a metric or a function of the state",
}


def instead_of(parameter: str, given: Any, expected: str) -> str | None:
    """What to pass for an argument that is refused; `None` if its type says enough."""
    is_count = isinstance(given, (np.generic, np.ndarray, jax.Array)) and given.ndim == 0
    if is_count and jnp.issubdtype(given.dtype, jnp.integer) and "int" in expected:
        return f"{parameter}=int({parameter})"
    called = foreign.uncalled(given)
    if called is not None:
        return called
    return _INSTEAD.get(parameter)


_LOSS = (
    "a function (params, hyperparams, batch) -> scalar; the order of arguments is (state, "
    "train_batch, val_batch, train_loss_fn, val_loss_fn)"
)
_MULTI_STEPS = "for an optax.MultiSteps its .gradient_transformation()"
# By the name of the argument.
_INSTEAD = {
    "optimizer": "an optimizer such as gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.01))",
    "optimizers": "a dict of name to optimizer: {'one step': gradhpo.OneStepOptimizer(inner)}",
    "state": "what optimizer.init(params, hyperparams) or optimizer.step(...) returned",
    "losses": "gradhpo.LossFunctions(train_loss, val_loss)",
    "train_loss_fn": _LOSS,
    "val_loss_fn": _LOSS,
    "train_batches": "gradhpo.BatchStack.of([b1, b2, ...]), one batch for each step of an episode",
    "callbacks": "a list of functions (state, metrics) -> bool | None: callbacks=[callback]",
    "where": "a function of the model: lambda m: m.log_weight_decay",
    "frozen": "a function of the model: lambda m: m.backbone",
    "inner_optimizer": f"an optax transformation such as optax.sgd(0.1) ({_MULTI_STEPS}), or a "
    "function of the hyperparameters that returns one",
    "outer_optimizer": f"an optax transformation such as optax.adam(0.01) ({_MULTI_STEPS}), or "
    "None",
    "adjoint_optimizer": f"an optax transformation such as optax.sgd(0.1) ({_MULTI_STEPS})",
    "update_fn": "a function (params, hyperparams, batch) -> params",
    "inner_solver": "a function (params, hyperparams, batch) -> params that calls the solver: "
    "lambda w, h, batch: optimistix.minimise(loss, solver, w, (h, batch)).value",
    "coordinates": "whole numbers, e.g. [0, 1, 2]",
    "linear_solver": "a lineax solver such as lineax.CG(rtol=1e-5, atol=1e-5), gradhpo.Neumann(20, "
    "0.1), or None",
    "key": "jax.random.key(0)",
    "checkpoint": 'the path of a directory, "runs/digits", or gradhpo.Checkpoint("runs/digits")',
    "loader": "a list of batches or a data loader; call a generator function, and pass an "
    "ArrayData to run directly",
    "batch_size": "a whole number, after the arrays as one pytree: ArrayData((x, y), 128, key)",
}
