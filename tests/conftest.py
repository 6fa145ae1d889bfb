"""Strict numerics for every test: float64, no silent promotion of dtypes or ranks."""

import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from gradhpo.utils.tracing import forget_traces  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    forget_traces()


@pytest.fixture
def getkey():
    """A new PRNG key at every call, the same ones in every run."""
    keys = iter(jax.random.split(jax.random.key(20261121), 200))
    return lambda: next(keys)


@pytest.fixture
def as_a_user_has_it():
    """Standard promotion rules and float32, as in a user's own program."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield
