r"""The regression whose solution is the adjoint function, by steps or in closed form."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, PyTree

from gradhpo.extend import (
    accumulation_dtype,
    cast_like,
    check_same_structure,
    choose_solver,
    descend,
    is_linear,
    solve_system,
    tree_l2_norm,
    tree_zeros_like,
)


class OnBatch(NamedTuple):
    """A loss at its predictions, on one batch, and the adjoint function there."""

    predictions: PyTree  # the floating-point part
    value: Callable[[PyTree, PyTree], Any]  # of these and of the hyperparameters
    adjoint: Callable[[PyTree], PyTree]  # of its parameters, a tree like the predictions

    def curvature(self, hyperparams: PyTree, a: PyTree) -> tuple[PyTree, PyTree]:
        r"""$a^\top \partial_v^2 \ell$ and $a^\top \partial_v \partial_\lambda \ell$."""
        return jax.vjp(jax.grad(self.value), self.predictions, hyperparams)[1](a)


class AdjointFunction(NamedTuple):
    """The adjoint as a function of its parameters and of a batch."""

    predict: Callable[..., Any]
    rest: PyTree  # of its tree, except the parameters
    hyperparams: PyTree

    def on(self, loss: Any, params: PyTree, batch: PyTree) -> OnBatch:
        """A loss of the prediction, on a batch, with the adjoint function beside it."""
        h, combine = self.hyperparams, eqx.combine
        v, others = eqx.partition(loss.predict(params, h, batch), eqx.is_inexact_array)
        value = lambda v, h: loss.value(combine(v, others), h, batch)
        of = lambda xi: self.predict(combine(xi, self.rest), h, batch)
        return OnBatch(v, value, lambda xi: _like(v, of(xi)))


def _like(predictions: PyTree, made: PyTree) -> PyTree:
    """The output of the adjoint function, as an array for each of the predictions."""
    a = eqx.filter(made, eqx.is_inexact_array)
    described = lambda tree: jax.tree.map(lambda x: np.broadcast_to(0.0, x.shape), tree)
    check_same_structure(
        described(a),
        described(predictions),
        "what the adjoint function returned",
        "On both batches it must have the arrays that predict of that loss returns.",
    )
    return cast_like(a, predictions)


class Regression(NamedTuple):
    r"""$\min_\xi\; \tfrac12 E_P[a^\top \partial_v^2 \ell_{\mathrm{in}} a] +
    E_Q[a^\top \partial_v\ell_{\mathrm{out}}] + \tfrac\rho2 \|\xi\|^2$ for $a = a_\xi$."""

    hyperparams: PyTree
    outer: OnBatch  # on the validation batch
    of_v: PyTree  # the derivative of its loss by the predictions
    ridge: Array

    def moved(
        self,
        optimizer: optax.GradientTransformation,
        at: Callable[[Any], OnBatch],
        inner_steps: int,
        adjoint_steps: int,
        adjoint: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, Array]:
        """The parameters and the optimizer's state after its steps, and the relative residual.

        That is the gradient before the last step, over the part of it that comes from validation.
        """

        def body(carry, j):
            xi, state = carry
            inner = at(j % inner_steps)
            a, pull = jax.vjp(inner.adjoint, xi)
            [by_curvature] = pull(inner.curvature(self.hyperparams, a)[0])
            [asked] = jax.vjp(self.outer.adjoint, xi)[1](self.of_v)
            add = lambda x, y, z: x + y + self.ridge.astype(z.dtype) * z
            gradient = jax.tree.map(add, by_curvature, asked, xi)
            moved = descend("adjoint", optimizer, gradient, state, xi)
            return moved, _relative(gradient, asked)

        moved, residuals = jax.lax.scan(body, (adjoint, state), jnp.arange(adjoint_steps))
        return *moved, residuals[-1]

    def solved(self, inner: OnBatch, like: PyTree) -> tuple[PyTree, Array]:
        """The solution on a batch, for a linear $a$, and its relative residual.

        The smallest solution if there are several, the least-squares solution if there is none.
        """
        nothing = tree_zeros_like(like)
        constant, push = jax.linearize(inner.adjoint, nothing)
        _, pull_outer = jax.vjp(self.outer.adjoint, nothing)
        if not (is_linear(inner.adjoint, nothing) and is_linear(self.outer.adjoint, nothing)):
            raise ValueError(
                "FunctionalOptimizer(closed_form=True) needs an adjoint function that is linear in "
                "its parameters, predict(adjoint, hyperparams, batch), which this one is not. Pass "
                "adjoint_optimizer=optax.adam(1e-3) instead, or predict with fixed features, "
                "lambda adjoint, h, batch: features(batch) @ adjoint"
            )
        # Solved in float32 at least.
        wide = accumulation_dtype(nothing)
        widened = lambda tree: jax.tree.map(lambda x: x.astype(wide), tree)
        pull = jax.vjp(inner.adjoint, nothing)[1]
        bent = lambda a: widened(pull(inner.curvature(self.hyperparams, a)[0])[0])
        asked = widened(pull_outer(self.of_v)[0])
        rhs = jax.tree.map(lambda x, y: -(x + y), bent(constant), asked)
        ridge = self.ridge.astype(wide)

        def product(xi):
            by_curvature = bent(push(cast_like(xi, nothing)))
            return jax.tree.map(lambda x, y: x + ridge * y, by_curvature, xi)

        found = solve_system(
            product,
            rhs,
            choose_solver(lx.SVD(), nothing, symmetric=True),
            symmetric=True,
            guess=widened(nothing),
            shift=ridge,
        ).value
        left = jax.tree.map(jnp.subtract, product(found), rhs)
        return cast_like(found, nothing), _relative(left, asked)


def _relative(x: PyTree, y: PyTree) -> Array:
    """The length of one tree over the length of another."""
    size = tree_l2_norm(y)
    return tree_l2_norm(x) / jnp.where(size > 0, size, 1)
