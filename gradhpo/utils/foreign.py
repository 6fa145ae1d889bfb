"""What is read of other libraries beyond their documented interfaces: wording and private shapes.

All of it stands here, and each entry has a test that fails when the other library changes it
(`tests/test_foreign.py`).
"""

import re
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


# -- beartype ----------------------------------------------------------------------------------

_COMPLAINT = re.compile(
    r"checking the parameters of gradhpo\..*?parameter '(?P<parameter>\w+)'\.\n"
    r"Actual value: (?P<value>.*?)\nExpected type: (?P<expected>.*?)\n-----",
    re.DOTALL,
)


def refused_argument(complaint: str) -> tuple[str, str, str] | None:
    """Of jaxtyping's report of a bad argument: its name, its value, and the type that it needs."""
    found = _COMPLAINT.search(complaint)
    if found is None:
        return None
    expected = re.sub(r"(\w+\.)+(?=\w)|<class '|'>|\.$", "", found["expected"])
    return found["parameter"], " ".join(found["value"].split()), expected


# -- JAX ---------------------------------------------------------------------------------------

# What JAX and Equinox raise where a rule of differentiation is missing, and how they say so.
NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError, RuntimeError)
NO_REVERSE = "Reverse-mode differentiation does not work"
NO_FORWARD = "can't apply forward-mode"
NO_TANGENT = "Unexpected tangent"
NO_CALLBACK_DERIVATIVE = "callbacks do not support"

# Names of operations: loops whose length only the run finds, with lineax's solvers, which hide
# theirs (also when mapped); and random numbers, which differ between precisions.
OPEN_LOOPS = ("while", "linear_solve", "vprim")
RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "random_gamma")


def is_custom_vjp(operation: str) -> bool:
    """Whether an operation of a traced program is a call of a function with a `custom_vjp`."""
    return operation.startswith("custom_vjp_call")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


# -- Python ------------------------------------------------------------------------------------


def is_missing_argument(error: TypeError) -> bool:
    """Whether a call failed for an argument that it was not given."""
    return "missing" in str(error) and "argument" in str(error)


# -- Equinox -----------------------------------------------------------------------------------


def runtime_check(error: Exception) -> Exception | None:
    """What `eqx.error_if` said, without everything around it; `None` for another error."""
    _, marker, said = str(error).partition("_EquinoxRuntimeError: ")
    return eqx.EquinoxRuntimeError(said.partition("\n\n\n---")[0].strip()) if marker else None


# -- optax -------------------------------------------------------------------------------------


def keeps_second_moments(inner_opt_state: PyTree) -> bool:
    """Whether an optax state has the field `nu`, as Adam's and its relatives' have."""
    paths = jax.tree_util.tree_flatten_with_path(inner_opt_state)[0]
    return any(getattr(key, "name", None) == "nu" for path, _ in paths for key in path)


def injected_values(node: Any) -> list[PyTree]:
    """Of a state of `optax.inject_hyperparams`, the values that no schedule makes anew."""
    return [
        value
        for name, value in node.hyperparams.items()
        if name not in getattr(node, "hyperparams_states", {})
    ]
