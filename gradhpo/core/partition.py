"""Splits one model into a trained and a tuned part."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradhpo.utils.freezing import is_frozen, marked, unfrozen
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity, has_arity, leaf_names


# The two halves of a model look alike, so only the arrays themselves tell which is which. The
# arrays that `partition` returned as hyperparameters are remembered by identity, for as long as the
# first of them lives, so that `init` can refuse the wrong order instead of training the
# hyperparameters and tuning the weights.
_handed_out: dict[int, frozenset[int]] = {}


def _identities(tree: PyTree) -> tuple[Any, frozenset[int]]:
    leaves = [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    return (leaves[0] if leaves else None), frozenset(map(id, leaves))


def _remember_as_hyperparams(hyperparams: PyTree) -> None:
    first, ids = _identities(hyperparams)
    _handed_out[id(first)] = ids
    weakref.finalize(first, _handed_out.pop, id(first), None)


def _was_handed_out_as_hyperparams(tree: PyTree) -> bool:
    first, ids = _identities(tree)
    return bool(ids) and _handed_out.get(id(first)) == ids


@checked
def partition(
    model: PyTree,
    where: Callable[[Any], Any],
    frozen: Callable[[Any], Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """Splits a model into parameters and hyperparameters.

    **Arguments:**

    - `model`: any pytree, usually an `eqx.Module`. Leaves marked by
        [`gradhpo.frozen`][gradhpo.frozen] stay frozen.
    - `where`: `model -> node`, or a tuple or list of nodes, as in `eqx.tree_at`. A node is
        one leaf or a whole subtree (a layer, a list of layers).
    - `frozen`: like `where`, for the part that is neither trained nor tuned (a pretrained
        backbone). It gets no gradient, no optimizer state and no decay, and is stored once,
        however many inner states are kept. Default `None`, nothing.

    **Returns:** `(params, hyperparams)`, two trees with the structure of `model`, each with `None`
    where the other has the leaf. Every floating-point array inside the nodes of `where` is a
    hyperparameter; everything else, including integer arrays and functions inside a selected
    subtree, stays in `params`. `eqx.combine(params, hyperparams)` is the model again. Arrays inside
    the nodes of `frozen` are [frozen leaves][gradhpo.frozen] of `params`, which `eqx.combine` does
    not take: the model is then `eqx.combine(gradhpo.unfrozen(params), hyperparams)`.

    **Raises:** `TypeError` for a mask in place of a function; `ValueError` if nothing is selected,
    if `where` selects an integer or boolean array or a Python number by itself, or a complex array
    anywhere, or if `where` and `frozen` select the same leaf.

    ```python
    class Model(eqx.Module):
        backbone: eqx.nn.MLP
        head: eqx.nn.Linear
        log_weight_decay: Array

    keys = jax.random.split(jax.random.key(0))
    model = Model(
        eqx.nn.MLP(4, 16, 16, 2, key=keys[0]), eqx.nn.Linear(16, 2, key=keys[1]), jnp.array(-3.0)
    )
    params, hyperparams = gradhpo.partition(
        model, lambda m: m.log_weight_decay, frozen=lambda m: m.backbone
    )
    ```
    """
    _check_is_function("where", where, model)
    _check_is_function("frozen", frozen, model)
    frozen_leaves = jax.tree.map(is_frozen, model, is_leaf=is_frozen)
    model = unfrozen(model)
    where = _flattened(where)
    nodes = where(model)
    is_nodes = lambda x: x is nodes
    is_one_node = any(map(is_nodes, jax.tree.leaves(model, is_leaf=is_nodes)))
    _check_selected(nodes, [nodes] if is_one_node else nodes)
    nothing = jax.tree.map(lambda _: False, model)
    chosen = jax.tree.map(eqx.is_inexact_array, nodes)
    tuned = eqx.tree_at(where, nothing, chosen)
    if frozen is not None:
        selected = _selected_by(frozen, model, nothing)
        frozen_leaves = jax.tree.map(lambda a, b: a or b, frozen_leaves, selected)
    _check_apart(tuned, frozen_leaves)
    hyperparams, params = eqx.partition(model, tuned)
    _remember_as_hyperparams(hyperparams)
    return marked(params, frozen_leaves), hyperparams


def _check_is_function(name: str, given: Any, model: PyTree) -> None:
    """A model is callable too, and so is a mask made from it."""
    if isinstance(given, eqx.Module) and isinstance(given, type(model)):
        raise TypeError(
            f"{name} must be a function of the model, not a {type(given).__name__} (a model, or a "
            f"mask made of one): {name}=lambda m: m.head"
        )


def _selected_by(frozen: Callable[[Any], Any], model: PyTree, nothing: PyTree) -> PyTree:
    """Marks the leaves that `frozen` selects."""
    frozen = _flattened(frozen)
    nodes = frozen(model)
    leaves = jax.tree.leaves(nodes)
    if not any(map(eqx.is_array, leaves)):
        raise ValueError(
            f"frozen selects nothing: it returned no array, only {leaves}. Return at least one "
            "array of the model, e.g. lambda m: m.backbone, or leave frozen= out"
        )
    return eqx.tree_at(frozen, nothing, jax.tree.map(lambda _: True, nodes))


def _check_apart(tuned: PyTree, frozen_leaves: PyTree) -> None:
    """No leaf is both tuned and frozen."""
    both = jax.tree.map(lambda a, b: a and b, tuned, frozen_leaves)
    names = [name for name, x in zip(leaf_names(both), jax.tree.leaves(both), strict=True) if x]
    if names:
        raise ValueError(
            f"where and frozen both select {', '.join(names[:5])}, but a leaf cannot be both tuned "
            "and frozen: let frozen select the rest, part by part, e.g. "
            "lambda m: (m.backbone.layers, m.backbone.norm)"
        )


def _flattened(where: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same selection, with a list inside a tuple replaced by its nodes."""

    def select(model: Any) -> Any:
        is_node = lambda x: any(y is x for y in jax.tree.leaves(model, is_leaf=lambda y: y is x))
        nodes = where(model)
        if is_node(nodes) or not isinstance(nodes, (tuple, list)):
            return nodes
        made_here = lambda x: isinstance(x, (tuple, list)) and not is_node(x)
        while any(map(made_here, nodes)):
            nodes = [y for x in nodes for y in (x if made_here(x) else [x])]
        return nodes

    return select


def _check_selected(nodes: Any, by_itself: Any) -> None:
    leaves = jax.tree.leaves(nodes)
    if not leaves:
        raise ValueError(
            "where selects nothing: it returned no leaf (None, or an empty node). Return at "
            "least one floating-point array of the model, e.g. lambda m: m.log_weight_decay"
        )
    for node in by_itself if isinstance(by_itself, (tuple, list)) else [by_itself]:
        if not jax.tree_util.all_leaves([node]):
            continue  # a subtree: all but its floating-point arrays stays in params
        if not eqx.is_inexact_array(node):
            found = node.dtype if eqx.is_array(node) else repr(node)
            raise ValueError(
                f"where selects {found} by itself, which has no derivative: put it into the "
                "model as a floating-point array, jnp.asarray(value, float), or leave it out"
            )
    if any(eqx.is_array(x) and jnp.iscomplexobj(x) for x in leaves):
        raise ValueError(
            "where selects a complex array; hypergradients are taken over real numbers: keep "
            "its real and imaginary parts as two real arrays"
        )
    if not any(map(eqx.is_inexact_array, leaves)):
        raise ValueError(
            "where selects nothing to tune: the selected subtree holds no floating-point "
            f"array, only {leaves}"
        )


def check_disjoint(params: PyTree, hyperparams: PyTree) -> None:
    """Refuses hyperparameters that are also parameters, and the two in the wrong order."""
    (mine, shape_of_mine), (others, shape_of_others) = map(
        _with_holes, (unfrozen(params), hyperparams)
    )
    halves = shape_of_mine == shape_of_others and any(x is None for x in others)
    # Exactly the same arrays: a learning rate for each parameter is a tree like params on purpose.
    if halves and any(eqx.is_array(x) and x is y for x, y in zip(mine, others, strict=True)):
        raise ValueError(
            "params still contains arrays of hyperparams, so they would be trained and tuned at "
            "once: write params, hyperparams = gradhpo.partition(model, where)"
        )
    swapped = _was_handed_out_as_hyperparams(params)
    if swapped and not _was_handed_out_as_hyperparams(hyperparams):
        raise ValueError(
            "params and hyperparams are swapped: partition returns (params, hyperparams), and "
            "init takes them in that order"
        )


def _with_holes(tree: PyTree) -> tuple[list[Any], Any]:
    """Leaves and structure, with `None` as a leaf."""
    return jax.tree.flatten(tree, is_leaf=lambda x: x is None)


def combine(params: PyTree, hyperparams: PyTree) -> PyTree:
    """`eqx.combine`, for two halves of one model, nothing frozen."""
    params = unfrozen(params)
    if _with_holes(params)[1] != _with_holes(hyperparams)[1]:
        raise ValueError(
            "params and hyperparams are not two halves of one model: state.model and model_loss "
            "need both halves from gradhpo.partition(model, where); for separate trees write the "
            "loss as (params, hyperparams, batch) -> scalar"
        )
    return eqx.combine(params, hyperparams)


_STATELESS, _STATEFUL = "model, batch", "model, batch, model_state"


class _ModelLoss(eqx.Module):
    fn: Callable

    @property
    def __signature__(self) -> inspect.Signature:
        """What `fn` takes, for `inspect`, so that errors name a loss with too few arguments."""
        names = ["params", "hyperparams", "batch"]
        if has_arity(self.fn, _STATEFUL):
            names.append("model_state")
        optional = has_arity(self.fn, _STATELESS)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = {"model_state": None} if optional else {}
        given = [
            inspect.Parameter(name, kind, default=default.get(name, inspect.Parameter.empty))
            for name in names
        ]
        return inspect.Signature(given)

    def __call__(
        self, params: PyTree, hyperparams: PyTree, batch: PyTree, *model_state: PyTree
    ) -> Any:
        return self.fn(combine(params, hyperparams), batch, *model_state)


@checked
def model_loss(fn: Callable) -> Callable:
    """Turns `fn(model, batch) -> scalar` into a loss `(params, hyperparams, batch) -> scalar`.

    It also turns `fn(model, batch, model_state)` into a loss of a model with running state.

    Create it once, outside the training loop: a new loss object triggers a new compilation.

    **Arguments:**

    - `fn`: `(model, batch) -> scalar`, a real array of shape `()`, or `-> (scalar, metrics)` with a
        dict of scalars; with running state
        `(model, batch, model_state) -> (scalar, new_model_state)`, for validation the scalar alone.

    **Returns:** a loss for trees from [`partition`][gradhpo.partition], which combines them again;
    it raises `ValueError` for two trees that are not halves of one model.

    **Raises:** `TypeError` if `fn` cannot be called as `fn(model, batch)` or as
    `fn(model, batch, model_state)`.

    ```python
    def mean_square(model, batch):
        x, y = batch
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    loss = gradhpo.model_loss(mean_square)
    ```
    """
    if not has_arity(fn, _STATEFUL):
        check_arity(fn, "fn", _STATELESS)
    return _ModelLoss(fn)
