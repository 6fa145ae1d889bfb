r"""T1-T2: one step's mixed derivative by central finite differences."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    InnerUpdate,
    Problem,
    Sees,
    UpdateFn,
    check_setting,
    checked,
    map_in_blocks,
    setting,
    tree_dot,
    tree_l2_norm,
)


@checked
class T1T2Optimizer(Algorithm):
    r"""T1-T2 with the finite differences of DARTS: no second derivatives.

    Takes `inner_steps` inner steps, then the hypergradient through the last one,
    $g = \partial L_{\mathrm{val}}/\partial\lambda + \alpha_T B_T$, with $\alpha_T B_T$ by central
    differences.

    - `perturb="weights"`: $\alpha_T$ is pulled back through the inner optimizer's own update
        to a direction $v$ in the space of gradients (for SGD with rate $\xi$:
        $v = -\xi\,\alpha_T$), and with $\varepsilon = \mathtt{epsilon}/\|v\|_2$

        $$v^\top\,\partial^2 L_{\mathrm{train}}/\partial w\,\partial\lambda \approx
        \frac{\nabla_\lambda L_{\mathrm{train}}(w_{T-1} + \varepsilon v) -
        \nabla_\lambda L_{\mathrm{train}}(w_{T-1} - \varepsilon v)}{2\varepsilon}.$$

        With Adam inside, this $v$ has the factor $\partial u/\partial g$ of its update $u(g)$, as
        in SAMA (which takes the difference at $w_T$). Effects on $\lambda$ through the inner
        optimizer itself (such as a learning rate) are differentiated exactly. The difference stands
        for that product only if the gradient is the derivative of the loss: with a `grad_fn`, or a
        `custom_vjp` in the loss, the gradient itself is differentiated. If it has no derivative,
        use [`PenaltyOptimizer`][gradhpo.PenaltyOptimizer].

    - `perturb="hyperparams"`: for every coordinate $i$ of every leaf,
        with $\varepsilon = \mathtt{epsilon}$,

        $$\frac{\Phi(w, \lambda + \varepsilon e_i) - \Phi(w, \lambda - \varepsilon e_i)}
        {2\varepsilon}.$$

        This takes two inner steps per coordinate but no derivative of $\Phi$, so an `update_fn` may
        be opaque (a `jax.pure_callback` with `vmap_method="sequential"`).

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) need `perturb="hyperparams"`.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `inner_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `epsilon`: length of the perturbation of the weights (default 0.01, as in DARTS), or of one
        hyperparameter (there 1e-4 is better in float64); positive, shape `()`. A perturbation lost
        to rounding, as in bfloat16, measures nothing.
    - `perturb`: what to perturb, `"weights"` (the default) or `"hyperparams"`.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Needs `perturb="hyperparams"`. Default `None`. With a [model
        state](../how_to/running_state.md), `grad_fn` and `update_fn` take it as a fourth argument
        and also return the new one.

    With Adam in float32 use `eps_root=1e-8`, not less: where a gradient is exactly 0, the update's
    derivative is about `1 / sqrt(eps_root)`, and the other components of $v$ would drown in
    rounding.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, an `update_fn` with `perturb="weights"`, `inner_steps < 1`, or
    `epsilon <= 0`; `TypeError` for an optimizer that is not an optax transformation, a function
    that is not callable, or another `perturb`.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.T1T2Optimizer(optax.sgd(0.1), optax.sgd(0.1), inner_steps=2)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Luketina et al., *Scalable Gradient-Based Tuning of Continuous Regularization
        Hyperparameters*, ICML 2016, arXiv:1511.06727; Liu et al., *DARTS: Differentiable
        Architecture Search*, ICLR 2019, arXiv:1806.09055, equations 7 and 8. For optimizers
        other than SGD: Choe et al., *Making Scalable Meta Learning Practical* (SAMA), NeurIPS
        2023, arXiv:2310.05674.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    inner_steps: int = eqx.field(static=True, default=1)
    epsilon: Float[Array, ""] = eqx.field(converter=setting, default=0.01)
    perturb: Literal["weights", "hyperparams"] = eqx.field(static=True, default="weights")
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        check_setting("epsilon", self.epsilon, lambda x: x > 0, "positive")
        if self.update_fn is not None and self.perturb == "weights":
            raise ValueError(
                "T1T2Optimizer with an update_fn needs perturb='hyperparams': there is no "
                "training gradient to difference when the whole update is a black box"
            )

    @property
    def sees(self) -> Sees:
        """The derivative of the last update, or everything with an effect if taken by
        differences."""
        return "last update" if self.perturb == "weights" else "everything"

    @property
    def derivatives(self) -> str:
        """First derivatives, with respect to the weights or of the validation loss alone."""
        of_update = (
            ", that of the optimizer's update and, with a custom_vjp or a grad_fn, of the gradient"
        )
        return "first derivatives of both losses" + of_update * (self.perturb == "weights")

    @property
    def suspect(self) -> str:
        """Rounding."""
        return f"a step lost in rounding: epsilon={float(self.epsilon):g} is too small"

    def with_difference_step(self, factor: float) -> "T1T2Optimizer":
        """With another `epsilon`."""
        return dataclasses.replace(self, epsilon=factor * self.epsilon)

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        last = self.inner_steps - 1
        before, _, _ = phi.rollout(z, hyperparams, 0, last)
        if self.perturb == "weights" and not phi.symmetric:
            # Perturbing w measures the transposed derivative; with a custom_vjp in the loss the two
            # differ, and only the reverse product is right.
            z, train_loss, pull = phi.vjp(before, hyperparams, last)
            val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
            _, through_update = pull(alpha)
        elif self.perturb == "weights":
            z, train_loss, gradient = phi.step_and_gradient(before, hyperparams, last)
            val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
            through_update = self._by_weights(phi, before, gradient, hyperparams, alpha)
        else:
            z, train_loss = phi.step(before, hyperparams, last)
            val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
            through_update = self._by_hyperparams(phi, before, hyperparams, alpha)
        hypergradient = jax.tree.map(jnp.add, direct, through_update)
        return Estimate(z, hypergradient, train_loss, val_loss)

    def _by_weights(
        self,
        phi: InnerUpdate,
        before: InnerState,
        gradient: PyTree,
        hyperparams: PyTree,
        alpha: InnerState,
    ) -> PyTree:
        last = self.inner_steps - 1
        v, through_optimizer = phi.optimizer_vjp(gradient, before, hyperparams, last, alpha.w)
        exact = through_optimizer
        if jax.tree.leaves(alpha.r):
            _, pull = phi.state_vjp(before, hyperparams, last)
            _, (through_state, _) = pull(alpha.r)
            exact = jax.tree.map(jnp.add, exact, through_state)
        norm = tree_l2_norm(v)
        # v = 0 must give 0, not 0/0; then any finite scale will do.
        scale = self.epsilon.astype(norm.dtype) / jnp.where(norm > 0, norm, 1)

        def gradient_at(sign):
            moved = lambda x, d: x + (sign * scale).astype(x.dtype) * d
            w = jax.tree.map(moved, before.w, v)
            return jax.grad(phi.train_loss, argnums=1)(before._replace(w=w), hyperparams, last)

        def with_quotient(exact, plus, minus):
            return exact + (plus - minus) / (2 * scale).astype(exact.dtype)

        return jax.tree.map(with_quotient, exact, gradient_at(+1), gradient_at(-1))

    def _by_hyperparams(
        self, phi: InnerUpdate, before: InnerState, hyperparams: PyTree, alpha: InnerState
    ) -> PyTree:
        leaves, treedef = jax.tree.flatten(hyperparams)

        def of_leaf(position: int) -> Array:
            leaf = leaves[position]
            epsilon = self.epsilon.astype(leaf.dtype)

            def after(coordinate, change):
                moved = leaf.reshape(-1).at[coordinate].add(change)
                changed = [*leaves[:position], moved.reshape(leaf.shape), *leaves[position + 1 :]]
                new_hyperparams = jax.tree.unflatten(treedef, changed)
                new, _ = phi.step(before, new_hyperparams, self.inner_steps - 1, want_loss=False)
                seen = InnerState(new.w, None, eqx.filter(new.r, eqx.is_inexact_array))
                return seen, moved[coordinate]

            def product(coordinate):
                (plus, above), (minus, below) = (after(coordinate, e) for e in (epsilon, -epsilon))
                change = tree_dot(alpha, jax.tree.map(jnp.subtract, plus, minus))
                # Uses the step that was really taken, after rounding; no step at all gives nan.
                return change.astype(leaf.dtype) / (above - below)

            if leaf.size == 0:
                return leaf

            return map_in_blocks(product, jnp.arange(leaf.size)).reshape(leaf.shape)

        return jax.tree.unflatten(treedef, [of_leaf(i) for i in range(len(leaves))])
