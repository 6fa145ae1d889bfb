r"""Forward mode: exact hypergradients at every step, in memory independent of the horizon."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    Memory,
    Problem,
    UpdateFn,
    checked,
    infinite_at_rest,
    map_in_blocks,
    num_coordinates,
    push_start,
    push_step,
    tree_dot,
    unit_vector,
    unravel,
)


class ForwardMemory(Memory):
    """`Z`, the derivative of the inner state, in its floating-point leaves `[hyperparams, ...]`."""

    Z: InnerState


@checked
class ForwardModeOptimizer(Algorithm):
    r"""The exact hypergradient of the whole episode so far, by forward mode.

    The derivative $Z_t = \mathrm{d} z_t/\mathrm{d}\lambda$ of parameters and optimizer state is
    carried along with them,

    $$Z_t = A_t Z_{t-1} + B_t,\qquad
    g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda} + \alpha_T Z_T,$$

    from `step` to `step`. With `unroll_steps=1`, every inner step gives the hypergradient of all
    steps since `init` (or since the start of the episode): real-time hyperparameter optimization.
    Earlier steps, and their derivatives, used the hyperparameters of that time.

    Memory is $O(P \cdot H)$ for $P$ parameters and $H$ hyperparameters, regardless of the number of
    inner steps; time is one training gradient and at most two more per hyperparameter. Use it for a
    few hyperparameters and long horizons: learning rates, momenta and their schedules. `Z` has the
    dtype of the parameters: in bfloat16, rounding swallows the contributions of new steps after a
    few hundred. Updates need only a forward derivative (an `update_fn` may contain a `while_loop`).

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    The memory, `state.memory`: `Z`, with `Z.w` like the parameters and `Z.s` like the optimizer
    state (the floating-point part of both), each leaf with a leading axis of length $H$ over the
    hyperparameters in the order of their leaves; 0 at `init` and at the start of an episode.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, or `unroll_steps < 1`; `TypeError` for an optimizer that is not an
    optax transformation, or a function that is not callable.

    ```python
    loss = lambda w, h, batch: jnp.sum(w**2 * jnp.arange(1.0, 4.0))
    optimizer = gradhpo.ForwardModeOptimizer(
        lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=h["momentum"]),
        optax.sgd(0.01),
        unroll_steps=100,
    )
    rates = {"log_rate": jnp.array(-3.0), "momentum": jnp.array(0.5)}
    state = optimizer.init(jnp.ones(3), rates)
    state = optimizer.step(state, None, None, loss, loss)
    ```

    ??? cite "Reference"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter Optimization*,
        ICML 2017, arXiv:1703.01785; schedules with shared values: Micaelli, Storkey,
        *Gradient-based Hyperparameter Optimization Over Long Horizons*, NeurIPS 2021,
        arXiv:2007.07869.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "unroll_steps"

    @property
    def differentiates_init(self) -> bool:
        """Yes: `Z` starts there."""
        return True

    @property
    def carries_start(self) -> bool:
        """Yes: `Z` is carried from step to step."""
        return True

    @property
    def derivatives(self) -> str:
        """Forward derivatives."""
        return "forward derivatives of the inner update"

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> ForwardMemory:
        """`Z` = 0."""
        count = num_coordinates(hyperparams)
        inexact = eqx.filter(z, eqx.is_inexact_array)
        zeros = lambda x: jnp.broadcast_to(jnp.zeros_like(x), (count, *x.shape))
        return ForwardMemory(jax.tree.map(zeros, inexact))

    def restart_memory(
        self, memory: ForwardMemory, z: InnerState, hyperparams: PyTree
    ) -> ForwardMemory:
        """`Z` = 0 again: the new start is assumed not to depend on the hyperparameters."""
        return jax.tree.map(jnp.zeros_like, memory)

    def estimate(self, problem: Problem, memory: ForwardMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        coordinates = jnp.arange(num_coordinates(hyperparams))
        from_rest = infinite_at_rest(phi, z, hyperparams)

        def body(carry, t):
            z, tangents = carry
            last = t == self.unroll_steps - 1
            z, loss, push = push_step(phi, z, hyperparams, t, last, from_rest=from_rest)
            along = lambda row: push(row[0], unit_vector(row[1], hyperparams))
            return (z, map_in_blocks(along, (tangents, coordinates))), loss

        tangents = memory.Z
        if phi.fresh is not None:
            at_start = lambda i: push_start(phi, z, hyperparams, unit_vector(i, hyperparams))
            begun = map_in_blocks(at_start, coordinates)
            w, s = jax.tree.map(jnp.add, (tangents.w, tangents.s), begun)
            tangents = tangents._replace(w=w, s=s)
        (z, tangents), losses = jax.lax.scan(body, (z, tangents), jnp.arange(self.unroll_steps))
        val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
        seen = tangents._replace(s=None)
        through_updates = map_in_blocks(lambda of_z: tree_dot(of_z, alpha), seen)
        hypergradient = jax.tree.map(jnp.add, direct, unravel(through_updates, hyperparams))
        return Estimate(z, hypergradient, losses[-1], val_loss, ForwardMemory(tangents))
