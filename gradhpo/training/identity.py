"""What distinguishes one run from another, for the checkpoints of both."""

from typing import Any

import jax

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner_state import Start
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.core.wrapper import algorithm_of
from gradhpo.data.sources import Feed
from gradhpo.training.members import of_one
from gradhpo.training.responses import (
    function_response,
    inner_response,
    outer_response,
    schedule_response,
    start_response,
)
from gradhpo.utils.description import described, described_arrays, described_function
from gradhpo.utils.freezing import frozen_part


def identity(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    feed: Feed,
    lr_hyper: Any,
    start: Start | None,
    **settings: Any,
) -> dict[str, Any]:
    """Optimizer, settings, starting point and data, as far as they can be compared, as JSON."""
    parts = {
        "params": inner_state(state).w,
        "hyperparams": state.hyperparams,
        "inner_opt_state": state.inner_opt_state,
        "outer_opt_state": state.outer_opt_state,
        "memory": state.memory,
        "model_state": state.model_state,
    }
    frozen = jax.tree.leaves(frozen_part(state.params))
    return {
        "optimizer": described(optimizer),
        **{name: described(value) for name, value in settings.items()},
        "lr_hyper": schedule_response(lr_hyper) if callable(lr_hyper) else described(lr_hyper),
        "key": None if start is None else described_arrays(start.key),
        "start_fn": start and start_response(start, of_one(optimizer, state.hyperparams)),
        "state.step": int(state.step),
        **{f"state.{name}": described_arrays(part) for name, part in parts.items()},
        "the frozen part of state.params": described_arrays(frozen),
        "the update of inner_optimizer": inner_response(optimizer, state),
        "the update of outer_optimizer": outer_response(optimizer, state),
        **_of_own_functions(optimizer, state, feed),
        **feed.described(),
    }


def _of_own_functions(
    optimizer: BilevelOptimizer, state: BilevelState, feed: Feed
) -> dict[str, Any]:
    """The user's functions in an inner update, by their results on a batch, or else by code."""
    algorithm = algorithm_of(optimizer)
    functions = {"grad_fn": algorithm.grad_fn, "update_fn": algorithm.update_fn}
    there = {name: function for name, function in functions.items() if function is not None}
    # By its code alone: calling it may take minutes.
    solver = algorithm.inner_solver
    found = {} if solver is None else {"inner_solver": described_function(solver)}
    batch = feed.train_example() if there else None
    if batch is None:
        return found | {name: described_function(function) for name, function in there.items()}
    return found | {name: function_response(optimizer, state, batch) for name in there}
