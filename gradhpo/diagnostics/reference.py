"""The exact hypergradient of a whole horizon, with the inner update of any optimizer."""

import contextlib
from collections.abc import Iterator

import jax

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.checkpoints import square_root
from gradhpo.core.exact import with_its_update
from gradhpo.core.state import BilevelState
from gradhpo.core.wrapper import algorithm_of, rewrapped
from gradhpo.utils.trees import inexact_bytes


# What a method raises while it is traced, compiled or run if it does not work on a problem.
FAILURES = (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError)
# Above this many bytes of inner states, some of them are recomputed instead of kept.
_MOST_BYTES_KEPT = 2**30


def exact_reference(
    like: BilevelOptimizer, state: BilevelState, num_steps: int
) -> BilevelOptimizer:
    """For the inner problems of an optimizer, in memory that fits on most machines."""
    size = inexact_bytes((state.params, state.inner_opt_state, state.model_state))
    segments = square_root(num_steps) if size * num_steps > _MOST_BYTES_KEPT else None
    return rewrapped(like, with_its_update(algorithm_of(like), num_steps, segments))


@contextlib.contextmanager
def reference_explained(given: bool) -> Iterator[None]:
    """Says what to pass if the default reference does not exist."""
    try:
        yield
    except FAILURES as error:
        if given:
            raise
        raise ValueError(
            "the default reference, the exact hypergradient, is not available here; pass "
            "reference=an optimizer (compare_hypergradients also takes an array: "
            f"gradhpo.finite_difference_hypergradient(...)). {type(error).__name__}: {error}"
        ) from error
