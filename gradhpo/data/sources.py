"""The sources of a run: the kind of each, and both of them together."""

import inspect
from typing import Any

import jax
from jax.sharding import NamedSharding

from gradhpo.core.batches import BatchStack, DataBatch
from gradhpo.data.arrays import ArrayData, on_device, with_key_beside
from gradhpo.data.functions import check_function
from gradhpo.data.iterators import FromIterator
from gradhpo.data.source import Batches, Fixed, Generated, OnDevice, Source
from gradhpo.utils.conversion import is_container, is_convertible
from gradhpo.utils.placement import spread


# Batches of an iterator wait, for two chunks; more than this would only cost memory.
_MOST_BYTES_FETCHED = 64 * 2**20


def as_source(
    data: Any, name: str, per_step: int | None, sharding: NamedSharding | None = None
) -> Source:
    """The kind of source for these data. `per_step`: inner steps, or `None` for one batch.

    `sharding`: of one batch; `None` leaves the arrays where they are.
    """
    if isinstance(data, list) or (
        isinstance(data, tuple) and any(isinstance(x, (DataBatch, dict)) for x in data)
    ):
        raise TypeError(_on_list(data, name))
    if inspect.isgeneratorfunction(data):
        raise TypeError(f"{name} is a generator function; call it: {name}={data.__name__}()")
    if hasattr(data, "__next__"):
        return FromIterator(name, data, per_step, sharding)
    if isinstance(data, BatchStack):
        raise TypeError(f"{name} is a BatchStack, which serves one step; pass gradhpo.ArrayData")
    if isinstance(data, ArrayData):
        data = with_key_beside(data)
    if isinstance(data, ArrayData) and data.is_whole:
        # The same at every step: no stack of copies.
        return OnDevice(Fixed(spread(data(0), sharding, "data_sharding")))
    if callable(data):
        if not isinstance(data, ArrayData):
            check_function(data, name)
        return OnDevice(Generated(data, sharding))
    for where, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not is_convertible(leaf):
            raise TypeError(_on_foreign(leaf, name, jax.tree_util.keystr(where)))
    return OnDevice(Fixed(spread(on_device(data, name), sharding, "data_sharding")))


def _on_list(data: list | tuple, name: str) -> str:
    """Whether its items are batches, or the arrays of one, only the user can tell."""
    if any(map(is_container, data)):
        return (
            f"{name} is a {type(data).__name__} of {len(data)} items: pass gradhpo.iterate({name}) "
            "to draw its batches in turn, gradhpo.ArrayData(arrays, batch_size, key) to draw "
            "mini-batches of arrays, or a tuple of arrays for one fixed batch"
        )
    return (
        f"{name} is a list of {len(data)} arrays: pass gradhpo.ArrayData(tuple({name}), batch_size,"
        f" key) to draw mini-batches of them, tuple({name}) for one fixed batch of them all; only "
        f"if each is a batch by itself, gradhpo.iterate({name})"
    )


def _on_foreign(leaf: Any, name: str, where: str) -> str:
    what = type(leaf).__name__
    # Text can be iterated over, by letters.
    is_loader = hasattr(leaf, "__iter__") and not isinstance(leaf, (str, bytes))
    if where:
        hint = "; a loader is passed by itself, gradhpo.iterate(loader)" if is_loader else ""
        found = f"{name}{where} is a {what}, which is not an array"
        return f"{found}: a batch is a pytree of arrays{hint}"
    hint = (
        f"wrap it: gradhpo.iterate({name})"
        if is_loader
        else "pass gradhpo.ArrayData, a function index -> batch, an iterator, or one fixed batch"
    )
    return f"{name} is a {what}, which is not a source of batches; {hint}"


class Feed:
    """The training and the validation source of a run."""

    def __init__(self, train: Source, val: Source):
        if train.draws_like(val):
            raise ValueError(
                "train_data and val_data are the same iterator: which batch goes where would "
                "depend on chunk_size; pass two"
            )
        self._train, self._val = train, val
        self._sources = {"train_data": train, "val_data": val}

    @property
    def from_host(self) -> bool:
        """Whether either of the two is an iterator."""
        return self._train.from_host or self._val.from_host

    @property
    def val_examples(self) -> int | None:
        """How many validation examples there are, if that is known."""
        return self._val.num_examples

    def affordable(self, chunk_size: int) -> int:
        """A chunk size whose batches do not take too much memory."""
        needed = self._train.bytes_per_step() + self._val.bytes_per_step()
        return max(1, min(chunk_size, _MOST_BYTES_FETCHED // max(needed, 1)))

    def draw(self, steps: int, multiple: int, *, in_part: bool) -> int:
        """Draws what a chunk of up to `steps` steps needs; for how many there are batches."""
        taken = min(source.draw(steps, in_part=in_part) for source in self._sources.values())
        return taken - taken % multiple

    def draw_chunk(
        self, steps: int, multiple: int, *, in_part: bool
    ) -> tuple[Batches, Batches, int] | None:
        """What a chunk of up to `steps` steps gets from each source, and for how many steps.

        Fewer if an iterator has ended, or (`in_part`) before one that has failed; `None` for less
        than `multiple` of them.
        """
        taken = self.draw(steps, multiple, in_part=in_part)
        return (self._train.fetch(taken), self._val.fetch(taken), taken) if taken else None

    @property
    def failure(self) -> Exception | None:
        """The error while drawing."""
        return self._train.failure or self._val.failure

    def release_oldest(self) -> None:
        """The chunk that was drawn first is done."""
        for source in self._sources.values():
            source.release_oldest()

    def close(self) -> None:
        """Returns batches that were drawn and not used, if possible."""
        for source in self._sources.values():
            source.close()

    def check_spread(self) -> None:
        """If several processes share the state, each has a part of every batch."""
        for source in self._sources.values():
            source.check_spread()

    def kinds(self) -> dict[str, str]:
        """What the batches of iterators have in common, from the first one."""
        return {name: source.kind() for name, source in self._sources.items()}

    def described(self) -> dict[str, Any]:
        """What distinguishes the data of a run from other data, as far as possible."""
        return {name: source.described() for name, source in self._sources.items()}

    def train_example(self) -> Any:
        """The first training batch, or `None` if it can only be drawn."""
        return self._train.example()

    def positions(self) -> dict[str, Any]:
        """Where the iterators are, for a checkpoint."""
        found = {name: source.position() for name, source in self._sources.items()}
        return {name: position for name, position in found.items() if position is not None}

    def check_can_resume(self) -> None:
        for source in self._sources.values():
            source.check_can_resume()

    def resume(self, positions: dict[str, Any]) -> None:
        for name, position in positions.items():
            self._sources[name].resume(position)
