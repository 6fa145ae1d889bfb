"""Parameters that a training loss treats as constants."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.utils.typecheck import checked


@checked
def detach(tree: PyTree) -> PyTree:
    r"""An identity that the training gradient treats as a constant, but the hypergradient does not.

    `jax.lax.stop_gradient` on a function of the parameters in a training loss (a target network,
    BYOL, self-distillation, a semi-gradient) makes it constant in every derivative. Its change from
    one inner step to the next is then missing in $A_t$, and the hypergradient is wrong. Write
    `detach` instead: the training gradient is unchanged, and its derivatives are complete.

    The Hessian of such a loss is not symmetric: [`ImplicitOptimizer`][gradhpo.ImplicitOptimizer]
    uses GMRES for it, and refuses CG and Cholesky.

    **Arguments:** `tree`: any pytree; leaves that are not floating-point arrays pass through.

    **Returns:** the same tree.

    ```python
    def train_loss(w, h, batch):
        target = gradhpo.detach(0.9 * w)  # held in this step, but a function of w
        return jnp.sum((w - target) ** 2 * h + (w - batch) ** 2)

    assert jnp.allclose(jax.grad(train_loss)(1.0, 2.0, 1.0), 2 * 0.1 * 2.0)
    ```
    """
    return jax.tree.map(lambda x: _detach(x) if eqx.is_inexact_array(x) else x, tree)


def gradhpo_detach(x: Array) -> Array:
    """The name in a traced program of a `detach` that nothing has differentiated yet."""
    return x


DETACHED = gradhpo_detach.__name__


@jax.custom_vjp
def _detach(x: Array) -> Array:
    return jax.jit(gradhpo_detach)(x)


_detach.defvjp(lambda x: (x, None), lambda _, bar: (jnp.zeros_like(bar),))
