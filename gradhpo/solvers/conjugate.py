r"""Conjugate gradients with a useful answer where the operator is singular."""

from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from gradhpo.utils.coordinates import num_coordinates
from gradhpo.utils.trees import accumulation_dtype, tree_dot, tree_zeros_like


_State: TypeAlias = lx.AbstractLinearOperator
# The share of A's norm below which A hardly sees a residual: it has begun to settle.
_SEEN = 0.1


class _Iterates(NamedTuple):
    """The state of the iterations.

    `y`, its residual `r` and the direction `p`, with `gamma` = |r|^2 and `length` = |p|^2; the sums
    of `y` / gamma and of 1 / gamma so far; the largest curvature so far, and whether the last one
    has vanished; the longest image of a unit vector; whether `y` is the smoothed iterate, at the
    end.
    """

    y: PyTree
    r: PyTree
    p: PyTree
    gamma: Array
    length: Array
    y_sum: PyTree
    weights: Array
    largest: Array
    step: Array
    broken: Array
    norm: Array
    smoothed: Array


class ConjugateGradients(lx.AbstractLinearSolver[_State]):
    r"""`lineax.CG` with an answer for singular systems, a solver for `lineax`.

    A symmetric $A$ that is singular has no solution where $b$ has a part outside its range: the
    iterates $y_j$ of conjugate gradients grow until the curvature along their direction vanishes.
    There they end, and the answer is the mean of all iterates with weights $1/\|r_j\|^2$,
    $r_j = b - A y_j$, the iterate of least residual (as in MINRES). The same mean is the answer
    if `max_steps` run out and the last residual is larger than $b$, as happens with negative
    curvature. If $A$ hardly sees the residual $r$, $\|A r\| \ll \|A\| \|r\|$, the answer keeps no
    part along $r$. Once $r$ has settled, $A r = 0$, the answer is $A^+ b$, the least-squares
    solution of the smallest norm (from a start of 0); before, it is an approximation that was cut
    short, with errors where the curvature is small and a residual that may be larger than $b$.
    Otherwise the iterates equal `lineax.CG`'s, which end when the residual meets the
    tolerances, after at least one.

    It costs two more products if it fails, and otherwise one vector.

    **Arguments:**

    - `settings`: a `lineax.CG`, whose tolerances, norm and numbers of steps are taken.

    ??? cite "Reference"

        Zhou, Walker, *Residual Smoothing Techniques for Iterative Methods*, SIAM J. Sci. Comput.
        1994; Liu, Milzarek, Roosta, *Obtaining Pseudo-inverse Solutions With MINRES*, 2023,
        arXiv:2309.17096.
    """

    settings: lx.CG
    keeps_shardings: ClassVar[bool] = True
    """It works on vectors that explicit mesh axes spread over devices."""

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """The linearised operator."""
        return lx.linearise(operator)

    def compute(
        self, state: _State, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        r"""The answer for $b$ = `vector`, from `options["y0"]` or 0.

        `options["image"]`, if it is known, is $A$ times that start: it saves one product.

        The result is `lineax.RESULTS.singular` where $A$ does not see what is left, and `breakdown`
        where the curvature has vanished otherwise, or the last residual was larger than $b$.
        """
        most, every = self.settings.max_steps, self.settings.stabilise_every
        steps = 10 * num_coordinates(vector) if most is None else most
        square = tree_dot(vector, vector)

        def unsolved(at: _Iterates) -> Array:
            return (at.gamma > 0) & ((at.step == 0) | self._exceeds(at.r, vector))

        def goes_on(at: _Iterates) -> Array:
            return unsolved(at) & ~at.broken & ~at.smoothed & (at.step < steps)

        def to_be_smoothed(at: _Iterates) -> Array:
            return (at.broken | (unsolved(at) & ~(at.gamma <= square))) & ~at.smoothed

        def image(at: _Iterates) -> PyTree:
            if "image" not in options:
                return state.mv(at.y)
            is_start = (at.step == 0) & ~at.smoothed
            return jax.lax.cond(is_start, lambda: options["image"], lambda: state.mv(at.y))

        def stretch(at: _Iterates) -> _Iterates:
            # The residual is recomputed, since that of the iterations drifts by rounding.
            at = _smoothed_if(~goes_on(at), at)
            at = _with_residual(at, image(at), vector)
            until = at.step + (steps if every is None else every)
            return jax.lax.while_loop(
                lambda at: goes_on(at) & (at.step < until), lambda at: _iterate(at, state), at
            )

        start = _start(options.get("y0"), vector)
        at = jax.lax.while_loop(lambda at: goes_on(at) | to_be_smoothed(at), stretch, start)
        value, unseen = _without_unseen(at, state, square)
        at_end = lx.RESULTS.singular if most is None else lx.RESULTS.max_steps_reached
        result = lx.RESULTS.where(unsolved(at), at_end, lx.RESULTS.successful)
        result = lx.RESULTS.where(at.smoothed, lx.RESULTS.breakdown, result)
        result = lx.RESULTS.where(unseen, lx.RESULTS.singular, result)
        return value, result, {"num_steps": at.step, "max_steps": most}

    def _exceeds(self, r: PyTree, vector: PyTree) -> Array:
        rtol, atol = self.settings.rtol, self.settings.atol
        share = jax.tree.map(lambda r, b: r / (atol + rtol * jnp.abs(b)), r, vector)
        return ~(self.settings.norm(share) <= 1)

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The operator is symmetric."""
        return state, {}

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The operator is real."""
        return state, {}

    def assume_full_rank(self) -> bool:
        """As for `lineax.CG`."""
        return True


def _start(y0: PyTree | None, vector: PyTree) -> _Iterates:
    zeros, dtype = tree_zeros_like(vector), accumulation_dtype(vector)
    zero, no, unknown = jnp.zeros((), dtype), jnp.asarray(False), jnp.full((), jnp.inf, dtype)
    y, step = zeros if y0 is None else y0, jnp.zeros((), jnp.int32)
    return _Iterates(y, zeros, zeros, unknown, zero, zeros, zero, zero, step, no, zero, no)


def _with_residual(at: _Iterates, image: PyTree, vector: PyTree) -> _Iterates:
    """With the true residual of `y`, from its image; the direction changes by the same."""
    r = jax.tree.map(jnp.subtract, vector, image)
    p = jax.tree.map(lambda p, new, old: p + (new - old), at.p, r, at.r)
    gamma, first = tree_dot(r, r), at.step == 0
    # At the end `p` is wanted as it was, and sums have all but the first iterate already.
    p = jax.tree.map(lambda new, old: jnp.where(at.smoothed, old, new), p, at.p)
    at = at._replace(r=r, p=p, gamma=gamma, length=jnp.where(first, gamma, at.length))
    return _summed(at, jnp.where(first & (gamma > 0), 1 / gamma, 0))


def _iterate(at: _Iterates, operator: _State) -> _Iterates:
    image = operator.mv(at.p)
    curvature = tree_dot(image, at.p)
    largest = jnp.maximum(at.largest, jnp.abs(curvature) / at.length)
    norm = jnp.maximum(at.norm, jnp.sqrt(tree_dot(image, image) / at.length))
    rounding = 10 * jnp.finfo(curvature.dtype).eps
    broken = ~(jnp.abs(curvature) > rounding * largest * at.length)
    alpha = jnp.where(broken, 0, at.gamma / jnp.where(broken, 1, curvature))
    y = jax.tree.map(lambda y, p: y + alpha * p, at.y, at.p)
    r = jax.tree.map(lambda r, x: r - alpha * x, at.r, image)
    gamma = tree_dot(r, r)
    beta, fresh = gamma / at.gamma, jnp.where(broken, 0, jnp.ones_like(gamma))
    p = jax.tree.map(lambda r, p: fresh * r + beta * p, r, at.p)
    length = gamma + beta**2 * at.length  # the residual is orthogonal to the last direction
    at = at._replace(y=y, r=r, p=p, gamma=gamma, length=length, largest=largest, broken=broken)
    at = at._replace(step=at.step + 1, norm=norm)
    return _summed(at, jnp.where(broken | ~(gamma > 0), 0, 1 / gamma))


def _summed(at: _Iterates, weight: Array) -> _Iterates:
    y_sum = jax.tree.map(lambda total, y: total + weight * y, at.y_sum, at.y)
    return at._replace(y_sum=y_sum, weights=at.weights + weight)


def _smoothed_if(ended: Array, at: _Iterates) -> _Iterates:
    scale = 1 / jnp.where(at.weights > 0, at.weights, 1)
    y = jax.tree.map(lambda y, total: jnp.where(ended, scale * total, y), at.y, at.y_sum)
    return at._replace(y=y, smoothed=ended)


def _without_unseen(at: _Iterates, operator: _State, square: Array) -> tuple[PyTree, Array]:
    """The answer; and whether it leaves the same residual without its part along that.

    `square` is the right-hand side's: a residual that is rounding has no direction.
    """
    image = jax.lax.cond(at.smoothed, lambda r: operator.mv(r), tree_zeros_like, at.r)
    slope = tree_dot(image, image)
    hardly_seen = at.smoothed & (slope <= (_SEEN * at.norm) ** 2 * at.gamma)
    hardly_seen &= at.gamma > jnp.finfo(square.dtype).eps * square
    share = tree_dot(at.r, at.y) / jnp.where(hardly_seen, at.gamma, 1)
    share = jnp.where(hardly_seen, share, 0)
    left = jax.tree.map(lambda r, x: r + share * x, at.r, image)
    value = jax.tree.map(lambda y, r: y - share * r, at.y, at.r)
    return value, hardly_seen & (tree_dot(left, left) <= 1.1 * at.gamma)
