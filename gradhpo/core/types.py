"""Type aliases for the functions and numbers that a user passes."""

from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import optax
from jaxtyping import Array, ArrayLike, PyTree, Real


RealScalarLike: TypeAlias = Real[ArrayLike, ""]
"""A real number: a Python `int` or `float`, or an array of shape `()`; not a `bool`."""

LossFn: TypeAlias = Callable[..., Any]
"""A loss, `(params, hyperparams, batch) -> scalar`: a real array of shape `()`.

Or `-> (scalar, metrics)`, with a dict of scalars. With running state,
`(params, hyperparams, batch, model_state) -> (scalar, new_model_state)` or
`-> (scalar, (new_model_state, metrics))`."""

UpdateFn: TypeAlias = Callable[..., PyTree]
"""One step of a hand-written inner update, `(params, hyperparams, batch) -> params`.

With running state, `(params, hyperparams, batch, model_state) -> (params, new_model_state)`."""

GradFn: TypeAlias = Callable[..., PyTree]
"""A training gradient written by hand, `(params, hyperparams, batch) -> gradient`.

With running state, `(params, hyperparams, batch, model_state) -> (gradient, new_model_state)`."""

InnerSolver: TypeAlias = Callable[..., PyTree]
"""A solver of the whole inner problem, `(params, hyperparams, batch) -> params`.

With running state, `(params, hyperparams, batch, model_state) -> (params, new_model_state)`."""

InnerOptimizer: TypeAlias = (
    optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]
)
"""An optax transformation, or a function `hyperparams -> transformation`, which makes its rates,
momenta and decays hyperparameters like any other."""

MetricDict: TypeAlias = dict[str, Array]
"""Metrics of one step: name to an array of shape `()`."""

METRICS = (
    "train_loss",
    "val_loss",
    "hypergrad_norm",
    "param_norm",
    "hyperparam_norm",
    "rejected",
)
"""The metrics of every step, by name."""

MEMBERS = "members."
"""Prefix of a metric's values for all members of a population; without it, the lowest."""

_T = TypeVar("_T")


class Declared(Generic[_T]):
    """For type checkers: an attribute that subclasses have as a field, but this class does not.

    To them, `equinox.AbstractVar` declares a field, which would come first in every `__init__`.
    """

    def __get__(self, instance: Any, owner: Any = None) -> _T: ...  # pyright: ignore
