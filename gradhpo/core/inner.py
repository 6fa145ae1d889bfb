r"""$\Phi$: the one differentiable inner update, and its pullback."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, PyTree

from gradhpo.core.inner_rule import NOT_DIFFERENTIATED
from gradhpo.core.inner_state import InnerState, differentiated
from gradhpo.core.inner_step import InnerStep
from gradhpo.core.means import mean_over_steps
from gradhpo.core.measured import Loss, measured
from gradhpo.utils.gradients import linearize_gradient
from gradhpo.utils.trees import tree_zeros_like


Pull: TypeAlias = Callable[[InnerState], tuple[InnerState, PyTree]]


class InnerUpdate(InnerStep):
    r"""The inner update on the training data of one outer step.

    $\Phi$ in formulas. Built inside the compiled step by `core.problem.make_problem`, and used only
    there. Inner steps are numbered from `t = 0`.
    """

    def _linearized(
        self, z: InnerState, hyperparams: PyTree, last: ArrayLike, count: int = 1
    ) -> tuple[Loss, PyTree, PyTree, Callable[[PyTree], tuple[PyTree, tuple[PyTree, PyTree]]]]:
        """The loss, the gradient, the new r, and products of a cotangent with the derivatives.

        The derivatives are with respect to the parameters, and to (hyperparameters, running state).
        Loss and gradient are means over the batches of the `count` steps that end with step `last`;
        there is a new running state only if `count` is 1.
        """
        of_r, rest = differentiated(z.r)
        at = lambda w, others: (InnerState(w, None, eqx.combine(others[1], rest)), others[0])

        def evaluate(w, others, t):
            loss, r, aux = self.evaluate(*at(w, others), t)
            return loss, (r, aux)

        given = z.w, (hyperparams, of_r)
        if self.grad_fn is None:
            mean = lambda w, others: mean_over_steps(evaluate, w, others, last, count)
            kind = {"symmetric": self.symmetric, "shared": not self.recomputes}
            loss, gradient, beside, pull = linearize_gradient(mean, *given, **kind)
            r, aux = beside or (None, {})  # a mean over several steps has none
            return measured(loss, aux), gradient, r, pull
        by_hand = lambda w, others, t: self.gradient_and_state(*at(w, others), t)
        mean = lambda w, others: mean_over_steps(by_hand, w, others, last, count)
        gradient, pull, r = jax.vjp(mean, *given, has_aux=True)
        of_loss = lambda w, others, t: (self._loss_alone(*at(w, others), t), None)
        return mean_over_steps(of_loss, *given, last, count)[0], gradient, r, pull

    def vjp(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, Loss, Pull]:
        r"""One inner step, with a function that pulls cotangents back through it.

        Returns `(z', loss, pull)`, where `pull(z_bar)` is $(\bar z A_t, \bar z B_t)$. First the
        optimizer's own update is transposed, which is element-wise and carries the effects on
        $\lambda$ through it. That leaves a cotangent on the training gradient, whose
        second-derivative products come from one linearization, shared with the gradient that the
        step needs anyway. A cotangent on the running state is pulled back on its own.
        """
        if self.inner_solver is not None:
            raise ValueError(NOT_DIFFERENTIATED)
        if self.update_fn is not None:
            return self._vjp_by_hand(z, hyperparams, t)
        loss, gradient, r, second_derivatives = self._linearized(z, hyperparams, t)
        (s_inexact, of_r), rest = eqx.partition((z.s, z.r), eqx.is_inexact_array)

        def optimizer_update(gradient, w, others):
            hyperparams, s, r = others
            s, r = eqx.combine((s, r), rest)
            new = self._updated_by_optax(gradient, InnerState(w, s, r), hyperparams, t)
            return _differentiable(new)

        others = hyperparams, s_inexact, of_r
        new, pull_optimizer, new_rest = jax.vjp(
            optimizer_update, gradient, z.w, others, has_aux=True
        )

        def pull(bar: InnerState) -> tuple[InnerState, PyTree]:
            s_bar = tree_zeros_like(new[1]) if bar.s is None else bar.s
            on_outputs, _ = _differentiable((bar.w, s_bar))
            gradient_bar, w_out, (hyper_out, s_out, r_out) = pull_optimizer(on_outputs)
            ways = [(w_out, (hyper_out, r_out)), second_derivatives(gradient_bar)]
            if jax.tree.leaves(bar.r):
                ways.append(self.state_vjp(z, hyperparams, t)[1](bar.r))
            w_out, (hyper_out, r_out) = jax.tree.map(lambda *x: sum(x[1:], x[0]), *ways)
            return InnerState(w_out, s_out, r_out), hyper_out

        new_w, new_s = eqx.combine(new, new_rest)
        return InnerState(new_w, new_s, r), loss, pull

    def state_vjp(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree, tuple[PyTree, PyTree]]]]:
        """The floating-point part of the new running state, and its pullback.

        The pullback takes a cotangent on it to w, and to (hyperparameters, running state).
        """
        of_r, rest = differentiated(z.r)

        def running(w, others):
            hyperparams, r = others
            z = InnerState(w, None, eqx.combine(r, rest))
            if self.update_fn is not None:
                new = self.updated_by_hand(z, hyperparams, t)[1]
            elif self.grad_fn is not None:
                new = self.gradient_and_state(z, hyperparams, t)[1]
            else:
                new = self.evaluate(z, hyperparams, t).r
            return differentiated(new)[0]

        return jax.vjp(running, z.w, (hyperparams, of_r))

    def _vjp_by_hand(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, Loss, Pull]:
        of_r, rest = differentiated(z.r)

        def update(w, hyperparams, r):
            z = InnerState(w, None, eqx.combine(r, rest))
            return _differentiable(tuple(self.updated_by_hand(z, hyperparams, t)))

        new, pull_by_hand, new_rest = jax.vjp(update, z.w, hyperparams, of_r, has_aux=True)

        def pull(bar: InnerState) -> tuple[InnerState, PyTree]:
            r_bar = tree_zeros_like(new[1]) if bar.r is None else bar.r
            w_out, hyper_out, r_out = pull_by_hand(_differentiable((bar.w, r_bar))[0])
            return bar._replace(w=w_out, r=r_out), hyper_out

        new_w, r = eqx.combine(new, new_rest)
        return z._replace(w=new_w, r=r), self._loss_alone(z, hyperparams, t), pull

    def optimizer_vjp(
        self, gradient: PyTree, z: InnerState, hyperparams: PyTree, t: ArrayLike, w_bar: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Cotangents on the gradient and on the hyperparameters, through optax alone."""
        update = lambda g, h: _differentiable(self._updated_by_optax(g, z, h, t)[0])[0]
        return jax.vjp(update, gradient, hyperparams)[1](_differentiable(w_bar)[0])

    def optimality(
        self, z: InnerState, hyperparams: PyTree, last: ArrayLike, count: int = 1
    ) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
        r"""What vanishes at the inner optimum, and the products with its derivatives.

        $F = \nabla_w L_{\mathrm{train}}$ (or what `grad_fn` returns), or $F = w - \Phi(w, \lambda)$
        with an `update_fn`; and
        $v \mapsto (v^\top \partial F/\partial w,\; v^\top \partial F/\partial\lambda)$. Both
        are means over the batches of the `count` steps that end with step `last`. The running state
        of `z` is held.
        """
        if self.repeats_batch:
            count = 1
        if self.update_fn is None:
            _, gradient, _, products = self._linearized(z, hyperparams, last, count)
            return gradient, _without_state(products)
        new, _, pull = self._linearized_by_hand(z, hyperparams, last, count)
        return jax.tree.map(jnp.subtract, z.w, new), _of_fixed_point(pull)

    def step_and_optimality(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, Loss, PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
        """`(z', loss)` of `step`, and then what `optimality` gives at `z`; nothing twice."""
        if self.update_fn is not None:
            new, r, pull = self._linearized_by_hand(z, hyperparams, t)
            residual = jax.tree.map(jnp.subtract, z.w, new)
            loss = self._loss_alone(z, hyperparams, t)
            return z._replace(w=new, r=r), loss, residual, _of_fixed_point(pull)
        loss, gradient, r, products = self._linearized(z, hyperparams, t)
        new_z, _, _ = self.step_and_gradient(z, hyperparams, t, (loss, gradient, r))
        return new_z, loss, gradient, _without_state(products)

    def _linearized_by_hand(
        self, z: InnerState, hyperparams: PyTree, last: ArrayLike, count: int = 1
    ) -> tuple[PyTree, PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
        """The w' of `update_fn`, the new r (only for a single step), and the pullback of w'."""
        by_hand = lambda w, h, t: self.updated_by_hand(z._replace(w=w), h, t)
        update = lambda w, h: mean_over_steps(by_hand, w, h, last, count)
        new, pull, r = jax.vjp(update, z.w, hyperparams, has_aux=True)
        return new, r, pull


def _without_state(products: Callable) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
    def of_gradient(v):
        by_w, (by_hyperparams, _) = products(v)
        return by_w, by_hyperparams

    return of_gradient


def _of_fixed_point(pull: Callable) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
    """Products with the derivatives of w - w', by the pullback of w'."""

    def minus_pulled(v):
        by_w, by_hyperparams = pull(v)
        by_w = jax.tree.map(jnp.subtract, v, by_w)
        return by_w, jax.tree.map(jnp.negative, by_hyperparams)

    return minus_pulled


def _differentiable(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves that a derivative can come from, and the rest, including empty arrays.

    A cotangent on an empty array is 0, and optax divides by means over it: 0 times NaN.
    """
    return eqx.partition(tree, lambda x: eqx.is_inexact_array(x) and x.size > 0)
