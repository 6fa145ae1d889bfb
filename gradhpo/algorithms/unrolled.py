r"""Reverse-mode differentiation through the inner optimization."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import optax

from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    Problem,
    Sees,
    UpdateFn,
    along_a_line,
    cast_like,
    check_count,
    checked,
    cotangent_at_end,
    pull_through,
    square_root,
    through_start,
    unrolled,
)


@checked
class UnrolledOptimizer(Algorithm):
    r"""The exact hypergradient of `unroll_steps` inner steps, by reverse mode.

    $$g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda} +
    \alpha_T\sum_{t=1}^{T} A_T\cdots A_{t+1} B_t:$$

    a forward scan keeps the inner states, and a backward scan pulls the cotangent through them, for
    parameters and optimizer state ($g \leftarrow g + \bar z B_t$, then
    $\bar z \leftarrow \bar z A_t$, from $\bar z = \alpha_T$ at $t = T$ to $t = 1$). No activations
    are kept between inner steps.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `truncation`: keep only the last K terms of the sum, from 1 to `unroll_steps`; `None` (the
        default) keeps all.
    - `checkpoints`: which inner states to keep. `None` (the default) keeps all, memory
        $O(P \cdot T)$. A number of segments, or `"sqrt"` for $\lceil\sqrt T\rceil$ of them, keeps
        the first state of each segment and runs each segment once more on the backward pass: memory
        $O(P\sqrt T)$ with `"sqrt"`, for one more training gradient per step. `"log"` keeps
        $\lfloor\log_2 T\rfloor + 1$ states and takes about $T(\tfrac12\log_2 T - 1)$ more steps.
        Applies to the steps that `truncation` leaves.
    - `store`: where to keep them: `"device"` (the default), or `"host"`, the memory of the host,
        with transfers inside the compiled program. On a CPU both are the same memory. With `"host"`
        the hypergradient can be differentiated in forward mode only. Refused with
        `checkpoints="log"`: its few states fit on the device.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, counts below 1, `truncation > unroll_steps`, more checkpoints than
    steps, or `store="host"` with `checkpoints="log"`; `TypeError` for an optimizer that is not an
    optax transformation, a function that is not callable, or any other `checkpoints` or `store`.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=20)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter Optimization*,
        ICML 2017, arXiv:1703.01785; truncation: Shaban et al., *Truncated Back-propagation
        for Bilevel Optimization*, AISTATS 2019, arXiv:1810.10667; checkpoints: Griewank and
        Walther, *Evaluating Derivatives*, SIAM 2008, chapter 12.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    truncation: int | None = eqx.field(static=True, default=None)
    checkpoints: int | Literal["sqrt", "log"] | None = eqx.field(static=True, default=None)
    store: Literal["device", "host"] = eqx.field(static=True, default="device")
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "unroll_steps"

    def __check_init__(self):
        check_count("unroll_steps", self.unroll_steps)
        if self.truncation is not None:
            check_count("truncation", self.truncation, most=self.unroll_steps)
        if self.checkpoints not in (None, "sqrt", "log"):
            check_count("checkpoints", self.checkpoints, most=self._differentiated_steps)
        if (self.checkpoints, self.store) == ("log", "host"):
            raise ValueError(
                'store="host" with checkpoints="log": write store="device"; about log2(T) states '
                "are kept, and every step would wait for a transfer"
            )

    @property
    def sees(self) -> Sees:
        """All differentiated updates."""
        return "updates" if self._differentiated_steps > 1 else "last update"

    @property
    def differentiates_init(self) -> bool:
        """Yes, unless `truncation` leaves out the first updates."""
        return self._differentiated_steps == self.unroll_steps

    @property
    def _differentiated_steps(self) -> int:
        return self.unroll_steps if self.truncation is None else self.truncation

    @property
    def memory_settings(self) -> dict[str, Any]:
        """`checkpoints` and `store`, where they are not the defaults."""
        settings: dict[str, Any] = {}
        if self.checkpoints is not None:
            settings["checkpoints"] = self.checkpoints
        if self.store != "device":
            settings["store"] = self.store
        return settings

    def with_less_memory(self) -> "UnrolledOptimizer | None":
        """The next in this order: all states, √T of them, log T, all on the host.

        The host counts only where its memory is separate.
        """
        host_apart = jax.default_backend() != "cpu"
        if host_apart and (self.store == "host" or self.checkpoints == "log"):
            all_there = self.checkpoints is None and self.store == "host"
            on_host = dataclasses.replace(self, checkpoints=None, store="host")
            return None if all_there else on_host
        if self.checkpoints == "log":
            return None
        kept = "sqrt" if self.checkpoints is None else "log"
        return dataclasses.replace(self, checkpoints=kept, store="device")

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        steps = self._differentiated_steps
        first = self.unroll_steps - steps
        z, _, _ = problem.phi.rollout(problem.z, problem.hyperparams, 0, first)
        kept = square_root(steps) if self.checkpoints == "sqrt" else self.checkpoints
        return unrolled(problem._replace(z=z), first, steps, kept, self.store)


@checked
class DrMADOptimizer(Algorithm):
    r"""Reverse mode along the straight line from the first inner state to the last.

    The backward pass of [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer] in memory $O(P)$: points
    on that line replace the inner states that it would have to keep,

    $$\hat z_t = (1 - t/T)\,z_0 + (t/T)\,z_T,$$

    for parameters and optimizer state alike (step counts are exact). The straighter the training
    path, the better the approximation.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `unroll_steps`: inner steps $T$ per `step`, at least 1. With 1, the default, it is exact.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, or `unroll_steps < 1`; `TypeError` for an optimizer that is not an
    optax transformation, or a function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.DrMADOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=20)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Fu et al., *DrMAD: Distilling Reverse-Mode Automatic Differentiation for Optimizing
        Hyperparameters of Deep Neural Networks*, IJCAI 2016, arXiv:1601.00917.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "unroll_steps"

    @property
    def sees(self) -> Sees:
        """All updates."""
        return "updates" if self.unroll_steps > 1 else "last update"

    @property
    def differentiates_init(self) -> bool:
        """Yes: the line starts at the true initial state."""
        return True

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        steps = self.unroll_steps
        _, end, train_loss, line, kept = along_a_line(phi, z, hyperparams, steps)
        val_loss, alpha, direct = validation.value_and_grads(end, hyperparams)
        bar = cotangent_at_end(alpha, end, direct)
        bar, _ = pull_through(phi, line.at, kept, 0, steps, hyperparams, bar)
        bar = through_start(phi, z, hyperparams, bar)
        hypergradient = cast_like(bar.hyperparams, direct)
        return Estimate(end, hypergradient, train_loss, val_loss)
