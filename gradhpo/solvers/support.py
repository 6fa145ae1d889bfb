r"""A direct solver for the sparse solutions of proximal fixed points."""

from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from gradhpo.utils.coordinates import map_in_blocks, num_coordinates, ravel, unravel
from gradhpo.utils.settings import check_count
from gradhpo.utils.trees import accumulation_dtype
from gradhpo.utils.typecheck import checked


_State: TypeAlias = lx.AbstractLinearOperator
# The share of the right-hand side that may be left: more means that the system is not like this.
_MOST_LEFT = 1e-2


@checked
class Support(lx.AbstractLinearSolver[_State]):
    r"""Solves the system of a sparse fixed point only on its support, a solver for `lineax`.

    At a fixed point $w = \Phi(w, \lambda)$ of a proximal step (the lasso), the parameters outside
    the support $S = \{i : w_i \ne 0\}$ stay 0 nearby: the rows of $\Phi_w$ for them are 0, and so
    are the columns of $\Phi_w^\top$. The system $(I - \Phi_w)^\top q = b$ divides exactly:

    $$(I - \Phi_w)_{SS}^\top\, q_S = b_S,\qquad q_i = b_i + (\Phi_w^\top q)_i\quad (i \notin S),$$

    the first with as many unknowns as there are parameters in $S$. It is solved directly, by LU,
    even if it is ill-conditioned. That takes `max_active` + 3 products with the whole operator, and
    memory for `max_active` squared, not for the square of all coordinates. Iterative solvers find
    the same answer with one product a step, in about as many steps as $S$ has parameters or fewer:
    use this solver if they end too early, not to save products.

    **Arguments:**

    - `max_active`: the most parameters that may be in the support, at least 1; default 256. If
        there are more, the solve counts as failed; so it does if the rows of others are not 0,
        which leaves more than 1 % of $b$.

    **Raises:** `ValueError` for `max_active < 1`; while solving, outside
    `ImplicitOptimizer(linear_solver=...)`.

    ```python
    def shrink(w, h, batch):  # the proximal step of |w - 1|^2 / 2 + h |w|_1
        return jnp.sign(w - 0.5 * (w - 1)) * jax.nn.relu(jnp.abs(w - 0.5 * (w - 1)) - 0.5 * h)

    optimizer = gradhpo.ImplicitOptimizer(
        outer_optimizer=optax.sgd(0.1),
        update_fn=shrink,
        inner_steps=50,
        linear_solver=gradhpo.Support(max_active=3),
    )
    ```

    ??? cite "Reference"

        Bertrand et al., *Implicit Differentiation of Lasso-type Models for Hyperparameter
        Optimization*, ICML 2020, arXiv:2002.08943.
    """

    max_active: int = eqx.field(static=True, default=256)

    advice: ClassVar[str] = (
        "more parameters than max_active are not 0, or those that are 0 do not stay there: pass a "
        "larger max_active, and an update_fn that is a proximal step"
    )
    """What to do if its solutions cannot be trusted."""

    def __check_init__(self):
        check_count("max_active", self.max_active)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """The linearised operator."""
        if "point" not in options:
            raise ValueError(
                "Support must know which parameters are 0, which only "
                "gradhpo.ImplicitOptimizer(linear_solver=...) tells it"
            )
        return lx.linearise(operator)

    def compute(
        self, state: _State, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        r"""The answer for `vector`; iterations are the number of parameters in the support.

        `options["point"]` are the parameters, `options["shift"]` the multiple of $I$ added to
        $I - \Phi_w$. The operator may also be the transpose, whose rows outside $S$ are rows of
        the identity: the same steps solve it.
        """
        dtype, size = accumulation_dtype(vector), num_coordinates(vector)
        b, w = ravel(vector, dtype), ravel(options["point"], dtype)
        diagonal = 1 + jnp.asarray(options.get("shift", 0.0), dtype)
        product = lambda v: ravel(state.mv(unravel(v, vector)), dtype)
        active = w != 0
        outside = lambda v: jnp.where(active, 0, v / diagonal)
        (places,) = jnp.nonzero(active, size=self.max_active, fill_value=size)
        spread = lambda v: jnp.zeros(size, dtype).at[places].add(v, mode="drop")
        gather = lambda v: v.at[places].get(mode="fill", fill_value=0)

        def column(place: Array) -> Array:
            return gather(product(jnp.zeros(size, dtype).at[place].set(1, mode="drop")))

        unused = jnp.where(places < size, 0, 1).astype(dtype)  # places that are left over
        matrix = map_in_blocks(column, places).T + jnp.diag(unused)
        first = outside(b)
        rest = b - product(first)
        inside = spread(jnp.linalg.solve(matrix, gather(rest)))
        found = first + inside + outside(rest - product(inside))
        left = jnp.linalg.norm(b - product(found)) > _MOST_LEFT * jnp.linalg.norm(b)
        count = jnp.sum(active)
        failed = (count > self.max_active) | left
        result = lx.RESULTS.where(failed, lx.RESULTS.breakdown, lx.RESULTS.successful)
        return unravel(found, vector), result, {"num_steps": count, "max_steps": self.max_active}

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The same for the transposed operator."""
        return state.transpose(), options

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The operator is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """The system on the support must be invertible."""
        return True
