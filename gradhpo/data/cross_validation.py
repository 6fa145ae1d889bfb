r"""K-fold cross-validation as one bilevel problem: K inner problems with one outer loss."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Integer, PyTree

from gradhpo.core.batches import num_examples
from gradhpo.core.inputs import LossFunctions
from gradhpo.data.arrays import on_device
from gradhpo.data.folds import Folds, folds_of
from gradhpo.utils.freezing import is_frozen
from gradhpo.utils.keys import is_key
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity, check_scalar, has_arity


_ARGUMENTS = "params, hyperparams, batch"
_WITHOUT_STATE = (
    "losses of cross_validation take no model_state: write them as "
    "(params, hyperparams, batch) -> scalar, and normalise without running state "
    "(LayerNorm, GroupNorm)"
)


class _Split(NamedTuple):
    """The numbers of the examples on both sides of a fold."""

    train: Any
    held_out: Any


class _OfFolds(eqx.Module):
    """A loss of all folds, made from the loss of one."""

    loss: Callable
    name: str = eqx.field(static=True)
    combine: Callable = eqx.field(static=True)

    def __call__(self, params: PyTree, hyperparams: PyTree, batch: Any) -> Any:
        """Metrics of the loss are averaged over the folds."""

        def of_one(params: PyTree, hyperparams: PyTree, batch: PyTree) -> Any:
            returned = self.loss(params, hyperparams, batch)
            is_pair = isinstance(returned, tuple) and len(returned) == 2
            check_scalar(returned[0] if is_pair else returned, self.name)
            return returned

        found = folds_of(batch, self.name).each(of_one, params, hyperparams)
        if not isinstance(found, tuple):
            return self.combine(found, axis=0)
        mean = lambda x: jnp.mean(x, axis=0) if eqx.is_array(x) else x
        return self.combine(found[0], axis=0), jax.tree.map(mean, found[1])


class CrossValidation(NamedTuple):
    """What `cross_validation` returns; `data` are the training and the held-out examples."""

    params: PyTree
    losses: LossFunctions
    data: tuple[Folds, Folds]


@checked
def cross_validation(
    params: PyTree,
    losses: LossFunctions,
    data: PyTree,
    folds: int | Integer[ArrayLike, " examples"],
    key: Array | None = None,
) -> CrossValidation:
    r"""K-fold cross-validation: K inner problems with one outer loss, for any optimizer.

    $$\min_\lambda \frac 1K \sum_{k=1}^K L_{\mathrm{val}}(w^k(\lambda), \lambda; D_k),\qquad
    w^k(\lambda) \text{ trained on all examples but } D_k.$$

    The K models are trained side by side as one. Their training loss is the *sum*
    $\sum_k L_{\mathrm{train}}(w^k, \lambda)$, so that each model gets its own gradient and inner
    learning rates mean the same as for one model. The outer loss is the *mean* of the K held-out
    losses, and its hypergradient is the mean of K hypergradients. Every example is held out once.
    Fold sizes differ by at most one.

    Operations on all parameters at once act on all folds together: clipping by a global norm or a
    line search (`optax.lbfgs`) in the inner optimizer, and the linear solve of implicit
    differentiation, whose matrix has K blocks. Adam and SGD act on every number separately. Metrics
    of the run describe the whole: `train_loss` is the sum, `val_loss` the mean.

    Data take K − 1 times their memory, parameters K times; frozen ones are shared.

    **Arguments:**

    - `params`: the parameters of one model, any pytree. Every fold starts from them.
    - `losses`: [`LossFunctions`][gradhpo.LossFunctions] of one model and one batch, without model
        state. Take means over the examples, so that hyperparameters mean the same with K folds and
        on all data.
    - `data`: all examples, a pytree of arrays that agree on axis 0. A PRNG key of shape `()` is
        split, so that each fold has its own; numbers of shape `()` are shared.
    - `folds`: K, from 2 to the number of examples (leave-one-out), or for every example the number
        of the fold that holds it out, from 0 to K − 1, −1 for never: for stratified or grouped
        folds, or the folds of another program. Each different fold size is compiled separately.
    - `key`: PRNG key of the shuffle. `None` if the folds are given.

    **Returns:** `(params, losses, data)`: params with a leading axis `[folds, ...]`; losses of all
    folds; and a pair of [`Folds`][gradhpo.data.folds.Folds], the training and the held-out
    examples, to be passed as `*data`. An `update_fn` or `grad_fn` of one model is mapped over the
    folds by `Folds.each`.

    **Raises:** `ValueError` for arrays with different numbers of examples, fewer than 2 folds, more
    folds than examples, a number of folds without a `key` or folds with one, or fold numbers
    that leave one out; `TypeError` for a source of batches in
    place of arrays, or losses with a model state.

    ```python
    x = jax.random.normal(jax.random.key(0), (23, 4))
    y = x @ jnp.ones(4) + jax.random.normal(jax.random.key(1), (23,))
    error = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    ridge = lambda w, h, batch: error(w, h, batch) + jnp.sum(jnp.exp(h) * w**2)

    params, losses, data = gradhpo.cross_validation(
        jnp.zeros(4), gradhpo.LossFunctions(ridge, error), (x, y), 5, jax.random.key(2)
    )
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.adam(0.1), inner_steps=100)
    state = optimizer.init(params, jnp.zeros(4))
    state = optimizer.step(state, *data, losses)
    assert state.params.shape == (5, 4) and state.hyperparams.shape == (4,)
    ```

    ??? cite "Reference"

        Stone, *Cross-Validatory Choice and Assessment of Statistical Predictions*, JRSS B 1974; by
        hypergradient: Bertrand et al., *Implicit Differentiation for Fast Hyperparameter Selection
        in Non-Smooth Convex Learning*, JMLR 2022, arXiv:2105.01637.
    """
    for name, loss in (("train_loss", losses.train_loss), ("val_loss", losses.val_loss)):
        if not has_arity(loss, _ARGUMENTS) and has_arity(loss, f"{_ARGUMENTS}, model_state"):
            raise TypeError(_WITHOUT_STATE)
        check_arity(loss, name, _ARGUMENTS)
    if callable(data):
        raise TypeError(
            f"data is a {type(data).__name__}, not the examples: pass all of them, (x, y); "
            "mini-batches are drawn from what cross_validation returns, train.sample(key, size)"
        )
    data = on_device(data, "data")
    size = num_examples(data, "data")
    split = _drawn(folds, key, size) if isinstance(folds, int) else _given(folds, key, size)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_frozen)
    own = tuple(x.shape if eqx.is_inexact_array(x) else None for x in leaves)
    copied = [
        x if shape is None else jnp.broadcast_to(x, (len(split), *shape))
        for x, shape in zip(leaves, own, strict=True)
    ]
    params = jax.tree.unflatten(structure, copied)
    both = _stacked(data, split, own)
    train = _OfFolds(losses.train_loss, "train_loss", jnp.sum)
    val = _OfFolds(losses.val_loss, "val_loss", jnp.mean)
    return CrossValidation(params, LossFunctions(train, val), both)


def _drawn(folds: int, key: Array | None, size: int) -> list[_Split]:
    """The folds of a random permutation; the first ones hold out one example more."""
    check_count("folds", folds, most=size)
    if folds < 2:
        raise ValueError("folds must be at least 2: one fold leaves nothing to train on")
    if key is None:
        raise ValueError(
            f"folds={folds} are drawn at random: pass key=jax.random.key(0), or, instead of "
            f"{folds}, an array of shape ({size},) with the number of each example's fold"
        )
    order = jax.random.permutation(key, size)
    ends = np.cumsum([0, *(size // folds + (k < size % folds) for k in range(folds))])
    return [
        _Split(jnp.concatenate([order[:a], order[b:]]), order[a:b])
        for a, b in itertools.pairwise(ends)
    ]


def _given(folds: Any, key: Array | None, size: int) -> list[_Split]:
    """Folds by the number of each example's."""
    if isinstance(folds, Tracer):
        raise TypeError("folds fix shapes: pass their numbers as a NumPy array, outside jit")
    numbers = np.asarray(folds)
    if key is not None:
        raise ValueError(
            "folds are given and so is a key, which would shuffle them: pass key=None, or a number "
            "of folds, folds=5"
        )
    if len(numbers) != size:
        raise ValueError(f"folds has {len(numbers)} numbers for {size} examples: pass one for each")
    found = np.unique(numbers[numbers != -1])
    if len(found) < 2 or not np.array_equal(found, np.arange(len(found))):
        raise ValueError(
            f"folds has the numbers {found[:10].tolist()}; folds are numbered 0 to K - 1, at least "
            "2 of them, and -1 marks what is never held out. Renumber others with "
            "np.unique(folds, return_inverse=True)[1]"
        )
    return [_Split(np.flatnonzero(numbers != k), np.flatnonzero(numbers == k)) for k in found]


def _stacked(data: PyTree, split: list[_Split], own: tuple) -> tuple[Folds, Folds]:
    """Training and held-out examples; folds of equal size in one stack."""
    sizes = [len(fold.held_out) for fold in split]
    members = tuple(
        tuple(k for k, count in enumerate(sizes) if count == size)
        for size in sorted(set(sizes), reverse=True)
    )

    def part(which: int, mine: tuple[int, ...]) -> PyTree:
        def of_leaf(x: Array) -> Array:
            if x.ndim == 0:
                # Their own keys in training and validation.
                keys = lambda: jax.random.split(x, (2, len(split)))[which]
                return keys()[np.asarray(mine)] if is_key(x) else x
            return jnp.stack([x[split[k][which]] for k in mine])

        return jax.tree.map(of_leaf, data)

    train, val = (Folds(tuple(part(i, m) for m in members), members, own) for i in (0, 1))
    return train, val
