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
