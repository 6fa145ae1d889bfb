"""Iterators: read in pieces of one chunk, checked batch by batch, and found again on resuming."""

import collections
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.types import BatchStack, DrawnStack
from gradhpo.data.buffer import Buffer, Kind, Waiting
from gradhpo.data.loaders import Repeated, seek, state_of, touch
from gradhpo.utils.description import described, differences
from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import strong


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
    """An iterator as a source of a run. `per_step` is the inner steps, or `None` for one batch."""

    def __init__(self, name: str, iterator: Any, per_step: int | None):
        self.name, self._iterator, self._per_step = name, iterator, per_step
        self._waiting: Waiting | None = None  # until a first batch says for what there is room
        # Handed out, and not done yet: how many batches of which buffer.
        self._taken: collections.deque[tuple[Buffer, int]] = collections.deque()
        self.failure: Exception | None = None
        # A run that resumes can draw the earlier batches again only from an untouched iterator.
        self._untouched = touch(iterator)
        self._drawn = iterator.drawn if isinstance(iterator, Repeated) else 0
        self._position = self._here()
        self._last: PyTree = None  # batch before that position, to be described

    def same_as(self, other: "Host") -> bool:
        """Whether both draw from one iterator."""
        return self._iterator is other._iterator

    # -- drawing -------------------------------------------------------------------------------

    def bytes_per_step(self) -> int:
        """Size of what one step draws, from a first batch that is kept for later."""
        self._draw(1)
        if self._waiting is None:
            raise self.failure or ValueError(f"{self.name} is an iterator without a single batch")
        return self._waiting.kind.nbytes * (self._per_step or 1)

    def draw(self, steps: int, *, in_part: bool) -> int:
        """Draws what `steps` steps need, and says for how many there are batches.

        What goes wrong is raised once there are none, or with `in_part=False` if one is missing.
        """
        self._draw(steps * (self._per_step or 1))
        found = min(steps, self._ahead // (self._per_step or 1))
        if self.failure is not None and found < (1 if in_part else steps):
            raise self.failure
        return found

    def fetch(self, steps: int) -> Fetched:
        """The batches of the next `steps` steps, which were drawn."""
        lead = (steps,) if self._per_step is None else (steps, self._per_step)
        count = math.prod(lead)
        assert self._waiting is not None  # since something was drawn
        buffer = self._waiting.hand_out(count)
        self._taken.append((buffer, count))
        # The state of an iterator that gave more than is used, or failed, is past its place.
        past = self._ahead or self.failure is not None
        self._position = self._here() | ({"state": None} if past else {})
        self._last = buffer.batch(count - 1)
        return Fetched(buffer.stacked(*lead))

    def settle(self) -> None:
        """The steps of the oldest `fetch` are done, and nothing reads its batches any more."""
        assert self._waiting is not None
        self._waiting.take_back(self._taken.popleft()[0])

    def close(self) -> None:
        """What was drawn and not used goes back, where that is possible."""
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
        """The leaves as arrays, alike in structure, shapes and dtypes to those that wait."""
        which = f"{self.name} (batch {self._drawn})"
        # PyTorch's loader yields lists; a list of arrays is a list of batches elsewhere.
        leaves, structure = jax.tree.flatten(tuple(batch) if type(batch) is list else batch)
        leaves = [_as_array(x, which) for x in leaves]
        kind = Kind(structure, [x.shape for x in leaves], [_native(x.dtype) for x in leaves])
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
                    f"batches of a compiled step are alike: {_ALIKE[what]}"
                )
        return leaves, self._waiting

    @property
    def _ahead(self) -> int:
        """How many batches are drawn, and not handed out yet."""
        return len(self._waiting) if self._waiting is not None else 0

    # -- resuming ------------------------------------------------------------------------------

    def _here(self) -> dict[str, Any]:
        return {"drawn": self._drawn - self._ahead, "state": state_of(self._iterator)}

    def position(self) -> dict[str, Any]:
        """Where the steps handed out so far end, as JSON can hold it."""
        if self._last is not None and self._position["state"] is None:
            self._position["last"], self._last = described(self._last), None
        return self._position

    def check_can_resume(self) -> None:
        """A run that keeps checkpoints begins with an iterator that can be found again."""
        if self._position["state"] is None:
            self._check_untouched()

    def _check_untouched(self) -> None:
        if not self._untouched:
            raise ValueError(
                f"{self.name} has been drawn from already, and cannot seek: a run with a "
                "checkpoint draws the earlier batches again where it is resumed, so give it an "
                "iterator made anew"
            )

    def resume(self, position: dict[str, Any]) -> None:
        """Brings the iterator to a `position`: by seeking, else by drawing what came before."""
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
                        f"{self.name} ended after {self._drawn} batches, and the run that is "
                        f"resumed had drawn {position['drawn']}: pass the same data as before"
                    ) from None
                self._drawn += 1
            if batch is not None and differences(last, self._described(batch)):
                raise ValueError(
                    f"batch {self._drawn - 1} of {self.name} is another one than the run that is "
                    "resumed had drawn: pass an iterator that yields the same batches (its seed)"
                )
        self._position = position

    def _described(self, batch: PyTree) -> Any:
        """What `position` says of a batch."""
        leaves, waiting = self._checked(batch)
        kept = Buffer(waiting.kind, 1)
        kept.put(0, leaves)
        return described(kept.batch(0))


_ALIKE = {
    "structure": "yield the same pytree every time",
    "shapes": "drop or pad the ragged last batch (drop_last=True in many loaders)",
    "dtypes": "convert all batches to the same one",
}


def _native(dtype: Any) -> Any:
    """In the byte order of this machine, which JAX takes all arrays to be in."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _as_array(x: Any, which: str) -> np.ndarray | Array:
    """What a loader yields as an array: tensors of other libraries by way of NumPy."""
    if isinstance(x, jax.Array) and is_key(x):
        return x
    try:
        is_number = isinstance(x, (bool, int, float, complex))
        array = x if isinstance(x, jax.Array) else np.asarray(strong(x) if is_number else x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{which} holds a {type(x).__name__} that is no array: {error}") from error
    if array.dtype.kind not in "biufc" and not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(
            f"{which} holds a {type(x).__name__} with dtype {array.dtype}: a batch is a pytree of "
            "numbers; leave text and objects out, or encode them"
        )
    return array
