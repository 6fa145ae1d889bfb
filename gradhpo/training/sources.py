"""What a chunk of `run` draws its batches from."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.types import BatchStack, DataBatch, DrawnStack
from gradhpo.training.data import ArrayData
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.validation import numbers_as_arrays


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
