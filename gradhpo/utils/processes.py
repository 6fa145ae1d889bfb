"""Several processes of one program (`jax.distributed`): arrays of one, and arrays of all.

A state is shared if its arrays are spread over the devices of all processes. They then run the same
programs in the same order, since a program that only some of them start never ends. So they tell
each other what only one of them decides, finds or fails at.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.extend.core import Literal
from jaxtyping import ArrayLike, PyTree

from gradhpo.utils.placement import is_of_several
from gradhpo.utils.validation import THE_WHOLE_TREE, leaf_names


# Bytes from each process to all others in one round: enough for the messages of a chunk.
_ROOM = 1024


def is_shared(tree: PyTree) -> bool:
    """Whether arrays of a tree belong to several processes.

    Raises `ValueError` if they belong to some of the processes only, which cannot agree without
    the others.
    """
    found = next(filter(is_of_several, jax.tree.leaves(tree)), None)
    if found is None:
        return False
    taking_part = len({device.process_index for device in found.sharding.device_set})
    if taking_part < jax.process_count():
        raise ValueError(
            f"the state is spread over the devices of {taking_part} of {jax.process_count()} "
            "processes: spread it over all devices, jax.make_mesh((jax.device_count(),), "
            "('data',)), or make an independent state in every process"
        )
    return True


def is_first(shared: bool) -> bool:
    """Whether this process writes for all that share a state: logs, bars, files, warnings."""
    return not shared or jax.process_index() == 0


def exchanged(value: Any) -> list[Any]:
    """What each process passes here, in process order: anything that JSON can hold.

    Every process has to call it. It takes one round, or two for a long string, and the devices
    first finish their work.
    """
    text = json.dumps(value).encode()
    length = np.asarray([len(text)], "<u4").view(np.uint8)
    rows = _gathered(np.concatenate([length, np.frombuffer(text[:_ROOM], np.uint8)]), 4 + _ROOM)
    lengths = [int(x[0]) for x in rows[:, :4].copy().view("<u4")]
    rows, longest = rows[:, 4:], max(lengths)
    if longest > _ROOM:
        # To a power of 2, since each size is a program.
        rows = _gathered(np.frombuffer(text, np.uint8), 1 << (longest - 1).bit_length())
    parts = zip(rows, lengths, strict=True)
    return [json.loads(row[:count].tobytes()) for row, count in parts]


def _gathered(row: np.ndarray, size: int) -> np.ndarray:
    padded = np.pad(row, (0, size - len(row)))
    return np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, size)


@contextlib.contextmanager
def together(shared: bool) -> Iterator[None]:
    """A failure inside, in one process, fails all that share a state, at the end of the block.

    For work on the host alone: a program that some of the devices do not start would never end.
    """
    if not shared:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    said = exchanged(None if error is None else said_of(error))
    if error is not None:
        raise error
    if any(said):
        raise error_of_others(said)


def from_first(shared: bool, make: Callable[[], Any]) -> Any:
    """What the first process makes, for all of them, as JSON can hold it; or its error."""
    made = None
    with together(shared):
        made = make() if is_first(shared) else None
    return exchanged(made)[0] if shared else made


def check_alike(**settings: Any) -> None:
    """Raises `ValueError` unless all processes pass the same settings, which JSON can hold."""
    said = exchanged(settings)
    for number, other in enumerate(said):
        for name, value in said[0].items():
            if other[name] != value:
                raise ValueError(
                    f"{name} differs: {value} in process 0, {other[name]} in process {number}. "
                    "Processes that share a state must make the same call with the same settings"
                )


def said_of(error: Exception) -> str:
    """An error as the other processes report it."""
    return f"{type(error).__name__}: {error}"[: _ROOM // 2]


def error_of_others(said: list[str | None]) -> RuntimeError:
    """For a process in which nothing failed; `said` has what each says about its error, if any."""
    number, text = next((number, text) for number, text in enumerate(said) if text is not None)
    return RuntimeError(f"process {number} failed: {text}")


def numbers(x: ArrayLike) -> np.ndarray:
    """An array on the host. One of several processes is gathered first: for small ones."""
    if isinstance(x, jax.Array) and is_of_several(x) and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def check_shared(state: PyTree, **batches: PyTree) -> None:
    """Refuses batches of one process with a state that all of them share.

    JAX assumes that such a batch is the same everywhere, without checking. Functions among the
    leaves are sources, `index -> batch`.
    """
    if jax.process_count() == 1 or not any(map(is_of_several, jax.tree.leaves(state))):
        return
    for name, batch in batches.items():
        for leaf_name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True):
            if any(map(_is_local, _arrays_of(leaf))):
                raise ValueError(
                    f"{name}{leaf_name.removeprefix(THE_WHOLE_TREE)} is an array of this process "
                    f"alone, but the state is shared by {jax.process_count()} processes: each "
                    "would train on its own batch, and their parameters would drift apart. "
                    "Join the parts into one array, "
                    "jax.make_array_from_process_local_data(sharding, part), or put what is the "
                    "same in all on all devices, jax.device_put(x, sharding); or make an "
                    "independent state in every process, from its own arrays"
                )


def _arrays_of(leaf: Any) -> Iterator[Any]:
    """A leaf; or the arrays that a function of an index has closed over."""
    if eqx.is_array(leaf) or not callable(leaf):
        yield leaf
        return
    program = jax.make_jaxpr(leaf)(jnp.zeros((), jnp.int32))
    yield from program.consts
    for eqn in program.jaxpr.eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, Literal) and jnp.ndim(v.val))


def _is_local(x: Any) -> bool:
    return eqx.is_array(x) and not isinstance(x, Tracer) and not is_of_several(x)
