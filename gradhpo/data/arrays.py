"""Batches of arrays that fit on the device."""

import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Int, PyTree, UInt32

from gradhpo.core.batches import BatchStack
from gradhpo.utils.conversion import as_array
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import beside, is_of_several, rows, spread
from gradhpo.utils.processes import check_alike
from gradhpo.utils.settings import check_count
from gradhpo.utils.sums import checksum
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_leading_axis


def on_device(tree: PyTree, which: str = "ArrayData(arrays)") -> PyTree:
    """All leaves of a batch, or of a data set, as JAX arrays."""
    put = lambda x: x if is_key(x) else jnp.asarray(as_array(x, which))
    return jax.tree.map(put, tree)


@checked
class ArrayData(eqx.Module):
    """Mini-batches of arrays that fit on the device, reshuffled in every epoch.

    A traceable `index -> batch`, a pure function of `(key, index)`: a run can be replayed or
    resumed exactly. Every example is drawn once per epoch; a batch may span two epochs, so no
    example is dropped. With `batch_size` equal to the number of examples, every batch is the whole
    data set in its original order.

    **Arguments:**

    - `arrays`: pytree of arrays `[examples, ...]` that agree on the first axis: NumPy or JAX
        arrays, PyTorch tensors on the CPU, pandas objects. With a state of several processes,
        arrays of all of them, from `jax.make_array_from_process_local_data(sharding, part)`.
    - `batch_size`: examples per batch, at most the number of examples (unless with
        `replacement`).
    - `key`: PRNG key of the draws. Two sources with the same key and the same number of examples
        draw the same examples: for example, the training and the validation part of the same tasks.
    - `replacement`: draw every example of every batch independently, default `False`. There are no
        epochs then.
    - `with_indices`: batches are `(batch, indices)`, default `False`, to look up values per
        example: a weight, a label, a margin that is a hyperparameter.
    - `hold`: repeat every batch for `hold` consecutive indices, default 1. `run` draws
        `optimizer.num_inner_steps` training batches per validation batch: with that number here,
        both parts of a pair stay together.
    - `sharding`: how the arrays of a batch are spread over devices, such as
        `NamedSharding(mesh, PartitionSpec("data"))`, which divides the examples. Default `None`:
        every device gets whole batches.

    **Raises:** `ValueError` if leading axes differ, if there is no example, for a `batch_size` or
    `hold` below 1, several keys, and (unless with `replacement`) for a `batch_size` above the
    number of examples, or one that, multiplied by that number, gives $2^{32}$ or more; when a batch
    is drawn, for a `batch_size` that `sharding` cannot divide evenly. `TypeError` for text and
    objects.

    ```python
    x, y = jnp.ones((1000, 64)), jnp.zeros(1000)
    data = gradhpo.ArrayData((x, y), batch_size=128, key=jax.random.key(0))
    batch_x, batch_y = data(0)
    assert data.num_batches(epochs=10) == 79

    numbered = gradhpo.ArrayData((x, y), 128, jax.random.key(0), with_indices=True)
    (batch_x, batch_y), indices = numbered(0)
    ```
    """

    arrays: PyTree = eqx.field(converter=on_device)
    batch_size: int = eqx.field(static=True)
    key: Array
    replacement: bool = eqx.field(static=True, default=False)
    with_indices: bool = eqx.field(static=True, default=False)
    hold: int = eqx.field(static=True, default=1)
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_leading_axis(self.arrays, "ArrayData(arrays)")
        if self.num_examples == 0:
            raise ValueError("ArrayData(arrays) holds no example: its leading axis has length 0")
        most = None if self.replacement else self.num_examples
        check_count("batch_size", self.batch_size, most=most)
        check_count("hold", self.hold)
        if jnp.ndim(self.key) != (0 if is_key(self.key) else 1):
            raise ValueError(
                f"ArrayData(key) must be one key such as jax.random.key(0), got shape "
                f"{jnp.shape(self.key)}"
            )
        if not self.replacement and self.num_examples * self.batch_size >= 2**32:
            raise ValueError(
                f"batch_size={self.batch_size} times {self.num_examples} examples exceeds 2**32, "
                "the largest position that can be counted: use a smaller batch_size"
            )

    @property
    def num_examples(self) -> int:
        """Length of the leading axis of `arrays`."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether every batch is the data set itself."""
        return self.batch_size == self.num_examples and not self.replacement

    @checked
    def num_batches(self, epochs: float | int = 1) -> int:
        """The number of batches in `epochs` epochs (default 1), rounded up.

        Each is counted `hold` times.

        **Raises:** `ValueError` if `epochs` is not positive and finite.
        """
        if not 0 < epochs < math.inf:
            raise ValueError(f"epochs must be positive, got epochs={epochs}")
        return self.hold * math.ceil(round(epochs * self.num_examples / self.batch_size, 6))

    @checked
    def __call__(self, index: Int[ArrayLike, ""]) -> PyTree:
        """Batch number `index`, from 0: a tree like `arrays`, of arrays `[batch_size, ...]`.

        **Raises:** `ValueError` for a negative Python `int`.
        """
        _check_index("index", index)
        return _draw(self, jnp.asarray(index))

    @checked
    def indices(self, index: Int[ArrayLike, ""]) -> Int[Array, " batch"]:
        """The examples in batch number `index`, shape `[batch_size]`."""
        _check_index("index", index)
        return _indices(self, jnp.asarray(index))

    @checked
    def stack(self, first: Int[ArrayLike, ""], count: int) -> BatchStack:
        """Batches number `first` to `first + count - 1`, one for each inner step of a `step`.

        **Returns:** a [`BatchStack`][gradhpo.BatchStack] of arrays `[count, batch_size, ...]`.

        **Raises:** `ValueError` for a negative `first` or `count < 1`.
        """
        _check_index("first", first)
        check_count("count", count)
        return _stack(self, jnp.asarray(first, jnp.int32), count)


def with_key_beside(data: ArrayData) -> ArrayData:
    """The data with the key on the devices of arrays that several processes share."""
    if not any(map(is_of_several, jax.tree.leaves(data.arrays))):
        return data
    check_alike(**{"ArrayData(key)": f"checksum {checksum(data.key)}"})
    return dataclasses.replace(data, key=beside(data.key, data.arrays))


def _check_index(name: str, index: ArrayLike) -> None:
    if isinstance(index, int) and index < 0:
        raise ValueError(f"{name} must be at least 0, got {name}={index}")


@compiled
def _stack(data: ArrayData, first: Array, count: int) -> BatchStack:
    return stacked(data, first, count)


def stacked(draw: Callable[[Array], PyTree], first: Array, count: int) -> BatchStack:
    """Batches number `first` and after, from any function of their number."""
    if count == 1:  # under `vmap`, a loop that draws, like ArrayData's, costs more
        return BatchStack(jax.tree.map(lambda x: jnp.asarray(x)[None], draw(first)))
    return BatchStack(jax.vmap(draw)(first + jnp.arange(count, dtype=first.dtype)))


@compiled
def _draw(data: ArrayData, index: Array) -> PyTree:
    chosen = _indices(data, index)
    if data.is_whole:
        batch = data.arrays
    else:
        batch = jax.tree.map(lambda x: rows(x, chosen), data.arrays)
    found = (batch, chosen) if data.with_indices else batch
    return spread(found, data.sharding, "ArrayData(sharding=...)")


@compiled
def _indices(data: ArrayData, index: Array) -> Array:
    n, size = data.num_examples, data.batch_size
    if data.is_whole:
        return jnp.arange(n, dtype=jnp.int32)
    index = index // data.hold
    if data.replacement:
        key = jax.random.fold_in(data.key, index)
        return jax.random.randint(key, (size,), 0, n, jnp.int32)
    # index * size counts the examples drawn so far, without exceeding 32 bits.
    rounds, rest = jnp.divmod(index.astype(jnp.uint32), jnp.uint32(n))
    drawn = rest * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
    epoch = rounds * jnp.uint32(size) + drawn // jnp.uint32(n)
    keys = jax.vmap(lambda e: jax.random.fold_in(data.key, e))(epoch[jnp.array([0, -1])])
    secrets = jax.vmap(lambda k: jax.random.bits(k, (_ROUNDS,), jnp.uint32))(keys)
    of_each = secrets[(epoch != epoch[0]).astype(jnp.int32)]
    return _permute(drawn % jnp.uint32(n), of_each, n).astype(jnp.int32)


_ROUNDS = 8


def _permute(
    position: UInt32[Array, " batch"], secrets: UInt32[Array, "batch rounds"], n: int
) -> UInt32[Array, " batch"]:
    """Images under a pseudorandom permutation of 0 to n - 1, without storing it.

    A Feistel network permutes the next power of two; a result outside the range is permuted again
    until it is inside, which keeps the map bijective. A stored permutation would cost a sort of all
    examples for every batch, or a state that a pure function of the index cannot have.
    """
    bits = max((n - 1).bit_length(), 2)
    low = jnp.uint32(2 ** (bits // 2) - 1)
    high = jnp.uint32(2 ** (bits - bits // 2) - 1)

    def network(x):
        left, right = x >> (bits // 2), x & low
        for r in range(0, _ROUNDS, 2):
            left ^= _scramble(right ^ secrets[:, r]) & high
            right ^= _scramble(left ^ secrets[:, r + 1]) & low
        return (left << (bits // 2)) | right

    def again(carry):
        x, outside = carry
        x = jnp.where(outside, network(x), x)
        return x, x >= jnp.uint32(n)

    # All count as outside at first, so that the network is traced and compiled once.
    start = (position, jnp.ones_like(position, bool))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), again, start)[0]


def _scramble(x: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
    """The 32-bit finaliser of MurmurHash3: every input bit flips half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
