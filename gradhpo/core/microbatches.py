"""Losses computed piece by piece, so that less is kept for their derivatives."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, PyTree, Real

from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.losses import as_number
from gradhpo.core.means import widened
from gradhpo.core.types import LossFn
from gradhpo.utils.keys import is_key, looks_like_a_key
from gradhpo.utils.placement import interleaved, zeros_of
from gradhpo.utils.settings import check_count
from gradhpo.utils.trees import accumulation_dtype
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity, has_arity, leaf_names


_WITHOUT_STATE = (
    "a microbatched loss takes no model_state: its statistics would describe a piece. Normalise "
    "without running state (LayerNorm, GroupNorm), or save memory with jax.checkpoint inside the "
    "loss"
)


class Microbatched(eqx.Module):
    """What `microbatched` returns: a loss like the one inside."""

    loss: LossFn
    num: int = eqx.field(static=True)

    def __call__(
        self, params: PyTree, hyperparams: PyTree, batch: PyTree, model_state: PyTree = None
    ) -> Any:
        """The mean over the pieces of a batch."""
        if model_state is not None:
            raise ValueError(_WITHOUT_STATE)
        piece_of = _pieces(batch, self.num)

        @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop keeps the two passes apart
        def of_piece(i: Array) -> PyTree:
            return jax.tree.map(as_number, self.loss(params, hyperparams, piece_of(i)))

        def add(total: PyTree, i: Array) -> tuple[PyTree, None]:
            return jax.tree.map(lambda x, y: x + widened(y), total, of_piece(i)), None

        first = jnp.zeros((), int)
        made, sums = jax.eval_shape(
            lambda: (of_piece(first), jax.tree.map(widened, of_piece(first)))
        )
        total, _ = jax.lax.scan(add, zeros_of(sums), jnp.arange(self.num))
        return cast_like(jax.tree.map(lambda x: x / self.num, total), made)


@checked
def microbatched(loss: LossFn, num: int) -> LossFn:
    """A mean loss, computed on `num` pieces of the batch, one after another.

    Each piece is recomputed where a derivative needs it (`jax.checkpoint`), so that only one
    piece's activations are kept, not a whole batch's: for a training gradient, and for every
    product of an algorithm that differentiates training. The work grows by one forward pass. Losses
    add up in float32 at least, gradients in the dtype of their parameters: keep these in float32,
    and cast to bfloat16 inside the loss.

    Every array of the batch has the examples along axis 0, all with the same number of them. Each
    piece gets its own PRNG key, split from the key of the batch, so dropout masks change when you
    change `num`; keys along axis 0 stay with their examples; numbers of shape `()` are shared by
    all pieces. Metrics are averaged.

    The result equals that of `loss` if this is a mean with a fixed divisor: `jnp.mean(weights *
    losses)`, penalties included. It differs for a loss that divides by a sum over its batch
    (`jnp.sum(weights * losses) / jnp.sum(weights)`), compares examples with each other
    (contrastive losses) or normalises over them (BatchNorm): use `jax.checkpoint` inside such a
    loss.

    **Arguments:**

    - `loss`: `(params, hyperparams, batch) -> scalar`, or `-> (scalar, metrics)`.
    - `num`: number of pieces, at least 1; must divide the number of examples.

    **Returns:** a loss of the same signature. Create it once, as any loss.

    **Raises:** `TypeError` for a loss with other arguments; when it is called, `ValueError` for
    arrays with different numbers of examples or a number that `num` does not divide, for a
    `model_state`, and for pieces that devices cannot share evenly under explicit mesh axes.

    ```python
    def loss(w, h, batch):
        x, y = batch
        return jnp.mean((x @ w - y) ** 2) + h * jnp.sum(w**2)

    in_pieces = gradhpo.microbatched(loss, 4)
    batch = jnp.ones((32, 3)), jnp.zeros(32)
    assert jnp.isclose(in_pieces(jnp.ones(3), 0.1, batch), loss(jnp.ones(3), 0.1, batch))
    ```
    """
    arguments = "params, hyperparams, batch"
    if not has_arity(loss, arguments) and has_arity(loss, f"{arguments}, model_state"):
        raise TypeError(_WITHOUT_STATE)
    check_arity(loss, "loss", arguments)
    check_count("num", num)
    return Microbatched(loss, num)


def _pieces(batch: PyTree, num: int) -> Any:
    """The function of `i` that gives piece `i`: every `num`-th example, from `i` on."""
    batch = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, batch)
    is_one_key = lambda x: is_key(x) and x.ndim == 0
    keys, rest = eqx.partition(batch, is_one_key)
    arrays, shared = eqx.partition(rest, lambda x: eqx.is_array(x) and x.ndim > 0)
    legacy, arrays = eqx.partition(arrays, looks_like_a_key)
    sizes = {name: x.shape[0] for name, x in _named(arrays)}
    if jax.tree.leaves(legacy) and set(sizes.values()) <= {2}:
        name = _named(legacy)[0][0]
        raise ValueError(
            f"batch{name} may be a key made by jax.random.PRNGKey, or two examples of uint32: make "
            "keys with jax.random.key, and examples int32"
        )
    keys = eqx.combine(keys, legacy)
    if not sizes and num > 1:
        raise ValueError(
            f"microbatched(loss, num={num}) found no array of examples in the batch to divide"
        )
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"batch{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            "a microbatched loss takes every num-th example along axis 0 of each array of a batch, "
            f"and these differ ({shown}): pass arrays that are not per example outside the batch, "
            "in hyperparams or as an attribute of the loss"
        )
    for size in set(sizes.values()):
        if size % num:
            raise ValueError(f"microbatched(loss, num={num}) must divide the {size} examples")
    keys = jax.tree.map(lambda key: jax.random.split(key, num), keys)
    arrays = jax.tree.map(lambda x: interleaved(x, num, f"microbatched(loss, num={num})"), arrays)

    def piece(i: Array) -> PyTree:
        of_examples = jax.tree.map(lambda x: _column(x, i), arrays)
        return eqx.combine(of_examples, jax.tree.map(lambda x: x[i], keys), shared)

    return piece


def _column(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _named(tree: PyTree) -> list[tuple[str, Array]]:
    return list(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


@checked
def chunked_cross_entropy(
    features: Float[Array, "*tokens width"],
    head: Float[Array, "vocabulary width"],
    labels: Integer[Array, "*tokens"],
    num: int,
    label_smoothing: Real[ArrayLike, "*#tokens"] = 0.0,
) -> Float[Array, "*tokens"]:
    r"""Cross-entropy over a large vocabulary, without all logits at once.

    The logits $x_i W^\top$ are computed one chunk of the tokens after another, in `num` chunks, and
    again where a derivative needs them, so they take the memory of one chunk. Derivatives of any
    order exist.

    **Arguments:**

    - `features`: the last hidden state of each token, shape `[..., width]`.
    - `head`: the matrix $W$ of the output layer, shape `[vocabulary, width]`; that of the embedding
        if they are tied.
    - `labels`: the next token of each, integers of shape `[...]` from 0 to `vocabulary - 1`; for
        masked tokens, pass 0 and weight their losses by 0.
    - `num`: number of chunks, at least 1; must divide the number of tokens.
    - `label_smoothing`: the share of the target spread over the whole vocabulary, in
        [0, 1], a number or one for each token (or what broadcasts to that); default 0.

    **Returns:** the loss of every token, shape `[...]`, in float32 at least. Take their mean, or a
    weighted one.

    **Raises:** `ValueError` if `num` does not divide the number of tokens, or under explicit mesh
    axes devices cannot share a chunk evenly.

    ```python
    features, head = jnp.ones((2, 8, 4)), jnp.ones((1000, 4))
    losses = gradhpo.chunked_cross_entropy(features, head, jnp.zeros((2, 8), int), num=4)
    assert losses.shape == (2, 8) and jnp.allclose(losses, jnp.log(1000))
    ```
    """
    check_count("num", num)
    tokens = int(np.prod(labels.shape))
    if tokens % num:
        raise ValueError(f"chunked_cross_entropy(num={num}) must divide the {tokens} tokens")
    smoothing = jnp.broadcast_to(jnp.asarray(label_smoothing, float), labels.shape)
    name = f"chunked_cross_entropy(num={num})"
    in_chunks = [interleaved(x, num, name, labels.ndim) for x in (features, labels, smoothing)]
    wide = accumulation_dtype((features, head))
    narrow = head.dtype
    head = head.astype(wide)  # so that its cotangents add up in this precision

    @jax.checkpoint
    def losses(i: Array) -> Array:
        x, label, share = (_column(x, i) for x in in_chunks)
        matrix = head.astype(narrow)
        logits = jnp.einsum("td,vd->tv", x, matrix, preferred_element_type=wide)
        own = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        share = share.astype(wide)
        total = jax.nn.logsumexp(logits, axis=1)
        return total - (1 - share) * own - share * jnp.mean(logits, axis=1)

    found = jax.lax.map(losses, jnp.arange(num))
    return found.T.reshape(tokens).reshape(labels.shape)
