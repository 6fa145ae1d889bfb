"""From chunk to chunk: which states outlive the chunk behind them, and which are written over."""

from typing import Any

from gradhpo.core.state import BilevelState
from gradhpo.training.chunk import Chunk
from gradhpo.utils.dispatch import copied
from gradhpo.utils.trees import inexact_bytes


_LARGE = 64 * 2**20  # bytes of a state for which callbacks let the device wait


class Handover:
    """What a chunk of a run is given: buffers that it may write over.

    The caller's state is copied first, as is one that callbacks see or a checkpoint is due of, and
    every state if a check within a loss may fail, since the one before is returned then. No other
    ending needs a copy: behind `max_rejections` a chunk leaves its state as it is, and otherwise
    the chunks in flight are waited for. Without copies a run takes the memory of a donated scan.
    Where several processes share the state, each chunk gets a copy: what ends the run in one of
    them, the others hear of when the next chunk may be under way.
    """

    def __init__(self, state: BilevelState, read: bool, from_host: bool):
        self._keeps = True if read else None  # not known yet
        self._waits = inexact_bytes(state) > _LARGE and not from_host

    @property
    def chunks_in_flight(self) -> int:
        """With two the device never waits. With one, a large state is kept once instead of twice,
        and the device waits for callbacks, which takes a short time beside a chunk.
        """
        return 1 if self._keeps and self._waits else 2

    def given_up(
        self, given: tuple[Any, ...], settings: tuple[Any, ...], chunk: Chunk, keep: bool
    ) -> tuple[Any, ...]:
        """What the chunk may write over. `keep`: the caller still needs what is `given`."""
        if self._keeps is None:
            self._keeps = chunk.may_raise(*given, *settings)
        return copied(given) if keep or self._keeps else given
