"""Batches, and stacks of them with one batch per inner step."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.utils.conversion import foreign_as_arrays
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_leading_axis


@checked
class DataBatch(eqx.Module):
    """Inputs with their targets; unpacks as a pair.

    **Arguments:**

    - `inputs`: array, or pytree of arrays, each of shape `[batch, ...]`; PyTorch tensors and
        pandas objects become arrays.
    - `targets`: array, or pytree of arrays, each of shape `[batch, ...]`.

    **Raises:** `ValueError` if the leading axes differ, if an array has none (shape `()`), or if
    there is no array at all.

    ```python
    batch = gradhpo.DataBatch(inputs=jnp.ones((32, 64)), targets=jnp.zeros(32))
    x, y = batch
    ```
    """

    inputs: PyTree = eqx.field(converter=lambda x: foreign_as_arrays(x, "DataBatch(inputs)"))
    targets: PyTree = eqx.field(converter=lambda x: foreign_as_arrays(x, "DataBatch(targets)"))

    def __check_init__(self):
        check_leading_axis((self.inputs, self.targets), "DataBatch(inputs, targets)")

    def __iter__(self) -> Iterator[PyTree]:
        return iter((self.inputs, self.targets))


@checked
class BatchStack(eqx.Module):
    """One training batch for each inner step of a `step`.

    **Arguments:**

    - `batches`: a batch in which every array has an extra leading axis, the inner steps:
        `[inner steps, batch, ...]`.

    **Raises:** `ValueError` if the leading axes differ, if an array has none, or if there is no
    array at all; `TypeError` for a list, which [`of`][gradhpo.BatchStack.of] stacks. `step` raises
    `ValueError` if the length is not the optimizer's `num_inner_steps`.

    ```python
    b1, b2 = jnp.zeros((32, 64)), jnp.ones((32, 64))
    stack = gradhpo.BatchStack.of([b1, b2])
    assert stack.num_steps == 2
    ```
    """

    batches: PyTree = eqx.field(converter=lambda x: foreign_as_arrays(x, "BatchStack(batches)"))

    def __check_init__(self):
        if isinstance(self.batches, list):
            raise TypeError(
                f"BatchStack(batches) got a list of {len(self.batches)}; to stack a list of "
                "batches write BatchStack.of([b1, b2, ...])"
            )
        check_leading_axis(self.batches, "BatchStack(batches)")

    @classmethod
    def of(cls, batches: Iterable[Any]) -> "BatchStack":
        """Stacks batches of the same structure and shape, in the order of the inner steps.

        **Arguments:**

        - `batches`: one batch for each inner step, any iterable.

        **Returns:** a `BatchStack`, with arrays of shape `[inner steps, *shape of one]`.

        **Raises:** `ValueError` if there is no batch, or if shapes differ from the first one's.
        """
        batches = [foreign_as_arrays(batch, "BatchStack.of(batches)") for batch in batches]
        if len(batches) == 0:
            raise ValueError("BatchStack.of(batches): got no batch; pass one for each inner step")
        first = jax.tree.map(jnp.shape, batches[0])
        for position, batch in enumerate(batches):
            shapes = jax.tree.map(jnp.shape, batch)
            if shapes != first:
                raise ValueError(
                    f"BatchStack.of(batches): batch {position} has shapes {shapes}, batch 0 "
                    f"has {first}; all must agree, so drop or pad a ragged last batch"
                )
        return cls(jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))

    @property
    def num_steps(self) -> int:
        """Length of the leading axis: the number of inner steps that it covers."""
        return jax.tree.leaves(self.batches)[0].shape[0]

    def at(self, t: ArrayLike) -> PyTree:
        """The batch of inner step `t`, counted from 0; `t` may be traced."""
        return jax.tree.map(lambda x: x[t], self.batches)


class DrawnStack(eqx.Module):
    """A `BatchStack` that is never stored: batch t is made where it is used.

    If `shared_by` inner steps share one batch, its PRNG keys are folded with their number, as for a
    batch that is not a stack.
    """

    draw: Callable[[Array], PyTree]
    shared_by: int | None = eqx.field(static=True, default=None)

    def at(self, t: ArrayLike) -> PyTree:
        t = jnp.asarray(t, jnp.int32)
        batch = self.draw(t)
        return batch if self.shared_by is None else fold_keys(batch, t % self.shared_by)


def batch_of_step(train_batch: PyTree, t: ArrayLike) -> PyTree:
    """Batch t of a stack, or the one batch of all inner steps with its PRNG keys folded with t."""
    if isinstance(train_batch, BatchStack | DrawnStack):
        return train_batch.at(t)
    return fold_keys(train_batch, t)


def is_same_each_step(train_batch: PyTree) -> bool:
    """Whether `batch_of_step` is the same for all inner steps."""
    is_stack = isinstance(train_batch, BatchStack | DrawnStack)
    return not is_stack and not any(map(is_key, jax.tree.leaves(train_batch)))


def num_examples(batch: PyTree, what: str) -> int:
    """The number of examples in a batch: the length of axis 0, the same for all its arrays.

    PRNG keys and numbers of shape `()` have no examples. `what` begins the error if there are none.
    """
    arrays, _ = _with_examples(batch)
    check_leading_axis(arrays, what)
    return jax.tree.leaves(arrays)[0].shape[0]


def by_example(batch: PyTree, what: str) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The examples of a batch along axis 0, for `jax.vmap`, and a function that makes one a batch.

    Every example gets its own PRNG key. `what` is as in `num_examples`.
    """
    size = num_examples(batch, what)
    arrays, shared = _with_examples(batch)
    keys, shared = eqx.partition(shared, is_key)
    keys = jax.tree.map(lambda key: jax.random.split(key, size), keys)

    def alone(example: PyTree) -> PyTree:
        array, key = example
        return eqx.combine(jax.tree.map(lambda x: x[None], array), key, shared)

    return (arrays, keys), alone


def _with_examples(batch: PyTree) -> tuple[PyTree, PyTree]:
    return eqx.partition(batch, lambda x: eqx.is_array(x) and x.ndim > 0)
