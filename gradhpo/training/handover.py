"""From chunk to chunk: which states outlive the next chunk, and which are overwritten."""

from typing import Any

from gradhpo.core.state import BilevelState
from gradhpo.training.chunk import Chunk
from gradhpo.utils.dispatch import copied
from gradhpo.utils.trees import inexact_bytes


_LARGE = 64 * 2**20  # bytes of a state for which callbacks let the device wait


class Handover:
    """What a chunk of a run is given: buffers that it may overwrite.

    The caller's state is copied first, as is a state that callbacks see or that a checkpoint needs,
    and every state if a check within a loss may fail, since the previous one is then returned. No
    other ending needs a copy: after `max_rejections` a chunk leaves its state unchanged, and
    otherwise the chunks in flight are waited for. Without copies a run takes the memory of a
    donated scan. If several processes share the state, each chunk gets a copy: when one of them
    ends the run, the others may learn of it only when the next chunk is under way.
    """

    def __init__(self, state: BilevelState, read: bool, from_host: bool):
        self._keeps = True if read else None  # not known yet
        self._waits = inexact_bytes(state) > _LARGE and not from_host

    @property
    def chunks_in_flight(self) -> int:
        """With two the device never waits. With one, a large state is kept once instead of twice,
        and the device waits for callbacks, which are short compared with a chunk.
        """
        return 1 if self._keeps and self._waits else 2

    def given_up(
        self, given: tuple[Any, ...], settings: tuple[Any, ...], chunk: Chunk, keep: bool
    ) -> tuple[Any, ...]:
        """What the chunk may overwrite. `keep`: the caller still needs what is `given`."""
        if self._keeps is None:
            self._keeps = chunk.may_raise(*given, *settings)
        return copied(given) if keep or self._keeps else given
