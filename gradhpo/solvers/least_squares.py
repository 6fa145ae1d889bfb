r"""GMRES with a bounded answer for singular operators."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from gradhpo.utils.trees import accumulation_dtype, all_finite, tree_dot, tree_zeros_like


_State: TypeAlias = lx.AbstractLinearOperator
# GMRES has found an answer if it leaves less than this share of the right-hand side.
_ENOUGH = 0.1


class GuardedGMRES(lx.AbstractLinearSolver[_State]):
    r"""`lineax.GMRES` with a bounded answer for singular operators, a solver for `lineax`.

    Where $A$ is singular the answer of GMRES may have any length, and its residual does not show
    it. If it breaks down, or has not met its tolerances and leaves more than a tenth of $b$,
    conjugate gradients are tried on $A^\top A q = A^\top b$ from 0. With every step they grow
    longer and leave less, on the way to $A^+ b$, the least-squares solution of the smallest norm.
    They are the answer if GMRES broke down, left more than $b$, or is more than twice as long. The
    result is then `lineax.RESULTS.breakdown`, unless they leave less than that tenth.

    It costs one product with $A$ if the tolerances are not met, and for each step of conjugate
    gradients one with $A$ and one with $A^\top$.

    **Arguments:**

    - `settings`: the `lineax.GMRES`.
    - `rtol`: $\|A^\top r\|$ relative to $\|A^\top b\|$ at which the least squares are solved.
    - `most_steps`: the most steps of conjugate gradients.

    ??? cite "Reference"

        Björck, Elfving, Strakoš, *Stability of Conjugate Gradient and Lanczos Methods for Linear
        Least Squares Problems*, SIAM J. Matrix Anal. Appl. 1998.
    """

    settings: lx.GMRES
    rtol: float
    most_steps: int

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """The linearised operator."""
        return self.settings.init(operator, options)

    def compute(
        self, state: _State, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """The answer for `vector`; iterations are the cycles of GMRES."""
        value, result, statistics = self.settings.compute(state, vector, options)
        solved = result == lx.RESULTS.successful
        lost = ~all_finite(value) | ~(solved | (result == lx.RESULTS.max_steps_reached))
        square = tree_dot(vector, vector)

        def remaining(value: PyTree) -> Array:
            left = jax.tree.map(jnp.subtract, vector, state.mv(value))
            return tree_dot(left, left)

        is_open = ~solved & ~lost
        left = jax.lax.cond(is_open, remaining, lambda _: jnp.zeros_like(square), value)
        lost |= is_open & ~(left <= square)
        lost &= jnp.isfinite(square)
        doubtful = lost | (left > _ENOUGH**2 * square)
        # No iteration if nothing is doubtful, for a whole batch of systems at once too.
        bounded, rest = self._least_squares(
            state, jax.tree.map(lambda b: jnp.where(doubtful, b, 0), vector)
        )
        lost |= doubtful & (tree_dot(value, value) > 4 * tree_dot(bounded, bounded))
        value = jax.tree.map(lambda x, y: jnp.where(lost, y, x), value, bounded)
        failed = lost & (tree_dot(rest, rest) > _ENOUGH**2 * square)
        result = lx.RESULTS.where(lost, lx.RESULTS.max_steps_reached, result)
        return value, lx.RESULTS.where(failed, lx.RESULTS.breakdown, result), statistics

    def _least_squares(self, operator: _State, b: PyTree) -> tuple[PyTree, PyTree]:
        """The solution and its residual."""
        transposed = operator.transpose()

        def goes_on(at: _Iterates) -> Array:
            seen = ~(at.gamma <= (self.rtol * at.first) ** 2)
            return (tree_dot(at.r, at.r) > 0) & seen & (at.step < self.most_steps)

        def iterate(at: _Iterates) -> _Iterates:
            slope = transposed.mv(at.r)
            gamma = tree_dot(slope, slope)
            beta = jnp.where(at.step == 0, 0, gamma / at.gamma)
            p = jax.tree.map(lambda s, p: s + beta * p, slope, at.p)
            image = operator.mv(p)
            length = tree_dot(image, image)
            alpha = jnp.where(length > 0, gamma / jnp.where(length > 0, length, 1), 0)
            x = jax.tree.map(lambda x, p: x + alpha * p, at.x, p)
            r = jax.tree.map(lambda r, y: r - alpha * y, at.r, image)
            first = jnp.where(at.step == 0, jnp.sqrt(gamma), at.first)
            return _Iterates(x, r, p, gamma, first, at.step + 1)

        zeros, dtype = tree_zeros_like(b), accumulation_dtype(b)
        unknown, step = jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
        start = _Iterates(zeros, b, zeros, unknown, jnp.zeros((), dtype), step)
        at = jax.lax.while_loop(goes_on, iterate, start)
        return at.x, at.r

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """As for `lineax.GMRES`."""
        return self.settings.transpose(state, options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """As for `lineax.GMRES`."""
        return self.settings.conj(state, options)

    def assume_full_rank(self) -> bool:
        """As for `lineax.GMRES`."""
        return self.settings.assume_full_rank()


class _Iterates(NamedTuple):
    """`x`, its residual `r`, the direction `p`; |A^T r|^2 before the last step, and at first."""

    x: PyTree
    r: PyTree
    p: PyTree
    gamma: Array
    first: Array
    step: Array
