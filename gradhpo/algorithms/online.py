r"""HyperDistill: the hypergradient of a whole episode, distilled into one product per step."""

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.algorithms.discount import geometric_sum, past_share
from gradhpo.algorithms.distilled import Distilled, regress
from gradhpo.extend import (
    Algorithm,
    BatchStack,
    BilevelState,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    LossFn,
    LossFunctions,
    Memory,
    MetricDict,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    check_count,
    check_setting,
    checked,
    fit_memory,
    setting,
    tree_normalize,
)


class HyperDistillMemory(Memory):
    """What [`OnlineHypergradientOptimizer`][gradhpo.OnlineHypergradientOptimizer] carries over.

    - `distilled`: `w_star` and, with a distilled data set, `d_star` and `key`.
    - `t`: steps of the episode so far, shape `()`, int32.
    - `theta`, `theta_rejected`: the coefficient, and how many of its estimates were refused as
        non-finite; shape `()`.
    - `sum_xy`, `sum_xx`: from the last estimations, shape `[memory_size]`, newest first.
    """

    distilled: Distilled
    t: Array
    theta: Array
    theta_rejected: Array
    sum_xy: Array
    sum_xx: Array


@checked
class OnlineHypergradientOptimizer(Algorithm):
    r"""HyperDistill: a hypergradient of the whole episode so far, at every inner step.

    Step $t$ of an episode takes one inner step and estimates

    $$g_t = \frac{\partial L_{\mathrm{val}}}{\partial\lambda}(w_t) +
    \theta\,\frac{1 - \gamma^t}{1 - \gamma}\,v_t,\qquad
    v_t = \alpha_t\,\frac{\partial\Phi(w^*_t, \lambda; D^*_t)}{\partial\lambda},$$

    where $\alpha_t = \partial L_{\mathrm{val}}/\partial w\,(w_t)$. A single product at a distilled
    point $w^*_t$ (a mean of $w_0, \dots, w_{t-1}$ with weights $\gamma^{t-i}$) and on a distilled
    batch $D^*_t$ represents the sum over all steps of the episode.
    [`estimate_theta`][gradhpo.OnlineHypergradientOptimizer.estimate_theta] fits the scalar
    $\theta$; [`run`][gradhpo.run] calls it automatically if you pass `steps_per_episode`. Memory
    and cost of a step do not depend on the length of the episode. `HyperDistillOptimizer` is the
    same class, by the paper's name.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `distillation_weight`: $\theta$ until its first estimate, finite, shape `()`, default 0.1. To
        set $\theta$ by hand, set this; a value written into the memory is overwritten.
    - `memory_size`: number of past estimations that $\theta$ is fitted to, at least 1; default 10
        (the paper: 1).
    - `gamma`: the discount $\gamma \in [0, 1]$, shape `()`, default 0.99. At 0, with
        `distillation_weight=1`, this is [`OneStepOptimizer`][gradhpo.OneStepOptimizer]; at 1 the
        factor is $t$, and $w^*_t$ the plain mean.
    - `estimation_period`: `run` fits $\theta$ before the first episode and again every
        `estimation_period` episodes, default 50; `None` keeps `distillation_weight`.
    - `normalize`: whether to follow the paper's rule for a validation loss that does not contain
        the hyperparameters: no $\theta$, but a step along $v_t/\|v_t\|_2$, so $g_t = \partial
        L_{\mathrm{val}}/\partial\lambda + v_t/\|v_t\|_2$. Default `False`: an outer optimizer such
        as Adam hardly depends on the scale, and plain gradient descent needs it.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    Give `init` an example `batch` and a `key` to keep the distilled data set $D^*$. Without them
    $D^*_t = D_t$, which makes no difference if all batches are the same.

    The memory, `state.memory`, is a
    [`HyperDistillMemory`][gradhpo.algorithms.online.HyperDistillMemory];
    `state.get_metric("theta")` finds any of its entries.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, counts below 1, `gamma` outside [0, 1], or a `distillation_weight`
    that is not finite; `TypeError` for an optimizer that is not an optax transformation, or a
    function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.mean((w - h) ** 2 * batch)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    data = gradhpo.ArrayData(jnp.ones((10, 3)), batch_size=5, key=jax.random.key(0))
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3), batch=data(0), key=jax.random.key(1))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    state, history = gradhpo.run(
        optimizer, state, losses, data, None, num_steps=200, steps_per_episode=20, progress=False
    )
    print(history["theta"][-1])
    ```

    ??? cite "Reference"

        Lee et al., *Online Hyperparameter Meta-Learning with Hypergradient Distillation*,
        ICLR 2022, arXiv:2110.02508, equations 13 to 15, algorithms 3 and 4.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    distillation_weight: Float[Array, ""] = eqx.field(converter=setting, default=0.1)
    memory_size: int = eqx.field(static=True, default=10)
    gamma: Float[Array, ""] = eqx.field(converter=setting, default=0.99)
    estimation_period: int | None = eqx.field(static=True, default=50)
    normalize: bool = eqx.field(static=True, default=False)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    def __check_init__(self):
        check_count("memory_size", self.memory_size)
        check_setting("gamma", self.gamma, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
        check_setting("distillation_weight", self.distillation_weight, jnp.isfinite, "finite")
        if self.estimation_period is not None:
            check_count("estimation_period", self.estimation_period)

    @property
    def num_inner_steps(self) -> int:
        """1: every inner step has its own hypergradient."""
        return 1

    @property
    def sees(self) -> Sees:
        """The last update."""
        return "last update"

    @property
    def reads_ahead(self) -> bool:
        """Whether an episode starts with an estimate of theta."""
        return self.estimation_period is not None and not self.normalize

    @property
    def without_episodes(self) -> str:
        """Theta is fitted at the start of an episode."""
        if not self.reads_ahead:
            return ""
        return (
            "run without steps_per_episode never fits the theta of OnlineHypergradientOptimizer, "
            "which is fitted at the start of an episode: pass steps_per_episode, or "
            "estimation_period=None to the optimizer to keep distillation_weight (or the result of "
            "your own estimate_theta)"
        )

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> HyperDistillMemory:
        """No step yet, and `distillation_weight`."""
        dtype = accumulation_dtype(z.w)
        return HyperDistillMemory(
            distilled=Distilled.create(z.w, batch, key),
            t=jnp.zeros((), jnp.int32),
            theta=self.distillation_weight.astype(dtype),
            theta_rejected=jnp.zeros((), dtype),
            sum_xy=jnp.zeros(self.memory_size, dtype),
            sum_xx=jnp.zeros(self.memory_size, dtype),
        )

    def restart_memory(
        self, memory: HyperDistillMemory, z: InnerState, hyperparams: PyTree
    ) -> HyperDistillMemory:
        """Resets the clock; at t = 1 the distilled point and data are replaced completely."""
        return eqx.tree_at(lambda m: m.t, memory, jnp.zeros_like(memory.t))

    def finite_part(self, memory: HyperDistillMemory) -> PyTree:
        """What a step changes, except the examples, which may contain NaN (a missing value)."""
        return memory.theta, memory.distilled.w_star

    def estimate(self, problem: Problem, memory: HyperDistillMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        dtype = memory.theta.dtype
        t, gamma = memory.t + 1, self.gamma.astype(dtype)
        estimated = jnp.any(memory.sum_xx > 0)
        theta = jnp.where(estimated, memory.theta, self.distillation_weight.astype(dtype))

        distilled = memory.distilled.add(z.w, phi.batch(0), past_share(gamma, t))
        new, train_loss = phi.step(z, hyperparams, 0)
        val_loss, alpha, direct = validation.value_and_grads(new, hyperparams)
        v = distilled.product(phi, z, hyperparams, 0, alpha)
        if self.normalize:
            scale, v = jnp.ones((), dtype), tree_normalize(v, jnp.finfo(dtype).tiny)
        else:
            scale = theta * geometric_sum(gamma, t)
        add = lambda direct, v: direct + scale.astype(v.dtype) * v
        hypergradient = jax.tree.map(add, direct, v)
        memory = dataclasses.replace(memory, distilled=distilled, t=t, theta=theta)
        return Estimate(new, hypergradient, train_loss, val_loss, memory)

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """Estimates of theta that were refused."""
        refused = copies * (metrics["theta_rejected"][-1] - before["theta_rejected"])
        return f"Refused as non-finite: {refused:.0f} estimates of theta." if refused else ""

    def estimate_theta(
        self,
        state: BilevelState,
        train_batches: BatchStack,
        val_batch: PyTree,
        train_loss_fn: LossFn | LossFunctions,
        val_loss_fn: LossFn | None = None,
    ) -> BilevelState:
        r"""Fits the coefficient theta on the training steps that `train_batches` make. Compiled.

        Trains from `state` through all $T$ batches, goes back along the straight line between the
        two ends (DrMAD), and regresses the second-order part $g^{SO}_s$ of the hypergradient of the
        last $s$ steps on the estimate that a step would make for them, for $s = 1, \dots, T$:
        $\theta = x^\top y/x^\top x$ with $x_s = \|v_s\|_2\,(1 - \gamma^s)/(1 - \gamma)$ and
        $y_s = v_s^\top g^{SO}_s/\|v_s\|_2$, summed over the last `memory_size` estimations. Memory
        does not depend on $T$.

        **Arguments:**

        - `state`, `train_batches`: a state and a [`BatchStack`][gradhpo.BatchStack] of $T$ batches.
        - `val_batch`: any pytree of arrays.
        - `train_loss_fn`, `val_loss_fn`: `(params, hyperparams, batch) -> scalar`, or one
            [`LossFunctions`][gradhpo.LossFunctions] in place of both.

        **Returns:** the state with a new `memory.theta`; parameters stay. An estimate that is not
        finite, or without information ($v_s = 0$), leaves $\theta$ unchanged.

        **Raises:** `TypeError` if `train_batches` is not a `BatchStack`, or a loss has other
        arguments; `ValueError` for a loss that is not a real scalar, or another optimizer's state.

        ```python
        loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
        optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
        state = optimizer.init(jnp.ones(3), jnp.zeros(3))
        batches = gradhpo.BatchStack(jnp.ones((20, 3)))
        state = optimizer.estimate_theta(state, batches, jnp.ones(3), loss, loss)
        ```
        """
        losses = train_loss_fn, val_loss_fn
        return fit_memory(self, state, train_batches, val_batch, *losses, "estimate_theta")

    def prepare(
        self, problem: Problem, memory: HyperDistillMemory, step: Array, num_steps: int
    ) -> HyperDistillMemory:
        """Theta is fitted on every `estimation_period`-th episode."""
        assert self.estimation_period is not None
        due = step % (self.estimation_period * num_steps) == 0
        # The branches return only what they change: everything else would be copied.
        changed = lambda m: (m.theta, m.theta_rejected, m.sum_xy, m.sum_xx, m.distilled.key)
        anew = lambda: changed(self.fit(problem, memory, num_steps * self.num_inner_steps))
        fitted = jax.lax.cond(due, anew, lambda: changed(memory))
        return eqx.tree_at(changed, memory, fitted, is_leaf=lambda x: x is None)

    def fit(
        self, problem: Problem, memory: HyperDistillMemory, num_steps: int
    ) -> HyperDistillMemory:
        """Theta, by regression over these steps and the last `memory_size` estimations."""
        gamma = self.gamma.astype(memory.theta.dtype)
        sum_xy, sum_xx, key = regress(problem, memory.distilled, gamma, num_steps)
        pooled_xy = jnp.roll(memory.sum_xy, 1).at[0].set(sum_xy)
        pooled_xx = jnp.roll(memory.sum_xx, 1).at[0].set(sum_xx)
        theta = jnp.sum(pooled_xy) / jnp.sum(pooled_xx)
        finite = jnp.isfinite(sum_xy) & jnp.isfinite(sum_xx)
        usable = finite & (sum_xx > 0) & jnp.isfinite(theta)
        return HyperDistillMemory(
            distilled=dataclasses.replace(memory.distilled, key=key),
            t=memory.t,
            theta=jnp.where(usable, theta, memory.theta),
            theta_rejected=memory.theta_rejected + (~finite).astype(theta.dtype),
            sum_xy=jnp.where(usable, pooled_xy, memory.sum_xy),
            sum_xx=jnp.where(usable, pooled_xx, memory.sum_xx),
        )
