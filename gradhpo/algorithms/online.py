r"""HyperDistill: the hypergradient of a whole episode, distilled into one product a step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.algorithms.distilled import Distilled, regress
from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem, Sees, bind
from gradhpo.core.state import BilevelState, Memory
from gradhpo.core.types import BatchStack, InnerOptimizer, LossFn, UpdateFn
from gradhpo.utils.gradients import (
    accumulation_dtype,
    geometric_sum,
    past_share,
    tree_normalize,
)
from gradhpo.utils.settings import check_count, check_setting, setting
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import numbers_as_arrays


@checked
class OnlineHypergradientOptimizer(Algorithm):
    r"""HyperDistill: a hypergradient of the whole episode so far, at every inner step.

    Step $t$ of an episode takes one inner step and estimates

    $$g_t = \frac{\partial L_{val}}{\partial\lambda}(w_t) +
    \theta\,\frac{1 - \gamma^t}{1 - \gamma}\,v_t,\qquad
    v_t = \alpha_t\,\frac{\partial\Phi(w^*_t, \lambda; D^*_t)}{\partial\lambda},$$

    where $\alpha_t = \partial L_{val}/\partial w\,(w_t)$. One product at a distilled point
    $w^*_t$ (a mean of $w_0, \dots, w_{t-1}$ with weights $\gamma^{t-i}$) and on a distilled
    batch $D^*_t$ stands for the sum over all steps of the episode. The scalar $\theta$ is
    fitted by [`estimate_theta`][gradhpo.OnlineHypergradientOptimizer.estimate_theta], which
    [`run`][gradhpo.run] calls by itself when it is given `steps_per_episode`. Memory and cost
    of a step do not depend on the length of the episode.

    **Arguments:**

    - `inner_optimizer`, `outer_optimizer`, `update_fn`: as for
        [`FOOptimizer`][gradhpo.FOOptimizer].
    - `distillation_weight`: $\theta$ before its first estimate, shape `()`, default 0.1. To set
        $\theta$ by hand set this; what is written into the metadata is overwritten.
    - `memory_size`: over how many past estimations $\theta$ is fitted; default 10 (1: the paper).
    - `gamma`: the discount $\gamma \in [0, 1]$, shape `()`, default 0.99. At 0, with
        `distillation_weight=1`, this is [`OneStepOptimizer`][gradhpo.OneStepOptimizer]; at 1
        the factor is $t$ and $w^*_t$ the plain mean.
    - `estimation_period`: `run` fits $\theta$ anew before the first episode and every so many
        episodes after it, default 50; `None` keeps `distillation_weight`.
    - `normalize`: the paper's rule for a validation loss that does not contain the
        hyperparameters: no $\theta$, but a step along $v_t/\|v_t\|_2$, so
        $g_t = \partial L_{val}/\partial\lambda + v_t/\|v_t\|_2$. `False` by default: an outer
        optimizer such as Adam hardly sees the scale, and plain gradient descent needs it.

    Give `init` an example `batch` and a `key` to keep the distilled data set $D^*$; without
    them $D^*_t = D_t$, which is the same when every step has the same batch.

    The memory, in `state.metadata`: the episode clock `t`, `w_star`, `theta`, `sum_xy` and
    `sum_xx` of the last estimations, `theta_rejected` (estimates refused as non-finite), and
    with a distilled data set `d_star` and `key`.

    **Raises:** `ValueError` for `gamma` outside [0, 1], a `distillation_weight` that is not finite,
    or counts below 1.

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
    update_fn: UpdateFn | None = None

    def __check_init__(self):
        check_count("memory_size", self.memory_size)
        check_setting("gamma", self.gamma, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
        check_setting("distillation_weight", self.distillation_weight, jnp.isfinite, "finite")
        if self.estimation_period is not None:
            check_count("estimation_period", self.estimation_period)

    @property
    def num_inner_steps(self) -> int:
        """1: every inner step has its hypergradient."""
        return 1

    @property
    def _sees(self) -> Sees:
        return "last update"

    @property
    def _reads_ahead(self) -> bool:
        return self.estimation_period is not None and not self.normalize

    def _init_memory(self, z, hyperparams, batch, key) -> Memory:
        w, _ = z
        dtype = accumulation_dtype(w)
        memory = {
            "t": jnp.zeros((), jnp.int32),
            "theta": self.distillation_weight.astype(dtype),
            "theta_rejected": jnp.zeros((), dtype),
            "sum_xy": jnp.zeros(self.memory_size, dtype),
            "sum_xx": jnp.zeros(self.memory_size, dtype),
        }
        kept, examples = _as_memory(Distilled.create(w, batch, key))
        return memory | kept | examples

    def _restart_memory(self, memory, w) -> Memory:
        # At t = 1 the distilled point and data are replaced whole: nothing old is looked at.
        return {"t": jnp.zeros((), jnp.int32)}

    def _estimate(self, problem: Problem, memory: Memory) -> Estimate:
        phi, validation, (w, s), hyperparams = problem
        dtype = memory["theta"].dtype
        t, gamma = memory["t"] + 1, self.gamma.astype(dtype)
        estimated = jnp.any(memory["sum_xx"] > 0)
        theta = jnp.where(estimated, memory["theta"], self.distillation_weight.astype(dtype))

        distilled = _from_memory(memory).add(w, phi.batch(0), past_share(gamma, t))
        z, train_loss = phi.step((w, s), hyperparams, 0)
        val_loss, alpha, direct = validation.value_and_grads(z[0], hyperparams)
        v = distilled.product(phi, s, hyperparams, 0, alpha)
        if self.normalize:
            scale, v = jnp.ones((), dtype), tree_normalize(v, jnp.finfo(dtype).tiny)
        else:
            scale = theta * geometric_sum(gamma, t)
        add = lambda direct, v: direct + scale.astype(v.dtype) * v
        hypergradient = jax.tree.map(add, direct, v)
        memory, examples = _as_memory(distilled)
        memory |= {"t": t, "theta": theta}
        return Estimate(z, memory, hypergradient, train_loss, val_loss, examples)

    def _remarks(self, before, metrics, num_tasks=1) -> str:
        refused = num_tasks * (metrics["theta_rejected"][-1] - before["theta_rejected"])
        return f"Refused as non-finite: {refused:.0f} estimates of theta." if refused else ""

    def estimate_theta(
        self,
        state: BilevelState,
        train_batches: BatchStack,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        r"""Fits $\theta$ on the training steps that `train_batches` make. Compiled.

        Trains from `state` through all $T$ batches, goes back along the straight line between
        the two ends (DrMAD) and regresses the second-order part $g^{SO}_s$ of the
        hypergradient of the last $s$ steps on what a step would estimate for them, for
        $s = 1, \dots, T$: $\theta = x^\top y/x^\top x$ with
        $x_s = \|v_s\|_2\,(1 - \gamma^s)/(1 - \gamma)$ and $y_s = v_s^\top g^{SO}_s/\|v_s\|_2$,
        summed over the last `memory_size` estimations. Memory does not depend on $T$.

        **Arguments:** `train_batches` is a [`BatchStack`][gradhpo.BatchStack] of $T$ batches;
        the rest as for [`step`][gradhpo.BilevelOptimizer.step].

        **Returns:** the state with a new `metadata["theta"]`. The parameters are where they
        were. An estimate that says nothing ($v_s = 0$) leaves $\theta$ as it was; one that
        comes out non-finite as well, and `metadata["theta_rejected"]` counts it.

        **Raises:** as `step`; `TypeError` for `train_batches` that are no `BatchStack`.

        ```python
        loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
        optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
        state = optimizer.init(jnp.ones(3), jnp.zeros(3))
        batches = gradhpo.BatchStack(jnp.ones((20, 3)))
        state = optimizer.estimate_theta(state, batches, jnp.ones(3), loss, loss)
        ```
        """
        return compiled_estimate(self, state, train_batches, val_batch, train_loss_fn, val_loss_fn)

    def _with_theta(
        self, state, train_batches, val_batch, train_loss_fn, val_loss_fn
    ) -> BilevelState:
        steps = train_batches.num_steps
        problem = bind(
            self, state, train_batches, val_batch, train_loss_fn, val_loss_fn, num_steps=steps
        )
        return state.update(metadata=self._fit(problem, state.memory, steps))

    def _prepare(self, problem: Problem, memory: Memory, step: Array, num_steps: int) -> Memory:
        assert self.estimation_period is not None
        due = step % (self.estimation_period * num_steps) == 0
        steps = num_steps * self.num_inner_steps
        fitted = ("theta", "theta_rejected", "sum_xy", "sum_xx", "key")
        as_it_was = {name: memory[name] for name in fitted if name in memory}
        return jax.lax.cond(due, lambda: self._fit(problem, memory, steps), lambda: as_it_was)

    def _fit(self, problem: Problem, memory: Memory, num_steps: int) -> Memory:
        gamma = self.gamma.astype(memory["theta"].dtype)
        sum_xy, sum_xx, key = regress(problem, _from_memory(memory), gamma, num_steps)
        pooled_xy = jnp.roll(memory["sum_xy"], 1).at[0].set(sum_xy)
        pooled_xx = jnp.roll(memory["sum_xx"], 1).at[0].set(sum_xx)
        theta = jnp.sum(pooled_xy) / jnp.sum(pooled_xx)
        finite = jnp.isfinite(sum_xy) & jnp.isfinite(sum_xx)
        usable = finite & (sum_xx > 0) & jnp.isfinite(theta)
        fitted = {
            "theta": jnp.where(usable, theta, memory["theta"]),
            "sum_xy": jnp.where(usable, pooled_xy, memory["sum_xy"]),
            "sum_xx": jnp.where(usable, pooled_xx, memory["sum_xx"]),
            "theta_rejected": memory["theta_rejected"] + (~finite).astype(theta.dtype),
        }
        return fitted | ({} if key is None else {"key": key})


def compiled_estimate(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batches: BatchStack,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
) -> BilevelState:
    """`optimizer._with_theta`, compiled: for one task, or for many of them at once."""
    batches = numbers_as_arrays(train_batches), numbers_as_arrays(val_batch)
    return _estimate_theta(optimizer, state, *batches, train_loss_fn, val_loss_fn)


@eqx.filter_jit
@checked
def _estimate_theta(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batches: BatchStack,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
) -> BilevelState:
    arguments = (train_batches, val_batch, train_loss_fn, val_loss_fn)
    return optimizer._with_theta(state, *arguments)  # pyright: ignore[reportAttributeAccessIssue]


def _from_memory(memory: Memory) -> Distilled:
    return Distilled(memory["w_star"], memory.get("d_star"), memory.get("key"))


def _as_memory(distilled: Distilled) -> tuple[Memory, Memory]:
    """What is computed, and what is made of examples."""
    present = lambda **parts: {name: part for name, part in parts.items() if part is not None}
    return (
        present(w_star=distilled.w_star, key=distilled.key),
        present(d_star=distilled.d_star),
    )
