"""Training data that can be read again: the same batches on the way forward and back.

A replay asks for the batches of one segment after another, in either direction.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from gradhpo.data.iterators import FromIterator
from gradhpo.data.loaders import Repeated, iterate
from gradhpo.data.source import Batches, Source
from gradhpo.data.sources import as_source
from gradhpo.utils.conversion import is_container, is_convertible
from gradhpo.utils.description import differences


_NAME = "train_data"
_DIFFERS = (
    f"batch {{}} of {_NAME} differs on the way back from what it was on the way forward: a replay "
    "needs the same batches in every pass, so pass a loader that shuffles by a seed of its own, or "
    "gradhpo.ArrayData"
)


class Part(eqx.Module):
    """The batches of a segment: inner step t of it has batch number `first + t` of these.

    `per_step` is how many of them belong to one outer step.
    """

    batches: Batches
    first: Array
    per_step: int = eqx.field(static=True)


class Passes(abc.ABC):
    """A source of training batches that can be gone through again."""

    source: Source
    """For what distinguishes these data from others."""

    @abc.abstractmethod
    def part(self, start: int, length: int) -> Part:
        """The batches of the inner steps `start`, `start + 1`, ...; the last part is done with."""

    # Only a loader has positions.

    def positions(self) -> Any:
        """Where the parts that were drawn begin and end, as JSON can hold it."""
        return None

    def resume(self, positions: Any) -> None:  # noqa: B027
        """Goes on from the `positions` of an earlier call."""


class ByNumber(Passes):
    """A function of the index, or one batch for all steps."""

    def __init__(self, source: Source, per_step: int):
        self.source, self._per_step = source, per_step

    def part(self, start: int, length: int) -> Part:
        return Part(self.source.fetch(length), jnp.asarray(start), self._per_step)


class _Reading(NamedTuple):
    """A pass through the loader, and the step that it is at."""

    source: FromIterator
    at: int


class ByLoader(Passes):
    """A loader, of which a new iterator is made for every part that does not follow the last."""

    def __init__(self, loader: Any):
        self._loader = loader
        self._reading = _Reading(self._begun(), 0)
        self._positions: dict[str, Any] = {"0": self._reading.source.position()}
        self.source = self._reading.source

    def _begun(self) -> FromIterator:
        return FromIterator(_NAME, iterate(self._loader), 1)

    def part(self, start: int, length: int) -> Part:
        source, at = self._reading
        if at == start and start > 0:
            source.release_oldest()
        elif at != start:
            source = self._begun()
            try:
                source.resume(dict(self._positions[str(start)]))
            except ValueError as error:
                raise ValueError(_DIFFERS.format(start - 1)) from error
        if source.draw(length, in_part=False) < length:
            raise ValueError(f"{_NAME} is a loader without a single batch")
        batches = source.fetch(length)
        self._reading = _Reading(source, start + length)
        self._note(str(start + length), source.position())
        return Part(batches, jnp.asarray(0), 1)

    def _note(self, end: str, position: dict[str, Any]) -> None:
        """A loader that draws other batches the next time is found out by the last of each part."""
        before = self._positions.setdefault(end, position)
        found, expected = position.get("last"), before.get("last")
        if found is not None and expected is not None and differences(expected, found):
            raise ValueError(_DIFFERS.format(int(end) - 1))

    def positions(self) -> dict[str, Any]:
        return self._positions

    def resume(self, positions: dict[str, Any]) -> None:
        self._positions = positions


def as_passes(data: Any, per_step: int, shared: bool = False) -> Passes:
    """The kind of source for training data; `per_step`: inner steps in an outer one.

    If several processes have the state `shared`, batches come by their number.
    """
    if shared and hasattr(data, "__iter__") and not is_container(data):
        raise ValueError(
            f"{_NAME} is a {type(data).__name__}, and the state is shared by several processes: "
            "a replay takes batches by their number there, from gradhpo.ArrayData of arrays that "
            "all processes share or from a function index -> batch"
        )
    if isinstance(data, Repeated):
        return _of_loader(data.loader, data)
    if hasattr(data, "__next__"):
        raise TypeError(_ON_ITERATOR.format(type(data).__name__))
    is_data = is_container(data) or is_convertible(data) or callable(data)
    if hasattr(data, "__iter__") and not (is_data or isinstance(data, (str, bytes))):
        return _of_loader(data, data)
    return ByNumber(as_source(data, _NAME, per_step), per_step)


_ON_ITERATOR = (
    f"{_NAME} is a {{}}, an iterator, which can be gone through once, and its batches are needed "
    "again: pass gradhpo.ArrayData, a function index -> batch, or the "
    "loader itself, from which iter(loader) makes a new iterator every time"
)


def _of_loader(loader: Any, given: Any) -> ByLoader:
    if hasattr(loader, "__next__"):
        raise TypeError(_ON_ITERATOR.format(type(loader).__name__))
    if isinstance(given, Repeated) and given.drawn:
        raise ValueError(
            f"{_NAME} has been drawn from already, and a replay begins with its first batch: pass "
            "gradhpo.iterate(loader) made anew, or the loader itself"
        )
    return ByLoader(loader)
