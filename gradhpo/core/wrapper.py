"""Optimizers that wrap another optimizer."""

import dataclasses
from typing import TYPE_CHECKING

import equinox as eqx
import optax

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.types import Declared


class Wrapper(BilevelOptimizer):
    """Base class of optimizers that run another one on several inner problems."""

    if TYPE_CHECKING:
        optimizer = Declared[BilevelOptimizer]()
    else:
        optimizer: eqx.AbstractVar[BilevelOptimizer]

    @property
    def outer_optimizer(self) -> optax.GradientTransformation | None:
        """The outer optimizer of the wrapped optimizer."""
        return self.optimizer.outer_optimizer

    @property
    def num_inner_steps(self) -> int:
        """Inner steps per `step` of every inner problem, as in `optimizer`."""
        return self.optimizer.num_inner_steps

    @property
    def tunes(self) -> bool:
        """As for `optimizer`."""
        return self.optimizer.tunes

    @property
    def may_be_zero(self) -> bool:
        """As for `optimizer`."""
        return self.optimizer.may_be_zero

    @property
    def reads_ahead(self) -> bool:
        """As `optimizer`."""
        return self.optimizer.reads_ahead


def algorithm_of(optimizer: BilevelOptimizer) -> Algorithm:
    """The algorithm inside all wrappers."""
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Algorithm)
    return optimizer


def rewrapped(optimizer: BilevelOptimizer, algorithm: Algorithm) -> BilevelOptimizer:
    """The same wrappers around another algorithm."""
    if not isinstance(optimizer, Wrapper):
        return algorithm
    return dataclasses.replace(optimizer, optimizer=rewrapped(optimizer.optimizer, algorithm))


def same_wrappers(first: BilevelOptimizer, second: BilevelOptimizer) -> bool:
    """Whether two optimizers take states and batches of the same layout."""
    return bool(eqx.tree_equal(rewrapped(first, algorithm_of(second)), second))
