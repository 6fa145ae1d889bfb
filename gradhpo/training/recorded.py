"""What a run records of every state, in addition to its metrics."""

from collections.abc import Callable, Container, Iterable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState
from gradhpo.core.types import METRICS
from gradhpo.utils.repeatable import check_repeatable


RecordFn: TypeAlias = Callable[[BilevelState], dict[str, Array]]


def scalar_hyperparams(optimizer: BilevelOptimizer, hyperparams: PyTree) -> dict[str, Array]:
    """Hyperparameters of shape `()`, by name: `hyperparams.decay`, or `hyperparams` alone.

    In a population their shape is `[members]`.
    """
    shape = () if optimizer.num_members is None else (optimizer.num_members,)
    return {
        ".".join(["hyperparams", *([name] if name else [])]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams)
        for name in [jax.tree_util.keystr(path, simple=True, separator=".")]
        if eqx.is_array(leaf) and leaf.shape == shape
    }


def recorded(
    optimizer: BilevelOptimizer, state: BilevelState, record: RecordFn | None
) -> dict[str, Array]:
    """Scalar hyperparameters, and what the user's function returns."""
    ours = scalar_hyperparams(optimizer, state.hyperparams)
    return ours | ({} if record is None else record(state))


def recorded_names(optimizer: BilevelOptimizer, state: BilevelState) -> list[str]:
    """What every run of this optimizer records."""
    scalars = eqx.filter_eval_shape(optimizer._scalars, state.memory)
    return [*METRICS, *scalars, *scalar_hyperparams(optimizer, state.hyperparams)]


def check_record(optimizer: BilevelOptimizer, state: BilevelState, record: Any) -> list[str]:
    """The names that `record` returns, once they and their values can be recorded."""
    if record is None:
        return []
    check_repeatable(
        record,
        (state,),
        "record(state)",
        made="value of the same state",
        values="its state, which is traced: {said}. Record arrays as they are, without float(...) "
        "or NumPy; for Python functions use gradhpo.Monitor",
        draws="counts its calls, in Python, and a compiled run would do so once for all steps: "
        "gradhpo.Monitor calls a function after each chunk",
    )
    found = eqx.filter_eval_shape(record, state)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"record returned {found!r}; it must return a dict of name to array: "
            "record=lambda state: {'norm': jnp.linalg.norm(state.hyperparams)}"
        )
    ours = recorded_names(optimizer, state)
    for name, value in found.items():
        if name in ours:
            raise ValueError(
                f"record returned {name!r}, which run records already: choose another name"
            )
        is_number = lambda x: jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
        if not isinstance(value, jax.ShapeDtypeStruct) or not is_number(value):
            raise TypeError(f"record returned {value!r} for {name!r}, which is not an array")
    return sorted(found)


def check_names(aux: Iterable[str], ours: Container[str]) -> None:
    """No metric that a loss returns has the name of another one in the history."""
    taken = [name for name in aux if name in ours]
    if taken:
        raise ValueError(
            f"a loss returns the metric {taken[0]}, and the history has another one of that name, "
            "by record= or a Monitor: rename one of them"
        )


def check_monitored(monitored: list[str], ours: list[str]) -> None:
    """Every name stands for one metric."""
    taken = {name for name in monitored if name in ours or monitored.count(name) > 1}
    if taken:
        raise ValueError(
            f"Monitor measures {taken.pop()!r}, which run records already: choose another name"
        )
