"""The optax side of an inner step: building it at given hyperparameters, and its state."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gradhpo.core.inner_state import InnerState
from gradhpo.core.types import InnerOptimizer
from gradhpo.utils.advice import NEEDS_THE_LOSS, PEAK
from gradhpo.utils.foreign import (
    averages,
    injected_values,
    is_missing_argument,
    looks_ahead,
    makes_a_transformation,
    uncalled,
)
from gradhpo.utils.keys import is_key
from gradhpo.utils.programs import visible_leaves
from gradhpo.utils.trees import tree_dot, tree_l2_norm
from gradhpo.utils.validation import strong
from gradhpo.utils.warn import warn_once


def init_inner_state(
    inner_optimizer: InnerOptimizer | None, w: PyTree, hyperparams: PyTree
) -> PyTree:
    """The optimizer state $s_0$; `()` for an `update_fn`."""
    if inner_optimizer is None:
        return ()
    state = resolve(inner_optimizer, hyperparams).init(w)
    if not isinstance(inner_optimizer, optax.GradientTransformation) and injected_values(state):
        kept = lambda h: injected_values(resolve(inner_optimizer, h).init(w))
        if any(jax.tree.leaves(visible_leaves(kept, hyperparams))):
            warn_once(
                "inner_optimizer(hyperparams) uses optax.inject_hyperparams, which keeps the "
                "values from init in its state: the hyperparameters of later steps have no effect "
                "until an episode begins. "
                "Pass them straight to the optimizer, lambda h: optax.sgd(jnp.exp(h['log_rate'])), "
                "or as schedules, which are evaluated at every step: lambda h: "
                "optax.inject_hyperparams(optax.sgd)(lambda count: h['rates'][count // 100])"
            )
    _check_which_parameters(state, w)
    return jax.tree.map(strong, state)


def init_descent(optimizer: optax.GradientTransformation, x: PyTree) -> PyTree:
    """The state with which `optimizer` starts to move `x`, for [`descend`][gradhpo.extend.descend].

    ```python
    from gradhpo.extend import descend, init_descent

    optimizer, x = optax.sgd(0.1), jnp.ones(3)
    x, state = descend("adjoint", optimizer, 2 * x, init_descent(optimizer, x), x)  # 0.8
    ```
    """
    return jax.tree.map(strong, optimizer.init(x))


def descend(
    which: str, optimizer: optax.GradientTransformation, gradient: PyTree, state: PyTree, x: PyTree
) -> tuple[PyTree, PyTree]:
    """One update of anything but the parameters: the new `x`, and the optimizer's new state.

    Dtypes and shapes stay. `which` names the optimizer in errors, as "adjoint".
    """
    with explained(which):
        updates, new_state = optimizer.update(gradient, state, x)
    new = cast_like(optax.apply_updates(x, updates), x, f"the {which} update")
    return new, cast_like(new_state, state)


def inner_response(
    inner_optimizer: InnerOptimizer, z: InnerState, hyperparams: PyTree, gradient: PyTree
) -> tuple[PyTree, PyTree]:
    """The updates for any gradient at z, and the optimizer's next state."""
    rule = optax.with_extra_args_support(resolve(inner_optimizer, hyperparams))
    # For optimizers that need the loss: a parabola with this gradient at z. Its value there is the
    # gradient's norm, so that a Polyak step, their ratio, varies in size as the gradients do.
    value = tree_l2_norm(gradient)

    def parabola(w):
        away = jax.tree.map(jnp.subtract, w, z.w)
        return value + tree_dot(gradient, away) + 0.5 * tree_dot(away, away)

    return rule.update(gradient, z.s, z.w, value=parabola(z.w), grad=gradient, value_fn=parabola)


def _check_which_parameters(state: PyTree, w: PyTree) -> None:
    """Checks optimizers that train one set of parameters and validate another."""
    if looks_ahead(state) and not isinstance(w, optax.LookaheadParams):
        raise ValueError(
            "optax.lookahead trains fast parameters and validates slow ones, so params hold both: "
            "optimizer.init(optax.LookaheadParams.init_synced(params), hyperparams), with losses "
            "train_loss(params.fast, hyperparams, batch) and val_loss(params.slow, hyperparams, "
            "batch)"
        )
    if any(jax.tree.structure(z) == jax.tree.structure(w) for z in averages(state)):
        warn_once(
            "optax.contrib.schedule_free trains at one point, params, and should be validated at "
            "another, the average: this hypergradient is that of the validation loss at params. "
            "docs/hyperparameters.md shows how to keep both "
            '("Optimizers that need more than a gradient")'
        )


def gradient_for(s: PyTree, gradient: PyTree) -> PyTree:
    """The gradient that the optimizer expects: `optax.lookahead` that of its fast parameters."""
    if isinstance(gradient, optax.LookaheadParams) and looks_ahead(s):
        return gradient.fast
    return gradient


def resolve(inner_optimizer: InnerOptimizer, hyperparams: PyTree) -> optax.GradientTransformation:
    """The optax transformation at these hyperparameters."""
    if isinstance(inner_optimizer, optax.GradientTransformation):
        return inner_optimizer
    with explained():
        transformation = inner_optimizer(hyperparams)
    if not isinstance(transformation, optax.GradientTransformation):
        called = uncalled(transformation)
        if makes_a_transformation(transformation):
            called = "its .gradient_transformation()"
        raise TypeError(
            "inner_optimizer must be an optax.GradientTransformation or a function hyperparams "
            f"-> optax.GradientTransformation, but the function returned {transformation!r}"
            f"{f'; return {called}' if called else ''}"
        )
    return transformation


def cast_like(new: PyTree, old: PyTree, what: str = "an optimizer state") -> PyTree:
    """Casts to the incoming dtypes, strongly: a float64 rate must not widen bfloat16 moments.

    Refuses new shapes, which come from hyperparameters that broadcast against parameters.
    """
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (new, old)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{what} changes its shapes from {shapes[1]} to {shapes[0]}: a hyperparameter of "
            "shape (1,) or more was broadcast; give it shape (), or the shape of what it scales"
        )
    return jax.tree.map(
        lambda x, y: x if is_key(x) else jax.lax.convert_element_type(x, y.dtype), new, old
    )


@contextlib.contextmanager
def explained(which: str = "inner") -> Iterator[None]:
    """Explains in the user's terms what optax cannot do inside a traced update."""
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"building or applying the {which} optimizer needs the value of a hyperparameter in "
            "Python (float(...), or a branch on it), but it is traced. Use it as an array, with "
            f"jnp.where for branches. {PEAK}"
        ) from error
    except TypeError as error:
        if not is_missing_argument(error):
            raise
        raise ValueError(
            f"the {which} optimizer cannot be called with the arguments it gets here: {error}. "
            f"{NEEDS_THE_LOSS}"
        ) from error
