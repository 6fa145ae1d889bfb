"""What `replay` does, segment by segment, once its arguments are checked."""

import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.metadata import placed_nan
from gradhpo.core.reverse import Cotangent
from gradhpo.core.state import BilevelState, inner_state, with_inner_state
from gradhpo.data.passes import Part, Passes
from gradhpo.training.boundaries import Boundaries
from gradhpo.training.segments import Training
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.tables import bytes_of
from gradhpo.utils.trees import inexact_bytes


class Diverged(Exception):
    """The parameters at the end of a segment are not finite."""


@dataclasses.dataclass
class Rewind:
    """Forward through all segments and back. `state` is the last state of the way forward."""

    training: Training
    passes: Passes
    first: Part | None  # the first segment's, until it is used
    kept: Boundaries
    start: BilevelState
    num_steps: int
    segment: int
    progress: bool | str

    def __post_init__(self):
        self.state, self.at = self.start, 0
        self.loss = self.val_loss = placed_nan(jnp.result_type(float))
        self.resumed = ""
        self.seconds = {"forward": 0.0, "back": 0.0}

    @property
    def starts(self) -> range:
        """Where the segments begin."""
        return range(0, self.num_steps, self.segment)

    def length(self, start: int) -> int:
        """The length of the segment that begins there."""
        return min(self.segment, self.num_steps - start)

    def go(self) -> PyTree:
        """The hypergradient in the dtype of sums; raises `Diverged`."""
        back = self.kept.numbers("bar")
        there = self._there(back)
        back = back if self.num_steps in there else []
        done = 2 * self.num_steps - back[0] if back else max([0, *there])
        if done:
            where = f"back, before step {back[0]:,}" if back else f"forward, after step {done:,}"
            complete = back[:1] == [0]
            self.resumed = f" It {'was complete' if complete else f'resumed on the way {where}'}."
        total = 2 * self.num_steps
        with ProgressBar(total, done=done, shown=self.progress, call="gradhpo.replay") as bar:
            self._forward(bar, there)
            return self._back(bar, back)

    def _there(self, back: list[int]) -> list[int]:
        """The states to continue from: without a gap, or the end and all that is needed before."""
        found = set(self.kept.numbers("state"))
        needed = {start for start in self.starts if not back or start < back[0]}
        if needed | {self.num_steps} <= found:
            return [self.num_steps]
        return list(itertools.takewhile(found.__contains__, [*self.starts, self.num_steps]))

    def _forward(self, bar: ProgressBar, there: list[int]) -> None:
        started = time.perf_counter()
        if there:
            self.at = there[-1]
            self.state, about = self._kept(self.at)
            self.loss = jnp.asarray(about["loss"], self.loss.dtype)
            self.passes.resume(about["positions"])
            self.first = self.first if self.at == 0 else None
        while self.at < self.num_steps:
            length = self.length(self.at)
            given = self.state, self._part(self.at), length
            state, loss, finite = self.training.forward(*given)
            if self.at not in there:
                self._keep()  # while the device works
            z = jax.tree.map(_placed_as, inner_state(state), inner_state(self.start))
            self.state = with_inner_state(self.start, z)
            self.at, self.loss = self.at + length, loss
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
        first, self.first = self.first, None
        if first is not None and start == 0:
            return first
        return self.passes.part(start, self.length(start))

    def _passed(self, start: int, cotangent: Cotangent) -> None:
        """Keeps the cotangent, and drops what is no longer needed: all but the end."""
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
        count = math.ceil(self.at / self.segment)
        seconds = ", ".join(f"{x:.1f} s {way}" for way, x in self.seconds.items())
        of_all = "" if self.at == self.num_steps else f"of {self.num_steps:,} "
        return (
            f"{self.at:,} {of_all}inner step{'s' * (self.at > 1)} in {count} "
            f"segment{'s' * (count > 1)} of {self.segment} ({seconds}), with {count} "
            f"state{'s' * (count > 1)} of {size} kept {self.kept.where}.{self.resumed}"
        )


def _placed_as(x: Any, like: Any) -> Any:
    """States and cotangents keep the placement of the first: files and programs rely on it."""
    return jax.device_put(x, like.sharding) if isinstance(x, jax.Array) and like.committed else x
