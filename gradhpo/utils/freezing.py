"""Frozen leaves of the params: arrays that the losses read and that nothing trains or tunes.

A frozen leaf is a node around its array. Functions that look for what is trained stop at the node;
`jax.tree.map`, `jit` and serialisation see the array inside.
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
    """A node around a frozen array."""

    array: Any


def is_frozen(x: Any) -> bool:
    """Whether `x` is the node of a frozen array; for `is_leaf`."""
    return isinstance(x, Frozen)


@checked
def frozen(tree: PyTree) -> PyTree:
    """Marks the arrays of a tree as frozen: neither trained nor tuned.

    For params that are a plain pytree; for a model use
    [`partition(model, where, frozen)`][gradhpo.partition]. A frozen array gets no gradient, no
    optimizer state and no decay, and is stored once, however many inner states are kept.
    Losses, `grad_fn` and `update_fn` see plain arrays; what the last two return for frozen ones
    is ignored.

    **Arguments:**

    - `tree`: a part of the params, with arrays of any dtype. Leaves that are not arrays are
        unchanged.

    **Returns:** the tree with each array marked, to be passed to
    [`init`][gradhpo.BilevelOptimizer.init]. [`unfrozen`][gradhpo.unfrozen] removes the marks.

    **Raises:** `ValueError` if the tree has no array.

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
            f"frozen(tree) got no array, only {jax.tree.leaves(tree)}: pass the arrays that "
            "should be neither trained nor tuned"
        )
    return _all_marked(tree)


@checked
def unfrozen(tree: PyTree) -> PyTree:
    """The tree with plain arrays in place of frozen leaves, as losses see it.

    For calling a loss yourself: `loss(gradhpo.unfrozen(state.params), state.hyperparams, batch)`.
    `state.model` has plain arrays already.

    **Arguments:** `tree`: any pytree; without frozen leaves it is returned unchanged.

    **Returns:** a tree with the same arrays, not copied.

    ```python
    params = {"features": gradhpo.frozen(jnp.ones(3)), "head": jnp.zeros(3)}
    assert gradhpo.unfrozen(params)["features"].shape == (3,)
    ```
    """
    return jax.tree.map(lambda x: x.array if is_frozen(x) else x, tree, is_leaf=is_frozen)


def marked(tree: PyTree, which: PyTree) -> PyTree:
    """A plain tree, its arrays frozen where `which`, a tree of the same structure, is true."""
    mark = lambda here, x: Frozen(x) if here and eqx.is_array(x) else x
    return jax.tree.map(mark, which, tree)


def _all_marked(tree: PyTree) -> PyTree:
    tree = unfrozen(tree)
    return marked(tree, jax.tree.map(lambda _: True, tree))


def trained(tree: PyTree) -> PyTree:
    """The trained part w of params: floating-point arrays that are not frozen, else `None`.

    ```python
    params = {"w": jnp.ones(3), "embedding": gradhpo.frozen(jnp.ones(5)), "act": jnp.tanh}
    w, rest = gradhpo.extend.trained(params), gradhpo.extend.not_trained(params)
    assert jax.tree.leaves(w) == [params["w"]]
    assert eqx.combine(w, rest)["embedding"].shape == (5,)
    ```
    """
    return eqx.filter(tree, eqx.is_inexact_array, is_leaf=is_frozen)


def not_trained(tree: PyTree) -> PyTree:
    """What [`trained`][gradhpo.extend.trained] leaves out, without marks, as losses see it.

    `eqx.combine` of both is the tree that a loss gets.
    """
    return unfrozen(eqx.filter(tree, eqx.is_inexact_array, inverse=True, is_leaf=is_frozen))


def like_trained(w: PyTree, tree: PyTree) -> PyTree:
    """The trained part of a tree like params, whose frozen leaves may have lost their marks.

    `w` is the trained part of the params. A tree of another structure keeps all floating-point
    arrays, and the caller refuses it.
    """
    is_none, found = lambda x: x is None, trained(tree)
    if jax.tree.structure(w, is_leaf=is_none) != jax.tree.structure(found, is_leaf=is_none):
        return found
    return jax.tree.map(lambda x, y: None if x is None else y, w, found, is_leaf=is_none)


def carried(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays that a loop carries, and the rest, with frozen leaves, which it closes over."""
    return eqx.partition(tree, eqx.is_array, is_leaf=is_frozen)


def frozen_part(tree: PyTree) -> PyTree:
    """The frozen arrays without marks, `None` elsewhere."""
    return unfrozen(eqx.filter(tree, is_frozen, is_leaf=is_frozen))


def without_frozen(tree: PyTree) -> PyTree:
    """`None` in place of frozen leaves."""
    return eqx.filter(tree, is_frozen, inverse=True, is_leaf=is_frozen)


def with_frozen(tree: PyTree, part: PyTree) -> PyTree:
    """The tree with other arrays in its frozen leaves; `part` is a `frozen_part`."""
    return eqx.combine(without_frozen(tree), _all_marked(part))


def frozen_as(like: PyTree, tree: PyTree, what: str) -> PyTree:
    """The tree with the leaves frozen that are frozen in `like`, whether it marks them or not."""
    if not any(map(is_frozen, jax.tree.leaves(like, is_leaf=is_frozen))):
        return tree
    if jax.tree.structure(unfrozen(like)) != jax.tree.structure(unfrozen(tree)):
        raise ValueError(
            f"{what} differs in structure from state.params, so it is unclear which of its "
            "leaves are frozen: pass a tree like state.params or gradhpo.unfrozen(state.params)"
        )
    mark = lambda old, new: _all_marked(new) if is_frozen(old) else new
    return jax.tree.map(mark, like, tree, is_leaf=is_frozen)
