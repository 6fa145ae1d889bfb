"""Sign descent: an outer update for hypergradients whose scale is meaningless."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.utils.settings import check_setting, setting
from gradhpo.utils.typecheck import checked


class SignDescentState(NamedTuple):
    """The step size of every coordinate, and the sign of its last hypergradient."""

    step_sizes: PyTree
    signs: PyTree


@checked
def sign_descent(
    step_size: PyTree, decay: float = 0.5, tolerance: float = 0.05
) -> optax.GradientTransformation:
    r"""Steps of given length against the sign of the hypergradient, halved when it flips.

    For every coordinate separately,

    $$\lambda_i \leftarrow \lambda_i - \delta_i\, \operatorname{sign}(g_i);$$

    where, if the sign has changed, first $\delta_i \leftarrow \mathtt{decay}\cdot\delta_i$. A
    coordinate whose sign has flipped stops for good once
    $\delta_i < \mathtt{tolerance}\cdot|\lambda_i|$. It is meant for long horizons, whose
    hypergradients have very different lengths early and late: about ten outer steps find each value
    to within `tolerance`. From 0, a step and two half steps back land on 0 again.

    **Arguments:**

    - `step_size`: the initial $\delta$, positive: one number, or a tree of numbers that is a prefix
        of the hyperparameters, such as `{"rates": 0.1, "weight_decay": 3e-4}`.
    - `decay`: in (0, 1), default 0.5.
    - `tolerance`: at least 0, default 0.05, relative to $|\lambda_i|$, which suits rates and
        momenta themselves. With 0 no coordinate ever stops: use it for hyperparameters stored as
        logarithms.

    **Returns:** an `optax.GradientTransformation`, for `outer_optimizer`.

    **Raises:** `ValueError` for a setting out of its range, or (in `init`) a `step_size` that is
    not a prefix of the hyperparameters; `TypeError` for one that is not a number.

    ```python
    loss = lambda w, rates, batch: jnp.sum(w**2 * jnp.arange(1.0, 4.0))
    inner = lambda rates: optax.sgd(lambda count: rates[count // 20])  # five windows of 20 steps
    outer = gradhpo.sign_descent(0.1)
    optimizer = gradhpo.ForwardModeOptimizer(inner, outer, unroll_steps=100)
    state = optimizer.init(jnp.ones(3), jnp.zeros(5))
    losses = gradhpo.LossFunctions(loss, loss)
    # Ten training runs of 100 steps, each from the same start.
    state, history = gradhpo.run(
        optimizer, state, losses, None, None,
        num_steps=10, steps_per_episode=1, reptile_rate=0.0, progress=False,
    )
    ```

    ??? cite "Reference"

        Micaelli, Storkey, *Gradient-based Hyperparameter Optimization Over Long Horizons*,
        NeurIPS 2021, arXiv:2007.07869.
    """
    for size in jax.tree.leaves(step_size):
        check_setting("step_size", setting(size), lambda x: x > 0, "positive")
    check_setting("decay", setting(decay), lambda x: (x > 0) & (x < 1), "in (0, 1)")
    check_setting("tolerance", setting(tolerance), lambda x: x >= 0, "at least 0")

    def first_sizes(params: PyTree) -> PyTree:
        of_subtree = lambda size, tree: jax.tree.map(lambda x: jnp.full_like(x, size), tree)
        try:
            return jax.tree.map(of_subtree, step_size, params)
        except ValueError as error:
            raise ValueError(
                f"sign_descent(step_size={step_size}) must be one number, or a tree of numbers "
                f"with the structure of the hyperparameters, or of their upper part: {error}"
            ) from error

    def init(params: PyTree) -> SignDescentState:
        return SignDescentState(first_sizes(params), jax.tree.map(jnp.zeros_like, params))

    def moved(first: Array, size: Array, sign: Array, x: Array) -> Array:
        # Only a sign that has flipped shows that the value is near.
        rests = (size < first) & (size < tolerance * jnp.abs(x))
        return jnp.where(rests, jnp.zeros_like(x), -size * sign)

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, SignDescentState]:
        if params is None:
            raise ValueError(
                "sign_descent needs the hyperparameters: update(updates, state, params)"
            )
        signs = jax.tree.map(jnp.sign, updates)
        shorter = lambda size, old, new: jnp.where(old * new < 0, decay * size, size)
        step_sizes = jax.tree.map(shorter, state.step_sizes, state.signs, signs)
        # A hypergradient of exactly 0 does not say on which side the optimum lies.
        remembered = jax.tree.map(
            lambda old, new: jnp.where(new == 0, old, new), state.signs, signs
        )
        moves = jax.tree.map(moved, first_sizes(params), step_sizes, signs, params)
        return moves, SignDescentState(step_sizes, remembered)

    return optax.GradientTransformation(init, update)
