r"""The truncated Neumann series as a linear solver."""

from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from gradhpo.utils.settings import check_count, check_setting, setting
from gradhpo.utils.trees import tree_l2_norm
from gradhpo.utils.typecheck import checked


_State: TypeAlias = lx.AbstractLinearOperator


@checked
class Neumann(lx.AbstractLinearSolver[_State]):
    r"""The first terms of the Neumann series of an inverse, as a solver for `lineax`.

    $$A^{-1} v \approx \eta \sum_{k=0}^{K} (I - \eta A)^k\, v =
    A^{-1}\bigl(I - (I - \eta A)^{K+1}\bigr) v,\qquad K = \mathtt{terms} - 1,$$

    which equals that number of gradient descent steps with rate $\eta$ = `step_size` on the linear
    system; it takes exactly $K$ products with $A$. It converges if all eigenvalues of $A$ lie
    between 0 and $2/\eta$. It is meant for short series: they ignore directions in which $A$ is
    flat, as training for a few steps would.

    **Arguments:**

    - `terms`: number of terms, at least 1. One term gives $\eta v$.
    - `step_size`: $\eta$, positive, shape `()`. The learning rate of the inner problem is a good
        choice; if it is too large, the series diverges, and the solve reports
        `lineax.RESULTS.breakdown`.
    - `fresh_batches`: whether every product takes another training batch of the `step`, as in
        stocBiO: product $k$ of $K$ that of inner step $k \bmod \mathtt{inner\_steps}$, counted
        from 0. That costs one more training gradient per product. By default all products take the
        batches that `ImplicitOptimizer` has for its system.

    **Raises:** `ValueError` for `terms < 1` or `step_size <= 0`; while solving, for
    `fresh_batches=True` outside `ImplicitOptimizer(linear_solver=...)`.

    ```python
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(0.1), optax.adam(0.01), linear_solver=gradhpo.Neumann(20, 0.1)
    )
    ```

    ??? cite "Reference"

        Lorraine, Vicol, Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
        Differentiation*, AISTATS 2020, arXiv:1911.02590; `fresh_batches`: Ji, Yang, Liang,
        *Bilevel Optimization: Convergence Analysis and Enhanced Design* (stocBiO), ICML 2021,
        arXiv:2010.07962.
    """

    terms: int = eqx.field(static=True)
    step_size: Float[Array, ""] = eqx.field(converter=setting)
    fresh_batches: bool = eqx.field(static=True, default=False, kw_only=True)

    advice: ClassVar[str] = (
        "the series diverges: pass a smaller step_size, below 2 / (largest curvature)"
    )
    """What to do if its solutions cannot be trusted."""

    approximates: ClassVar[bool] = True
    """It is not the inverse, and has its own derivatives."""
    keeps_shardings: ClassVar[bool] = True
    """It works on vectors that explicit mesh axes spread over devices."""

    def __check_init__(self):
        check_count("terms", self.terms)
        check_setting("step_size", self.step_size, lambda x: x > 0, "positive")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """The linearised operator, so that the part that does not depend on the vector is done
        once."""
        return lx.linearise(operator)

    def compute(
        self, state: _State, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """The sum for `vector`, the result, and `{"num_steps": K, "max_steps": K}`.

        The result is `lineax.RESULTS.breakdown` if the terms grow at the end. With `fresh_batches`,
        `options["numbered"](v, k)` is product $k$.
        """
        scaled = lambda x: self.step_size.astype(x.dtype) * x
        product_at = lambda v, k: state.mv(v)
        if self.fresh_batches:
            if "numbered" not in options:
                raise ValueError(
                    "Neumann(fresh_batches=True) takes its products from the training batches of "
                    "a step, which only gradhpo.ImplicitOptimizer(linear_solver=...) has"
                )
            product_at = options["numbered"]

        def body(carry: tuple[PyTree, PyTree, Array], k: Array):
            term, total, _before = carry
            before = tree_l2_norm(term)
            product = product_at(term, k)
            term = jax.tree.map(lambda x, y: x - scaled(y), term, product)
            return (term, jax.tree.map(jnp.add, total, term), before), None

        products, first = self.terms - 1, tree_l2_norm(vector)
        carry = (vector, vector, first)
        (last, total, before), _ = jax.lax.scan(body, carry, jnp.arange(products))
        # The terms of an unsymmetric operator may grow for a while and shrink in the end.
        size = tree_l2_norm(last)
        grows = (size > first) & (size > before)
        result = lx.RESULTS.where(grows, lx.RESULTS.breakdown, lx.RESULTS.successful)
        statistics = {"num_steps": products, "max_steps": products}
        return jax.tree.map(scaled, total), result, statistics

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The same series for the transposed operator."""
        return state.transpose(), {}

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The same series for the conjugated operator."""
        return lx.conj(state), {}

    def assume_full_rank(self) -> bool:
        """A Neumann series has a limit only if the operator is invertible."""
        return True
