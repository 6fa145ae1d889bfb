"""utils/gradients.py against NumPy and against plain JAX."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat

import gradhpo
from gradhpo.algorithms.discount import geometric_sum
from gradhpo.utils.gradients import linearize_gradient
from gradhpo.utils.trees import scaled_norm_and_moving


A = {"w": jnp.arange(6.0).reshape(2, 3), "b": (jnp.array(-2.0), jnp.arange(3))}
B = {"w": jnp.ones((2, 3)), "b": (jnp.array(0.5), jnp.arange(3))}


def test_algebra_is_numpy_on_the_floating_point_leaves():
    np.testing.assert_allclose(gradhpo.tree_l2_norm(A), np.linalg.norm(flat(A)), rtol=1e-15)
    np.testing.assert_allclose(gradhpo.tree_dot(A, B), flat(A) @ flat(B), rtol=1e-15)
    np.testing.assert_allclose(flat(gradhpo.tree_normalize(A)), flat(A) / np.linalg.norm(flat(A)))
    np.testing.assert_allclose(flat(gradhpo.tree_lerp(A, B, 0.25)), 0.75 * flat(A) + 0.25 * flat(B))
    for tree in (gradhpo.tree_normalize(A), gradhpo.tree_lerp(A, B, 0.25)):
        np.testing.assert_array_equal(tree["b"][1], jnp.arange(3))


def test_zeros_keep_shape_dtype_and_functions():
    tree = {"a": jnp.ones(3, jnp.bfloat16), "n": jnp.arange(2), "f": jax.nn.relu}
    zeros = gradhpo.tree_zeros_like(tree)
    assert zeros["a"].dtype == jnp.bfloat16
    assert zeros["n"].dtype == jnp.arange(2).dtype
    assert zeros["f"] is jax.nn.relu
    assert not zeros["a"].any()
    assert not zeros["n"].any()


def test_normalize_keeps_zero_and_reaches_unit_length():
    zero = {"a": jnp.zeros(3)}
    np.testing.assert_array_equal(gradhpo.tree_normalize(zero)["a"], np.zeros(3))
    tiny = {"a": jnp.full(3, 1e-6)}
    np.testing.assert_allclose(gradhpo.tree_l2_norm(gradhpo.tree_normalize(tiny)), 1, rtol=1e-14)
    # Below eps the result is shorter, never longer: x / eps.
    below = gradhpo.tree_normalize({"a": jnp.array([1e-10])}, eps=1e-8)
    np.testing.assert_allclose(below["a"], [1e-2], rtol=1e-14)


def test_norm_of_bfloat16_is_accumulated_in_float32():
    tree = {"a": jnp.ones(10_000, jnp.bfloat16)}
    assert gradhpo.tree_l2_norm(tree).dtype == jnp.float32
    assert gradhpo.tree_l2_norm(tree) == 100  # in bfloat16 the sum would stop at 256


def test_algebra_acts_on_whole_equinox_models(getkey):
    model = eqx.nn.MLP(2, 2, 4, 1, key=getkey())
    middle = gradhpo.tree_lerp(model, gradhpo.tree_zeros_like(model), 0.5)
    np.testing.assert_allclose(gradhpo.tree_l2_norm(middle), gradhpo.tree_l2_norm(model) / 2)
    assert middle.activation is model.activation


def test_vjps_equal_explicit_jacobians(getkey):
    def update(w, h, batch):
        return jnp.tanh(w * h["a"][0]) - batch * jnp.sum(h["a"] ** 2) * w**2

    w, h, batch = jnp.array([0.3, -0.7, 1.1]), {"a": jnp.array([0.4, 0.2])}, jnp.array(0.5)
    v = jnp.array([1.0, -2.0, 0.5])
    by_w, by_h = gradhpo.vjp_wrt_both(update, w, h, batch, v)
    np.testing.assert_allclose(by_w, v @ jax.jacobian(update)(w, h, batch), rtol=1e-13)
    expected = v @ jax.jacobian(update, argnums=1)(w, h, batch)["a"]
    np.testing.assert_allclose(by_h["a"], expected, rtol=1e-13)
    alone = gradhpo.vjp_wrt_lambda(update, w, h, batch, v)
    np.testing.assert_array_equal(alone["a"], by_h["a"])


def test_vjp_leaves_functions_and_integers_alone(getkey):
    model = eqx.nn.MLP(2, 2, 4, 1, key=getkey())
    shrink = lambda m, h, batch: jax.tree.map(
        lambda x: x * (1 - h) if eqx.is_inexact_array(x) else x, m
    )
    by_w, by_h = gradhpo.vjp_wrt_both(shrink, model, jnp.array(0.1), None, model)
    assert by_w.activation is None
    np.testing.assert_allclose(by_h, -gradhpo.tree_dot(model, model), rtol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.9999, 1.0])
def test_w_star_is_the_exponentially_weighted_mean(gamma, getkey):
    points = [jax.random.normal(getkey(), (4,)) for _ in range(12)]
    w_star = jnp.full(4, 1e6)  # ignored at t = 1
    for t, w_prev in enumerate(points, start=1):
        w_star = gradhpo.update_w_star(w_star, w_prev, gamma, t)
        weights = np.array([gamma ** (t - i) for i in range(1, t + 1)])
        expected = weights @ np.stack(points[:t]) / weights.sum()
        np.testing.assert_allclose(w_star, expected, rtol=1e-10)


@pytest.mark.parametrize("gamma", [1e-8, 1e-20, 1e-3])
def test_next_to_zero_nothing_is_nan(gamma):
    gamma = jnp.asarray(gamma, jnp.float32)
    for t in (0, 1, 2, 50):
        exact = sum(float(gamma) ** i for i in range(t))
        np.testing.assert_allclose(geometric_sum(gamma, t), exact, rtol=1e-6)
    new = gradhpo.update_w_star(jnp.full(2, jnp.nan), jnp.ones(2), gamma, 1)
    np.testing.assert_array_equal(new, np.ones(2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.999999, 1.0])
@pytest.mark.parametrize("t", [0, 1, 2, 1000])
def test_geometric_sum_is_accurate_next_to_one(gamma, t, dtype):
    gamma = np.asarray(gamma, dtype)
    expected = np.sum(np.float64(gamma) ** np.arange(t))
    found = geometric_sum(jnp.asarray(gamma), jnp.asarray(t))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("symmetric", [True, False])
def test_linearized_gradient_is_both_second_derivatives(symmetric):
    loss = lambda w, h: jnp.sum(jnp.sin(w) * h) + jnp.sum(w**3) * jnp.sum(h**2)
    w, h, v = jnp.array([0.2, -0.4]), jnp.array([1.0, 0.3]), jnp.array([0.7, -1.3])
    with_rest = lambda w, h: (loss(w, h), None)
    value, gradient, _, products = linearize_gradient(with_rest, w, h, symmetric=symmetric)
    np.testing.assert_allclose(value, loss(w, h))
    np.testing.assert_allclose(gradient, jax.grad(loss)(w, h))
    by_w, by_h = products(v)
    np.testing.assert_allclose(by_w, v @ jax.hessian(loss)(w, h), rtol=1e-13)
    mixed = jax.jacobian(jax.grad(loss), argnums=1)(w, h)
    np.testing.assert_allclose(by_h, v @ mixed, rtol=1e-13)


@pytest.mark.parametrize(
    "sizes", [(1, 2), (1e30, 2e30), (1e-30, 2e-30), (1, 1e-30), (3, 0), (0, 0)]
)
def test_norms_of_leaves_of_very_different_sizes(sizes):
    """Also finds nonzero leaves, though the square of 1e-30 is 0."""
    tree = [jnp.asarray([3 * size, 4 * size], jnp.float32) for size in sizes]
    norm, moving = jax.jit(scaled_norm_and_moving)(tree)
    np.testing.assert_allclose(norm, np.hypot(*(5 * np.asarray(sizes, float))), rtol=1e-6)
    np.testing.assert_array_equal(moving, [size != 0 for size in sizes])
