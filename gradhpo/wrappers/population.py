r"""A population: members follow their hypergradients, the worst copy the best and mutate."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.first_state import first_state
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.outer_step import Advance
from gradhpo.core.state import BilevelState
from gradhpo.core.types import MetricDict, RealScalarLike
from gradhpo.utils.keys import key_of_numbers
from gradhpo.utils.placement import entry, everywhere, sharded_like
from gradhpo.utils.processes import numbers
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity
from gradhpo.wrappers.each_member import EachMember
from gradhpo.wrappers.exploiting import exploited, running_mean
from gradhpo.wrappers.family import draw_family
from gradhpo.wrappers.first_members import first_members, spread_out
from gradhpo.wrappers.members import (
    Member,
    PopulationMemory,
    memory_of,
    numbered,
    part_of,
    with_part,
)
from gradhpo.wrappers.mutations import Mutation, RandomMutation, as_mutation


@checked
class Population(EachMember):
    r"""Runs `num_members` copies of any optimizer, each with its own hyperparameters.

    Every member follows its own hypergradient. After every `exploit_every` steps the worst members
    become copies of the best, and their hyperparameters mutate: descent inside, exploration
    outside. All members see the same batches and are compiled as one program.

    The worst are the $\max(1, \mathrm{round}(\mathtt{fraction} \cdot K))$ members, at most half of
    all, with the highest running mean (decay 0.9) of the validation loss. Each copies one of as
    many best members, chosen at random: parameters, inner and outer optimizer state, model state,
    memory, running mean, and hyperparameters, which then mutate. A member whose last step was
    refused as non-finite counts as the worst, is always replaced, and does not hold up the others.

    **Arguments:**

    - `optimizer`: any other optimizer, `TaskBatched` included.
    - `num_members`: $K$, at least 1.
    - `exploit_every`: steps between two exploits, at least 1. Default `None`: members descend
        independently.
    - `fraction`: the share of members to replace, in (0, 0.5], default 0.2.
    - `mutation`: a function `(key, hyperparams) -> hyperparams` of one member, or
        [`RandomMutation`][gradhpo.RandomMutation] (the default),
        [`ResampleMutation`][gradhpo.ResampleMutation] or
        [`LearnedMutation`][gradhpo.LearnedMutation].

    The state: all arrays that are trained or tuned, optimizer states, model state, metrics and
    `memory.of_each` have a leading member axis; frozen leaves, other leaves of the model and notes
    are shared. `memory.parent` is the number of the member that each one copied in the last step,
    or its own. Metrics are measured before an exploit: a copy still shows the metrics of the
    member that it replaced. `best(state)` and `of_member(state, number)` are states of `optimizer`.

    Hyperparameters of several kinds (positive ones and logarithms) need a mutation that you write.
    Around [`FixedOptimizer`][gradhpo.FixedOptimizer] it is population based training without
    hypergradients.

    In [`run`][gradhpo.run] the history has metrics `[steps, members]`, and `history["parent"]` if
    there are exploits; callbacks and loggers see the lowest of the members under each name, and all
    of them under `members.<name>`. `max_rejections` counts steps in which all members were refused.
    Episodes restart every member where it began, and a copy where its source began.

    To spread members over devices, pass arrays that are sharded along their first axis: devices
    communicate only for exploits, and for a mutation that learns.

    **Raises:** `ValueError` for `num_members < 1`, `exploit_every < 1` or with one member, a
    `fraction` outside (0, 0.5], a `Population` in a `Population`, a mutation that learns around an
    optimizer without hypergradients, or a state of another number of members; `TypeError` for
    anything else as `mutation`.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum(w**2 + jnp.sin(5.0 * w))
    optimizer = gradhpo.Population(
        gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.adam(0.01), unroll_steps=5),
        num_members=8, exploit_every=20, mutation=gradhpo.RandomMutation(scale=0.3),
    )
    spread = lambda key, h: h + jax.random.normal(key, h.shape)
    state = optimizer.init(jnp.zeros(2), jnp.zeros(2), spread=spread, key=jax.random.key(0))
    assert state.params.shape == state.hyperparams.shape == (8, 2)
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    state, history = gradhpo.run(
        optimizer, state, losses, None, None, num_steps=100, progress=False
    )
    assert history["val_loss"].shape == (100, 8)
    best = optimizer.best(state)
    assert best.hyperparams.shape == (2,)
    ```

    ??? cite "Reference"

        Jaderberg et al., *Population Based Training of Neural Networks*, 2017, arXiv:1711.09846;
        with hypergradients as in Tao et al., *Learning to Mutate with Hypergradient Guided
        Population*, NeurIPS 2020.
    """

    optimizer: BilevelOptimizer
    num_members: int = eqx.field(static=True)
    exploit_every: int | None = eqx.field(static=True, default=None)
    fraction: float = eqx.field(static=True, default=0.2)
    # Made when it is needed: arrays that are made on import would start JAX then.
    mutation: Mutation = eqx.field(converter=as_mutation, default_factory=RandomMutation)

    def __check_init__(self):
        check_count("num_members", self.num_members)
        if self.optimizer.num_members is not None:
            raise ValueError("Population(optimizer) got a population; one member axis is enough")
        if not 0 < self.fraction <= 0.5:
            raise ValueError(
                f"fraction={self.fraction} must be in (0, 0.5]: at most half copy the other half"
            )
        if self.exploit_every is not None:
            check_count("exploit_every", self.exploit_every)
            if self.num_members == 1:
                raise ValueError("exploit_every needs two members or more; num_members is 1")
        if self.mutation.learns and not self.optimizer.tunes:
            raise ValueError(
                f"{type(self.mutation).__name__} learns from hypergradients, and "
                f"{type(self.optimizer).__name__} computes none: use RandomMutation"
            )

    @checked
    def init(
        self,
        params: PyTree,
        hyperparams: PyTree,
        *,
        spread: Callable[[Array, PyTree], PyTree] | None = None,
        key: Array | None = None,
        batch: PyTree = None,
        model_state: PyTree = None,
        losses: LossFunctions | None = None,
        val_batch: PyTree = None,
    ) -> BilevelState:
        """The state at step 0.

        **Arguments:**

        - `params`, `hyperparams`, `model_state`: with `spread`, for one member; without,
            every array that is trained or tuned, and all of `model_state`, has the leading axis
            `[members]`.
        - `spread`: `(key, hyperparams) -> hyperparams`, makes the hyperparameters of each member
            from the given ones. Parameters and model state are the same for all. Default `None`.
        - `key`: a PRNG key, for `spread`, exploits and the wrapped optimizer, kept in the memory.
            Default `None`: `jax.random.key(0)`, and none for the wrapped optimizer.
        - `batch`: an example of a training batch, for the wrapped optimizer. Default `None`.
        - `losses`, `val_batch`: [`LossFunctions`][gradhpo.LossFunctions] and an example of a
            validation batch, to name the metrics that losses return. Batches have no member axis.
            Default `None`.

        **Raises:** `ValueError` for an array without the member axis, another structure or shape
        from `spread`, NaN, or nothing to train or to tune; `TypeError` for complex leaves, or
        hyperparameters that are not floating-point arrays.
        """
        given = params, hyperparams, model_state, batch, key
        if spread is None:
            return first_state(self, self._init_state, *given, losses, val_batch)
        check_arity(spread, "spread", "key, hyperparams")

        def make(params, hyperparams, model_state, batch, key):
            of_one = params, hyperparams, model_state, key
            return self._init_state(*spread_out(spread, self.num_members, *of_one), batch, key)

        return first_state(self, make, *given, losses, val_batch)

    def best(self, state: BilevelState) -> BilevelState:
        """The member with the lowest validation loss of the last step, for the wrapped `optimizer`.

        Members that were replaced at the end of that step, which are not measured yet, do not
        count, nor do those whose step was refused.

        **Arguments:** `state`: from this optimizer.

        **Raises:** `ValueError` if no member has a finite validation loss (before the first step),
        or for a state of another number of members.
        """
        memory, loss = memory_of(state.memory, self.num_members), state.metadata["val_loss"]
        traced = isinstance(loss, Tracer)
        xp, here = (jnp, everywhere) if traced else (np, numbers)
        parent, mean, loss = map(here, (memory.parent, memory.mean_val_loss, loss))
        measured = xp.isfinite(loss) & xp.isfinite(mean)  # the mean is not, after a refused step
        measured &= parent == xp.arange(self.num_members, dtype=parent.dtype)
        if not traced and not np.any(measured):
            raise ValueError(
                "no member has a finite validation loss: take a step first, or choose one with "
                "of_member(state, number)"
            )
        return self._member(state, xp.argmin(xp.where(measured, loss, xp.inf)))

    def of_member(self, state: BilevelState, number: int) -> BilevelState:
        """The state of one member, as the wrapped `optimizer` takes it.

        **Arguments:** `state`: from this optimizer; `number`: of the member, counted from 0.

        **Raises:** `ValueError` for a number without a member, or a state of another number of
        members.
        """
        if not 0 <= number < self.num_members:
            raise ValueError(
                f"of_member(number={number}): the {self.num_members} members are numbered from 0 "
                f"to {self.num_members - 1}"
            )
        return self._member(state, number)

    def plot_family(self, history: Mapping[str, np.ndarray], ax: Any = None) -> Any:
        """Draws who copied whom: a line for each member, by its validation loss.

        **Arguments:** `history`: of a [`run`][gradhpo.run] with `exploit_every`; `ax`: the
        matplotlib axes to draw into, by default new ones.

        **Returns:** `ax`.

        **Raises:** `ValueError` for a history without exploits; `ImportError` without matplotlib.
        """
        return draw_family(history, ax)

    # -- one step ------------------------------------------------------------------------------

    def _advance(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Advance:
        def advance(inputs: Inputs) -> tuple[Member, Array, PyTree]:
            new, moving, hypergradient = self.optimizer._advance(inputs, lr_hyper)
            return part_of(new, new.memory), moving, hypergradient

        state, memory = inputs.state, memory_of(inputs.state.memory, self.num_members)
        own, moving, hypergradients = self._each(advance, inputs)
        loss, rejected = own.metrics["val_loss"], own.metrics["rejected"]
        counts = (rejected == state.metadata["rejected"]) & jnp.isfinite(loss)
        mean, count = running_mean(memory.mean_val_loss, memory.num_losses, loss, counts)
        memory = dataclasses.replace(
            memory,
            mean_val_loss=mean,
            num_losses=count,
            mutation=self.mutation.learn(memory.mutation, hypergradients, state.hyperparams),
            of_each=own.memory,
        )
        step, nobody = state.step + 1, sharded_like(numbered(self.num_members), mean)
        if self.exploit_every is not None:
            own, memory = jax.lax.cond(
                step % self.exploit_every == 0,
                lambda: exploited(own, memory, step, self._num_replaced, self.mutation),
                lambda: (own, dataclasses.replace(memory, parent=nobody)),
            )
        state = with_part(state, own, memory).update(step=step)
        return Advance(state, moving, hypergradients)

    @property
    def _num_replaced(self) -> int:
        return min(max(1, round(self.fraction * self.num_members)), self.num_members // 2)

    def _init_state(
        self,
        params: PyTree,
        hyperparams: PyTree,
        model_state: PyTree,
        batch: PyTree,
        key: Array | None,
    ) -> BilevelState:
        given = params, hyperparams, model_state, batch, key
        return first_members(self.optimizer, self.mutation, self.num_members, *given)

    def _adopt(self, state: BilevelState, *, keep_memory: bool) -> BilevelState:
        memory = memory_of(state.memory, self.num_members)

        def adopt(own: Member) -> Member:
            new = self.optimizer._adopt(with_part(state, own), keep_memory=keep_memory)
            return part_of(new, new.memory)

        own = jax.vmap(adopt)(part_of(state, memory.of_each))
        if not keep_memory:
            of_first = jax.tree.map(lambda x: entry(x, 0), own.hyperparams)
            learns = jax.random.fold_in(key_of_numbers(memory.key), 0)
            learned = self.mutation.init(learns, of_first)
            memory = dataclasses.replace(memory, mutation=learned)
        return with_part(state, own, dataclasses.replace(memory, of_each=own.memory))

    def _scalars(self, memory: PopulationMemory) -> MetricDict:
        memory = memory_of(memory, self.num_members)
        found = {} if self.exploit_every is None else {"parent": memory.parent}
        if not jax.tree.leaves(memory.of_each):
            return found
        return jax.vmap(self.optimizer._scalars)(memory.of_each) | found
