"""The one protocol of all sources of batches, and the sources that live on the device.

A run asks a `Source` for the batches of a chunk between two compiled calls; what it gets are
`Batches`, from which the compiled chunk draws.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from gradhpo.core.batches import BatchStack, DrawnStack
from gradhpo.data.arrays import stacked
from gradhpo.utils.conversion import foreign_as_arrays
from gradhpo.utils.description import described
from gradhpo.utils.keys import fold_keys


class Batches(eqx.Module):
    """What a compiled chunk draws from.

    `step` counts the outer steps of the state, `position` those of the chunk, and `count` is the
    number of inner steps of each.
    """

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

    def __call__(self, index: Array) -> PyTree:
        batch = self.function(index)
        batch = tuple(batch) if type(batch) is list else batch
        return foreign_as_arrays(batch, "a batch that the function of the index returned")

    def batch(self, step: Array, position: Array) -> PyTree:
        return self(step)

    def stack(self, step: Array, position: Array, count: int) -> PyTree:
        return stacked(self, step * count, count)

    def drawn(self, step: Array, position: Array, count: int) -> DrawnStack:
        return DrawnStack(lambda t: self(step * count + t))


class Fixed(Batches):
    """One batch for all steps; PRNG keys in it are folded with the step."""

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
    """Where the batches of a run come from; by default from the device, without end or failure."""

    from_host = False
    failure: Exception | None = None
    """What went wrong in drawing."""

    @abc.abstractmethod
    def fetch(self, steps: int) -> Batches:
        """The batches of the next `steps` steps, for which `draw` said that there are some."""

    @abc.abstractmethod
    def described(self) -> Any:
        """What tells these data from others, as far as that can be told, as JSON can hold it."""

    def bytes_per_step(self) -> int:
        """Host memory that the batches of one step take."""
        return 0

    def draw(self, steps: int, *, in_part: bool) -> int:
        """Draws what `steps` steps need, and says for how many there are batches.

        What goes wrong is raised once there are none, or with `in_part=False` if one is missing.
        """
        return steps

    # Empty, and not abstract: a source on the device has nothing to do there.

    def release_oldest(self) -> None:  # noqa: B027
        """The steps of the oldest `fetch` are done: nothing reads its batches any more."""

    def close(self) -> None:  # noqa: B027
        """What was drawn and not used goes back, where that is possible."""

    def position(self) -> dict[str, Any] | None:
        """Where the steps handed out so far end, as JSON can hold it; `None` if nothing moves."""
        return None

    def check_can_resume(self) -> None:  # noqa: B027
        """A run that keeps checkpoints begins with a source that can be found again."""

    def resume(self, position: dict[str, Any]) -> None:  # noqa: B027
        """Brings the source to a `position`."""

    def draws_like(self, other: "Source") -> bool:
        """Whether what one draws is missing in the other."""
        return False


class OnDevice(Source):
    """A source whose batches a compiled chunk makes by itself."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def fetch(self, steps: int) -> Batches:
        return self._batches

    def described(self) -> Any:
        return described(self._batches)
