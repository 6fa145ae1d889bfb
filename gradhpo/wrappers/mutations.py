r"""How the hyperparameters of a member change after it has copied another member."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Real

from gradhpo.utils.settings import check_setting, setting
from gradhpo.utils.structure import have_same_structure, where_they_differ
from gradhpo.utils.trees import accumulation_dtype
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity


class Mutation(eqx.Module):
    """Base class of mutations that learn, or have settings.

    A function `(key, hyperparams) -> hyperparams` of one member is a mutation as well. A subclass
    supplies `mutate`, and `init` and `learn` if it has a `memory`.

    ```python
    class Jitter(gradhpo.extend.Mutation):
        def mutate(self, memory, key, hyperparams):
            return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), hyperparams)

    optimizer = gradhpo.Population(
        gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1)), 4, 10, mutation=Jitter()
    )
    ```
    """

    learns = False
    """Whether `learn` reads hypergradients."""

    def init(self, key: Array, hyperparams: PyTree) -> PyTree:
        """The first memory, a pytree of arrays; `hyperparams` belong to one member."""
        return ()

    def learn(self, memory: PyTree, hypergradients: PyTree, hyperparams: PyTree) -> PyTree:
        """The memory after a step; both trees have the members first, NaN where a step failed."""
        return memory

    @abc.abstractmethod
    def mutate(self, memory: PyTree, key: Array, hyperparams: PyTree) -> PyTree:
        """The new hyperparameters of one member, which has just copied these."""


class FunctionMutation(Mutation):
    """A user's function, `(key, hyperparams) -> hyperparams`."""

    function: Callable[[Array, PyTree], PyTree]

    def mutate(self, memory: PyTree, key: Array, hyperparams: PyTree) -> PyTree:
        new = self.function(key, hyperparams)
        check_returned(new, hyperparams, "mutation")
        return new


def check_returned(made: PyTree, given: PyTree, name: str) -> None:
    """Checks that a function returned hyperparameters like the given ones."""
    if not have_same_structure(made, given):
        raise ValueError(
            f"{name}(key, hyperparams) must return hyperparameters with the structure, shapes and "
            f"dtypes of the given ones\n{where_they_differ(made, given)}"
        )


def as_mutation(mutation: Any) -> Mutation:
    """The mutation, or a user's function as one."""
    if isinstance(mutation, Mutation):
        return mutation
    if not callable(mutation) or isinstance(mutation, type):
        write = f": write mutation={mutation.__name__}(...)" if isinstance(mutation, type) else ""
        raise TypeError(
            "mutation must be a function (key, hyperparams) -> hyperparams, or one of "
            f"RandomMutation, ResampleMutation, LearnedMutation, got {mutation!r}{write}"
        )
    check_arity(mutation, "mutation", "key, hyperparams")
    return FunctionMutation(mutation)


def _factors(value: Any) -> Array:
    return jnp.asarray(np.asarray(value, float), jnp.result_type(float))


@checked
class RandomMutation(Mutation):
    r"""Multiplies every hyperparameter by a factor drawn at random, or adds noise.

    $\lambda_i \leftarrow \alpha_i\lambda_i$ with $\alpha_i$ drawn uniformly from `factors`,
    independently for every entry; with `scale`,
    $\lambda_i \leftarrow \lambda_i + \mathtt{scale}\cdot \mathcal N(0, 1)$.

    Factors suit positive hyperparameters, and favour an optimum at 0. Hyperparameters that are
    logarithms, logits or of either sign need a `scale`.

    **Arguments:**

    - `factors`: to draw from, shape `[n]` with n at least 1, default (0.8, 1.2).
    - `scale`: standard deviation of the noise, positive, shape `()`, which replaces the factors.
        Default `None`: no noise.

    **Raises:** `ValueError` for no factors, or a `scale` that is not positive.

    ```python
    mutation = gradhpo.RandomMutation(scale=0.3)  # for logarithms
    ```

    ??? cite "Reference"

        Jaderberg et al., *Population Based Training of Neural Networks*, 2017, arXiv:1711.09846.
    """

    factors: Real[Array, " factors"] = eqx.field(converter=_factors, default=(0.8, 1.2))
    scale: Real[Array, ""] | None = eqx.field(
        converter=lambda x: None if x is None else setting(x), default=None
    )

    def __check_init__(self):
        if self.factors.size == 0:
            raise ValueError("RandomMutation(factors=()) has nothing to draw from")
        if self.scale is not None:
            check_setting("scale", self.scale, lambda x: x > 0, "positive")

    def mutate(self, memory: PyTree, key: Array, hyperparams: PyTree) -> PyTree:
        """The new hyperparameters."""
        leaves, treedef = jax.tree.flatten(hyperparams)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(map(self._mutated, keys, leaves))

    def _mutated(self, key: Array, x: Array) -> Array:
        wide = accumulation_dtype(x)
        if self.scale is not None:
            noise = jax.random.normal(key, x.shape, wide)
            return (x.astype(wide) + self.scale.astype(wide) * noise).astype(x.dtype)
        factors = jax.random.choice(key, self.factors.astype(wide), x.shape)
        return (x.astype(wide) * factors).astype(x.dtype)


@checked
class ResampleMutation(Mutation):
    r"""Redraws hyperparameters, each entry independently with a given probability.

    $\lambda_i \leftarrow \lambda'_i$ with `probability`, where $\lambda'$ is a draw of `sampler`;
    otherwise $\lambda_i$ stays.

    **Arguments:**

    - `sampler`: `(key, hyperparams) -> hyperparams`, such as the `spread` that `init` was given.
    - `probability`: of redrawing an entry, in [0, 1], shape `()`, default 0.25.

    **Raises:** `ValueError` for a `probability` outside [0, 1]; while tracing, for a draw with
    another structure or other shapes.

    ```python
    sampler = lambda key, hyperparams: jax.random.uniform(key, hyperparams.shape, minval=-5.0)
    mutation = gradhpo.ResampleMutation(sampler, probability=0.5)
    ```

    ??? cite "Reference"

        Jaderberg et al., *Population Based Training of Neural Networks*, 2017, arXiv:1711.09846.
    """

    sampler: Callable[[Array, PyTree], PyTree]
    probability: Real[Array, ""] = eqx.field(converter=setting, default=0.25)

    def __check_init__(self):
        check_arity(self.sampler, "sampler", "key, hyperparams")
        check_setting("probability", self.probability, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")

    def mutate(self, memory: PyTree, key: Array, hyperparams: PyTree) -> PyTree:
        """The new hyperparameters."""
        draws, chances = jax.random.split(key)
        drawn = self.sampler(draws, hyperparams)
        check_returned(drawn, hyperparams, "sampler")
        leaves, treedef = jax.tree.flatten(hyperparams)
        keys = treedef.unflatten(jax.random.split(chances, len(leaves)))
        chosen = lambda key, x: jax.random.bernoulli(key, self.probability, x.shape)
        mixed = lambda key, new, old: jnp.where(chosen(key, old), new, old)
        return jax.tree.map(mixed, keys, drawn, hyperparams)
