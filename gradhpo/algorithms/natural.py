r"""Natural hypergradients: implicit differentiation with the Fisher matrix for the Hessian."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.algorithms.fisher import STRUCTURES, FisherStructure
from gradhpo.algorithms.kept_fisher import KeptFisher, of_examples, of_mean
from gradhpo.algorithms.settled import through_state
from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    Memory,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    cast_like,
    check_arity,
    check_count,
    check_setting,
    checked,
    num_coordinates,
    setting,
    tree_l2_norm,
    warn_once,
)


# "dense" warns above this many parameters: 100 MB in float32, 4e10 flops per solve.
_MANY = 5_000
_READS_STATE = (
    "NHGDOptimizer holds the model state constant in the training loss, which reads it: the "
    "hypergradient leaves out how training follows the model state"
)
_STATE_OF_ONE = (
    "NHGDOptimizer(per_example=True) takes no model_state: its statistics would come from one "
    "example. Write per_example=False, or normalise without running state (LayerNorm, GroupNorm)"
)


class NHGDMemory(Memory):
    r"""What [`NHGDOptimizer`][gradhpo.NHGDOptimizer] carries over.

    - `fisher`: a running mean, `fisher.mean()`, with the factors that are used again.
    - `linear_residual`: shape `()`.
    """

    fisher: KeptFisher
    linear_residual: Array


@checked
class NHGDOptimizer(Algorithm):
    r"""Natural hypergradient descent: the Fisher matrix in place of the Hessian.

    If the training loss is a mean of negative log-likelihoods and the model describes the data, the
    Hessian at the optimum is the Fisher matrix $F$, the covariance of the gradients of single
    examples. Training computes such gradients anyway. After `inner_steps` inner steps

    $$g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda} -
    q^\top \frac{\partial^2 L_{\mathrm{train}}}{\partial w\,\partial\lambda},\qquad
    (F + \rho I + P'')\, q = \nabla_w L_{\mathrm{val}},$$

    with $\rho$ = `damping`, the Hessian $P''$ of the `penalty`, and the mixed derivative of the
    last training batch. For the gradient $g_t$ of a mean over $b$ examples and $\beta$ = `decay`,

    $$S \leftarrow \beta S + (1 - \beta)\, b\, g_t g_t^\top \text{ from } S = 0,\qquad
    F = S / (1 - \beta^k) \text{ after } k \text{ inner steps}$$

    of all outer steps and episodes (with `factor_every`, of those that add). This convention is
    ours: the published update divides by 0 at $\beta = 0$, and an inverse kept by rank-one updates
    gives its initial matrix a weight $\beta^k$ that vanishes.

    **It assumes** (see [Natural hypergradients](../implicit.md#natural-hypergradients)) a *mean*
    loss in the units of a log-likelihood (cross-entropy; squared errors over twice their variance);
    a model that describes the data, which a network that fits its training data perfectly does not;
    converged training; and batches much smaller than the data set. Like implicit differentiation,
    it does not see learning rates, and differentiates a model state at the point where it settles.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. It may need the
        loss (`optax.lbfgs`, `optax.polyak_sgd`).
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `inner_steps`: inner steps per `step`, at least 1; default 1.
    - `decay`: $\beta$ in [0, 1), shape `()`, default 0.99. $F$ averages about $1/(1 - \beta)$ inner
        steps; a dense $F$ needs several times as many as there are parameters.
    - `damping`: $\rho > 0$, shape `()`, default 1e-3.
    - `structure`: which part of $F$ to keep, for $P$ parameters. `"dense"` (the default): all of
        it, in $O(P^2)$ per inner step and $P^3/3$ per outer step; warns above 5,000. `"kronecker"`:
        for each weight matrix with the gradient $G$ of size $m \times n$ the means $L$ of
        $b\,GG^\top$ and $R$ of $b\,G^\top G$, for $F \approx L \otimes R / \mathrm{tr}\,L$, in
        $O(mn(m + n))$ and $O(m^3 + n^3)$. Convolution kernels count as matrices of outputs by the
        rest; vectors, and matrices with a side above 5,000, keep squares alone. `"diagonal"`:
        squares.
    - `penalty`: `(params, hyperparams) -> scalar`, the part of the training loss that is not a
        likelihood (keep it in the loss as well), whose Hessian need not be estimated. `"dense"`
        adds the Hessian. The others add its diagonal: exact for a sum over parameters, otherwise
        estimated with random signs; `"kronecker"` as a product of a number per row and one per
        column, exact for a penalty per layer, input or output. Gradients keep the penalty's part:
        with it their mean is 0 at the optimum, and without it $F$ would gain $b$ times the square
        of that part. Default `None`.
    - `per_example`: whether $F$ is the mean of $g_i g_i^\top$ over the examples of each batch,
        without the factor $b$ and with far less noise. It takes another pass, in batches of one,
        and the memory of $b$ gradients. Default `False`.
    - `factor_every`: outer steps from one factorisation (Cholesky, `eigh`) to the next, at least 1.
        Only the inner steps of those outer steps add to $F$; the others reuse the factors. With
        many inner steps they cost hardly more than training (under `vmap`, as with `TaskBatched`,
        nothing is saved, and with an `update_fn` the gradient of the loss is still computed). $F$
        then fills `factor_every` times as slowly and reaches further back in time: use it with many
        inner steps. Default 1.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. $F$ is made of it as well. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. The gradient of the loss is then extra work. Default `None`. With a
        [model state](../how_to/running_state.md), `grad_fn` and `update_fn` take it as a fourth
        argument and also return the new one.

    The metric `linear_residual`, $\|(H + \rho I) q - \nabla_w L_{\mathrm{val}}\| / \|\nabla_w
    L_{\mathrm{val}}\|$ with the Hessian $H$ of the last training batch, says how well $F$
    approximates $H$: above 1 it does worse than no solve. It says little if batches have fewer
    examples than there are parameters. If the matrix is not positive definite (a penalty that is
    not convex), the step is refused.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, or a setting outside its range; `TypeError` for an optimizer that
    is not an optax transformation, a function that is not callable, or another `structure`. While
    tracing, `ValueError` for a batch whose arrays do not share their leading axis, and for
    `per_example` with a model state.

    ```python
    error = lambda w, h, batch: jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))
    penalty = lambda w, h: jnp.sum(jnp.exp(h) * w**2) / 2
    train_loss = lambda w, h, batch: error(w, h, batch) + penalty(w, h)
    x = jax.random.normal(jax.random.key(0), (40, 3))
    y = jnp.where(x[:, 0] + jax.random.logistic(jax.random.key(1), (40,)) > 0, 1.0, -1.0)
    optimizer = gradhpo.NHGDOptimizer(optax.sgd(0.1), optax.adam(0.05), penalty=penalty)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -3.0))
    state = optimizer.step(state, (x[:20], y[:20]), (x[20:], y[20:]), train_loss, error)
    ```

    ??? cite "Reference"

        Kong et al., *Natural Hypergradient Descent*, 2026, arXiv:2602.10905; Kronecker factors:
        Gupta et al., *Shampoo*, ICML 2018, arXiv:1802.09568, and Martens & Grosse, ICML 2015,
        arXiv:1503.05671.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    inner_steps: int = eqx.field(static=True, default=1)
    decay: Float[Array, ""] = eqx.field(converter=setting, default=0.99)
    damping: Float[Array, ""] = eqx.field(converter=setting, default=1e-3)
    structure: Literal["dense", "kronecker", "diagonal"] = eqx.field(static=True, default="dense")
    penalty: Callable[..., Any] | None = None
    per_example: bool = eqx.field(static=True, default=False)
    factor_every: int = eqx.field(static=True, default=1)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        check_count("factor_every", self.factor_every)
        check_setting("decay", self.decay, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
        check_setting("damping", self.damping, lambda x: x > 0, "positive")
        if self.penalty is not None:
            check_arity(self.penalty, "penalty", "params, hyperparams")

    @property
    def sees(self) -> Sees:
        """The optimum."""
        return "optimum"

    @property
    def passes_loss(self) -> bool:
        """True: the inner update is not differentiated."""
        return True

    @property
    def derivatives(self) -> str:
        """One mixed derivative."""
        return "second derivatives of the loss"

    @property
    def suspect(self) -> str:
        """The factorisation."""
        return "a matrix F + P'' that is not positive definite: use a larger damping"

    @property
    def _kept(self) -> FisherStructure:
        return STRUCTURES[self.structure]

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> NHGDMemory:
        """No gradient yet. The Fisher matrix survives episodes: the optimum has not moved."""
        if self.structure == "dense" and (count := num_coordinates(z.w)) > _MANY:
            warn_once(
                f"NHGDOptimizer(structure='dense') keeps a matrix of {count:,} x {count:,} and "
                "factorises it: for large models pass structure='kronecker' or 'diagonal'"
            )
        # Placed, not computed: jax_debug_nans refuses to compute a NaN.
        unknown = jax.device_put(np.full((), np.nan, accumulation_dtype(z.w)))
        return NHGDMemory(KeptFisher.empty(self._kept, z.w, self.factor_every), unknown)

    def finite_part(self, memory: NHGDMemory) -> PyTree:
        """The mean and its factors."""
        return memory.fisher

    def after_refusal(self, old: NHGDMemory, new: NHGDMemory) -> NHGDMemory:
        """The metric describes a refused step as well."""
        return eqx.tree_at(lambda m: m.linear_residual, old, new.linear_residual)

    def estimate(self, problem: Problem, memory: NHGDMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        last = self.inner_steps - 1
        wide = accumulation_dtype(z.w)
        damping, decay = self.damping.astype(wide), self.decay.astype(wide)
        if self.per_example and z.r is not None:
            raise ValueError(_STATE_OF_ONE)
        if phi.reads_state:
            warn_once(_READS_STATE, *problem.functions())
        of_loss = dataclasses.replace(phi, update_fn=None)

        def add(fisher: KeptFisher, z: InnerState, gradient: PyTree, t: Array) -> KeptFisher:
            def products():
                if self.per_example:
                    return of_examples(self._kept, of_loss, z, hyperparams, t)
                return of_mean(self._kept, gradient, phi.batch(t))

            return fisher.add(products, decay)

        z, train_loss, fisher = phi.rollout_with_gradients(
            z, hyperparams, self.inner_steps, add, memory.fisher
        )
        val_loss, of_z, direct = validation.value_and_grads(z, hyperparams)
        alpha, direct, _, _ = through_state(phi, z, hyperparams, last, of_z, direct)
        given = self.penalty
        penalty = given and (lambda w: given(eqx.combine(w, phi.frozen), hyperparams))
        terms = damping, penalty, z.w, self.factor_every
        q, fisher = fisher.solve(self._kept, alpha, *terms)

        _, products = of_loss.optimality(z, hyperparams, last)
        by_w, mixed = products(cast_like(q, z.w))
        hypergradient = jax.tree.map(jnp.subtract, direct, mixed)
        left = lambda x, y, a: x.astype(wide) + damping * y.astype(wide) - a.astype(wide)
        left, norm = tree_l2_norm(jax.tree.map(left, by_w, q, alpha)), tree_l2_norm(alpha)
        residual = left / jnp.where(norm > 0, norm, 1).astype(left.dtype)
        memory = NHGDMemory(fisher, residual.astype(wide))
        return Estimate(z, hypergradient, train_loss, val_loss, memory)
