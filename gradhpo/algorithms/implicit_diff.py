r"""Implicit differentiation: the hypergradient of the inner optimum, not of the path to it."""

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.algorithms.implicit_memory import ImplicitMemory, on_training
from gradhpo.algorithms.settled import through_state, warn_if_training_reads_it
from gradhpo.extend import (
    SINGULAR,
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerSolver,
    InnerState,
    MetricDict,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    cast_like,
    check_count,
    check_setting,
    checked,
    choose_solver,
    remark_on_solves,
    setting,
    solve_system,
    tree_dot,
    tree_l2_norm,
)


@checked
class ImplicitOptimizer(Algorithm):
    r"""Implicit differentiation at the parameters that `inner_steps` inner steps reach.

    Once training has converged, $\nabla_w L_{\mathrm{train}} = 0$ defines $w$ as a function of
    $\lambda$, and

    $$g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda} -
    q^\top \frac{\partial^2 L_{\mathrm{train}}}{\partial w\,\partial\lambda},\qquad
    (H + \rho I)\, q = \nabla_w L_{\mathrm{val}},\qquad H = \nabla_w^2 L_{\mathrm{train}},$$

    with $\rho$ = `damping`. No path is differentiated, so the memory is $O(P)$ plus the activations
    of one training gradient, for any number of steps. Each product of the linear solver costs up to
    two training gradients, and only products with $H$ are needed (unless the solver asks for the
    matrix). With an `update_fn` (a proximal step, a Split Bregman sweep, any contraction
    $w = \Phi(w, \lambda)$) it solves the transposed fixed-point equation $(I + \rho I -
    \partial\Phi/\partial w)^\top q = \nabla_w L_{\mathrm{val}}$ instead, and $g = \partial
    L_{\mathrm{val}}/\partial\lambda + q^\top \partial\Phi/\partial\lambda$.

    If a batch has fewer examples than there are parameters, $H$ is singular and $q$ does not exist.
    The default solver and `lineax.CG` then take the least-squares solution of the smallest norm,
    $q = H^+ \nabla_w L_{\mathrm{val}}$, and count a failure; `linear_residual` is the share of
    $\nabla_w L_{\mathrm{val}}$ that the batch does not see. (If they run out of products first,
    they return what they have; a residual above 1 says so.) If $H$ is singular but some $q$ exists,
    that is not a failure: $q$ is the solution nearest to the starting point of the iterations.

    It does not see hyperparameters that only change the path to the optimum: learning rates and
    other settings of the inner optimizer. It assumes that training ends at the minimum of the
    training loss. Decay inside the inner optimizer (`optax.adamw`) moves that minimum: write it
    into the loss or an `update_fn` instead. The hypergradient of a starting point
    ($w = w_0 + \delta$) is 0. Far from the optimum the hypergradient is biased: watch
    `inner_residual`. A model state is differentiated where it settles on the last batch,
    $r = R(w, \lambda, r)$; if the training loss reads it, it is held constant, with a warning.

    `inner_solver` replaces the inner steps by any function that solves the inner problem: a solver
    of another library, a `while_loop`, a callback to scikit-learn. It is called once per `step`
    with the current parameters, which it may start from or ignore, and is not differentiated. The
    hypergradient is that of its solution, by the equation above: of the training loss, or of the
    `grad_fn` or `update_fn` beside it. `inner_residual` and `optimality_gap` say how well it has
    solved that equation; metrics and `train_loss` are those at its solution. Under `vmap`
    (`TaskBatched`, `Population`) a `jax.pure_callback` needs its `vmap_method`.

    The hypergradient can itself be differentiated, in forward and reverse mode, for outer Hessians:
    through the `inner_steps` from the given state and the solution of the linear system. If the
    inner steps converge, that is the derivative of the optimum. It is NaN if the solve fails, as
    for a small batch, and refused with an `inner_solver`.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` or `inner_solver`
        instead. It may need the loss: `optax.lbfgs()` takes the fewest steps on a whole data set
        (with `inner_steps` above 1 its memory is cleared at the start of every `step`).
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `linear_solver`: any `lineax` solver (`lineax.CG`, `lineax.LU`, ...),
        [`Neumann`][gradhpo.Neumann], [`Nystrom`][gradhpo.Nystrom] or [`Support`][gradhpo.Support].
        A subclass of `lineax.CG` is used as it is, without the answer for singular systems and
        without explicit shardings. The system is scaled to a right-hand side of length 1: with
        `norm=gradhpo.tree_l2_norm` tolerances are relative to it, with lineax's default every
        component must meet them. Default `None`: `lineax.CG` for a loss, and `lineax.GMRES` for an
        `update_fn` (or a loss with a `custom_vjp`, whose $H$ need not be symmetric), with at most
        about 100 products and tolerances of about 2e-5 in float32, 4e-11 in float64.
    - `inner_steps`: inner steps per `step`, at least 1; default 1.
    - `damping`: $\rho \ge 0$, shape `()`, default 0, for an $H$ that is singular or not positive.
    - `curvature_batches`: number of training batches, the last of a `step`, over which to average
        $H$ and the mixed derivative (or $\Phi$); from 1 (the default) to `inner_steps`. They cost
        as much as one batch of their total size. A batch that serves every inner step counts once.
    - `inner_solver`: `(params, hyperparams, batch) -> params`, of the same structure, shapes and
        dtypes; with a model state `(params, hyperparams, batch, model_state) -> (params,
        new_model_state)`. Replaces `inner_optimizer` and all inner steps: `num_inner_steps` is 1,
        the inner optimizer's state `()`. Default `None`.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    The memory, `state.memory`, is an
    [`ImplicitMemory`][gradhpo.algorithms.implicit_memory.ImplicitMemory] with metrics of the solve,
    such as `state.get_metric("linear_residual")`. Nothing is raised: a finite hypergradient of a
    failed solve is followed like any other. The report of `run` mentions failures, and an
    `optimality_gap` above 0.1.

    **Raises:** `ValueError` for none or several of `inner_optimizer`, `update_fn` and
    `inner_solver` (a `grad_fn` or an `update_fn` beside an `inner_solver` is its equation), a
    `grad_fn` alone, `inner_steps < 1` (above 1 with an `inner_solver`), `curvature_batches` outside
    1 to `inner_steps`, or a negative `damping`; while tracing, for a linear solver that does not
    fit the operator, or an `inner_solver` that returns another structure, shape or dtype.
    `TypeError` unless optimizers are optax transformations and functions are callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2 + jnp.exp(h) * w**2)
    val_loss = lambda w, h, batch: jnp.sum((w - 0.5) ** 2)
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(0.1), optax.sgd(0.1), linear_solver=lx.CG(rtol=1e-5, atol=1e-5), inner_steps=20
    )
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    print(state.get_metric("inner_residual"), state.get_metric("linear_residual"))
    ```

    ??? cite "Reference"

        Pedregosa, *Hyperparameter Optimization with Approximate Gradient*, ICML 2016,
        arXiv:1602.02355; Lorraine et al., AISTATS 2020, arXiv:1911.02590; fixed points:
        Bertrand et al., *Implicit Differentiation of Lasso-type Models*, ICML 2020,
        arXiv:2002.08943.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    linear_solver: lx.AbstractLinearSolver | None = None
    inner_steps: int = eqx.field(static=True, default=1)
    damping: Float[Array, ""] = eqx.field(converter=setting, default=0.0)
    curvature_batches: int = eqx.field(static=True, default=1)
    inner_solver: InnerSolver | None = None
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        check_count("inner_steps", self.inner_steps)
        if self.inner_solver is not None and self.inner_steps != 1:
            raise ValueError(
                f"inner_steps={self.inner_steps} beside an inner_solver, which is called once per "
                "step and takes all the steps that it needs: leave inner_steps out"
            )
        check_count("curvature_batches", self.curvature_batches)
        if self.curvature_batches > self.inner_steps:
            raise ValueError(
                f"curvature_batches={self.curvature_batches} are the last batches of a step, which "
                f"has inner_steps={self.inner_steps}: write inner_steps={self.curvature_batches} "
                f"or more, or curvature_batches={self.inner_steps}"
            )
        if self.curvature_batches > 1 and getattr(self.linear_solver, "fresh_batches", False):
            raise ValueError(
                f"curvature_batches={self.curvature_batches} uses the same batches for every "
                "product, and the solver's fresh_batches=True a different one: leave one out"
            )
        check_setting("damping", self.damping, lambda x: x >= 0, "at least 0")

    @property
    def sees(self) -> Sees:
        """The optimum."""
        return "optimum"

    @property
    def passes_loss(self) -> bool:
        """True: the inner update is not differentiated."""
        return True

    @property
    def suspect(self) -> str:
        """The linear system."""
        return f"the linear system: {SINGULAR}"

    def with_num_steps(self, num_steps: int) -> "ImplicitOptimizer | None":
        """Lowers `curvature_batches` to this number if need be. `None` with an `inner_solver`."""
        if self.inner_solver is not None:
            return None
        batches = min(self.curvature_batches, num_steps)
        return dataclasses.replace(self, inner_steps=num_steps, curvature_batches=batches)

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> ImplicitMemory:
        """An adjoint of 0. It survives episodes: the optimum has not moved."""
        return ImplicitMemory.empty(z.w)

    def finite_part(self, memory: ImplicitMemory) -> PyTree:
        """The adjoint."""
        return memory.adjoint

    def after_refusal(self, old: ImplicitMemory, new: ImplicitMemory) -> ImplicitMemory:
        """The metrics describe a refused step as well."""
        return eqx.tree_at(lambda m: m.adjoint, new, old.adjoint)

    def estimate(self, problem: Problem, memory: ImplicitMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        last = self.inner_steps - 1
        z, train_loss, _ = phi.rollout(z, hyperparams, 0, self.inner_steps)
        w = z.w
        val_loss, of_z, direct = validation.value_and_grads(z, hyperparams)
        alpha, direct, unsettled, moves = through_state(phi, z, hyperparams, last, of_z, direct)
        warn_if_training_reads_it("ImplicitOptimizer", problem)
        residual, products = phi.optimality(z, hyperparams, last, self.curvature_batches)

        # Solved in float32 at least, and for a right-hand side of length 1.
        wide = accumulation_dtype(w)
        symmetric = phi.update_fn is None and phi.symmetric
        solver = choose_solver(self.linear_solver, w, symmetric=symmetric)
        damping = self.damping.astype(wide)
        norm = jax.lax.stop_gradient(tree_l2_norm(alpha).astype(wide))
        norm = jnp.where(norm > 0, norm, 1)
        unit = jax.tree.map(lambda x: 1 / norm * x.astype(wide), alpha)

        def damped(products, v):
            by_w, by_hyperparams = products(cast_like(v, w))
            return jax.tree.map(lambda x, y: x.astype(wide) + damping * y, by_w, v), by_hyperparams

        def numbered(v, k):
            fresh = phi.optimality(z, hyperparams, k % self.inner_steps)[1]
            return damped(products if phi.repeats_batch else fresh, v)[0]

        product = lambda v: damped(products, v)
        try:
            q, failed, iterations = solve_system(
                lambda v: product(v)[0],
                unit,
                solver,
                symmetric=symmetric,
                guess=memory.adjoint,
                shift=damping,
                numbered=numbered,
                point=w,
            )
        except ValueError as error:
            kind = f"ImplicitOptimizer(linear_solver={type(solver).__name__}(...))"
            raise ValueError(f"{kind} does not fit this system: {error}") from error
        reached, mixed = product(q)
        inner_residual = tree_l2_norm(residual)
        change = norm * jnp.abs(tree_dot(q, jax.tree.map(lambda x: x.astype(wide), residual)))
        change += jnp.abs(moves).astype(wide)
        size = jnp.abs(jnp.asarray(val_loss)).astype(wide)
        gap = change / jnp.where(size > 0, size, 1)
        residual_left = tree_l2_norm(jax.tree.map(jnp.subtract, unit, reached))
        if not getattr(solver, "approximates", False):
            failed |= residual_left > 1.01  # by more than rounding
        # If the inner training has blown up, the solver is not to blame.
        failed &= jnp.isfinite(norm) & jnp.isfinite(inner_residual)
        failed |= unsettled
        hypergradient = jax.tree.map(
            lambda x, y: x - (norm * y.astype(wide)).astype(x.dtype), direct, mixed
        )
        # A failed solve is no starting point for the next one.
        adjoint = jax.tree.map(lambda q: jnp.where(failed, 0, norm * q), q)
        memory = ImplicitMemory(
            adjoint,
            inner_residual=inner_residual.astype(wide),
            optimality_gap=gap,
            linear_residual=residual_left.astype(wide),
            linear_iterations=iterations.astype(wide),
            linear_failures=memory.linear_failures + failed.astype(wide),
        )
        return Estimate(z, hypergradient, train_loss, val_loss, memory)

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """Reports failed solves, and training that has not converged."""
        failures = copies * float(metrics["linear_failures"][-1] - before["linear_failures"])
        solves = remark_on_solves(failures, metrics["linear_residual"], self.linear_solver)
        remedy = "more inner_steps, larger batches, or curvature_batches"
        if self.inner_solver is not None:
            remedy = "tighter tolerances and more iterations in inner_solver, or larger batches"
        return f"{solves} {on_training(metrics['optimality_gap'], remedy)}".strip()
