r"""Discounted sums and means over the steps of an episode."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real

from gradhpo.extend import checked, tree_lerp


@checked
def geometric_sum(gamma: Real[ArrayLike, ""], t: Real[ArrayLike, ""]) -> Float[Array, ""]:
    r"""$\sum_{i<t} \gamma^i = (1 - \gamma^t)/(1 - \gamma)$ for $\gamma \in [0, 1]$, $t \ge 0$.

    Exact at both ends ($\gamma = 0$: 1, $\gamma = 1$: t) and accurate close to 1, where the
    quotient as written cancels.
    """
    gamma = jnp.asarray(gamma, jnp.result_type(gamma if eqx.is_array(gamma) else float))
    t = jnp.asarray(t, gamma.dtype)
    inside = (gamma > 0) & (gamma < 1)
    safe = jnp.where(inside, gamma, 0.5)  # keeps derivatives finite at both ends
    # log1p keeps the digits of a gamma close to 1, but has no logarithm for a gamma close to 0.
    log = jnp.where(safe > 0.5, jnp.log1p(jnp.maximum(safe, 0.5) - 1), jnp.log(safe))
    between = jnp.expm1(t * log) / (safe - 1)
    return jnp.where(inside, between, jnp.where(gamma <= 0, jnp.minimum(t, 1), t))


@checked
def past_share(gamma: Real[ArrayLike, ""], t: Real[ArrayLike, ""]) -> Float[Array, ""]:
    r"""$p_t = (\gamma - \gamma^t)/(1 - \gamma^t)$: the share of a discounted mean before step t.

    For $t \ge 1$; 0 at $t = 1$, and $(t - 1)/t$ at $\gamma = 1$.
    """
    t = jnp.asarray(t)
    total = geometric_sum(gamma, t)
    return jnp.asarray(gamma, total.dtype) * geometric_sum(gamma, t - 1) / total


@checked
def update_w_star(
    w_star: PyTree,
    w_prev: PyTree,
    gamma: Real[ArrayLike, ""],
    t: Real[ArrayLike, ""] | Int[Array, ""],
) -> PyTree:
    r"""One step of the distilled weight point of HyperDistill.

    $w^*_t = p_t\, w^*_{t-1} + (1 - p_t)\, w_{t-1}$ with
    $p_t = (\gamma - \gamma^t)/(1 - \gamma^t)$, so that $w^*_t = \sum_{i \le t}
    \gamma^{t-i} w_{i-1} / \sum_{i \le t} \gamma^{t-i}$ and $w^*_1 = w_0$.

    **Arguments:**

    - `w_star`: $w^*_{t-1}$ (ignored at `t = 1`).
    - `w_prev`: $w_{t-1}$, a tree like `w_star`.
    - `gamma`: in [0, 1], shape `()`; at 1 the limit $p_t = (t - 1)/t$, the plain mean.
    - `t`: the step within the episode, from 1, shape `()`. Neither is checked.

    **Returns:** $w^*_t$, a tree like `w_prev`.

    ```python
    w_star = gradhpo.update_w_star(jnp.zeros(2), jnp.ones(2), gamma=0.9, t=1)  # ones
    ```

    ??? cite "Reference"

        Lee et al., *Online Hyperparameter Meta-Learning with Hypergradient Distillation*,
        ICLR 2022, arXiv:2110.02508, equation 13.
    """
    return tree_lerp(w_prev, w_star, past_share(gamma, t))
