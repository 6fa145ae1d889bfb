"""Initial parameters of every episode from a user's function."""

from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner_state import Start
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.training.members import of_one
from gradhpo.utils.keys import is_key
from gradhpo.utils.repeatable import check_repeatable
from gradhpo.utils.validation import check_arity


def make_start(
    start_fn: Callable | None,
    key: Array | None,
    state: BilevelState,
    optimizer: BilevelOptimizer,
    steps_per_episode: int | None,
    reptile_rate: RealScalarLike,
) -> Start | None:
    """The `start_fn` of a run with its key, once both are checked."""
    if start_fn is None and key is None:
        return None
    if start_fn is None or key is None:
        given, missing = ("key", "start_fn") if start_fn is None else ("start_fn", "key")
        raise ValueError(
            f"run got {given} but no {missing}: new parameters in each episode need both, "
            "start_fn=lambda key, hyperparams: params, key=jax.random.key(0)"
        )
    check_arity(start_fn, "start_fn", "key, hyperparams")
    if steps_per_episode is None:
        raise ValueError(
            "start_fn makes the parameters at the start of each episode: pass steps_per_episode, "
            "the outer steps of an episode (1 if each step trains from its start to its end)"
        )
    if np.any(np.asarray(reptile_rate) != 1):
        raise ValueError(
            f"reptile_rate={reptile_rate} moves the start of the next episode, but start_fn "
            "replaces it: leave one of them out"
        )
    key = key if is_key(key) else jax.random.wrap_key_data(key)
    check_repeatable(
        start_fn,
        (key, of_one(optimizer, state.hyperparams)),
        "start_fn(key, hyperparams)",
        made="start of the same key",
        values="its arguments, which are traced: {said}. Write jnp.where instead of a branch, and "
        "leave out float(...) and NumPy",
        draws="counts its calls, in Python, and a compiled run would do so once for all episodes. "
        "Draw with the key: jax.random.normal(key, shape)",
    )
    start = Start(start_fn, key, steps_per_episode, state.model_state)
    eqx.filter_eval_shape(lambda: optimizer._restart_at(state, start))  # raises if it does not fit
    return start
