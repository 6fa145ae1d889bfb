"""Random changes of hyperparameters to retrain with, and their checks."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from gradhpo.core.types import RealScalarLike
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.placement import sharded_like
from gradhpo.utils.repeatable import check_repeatable
from gradhpo.utils.settings import check_setting
from gradhpo.utils.structure import have_same_structure, where_they_differ
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity, leaf_names


# How many retrainings show that changes depend on the key.
_KEYS = 32


@checked
def leave_out(
    fraction: RealScalarLike,
    where: Callable[[PyTree], PyTree] = lambda h: h,
    value: RealScalarLike = 0.0,
) -> Callable[[Array, PyTree], PyTree]:
    r"""Leaves random examples out, for [`retraining_score`][gradhpo.retraining_score].

    The function that it returns sets a random set of $\max(1, \mathrm{round}(\mathtt{fraction}
    \cdot n))$ of the $n$ entries along axis 0 of one leaf to `value`. Every set of that size is
    equally likely.

    **Arguments:**

    - `fraction`: which share of the entries, shape `()`, above 0 and at most 1.
    - `where`: selects the leaf among the hyperparameters, an array `[n, ...]`; by default the only
        leaf.
    - `value`: what leaves an example out, shape `()`, default 0. A weight that goes through a
        sigmoid needs a value that the sigmoid takes to 0, such as -20.

    **Returns:** `(key, hyperparams) -> hyperparams`, which JAX can trace.

    **Raises:** `ValueError` for a `fraction` outside of (0, 1]; when it is called, `TypeError` if
    `where` does not select one array, and `ValueError` for an array without an axis or an entry.

    ```python
    hyperparams = {"weights": jnp.ones(200), "decay": jnp.array(1e-3)}
    perturb = gradhpo.leave_out(0.01, where=lambda h: h["weights"])
    changed = perturb(jax.random.key(0), hyperparams)
    assert jnp.sum(changed["weights"] == 0) == 2 and changed["decay"] == hyperparams["decay"]
    ```
    """
    check_setting(
        "fraction", jnp.asarray(fraction), lambda x: (x > 0) & (x <= 1), "above 0 and at most 1"
    )
    if isinstance(fraction, Tracer):
        raise TypeError("leave_out(fraction) fixes a number of examples: pass a Python float")
    share = float(np.asarray(fraction))

    def left_out(key: Array, hyperparams: PyTree) -> PyTree:
        leaf = selected(where, hyperparams, "leave_out(where=...)")
        count = max(1, round(share * len(leaf)))
        chosen = jax.random.permutation(key, len(leaf)) < count
        chosen = jnp.broadcast_to(chosen.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)
        new = jnp.where(sharded_like(chosen, leaf), jnp.asarray(value, leaf.dtype), leaf)
        return eqx.tree_at(lambda h: _only(where(h)), hyperparams, new)

    return left_out


def selected(
    where: Callable[[PyTree], PyTree], hyperparams: PyTree, name: str
) -> Array | np.ndarray:
    """The leaf that `where` selects, with one entry for each example along axis 0."""
    found = where(hyperparams)
    leaf = _only(found)
    if not eqx.is_array(leaf):
        names = ", ".join(leaf_names(hyperparams))
        raise TypeError(
            f"{name} selected a {type(found).__name__}, but must select one array, with an entry "
            f"for each example: where=lambda h: ..., with one of h's leaves {names}"
        )
    if leaf.ndim == 0 or len(leaf) == 0:
        raise ValueError(
            f"{name} selected an array of shape {leaf.shape}, but must select one with an entry "
            "for each example along axis 0"
        )
    return leaf


def _only(tree: PyTree) -> Any:
    """The leaf, if there is only one."""
    leaves = jax.tree.leaves(tree)
    return leaves[0] if len(leaves) == 1 else tree


def check_perturb(change: Callable, keys: Array, hyperparams: PyTree) -> None:
    """Checks that it changes hyperparameters, depending on the key, and keeps their structure."""
    check_arity(change, "perturb", "key, hyperparams")
    check_repeatable(
        change,
        (keys[0], hyperparams),
        "perturb(key, hyperparams)",
        made="change of the same key",
        values="its arguments, which are traced: {said}. Write jnp.where instead of a branch, and "
        "leave out float(...) and NumPy",
        draws="counts its calls, in Python, and a compiled program would do so once for all "
        "retrainings. Draw with the key: jax.random.normal(key, shape)",
    )
    made = eqx.filter_eval_shape(change, keys[0], hyperparams)
    if not have_same_structure(made, hyperparams):
        raise ValueError(
            "perturb(key, hyperparams) must return hyperparameters of the structure, shapes and "
            f"dtypes that it was given.\n{where_they_differ(made, hyperparams)}"
        )
    # A few keys may draw the same: one of five examples to leave out, say.
    keys = keys[:_KEYS]
    moves, differ = map(bool, _effects(change, keys, hyperparams))
    if not moves:
        raise ValueError(
            "perturb(key, hyperparams) returns the hyperparameters unchanged, for "
            f"{len(keys)} keys: it must change them, as gradhpo.leave_out(0.01) does for weights "
            "that are not 0"
        )
    if not differ:
        raise ValueError(
            f"perturb(key, hyperparams) returns the same for {len(keys)} keys, so all retrainings "
            "would be the same: draw the change with the key"
        )


@compiled
def _effects(change: Callable, keys: Array, hyperparams: PyTree) -> tuple[Array, Array]:
    """Whether some hyperparameters move, and whether they depend on the key."""
    made = jax.lax.map(lambda key: jax.tree.leaves(change(key, hyperparams)), keys)
    old = jax.tree.leaves(hyperparams)
    some = lambda there: jnp.any(jnp.stack(list(map(jnp.any, there))))
    moves = some([new != x[None] for new, x in zip(made, old, strict=True)])
    return moves, some([new[1:] != new[:-1] for new in made])


def changes(change: Callable, key: Array, hyperparams: PyTree) -> PyTree:
    r"""$\Delta = \mathtt{change}(\mathtt{key}, \lambda) - \lambda$, after rounding."""
    # An infinity that stays is no change.
    minus = lambda new, old: jnp.where(new == old, jnp.zeros_like(old), new - old)
    return jax.tree.map(minus, change(key, hyperparams), hyperparams)
