r"""The running mean that estimates a Fisher matrix, and the factors that solve with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.algorithms.fisher import FisherStructure, PenaltyOf
from gradhpo.extend import (
    InnerState,
    InnerUpdate,
    accumulation_dtype,
    by_example,
    num_examples,
)


_COUNTED = (
    "NHGDOptimizer must know how many examples a batch has, and counts them along axis 0 of every "
    "array in it, PRNG keys and numbers of shape () aside. train_batch"
)


class KeptFisher(eqx.Module):
    r"""A running mean: the term of $k$ additions ago has the weight $(1 - \beta)\beta^k$.

    - `second_moments`: the weighted sum; its form depends on the structure.
    - `mass`: shape `()`, the sum of the weights, $1 - \beta^{additions}$.
    - `factors`: what the last factorisation made; `None` if every step makes its own.
    - `factor_age`: steps that they have served, back to 0 when new ones are due, shape `()`. Only
        a step that makes new ones adds to the mean.
    """

    second_moments: PyTree
    mass: Array
    factors: Any = None
    factor_age: Array | None = None

    @staticmethod
    def empty(structure: FisherStructure, w: PyTree, factor_every: int) -> "KeptFisher":
        """Before the first gradient."""
        dtype = accumulation_dtype(w)
        zeros = lambda made: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), made)
        gradients = jax.tree.map(lambda x: x[None], w)
        second_moments, mass = (
            zeros(jax.eval_shape(structure.products, gradients)),
            jnp.zeros((), dtype),
        )
        if factor_every == 1:
            return KeptFisher(second_moments, mass)
        factors = jax.eval_shape(lambda: structure.factorised(second_moments, mass, None, w))
        return KeptFisher(second_moments, mass, zeros(factors), jnp.zeros((), jnp.int32))

    def mean(self) -> PyTree:
        """The estimate, corrected for starting at 0."""
        return jax.tree.map(lambda x: x / self.mass, self.second_moments)

    def add(self, products: Callable[[], PyTree], decay: Array) -> "KeptFisher":
        """Adds the products of one more batch, which are computed only if factors are due."""
        if self.factor_age is None:
            return self._with(products(), decay)
        return jax.lax.cond(
            self.factor_age == 0, lambda: self._with(products(), decay), lambda: self
        )

    def _with(self, new: PyTree, decay: Array) -> "KeptFisher":
        mixed = lambda x, y: decay * x + (1 - decay) * y.astype(x.dtype)
        second_moments = jax.tree.map(mixed, self.second_moments, new)
        mass = mixed(self.mass, jnp.ones_like(self.mass))
        return dataclasses.replace(self, second_moments=second_moments, mass=mass)

    def solve(
        self,
        structure: FisherStructure,
        a: PyTree,
        damping: Array,
        penalty: PenaltyOf | None,
        w: PyTree,
        factor_every: int,
    ) -> tuple[PyTree, "KeptFisher"]:
        """The solution for a right-hand side `a`, and this mean with the factors to keep."""
        anew = lambda: structure.factorised(self.mean(), damping, penalty, w)
        if self.factor_age is None:
            return structure.solve(anew(), a), self
        factors = jax.lax.cond(self.factor_age == 0, anew, lambda: self.factors)
        factor_age = (self.factor_age + 1) % jnp.int32(factor_every)
        kept = dataclasses.replace(self, factors=factors, factor_age=factor_age)
        return structure.solve(factors, a), kept


def of_mean(structure: FisherStructure, gradient: PyTree, batch: PyTree) -> PyTree:
    r"""$b\,gg^\top$, as far as it is kept, for the mean gradient of a batch of $b$ examples."""
    size = num_examples(batch, _COUNTED)
    products = structure.products(jax.tree.map(lambda x: x[None], gradient))
    return jax.tree.map(lambda x: size * x, products)


def of_examples(
    structure: FisherStructure, phi: InnerUpdate, z: InnerState, hyperparams: PyTree, t: ArrayLike
) -> PyTree:
    r"""The mean of $g_i g_i^\top$ over the examples of the batch of step `t`."""
    batch = phi.batch(t)
    size = num_examples(batch, _COUNTED)
    examples, alone = by_example(batch, _COUNTED)
    of_one = lambda x: dataclasses.replace(phi, train_batch=alone(x)).gradient(z, hyperparams, t)
    products = structure.products(jax.vmap(of_one)(examples))
    return jax.tree.map(lambda x: x / size, products)
