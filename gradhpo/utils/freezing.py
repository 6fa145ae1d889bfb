"""Frozen leaves of parameters: arrays that are there, and neither trained nor tuned.

Such a leaf is a node of its own around the array. Whoever looks for what is trained stops at the
node; `jax.tree.map`, `jit` and serialisation see the array in it.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from gradhpo.utils.typecheck import checked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """The node around a frozen array."""

    array: Any


def is_frozen(x: Any) -> bool:
    """Whether a node is that of a frozen array, for `is_leaf`."""
    return isinstance(x, Frozen)


@checked
def frozen(tree: PyTree) -> PyTree:
    """Marks the arrays of a tree as frozen: neither trained nor tuned.

    For parameters that are a plain pytree; a model is split by
    [`partition(model, where, frozen)`][gradhpo.partition]. A frozen array gets no gradient, no
    optimizer state and no decay, and stands in memory once, however many inner states are kept.
    Losses and an `update_fn` see the plain arrays; what an `update_fn` returns for them is dropped.

    **Arguments:**

    - `tree`: a part of the params, of any dtypes. What is no array in it stays as it is.

    **Returns:** a tree of the same structure but for the marks, for
    [`init`][gradhpo.BilevelOptimizer.init]. [`unfrozen`][gradhpo.unfrozen] takes them off.

    **Raises:** `ValueError` where the tree holds no array.

    ```python
    features, head = jax.random.normal(jax.random.key(0), (5, 100)), jnp.zeros(100)
    params = {"features": gradhpo.frozen(features), "head": head}

    def loss(params, decay, batch):
        x, y = batch
        predicted = jnp.tanh(x @ params["features"]) @ params["head"]
        return jnp.mean((predicted - y) ** 2) + jnp.exp(decay) * jnp.sum(params["head"] ** 2)

    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    state = optimizer.init(params, jnp.array(-5.0))
    state = optimizer.step(state, (jnp.ones((8, 5)), jnp.ones(8)), (jnp.ones((8, 5)), jnp.ones(8)),
                           loss, loss)
    assert gradhpo.unfrozen(state.params)["features"] is features
    ```
    """
    if not any(map(eqx.is_array, jax.tree.leaves(tree))):
        raise ValueError(
            f"frozen(tree) got no array, only {jax.tree.leaves(tree)}: pass the arrays that are "
            "neither trained nor tuned"
        )
    return _all_marked(tree)


@checked
def unfrozen(tree: PyTree) -> PyTree:
    """The same tree with plain arrays in place of frozen leaves, as losses see it.

    For a loss or a model that you call yourself: `loss(gradhpo.unfrozen(state.params), ...)`.
    `state.model` is unfrozen already. A tree without frozen leaves comes back as it is.

    ```python
    params = {"features": gradhpo.frozen(jnp.ones(3)), "head": jnp.zeros(3)}
    assert gradhpo.unfrozen(params)["features"].shape == (3,)
    ```
    """
    return jax.tree.map(lambda x: x.array if is_frozen(x) else x, tree, is_leaf=is_frozen)


def marked(tree: PyTree, which: PyTree) -> PyTree:
    """The arrays of a plain tree frozen where another one, of the same structure, is true."""
    mark = lambda here, x: Frozen(x) if here and eqx.is_array(x) else x
    return jax.tree.map(mark, which, tree)


def _all_marked(tree: PyTree) -> PyTree:
    tree = unfrozen(tree)
    return marked(tree, jax.tree.map(lambda _: True, tree))


def trained(tree: PyTree) -> PyTree:
    """The floating-point arrays that are not frozen, `None` elsewhere: the w of params."""
    return eqx.filter(tree, eqx.is_inexact_array, is_leaf=is_frozen)


def not_trained(tree: PyTree) -> PyTree:
    """The rest, as losses see it."""
    return unfrozen(eqx.filter(tree, eqx.is_inexact_array, inverse=True, is_leaf=is_frozen))


def like_trained(w: PyTree, tree: PyTree) -> PyTree:
    """The trained part of a tree, if `w` is that of the params: also without marks on the tree.

    A tree of another structure keeps all of its floating-point arrays, for the caller to refuse.
    """
    is_none, found = lambda x: x is None, trained(tree)
    if jax.tree.structure(w, is_leaf=is_none) != jax.tree.structure(found, is_leaf=is_none):
        return found
    return jax.tree.map(lambda x, y: None if x is None else y, w, found, is_leaf=is_none)


def carried(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays that a loop carries, and what is the same throughout, frozen leaves with it."""
    return eqx.partition(tree, eqx.is_array, is_leaf=is_frozen)


def frozen_part(tree: PyTree) -> PyTree:
    """The frozen arrays, plain, and `None` elsewhere."""
    return unfrozen(eqx.filter(tree, is_frozen, is_leaf=is_frozen))


def without_frozen(tree: PyTree) -> PyTree:
    """`None` in place of frozen leaves."""
    return eqx.filter(tree, is_frozen, inverse=True, is_leaf=is_frozen)


def with_frozen(tree: PyTree, part: PyTree) -> PyTree:
    """Other arrays in the frozen leaves: a `frozen_part`."""
    return eqx.combine(without_frozen(tree), _all_marked(part))


def frozen_as(like: PyTree, tree: PyTree, what: str) -> PyTree:
    """A tree in which the leaves are frozen that are so in another one, marked there or not."""
    if not any(map(is_frozen, jax.tree.leaves(like, is_leaf=is_frozen))):
        return tree
    if jax.tree.structure(unfrozen(like)) != jax.tree.structure(unfrozen(tree)):
        raise ValueError(
            f"{what} has another structure than state.params, so that nothing tells which of its "
            "leaves are frozen: pass a tree like state.params (or like gradhpo.unfrozen of it)"
        )
    mark = lambda old, new: _all_marked(new) if is_frozen(old) else new
    return jax.tree.map(mark, like, tree, is_leaf=is_frozen)
