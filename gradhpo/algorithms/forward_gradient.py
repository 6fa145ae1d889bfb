"""Forward gradients: exact derivatives along random directions, in the memory of training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.extend import (
    Algorithm,
    Draws,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    Memory,
    Problem,
    Sees,
    UpdateFn,
    check_count,
    checked,
    infinite_at_rest,
    mean_along,
    push_start,
    push_step,
    random_directions,
    tree_dot,
    tree_zeros_like,
)


class ForwardGradientMemory(Memory):
    """`draws`: the key of the directions, and how many steps have drawn from it."""

    draws: Draws


@checked
class ForwardGradientOptimizer(Algorithm):
    r"""An unbiased estimate of the exact hypergradient of T inner steps, by forward mode.

    The exact derivative is taken along $b$ random directions $v_i$, and the estimate is

    $$\hat g = \frac1b \sum_{i=1}^b (g \cdot v_i)\, v_i,\qquad
    g \cdot v = \frac{\partial L_{\mathrm{val}}}{\partial\lambda} \cdot v + \alpha_T \dot z_T,\qquad
    \dot z_t = A_t \dot z_{t-1} + B_t v.$$

    The entries of $v_i$ are independent and +1 or -1 with equal probability, so that
    $\mathbb{E}\,\hat g = g$. With one hyperparameter every draw is $g$ itself; with $H$, the
    expected squared distance to $g$ is $(H - 1)\|g\|^2/b$.

    Memory is $O(P \cdot b)$ for $P$ parameters, for any number of inner steps and of
    hyperparameters; time is one training gradient and at most two more per direction. An
    `update_fn` needs only a forward derivative (it may contain a `while_loop`). Each `step`
    differentiates its own `unroll_steps`, as [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer] does.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `num_directions`: $b$, at least 1; default 1. All directions are pushed forward together.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    `init` takes the `key` of the directions, by default `jax.random.key(0)`; the memory,
    `state.memory`, holds its numbers and the count of draws. Every `step` draws new directions. In
    a [`TaskBatched`][gradhpo.TaskBatched] without a `key`, all tasks draw the same ones.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, `unroll_steps < 1`, or `num_directions < 1`; `TypeError` for an
    optimizer that is not an optax transformation, or a function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.ForwardGradientOptimizer(
        optax.sgd(0.1), optax.adam(0.01), unroll_steps=100, num_directions=4
    )
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3), key=jax.random.key(0))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Shen et al., *Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization*
        ((FG)²U), NeurIPS 2024, arXiv:2406.14095.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    num_directions: int = eqx.field(static=True, default=1)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "unroll_steps"

    def __check_init__(self):
        check_count("num_directions", self.num_directions)

    @property
    def sees(self) -> Sees:
        """The updates of a `step`."""
        return "updates" if self.unroll_steps > 1 else "last update"

    @property
    def differentiates_init(self) -> bool:
        """Yes: tangents start there."""
        return True

    @property
    def derivatives(self) -> str:
        """Forward derivatives of the update."""
        return "forward derivatives of the inner update and first ones of the validation loss"

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> ForwardGradientMemory:
        return ForwardGradientMemory(Draws.create(key))

    def after_refusal(
        self, old: ForwardGradientMemory, new: ForwardGradientMemory
    ) -> ForwardGradientMemory:
        """The draw is spent: the next step has other directions."""
        return new

    def estimate(self, problem: Problem, memory: ForwardGradientMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        key, draws = memory.draws.next()
        signs = jax.random.rademacher
        directions = random_directions(signs, key, hyperparams, self.num_directions)
        from_rest = infinite_at_rest(phi, z, hyperparams)

        def at_start(v):
            w, s = push_start(phi, z, hyperparams, v)
            return InnerState(w, s, tree_zeros_like(eqx.filter(z.r, eqx.is_inexact_array)))

        def body(carry, t):
            z, tangents = carry
            last = t == self.unroll_steps - 1
            z, loss, push = push_step(phi, z, hyperparams, t, last, from_rest=from_rest)
            return (z, jax.vmap(push)(tangents, directions)), loss

        begun = z, jax.vmap(at_start)(directions)
        (z, tangents), losses = jax.lax.scan(body, begun, jnp.arange(self.unroll_steps))
        val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
        seen = tangents._replace(s=None)  # the validation loss does not read it
        slope = lambda z_dot, v: tree_dot(z_dot, alpha) + tree_dot(direct, v)
        hypergradient = mean_along(jax.vmap(slope)(seen, directions), directions)
        return Estimate(z, hypergradient, losses[-1], val_loss, ForwardGradientMemory(draws))
