"""The one protocol of all sources of batches, and the sources that live on the device.

A run asks a `Source` for the batches of a chunk between two compiled calls. It gets `Batches`, from
which the compiled chunk draws.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from gradhpo.core.batches import BatchStack, DrawnStack
from gradhpo.data.arrays import ArrayData, stacked
from gradhpo.data.folds import Folds
from gradhpo.utils.conversion import foreign_as_arrays
from gradhpo.utils.description import described, described_arrays
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.placement import spread


class Batches(eqx.Module):
    """What a compiled chunk draws from.

    `step` counts the outer steps of the state, `position` the ones since the chunk began, and
    `count` is the number of inner steps in each.
    """

    repeats = False
    """Whether all steps get the same batch."""

    @abc.abstractmethod
    def batch(self, step: Array, position: Array) -> PyTree:
        """One batch for an outer step."""

    @abc.abstractmethod
    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        """What `step` takes: a `BatchStack`, or one batch for all inner steps."""

    @abc.abstractmethod
    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        """All batches from an outer step on, each made where it is used."""


class Generated(Batches):
    """A traceable `index -> batch`."""

    function: Callable
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __call__(self, index: Array) -> PyTree:
        batch = self.function(index)
        batch = tuple(batch) if type(batch) is list else batch
        batch = foreign_as_arrays(batch, "a batch that the function of the index returned")
        return spread(batch, self.sharding, "data_sharding")

    def batch(self, step: Array, position: Array) -> PyTree:
        return self(step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return stacked(self, step * count, count)

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self(step * count + t))


class Fixed(Batches):
    """One batch for all steps; PRNG keys in it are folded with the step."""

    repeats = True
    value: PyTree

    def batch(self, step: Array, position: Array) -> PyTree:
        return fold_keys(self.value, step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return self.batch(step, position)

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self.batch(step + t // count, position), shared_by=count)


class Fetched(Batches):
    """Batches of a chunk that came from the host, `[steps, ...]` or `[steps, inner, ...]`."""

    values: PyTree

    def batch(self, step: Array, position: Array) -> PyTree:
        return jax.tree.map(lambda x: x[position], self.values)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return BatchStack(self.batch(step, position))

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        of_step = lambda t: self.batch(step, position + t // count)
        return DrawnStack(lambda t: jax.tree.map(lambda x: x[t % count], of_step(t)))


class Source(abc.ABC):
    """Where the batches of a run come from; by default the device, without end or failure."""

    from_host = False
    failure: Exception | None = None
    """The error while drawing."""

    @abc.abstractmethod
    def fetch(self, steps: int) -> Batches:
        """The batches of the next `steps` steps, which `draw` has confirmed to exist."""

    @abc.abstractmethod
    def described(self) -> Any:
        """What distinguishes these data from others, as far as possible, as JSON can hold it."""

    def example(self) -> PyTree:
        """The first batch, or `None` if it can only be drawn."""
        return None

    def bytes_per_step(self) -> int:
        """Host memory that the batches of one step take."""
        return 0

    def kind(self) -> str:
        """The structure, shapes and dtypes of drawn batches, or nothing."""
        return ""

    def draw(self, steps: int, *, in_part: bool) -> int:
        """Draws what `steps` steps need, and returns for how many steps there are batches.

        An error is raised once there are none, or with `in_part=False` if one is missing.
        """
        return steps

    # Empty, not abstract: a source on the device has nothing to do there.

    def release_oldest(self) -> None:  # noqa: B027
        """The steps of the oldest `fetch` are done: nothing reads its batches any more."""

    def close(self) -> None:  # noqa: B027
        """Returns batches that were drawn and not used, if possible."""

    def position(self) -> dict[str, Any] | None:
        """Where the steps handed out so far end, as JSON can hold it; `None` if nothing moves."""
        return None

    def check_can_resume(self) -> None:  # noqa: B027
        """Checks that the source can be restored, as a run that keeps checkpoints needs."""

    def check_spread(self) -> None:  # noqa: B027
        """Checks that the source places its batches, as a state of several processes needs."""

    def resume(self, position: dict[str, Any]) -> None:  # noqa: B027
        """Brings the source to a `position`."""

    @property
    def num_examples(self) -> int | None:
        """The total number of examples, or `None` if it is unknown."""
        return None

    def draws_like(self, other: "Source") -> bool:
        """Whether drawing from one takes batches away from the other."""
        return False


class OnDevice(Source):
    """A source whose batches a compiled chunk makes by itself."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def fetch(self, steps: int) -> Batches:
        return self._batches

    def example(self) -> PyTree:
        here = jnp.zeros((), jnp.int32)
        return self._batches.batch(here, here)

    def described(self) -> Any:
        found = described(self._batches)
        if isinstance(self._batches, Generated) and not isinstance(
            self._batches.function, ArrayData
        ):
            found["batches"] = described_arrays(_some_of(self._batches))
        return found

    @property
    def num_examples(self) -> int | None:
        batches = self._batches
        if isinstance(batches, Generated) and isinstance(batches.function, ArrayData):
            return batches.function.num_examples
        if isinstance(batches, Fixed) and isinstance(batches.value, Folds):
            return batches.value.num_examples
        arrays = [x for x in jax.tree.leaves(batches) if eqx.is_array(x) and not is_key(x)]
        lengths = {x.shape[0] if x.ndim else None for x in arrays}
        # A single array may be anything; several of one length are examples with their labels.
        are_examples = isinstance(batches, Fixed) and len(arrays) > 1 and len(lengths) == 1
        return lengths.pop() if are_examples else None


@compiled
def _some_of(function: Generated) -> dict[str, PyTree]:
    """Enough to recognise another function; an `ArrayData` is recognised by its arrays."""
    return {f"batch {i}": function(jnp.asarray(i, jnp.int32)) for i in (0, 1, 1_000)}
