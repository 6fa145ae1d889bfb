r"""$\Phi$: the one differentiable inner update, and its pullback.

An inner step takes $z = (w, s, r)$, the parameters, optimizer state and running state of the model,
to $z' = \Phi(z, \lambda; D_t)$. Here $w$ is the floating-point part of the user's params, without
frozen leaves; the rest of them (functions, integer arrays, what is frozen) is constant during
training and kept separately.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.batches import batch_of_step, is_same_each_step
from gradhpo.core.inner_rule import gradient_by, updated_by_hand, updated_by_optax
from gradhpo.core.inner_state import InnerState, Start, differentiated
from gradhpo.core.losses import Result, called, with_state
from gradhpo.core.means import mean_over_steps
from gradhpo.core.types import GradFn, InnerOptimizer, LossFn, UpdateFn
from gradhpo.utils.foreign import (
    forget_secants,
    last_evaluation,
    searches_along_lines,
    with_evaluation,
)
from gradhpo.utils.gradients import linearize_gradient, undifferentiable
from gradhpo.utils.trees import tree_zeros_like


_LINE_SEARCH = (
    "a hypergradient cannot be differentiated through a line search, as in optax.lbfgs: the "
    "derivative would be that of how the search ends, in rounding; for this take gradient descent "
    "as inner_optimizer, optax.sgd(0.1), in as many inner steps as it needs"
)

Pull: TypeAlias = Callable[[InnerState], tuple[InnerState, PyTree]]


class InnerUpdate(eqx.Module):
    r"""$\Phi$ on the training data of one outer step.

    Built inside the compiled step by `core.problem.make_problem`, and used only there. Inner steps
    are numbered from `t = 0`.
    """

    inner_optimizer: InnerOptimizer | None
    grad_fn: GradFn | None
    update_fn: UpdateFn | None
    train_loss_fn: LossFn
    frozen: PyTree
    train_batch: PyTree
    symmetric: bool = eqx.field(static=True)
    recomputes: bool = eqx.field(static=True, default=False)  # the loss has a jax.checkpoint
    reads_state: bool = eqx.field(static=True, default=False)  # the training loss reads z.r
    # Whether `z.s` is what the optimizer's `init` made at these hyperparameters, shape `()`; `None`
    # if no hyperparameters act there, nor in `start`, which makes the parameters of an episode.
    # core/start.py has the consequences.
    fresh: Array | None = None
    start: Start | None = None
    # Whether `step` also gives the loss to optax. `vjp` never does: the derivative would miss how
    # what optax does with the loss depends on w and the hyperparameters.
    passes_loss: bool = eqx.field(static=True, default=False)

    def batch(self, t: ArrayLike) -> PyTree:
        """$D_t$."""
        return batch_of_step(self.train_batch, t)

    def evaluate(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> tuple[Any, PyTree]:
        """`(training loss, new running state)`: what the user's loss returns."""
        params = eqx.combine(z.w, self.frozen)
        returned = called(self.train_loss_fn, params, hyperparams, self.batch(t), z.r)
        return with_state("train_loss_fn", "loss", returned, z.r)

    def train_loss(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Any:
        """The training loss, which `make_problem` checks to be a scalar."""
        return self.evaluate(z, hyperparams, t)[0]

    def gradient(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> PyTree:
        """What the inner optimizer is given: the training gradient, or what `grad_fn` returns."""
        return self.gradient_and_state(z, hyperparams, t)[0]

    def gradient_and_state(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[PyTree, PyTree]:
        """The gradient, and the new running state."""
        if self.grad_fn is None:
            return jax.grad(self._of_w(z, hyperparams, t), has_aux=True)(z.w)
        params, batch = eqx.combine(z.w, self.frozen), self.batch(t)
        return gradient_by(self.grad_fn, params, z.w, hyperparams, batch, z.r)

    def _of_w(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Callable:
        """`evaluate` as a function of the parameters."""
        return lambda w: self.evaluate(z._replace(w=w), hyperparams, t)

    def at_new_hyperparams(self, z: InnerState, num_steps: int) -> InnerState:
        """The z that `num_steps` inner steps start from once the hyperparameters have moved.

        L-BFGS remembers differences of gradients, the first of which would be between two losses.
        """
        if self.passes_loss and num_steps > 1:
            return z._replace(s=forget_secants(z.s))
        return z

    def step(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike, want_loss: ArrayLike = True
    ) -> tuple[InnerState, Array]:
        """`(z', training loss before the update)`.

        The loss comes free with its gradient. With a `grad_fn` or an `update_fn` it is extra work,
        done only if `want_loss`; otherwise it is `nan`.
        """
        if self.update_fn is not None:
            new_w, r = self.updated_by_hand(z, hyperparams, t)
            return z._replace(w=new_w, r=r), self.loss_if(want_loss, z, hyperparams, t)
        evaluation = None
        if self.grad_fn is not None and not self.passes_loss:
            loss = self.loss_if(want_loss, z, hyperparams, t)
            evaluation = loss, *self.gradient_and_state(z, hyperparams, t)
        new_z, loss, _ = self.step_and_gradient(z, hyperparams, t, evaluation)
        return new_z, loss

    def loss_if(self, wanted: ArrayLike, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Array:
        """The loss, computed only if it is wanted, otherwise `nan`."""
        compute = lambda: self._loss_alone(z, hyperparams, t)
        skip = lambda: jnp.full_like(jax.eval_shape(compute), jnp.nan)
        return jax.lax.cond(wanted, compute, skip)

    def loss_and_gradient(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[Array, PyTree, PyTree]:
        """The loss, what the inner optimizer is given, and the new running state."""
        if self.grad_fn is None:
            of_w = self._of_w(z, hyperparams, t)
            (loss, r), gradient = jax.value_and_grad(of_w, has_aux=True)(z.w)
            return loss, gradient, r
        loss = self._loss_alone(z, hyperparams, t)
        return loss, *self.gradient_and_state(z, hyperparams, t)

    def _loss_alone(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Array:
        """The loss as a metric, of which nothing is differentiated; nor need it be possible."""
        return self.train_loss(*jax.lax.stop_gradient((z, hyperparams)), t)

    def _linearized(
        self, z: InnerState, hyperparams: PyTree, last: ArrayLike, count: int = 1
    ) -> tuple[Array, PyTree, PyTree, Callable[[PyTree], tuple[PyTree, tuple[PyTree, PyTree]]]]:
        """The loss, the gradient, the new r, and products of a cotangent with the derivatives.

        These are by the parameters, and by (hyperparameters, running state). Loss and gradient are
        means over the batches of the `count` steps that end with step `last`; the running state is
        that of one step, if `count` is 1.
        """
        of_r, rest = differentiated(z.r)
        at = lambda w, others: (InnerState(w, None, eqx.combine(others[1], rest)), others[0])
        evaluate = lambda w, others, t: self.evaluate(*at(w, others), t)
        given = z.w, (hyperparams, of_r)
        if self.grad_fn is None:
            mean = lambda w, others: mean_over_steps(evaluate, w, others, last, count)
            kind = {"symmetric": self.symmetric, "shared": not self.recomputes}
            return linearize_gradient(mean, *given, **kind)
        by_hand = lambda w, others, t: self.gradient_and_state(*at(w, others), t)
        mean = lambda w, others: mean_over_steps(by_hand, w, others, last, count)
        gradient, pull, r = jax.vjp(mean, *given, has_aux=True)
        of_loss = lambda w, others, t: (self._loss_alone(*at(w, others), t), None)
        return mean_over_steps(of_loss, *given, last, count)[0], gradient, r, pull

    def step_and_gradient(
        self,
        z: InnerState,
        hyperparams: PyTree,
        t: ArrayLike,
        evaluation: tuple[Array, PyTree, PyTree] | None = None,
    ) -> tuple[InnerState, Array, PyTree]:
        """`(z', loss, gradient)`; only with an `inner_optimizer`.

        `evaluation` is the loss, its gradient and the new running state, if already known.
        """
        if evaluation is None:
            evaluation = self.loss_and_gradient(z, hyperparams, t)
        loss, gradient, r = evaluation
        of_loss = {}
        if self.passes_loss:
            value_fn = lambda w: self.train_loss(z._replace(w=w), hyperparams, t)
            of_loss = {"value": loss, "grad": gradient, "value_fn": value_fn}
        new_w, new_s = self._updated_by_optax(gradient, z, hyperparams, t, of_loss)
        return InnerState(new_w, new_s, r), loss, gradient

    def vjp(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, Array, Pull]:
        r"""`(z', loss, pull)`, where `pull(z_bar)` is $(\bar z A_t, \bar z B_t)$.

        First the optimizer's own update is transposed, which is element-wise and carries the
        effects on $\lambda$ through it. That leaves a cotangent on the training gradient, whose
        second-derivative products come from one linearization, shared with the gradient that the
        step needs anyway. A cotangent on the running state is pulled back on its own.
        """
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

        That takes a cotangent on it to w, and to (hyperparameters, running state).
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
                new = self.evaluate(z, hyperparams, t)[1]
            return differentiated(new)[0]

        return jax.vjp(running, z.w, (hyperparams, of_r))

    def _vjp_by_hand(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, Array, Pull]:
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

        $F = \nabla_w L_{train}$ (or what `grad_fn` returns), or $F = w - \Phi(w, \lambda)$
        with an `update_fn`; and
        $v \mapsto (v^\top \partial F/\partial w,\; v^\top \partial F/\partial\lambda)$. Both
        are means over the batches of the `count` steps that end with step `last`. The running state
        of `z` is held.
        """
        if is_same_each_step(self.train_batch):
            count = 1
        if self.update_fn is None:
            _, gradient, _, products = self._linearized(z, hyperparams, last, count)

            def of_gradient(v):
                by_w, (by_hyperparams, _) = products(v)
                return by_w, by_hyperparams

            return gradient, of_gradient
        by_hand = lambda w, h, t: self.updated_by_hand(z._replace(w=w), h, t)
        update = lambda w, h: mean_over_steps(by_hand, w, h, last, count)
        new, pull, _ = jax.vjp(update, z.w, hyperparams, has_aux=True)

        def minus_pulled(v):
            by_w, by_hyperparams = pull(v)
            by_w = jax.tree.map(jnp.subtract, v, by_w)
            return by_w, jax.tree.map(jnp.negative, by_hyperparams)

        return jax.tree.map(jnp.subtract, z.w, new), minus_pulled

    def rollout(
        self,
        z: InnerState,
        hyperparams: PyTree,
        first: ArrayLike,
        num_steps: int,
        *,
        keep: Callable[[InnerState], PyTree] = lambda z: None,
        loss_at: int | None = None,
    ) -> tuple[InnerState, Array, PyTree]:
        """Inner steps from number `first` on: `(z', last loss, kept)`.

        `kept` stacks what `keep` takes from the z before each step. The loss of zero steps is
        `nan`. With an `update_fn` the loss is computed only at step `loss_at`, by default the last.
        """
        if num_steps == 0:
            return z, jnp.asarray(jnp.nan), None

        wanted = first + num_steps - 1 if loss_at is None else loss_at
        z, evaluated = self._evaluated(z, hyperparams, first)

        def body(z, t):
            if evaluated:
                last = last_evaluation(z.s)
                assert last is not None
                new_z, loss, _ = self.step_and_gradient(z, hyperparams, t, (*last, z.r))
            else:
                new_z, loss = self.step(z, hyperparams, t, want_loss=t == wanted)
            return new_z, (loss, keep(z))

        z, (losses, before) = jax.lax.scan(body, z, first + jnp.arange(num_steps))
        if searches_along_lines(z.s):
            z = undifferentiable(z, _LINE_SEARCH)
        return z, losses[-1], before

    def _evaluated(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, bool]:
        """`z` with the loss at `w` in its line search, and whether every step finds it there.

        The search has evaluated the parameters that it ends at: half of the work of most steps. The
        first evaluation is always made, since hyperparameters and batch have changed.
        """
        reusable = self.passes_loss and is_same_each_step(self.train_batch) and z.r is None
        last = last_evaluation(z.s) if reusable else None
        if last is None:
            return z, False
        loss, gradient, _ = self.loss_and_gradient(z, hyperparams, t)
        if loss.dtype != last[0].dtype:
            return z, False
        return z._replace(s=with_evaluation(z.s, loss, gradient)), True

    def _updated_by_optax(
        self,
        gradient: PyTree,
        z: InnerState,
        hyperparams: PyTree,
        t: ArrayLike,
        of_loss: Any = (),
    ) -> tuple[PyTree, PyTree]:
        """`of_loss` must not be differentiated. The objective of Sophia is, as all of this."""
        assert self.inner_optimizer is not None
        objective = lambda w: self.train_loss(z._replace(w=w), hyperparams, t)
        given = gradient, z.s, z.w, hyperparams, objective
        return updated_by_optax(self.inner_optimizer, *given, **dict(of_loss))

    def updated_by_hand(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Result:
        """The parameters by `update_fn`, and the new running state."""
        assert self.update_fn is not None
        params, batch = eqx.combine(z.w, self.frozen), self.batch(t)
        return updated_by_hand(self.update_fn, params, z.w, hyperparams, batch, z.r)


def _differentiable(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves that a derivative can come from, and the rest: empty arrays among it.

    A cotangent on an empty array is 0, and optax divides by means over it: 0 times NaN.
    """
    return eqx.partition(tree, lambda x: eqx.is_inexact_array(x) and x.size > 0)
