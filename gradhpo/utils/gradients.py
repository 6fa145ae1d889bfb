"""The derivative products that every algorithm is built from."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from gradhpo.utils.freezing import like_trained, not_trained, trained
from gradhpo.utils.typecheck import checked


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

    **Returns:** `(params part, hyperparams part)`, trees like `params` and `hyperparams` with
    `None` for leaves that are frozen or not floating-point arrays.

    **Raises:** `ValueError` for a cotangent that is not a tree like `params`.

    ```python
    update = lambda w, rate, batch: w - rate * 2 * w
    w_part, rate_part = gradhpo.vjp_wrt_both(
        update, jnp.array(3.0), jnp.array(0.1), None, jnp.array(1.0)
    )  # 0.8 and -6.0
    ```
    """
    (w, w_rest), (h, h_rest) = ((trained(x), not_trained(x)) for x in (params, hyperparams))

    def update(w, h):
        new = update_fn(eqx.combine(w, w_rest), eqx.combine(h, h_rest), batch)
        return like_trained(w, new)

    _, pull = jax.vjp(update, w, h)
    return pull(like_trained(w, cotangent))


@checked
def vjp_wrt_lambda(
    update_fn: Callable, params: PyTree, hyperparams: PyTree, batch: PyTree, cotangent: PyTree
) -> PyTree:
    r"""A cotangent times an update's Jacobian with respect to the hyperparameters.

    The second part of [`vjp_wrt_both`][gradhpo.vjp_wrt_both] alone,
    $v^\top \partial\Phi/\partial\lambda$.

    **Arguments:**

    - `update_fn`: $\Phi$, `(params, hyperparams, batch) -> params`.
    - `params`, `hyperparams`, `batch`: where to differentiate.
    - `cotangent`: $v$, a tree like `params`.

    **Returns:** a tree like `hyperparams` with `None` for leaves that are frozen or not
    floating-point arrays.

    **Raises:** `ValueError` for a cotangent that is not a tree like `params`.

    ```python
    update = lambda w, rate, batch: w - rate * 2 * w
    product = gradhpo.vjp_wrt_lambda(
        update, jnp.array(3.0), jnp.array(0.1), None, jnp.array(1.0)
    )  # -6.0
    ```
    """
    return vjp_wrt_both(update_fn, params, hyperparams, batch, cotangent)[1]


def undifferentiable(tree: PyTree, why: str) -> PyTree:
    """The tree unchanged; a derivative taken through it raises `ValueError`."""

    @jax.custom_jvp
    def same(tree: PyTree) -> PyTree:
        return tree

    @same.defjvp
    def refuse(primals: tuple, tangents: tuple) -> tuple:
        raise ValueError(why)

    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(same(numbers), rest)


def linearize_gradient(
    loss: Callable[[PyTree, PyTree], tuple[Array, PyTree]],
    params: PyTree,
    hyperparams: PyTree,
    *,
    symmetric: bool,
    shared: bool = True,
) -> tuple[Array, PyTree, PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
    r"""The loss, its gradient, and both second-derivative products.

    `loss` returns $L$ and something else, which is not differentiated. Returns $L$,
    $g = \nabla_w L$, the rest, and the function
    $v \mapsto (v^\top \partial g/\partial w,\; v^\top \partial g/\partial\lambda)$. Second
    derivatives are symmetric, so both products come from one forward derivative of
    $\nabla_{(w,\lambda)} L$ along $(v, 0)$ (mixed mode): no activation outlives the step. With a
    `custom_vjp` inside the loss, the Jacobian of the gradient need not be symmetric, and
    `symmetric=False` transposes it (reverse over reverse).

    `shared`: whether the products keep the activations of the gradient, which takes more memory and
    less work than recomputing them for every product. A loss with `jax.checkpoint` recomputes them
    to save memory: keeping them would undo that.

    ??? cite "Reference"

        Kemaev et al., *Scalable Meta-Learning via Mixed-Mode Differentiation*, ICML 2025,
        arXiv:2505.00793.
    """
    if symmetric:

        def forward(w):
            both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (value, rest), gradients = both(w, hyperparams)
            return (value, gradients), rest

        if not shared:
            forward = jax.checkpoint(forward)
        (value, (gradient, _)), push, rest = jax.linearize(forward, params, has_aux=True)
        return value, gradient, rest, lambda v: push(v)[1]

    def reverse(w, h):
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(w, h)
        return gradient, (value, rest)

    gradient, pull, (value, rest) = jax.vjp(reverse, params, hyperparams, has_aux=True)
    return value, gradient, rest, pull
