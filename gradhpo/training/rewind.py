"""What `replay` does, segment by segment, once its arguments are checked."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.reverse import Cotangent
from gradhpo.core.state import BilevelState, inner_state, with_inner_state
from gradhpo.data.passes import Part, Passes
from gradhpo.training.boundaries import Boundaries
from gradhpo.training.segments import Training
from gradhpo.utils.processes import check_shared
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.tables import bytes_of
from gradhpo.utils.trees import inexact_bytes


class Diverged(Exception):
    """The parameters at the end of a segment are not finite."""


@dataclasses.dataclass
class Rewind:
    """Forward through all segments and back. `state` is the last that was reached forwards."""

    training: Training
    passes: Passes
    kept: Boundaries
    start: BilevelState
    num_steps: int
    segment: int
    progress: bool | str

    def __post_init__(self):
        self.state, self.at = self.start, 0
        self.loss: Array = jnp.asarray(jnp.nan)
        self.val_loss: Array = jnp.asarray(jnp.nan)
        self.resumed = ""
        self.seconds = {"forward": 0.0, "back": 0.0}

    @property
    def starts(self) -> range:
        """Where the segments begin."""
        return range(0, self.num_steps, self.segment)

    def length(self, start: int) -> int:
        """Of the segment that begins there."""
        return min(self.segment, self.num_steps - start)

    def go(self) -> PyTree:
        """The hypergradient in the dtype of sums; raises `Diverged`."""
        there, back = self.kept.numbers("state"), self.kept.numbers("bar")
        done = 2 * self.num_steps - back[0] if back else max([0, *there])
        if done:
            where = f"back, before step {back[0]:,}" if back else f"forward, after step {done:,}"
            complete = back[:1] == [0]
            self.resumed = f" It {'was complete' if complete else f'went on on the way {where}'}."
        total = 2 * self.num_steps
        with ProgressBar(total, done=done, shown=self.progress, call="gradhpo.replay") as bar:
            self._forward(bar, there)
            return self._back(bar, back)

    def _forward(self, bar: ProgressBar, there: list[int]) -> None:
        started = time.perf_counter()
        if there:
            self.at = there[-1]
            self.state, about = self._kept(self.at)
            self.loss = jnp.asarray(about["loss"], self.loss.dtype)
            self.passes.resume(about["positions"])
        else:
            self.training.check(self.start, self._part(0))
        while self.at < self.num_steps:
            length = self.length(self.at)
            given = self.state, self._part(self.at), length
            state, loss, finite = self.training.forward(*given)
            if self.at not in there:
                self._keep()  # while the device is at work
            self.state, self.at, self.loss = state, self.at + length, loss
            if not bool(finite):
                raise Diverged
            bar.advance(length, {"train_loss": np.asarray(loss)[None]})
        if self.kept.lasts and self.at not in there:
            self._keep()
        self.seconds["forward"] = time.perf_counter() - started

    def _keep(self) -> None:
        about = {"loss": float(self.loss), "positions": self.passes.positions()}
        self.kept.put("state", self.at, inner_state(self.state), about)

    def _kept(self, number: int) -> tuple[BilevelState, Any]:
        z, about = self.kept.get("state", number, inner_state(self.start))
        # Where training starts, hyperparameters may act in the initial state.
        start = dataclasses.replace(with_inner_state(self.start, z), fresh=self.start.fresh)
        return (with_inner_state(self.start, z) if number else start), about

    def _back(self, bar: ProgressBar, back: list[int]) -> PyTree:
        started = time.perf_counter()
        todo = [start for start in reversed(self.starts) if not back or start < back[0]]
        part = self._part(todo[0] if todo else 0)
        self.val_loss, cotangent = self.training.at_end(self.state, part)
        if back:
            cotangent, _ = self.kept.get("bar", back[0], cotangent)
        for start in todo:
            part = part if start == todo[0] else self._part(start)
            given = self._kept(start)[0], part, self.length(start), cotangent
            new = jax.block_until_ready(self.training.back(*given))
            cotangent = jax.tree.map(_placed_as, new, cotangent)
            self._passed(start, cotangent)
            bar.advance(self.length(start), {"val_loss": np.atleast_1d(np.mean(self.val_loss))})
        self.seconds["back"] = time.perf_counter() - started
        return cotangent.hyperparams

    def _part(self, start: int) -> Part:
        part, val_batch = self.passes.part(start, self.length(start)), self.training.val_batch
        check_shared(self.start, train_data=jax.tree.leaves(part.batches), val_batch=val_batch)
        return part

    def _passed(self, start: int, cotangent: Cotangent) -> None:
        """Nothing behind is needed again, but for the end."""
        if self.kept.lasts:
            self.kept.put("bar", start, cotangent)
        end = start + self.length(start)
        self.kept.drop("bar", end)
        if end < self.num_steps:
            self.kept.drop("state", end)
        if start == 0:
            self.kept.drop("state", start)

    def report(self) -> str:
        """How it went."""
        size = bytes_of(inexact_bytes(inner_state(self.start)))
        count = len(self.starts)
        seconds = ", ".join(f"{x:.1f} s {way}" for way, x in self.seconds.items())
        return (
            f"{self.num_steps:,} inner steps in {count} segment{'s' if count > 1 else ''} of "
            f"{self.segment} ({seconds}), with {count} state{'s' if count > 1 else ''} of "
            f"{size} kept {self.kept.where}.{self.resumed}"
        )


def _placed_as(x: Array, like: Array) -> Array:
    """All cotangents are where the first one is: in files, and for the program of a segment."""
    return jax.device_put(x, like.sharding) if like.committed else x
