"""Iterators: read one chunk at a time, checked batch by batch, and restored on resuming."""

import collections
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from gradhpo.data.buffer import Buffer, Kind, Waiting
from gradhpo.data.loaders import Repeated, is_untouched, seek, state_of
from gradhpo.data.source import Fetched, Source
from gradhpo.utils.conversion import as_array
from gradhpo.utils.description import described, differences
from gradhpo.utils.placement import is_of_several, spread


class FromIterator(Source):
    """An iterator as a source of a run. `per_step` is the inner steps, or `None` for one batch."""

    from_host = True

    def __init__(
        self,
        name: str,
        iterator: Any,
        per_step: int | None,
        sharding: NamedSharding | None = None,
    ):
        self.name, self._iterator, self._per_step = name, iterator, per_step
        self._sharding = sharding  # of one batch
        self._waiting: Waiting | None = None  # until the first batch shows how many fit
        # Handed out and still in use: how many batches of which buffer.
        self._taken: collections.deque[tuple[Buffer, int]] = collections.deque()
        self.failure = None
        # A resumed run can draw the earlier batches again only from an untouched iterator.
        self._untouched = is_untouched(iterator)
        self._drawn = iterator.drawn if isinstance(iterator, Repeated) else 0
        self._position = self._here()
        self._last: PyTree = None  # the batch before that position, to be described

    def draws_like(self, other: Source) -> bool:
        """Whether both draw from the same iterator."""
        return isinstance(other, FromIterator) and self._iterator is other._iterator

    def described(self) -> Any:
        return "an iterator"

    # -- drawing -------------------------------------------------------------------------------

    def bytes_per_step(self) -> int:
        """Size of what one step draws, from a first batch that is kept for later."""
        self._draw(1)
        if self._waiting is None:
            raise self.failure or ValueError(f"{self.name} is an iterator without a single batch")
        return self._waiting.kind.nbytes * (self._per_step or 1)

    def kind(self) -> str:
        return "" if self._waiting is None else str(self._waiting.kind)

    def check_spread(self) -> None:
        if self._sharding is None or self._sharding.is_fully_addressable:
            raise ValueError(
                f"{self.name} yields batches one by one, and the state is shared by several "
                "processes, each of which yields its part of every batch: pass "
                'data_sharding=NamedSharding(mesh, PartitionSpec("data")), with the mesh of the '
                "state, to spread the whole batch; or make an independent state in every process"
            )

    def draw(self, steps: int, *, in_part: bool) -> int:
        self._draw(steps * (self._per_step or 1))
        found = min(steps, self._ahead // (self._per_step or 1))
        if self.failure is not None and found < (1 if in_part else steps):
            raise self.failure
        return found

    def fetch(self, steps: int) -> Fetched:
        lead = (steps,) if self._per_step is None else (steps, self._per_step)
        count = math.prod(lead)
        assert self._waiting is not None  # since something was drawn
        buffer = self._waiting.hand_out(count)
        self._taken.append((buffer, count))
        # An iterator that yielded more than is used, or failed, has a state past its position.
        past = self._ahead or self.failure is not None
        self._position = self._here() | ({"state": None} if past else {})
        self._last = buffer.batch(count - 1)
        values = spread(buffer.stacked(*lead), self._sharding, "data_sharding", before=len(lead))
        return Fetched(values)

    def release_oldest(self) -> None:
        assert self._waiting is not None
        self._waiting.take_back(self._taken.popleft()[0])

    def close(self) -> None:
        if isinstance(self._iterator, Repeated):
            taken = [buffer.batch(i) for buffer, count in self._taken for i in range(count)]
            self._iterator.give_back([*taken, *(self._waiting.batches() if self._waiting else [])])
        self._taken.clear()
        self._waiting = None

    def _draw(self, count: int) -> None:
        while self._ahead < count and self.failure is None:
            try:
                leaves, waiting = self._checked(next(self._iterator))
                waiting.add(leaves, room=count)
                self._drawn += 1
            except StopIteration:
                return
            except Exception as error:
                self.failure = error

    def _checked(self, batch: Any) -> tuple[list[Any], Waiting]:
        """The leaves as arrays, with the same structure, shapes and dtypes as those that wait."""
        which = f"{self.name} (batch {self._drawn})"
        # PyTorch's loader yields lists; a list of arrays is a list of batches elsewhere.
        leaves, structure = jax.tree.flatten(tuple(batch) if type(batch) is list else batch)
        leaves = [as_array(x, which) for x in leaves]
        if any(map(is_of_several, leaves)):
            raise ValueError(
                f"{which} holds an array of several processes: yield only the part of this one; "
                "data_sharding says how the parts make the whole"
            )
        kind = Kind(structure, [x.shape for x in leaves], [x.dtype for x in leaves])
        if self._waiting is None:
            if not leaves:
                raise ValueError(f"{which} holds no array: {batch!r}")
            if any(x.shape[:1] == (0,) for x in leaves):
                raise ValueError(f"{which} is empty: it holds no example, shapes {kind.shapes}")
            self._waiting = Waiting(kind)
        for what, expected, found in zip(_ALIKE, self._waiting.kind, kind, strict=True):
            if found != expected:
                raise ValueError(
                    f"{which} differs from the first in its {what}: {found}, not {expected}. All "
                    f"batches of a compiled step must be alike: {_ALIKE[what]}"
                )
        return leaves, self._waiting

    @property
    def _ahead(self) -> int:
        """How many batches are drawn and not yet handed out."""
        return len(self._waiting) if self._waiting is not None else 0

    # -- resuming ------------------------------------------------------------------------------

    def _here(self) -> dict[str, Any]:
        return {"drawn": self._drawn - self._ahead, "state": state_of(self._iterator)}

    def position(self) -> dict[str, Any]:
        if self._last is not None and self._position["state"] is None:
            self._position["last"], self._last = described(self._last), None
        return self._position

    def check_can_resume(self) -> None:
        if self._position["state"] is None:
            self._check_untouched()

    def _check_untouched(self) -> None:
        if not self._untouched:
            raise ValueError(
                f"{self.name} has been drawn from already, and cannot seek: a run with a "
                "checkpoint draws the earlier batches again when it is resumed, so pass a new "
                "iterator"
            )

    def resume(self, position: dict[str, Any]) -> None:
        """Brings the iterator to a `position`: by seeking, or by drawing what came before."""
        last = position.get("last")
        if position["state"] is not None:
            seek(self._iterator, position["state"])
            self._drawn = position["drawn"]
            if isinstance(self._iterator, Repeated):
                self._iterator.drawn = position["drawn"]
        else:
            self._check_untouched()
            batch = None
            while self._drawn < position["drawn"]:
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    raise ValueError(
                        f"{self.name} ended after {self._drawn} batches, but the resumed run "
                        f"had drawn {position['drawn']}: pass the same data as before"
                    ) from None
                self._drawn += 1
            if batch is not None and differences(last, self._described(batch)):
                raise ValueError(
                    f"batch {self._drawn - 1} of {self.name} is not the batch that the run drew "
                    "before: to resume it, pass an iterator that yields the same batches (a seed)"
                )
        self._position = position

    def _described(self, batch: PyTree) -> Any:
        """What `position` stores about a batch."""
        leaves, waiting = self._checked(batch)
        kept = Buffer(waiting.kind, 1)
        kept.put(0, leaves)
        return described(kept.batch(0))


_ALIKE = {
    "structure": "yield the same pytree every time",
    "shapes": "drop or pad the ragged last batch (drop_last=True in many loaders)",
    "dtypes": "convert all batches to the same one",
}
