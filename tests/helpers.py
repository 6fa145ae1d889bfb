"""Trees of arrays, compared."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def quick(cases, *, keep):
    """Test parameters; those not in `keep` run only with `-m thorough`."""
    missing = [case for case in keep if case not in cases]
    assert not missing, missing
    as_args = lambda case: case if isinstance(case, tuple) else (case,)
    return [
        case if case in keep else pytest.param(*as_args(case), marks=pytest.mark.thorough)
        for case in cases
    ]


def arrays(tree):
    """Only arrays and numbers, keys as their data: no functions, no names."""
    is_key = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if is_key(x) else x, eqx.filter(tree, eqx.is_array_like)
    )


def assert_same(found, expected, rtol=0.0, atol=0.0):
    """The same structure, dtypes and values, NaN included, to a tolerance or bit for bit."""

    def compare(x, y):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)

    jax.tree.map(compare, arrays(found), arrays(expected))


def flat(tree):
    """The floating-point numbers of a tree, concatenated."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array_like))
    return np.concatenate([np.ravel(x) for x in leaves])


def relative_error(found, exact):
    return np.max(np.abs(flat(found) - flat(exact))) / np.max(np.abs(flat(exact)))
