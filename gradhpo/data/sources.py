"""What a chunk of `run` draws its batches from."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.types import BatchStack, DataBatch, DrawnStack
from gradhpo.data.arrays import ArrayData, stacked
from gradhpo.data.host import Host
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.validation import check_arity


class Generated(eqx.Module):
    """A traceable `index -> batch`."""

    function: Callable

    def __call__(self, index: Array) -> PyTree:
        batch = self.function(index)
        return tuple(batch) if type(batch) is list else batch

    def batch(self, step: Array, position: Array) -> PyTree:
        return self(step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return stacked(self, step * count, count)

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self(step * count + t))


class Fixed(eqx.Module):
    """One batch for all steps; PRNG keys in it are folded with the step."""

    value: PyTree

    def batch(self, step: Array, position: Array) -> PyTree:
        return fold_keys(self.value, step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return self.batch(step, position)

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self.batch(step + t // count, position), shared_by=count)


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
    if isinstance(data, ArrayData) and data.is_whole:
        return Fixed(data(0))  # the same at every step: no stack of copies
    if callable(data):
        check_arity(data, name, "index")
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
