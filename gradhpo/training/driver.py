"""What `run` does, chunk by chunk, once its arguments are checked."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array, Float

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner_state import Start
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.measured import (
    with_aux,
    with_aux_of_steps,
    without_aux,
    without_aux_in,
)
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.core.wrapper import algorithm_of
from gradhpo.data.sources import Feed
from gradhpo.training.callbacks import Callbacks
from gradhpo.training.chunk import Chunk, started
from gradhpo.training.first_chunk import zeros_and_refusal
from gradhpo.training.flight import Flight, at_the_end, on_host
from gradhpo.training.handover import Handover
from gradhpo.training.keeper import Keeper
from gradhpo.training.members import Shown, any_member
from gradhpo.training.record import Record, norm_of
from gradhpo.training.recorded import check_names
from gradhpo.training.refused import Refused
from gradhpo.training.report import states_lost
from gradhpo.training.stopping import Interrupts, Stopped, failing, how_to_save_memory
from gradhpo.utils.dispatch import is_given_up
from gradhpo.utils.processes import check_shared, is_shared, numbers, together
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.validation import refuse_text


@dataclasses.dataclass
class Driver:
    """The progress of a run. `state`, `start` and `record` change only at the end of a chunk."""

    optimizer: BilevelOptimizer
    losses: LossFunctions
    rate: Any
    record_fn: Callable | None
    start_fn: Start | None
    steps_per_episode: int | None
    reptile_rate: Float[Array, ""]
    max_rejections: int
    feed: Feed
    callbacks: Callbacks
    shows: Shown
    keeper: Keeper | None
    state: BilevelState

    def __post_init__(self):
        self._given = self.state
        if self.start_fn is not None:
            self.state = started(self.optimizer, self.state, self.start_fn)
        self.start = inner_state(self.state)._replace(s=None)  # of the episode
        with jax.debug_nans(False):  # what is not measured yet is NaN
            self.before = self.optimizer._scalars(self.state.memory)
        self.shared = is_shared(self.state)
        self.record = Record(
            int(self.state.step),
            numbers(self.state.metadata["rejected"]),
            norm_of(self.start.w, self.optimizer.num_members),
            self.shows,
        )
        self.refused = Refused.at_first(self.max_rejections, 0)
        self.positions = self.feed.positions()
        self.refusal = ""  # why every step is refused although its metrics are finite
        self.zeros: list[int] | None = None  # leaves whose hypergradient was 0 in every step
        self.lost = ""  # which states are, if any
        reads = self.callbacks.read_states or self.shared
        self._handover = Handover(self.state, reads, self.feed.from_host)
        self._callbacks_saw_all = True  # all that the record holds
        self._advice = how_to_save_memory(algorithm_of(self.optimizer))

    def begin(self, num_steps: int) -> None:
        """Starts a new run, or resumes the one in the checkpoints."""
        if self.keeper is None or not self.keeper.holds_a_run:
            with together(self.shared):
                if self.keeper is not None:
                    self.feed.check_can_resume()
                self.callbacks.start(self.state, resumed=False)
            if self.keeper is not None:
                self.keeper.begin(self.state)
            self.save("")
            return
        with together(self.shared):
            self.keeper.check_resumable(num_steps)
        first = int(self.state.step)
        self.state = self.keeper.resume(self.state)
        with together(self.shared):
            self.callbacks.start(self.state, resumed=True)
        self.keeper.read_memories(self.callbacks)
        self.start, self.before = self.keeper.read("rest", (self.start, self.before))
        with together(self.shared):
            metrics, self.positions, aux = self.keeper.read_past()
            self.feed.resume(self.positions)
        self.record.resume(metrics)
        self.refused = Refused.at_first(self.max_rejections, self.record.in_a_row)
        again = lambda tree: with_aux_of_steps(tree, {name: metrics[name] for name in aux}, first)
        self.state = again(self.state)
        self.callbacks.remember(again)

    def go(
        self, shapes: Iterable[tuple[int, int]], bar: ProgressBar, interrupts: Interrupts
    ) -> Stopped:
        """Takes the steps, and says why it stopped.

        The device works on one chunk while the host draws batches for the next, logs and saves. If
        a chunk stops the run, the next one is discarded: the state is the one that the callbacks
        have seen.
        """
        shapes = iter(shapes)
        following = next(shapes, None)
        flying: collections.deque[Flight] = collections.deque()
        ending: Stopped | None = None
        most = lambda: self._handover.chunks_in_flight
        try:
            self._stop_if_over()
            while following or flying:
                while following and not (ending or interrupts.asked) and len(flying) < most():
                    launched, ending = self._launch(*following, [*flying])
                    flying.extend(launched)
                    following = next(shapes, None)
                if flying:
                    landed = self._land(flying, bar)
                    over = ending is not None or interrupts.asked
                    # Otherwise the end is saved, which is the same.
                    if (flying or (following and not over)) and self._is_due(landed):
                        self.save("")
                    del landed  # and its state
                if interrupts.asked and (following or flying) and not is_given_up(self.state):
                    return Stopped("interrupted")
                if ending and not flying:
                    return self._settled(ending, flying, bar)
        except Stopped as stopped:
            return self._settled(stopped, flying, bar)
        except KeyboardInterrupt:
            if interrupts.asked:  # the second interrupt
                raise
            return self._settled(Stopped("interrupted"), flying, bar)
        return Stopped("num_steps")

    def _settled(
        self, ending: Stopped, flying: collections.deque[Flight], bar: ProgressBar
    ) -> Stopped:
        """The ending, once there is a state to return: the last one may have been given up.

        The next chunk holds the same state if the run ended before it; otherwise it is waited for.
        If it fails, only the state that the run was given is left.
        """
        if ending.reason == "rejected" and is_given_up(self.state) and flying:
            aux = {name: self.state.metadata[name] for name in self.state.metadata.aux}
            self.state = with_aux(without_aux(flying[0].state), aux)
            self.start = flying[0].start
        seen = self._callbacks_saw_all
        for _ in range(len(flying)):
            if is_given_up(self.state):
                with contextlib.suppress(Stopped):
                    self._land(flying, bar)
        self._callbacks_saw_all &= seen
        if is_given_up(self.state):
            self.lost = states_lost(self.record.taken, int(self._given.step))
            self.state, self.start = self._given, inner_state(self._given)._replace(s=None)
            self.record, self.zeros, self.refusal = self.record.emptied(), None, ""
        return ending

    def finish(self, ending: Stopped) -> None:
        """Saves the end."""
        # The steps that a failing callback missed are repeated from the previous checkpoint.
        if self._callbacks_saw_all and self.record.may_return:
            self.save(ending.reason)

    def save(self, stop_reason: str) -> None:
        if self.keeper is not None:
            about = {
                "stop_reason": stop_reason,
                "callbacks": self.callbacks.identities,
                "positions": self.positions,
                "aux": sorted(self.state.metadata.aux),
            }
            # In this order `load_checkpoint` finds everything that it can ask for at the start.
            parts = {
                "state": without_aux(self.state),
                "memories": without_aux_in(self.callbacks.memory),
                "rest": (self.start, self.before),
            }
            self.keeper.save(self.record.columns, parts, about)

    def _is_due(self, flight: Flight) -> bool:
        """Whether to save the end of a chunk: decided once, when its state might be given up."""
        if flight.due is None:
            flight.due = self.keeper is not None and self.keeper.is_due(flight.taken)
        return flight.due

    def _launch(
        self, episodes: int, length: int, before: "list[Flight]", at_most: int | None = None
    ) -> "tuple[list[Flight], Stopped | None]":
        """Hands a chunk to the device, after those it works on; and why it is the last, if it is.

        `at_most`: the steps for which all processes have data.
        """
        wanted, may_return = episodes * length, bool(before) or self.record.may_return
        last = before[-1] if before else self
        by_episodes = self.steps_per_episode is not None
        try:
            with failing("data error", may_return=may_return):
                drawn = self.feed.draw_chunk(
                    wanted if at_most is None else at_most,
                    length if by_episodes else 1,
                    in_part=may_return or at_most is not None,
                )
            if drawn is None:
                return [], self._out_of_data(may_return)
            train, val, taken = drawn
            leaves = {"train_data": jax.tree.leaves(train), "val_data": jax.tree.leaves(val)}
            check_shared(self.state, **leaves)
            positions = self.feed.positions() if self.keeper is not None else {}
            with failing("device error", may_return=may_return, advice=self._advice):
                about = self.rate, self.record_fn, self.start_fn, self.steps_per_episode != 1
                chunk = Chunk(self.optimizer, self.losses, train, val, *about, last.refused)
                given, settings = (without_aux(last.state),), (taken,)
                if by_episodes:
                    given = *given, last.start
                    settings = self.reptile_rate, taken // length, length, self.steps_per_episode
                keep = last is self or self._is_due(before[-1])
                try:
                    given = self._handover.given_up(given, settings, chunk, keep)
                    state, start, reached, *found = chunk.launch(*given, *settings)
                except (TypeError, AttributeError) as error:
                    refuse_text(error, **chunk.example())
                    raise
        except Stopped as stopped:
            return [], stopped
        check_names(state.metadata.aux, self.callbacks.monitored)
        in_all = taken + (before[-1].taken if before else self.record.taken)
        start = last.start if start is None else start
        reached = reached if self.callbacks.read_states else None
        about_it = {"positions": positions, "may_return": may_return, "taken": in_all}
        flight = Flight(chunk, state, start, reached, *found, **about_it)
        return [flight], None if taken == wanted else self._out_of_data(may_return=True)

    def _out_of_data(self, may_return: bool) -> Stopped:
        if self.feed.failure is not None:
            return Stopped("data error", self.feed.failure)
        if not may_return:
            raise ValueError(
                "the data iterators end before the first step (with an algorithm that looks "
                "ahead, the first episode) has all its batches"
            )
        return Stopped("data exhausted")

    def _land(self, flying: "collections.deque[Flight]", bar: ProgressBar) -> Flight:
        """Waits for the first chunk, and shows it to the callbacks."""
        flight = flying[0]
        with failing("device error", may_return=flight.may_return, advice=self._advice):
            metrics = {name: on_host(values) for name, values in flight.metrics.items()}
            moved = any_member(numbers(flight.moved))
        flying.popleft()
        if self.zeros is None:
            given = self.optimizer, self.rate, flight.chunk, self.state, metrics, moved
            self.zeros, self.refusal = zeros_and_refusal(*given)
        self.zeros = [leaf for leaf in self.zeros if not moved[leaf]]
        self._callbacks_saw_all = False
        measured, failure = self.callbacks.measure(flight.measured)
        metrics |= at_the_end(measured, len(metrics["rejected"]))
        self.record.add(metrics)
        self.state, self.start, self.positions = flight.state, flight.start, flight.positions
        self.refused = flight.refused
        self.feed.release_oldest()
        aux = sorted(self.state.metadata.aux)
        metrics = self.shows(metrics)
        bar.advance(len(metrics["rejected"]), metrics, aux)
        with failing("callback error", may_return=flight.may_return):
            if failure is not None:
                raise failure
            reason = self.callbacks(flight.measured, metrics)
        self._callbacks_saw_all = True
        if reason is not None:
            raise Stopped(reason)
        self._stop_if_over()
        return flight

    def _stop_if_over(self) -> None:
        """The reason for ending a run also keeps one that is resumed at its end from continuing."""
        reason = self.callbacks.stopped()
        if reason is not None:
            raise Stopped(reason)
        if self.record.longest >= self.max_rejections:
            raise Stopped("rejected")
