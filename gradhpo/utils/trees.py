"""Pytree algebra, on the floating-point array leaves of a tree.

All other leaves (integer arrays, functions, strings, frozen leaves) are not optimised: they pass
through unchanged and do not count in norms and products, so you can pass whole Equinox models.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, PyTree, Real

from gradhpo.utils.freezing import is_frozen, trained
from gradhpo.utils.typecheck import checked


def accumulation_dtype(tree: PyTree) -> jnp.dtype:
    """float32, or float64 if a leaf is float64: sums over bfloat16 lose everything."""
    leaves = jax.tree.leaves(trained(tree))
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _accumulated(tree: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
    return optax.tree.cast(trained(tree), accumulation_dtype(tree) if dtype is None else dtype)


def _map_inexact(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, *xs: function(x, *xs) if eqx.is_inexact_array(x) else x,
        tree,
        *rest,
        is_leaf=is_frozen,
    )


@checked
def tree_zeros_like(tree: PyTree) -> PyTree:
    """Zeros with the shape and dtype of every array leaf, integer arrays included.

    **Arguments:**

    - `tree`: any pytree. Leaves that are neither arrays nor numbers (functions, strings) stay
        unchanged.

    ```python
    zeros = gradhpo.tree_zeros_like({"w": jnp.ones(3)})
    ```
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array_like(x) else x, tree)


@checked
def tree_l2_norm(tree: PyTree) -> Real[Array, ""]:
    r"""Euclidean norm over all floating-point leaves together.

    **Arguments:**

    - `tree`: any pytree. An empty one has norm 0.

    **Returns:** $\sqrt{\sum_i x_i^2}$, shape `()`, accumulated in float32, or in float64 if a leaf
    is float64.

    ```python
    assert gradhpo.tree_l2_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)}) == 5.0
    ```
    """
    return jnp.asarray(optax.tree.norm(_accumulated(tree)), accumulation_dtype(tree))


def scaled_norm(tree: PyTree) -> Real[Array, ""]:
    """The same for entries of any finite size."""
    return scaled_norm_and_moving(tree)[0]


def scaled_norm_and_moving(tree: PyTree) -> tuple[Real[Array, ""], Bool[Array, " leaves"]]:
    """The norm for entries of any finite size, and for each leaf whether any entry is not 0.

    If the sum of squares of a leaf is 0 or out of range, a second pass scales by the largest entry.
    """
    dtype, leaves = accumulation_dtype(tree), jax.tree.leaves(_accumulated(tree))
    if not leaves:
        return jnp.zeros((), dtype), jnp.zeros((0,), bool)
    squares = jnp.stack([jnp.sum(x * x) for x in leaves])
    limits = jnp.finfo(dtype)
    in_range = jnp.all((squares > limits.tiny / limits.eps) & (jnp.sum(squares) < jnp.inf))

    def scaled():
        largest = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves])
        top = jax.lax.stop_gradient(jnp.max(largest))
        scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        return scale * tree_l2_norm([x / scale for x in leaves]), largest != 0

    plain = lambda: (jnp.sqrt(jnp.sum(squares)), jnp.ones(len(leaves), bool))
    return jax.lax.cond(in_range, plain, scaled)


def random_like(tree: PyTree, random: np.random.Generator) -> PyTree:
    """Numbers from 0.1 to 0.9 in place of all others, for derivatives at no special point."""
    draw = lambda x: jnp.asarray(random.uniform(0.1, 0.9, x.shape), x.dtype)
    return jax.tree.map(draw, tree)


@checked
def tree_normalize(tree: PyTree, eps: Real[ArrayLike, ""] = 1e-8) -> PyTree:
    r"""Scales a tree to length 1; a tree of zeros stays 0.

    **Arguments:**

    - `tree`: any pytree. Leaves that are not floating-point arrays stay.
    - `eps`: the smallest norm to divide by, positive, shape `()`, default 1e-8.

    **Returns:** $x / \max(\|x\|_2, \mathtt{eps})$, a tree like `tree`.

    ```python
    unit = gradhpo.tree_normalize({"a": jnp.array([3.0]), "b": jnp.array(4.0)})
    ```
    """
    norm = scaled_norm(tree)
    norm = jnp.maximum(norm, jnp.asarray(eps, norm.dtype))
    return _map_inexact(lambda x: (x.astype(norm.dtype) / norm).astype(x.dtype), tree)


@checked
def tree_dot(a: PyTree, b: PyTree) -> Real[Array, ""]:
    r"""Inner product over all floating-point leaves together.

    **Arguments:**

    - `a`, `b`: two trees of the same structure and shapes.

    **Returns:** $\sum_i a_i b_i$, shape `()`, accumulated in float32, or in float64 if a leaf is
    float64.

    **Raises:** `ValueError` for trees of different structure.

    ```python
    assert gradhpo.tree_dot({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}) == 11.0
    ```
    """
    dtype = accumulation_dtype((a, b))
    # Not as products of vectors, which would gather leaves that are spread over devices.
    products = jax.tree.map(
        lambda x, y: jnp.sum(x * y), _accumulated(a, dtype), _accumulated(b, dtype)
    )
    return jnp.asarray(sum(jax.tree.leaves(products), jnp.zeros((), dtype)), dtype)


@checked
def tree_lerp(a: PyTree, b: PyTree, t: Real[ArrayLike, ""]) -> PyTree:
    r"""A point on the straight line from one tree to another.

    **Arguments:**

    - `a`, `b`: the ends at `t = 0` and `t = 1`, two trees of the same structure and shapes.
    - `t`: where on the line, shape `()`.

    **Returns:** $(1 - t)\,a + t\,b$, a tree like `a`, with its dtypes; leaves that are not
    floating-point arrays come from `a`. If both ends are the same number, so is every point
    between, including an infinity; at `t = 0` nothing in `b` is read.

    **Raises:** `ValueError` for trees of different structure.

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


def finite_leaves(tree: PyTree, unless_as_in: PyTree | None = None) -> PyTree:
    """For each floating-point leaf, whether all of its numbers are finite.

    With `unless_as_in`, a number that is the same in that tree counts as finite: parameters may
    contain an infinity on purpose (an attention mask), and so may optimizer states (a best value).
    """
    if unless_as_in is None:
        return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), trained(tree))
    fine = lambda x, old: jnp.all(jnp.isfinite(x) | (x == old))
    return jax.tree.map(fine, trained(tree), trained(unless_as_in))


def all_finite(tree: PyTree, unless_as_in: PyTree | None = None) -> Bool[Array, ""]:
    """Whether every number of a tree is finite, by the same rule as `finite_leaves`."""
    leaves = jax.tree.leaves(finite_leaves(tree, unless_as_in))
    return jnp.all(jnp.stack([jnp.asarray(True), *leaves]))


def inexact_bytes(tree: PyTree) -> int:
    """Memory of the floating-point leaves that are not frozen."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trained(tree)))
