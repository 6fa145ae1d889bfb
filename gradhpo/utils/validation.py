"""Checks of trees, batches and losses. Each message says what to write instead."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from gradhpo.utils.dispatch import compiled
from gradhpo.utils.freezing import frozen_part, trained, unfrozen, without_frozen
from gradhpo.utils.placement import is_of_several


THE_WHOLE_TREE = "(the whole tree)"


def leaf_names(tree: PyTree) -> list[str]:
    """Each leaf's name as the user would write it: `.net.layers[0].weight`, `['w']`."""
    return [jax.tree_util.keystr(path) or THE_WHOLE_TREE for path, _ in _with_path(tree)]


def _with_path(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _is_python_number(x: Any) -> bool:
    return isinstance(x, (bool, int, float, complex))


def strong(x: Any) -> Array:
    """An array whose dtype is fixed: a weakly typed leaf would compile the loop twice."""
    is_key = eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else jnp.asarray(x := native(x), jnp.result_type(x))


def native(x: Any) -> Any:
    """A NumPy array in the byte order of this machine, which JAX takes all arrays to be in."""
    is_swapped = isinstance(x, (np.ndarray, np.generic)) and not x.dtype.isnative
    return x.astype(x.dtype.newbyteorder("=")) if is_swapped else x


# -- trees -------------------------------------------------------------------------------


def check_leading_axis(tree: PyTree, what: str) -> None:
    """Checks that all arrays have at least one axis and agree on the length of the first."""
    shapes = {
        name: jnp.shape(leaf)
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
        if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    }
    if not shapes:
        raise ValueError(f"{what} holds no array; every batch needs at least one")
    scalars = [name for name, shape in shapes.items() if not shape]
    if scalars:
        nodes = jax.tree.leaves(tree, is_leaf=_is_list_of_numbers)
        if any(map(_is_list_of_numbers, nodes)):
            remedy = "write np.asarray(...) around it"
            raise ValueError(f"{what} holds a list of Python numbers: {remedy}")
        more = ", ..." if len(scalars) > 5 else ""
        raise ValueError(f"{what}: {', '.join(scalars[:5])}{more} has no leading axis (shape ())")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"{what}: leading axes differ; shapes are {shapes}")


def check_single_batch(batch: PyTree, name: str) -> None:
    if callable(batch):
        raise TypeError(
            f"{name} is a function or a data source, not a batch: pass one batch of it, "
            "data(i), or give the source to gradhpo.run"
        )


def check_has_model_state(params: PyTree, model_state: PyTree) -> None:
    """Checks that a model with running state comes with that state."""
    write = (
        "model, model_state = eqx.nn.make_with_state(Model)(...), and "
        "init(params, hyperparams, model_state=model_state)"
    )
    is_state = lambda x: isinstance(x, eqx.nn.State)
    if any(map(is_state, jax.tree.leaves(params, is_leaf=is_state))):
        raise ValueError(f"params holds an eqx.nn.State, which is not trained: write {write}")
    is_layer = lambda x: isinstance(x, eqx.nn.StateIndex)
    layers = list(filter(is_layer, jax.tree.leaves(params, is_leaf=is_layer)))
    if any(map(eqx.is_array, jax.tree.leaves(layers))):
        raise ValueError(
            "params has a layer with running state (such as eqx.nn.BatchNorm) whose state was not "
            f"taken out of the model: write {write}"
        )
    if model_state is None and layers:
        raise ValueError(
            "params has a layer with running state (such as eqx.nn.BatchNorm), but there is no "
            f"model_state: write {write}"
        )


def prepare_model_state(model_state: PyTree) -> PyTree:
    """Running state as strongly typed arrays, or an error that names the leaf."""
    if model_state is None:
        return None
    names = leaf_names(model_state)
    for name, leaf in zip(names, jax.tree.leaves(model_state), strict=True):
        if not eqx.is_array_like(leaf):
            raise TypeError(
                f"model_state{name.removeprefix(THE_WHOLE_TREE)} is {leaf!r}, but running state "
                "must be arrays: pass what changes in training, and close over the rest in the loss"
            )
    _refuse_complex(model_state, "model_state")
    _refuse_nan(model_state, "model_state")
    return jax.tree.map(strong, model_state)


def prepare_params(params: PyTree) -> PyTree:
    """Parameters as strongly typed arrays, or an error that says what cannot be trained."""
    _refuse_complex(without_frozen(params), "params")
    _refuse_nan(unfrozen(params), "params")
    params = jax.tree.map(lambda x: strong(x) if eqx.is_array(x) else x, params)
    if not jax.tree.leaves(trained(params)):
        if jax.tree.leaves(frozen_part(params)):
            raise ValueError(
                "every floating-point array of params is frozen, so there is nothing to train: "
                "freeze less, gradhpo.partition(model, where, frozen=lambda m: m.backbone)"
            )
        raise ValueError(
            "params holds no floating-point array, so there is nothing to train; leaves are "
            f"{jax.tree.leaves(params)}. Pass arrays: jnp.asarray(0.0) instead of 0.0"
        )
    return params


def prepare_hyperparams(hyperparams: PyTree) -> PyTree:
    """Hyperparameters as strongly typed floating-point arrays, or an error that names the leaf."""
    frozen_names = leaf_names(frozen_part(hyperparams))
    if frozen_names:
        raise ValueError(
            f"hyperparams{frozen_names[0]} is frozen: what is not tuned belongs in params, "
            "init(params | {'backbone': gradhpo.frozen(backbone)}, hyperparams)"
        )
    _refuse_complex(hyperparams, "hyperparams")
    if not jax.tree.leaves(hyperparams):
        raise ValueError(
            "hyperparams holds nothing to tune; select leaves with gradhpo.partition(model, "
            "where) or pass a pytree of floating-point arrays"
        )
    for path, leaf in _with_path(hyperparams):
        name = jax.tree_util.keystr(path)
        if not (eqx.is_array(leaf) or _is_python_number(leaf)):
            in_module = any(isinstance(key, jax.tree_util.GetAttrKey) for key in path)
            remedy = (
                "Only the arrays of a module can be tuned; gradhpo.partition(model, "
                "lambda m: m.part) leaves the rest of it in params"
                if in_module
                else "Leave it in params, or write it into the losses"
            )
            raise TypeError(
                f"hyperparams{name} is {leaf!r}, not an array. {remedy}. The order is init(params, "
                "hyperparams), as partition returns them"
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"hyperparams{name} has dtype {jnp.result_type(leaf)}: only floating-point "
                f"hyperparameters have a derivative; write jnp.asarray({_written(leaf)}, float), "
                "or leave it in params"
            )
    _refuse_nan(hyperparams, "hyperparams")
    return jax.tree.map(strong, hyperparams)


def _written(leaf: Any) -> str:
    """A leaf in a line of Python."""
    return (
        "..." if isinstance(leaf, Tracer) or np.size(leaf) > 5 else repr(np.asarray(leaf).tolist())
    )


def _refuse_complex(tree: PyTree, what: str) -> None:
    for path, leaf in _with_path(tree):
        if eqx.is_array_like(leaf) and jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{what}{jax.tree_util.keystr(path)} is complex; hypergradients are taken over "
                "real numbers: store its real and imaginary parts as two real arrays"
            )


def _refuse_nan(tree: PyTree, what: str) -> None:
    for path, leaf in _with_path(tree):
        if isinstance(leaf, Tracer) or not eqx.is_inexact_array(leaf):
            continue
        # With NumPy if possible: jnp would compile a program per shape.
        if _has_nan(leaf) if is_of_several(leaf) else np.any(np.isnan(np.asarray(leaf))):
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} holds NaN at the start: every step from "
                "there would be rejected"
            )


@compiled
def _has_nan(x: Array) -> Array:
    return jnp.any(jnp.isnan(x))


def refuse_text(error: Exception, **batches: PyTree) -> None:
    """Raises a better error if a call failed because of text, objects or lists in a batch."""
    for name, batch in batches.items():
        for path, leaf in _with_path(batch):
            is_text = isinstance(leaf, (str, bytes)) and type(leaf).__name__ in str(error)
            if is_text or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "USOmM"):
                found = getattr(leaf, "dtype", type(leaf).__name__)
                raise TypeError(
                    f"{name}{jax.tree_util.keystr(path)} holds {found}: a batch is a pytree of "
                    "numbers; encode labels, np.unique(labels, return_inverse=True)[1], and leave "
                    "other text and objects out"
                ) from error
    if not re.search(r"\blist\b", str(error)):
        return
    for name, batch in batches.items():
        nodes = jax.tree_util.tree_flatten_with_path(batch, is_leaf=_is_list_of_numbers)[0]
        for path, node in nodes:
            if _is_list_of_numbers(node):
                raise TypeError(
                    f"{name}{jax.tree_util.keystr(path)} is a list of Python numbers, not an "
                    "array: write np.asarray(...) around it"
                ) from error


@contextlib.contextmanager
def batches_explained(**batches: PyTree) -> Iterator[None]:
    """Inside, what fails because of text, objects or lists in one of these batches says so."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        refuse_text(error, **batches)
        raise


def _is_list_of_numbers(x: Any) -> bool:
    """Also for nested lists; numbers of a batch have become arrays of shape ()."""
    is_number = lambda leaf: _is_python_number(leaf) or getattr(leaf, "shape", None) == ()
    return type(x) is list and len(x) > 0 and all(map(is_number, jax.tree.leaves(x)))


# -- losses ------------------------------------------------------------------------------


def has_arity(function: Callable, arguments: str) -> bool:
    """Whether `check_arity` would pass."""
    try:
        check_arity(function, "", arguments)
    except TypeError:
        return False
    return True


def check_arity(function: Callable, name: str, arguments: str, remedy: str = "") -> None:
    """Checks that a function can be called with the positional arguments that it will get."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables have no signature: the call itself will tell
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise TypeError(
            f"{name} is called as {name}({arguments}), but its signature is "
            f"{name}{signature} ({error}){remedy}"
        ) from None


_LOSS_OR_METRICS = (
    "Return the loss alone, or (loss, {'accuracy': accuracy}) with metrics; running state goes "
    "into init(model_state=...)"
)


def check_scalar(output: Any, name: str, remedy: str = "") -> None:
    """Checks that a loss returned one real number."""
    leaves = jax.tree.leaves(output)
    if len(leaves) != 1 or output is not leaves[0]:
        raise TypeError(
            f"{name} must return a scalar, got a {type(output).__name__} with {len(leaves)} "
            f"{'leaf' if len(leaves) == 1 else 'leaves'}. {remedy or _LOSS_OR_METRICS}"
        )
    shape, dtype = jnp.shape(output), jnp.result_type(output)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must return a real scalar, got shape {shape} and dtype {dtype}; write "
            ".mean() or .sum() over the examples"
        )
