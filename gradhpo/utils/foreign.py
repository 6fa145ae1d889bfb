"""What we rely on in other libraries beyond their documented interfaces: wording and private state.

All of it is in this file, and each entry has a test that fails when the other library changes it
(`tests/test_foreign.py`).
"""

import inspect
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.extend.core import JaxprEqn
from jaxtyping import Array, PyTree


# -- beartype ----------------------------------------------------------------------------------

_COMPLAINT = re.compile(
    r"checking the parameters of gradhpo\..*?parameter '(?P<parameter>\w+)'\.\n"
    r"Actual value: (?P<value>.*?)\nExpected type: (?P<expected>.*?)\n-----",
    re.DOTALL,
)


def refused_argument(complaint: str) -> tuple[str, str, str] | None:
    """From jaxtyping's report of a bad argument: name, value, and expected type."""
    found = _COMPLAINT.search(complaint)
    if found is None:
        return None
    expected = re.sub(r"(\w+\.)+(?=\w)|<class '|'>|\.$", "", found["expected"])
    return found["parameter"], " ".join(found["value"].split()), expected


def is_one_number(expected: str) -> bool:
    """Whether the expected type is a real number, `Real[ArrayLike, ""]`."""
    return "Real[Array, '']" in expected


# -- JAX ---------------------------------------------------------------------------------------

# What JAX and Equinox raise if a differentiation rule is missing, and their wording.
NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError, RuntimeError)
NO_REVERSE = "Reverse-mode differentiation does not work"
NO_FORWARD = "can't apply forward-mode"
NO_TANGENT = "Unexpected tangent"
NO_CALLBACK_DERIVATIVE = "callbacks do not support"

# Names of operations: loops whose length is known only at run time, including lineax's solvers,
# which hide theirs (also under vmap); and random numbers, which differ between precisions.
OPEN_LOOPS = ("while", "linear_solve", "vprim")
RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "random_gamma")

STOP_GRADIENT = "stop_gradient"
MAXIMA = ("reduce_max", "reduce_min", "argmax", "argmin", "cummax", "pmax")
LOOPS, BRANCHES = ("scan", "while"), ("cond",)
# Python functions that a program calls, and that may raise: `eqx.error_if` is one.
CALLBACKS = ("pure_callback", "io_callback")


def name_of_operation(eqn: JaxprEqn) -> str:
    """The name under which a function was compiled, otherwise the primitive's."""
    named = eqn.primitive.name in ("jit", "pjit")
    return eqn.params["name"] if named else eqn.primitive.name


def is_custom_vjp(operation: str) -> bool:
    """Whether an operation of a traced program is a call of a function with a `custom_vjp`."""
    return operation.startswith("custom_vjp_call")


def is_recomputed(operation: str) -> bool:
    """Whether an operation of a traced program is a call of `jax.checkpoint`."""
    return operation.startswith(("remat", "checkpoint"))


def needs_a_value(error: Exception) -> bool:
    """Whether something was to be computed in Python from a number that is traced."""
    said = str(error)
    # What JAX says of a slice, and NumPy and Python of an argument that they do not know.
    is_refused = isinstance(error, (TypeError, ValueError, IndexError)) and "Tracer" in said
    return isinstance(error, _NEEDS_A_VALUE) or is_refused


_NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


# -- Python ------------------------------------------------------------------------------------


def is_missing_argument(error: TypeError) -> bool:
    """Whether a call failed because an argument was missing."""
    return "missing" in str(error) and "argument" in str(error)


# -- Equinox -----------------------------------------------------------------------------------


def runtime_check(error: Exception) -> Exception | None:
    """The message of `eqx.error_if`, without its surroundings; `None` for another error."""
    _, marker, said = str(error).partition("_EquinoxRuntimeError: ")
    return eqx.EquinoxRuntimeError(said.partition("\n\n\n---")[0].strip()) if marker else None


# -- optax -------------------------------------------------------------------------------------


def uncalled(given: Any) -> str | None:
    """`optax.sgd(0.1)` for `optax.sgd`: how to call what makes a transformation; or `None`."""
    is_theirs = (getattr(given, "__module__", None) or "").partition(".")[0] == "optax"
    is_maker = inspect.isfunction(given) or inspect.isclass(given)
    if not (is_theirs and is_maker) or "<locals>" in given.__qualname__:
        return None
    first = next(iter(inspect.signature(given).parameters), "")
    arguments = "0.1" if first == "learning_rate" else "..." if first else ""
    inside = "contrib." if ".contrib" in given.__module__ else ""
    return f"optax.{inside}{given.__name__}({arguments})"


def is_transformation(given: Any) -> bool:
    """Whether this is an optax transformation."""
    return isinstance(given, optax.GradientTransformation)


def makes_a_transformation(given: Any) -> bool:
    """Whether this is an `optax.MultiSteps`, which is not a transformation itself."""
    return callable(getattr(given, "gradient_transformation", None))


def keeps_second_moments(inner_opt_state: PyTree) -> bool:
    """Whether an optax state has the field `nu`, as Adam's and its relatives' do."""
    paths = jax.tree_util.tree_flatten_with_path(inner_opt_state)[0]
    return any(getattr(key, "name", None) == "nu" for path, _ in paths for key in path)


def guards_updates(inner_opt_state: PyTree) -> bool:
    """Whether an optax state belongs to a guard against non-finite updates."""
    kinds = (optax.ZeroNansState, optax.ApplyIfFiniteState)
    is_guard = lambda x: isinstance(x, kinds)
    return any(map(is_guard, jax.tree.leaves(inner_opt_state, is_leaf=is_guard)))


def injected_values(inner_opt_state: PyTree) -> list[PyTree]:
    """What `optax.inject_hyperparams` keeps in a state; schedules recompute theirs every step."""
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    return [
        value
        for node in _nodes(inner_opt_state, kinds)
        for name, value in node.hyperparams.items()
        if name not in getattr(node, "hyperparams_states", {})
    ]


def looks_ahead(inner_opt_state: PyTree) -> bool:
    """Whether an optax state holds one of `optax.lookahead`."""
    return bool(_nodes(inner_opt_state, optax.LookaheadState))


def averages(inner_opt_state: PyTree) -> list[PyTree]:
    """The `z` of every `optax.contrib.schedule_free` in an optax state, trees like its params."""
    kind = optax.contrib.ScheduleFreeState
    return [node.z for node in _nodes(inner_opt_state, kind)]


def takes_objective(inner_opt_state: PyTree) -> bool:
    """Whether `optax.contrib.sophia` is among the transformations: it needs the loss as `obj_fn`.

    Others do not get it: the line search of L-BFGS refuses unknown arguments.
    """
    return bool(_nodes(inner_opt_state, optax.contrib.SophiaState))


def _nodes(inner_opt_state: PyTree, kind: Any) -> list[Any]:
    is_one = lambda x: isinstance(x, kind)
    return list(filter(is_one, jax.tree.leaves(inner_opt_state, is_leaf=is_one)))


def forget_secants(inner_opt_state: PyTree) -> PyTree:
    """Empties the memory of L-BFGS: differences of gradients of one loss.

    After the hyperparameters have moved, the next difference would be between two losses, which
    says nothing about curvature.
    """
    is_memory = lambda x: isinstance(x, optax.ScaleByLBFGSState)
    emptied = lambda x: jax.tree.map(jnp.zeros_like, x) if is_memory(x) else x
    return jax.tree.map(emptied, inner_opt_state, is_leaf=is_memory)


def searches_along_lines(inner_opt_state: PyTree) -> bool:
    """Whether an optax state holds one of a line search."""
    kinds = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    return bool(_nodes(inner_opt_state, kinds))


def last_evaluation(inner_opt_state: PyTree) -> tuple[Array, PyTree] | None:
    """The loss and gradient at the new parameters, if a line search keeps them.

    It does so as the last of a chain, where nothing changes its step afterwards.
    """
    search = inner_opt_state[-1] if type(inner_opt_state) is tuple and inner_opt_state else None
    if isinstance(search, optax.ScaleByZoomLinesearchState):
        return search.value, search.grad  # pyright: ignore[reportReturnType]
    return None


def with_evaluation(inner_opt_state: tuple, loss: PyTree, gradient: PyTree) -> tuple:
    """A state that keeps its last evaluation, with this one."""
    search = inner_opt_state[-1]._replace(value=loss, grad=gradient)
    return (*inner_opt_state[:-1], search)
