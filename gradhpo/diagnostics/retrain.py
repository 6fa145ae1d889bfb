"""Many trainings at changed hyperparameters, a block of them at once."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.measured import loss_of
from gradhpo.core.start import started
from gradhpo.core.state import BilevelState
from gradhpo.diagnostics.cost import Program
from gradhpo.diagnostics.queries import Setting
from gradhpo.diagnostics.reference import FAILURES
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.tracing import count_trace
from gradhpo.utils.trees import all_finite


# Memory of a block where the device does not say how much is free: a processor.
_MOST_BYTES = 2**29
# Small trainings gain nothing from more, and blocks are what a bar shows and a directory keeps.
_MOST_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Retrained:
    """Losses at the end of trainings, `[trainings, queries]`; the first is at λ itself.

    `finite` says of each whether its parameters are.
    """

    losses: np.ndarray
    finite: np.ndarray


def losses_of_block(
    algorithm: Algorithm,
    start: BilevelState,
    setting: Setting,
    change: Callable,
    moved: Array,
    keys: Array,
    at_once: bool,
) -> tuple[Array, Array]:
    """The losses of trainings that start anew at changed hyperparameters, and what is finite.

    Training `i` is at $\\mathtt{change}(\\mathtt{keys}_i, \\lambda)$ if `moved`, otherwise at λ.
    """
    count_trace()
    given = setting.inputs(start, setting.query(0)), setting.num_steps
    phi, validation, z, hyperparams = algorithm._problem(*given)

    def trained(hyperparams: PyTree) -> tuple[Array, Array]:
        first = started(phi, z, hyperparams)
        end, _, _ = phi.rollout(first, hyperparams, 0, setting.num_steps)

        def loss(query: PyTree) -> Array:
            of_query = dataclasses.replace(validation, val_batch=query)
            return loss_of(of_query.loss(end, hyperparams))

        # What training starts with may be infinite on purpose.
        return setting.over_queries(loss, at_once), all_finite(end.w, unless_as_in=z.w)

    def member(moved: Array, key: Array) -> PyTree:
        choose = lambda new, old: jnp.where(moved, new, old)
        return jax.tree.map(choose, change(key, hyperparams), hyperparams)

    # Keys of some kinds draw other numbers under `vmap`.
    members = jax.lax.map(lambda x: member(*x), (moved, keys))
    return jax.vmap(trained)(members) if at_once else jax.lax.map(trained, members)


class Blocks:
    """The trainings of all keys, by one program for a block of them."""

    def __init__(
        self,
        algorithm: Algorithm,
        start: BilevelState,
        setting: Setting,
        change: Callable,
        keys: Array,
        block_size: int | None,
    ):
        self._given = algorithm, start, setting, change
        self._keys, self._count = keys, len(keys) + 1
        self._at_once = True
        size = self._even(_MOST_AT_ONCE) if block_size is None else min(block_size, self._count)
        self._program = self._of_size(size)
        if block_size is None:
            self._make_fit()

    def _of_size(self, size: int) -> Program:
        """Of trainings one after another where a function of the user's is not for several."""
        self.size = size
        at = lambda at_once: functools.partial(losses_of_block, at_once=at_once)
        if self._at_once:
            try:
                return Program(at(True), *self._given, *self._block(0))
            except FAILURES:
                self._at_once = False
        return Program(at(False), *self._given, *self._block(0))

    def _even(self, most: int) -> int:
        """As many in a block as leave little to fill up in the last."""
        return math.ceil(self._count / math.ceil(self._count / most))

    def _make_fit(self) -> None:
        """As many as fit into memory, by the compiler's figure for the number before."""
        limit = _free_bytes()
        while self.size > 1 and self._program.temporary_bytes > limit:
            fitting = int(self.size * limit / self._program.temporary_bytes)
            self._program = self._of_size(self._even(max(1, min(fitting, self.size - 1))))

    def _block(self, first: int) -> tuple[np.ndarray, Array]:
        """Training 0 is at λ itself, and so are those that fill up the last block."""
        numbers = np.arange(first, first + self.size)
        moved = (numbers > 0) & (numbers < self._count)
        return moved, self._keys[np.where(moved, numbers - 1, 0)]

    @property
    def starts(self) -> range:
        """Where the blocks begin."""
        return range(0, self._count, self.size)

    def run(self, first: int) -> Retrained:
        """One block, without what fills it up."""
        losses, finite = self._program(*self._given, *self._block(first))
        there = slice(0, self._count - first)
        return Retrained(np.asarray(losses, np.float64)[there], np.asarray(finite)[there])

    def run_all(self, bar: ProgressBar, num_steps: int) -> tuple[Retrained, float]:
        """All blocks, and the seconds that they took."""
        begun, found = time.perf_counter(), []
        for first in self.starts:
            found.append(self.run(first))
            losses = found[-1].losses
            bar.advance(len(losses) * num_steps, {"val_loss": np.mean(losses, axis=1)})
        joined = (np.concatenate(x) for x in zip(*map(_parts, found), strict=True))
        return Retrained(*joined), time.perf_counter() - begun


def _parts(block: Retrained) -> tuple[np.ndarray, np.ndarray]:
    return block.losses, block.finite


def _free_bytes() -> float:
    """Half of what the device has left, as far as it says: compilers plan without each other."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _MOST_BYTES
    return max(1, (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2)
