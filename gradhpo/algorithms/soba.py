r"""SOBA and AmIGO: the linear system of implicit differentiation, solved along with training."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from gradhpo.algorithms.settled import through_state, warn_if_training_reads_it
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
    check_count,
    checked,
    descend,
    init_descent,
    tree_l2_norm,
)


class SOBAMemory(Memory):
    r"""What [`SOBAOptimizer`][gradhpo.SOBAOptimizer] carries over, with its metrics.

    - `adjoint`: $v$, a tree like the parameters; `adjoint_state`: its optimizer's state.
    - `inner_residual`, `linear_residual`: shape `()`.
    """

    adjoint: PyTree
    adjoint_state: PyTree
    inner_residual: Array
    linear_residual: Array


@checked
class SOBAOptimizer(Algorithm):
    r"""Single-loop implicit differentiation: SOBA, or with several steps of each kind AmIGO.

    The adjoint $v$ of implicit differentiation solves
    $H v + \nabla_w L_{\mathrm{val}} = 0$, $H = \nabla_w^2 L_{\mathrm{train}}$. Here it is a
    variable like the parameters: it is kept, and moved by `adjoint_optimizer` along the residual of
    that equation. With one step of each, all three directions are taken at the old
    $(w, v, \lambda)$ on one batch:

    $$d_w = \nabla_w L_{\mathrm{train}},\qquad d_v = H v + \nabla_w L_{\mathrm{val}},\qquad
    g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda} +
    v^\top \frac{\partial^2 L_{\mathrm{train}}}{\partial w\,\partial\lambda}.$$

    With more `inner_steps` or `adjoint_steps`, first the parameters move, then $v$ at the new
    parameters, then the hyperparameters at both. Adjoint step $j$ takes the batch of inner step
    $j \bmod \mathtt{inner\_steps}$, and $g$ the last one.

    An outer step costs one training gradient per inner step, two more per product (and one more
    where an adjoint step uses another batch), and one validation gradient. Unlike
    [`ImplicitOptimizer`][gradhpo.ImplicitOptimizer], it solves no linear system at each step, but
    all three step sizes must suit each other: $v$ follows only if the hyperparameters move slowly.
    $v$ starts at 0, so the first hypergradients are short. It is kept when an episode restarts the
    parameters.

    With an `update_fn` the equation is that of the fixed point $w = \Phi(w, \lambda)$, $(I -
    \partial\Phi/\partial w)^\top v + \nabla_w L_{\mathrm{val}} = 0$, and $g = \partial
    L_{\mathrm{val}}/\partial\lambda - v^\top \partial\Phi/\partial\lambda$: the step size of $v$
    must suit the eigenvalues of $I - \partial\Phi/\partial w$.

    Like `ImplicitOptimizer`, it sees hyperparameters that move the optimum, not settings of the
    inner optimizer; it assumes that training ends at the minimum of the training loss, and
    differentiates a model state at the point where it settles.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. It may need the
        loss (`optax.lbfgs`, `optax.polyak_sgd`).
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `inner_steps`: inner steps per `step`, at least 1; default 1.
    - `adjoint_steps`: steps on $v$ per `step`, at least 1; default 1.
    - `adjoint_optimizer`: an optax transformation for $v$, required, by keyword. `optax.sgd` with
        the rate of the inner problem is a good choice; the rate must be below 2 / (largest
        curvature).
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    The memory, `state.memory`, holds `adjoint`, `adjoint_state` and metrics
    (`state.get_metric("linear_residual")`): `inner_residual`, the norm of
    $\nabla_w L_{\mathrm{train}}$ (or of $w - \Phi$), and `linear_residual`, the norm of $d_v$
    relative to that of $\nabla_w L_{\mathrm{val}}$, both where $g$ is taken.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, `inner_steps < 1`, or `adjoint_steps < 1`; `TypeError` for an
    optimizer that is not an optax transformation, or a function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2 + jnp.exp(h) * w**2)
    val_loss = lambda w, h, batch: jnp.sum((w - 0.7) ** 2)
    optimizer = gradhpo.SOBAOptimizer(
        optax.sgd(0.1), optax.sgd(0.1), adjoint_optimizer=optax.sgd(0.1)
    )
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    for _ in range(100):
        state = optimizer.step(state, None, None, train_loss, val_loss)
    print(state.params, state.get_metric("linear_residual"))  # 0.7
    ```

    ??? cite "Reference"

        Dagréou et al., *A Framework for Bilevel Optimization that Enables Stochastic and Global
        Variance Reduction Algorithms*, NeurIPS 2022, arXiv:2201.13409 (SOBA); Arbel, Mairal,
        *Amortized Implicit Differentiation for Stochastic Bilevel Optimization*, ICLR 2022,
        arXiv:2111.14580 (AmIGO).
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    inner_steps: int = eqx.field(static=True, default=1)
    adjoint_steps: int = eqx.field(static=True, default=1)
    adjoint_optimizer: optax.GradientTransformation = eqx.field(kw_only=True)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        check_count("adjoint_steps", self.adjoint_steps)

    @property
    def sees(self) -> Sees:
        """The optimum."""
        return "optimum"

    @property
    def passes_loss(self) -> bool:
        """True: the inner update is not differentiated."""
        return True

    @property
    def may_be_zero(self) -> bool:
        """True: the adjoint starts at 0."""
        return True

    @property
    def suspect(self) -> str:
        """The adjoint."""
        return "an adjoint that diverges: its rate must be below 2 / (largest curvature)"

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> SOBAMemory:
        """An adjoint of 0. It survives episodes: the optimum has not moved."""
        dtype = accumulation_dtype(z.w)
        adjoint = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), z.w)
        # Placed, not computed: jax_debug_nans refuses to compute a NaN.
        unknown = jax.device_put(np.full((), np.nan, dtype))
        return SOBAMemory(adjoint, init_descent(self.adjoint_optimizer, adjoint), unknown, unknown)

    def estimate(self, problem: Problem, memory: SOBAMemory) -> Estimate:
        warn_if_training_reads_it("SOBAOptimizer", problem)
        if self.inner_steps == self.adjoint_steps == 1:
            return self._at_once(problem, memory)
        return self._in_turn(problem, memory)

    def _at_once(self, problem: Problem, memory: SOBAMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        new_z, train_loss, residual, products = phi.step_and_optimality(z, hyperparams, 0)
        _, of_z, direct = validation.value_and_grads(z, hyperparams)
        alpha, direct, _, _ = through_state(phi, z, hyperparams, 0, of_z, direct)
        left, mixed = _left_over(products, memory.adjoint, alpha)
        moved = self._moved(left, memory.adjoint, memory.adjoint_state)
        memory = SOBAMemory(*moved, *_sizes(residual, left, alpha))
        hypergradient = jax.tree.map(jnp.add, direct, mixed)
        val_loss = validation.measured(new_z, hyperparams)  # the gradients were those at the old z
        return Estimate(new_z, hypergradient, train_loss, val_loss, memory)

    def _in_turn(self, problem: Problem, memory: SOBAMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        last = self.inner_steps - 1
        z, train_loss, _ = phi.rollout(z, hyperparams, 0, self.inner_steps)
        val_loss, of_z, direct = validation.value_and_grads(z, hyperparams)
        alpha, direct, _, _ = through_state(phi, z, hyperparams, last, of_z, direct)
        optimality_at = lambda t: phi.optimality(z, hyperparams, t)
        if phi.repeats_batch:  # one linearization serves all products
            found = optimality_at(last)
            optimality_at = lambda t: found

        def body(carry, j):
            _, products = optimality_at(j % self.inner_steps)
            left, _ = _left_over(products, carry[0], alpha)
            return self._moved(left, *carry), None

        start = memory.adjoint, memory.adjoint_state
        moved, _ = jax.lax.scan(body, start, jnp.arange(self.adjoint_steps))
        residual, products = optimality_at(last)
        left, mixed = _left_over(products, moved[0], alpha)
        memory = SOBAMemory(*moved, *_sizes(residual, left, alpha))
        hypergradient = jax.tree.map(jnp.add, direct, mixed)
        return Estimate(z, hypergradient, train_loss, val_loss, memory)

    def _moved(self, left: PyTree, adjoint: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        return descend("adjoint", self.adjoint_optimizer, left, state, adjoint)


def _left_over(
    products: Callable[[PyTree], tuple[PyTree, PyTree]], adjoint: PyTree, alpha: PyTree
) -> tuple[PyTree, PyTree]:
    """The residual of the adjoint's equation, and the mixed term of the hypergradient."""
    by_w, mixed = products(cast_like(adjoint, alpha))
    add = lambda v, x, y: x.astype(v.dtype) + y.astype(v.dtype)
    return jax.tree.map(add, adjoint, by_w, alpha), mixed


def _sizes(residual: PyTree, left: PyTree, alpha: PyTree) -> tuple[Array, Array]:
    """The metrics of a memory: `inner_residual`, `linear_residual`."""
    size, wide = tree_l2_norm(alpha), accumulation_dtype(alpha)
    relative = tree_l2_norm(left) / jnp.where(size > 0, size, 1)
    return tree_l2_norm(residual).astype(wide), relative.astype(wide)
