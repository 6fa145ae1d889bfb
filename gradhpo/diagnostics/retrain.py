"""Many training runs at changed hyperparameters, a block of them at once."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.measured import loss_of
from gradhpo.core.start import started
from gradhpo.core.state import BilevelState
from gradhpo.diagnostics.cost import Program, free_bytes
from gradhpo.diagnostics.queries import Setting
from gradhpo.diagnostics.reference import FAILURES
from gradhpo.training.boundaries import Boundaries
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.tracing import count_trace
from gradhpo.utils.trees import all_finite


# Small training runs gain nothing from more; bars and directories count in blocks.
_MOST_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Retrained:
    """Losses at the end of training runs, `[runs, queries]`; the first is at λ itself.

    `finite` says whether the parameters of each run are finite, and `seconds` how long all
    took.
    """

    losses: np.ndarray
    finite: np.ndarray
    seconds: float


def losses_of_block(
    algorithm: Algorithm,
    start: BilevelState,
    setting: Setting,
    change: Callable,
    moved: Array,
    keys: Array,
    at_once: bool,
) -> tuple[Array, Array]:
    """The losses of one training for each key, `[runs, queries]`, and which are finite.

    Each starts afresh at the changed hyperparameters; where not `moved`, at the start's.
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

        num_at_once = setting.num_queries if at_once else 1
        # What training starts with may be infinite on purpose.
        return setting.over_queries(loss, num_at_once), all_finite(end.w, unless_as_in=z.w)

    def member(moved: Array, key: Array) -> PyTree:
        choose = lambda new, old: jnp.where(moved, new, old)
        return jax.tree.map(choose, change(key, hyperparams), hyperparams)

    # Keys of some kinds draw other numbers under `vmap`.
    members = jax.lax.map(lambda x: member(*x), (moved, keys))
    return jax.vmap(trained)(members) if at_once else jax.lax.map(trained, members)


class Blocks:
    """The training runs of all keys, by one program for a block of them."""

    def __init__(
        self,
        algorithm: Algorithm,
        start: BilevelState,
        setting: Setting,
        change: Callable,
        keys: Array,
        block_size: int | None,
        kept: Boundaries,
    ):
        """`kept` has the blocks of an earlier call; all blocks have their size."""
        self._given, self._asked = (algorithm, start, setting, change), block_size
        self._keys, self._count, self._kept = keys, len(keys) + 1, kept
        self._at_once, self._program = True, None
        earlier = kept.numbers("losses")
        if earlier:
            about = kept.about("losses", earlier[0])
            self.size, self._asked = about["block_size"], about.get("asked")
            # A block of all training runs is smaller than was asked for.
            if block_size not in (None, self.size, self._asked):
                raise ValueError(
                    f"block_size={block_size} differs from the blocks of {self.size} runs "
                    f"{kept.where}: pass block_size={self.size}, or another directory"
                )
        elif block_size is None:
            self._make_fit()
        else:
            self.size = min(block_size, self._count)

    def _even(self, most: int) -> int:
        """The block size up to `most` that pads the last block least."""
        return math.ceil(self._count / math.ceil(self._count / most))

    def _make_fit(self) -> None:
        """Shrinks the block until it fits into memory, by the compiler's figures."""
        self.size, limit = self._even(_MOST_AT_ONCE), free_bytes(self._given[1])
        self._program = self._compiled()
        while self.size > 1 and self._program.temporary_bytes > limit:
            fitting = int(self.size * limit / self._program.temporary_bytes)
            self.size = self._even(max(1, min(fitting, self.size - 1)))
            self._program = self._compiled()

    def _compiled(self) -> Program:
        """One training after another if `vmap` fails, for example because of a callback."""
        at = lambda at_once: functools.partial(losses_of_block, at_once=at_once)
        if self._at_once:
            try:
                return Program(at(True), *self._given, *self._block(0))
            except FAILURES:
                self._at_once = False
        return Program(at(False), *self._given, *self._block(0))

    def _block(self, first: int) -> tuple[np.ndarray, Array]:
        """Training 0 is at λ itself, and so is the padding of the last block."""
        numbers = np.arange(first, first + self.size)
        moved = (numbers > 0) & (numbers < self._count)
        return moved, self._keys[np.where(moved, numbers - 1, 0)]

    def run(self, bar: ProgressBar, num_steps: int) -> Retrained:
        """Trains all blocks, except those that an earlier call kept."""
        earlier, blocks = set(self._kept.numbers("losses")), []
        for first in range(0, self._count, self.size):
            count = min(self.size, self._count - first)
            block = self._earlier(first, count) if first in earlier else None
            blocks.append(self._trained(first, count) if block is None else block)
            bar.advance(count * num_steps, {"val_loss": np.mean(blocks[-1].losses, axis=1)})
        return Retrained(
            np.concatenate([block.losses for block in blocks]),
            np.concatenate([block.finite for block in blocks]),
            sum(block.seconds for block in blocks),
        )

    def _trained(self, first: int, count: int) -> Retrained:
        """One block, without what fills it up."""
        if self._program is None:
            self._program = self._compiled()
        begun = time.perf_counter()
        losses, finite = self._program(*self._given, *self._block(first))
        seconds = time.perf_counter() - begun
        losses, finite = np.asarray(losses, np.float64)[:count], np.asarray(finite)[:count]
        about = {"block_size": self.size, "asked": self._asked, "count": count, "seconds": seconds}
        self._kept.put("losses", first, (losses, finite), about)
        return Retrained(losses, finite, seconds)

    def _earlier(self, first: int, count: int) -> Retrained | None:
        """A block of an earlier call, if it has the training runs wanted now."""
        there = self._kept.about("losses", first)["count"]
        if there < count:
            return None
        like = np.zeros((there, self._given[2].num_queries)), np.zeros(there, bool)
        (losses, finite), about = self._kept.get("losses", first, like)
        return Retrained(losses[:count], finite[:count], about["seconds"])
