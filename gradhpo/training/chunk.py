"""The compiled part of a run: many steps in one scan, and episodes around them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.measured import with_aux, without_aux
from gradhpo.core.state import BilevelState, inner_state, with_metrics
from gradhpo.core.types import METRICS, RealScalarLike
from gradhpo.data.source import Batches
from gradhpo.training.recorded import check_names, recorded
from gradhpo.training.refused import Refused
from gradhpo.utils.dispatch import compiled, traced
from gradhpo.utils.foreign import CALLBACKS
from gradhpo.utils.freezing import carried
from gradhpo.utils.programs import contains
from gradhpo.utils.settings import outer_rate
from gradhpo.utils.skipping import unless
from gradhpo.utils.tracing import record_trace


_OF_STEPS = 2  # arguments of `run_steps`


class Chunk(eqx.Module):
    """A piece of a run: the optimizer with its losses, its data and its rate.

    Its calls use up the state that they are given, and the start of the episode. `refused` carries
    the count on to the next chunk; without it every step is taken.
    """

    optimizer: BilevelOptimizer
    losses: LossFunctions
    train: Batches
    val: Batches
    lr_hyper: Callable | RealScalarLike | None
    record: Callable | None = None
    start: Start | None = None
    continues: bool = eqx.field(static=True, default=False)
    refused: Refused | None = None

    @functools.partial(compiled, gives_up=(1,))
    def run_steps(
        self, state: BilevelState, length: int
    ) -> tuple[BilevelState, dict[str, Array], Bool[Array, "*members leaves"], Refused | None]:
        """`length` outer steps, their stacked metrics, and which hyperparameters ever moved.

        The device may still be working. The state comes without the metrics that losses return,
        and leaves with the metrics of its last step.
        """
        self._record(state, f"run (chunks of {length})")

        def steps(state: BilevelState):
            state, *others = self._steps(state, jnp.zeros((), jnp.int32), length)
            return state, others

        new, (metrics, aux, moved) = self._unless_over(steps, state)
        refused = self._counted(state, metrics)
        return with_aux(new, _last(aux)), metrics | aux, moved, refused

    @functools.partial(compiled, gives_up=(1, 2))
    def run_episodes(
        self,
        state: BilevelState,
        start: InnerState,
        reptile_rate: Float[Array, ""],
        episodes: int,
        length: int,
        steps_per_episode: int,
    ) -> tuple[
        BilevelState,
        InnerState,
        InnerState,
        dict[str, Array],
        Bool[Array, "*members leaves"],
        Refused | None,
    ]:
        """`episodes` times `length` outer steps; either part of one episode, or whole ones.

        `start` holds the initial parameters and model state of the current episode. Returns the
        state; parameters and model state at the start of the next (or still the same) episode, and
        as the last step left them; the stacked metrics; and which hyperparameters ever moved.
        """
        self._record(state, f"run (chunks of {episodes} x {length})")

        def body(carry: PyTree, number: Array, *, static: PyTree):
            arrays, start, _ = carry
            state, position = eqx.combine(arrays, static), number * length
            episode = Inputs(
                state,
                self.train.drawn(state.step, position, self.optimizer.num_inner_steps),
                self.val.batch(state.step + steps_per_episode - 1, position + length - 1),
                self.losses,
            )
            state = self.optimizer._begin_episode(episode, steps_per_episode)
            state, metrics, aux, moved = self._steps(state, position, length)

            def restarted():
                if self.start is None:
                    new = self.optimizer._restart(state, start, reptile_rate)
                else:
                    new = self.optimizer._restart_at(state, self.start.at(state.step))
                return _arrays(new), inner_state(new)._replace(s=None)

            ended = state.step % steps_per_episode == 0
            arrays, start = jax.lax.cond(ended, restarted, lambda: (_arrays(state), start))
            return (arrays, start, inner_state(state)._replace(s=None)), (metrics, aux, moved)

        def run(carry: tuple[BilevelState, InnerState]):
            (arrays, static), start = carried(carry[0]), carry[1]
            (arrays, start, reached), others = jax.lax.scan(
                functools.partial(body, static=static),
                (arrays, start, start),
                jnp.arange(episodes, dtype=jnp.int32),
            )
            return (eqx.combine(arrays, static), start), (reached, others)

        (new, start), (reached, (metrics, aux, moved)) = self._unless_over(run, (state, start))
        metrics, aux = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (metrics, aux))
        refused = self._counted(state, metrics)
        new = with_aux(new, _last(aux))
        return new, start, reached, metrics | aux, jnp.any(moved, axis=0), refused

    def launch(self, *arguments: Any) -> tuple[Any, ...]:
        """`run_steps` or `run_episodes` of these arguments, with the results of the latter."""
        if len(arguments) != _OF_STEPS:
            return self.run_episodes(*arguments)
        state, *others = self.run_steps(*arguments)
        return state, None, None, *others

    def may_raise(self, *arguments: Any) -> bool:
        """Whether `launch` of these calls a Python function, as `eqx.error_if` in a loss does.

        They are traced.
        """
        call = Chunk.run_steps if len(arguments) == _OF_STEPS else Chunk.run_episodes
        return contains(traced(call, self, *arguments).jaxpr.jaxpr, CALLBACKS.__contains__)

    def _unless_over(self, function: Callable, carry: PyTree) -> tuple[Any, Any]:
        """Does nothing after a chunk whose refused steps end the run."""
        return (
            function(carry) if self.refused is None else unless(self.refused.over, function, carry)
        )

    def _counted(self, before: BilevelState, metrics: dict[str, Array]) -> Refused | None:
        if self.refused is None:
            return None
        return self.refused.after(before.metadata["rejected"], metrics["rejected"])

    def first_inputs(self, state: BilevelState) -> Inputs:
        """What the first step of the chunk was given."""
        state = without_aux(state)
        first = jnp.zeros((), jnp.int32)
        train = self.train.stack(state.step, first, self.optimizer.num_inner_steps)
        val = self.val.batch(state.step, first)
        return Inputs(state, train, val, self.losses, self._start(state))

    def example(self) -> dict[str, PyTree]:
        """The shapes of one batch of each kind."""

        def one(chunk: "Chunk") -> dict[str, PyTree]:
            first, count = jnp.zeros((), jnp.int32), chunk.optimizer.num_inner_steps
            train = chunk.train.drawn(first, first, count).at(first)
            return {"train_data": train, "val_data": chunk.val.batch(first, first)}

        return eqx.filter_eval_shape(one, self)

    def _start(self, state: BilevelState) -> Start | None:
        return None if self.start is None else self.start.at(state.step)

    def _record(self, state: BilevelState, what: str) -> None:
        record_trace(
            what,
            self.optimizer,
            state,
            self.losses,
            train_data=self.train,
            val_data=self.val,
            lr_hyper=self.lr_hyper,
        )

    def _steps(
        self, state: BilevelState, first: Array, length: int
    ) -> tuple[BilevelState, dict[str, Array], dict[str, Array], Bool[Array, "*members leaves"]]:
        """Steps whose batches start at `first` in the data of this chunk.

        Returns the state, the stacked metrics, those that the losses returned, and which
        hyperparameters ever moved.
        """
        # The metrics of a step are outputs, not inputs of the next: carrying them as well makes
        # the compiler copy them at every step (20 us on a CPU, a fifth of a short step).
        measured = {name: state.metadata[name] for name in METRICS if name != "rejected"}
        arrays, static = carried(_without(state, measured))

        def body(arrays: PyTree, position: Array):
            state = with_metrics(eqx.combine(arrays, static), measured)
            rate = self.lr_hyper
            inputs = Inputs(
                state,
                self.train.stack(state.step, position, self.optimizer.num_inner_steps),
                self.val.batch(state.step, position),
                self.losses,
                self._start(state),
                self.train.repeats,
                self.continues,
            )
            rate = outer_rate(rate(state.step) if callable(rate) else rate)
            new, moving, _ = self.optimizer._advance(inputs, rate)
            metrics = {name: new.metadata[name] for name in METRICS}
            metrics |= self.optimizer._scalars(new.memory)
            metrics |= recorded(self.optimizer, new, self.record)
            aux = {name: new.metadata[name] for name in new.metadata.aux}
            check_names(aux, metrics)
            return _arrays(_without(new, [*measured, *aux])), (metrics, aux, moving)

        steps = first + jnp.arange(length, dtype=first.dtype)
        arrays, (metrics, aux, moving) = jax.lax.scan(body, arrays, steps)
        last = _last({name: metrics[name] for name in measured})
        state = with_metrics(eqx.combine(arrays, static), last)
        return state, metrics, aux, jnp.any(moving, axis=0)


@compiled
def started(optimizer: BilevelOptimizer, state: BilevelState, start: Start) -> BilevelState:
    """A state at the start of an episode, with the initial parameters of that episode."""
    return optimizer._restart_at(state, start.at(state.step))


def _arrays(tree: PyTree) -> PyTree:
    return carried(tree)[0]


def _last(metrics: dict[str, Array]) -> dict[str, Array]:
    return {name: x[-1] for name, x in metrics.items()}


def _without(state: BilevelState, names: Iterable[str]) -> BilevelState:
    return dataclasses.replace(state, metadata=state.metadata.without(names))


def chunk_shapes(
    num_steps: int,
    chunk_size: int,
    steps_per_episode: int | None,
    whole_episodes: bool,
    taken: int = 0,
) -> Iterator[tuple[int, int]]:
    """`(episodes, steps of each)` of every chunk: at most two different ones in a run.

    Whole episodes if one fits into a chunk (or if it must), otherwise parts of one. A run that has
    already `taken` some steps continues with the same chunks as an uninterrupted one.
    """
    if steps_per_episode is None:
        yield from ((1, length) for length in _pieces(taken, num_steps, chunk_size))
        return
    done, begun = divmod(taken, steps_per_episode)
    episodes = num_steps // steps_per_episode
    if begun:
        yield from ((1, length) for length in _pieces(begun, steps_per_episode, chunk_size))
        done += 1
    if steps_per_episode <= chunk_size or whole_episodes:
        most = max(1, chunk_size // steps_per_episode)
        yield from ((count, steps_per_episode) for count in _pieces(done, episodes, most))
        return
    for _ in range(done, episodes):
        yield from ((1, length) for length in _pieces(0, steps_per_episode, chunk_size))


def _pieces(done: int, total: int, most: int) -> Iterator[int]:
    """What remains of pieces of `most` once `done` of the total is done."""
    while done < total:
        piece = min(most - done % most, total - done)
        yield piece
        done += piece
