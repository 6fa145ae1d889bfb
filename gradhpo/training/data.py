"""Batches of arrays that fit on the device, and of any loader."""

from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PyTree, UInt32

from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_leading_axis


@checked
class ArrayData(eqx.Module):
    """Minibatches of arrays that fit on the device, shuffled anew in every epoch.

    A traceable `index -> batch`, a pure function of `(key, index)`: a run can be replayed or
    resumed exactly. Every example is drawn once per epoch; a batch may span two epochs, so no
    example is dropped. With `batch_size` equal to the number of examples every batch is the
    whole data set in its own order.

    **Arguments:**

    - `arrays`: pytree of arrays `[examples, ...]` that agree on the first axis.
    - `batch_size`: examples per batch, at most the number of examples.
    - `key`: PRNG key of the shuffling.

    **Raises:** `ValueError` when leading axes differ or `batch_size` does not fit.

    ```python
    x, y = jnp.ones((1000, 64)), jnp.zeros(1000)
    data = gradhpo.ArrayData((x, y), batch_size=128, key=jax.random.key(0))
    batch_x, batch_y = data(0)
    ```
    """

    arrays: PyTree = eqx.field(converter=lambda tree: jax.tree.map(jnp.asarray, tree))
    batch_size: int = eqx.field(static=True)
    key: Array

    def __check_init__(self):
        check_leading_axis(self.arrays, "ArrayData(arrays)")
        check_count("batch_size", self.batch_size, most=self.num_examples)
        if self.num_examples * self.batch_size >= 2**32:
            raise ValueError(
                f"batch_size={self.batch_size} times {self.num_examples} examples exceeds 2**32, "
                "up to which positions are counted: use a smaller batch_size"
            )

    @property
    def num_examples(self) -> int:
        return jax.tree.leaves(self.arrays)[0].shape[0]

    def __call__(self, index: Int[ArrayLike, ""]) -> PyTree:
        """Batch number `index`, from 0."""
        return _draw(self, jnp.asarray(index))

    def indices(self, index: Int[ArrayLike, ""]) -> Int[Array, " batch"]:
        """Which examples batch number `index` holds, shape `[batch_size]`."""
        return _indices(self, jnp.asarray(index))


@eqx.filter_jit
def _draw(data: ArrayData, index: Array) -> PyTree:
    if data.batch_size == data.num_examples:
        return data.arrays
    chosen = _indices(data, index)
    return jax.tree.map(lambda x: x[chosen], data.arrays)


@eqx.filter_jit
def _indices(data: ArrayData, index: Array) -> Array:
    n, size = data.num_examples, data.batch_size
    if size == n:
        return jnp.arange(n)
    # index * size counts the examples drawn so far, without leaving 32 bits.
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

    A Feistel network permutes the next power of two; what lands outside is permuted again
    until it is inside, which keeps it a bijection. A stored permutation would cost a sort of
    all examples for every batch, or a state that a pure function of the index cannot have.
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

    # All count as outside at first: so the network is traced and compiled once.
    start = (position, jnp.ones_like(position, bool))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), again, start)[0]


def _scramble(x: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
    """The 32-bit finaliser of MurmurHash3: every input bit flips half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@checked
def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """An endless iterator over the batches of any loader, from its start again at its end.

    **Arguments:**

    - `loader`: anything that `iter` accepts: a list of batches, a data loader. A generator
        can be passed through only once; `run` stops where it ends.

    ```python
    batches = gradhpo.iterate([jnp.zeros(3), jnp.ones(3)])
    first, second, first_again = next(batches), next(batches), next(batches)
    ```
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return
