"""Buffers on the host, where batches wait and the device reads them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradhpo.utils.keys import is_key


class Kind(NamedTuple):
    """What all batches of an iterator have in common."""

    structure: Any
    shapes: list[tuple[int, ...]]
    dtypes: list[Any]

    def __str__(self) -> str:
        pairs = zip(self.dtypes, self.shapes, strict=True)
        arrays = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in pairs)
        return f"batches {self.structure} of {arrays}"

    @property
    def nbytes(self) -> int:
        """Size of one batch."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)


class Buffer:
    """Room for `size` batches."""

    def __init__(self, kind: Kind, size: int):
        self.size, self._structure = size, kind.structure
        self._rows = [
            # PRNG keys have no NumPy form.
            [None] * size if jnp.issubdtype(dtype, jax.dtypes.prng_key) else _aligned(
                (size, *shape), dtype
            )
            for shape, dtype in zip(kind.shapes, kind.dtypes, strict=True)
        ]  # fmt: skip

    def put(self, place: int, leaves: Sequence[Any]) -> None:
        """Writes a batch."""
        for rows, leaf in zip(self._rows, leaves, strict=True):
            rows[place] = leaf

    def leaves(self, place: int) -> list[Any]:
        """The leaves of a batch: views, unless they are keys."""
        return [rows[place] for rows in self._rows]

    def batch(self, place: int) -> Any:
        """A copy of a batch."""
        leaves = [x if is_key(x) else np.array(x) for x in self.leaves(place)]
        return jax.tree.unflatten(self._structure, leaves)

    def stacked(self, *lead: int) -> Any:
        """The first batches as one, with these leading axes: views again."""
        leaves = [_reshaped(rows[: math.prod(lead)], lead) for rows in self._rows]
        return jax.tree.unflatten(self._structure, leaves)


class Waiting:
    """Batches that are drawn and not yet handed out.

    Each is copied once, to where the device will read it, because some loaders reuse the same
    arrays.
    """

    def __init__(self, kind: Kind):
        self.kind = kind
        self._buffer, self._count = Buffer(kind, 1), 0
        self._free: list[Buffer] = []

    def __len__(self) -> int:
        return self._count

    def add(self, leaves: Sequence[Any], room: int) -> None:
        """Appends a batch, to a buffer with room for `room` batches."""
        if self._buffer.size < room:
            self._move(self._buffer, range(self._count), room)
        self._buffer.put(self._count, leaves)
        self._count += 1

    def hand_out(self, count: int) -> Buffer:
        """A buffer that starts with the first `count` batches. The others keep waiting."""
        out = self._buffer
        self._move(out, range(count, self._count), max(1, self._count - count))
        return out

    def take_back(self, buffer: Buffer) -> None:
        """A buffer that nothing reads any more, to be reused."""
        self._free.append(buffer)

    def batches(self) -> list[Any]:
        """All of the waiting batches."""
        return [self._buffer.batch(place) for place in range(self._count)]

    def _move(self, old: Buffer, places: range, size: int) -> None:
        self._free = [buffer for buffer in self._free if buffer.size >= size]
        new = self._free.pop() if self._free else Buffer(self.kind, size)
        for number, place in enumerate(places):
            new.put(number, old.leaves(place))
        # Last of all, so that an interrupt finds either buffer complete.
        self._buffer, self._count = new, len(places)


def _reshaped(rows: Any, lead: tuple[int, ...]) -> np.ndarray | Array:
    stacked = jnp.stack(rows) if is_key(rows[0]) else rows
    return stacked.reshape(*lead, *stacked.shape[1:])


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA can read in place on a CPU, which needs 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
