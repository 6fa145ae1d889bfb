"""Training data that can be read again: the same batches on the way forward and back.

A replay asks for the batches of one segment after another, in either direction.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from gradhpo.data.iterators import FromIterator
from gradhpo.data.loaders import Repeated, iterate
from gradhpo.data.source import Batches, Source
from gradhpo.data.sources import as_source
from gradhpo.utils.conversion import is_container, is_convertible
from gradhpo.utils.description import differences
from gradhpo.utils.processes import check_alike, together


_NAME = "train_data"
_DIFFERS = (
    f"batch {{}} of {_NAME} differs on the way back from the way forward: a replay needs the same "
    "batches in every pass, so pass a loader that shuffles with a fixed seed, or gradhpo.ArrayData"
)


class Part(eqx.Module):
    """The batches of a segment: inner step t of it has batch number `first + t` of these.

    `per_step` is how many of them belong to one outer step.
    """

    batches: Batches
    first: Array
    per_step: int = eqx.field(static=True)


class Passes(abc.ABC):
    """A source of training batches that can be read again."""

    source: Source
    """What distinguishes these data from others."""

    @abc.abstractmethod
    def part(self, start: int, length: int) -> Part:
        """The batches of inner steps `start`, `start + 1`, ...; ends the use of the last part."""

    # Only a loader has positions.

    def positions(self) -> Any:
        """Where the parts that were drawn begin and end, as JSON can hold it."""
        return None

    def resume(self, positions: Any) -> None:  # noqa: B027
        """Continues from the `positions` of an earlier call."""


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
    """A loader: every part that does not follow the last one gets a new iterator.

    If several processes have the state `shared`, each reads its part of every batch.
    """

    def __init__(self, loader: Any, sharding: NamedSharding | None = None, shared: bool = False):
        self._loader, self._sharding, self._shared = loader, sharding, shared
        self._reading = _Reading(self._begun(), 0)
        self._positions: dict[str, Any] = {"0": self._reading.source.position()}
        self.source = self._reading.source
        if shared:
            self.source.check_spread()

    def _begun(self) -> FromIterator:
        return FromIterator(_NAME, iterate(self._loader), 1, self._sharding)

    def part(self, start: int, length: int) -> Part:
        is_first = not self.source.kind()
        with together(self._shared):
            source = self._drawn(start, length)
        if self._shared and is_first:
            check_alike(train_data=source.kind())
        with together(self._shared):
            batches = source.fetch(length)
            self._reading = _Reading(source, start + length)
            self._note(str(start + length), source.position())
        return Part(batches, jnp.asarray(0), 1)

    def _drawn(self, start: int, length: int) -> FromIterator:
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
        return source

    def _note(self, end: str, position: dict[str, Any]) -> None:
        """The last batch of each part exposes a loader that draws other batches the next time."""
        before = self._positions.setdefault(end, position)
        found, expected = position.get("last"), before.get("last")
        if found is not None and expected is not None and differences(expected, found):
            raise ValueError(_DIFFERS.format(int(end) - 1))

    def positions(self) -> dict[str, Any]:
        return self._positions

    def resume(self, positions: dict[str, Any]) -> None:
        self._positions = positions


def as_passes(
    data: Any, per_step: int, sharding: NamedSharding | None = None, shared: bool = False
) -> Passes:
    """The kind of source for training data; `per_step`: inner steps in an outer one.

    `sharding`: of one batch; `None` leaves the arrays where they are. If several processes have the
    state `shared`, a loader yields the part of each.
    """
    if isinstance(data, Repeated):
        return ByLoader(_unread(data.loader, data), sharding, shared)
    if hasattr(data, "__next__"):
        raise TypeError(_ON_ITERATOR.format(type(data).__name__))
    is_data = is_container(data) or is_convertible(data) or callable(data)
    if hasattr(data, "__iter__") and not (is_data or isinstance(data, (str, bytes))):
        return ByLoader(_unread(data, data), sharding, shared)
    return ByNumber(as_source(data, _NAME, per_step, sharding), per_step)


_ON_ITERATOR = (
    f"{_NAME} is a {{}}, an iterator, which can be read only once, but its batches are needed "
    "again: pass gradhpo.ArrayData, a function index -> batch, or the loader itself, which "
    "iter(loader) can read again"
)


def _unread(loader: Any, given: Any) -> Any:
    """The loader, whose new iterators begin with the first batch."""
    if hasattr(loader, "__next__"):
        raise TypeError(_ON_ITERATOR.format(type(loader).__name__))
    if isinstance(given, Repeated) and given.drawn:
        raise ValueError(
            f"{_NAME} has been drawn from already, but a replay begins with its first batch: pass "
            "a new gradhpo.iterate(loader), or the loader itself"
        )
    return loader
