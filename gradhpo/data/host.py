"""Iterators: read in pieces of one chunk, checked batch by batch, and found again on resuming."""

import collections
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.types import BatchStack, DrawnStack
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
        self._ahead: list[PyTree] = []  # drawn, and not handed out yet
        self._taken: collections.deque[list[PyTree]] = collections.deque()  # and not done yet
        self.failure: Exception | None = None
        self._kind: Any = None
        # A run that resumes can draw the earlier batches again only from an untouched iterator.
        self._untouched = touch(iterator)
        self._drawn = iterator.drawn if isinstance(iterator, Repeated) else 0
        self._position = self._here()

    def same_as(self, other: "Host") -> bool:
        """Whether both draw from one iterator."""
        return self._iterator is other._iterator

    # -- drawing -------------------------------------------------------------------------------

    def bytes_per_step(self) -> int:
        """Size of what one step draws, from a first batch that is kept for later."""
        self._draw(1)
        if not self._ahead and self.failure is not None:
            raise self.failure
        if not self._ahead:
            raise ValueError(f"{self.name} is an iterator without a single batch")
        size = sum(x.nbytes for x in jax.tree.leaves(self._ahead[0]))
        return size * (self._per_step or 1)

    def draw(self, steps: int, *, in_part: bool) -> int:
        """Draws what `steps` steps need, and says for how many there are batches.

        What goes wrong is raised once there are none, or with `in_part=False` if one is missing.
        """
        self._draw(steps * (self._per_step or 1))
        found = min(steps, len(self._ahead) // (self._per_step or 1))
        if self.failure is not None and found < (1 if in_part else steps):
            raise self.failure
        return found

    def fetch(self, steps: int) -> Fetched:
        """The batches of the next `steps` steps, which were drawn."""
        count = steps * (self._per_step or 1)
        batches, self._ahead = self._ahead[:count], self._ahead[count:]
        # Only one that takes them back needs them again.
        self._taken.append(batches if isinstance(self._iterator, Repeated) else [])
        # The state of an iterator that gave more than is used, or failed, is past its place.
        past = self._ahead or self.failure is not None
        self._position = self._here() | ({"state": None} if past else {})
        self._position["last"] = described(batches[-1])
        return Fetched(jax.tree.map(lambda *leaves: self._stacked(leaves, steps), *batches))

    def settle(self) -> None:
        """The steps of the oldest `fetch` are done."""
        self._taken.popleft()

    def close(self) -> None:
        """What was drawn and not used goes back, where that is possible."""
        if isinstance(self._iterator, Repeated):
            self._iterator.give_back([*itertools.chain(*self._taken), *self._ahead])
        self._taken.clear()
        self._ahead = []

    def _draw(self, count: int) -> None:
        while len(self._ahead) < count and self.failure is None:
            try:
                batch = self._checked(next(self._iterator))
                self._drawn += 1
                self._ahead.append(batch)
            except StopIteration:
                return
            except Exception as error:
                self.failure = error

    def _checked(self, batch: PyTree) -> PyTree:
        """The batch as arrays, alike in structure, shapes and dtypes to those before it."""
        which = f"{self.name} (batch {self._drawn})"
        # PyTorch's loader yields lists; a list of arrays is a list of batches elsewhere.
        batch = tuple(batch) if type(batch) is list else batch
        batch = jax.tree.map(lambda x: _as_array(x, which), batch)
        leaves, treedef = jax.tree.flatten(batch)
        kind = treedef, [x.shape for x in leaves], [x.dtype for x in leaves]
        if self._kind is None:
            if not leaves:
                raise ValueError(f"{which} holds no array: {batch!r}")
            if any(x.shape[:1] == (0,) for x in leaves):
                raise ValueError(f"{which} is empty: it holds no example, shapes {kind[1]}")
            self._kind = kind
        for what, expected, found in zip(_ALIKE, self._kind, kind, strict=True):
            if found != expected:
                raise ValueError(
                    f"{which} differs from the first in its {what}: {found}, not {expected}. All "
                    f"batches of a compiled step are alike: {_ALIKE[what]}"
                )
        return batch

    def _stacked(self, leaves: tuple, steps: int) -> np.ndarray | Array:
        # PRNG keys have no NumPy form.
        stacked = jnp.stack(leaves) if is_key(leaves[0]) else np.stack(leaves)
        lead = (steps,) if self._per_step is None else (steps, self._per_step)
        return stacked.reshape(*lead, *stacked.shape[1:])

    # -- resuming ------------------------------------------------------------------------------

    def _here(self) -> dict[str, Any]:
        return {"drawn": self._drawn - len(self._ahead), "state": state_of(self._iterator)}

    def position(self) -> dict[str, Any]:
        """Where the steps handed out so far end, as JSON can hold it."""
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
            if batch is not None and differences(last, described(self._checked(batch))):
                raise ValueError(
                    f"batch {self._drawn - 1} of {self.name} is another one than the run that is "
                    "resumed had drawn: pass an iterator that yields the same batches (its seed)"
                )
        self._position = position


_ALIKE = {
    "structure": "yield the same pytree every time",
    "shapes": "drop or pad the ragged last batch (drop_last=True in many loaders)",
    "dtypes": "convert all batches to the same one",
}


def _as_array(x: Any, which: str) -> np.ndarray | Array:
    """What a loader yields as an array: tensors of other libraries by way of NumPy."""
    if is_key(x):
        return x
    try:
        is_number = isinstance(x, (bool, int, float, complex))
        # A copy: some loaders fill the same buffer again.
        array = x if isinstance(x, jax.Array) else np.array(strong(x) if is_number else x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{which} holds a {type(x).__name__} that is no array: {error}") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(
            f"{which} holds a {type(x).__name__} with dtype {array.dtype}: a batch is a pytree of "
            "numbers; leave text and objects out, or encode them"
        )
    return array
