r"""The default linear solver, and which solvers fit a system."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from gradhpo.solvers.least_squares import GuardedGMRES
from gradhpo.utils.trees import accumulation_dtype, tree_l2_norm


# Products of the default solvers, each of which costs two training gradients. GMRES counts cycles
# of this many products.
_MOST_PRODUCTS, _CYCLE = 100, 20


def choose_solver(
    solver: lx.AbstractLinearSolver | None, like: PyTree, *, symmetric: bool
) -> lx.AbstractLinearSolver:
    """The solver for a system with trees like `like`, or the default if it is `None`.

    The default is `lineax.CG` for a symmetric system, and otherwise `lineax.GMRES`, guarded so that
    its answer for a singular system is bounded. It takes at most about 100 products; its tolerances
    follow the precision of `like`, for a right-hand side of length 1.

    **Arguments:**

    - `solver`: any `lineax` solver, or `None`.
    - `like`: a tree of floating-point arrays.
    - `symmetric`: whether the system is symmetric.

    **Returns:** the solver, with its own numbers in the precision of the solve (float32 at least).

    **Raises:** `ValueError` for `lineax.CG` or `lineax.Cholesky` if the system is not symmetric.

    ```python
    from gradhpo.extend import choose_solver

    choose_solver(None, jnp.zeros(3), symmetric=True)  # a lineax.CG
    ```
    """
    if solver is None:
        solver = _default(like, symmetric)
    if isinstance(solver, lx.CG | lx.Cholesky) and not symmetric:
        raise ValueError(
            f"linear_solver=lineax.{type(solver).__name__}(...) needs a symmetric system, which an "
            "update_fn, gradhpo.detach or another custom_vjp in the loss, or a grad_fn may not "
            "give: use lineax.GMRES, lineax.BiCGStab, lineax.LU, gradhpo.Neumann, or None for the "
            "default; a rule that is the true derivative can be written as custom_jvp"
        )
    # lineax asks for the shapes of its numbers, and JAX warns if they are float64 (made under
    # x64) while x64 is off.
    wide = accumulation_dtype(like)
    return jax.tree.map(lambda x: x.astype(wide) if eqx.is_inexact_array(x) else x, solver)


def _default(like: PyTree, symmetric: bool) -> lx.AbstractLinearSolver:
    tolerance = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(like)) ** (2 / 3)
    # The Euclidean norm: lineax's own applies the tolerance to every component.
    settings = {"rtol": tolerance, "atol": tolerance, "norm": tree_l2_norm}
    if symmetric:
        return lx.CG(**settings, max_steps=_MOST_PRODUCTS)
    # The first cycle that lineax counts only looks at the start.
    gmres = lx.GMRES(**settings, max_steps=_MOST_PRODUCTS // _CYCLE + 1, restart=_CYCLE)
    return GuardedGMRES(gmres, tolerance, _MOST_PRODUCTS // 2)
