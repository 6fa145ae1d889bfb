"""Both sources of a run together: what each chunk gets, and where they stand."""

from typing import Any

from gradhpo.data.host import Host
from gradhpo.data.sources import Source
from gradhpo.utils.description import described


# Batches of an iterator wait, those of two chunks; more than this would only cost memory.
_MOST_BYTES_FETCHED = 64 * 2**20


class Feed:
    """The training and the validation source of a run."""

    def __init__(self, train: Source, val: Source):
        if isinstance(train, Host) and isinstance(val, Host) and train.same_as(val):
            raise ValueError(
                "train_data and val_data are one and the same iterator: which batch goes where "
                "would depend on chunk_size; pass two"
            )
        self._sources = {"train_data": train, "val_data": val}
        self._hosts = {
            name: source for name, source in self._sources.items() if isinstance(source, Host)
        }

    @property
    def from_host(self) -> bool:
        """Whether any of the two is an iterator."""
        return bool(self._hosts)

    def affordable(self, chunk_size: int) -> int:
        """The size of a chunk whose batches do not take too much memory."""
        needed = sum(host.bytes_per_step() for host in self._hosts.values())
        return max(1, min(chunk_size, _MOST_BYTES_FETCHED // max(needed, 1)))

    def take(self, steps: int, multiple: int, *, in_part: bool) -> tuple[Any, Any, int]:
        """What a chunk of up to `steps` steps sees of each, and how many steps that are.

        Fewer where an iterator has ended, or (`in_part`) before one that has failed.
        """
        found = [host.draw(steps, in_part=in_part) for host in self._hosts.values()]
        taken = min([steps, *found])
        taken -= taken % multiple
        if taken == 0:
            return None, None, 0
        train, val = (
            source.fetch(taken) if isinstance(source, Host) else source
            for source in self._sources.values()
        )
        return train, val, taken

    @property
    def failure(self) -> Exception | None:
        """What went wrong in drawing."""
        return next((h.failure for h in self._hosts.values() if h.failure is not None), None)

    def settle(self) -> None:
        """The chunk that was taken first is done."""
        for host in self._hosts.values():
            host.settle()

    def close(self) -> None:
        """What was drawn and not used goes back, where that is possible."""
        for host in self._hosts.values():
            host.close()

    def described(self) -> dict[str, Any]:
        """What tells the data of a run from other data, as far as that can be told."""
        return {
            name: "an iterator" if isinstance(source, Host) else described(source)
            for name, source in self._sources.items()
        }

    def positions(self) -> dict[str, Any]:
        """Where the iterators are, for a checkpoint."""
        return {name: host.position() for name, host in self._hosts.items()}

    def check_can_resume(self) -> None:
        for host in self._hosts.values():
            host.check_can_resume()

    def resume(self, positions: dict[str, Any]) -> None:
        for name, host in self._hosts.items():
            host.resume(positions[name])
