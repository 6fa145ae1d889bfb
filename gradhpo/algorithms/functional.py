r"""Functional hypergradients: the adjoint is a function, fitted by regression."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.algorithms.regression import AdjointFunction, Regression
from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    Memory,
    MetricDict,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    check_arity,
    check_count,
    check_setting,
    checked,
    init_descent,
    not_trained,
    num_coordinates,
    prediction_losses,
    setting,
    trained,
    warn_once,
)


# A closed form warns above this many parameters: it takes as many products, and an SVD.
_MANY = 2_000


class FunctionalMemory(Memory):
    r"""What [`FunctionalOptimizer`][gradhpo.FunctionalOptimizer] carries over, with its metric.

    - `adjoint`: the parameters $\xi$ of the adjoint function; `adjoint_state`: its optimizer's
        state, `()` with a closed form.
    - `linear_residual`: shape `()`.
    """

    adjoint: PyTree
    adjoint_state: PyTree
    linear_residual: Array


@checked
class FunctionalOptimizer(Algorithm):
    r"""Functional hypergradients (FuncID): implicit differentiation in the space of functions.

    Both losses are losses of the prediction $v = h(x)$, means over training data $P$ and validation
    data $Q$ (pass each as a [`PredictionLoss`][gradhpo.PredictionLoss]). The inner problem is
    solved by a function $h$, which the network merely parametrises. Its adjoint is another function
    $a$, the solution of a regression,

    $$\min_a\; \tfrac12 E_P\!\left[a^\top \partial_v^2 \ell_{\mathrm{in}}\, a\right] +
    E_Q\!\left[a^\top \partial_v \ell_{\mathrm{out}}\right],\qquad
    g = E_Q\!\left[\partial_\lambda \ell_{\mathrm{out}}\right] +
    E_P\!\left[(\partial_\lambda \partial_v \ell_{\mathrm{in}})^\top a\right].$$

    Here $a$ is `predict` with parameters $\xi$ of its own. All second derivatives are with respect
    to the prediction. The Hessian with respect to the weights is never used: it need not be
    positive or regular, nor exist. If both functions are linear in their parameters, with
    `closed_form`, $g$ is exactly that of [`ImplicitOptimizer`][gradhpo.ImplicitOptimizer].

    After `inner_steps` of training, $\xi$ takes `adjoint_steps` at the new prediction, step $j$ on
    the batch of inner step $j \bmod \mathtt{inner\_steps}$ and on the validation batch; with
    `closed_form`, it is solved for on the last batch. $g$ uses the last batch. The next step starts
    from the parameters of both functions. $\xi$ is kept across episodes: the best function does not
    depend on where training starts.

    **It assumes** that training finds nearly the best function, that training and validation data
    have inputs in common (where $Q$ has inputs unlike any in $P$, $a$ extrapolates), and that
    $\ell_{in}$ is strictly convex in the prediction. The inner loss depends on the prediction
    alone: for a penalty on the weights, `predict` must return them beside the output, and so must
    the adjoint function. It does not see decay in the inner optimizer, nor hyperparameters *inside*
    `predict`, whose output is the variable; tracing names the latter.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. It may need the
        loss (`optax.lbfgs`, `optax.polyak_sgd`).
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `predict`: the adjoint function, `(adjoint, hyperparams, batch) -> predictions`, arrays of the
        shapes of the predictions. Default `None`: the `predict` of the training loss.
    - `adjoint`: the initial $\xi$, a pytree, required, by keyword. Initialise a network like the
        parameters: with all weights 0, only the last layer learns.
    - `adjoint_optimizer`: an optax transformation for $\xi$, by keyword; required without
        `closed_form`, else `None` (the default).
    - `inner_steps`: inner steps per `step`, at least 1; default 1.
    - `adjoint_steps`: steps of $\xi$ per `step`, at least 1; default 1.
    - `closed_form`: whether to solve for $\xi$, if the adjoint function is linear in it: a dense
        system with as many unknowns as $\xi$ has entries, by singular value decomposition; warns
        above 2,000. If it is singular, $\xi$ is the least-squares solution of the smallest norm.
        Default `False`.
    - `ridge`: $\rho \ge 0$, which adds $\tfrac\rho2 \|\xi\|^2$ to the regression, shape `()`,
        default 0. If a batch has fewer examples than $\xi$ has entries, it keeps $a$ small where
        only $Q$ has examples.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss in the inner steps (DP-SGD, SAM, semi-gradients);
        the adjoint still uses the loss. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`.

    The memory, `state.memory`, holds `adjoint`, `adjoint_state`, and the metric `linear_residual`:
    the gradient of the regression, before the last adjoint step or at the closed-form solution,
    relative to the gradient of its second term. At the solution, it is the share of what validation
    asks for that the batch does not show.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, both or neither of `adjoint_optimizer` and `closed_form`, counts
    below 1, or a negative `ridge`; while tracing, for an adjoint function whose shapes differ
    from the losses' predictions, `closed_form` with a function that is not linear, or a model
    state. `TypeError` for an optimizer that is not an optax transformation, a function that is not
    callable or takes other arguments, or a loss that is not a `PredictionLoss`.

    ```python
    predict = lambda w, h, batch: batch[0] @ w
    weighted = lambda v, h, batch: jnp.mean(jnp.exp(h) * (v - batch[1]) ** 2)
    train_loss = gradhpo.PredictionLoss(predict, weighted)
    val_loss = gradhpo.PredictionLoss(predict, lambda v, h, batch: jnp.mean((v - batch[1]) ** 2))
    x = jax.random.normal(jax.random.key(0), (40, 3))
    y = x[:, 0] + 2.0 * (jnp.arange(40) < 5)  # five wrong answers
    optimizer = gradhpo.FunctionalOptimizer(
        optax.sgd(0.1), optax.adam(0.1), adjoint=jnp.zeros(3), inner_steps=5, closed_form=True
    )
    state = optimizer.init(jnp.zeros(3), jnp.zeros(20))  # a weight for each example
    state = optimizer.step(state, (x[:20], y[:20]), (x[20:], y[20:]), train_loss, val_loss)
    ```

    ??? cite "Reference"

        Petrulionytė et al., *Functional Bilevel Optimization for Machine Learning*, NeurIPS 2024,
        arXiv:2403.20233; smoothed over time, for problems that drift: Bohne et al., 2026,
        arXiv:2601.15363.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    predict: Callable[..., Any] | None = None
    adjoint: PyTree = eqx.field(kw_only=True)
    adjoint_optimizer: optax.GradientTransformation | None = eqx.field(kw_only=True, default=None)
    inner_steps: int = eqx.field(static=True, default=1)
    adjoint_steps: int = eqx.field(static=True, default=1)
    closed_form: bool = eqx.field(static=True, default=False)
    ridge: Float[Array, ""] = eqx.field(converter=setting, default=0.0)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        check_count("adjoint_steps", self.adjoint_steps)
        check_setting("ridge", self.ridge, lambda x: x >= 0, "at least 0")
        if self.predict is not None:
            check_arity(self.predict, "predict", "adjoint, hyperparams, batch")
        if self.closed_form == (self.adjoint_optimizer is not None):
            given = "closed_form=True solves for the adjoint, and adjoint_optimizer moves it"
            missing = "FunctionalOptimizer got nothing that fits the adjoint"
            raise ValueError(
                f"{given if self.closed_form else missing}: pass adjoint_optimizer=optax.adam(1e-3)"
                ", or closed_form=True for an adjoint that is linear in its parameters"
            )
        if not jax.tree.leaves(self._parts()[0]):
            raise ValueError(
                "adjoint has no floating-point arrays: pass the initial parameters of the adjoint "
                "function, such as params of the model, drawn with another key"
            )

    @property
    def sees(self) -> Sees:
        """The optimum."""
        return "optimum"

    @property
    def differentiates_gradient(self) -> bool:
        """False: second derivatives are with respect to the prediction, not the parameters."""
        return False

    @property
    def passes_loss(self) -> bool:
        """True: the inner update is not differentiated."""
        return True

    @property
    def may_be_zero(self) -> bool:
        """True: the adjoint may start at 0. Tracing finds hyperparameters that are never seen."""
        return True

    @property
    def derivatives(self) -> str:
        """Derivatives of the loss with respect to the prediction."""
        return "second derivatives of the training loss by the prediction"

    @property
    def suspect(self) -> str:
        """The adjoint."""
        if self.closed_form:
            return "the regression of the adjoint: use a larger ridge"
        return "an adjoint that diverges: use a smaller rate in adjoint_optimizer"

    def _parts(self) -> tuple[PyTree, PyTree]:
        """The initial parameters of the adjoint, and the rest of its tree."""
        arrays = jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array(x) else x, self.adjoint)
        return trained(arrays), not_trained(arrays)

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> FunctionalMemory:
        """The initial adjoint. It survives episodes: the best function has not moved."""
        # A copy: the state's arrays may be given up, and these are the optimizer's.
        adjoint = jax.tree.map(jnp.copy, self._parts()[0])
        state = ()
        if self.adjoint_optimizer is not None:
            state = init_descent(self.adjoint_optimizer, adjoint)
        elif (count := num_coordinates(adjoint)) > _MANY:
            warn_once(
                f"FunctionalOptimizer(closed_form=True) makes and decomposes a matrix of "
                f"{count:,} x {count:,}: for an adjoint of this size pass adjoint_optimizer"
            )
        # Placed, not computed: jax_debug_nans refuses to compute a NaN.
        unknown = jax.device_put(np.full((), np.nan, accumulation_dtype(z.w)))
        return FunctionalMemory(adjoint, state, unknown)

    def finite_part(self, memory: FunctionalMemory) -> PyTree:
        """The adjoint and its optimizer's state."""
        return memory.adjoint, memory.adjoint_state

    def after_refusal(self, old: FunctionalMemory, new: FunctionalMemory) -> FunctionalMemory:
        """The metric describes a refused step as well."""
        return eqx.tree_at(lambda m: m.linear_residual, old, new.linear_residual)

    def estimate(self, problem: Problem, memory: FunctionalMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        train, val = prediction_losses("FunctionalOptimizer", problem)
        z, train_loss, _ = phi.rollout(z, hyperparams, 0, self.inner_steps)
        params = eqx.combine(z.w, phi.frozen)
        function = AdjointFunction(self.predict or train.predict, self._parts()[1], hyperparams)
        on = lambda loss, batch: function.on(loss, params, batch)
        last = on(train, phi.batch(self.inner_steps - 1))
        at = lambda t: last if phi.repeats_batch else on(train, phi.batch(t))
        outer = on(val, validation.val_batch)
        of_v, direct = jax.grad(outer.value, argnums=(0, 1))(outer.predictions, hyperparams)
        regression = Regression(hyperparams, outer, of_v, self.ridge)
        adjoint, state = memory.adjoint, memory.adjoint_state
        if self.adjoint_optimizer is None:
            adjoint, residual = regression.solved(last, adjoint)
        else:
            counts = self.inner_steps, self.adjoint_steps
            moved = regression.moved(self.adjoint_optimizer, at, *counts, adjoint, state)
            adjoint, state, residual = moved
        _, mixed = last.curvature(hyperparams, last.adjoint(adjoint))
        hypergradient = jax.tree.map(jnp.add, direct, mixed)
        val_loss = validation.measured(z, hyperparams)
        memory = FunctionalMemory(adjoint, state, residual.astype(memory.linear_residual.dtype))
        return Estimate(z, hypergradient, train_loss, val_loss, memory)

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """Says if the adjoint leaves too much of its equation unsolved."""
        residuals = metrics["linear_residual"]
        left = np.median(residuals[-max(1, len(residuals) // 4) :])
        if self.closed_form and left > 0.1:
            return (
                f"The training batches do not show {left:.0%} of what validation asks of the "
                "adjoint (linear_residual, median of the last quarter of the steps): use larger "
                "batches, or a ridge."
            )
        if not self.closed_form and left > 1:
            return (
                f"The adjoint does worse than none (linear_residual, median of the last quarter "
                f"of the steps, {left:.1e}): use another rate in adjoint_optimizer, or more "
                "adjoint_steps."
            )
        return ""
