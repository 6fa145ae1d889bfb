"""The data of several folds side by side, and how a function of one fold is mapped over them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.utils.freezing import unfrozen
from gradhpo.utils.keys import fold_keys
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked


class Folds(eqx.Module):
    """The training or the held-out examples of all folds: a batch for `step` and `run`.

    [`cross_validation`][gradhpo.cross_validation] makes both. Folds with equally many examples are
    stacked, so every example is there and no mask is needed; sizes that differ by one make two
    stacks.

    - `stacks`: a tuple of batches, every array of shape `[folds, examples, ...]`, PRNG keys of
        shape `[folds]`; numbers of shape `()` are shared.
    - `members`: for each stack, the numbers of its folds.
    """

    stacks: tuple[PyTree, ...]
    members: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    own: tuple[tuple[int, ...] | None, ...] = eqx.field(static=True)
    """The shapes of one model's params; `None` for leaves that the folds share."""

    @property
    def num_folds(self) -> int:
        """How many folds there are."""
        return sum(map(len, self.members))

    @property
    def num_examples(self) -> int:
        """How many examples there are, in all folds together."""
        return sum(x.shape[0] * x.shape[1] for x in map(_first, self.stacks))

    def each(self, function: Callable, params: PyTree, hyperparams: PyTree) -> PyTree:
        """What `function(params, hyperparams, batch)` returns for every fold, folds first.

        It gives an `update_fn`, a `grad_fn` or any measurement to all folds:

            update_fn = lambda params, h, folds: folds.each(proximal_step, params, h)

        **Arguments:**

        - `function`: takes the params and the batch of one fold.
        - `params`: with all folds, as `cross_validation` returned them.
        - `hyperparams`: shared by all folds.

        **Returns:** arrays of shape `[folds, ...]`, in the order of the folds. Parts of params that
        the folds share are returned unchanged.

        **Raises:** `ValueError` if params lack the axis of folds, or if a stack has lost folds
        (a mini-batch of folds; [`sample`][gradhpo.data.folds.Folds.sample] draws examples).
        """
        leaves, structure = jax.tree.flatten(unfrozen(params))
        self._check(leaves)
        mine = [x for x, own in zip(leaves, self.own, strict=True) if own is not None]
        shared = {id(x) for x, own in zip(leaves, self.own, strict=True) if own is None}
        is_of_fold = lambda x: eqx.is_array_like(x) and id(x) not in shared
        kept = []

        def of_stack(stack: PyTree, members: tuple[int, ...]) -> PyTree:
            arrays, numbers = eqx.partition(stack, _is_per_fold)

            def of_one(mine: list[Array], arrays: PyTree) -> PyTree:
                own_first = iter(mine)
                pairs = zip(leaves, self.own, strict=True)
                of_fold = structure.unflatten(
                    [x if own is None else next(own_first) for x, own in pairs]
                )
                returned = function(of_fold, hyperparams, eqx.combine(arrays, numbers))
                mapped, rest = eqx.partition(returned, is_of_fold)
                kept.append(rest)
                return mapped

            return jax.vmap(of_one)([_rows(x, members) for x in mine], arrays)

        found = list(map(of_stack, self.stacks, self.members))
        return eqx.combine(self._in_order(found), kept[0])

    def sample(self, key: Array, size: int) -> "Folds":
        """A mini-batch: `size` random examples of every fold, each at most once.

        For mini-batches in [`run`][gradhpo.run], pass
        `lambda i: train.sample(jax.random.fold_in(key, i), size)` in place of `train`.

        **Arguments:** `key`: a PRNG key; `size`: examples per fold, at most the smallest fold.

        **Raises:** `ValueError` for a `size` below 1, or larger than a fold.
        """
        examples = [x.shape[1] for x in map(_first, self.stacks)]
        check_count("size", size, most=min(examples))
        for_rows, for_examples = jax.random.split(key)
        keys = jax.random.split(for_rows, self.num_folds)

        def drawn(stack: PyTree, members: tuple[int, ...], count: int) -> PyTree:
            mine = keys[np.asarray(members)]
            pick = lambda key: jax.random.choice(key, count, (size,), replace=False)
            rows = jax.vmap(pick)(mine)
            take = lambda x: jax.vmap(lambda x, at: x[at])(x, rows) if _has_examples(x) else x
            return fold_keys(jax.tree.map(take, stack), number)

        number = jax.random.bits(for_examples)
        stacks = map(drawn, self.stacks, self.members, examples)
        return Folds(tuple(stacks), self.members, self.own)

    def _check(self, leaves: list[Any]) -> None:
        for stack, members in zip(self.stacks, self.members, strict=True):
            found = _first(stack).shape[0]
            if found != len(members):
                raise ValueError(
                    f"a batch has {found} of {len(members)} folds of equal size: folds are not "
                    "examples, so no source can draw from them. Pass the data of cross_validation "
                    "whole, or mini-batches of every fold, "
                    "lambda i: train.sample(jax.random.fold_in(key, i), size)"
                )
        wanted = [own if own is None else (self.num_folds, *own) for own in self.own]
        found = [
            own if own is None else jnp.shape(x) for x, own in zip(leaves, self.own, strict=False)
        ]
        if len(leaves) != len(wanted) or found != wanted:
            raise ValueError(
                f"params lack the leading axis of {self.num_folds} folds: pass the params that "
                "cross_validation returned to init, params, losses, data = "
                "gradhpo.cross_validation(params, losses, data, folds, key)"
            )

    def _in_order(self, found: list[PyTree]) -> PyTree:
        """Results of the stacks, one after another, in the order of the folds."""
        if len(found) == 1:
            return found[0]
        order = np.argsort(np.concatenate([np.asarray(m) for m in self.members]))

        def join(*parts: Any) -> Any:
            return _rows(jnp.concatenate(parts), tuple(order.tolist()))

        return jax.tree.map(join, *found)


@checked
def folds_of(batch: Any, name: str) -> Folds:
    """A batch of a cross-validated loss, or what to write instead."""
    if not isinstance(batch, Folds):
        raise TypeError(
            f"{name} of cross_validation takes the data that it returned, not a "
            f"{type(batch).__name__}: gradhpo.run(optimizer, state, losses, *data, num_steps=...)"
        )
    return batch


def _rows(x: Array, rows: tuple[int, ...]) -> Array:
    """Rows of an array; neighbours as a slice, which costs nothing to differentiate."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]
    return x[np.asarray(rows)]


def _is_per_fold(x: Any) -> bool:
    return eqx.is_array(x) and x.ndim > 0


def _has_examples(x: Any) -> bool:
    return eqx.is_array(x) and x.ndim > 1  # PRNG keys of folds have one axis


def _first(stack: PyTree) -> Array:
    return next(x for x in jax.tree.leaves(stack) if _has_examples(x))
