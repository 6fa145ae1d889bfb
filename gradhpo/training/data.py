"""Where `run` gets its batches: arrays on the device, any iterator, or one fixed batch."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, PyTree, UInt32

from gradhpo.core.types import BatchStack, DataBatch, DrawnStack
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_count, check_leading_axis, numbers_as_arrays


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

    outside = lambda x: x >= jnp.uint32(n)
    again = lambda x: jnp.where(outside(x), network(x), x)
    return jax.lax.while_loop(lambda x: jnp.any(outside(x)), again, network(position))


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


# -- what the compiled chunk sees ----------------------------------------------------------


class Generated(eqx.Module):
    """A traceable `index -> batch`."""

    function: Callable

    def batch(self, step: Array, position: Array) -> PyTree:
        return self.function(step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return BatchStack(
            jax.vmap(self.function)(step * count + jnp.arange(count, dtype=step.dtype))
        )

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self.function(step * count + t))


class Fixed(eqx.Module):
    """One batch for all steps; PRNG keys in it are folded with the step."""

    value: PyTree

    def batch(self, step: Array, position: Array) -> PyTree:
        return fold_keys(self.value, step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return self.batch(step, position)

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self.batch(step + t // count, position), shared_by=count)


class Fetched(eqx.Module):
    """Batches of a chunk that came from the host, `[steps, ...]` or `[steps, inner, ...]`."""

    values: PyTree

    def batch(self, step: Array, position: Array) -> PyTree:
        return jax.tree.map(lambda x: x[position], self.values)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return BatchStack(self.batch(step, position))

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        of_step = lambda t: self.batch(step, position + t // count)
        return DrawnStack(lambda t: jax.tree.map(lambda x: x[t % count], of_step(t)))


class Host:
    """An iterator, read in pieces of one chunk."""

    def __init__(self, name: str, iterator: Any, per_step: int | None):
        self.name, self._iterator, self._per_step = name, iterator, per_step
        self._first: list[Any] = []

    def bytes_per_step(self) -> int:
        """Size of what one step draws, from a first batch that is kept for later."""
        try:
            self._first = [self._next()]
        except StopIteration:
            raise ValueError(f"{self.name} is an iterator without a single batch") from None
        size = sum(x.nbytes for x in jax.tree.leaves(self._first[0]) if eqx.is_array(x))
        return size * (self._per_step or 1)

    def fetch(self, steps: int) -> tuple[Fetched | None, int]:
        """Batches for up to `steps` steps, and for how many there were any."""
        wanted = steps * (self._per_step or 1)
        batches, self._first = self._first, []
        while len(batches) < wanted:
            try:
                batches.append(self._next())
            except StopIteration:
                break
        steps = len(batches) // (self._per_step or 1)
        batches = batches[: steps * (self._per_step or 1)]
        if not batches:
            return None, 0
        stacked = jax.tree.map(lambda *leaves: self._stacked(leaves, steps), *batches)
        return Fetched(stacked), steps

    def _next(self) -> PyTree:
        return numbers_as_arrays(next(self._iterator))

    def _stacked(self, leaves: tuple, steps: int) -> np.ndarray | Array:
        shapes = sorted({np.shape(x) for x in leaves})
        if len(shapes) > 1:
            raise ValueError(
                f"{self.name} yields batches of different shapes {shapes}; a compiled step needs "
                "one shape: drop or pad the ragged last batch (drop_last=True in many loaders)"
            )
        # PRNG keys have no NumPy form.
        stacked = jnp.stack(leaves) if is_key(leaves[0]) else np.stack(leaves)
        lead = (steps,) if self._per_step is None else (steps, self._per_step)
        return stacked.reshape(*lead, *stacked.shape[1:])


Source: TypeAlias = Generated | Fixed | Host


def as_source(data: Any, name: str, per_step: int | None) -> Source:
    """What kind of data this is. `per_step` is the inner steps, or `None` for one batch."""
    if isinstance(data, list) or (
        isinstance(data, tuple) and any(isinstance(x, (DataBatch, dict)) for x in data)
    ):
        raise TypeError(
            f"{name} is a {type(data).__name__} of {len(data)} items: pass gradhpo.iterate({name})"
            " to draw its batches in turn, gradhpo.ArrayData(arrays, batch_size, key) to draw "
            "minibatches of arrays, or a tuple of arrays for one fixed batch"
        )
    if inspect.isgeneratorfunction(data):
        raise TypeError(f"{name} is a generator function; call it: {name}={data.__name__}()")
    if hasattr(data, "__next__"):
        return Host(name, data, per_step)
    if isinstance(data, BatchStack):
        raise TypeError(f"{name} is a BatchStack, which serves one step; pass gradhpo.ArrayData")
    if isinstance(data, ArrayData) and data.batch_size == data.num_examples:
        return Fixed(data.arrays)  # the same at every step: no stack of copies
    if callable(data):
        return Generated(data)
    leaves = jax.tree.leaves(data)
    foreign = [x for x in leaves if not (eqx.is_array(x) or isinstance(x, (bool, int, float)))]
    if not foreign:
        return Fixed(jax.tree.map(lambda x: x if is_key(x) else jnp.asarray(x), data))
    hint = (
        f"wrap it: gradhpo.iterate({name})"
        if hasattr(foreign[0], "__iter__")
        else "pass gradhpo.ArrayData, a function index -> batch, an iterator, or one fixed batch"
    )
    raise TypeError(f"{name} is a {type(data).__name__}, which is no source of batches; {hint}")
