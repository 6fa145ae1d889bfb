"""Pytree algebra and the derivative products that every algorithm is made of.

The algebra acts on the floating-point array leaves of a tree. All other leaves (integer
arrays, functions, strings) are not numbers to be optimised: they are passed through
unchanged and count for nothing in norms and products, so whole Equinox models may be given.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real

from gradhpo.utils.typecheck import checked


def accumulation_dtype(tree: PyTree) -> jnp.dtype:
    """float32, or float64 where a leaf is float64: sums over bfloat16 lose everything."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _accumulated(tree: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
    inexact = eqx.filter(tree, eqx.is_inexact_array)
    return optax.tree.cast(inexact, accumulation_dtype(tree) if dtype is None else dtype)


def _map_inexact(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, *xs: function(x, *xs) if eqx.is_inexact_array(x) else x, tree, *rest
    )


@checked
def tree_zeros_like(tree: PyTree) -> PyTree:
    """Zeros with the shape and dtype of every array leaf, integer arrays included.

    Leaves that are no arrays or numbers (functions, strings) stay as they are.

    ```python
    zeros = gradhpo.tree_zeros_like({"w": jnp.ones(3)})
    ```
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array_like(x) else x, tree)


@checked
def tree_l2_norm(tree: PyTree) -> Real[Array, ""]:
    r"""Euclidean norm over all floating-point leaves together, $\sqrt{\sum_i x_i^2}$.

    Accumulated in float32, or float64 where a leaf is float64; so is the result, shape `()`. An
    empty tree has norm 0.

    ```python
    assert gradhpo.tree_l2_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)}) == 5.0
    ```
    """
    return jnp.asarray(optax.tree.norm(_accumulated(tree)), accumulation_dtype(tree))


@checked
def tree_normalize(tree: PyTree, eps: Real[ArrayLike, ""] = 1e-8) -> PyTree:
    r"""Divides by the norm: $x / \max(\|x\|_2, \mathtt{eps})$, so that 0 stays 0.

    `eps` is positive, shape `()`, default 1e-8. Leaves that are not floating-point arrays stay.

    ```python
    unit = gradhpo.tree_normalize({"a": jnp.array([3.0]), "b": jnp.array(4.0)})
    ```
    """
    norm = tree_l2_norm(tree)
    norm = jnp.maximum(norm, jnp.asarray(eps, norm.dtype))
    return _map_inexact(lambda x: (x.astype(norm.dtype) / norm).astype(x.dtype), tree)


@checked
def tree_dot(a: PyTree, b: PyTree) -> Real[Array, ""]:
    r"""Inner product over all floating-point leaves together, $\sum_i a_i b_i$.

    Accumulated like [`tree_l2_norm`][gradhpo.tree_l2_norm], shape `()`. Raises `ValueError` for
    trees of two structures.

    ```python
    assert gradhpo.tree_dot({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}) == 11.0
    ```
    """
    dtype = accumulation_dtype((a, b))
    return jnp.asarray(optax.tree.vdot(_accumulated(a, dtype), _accumulated(b, dtype)), dtype)


@checked
def tree_lerp(a: PyTree, b: PyTree, t: Real[ArrayLike, ""]) -> PyTree:
    r"""Straight line from `a` (at `t = 0`) to `b` (at `t = 1`): $(1 - t)\,a + t\,b$.

    A tree like `a`, with its dtypes; leaves that are not floating-point arrays are those of `a`.
    Where both ends are the same number so is every point between, an infinity included; at `t = 0`
    nothing of `b` is looked at. `t` has the shape `()`. Raises `ValueError` for trees of two
    structures.

    ```python
    middle = gradhpo.tree_lerp({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.5)
    ```
    """
    dtype = accumulation_dtype(a)
    t = jnp.asarray(t, dtype)

    def point(x, y):
        wide_x, wide_y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
        # 0 * inf is nan: a mask of infinities in the parameters would not survive.
        between = (1 - t) * wide_x + t * wide_y
        return jnp.where((wide_x == wide_y) | (t == 0), wide_x, between).astype(x.dtype)

    return _map_inexact(point, a, b)


@checked
def vjp_wrt_both(
    update_fn: Callable, params: PyTree, hyperparams: PyTree, batch: PyTree, cotangent: PyTree
) -> tuple[PyTree, PyTree]:
    r"""Both products of a cotangent with the Jacobians of an update.

    For $\Phi$ = `update_fn` and $v$ = `cotangent`: $(v^\top \partial\Phi/\partial w,\;
    v^\top \partial\Phi/\partial\lambda)$ at $(w, \lambda)$ = (`params`, `hyperparams`).

    **Arguments:**

    - `update_fn`: `(params, hyperparams, batch) -> params`.
    - `params`, `hyperparams`, `batch`: where to differentiate.
    - `cotangent`: a tree like `params`.

    **Returns:** `(params part, hyperparams part)`, trees like `params` and `hyperparams`
    with `None` in place of leaves that are not floating-point arrays.

    **Raises:** `ValueError` for a cotangent that is no tree like `params`.

    ```python
    update = lambda w, rate, batch: w - rate * 2 * w
    w_part, rate_part = gradhpo.vjp_wrt_both(
        update, jnp.array(3.0), jnp.array(0.1), None, jnp.array(1.0)
    )  # 0.8 and -6.0
    ```
    """
    (params, params_rest), (hyperparams, hyperparams_rest) = (
        eqx.partition(tree, eqx.is_inexact_array) for tree in (params, hyperparams)
    )

    def update(w, h):
        new = update_fn(eqx.combine(w, params_rest), eqx.combine(h, hyperparams_rest), batch)
        return eqx.filter(new, eqx.is_inexact_array)

    _, pull = jax.vjp(update, params, hyperparams)
    return pull(eqx.filter(cotangent, eqx.is_inexact_array))


@checked
def vjp_wrt_lambda(
    update_fn: Callable, params: PyTree, hyperparams: PyTree, batch: PyTree, cotangent: PyTree
) -> PyTree:
    r"""The product $v^\top \partial\Phi/\partial\lambda$ alone, a tree like `hyperparams`.

    Arguments and errors as in [`vjp_wrt_both`][gradhpo.vjp_wrt_both], whose second part it is.

    ```python
    update = lambda w, rate, batch: w - rate * 2 * w
    product = gradhpo.vjp_wrt_lambda(
        update, jnp.array(3.0), jnp.array(0.1), None, jnp.array(1.0)
    )  # -6.0
    ```
    """
    return vjp_wrt_both(update_fn, params, hyperparams, batch, cotangent)[1]


@checked
def geometric_sum(gamma: Real[ArrayLike, ""], t: Real[ArrayLike, ""]) -> Float[Array, ""]:
    r"""$\sum_{i<t} \gamma^i = (1 - \gamma^t)/(1 - \gamma)$ for $\gamma \in [0, 1]$, $t \ge 0$.

    Exact at both ends ($\gamma = 0$: 1, $\gamma = 1$: t) and accurate next to 1, where the
    quotient as written cancels.
    """
    gamma = jnp.asarray(gamma, jnp.result_type(gamma if eqx.is_array(gamma) else float))
    t = jnp.asarray(t, gamma.dtype)
    inside = (gamma > 0) & (gamma < 1)
    safe = jnp.where(inside, gamma, 0.5)  # keeps derivatives finite at both ends
    # log1p keeps the digits of a gamma next to 1, and has no logarithm for one next to 0.
    log = jnp.where(safe > 0.5, jnp.log1p(jnp.maximum(safe, 0.5) - 1), jnp.log(safe))
    between = jnp.expm1(t * log) / (safe - 1)
    return jnp.where(inside, between, jnp.where(gamma <= 0, jnp.minimum(t, 1), t))


@checked
def past_share(gamma: Real[ArrayLike, ""], t: Real[ArrayLike, ""]) -> Float[Array, ""]:
    r"""$p_t = (\gamma - \gamma^t)/(1 - \gamma^t)$: what of a discounted mean is older than step t.

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


def linearize_gradient(
    loss: Callable[[PyTree, PyTree], Array], params: PyTree, hyperparams: PyTree, *, symmetric: bool
) -> tuple[Array, PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
    r"""The loss, its gradient, and both second-derivative products, the primal shared.

    Returns $L$, $g = \nabla_w L$ and the function $v \mapsto (v^\top \partial g/\partial w,\;
    v^\top \partial g/\partial\lambda)$. Second derivatives are symmetric, so both are the
    one forward derivative of $\nabla_{(w,\lambda)} L$ along $(v, 0)$ (mixed mode): no
    activation outlives the step. With a `custom_vjp` inside the loss the gradient field need
    not be symmetric and `symmetric=False` transposes it (reverse over reverse).

    ??? cite "Reference"

        Kemaev et al., *Scalable Meta-Learning via Mixed-Mode Differentiation*, ICML 2025,
        arXiv:2505.00793.
    """
    if symmetric:
        (value, (gradient, _)), push = jax.linearize(
            lambda w: jax.value_and_grad(loss, argnums=(0, 1))(w, hyperparams), params
        )
        return value, gradient, lambda v: push(v)[1]

    def reverse(w, h):
        value, gradient = jax.value_and_grad(loss)(w, h)
        return gradient, value

    gradient, pull, value = jax.vjp(reverse, params, hyperparams, has_aux=True)
    return value, gradient, pull
