r"""The Nyström approximation of a symmetric operator as a linear solver."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Key, PyTree

from gradhpo.utils.coordinates import (
    map_in_blocks,
    num_coordinates,
    ravel,
    unit_vector,
    unravel,
)
from gradhpo.utils.settings import check_count, check_setting, setting
from gradhpo.utils.trees import accumulation_dtype
from gradhpo.utils.typecheck import checked


class _LowRank(NamedTuple):
    r"""$A_r = B^\top \operatorname{diag}(\mathtt{signs})\, B$, and the shift added to it.

    $B = W C$ with $M^+ = W^\top \operatorname{diag}(\mathtt{signs})\, W$.
    """

    b: Array  # [rank, n]
    signs: Array  # [rank]
    shift: Array  # []
    w: Array  # [rank, rank]
    c: Array  # [rank, n]
    m: Array  # [rank, rank]


@checked
class Nystrom(lx.AbstractLinearSolver[_LowRank]):
    r"""Solves with a low-rank approximation of a symmetric operator, as a solver for `lineax`.

    From `rank` columns of $A$, drawn at random, with rows $C = A_{K\cdot}$ and their own block
    $M = A_{KK}$,

    $$(C^\top M^{-1} C + \rho I)^{-1} v = \frac{v}{\rho} - \frac{1}{\rho^2}\,
    C^\top \Bigl(M + \frac{1}{\rho}\, C C^\top\Bigr)^{-1} C v,\qquad \rho = \mathtt{damping}.$$

    It costs `rank` products with $A$ and no iteration: for a positive semidefinite $A$ nothing can
    diverge. (With negative curvature among few columns it can be far off.) With full rank it is
    $(A + \rho I)^{-1}$. If $M$ is singular (dead units), its null space is left out.

    **Arguments:**

    - `rank`: number of columns; 5 to 10 are usual. At least 1, at most the size of $A$.
    - `damping`: $\rho$, positive, shape `()`; 0.01 to 0.1 are usual. Directions that the columns do
        not cover are divided by it, so the result can be too long by their curvature over $\rho$
        (`linear_residual` above 1 says so): use an outer optimizer that does not depend on the
        length, such as Adam, or a larger damping. The `damping` of
        [`ImplicitOptimizer`][gradhpo.ImplicitOptimizer] adds to it.
    - `key`: a PRNG key for the columns, which are the same in every solve; one is drawn from each
        of `rank` equal pieces of the parameters.

    **Raises:** `ValueError` for `rank < 1` or `damping <= 0`; while tracing, for a rank larger than
    the operator, or an operator that is not symmetric (as with an `update_fn`).

    ```python
    solver = gradhpo.Nystrom(rank=5, damping=0.01, key=jax.random.key(0))
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(0.1), optax.adam(0.01), linear_solver=solver
    )
    ```

    ??? cite "Reference"

        Hataya, Yamada, *Nyström Method for Accurate and Scalable Implicit Differentiation*,
        AISTATS 2023, arXiv:2302.09726.
    """

    rank: int = eqx.field(static=True)
    damping: Float[Array, ""] = eqx.field(converter=setting)
    key: Key[Array, ""]

    advice: ClassVar[str] = (
        "its length cannot be trusted: use an outer Adam, a larger damping or rank"
    )
    """What to do if its solutions cannot be trusted."""

    approximates: ClassVar[bool] = True
    """It is not the inverse, and has its own derivatives."""

    needs_symmetry: ClassVar[bool] = True
    """It takes the operator to be symmetric."""

    def __check_init__(self):
        check_count("rank", self.rank)
        check_setting("damping", self.damping, lambda x: x > 0, "positive")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _LowRank:
        """Draws the columns. `options["shift"]`: the multiple of I in the operator, default 0.

        **Raises:** `ValueError` for an operator that is smaller than `rank`, or not symmetric.
        """
        if not lx.is_symmetric(operator):
            raise ValueError(
                "Nystrom needs a symmetric operator, which the Hessian of a training loss is; with "
                "an update_fn, or gradhpo.detach or another custom_vjp in the loss, use "
                "lineax.GMRES or gradhpo.Neumann"
            )
        like = operator.in_structure()
        size = num_coordinates(like)
        if self.rank > size:
            raise ValueError(
                f"Nystrom(rank={self.rank}) of an operator of size {size}: the rank cannot be "
                f"larger; write rank={size} for the exact inverse"
            )
        dtype = accumulation_dtype(jax.tree.map(lambda x: jnp.zeros((), x.dtype), like))
        shift = jnp.asarray(options.get("shift", 0.0), dtype)
        # One coordinate from each of equal pieces: distinct without sorting all of them.
        edges = jnp.asarray([i * size // self.rank for i in range(self.rank + 1)])
        chosen = jax.random.randint(self.key, (self.rank,), edges[:-1], edges[1:])

        def row(coordinate: Array) -> Array:
            unit = unit_vector(coordinate, like)
            return ravel(operator.mv(unit), dtype) - shift * ravel(unit, dtype)

        rows = map_in_blocks(row, chosen)
        block = rows[:, chosen]
        values, vectors = jnp.linalg.eigh(block)
        # A direction without curvature among the columns has none to invert.
        magnitudes = jnp.abs(values)
        kept = magnitudes > self.rank * jnp.finfo(dtype).eps * jnp.max(magnitudes)
        scale = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, magnitudes, 1)), 0)
        signs = jnp.where(values < 0, -jnp.ones_like(values), jnp.ones_like(values))
        b, w = scale[:, None] * (vectors.T @ rows), scale[:, None] * vectors.T
        return _LowRank(b, signs, self.damping.astype(dtype) + shift, w, rows, block)

    def compute(
        self, state: _LowRank, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Woodbury's formula with the well-conditioned `rank` by `rank` matrix; always succeeds."""
        solution = _inverse(state, ravel(vector, state.b.dtype))
        return unravel(solution, vector), lx.RESULTS.successful, {}

    def transpose(
        self, state: _LowRank, options: dict[str, Any]
    ) -> tuple[_LowRank, dict[str, Any]]:
        """The operator is symmetric."""
        return state, {}

    def conj(self, state: _LowRank, options: dict[str, Any]) -> tuple[_LowRank, dict[str, Any]]:
        """The operator is real."""
        return state, {}

    def assume_full_rank(self) -> bool:
        """It inverts a damped operator."""
        return True


@jax.custom_jvp
def _inverse(state: _LowRank, v: Array) -> Array:
    b, rho = state.b, state.shift
    small = rho * jnp.diag(state.signs) + b @ b.T
    return (v - b.T @ jnp.linalg.solve(small, b @ v)) / rho


@_inverse.defjvp
def _inverse_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Differentiates C and M, not M's eigenvectors, which need distinct eigenvalues."""
    (state, v), (dot, v_dot) = primals, tangents
    x = _inverse(state, v)
    pseudo_inverse = lambda u: state.w.T @ (state.signs * (state.w @ u))
    u = pseudo_inverse(state.c @ x)
    moved = dot.c.T @ u + state.c.T @ pseudo_inverse(dot.c @ x - dot.m @ u)
    return x, _inverse(state, v_dot - moved - dot.shift * x)
