"""The optax side of an inner step: building it at given hyperparameters, and its state."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gradhpo.core.types import InnerOptimizer
from gradhpo.utils.advice import NEEDS_THE_LOSS
from gradhpo.utils.foreign import injected_values, is_missing_argument
from gradhpo.utils.keys import is_key
from gradhpo.utils.tracing import visible_leaves
from gradhpo.utils.validation import strong


def init_inner_state(
    inner_optimizer: InnerOptimizer | None, w: PyTree, hyperparams: PyTree
) -> PyTree:
    """The optimizer state $s_0$; `()` for an `update_fn`."""
    if inner_optimizer is None:
        return ()
    state = resolve(inner_optimizer, hyperparams).init(w)
    if not isinstance(inner_optimizer, optax.GradientTransformation) and _injected(state):
        kept = lambda h: _injected(resolve(inner_optimizer, h).init(w))
        if any(jax.tree.leaves(visible_leaves(kept, hyperparams))):
            raise ValueError(
                "inner_optimizer(hyperparams) uses optax.inject_hyperparams, which keeps the "
                "values from init in its state, so later hyperparameters would have no effect. "
                "Pass them straight to the optimizer, lambda h: optax.sgd(jnp.exp(h['log_rate'])), "
                "or as schedules, which are evaluated at every step: lambda h: "
                "optax.inject_hyperparams(optax.sgd)(lambda count: h['rates'][count // 100])"
            )
    return jax.tree.map(strong, state)


def _injected(state: PyTree) -> list[PyTree]:
    """Values that `optax.inject_hyperparams` keeps; those of schedules it makes anew."""
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    is_injected = lambda x: isinstance(x, kinds)
    nodes = filter(is_injected, jax.tree.leaves(state, is_leaf=is_injected))
    return [value for node in nodes for value in injected_values(node)]


def resolve(inner_optimizer: InnerOptimizer, hyperparams: PyTree) -> optax.GradientTransformation:
    """The optax transformation at these hyperparameters."""
    if isinstance(inner_optimizer, optax.GradientTransformation):
        return inner_optimizer
    with explained():
        transformation = inner_optimizer(hyperparams)
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(
            "inner_optimizer must be an optax.GradientTransformation or a function hyperparams "
            f"-> optax.GradientTransformation, but the function returned {transformation!r}"
        )
    return transformation


def cast_like(new: PyTree, old: PyTree, what: str = "an optimizer state") -> PyTree:
    """The incoming dtypes, strongly: a float64 rate must not widen bfloat16 moments.

    Refuses new shapes, which come of hyperparameters that broadcast against parameters.
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


def forget_secants(s: PyTree) -> PyTree:
    """Empties the memory of L-BFGS: differences of gradients of one and the same loss.

    The first difference after the hyperparameters have moved is that of two losses, and no
    curvature at all.
    """
    is_memory = lambda x: isinstance(x, optax.ScaleByLBFGSState)
    emptied = lambda x: jax.tree.map(jnp.zeros_like, x) if is_memory(x) else x
    return jax.tree.map(emptied, s, is_leaf=is_memory)


def keeps_last_evaluation(s: PyTree) -> bool:
    """Whether the loss and gradient in a state are those at the new parameters.

    So it is where a line search is the last of a chain: nothing changes its step any more.
    """
    last = s[-1:] if type(s) is tuple else ()
    return any(isinstance(x, optax.ScaleByZoomLinesearchState) for x in last)


def with_evaluation(s: tuple, loss: PyTree, gradient: PyTree) -> tuple:
    """A state that keeps its last evaluation, with this one."""
    return (*s[:-1], s[-1]._replace(value=loss, grad=gradient))


@contextlib.contextmanager
def explained(which: str = "inner") -> Iterator[None]:
    """Says in the user's terms what optax cannot do inside a traced update."""
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"building or applying the {which} optimizer needs the value of a hyperparameter in "
            "Python (float(...), or a branch on it), but it is traced. Use it as an array, with "
            "jnp.where for branches; some optax schedules compare their peak value with 0"
        ) from error
    except TypeError as error:
        if not is_missing_argument(error):
            raise
        raise ValueError(
            f"the {which} optimizer cannot be called with what it is given here: {error}. "
            f"{NEEDS_THE_LOSS}"
        ) from error
