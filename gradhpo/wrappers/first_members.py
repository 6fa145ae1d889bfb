"""The members of a population at step 0."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.draws import redrawn
from gradhpo.core.state import BilevelState
from gradhpo.utils.freezing import trained
from gradhpo.utils.keys import key_of_numbers, numbers_of_key
from gradhpo.utils.placement import entry, split_like
from gradhpo.wrappers.members import (
    Member,
    PopulationMemory,
    check_member_axis,
    numbered,
    part_of,
    with_part,
)
from gradhpo.wrappers.mutations import Mutation, check_returned


def spread_out(
    spread: Callable[[Array, PyTree], PyTree],
    num_members: int,
    params: PyTree,
    hyperparams: PyTree,
    model_state: PyTree,
    key: Array | None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Params, hyperparameters and model state of all members, from one member's."""
    of_all = lambda x: jnp.broadcast_to(x, (num_members, *x.shape))
    params = eqx.combine(jax.tree.map(of_all, trained(params)), params)
    model_state = jax.tree.map(of_all, model_state)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_members)
    every = [spread(key, hyperparams) for key in keys]
    for made in every:
        check_returned(made, hyperparams, "spread")
    return params, jax.tree.map(lambda *x: jnp.stack(x), *every), model_state


def first_members(
    optimizer: BilevelOptimizer,
    mutation: Mutation,
    count: int,
    params: PyTree,
    hyperparams: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: Array | None,
) -> BilevelState:
    """The state of a population, from arrays with a leading member axis."""
    w = trained(params)
    for name, tree in (("params", w), ("hyperparams", hyperparams), ("model_state", model_state)):
        check_member_axis(tree, name, count)

    def first(number: int) -> Member:
        of_one = lambda tree: jax.tree.map(lambda x: entry(x, number), tree)
        given = eqx.combine(of_one(w), params), of_one(hyperparams), of_one(model_state)
        state = optimizer._init_state(*given, batch, key)
        return part_of(state, redrawn(state.memory, number))

    # One by one: under vmap, zeros like an array do not know where it is.
    with jax.debug_nans(False):  # metrics that are not measured yet are NaN
        own = jax.tree.map(lambda *x: jnp.stack(x), *map(first, range(count)))
        own = split_like(own, (w, hyperparams))
    key = jax.random.key(0) if key is None else key
    draws, learns = jax.random.split(key_of_numbers(numbers_of_key(key)))
    of_first = jax.tree.map(lambda x: entry(x, 0), hyperparams)
    mean = jnp.full(count, jnp.inf, own.metrics["val_loss"].dtype)
    none, number = jnp.zeros(count, jnp.int32), numbered(count)
    mean, none, number = split_like((mean, none, number), (w, hyperparams))
    memory = PopulationMemory(
        key=numbers_of_key(draws),
        mean_val_loss=mean,
        num_losses=none,
        parent=number,
        origin=number,
        # Folded, because `spread` has drawn with the keys that a split gives.
        mutation=mutation.init(jax.random.fold_in(learns, 0), of_first),
        of_each=own.memory,
    )
    return with_part(BilevelState.create(params, hyperparams, (), ()), own, memory)
