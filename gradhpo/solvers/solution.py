r"""Solutions of an equation, differentiable no matter how they were found."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from gradhpo.solvers.default import choose_solver
from gradhpo.solvers.system import solve_linearly
from gradhpo.utils.foreign import needs_a_value
from gradhpo.utils.structure import have_same_structure, where_they_differ
from gradhpo.utils.trees import accumulation_dtype
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import strong


@checked
def implicit_solution(
    solver: Callable[..., PyTree],
    optimality: Callable[..., PyTree],
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> Callable[..., PyTree]:
    r"""Makes a solver of an inner problem differentiable for JAX, for your own programs.

    The solution $w$ of $F(w, \theta) = 0$ has the derivative

    $$\frac{\partial w}{\partial\theta} =
    -\Bigl(\frac{\partial F}{\partial w}\Bigr)^{-1}\frac{\partial F}{\partial\theta},$$

    no matter how it was found. $F$ = `optimality` is the gradient of a training loss, or the
    residual of a fixed point, $w - \Phi(w, \theta)$. The solver is only called, never
    differentiated: it may be a `while_loop`, a callback, or a program of another library.

    Forward and reverse mode work, in any combination, up to third derivatives, also inside
    `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.checkpoint`. $\theta$ is all that `optimality`
    reads: `args`, and traced arrays that it takes from outside. The value is what the solver
    returns, bit for bit, and derivatives are taken there, so its error carries over to them. The
    derivative with respect to `init_params` is 0.

    Call it inside `jax.jit`: outside, every call traces and compiles again. It does not check that
    the solver has converged; `optimality` at the solution shows it.

    A call costs the solver and two evaluations of `optimality`. A derivative costs one linear
    solve for each tangent, or each cotangent, with its products with $\partial F/\partial w$. If
    the linear solver gives up (a singular system, a series that diverges), the derivative is NaN.
    An iterative one that is cut short has not failed, and its answer is used.

    **Arguments:**

    - `solver`: `(init_params, *args) -> params`, with the structure, shapes and dtypes of
        `init_params`.
    - `optimality`: `(params, *args)` to a tree like `params`, 0 at the solution. It needs as many
        derivatives as are taken of the solution.
    - `linear_solver`: any `lineax` solver, [`Neumann`][gradhpo.Neumann] or
        [`Nystrom`][gradhpo.Nystrom]. Default `None`: `lineax.GMRES`, with at most about 100
        products. If `optimality` is a gradient, the system is symmetric: `lineax.CG` and
        `lineax.Cholesky`, which need that, are then right, and the system is taken to be symmetric
        with them and with `Nystrom`.

    **Returns:** `solution(init_params, *args) -> params`. Leaves of the arguments that are not
    floating-point arrays (functions, counts) may be anything.

    **Raises:** when called, `ValueError` for a solver or an `optimality` that returns a tree unlike
    `init_params`, and for a `linear_solver` that does not fit the system.

    ```python
    x, y = jnp.arange(12.0).reshape(4, 3) % 5, jnp.ones(4)
    loss = lambda w, decay: jnp.sum((x @ w - y) ** 2) / 2 + decay * jnp.sum(w**2) / 2

    def newton(w, decay):  # any solver: here the loss is quadratic, and one step is enough
        return w - jnp.linalg.solve(jax.hessian(loss)(w, decay), jax.grad(loss)(w, decay))

    ridge = gradhpo.implicit_solution(newton, jax.grad(loss), lx.Cholesky())
    length = lambda decay: jnp.sum(ridge(jnp.zeros(3), decay) ** 2)
    print(jax.jit(jax.grad(length))(0.1), jax.jit(jax.hessian(length))(0.1))
    ```

    ??? cite "Reference"

        Blondel et al., *Efficient and Modular Implicit Differentiation*, NeurIPS 2022,
        arXiv:2105.15183.
    """

    def solution(init_params: PyTree, *args: Any) -> PyTree:
        """The solution of `solver`, with derivatives for everything that `optimality` reads."""
        found = jax.tree.map(_strong, _found(solver, init_params, args))
        start = jax.tree.map(_strong, init_params)
        if not have_same_structure(found, start):
            raise ValueError(
                "implicit_solution(solver, ...): the solver must return params of the structure, "
                f"shapes and dtypes of init_params\n{where_they_differ(found, start)}"
            )
        w, rest = eqx.partition(found, eqx.is_inexact_array)

        def residual(w: PyTree) -> PyTree:
            left = optimality(eqx.combine(w, rest), *args)
            numbers = eqx.filter(jax.tree.map(_strong, left), eqx.is_inexact_array)
            if not have_same_structure(numbers, w):
                raise ValueError(
                    "implicit_solution(..., optimality): it must return a tree like the params, "
                    f"one equation for each number\n{where_they_differ(numbers, w)}"
                )
            return numbers

        return eqx.combine(
            _root(eqx.filter_closure_convert(residual, w), w, how=linear_solver), rest
        )

    return solution


def _strong(x: Any) -> Any:
    return strong(x) if eqx.is_array_like(x) else x


def _found(solver: Callable, init_params: PyTree, args: tuple) -> PyTree:
    """What the solver returns, as a constant; also where it reads traced arrays from outside."""
    held = _constant((init_params, *args))
    try:
        called = _constant(eqx.filter_closure_convert(solver, *held))
    except Exception as error:
        if not needs_a_value(error):
            raise
        called = solver  # it needs numbers, which are there unless somebody else traces
    return _constant(called(*held))


def _constant(tree: PyTree) -> PyTree:
    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(numbers), rest)


# Newton steps that JAX may differentiate in place of the rule: 2^n - 1 orders are then right.
_STEPS = 2


@eqx.filter_custom_jvp
def _root(residual: Callable, w: PyTree, *, how: lx.AbstractLinearSolver | None) -> PyTree:
    """`w` itself, with its own derivatives.

    JAX forgets the rule below where it divides a program in two, as it does with the body of a scan
    in reverse mode, and higher derivatives then come from this: from Newton steps on a residual
    that is 0. They solve nothing as long as nothing is differentiated.
    """
    for _ in range(_STEPS):
        left = residual(w)
        zero = jax.tree.map(lambda y: y - jax.lax.stop_gradient(y), left)
        w = jax.tree.map(jnp.add, w, _minus_inverse(residual, w, zero, how))
    return w


@_root.def_jvp
def _root_jvp(primals: tuple, tangents: tuple, *, how: lx.AbstractLinearSolver | None) -> tuple:
    (residual, w), (moves, _) = primals, tangents
    # The solution again, which has this derivative itself: so there are derivatives of this one.
    w = _root(residual, w, how=how)
    _, moved = eqx.filter_jvp(lambda residual: residual(w), (residual,), (moves,))
    nothing = lambda x, dot: jnp.zeros_like(x) if dot is None else dot
    moved = jax.tree.map(nothing, w, moved)
    return w, _minus_inverse(residual, w, moved, how)


def _minus_inverse(
    residual: Callable, w: PyTree, rhs: PyTree, how: lx.AbstractLinearSolver | None
) -> PyTree:
    """The solution of (dF/dw) v = -rhs, linear in `rhs`, in the dtypes of w."""
    wide = accumulation_dtype(w)
    symmetric = isinstance(how, lx.CG | lx.Cholesky) or getattr(how, "needs_symmetry", False)
    solver = choose_solver(how, w, symmetric=symmetric)
    like_w = lambda tree: jax.tree.map(lambda v, x: v.astype(x.dtype), tree, w)
    _, push = jax.linearize(residual, w)

    def product(v: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(wide), push(like_w(v)))

    rhs = jax.tree.map(lambda x: -x.astype(wide), rhs)
    try:
        return like_w(solve_linearly(product, rhs, solver, symmetric=symmetric))
    except ValueError as error:
        kind = f"implicit_solution(linear_solver={type(solver).__name__}(...))"
        raise ValueError(f"{kind} does not fit this system: {error}") from error
