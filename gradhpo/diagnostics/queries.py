"""Training towards many queries: their losses at the end, and estimates of the hypergradients."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import DrawnStack
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.measured import loss_of
from gradhpo.core.state import BilevelState, with_inner_state
from gradhpo.data.passes import Part
from gradhpo.diagnostics.case import Case
from gradhpo.training.segments import is_common
from gradhpo.utils.freezing import carried
from gradhpo.utils.placement import everywhere
from gradhpo.utils.tracing import count_trace


class Setting(eqx.Module):
    """The batches of all inner steps, and the queries whose losses count at the end.

    `step` is the step of the state where training starts, from which batches are counted.
    """

    part: Part
    queries: PyTree
    losses: LossFunctions
    step: Array
    num_steps: int = eqx.field(static=True)

    @property
    def batches(self) -> DrawnStack:
        """One for each inner step."""
        return self.part.batches.drawn(self.step, jnp.zeros((), jnp.int32), self.part.per_step)

    def case(self, start: BilevelState) -> Case:
        """The case that follows an estimator along these steps."""
        return Case(start, self.batches, self.queries, self.losses, self.num_steps)

    def inputs(self, start: BilevelState, query: PyTree) -> Inputs:
        """For use inside a program."""
        return self.case(start).inputs(start, self.batches, query)

    @property
    def num_queries(self) -> int:
        """How many there are."""
        return next(x for x in jax.tree.leaves(self.queries) if not is_common(x)).shape[0]

    def query(self, number: Any) -> PyTree:
        """One of the queries, as a batch of one."""
        of_one = lambda x: jax.lax.dynamic_slice_in_dim(everywhere(jnp.asarray(x)), number, 1)
        return jax.tree.map(lambda x: x if is_common(x) else of_one(x), self.queries)

    def over_queries(self, function: Callable[[PyTree], PyTree], at_once: int) -> PyTree:
        """The results of a function of a query, stacked, with `at_once` queries in one pass.

        In a pass, what does not depend on the query is computed once.
        """
        if at_once < self.num_queries:
            numbers = jnp.arange(self.num_queries, dtype=jnp.int32)
            size = at_once if at_once > 1 else None
            return jax.lax.map(lambda i: function(self.query(i)), numbers, batch_size=size)
        axes = jax.tree.map(lambda x: None if is_common(x) else 0, self.queries)
        alone = lambda x: x if is_common(x) else everywhere(jnp.asarray(x))[:, None]
        return eqx.filter_vmap(function, in_axes=(axes,))(jax.tree.map(alone, self.queries))


def hypergradients_of_queries(
    optimizer: BilevelOptimizer, start: BilevelState, setting: Setting, at_once: int
) -> tuple[PyTree, Array]:
    """An optimizer's hypergradients at the end of the inner steps, and the validation losses.

    Both have a leading axis, the queries. The hyperparameters stay fixed. Steps before the last
    take all queries as one validation batch, which matters only to an algorithm with a memory.
    """
    count_trace()
    case, per_step = setting.case(start), optimizer.num_inner_steps
    state = case.begin(optimizer, start, setting.batches, setting.queries)
    arrays, static = carried(state)

    def body(arrays: PyTree, k: Array) -> tuple[PyTree, None]:
        state = eqx.combine(arrays, static)
        given = setting.batches, setting.queries, k * per_step
        estimate = optimizer._solve(case.inputs(state, *given))
        state = with_inner_state(state, estimate.z).update(memory=estimate.memory)
        return carried(state)[0], None

    before = setting.num_steps // per_step - 1
    if before:
        arrays, _ = jax.lax.scan(body, arrays, jnp.arange(before, dtype=jnp.int32))
    state = eqx.combine(arrays, static)

    def last(query: PyTree) -> tuple[PyTree, Array]:
        inputs = case.inputs(state, setting.batches, query, before * per_step)
        estimate = optimizer._solve(inputs)
        return estimate.hypergradient, loss_of(estimate.val_loss)

    return setting.over_queries(last, at_once)
