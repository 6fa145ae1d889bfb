"""What docs/how_to/coming_from.md says about other libraries' numbers, with their loops in NumPy.

Written after the sources of hypertorch (commit 6241dfa), Betty 0.2.1 (cb6221f) and TorchOpt 0.7.3
(960fb0a), whose RMSProp and Adagrad are torch's.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import gradhpo


RATE = 0.1
_random = np.random.default_rng(0)
X, V = (_random.normal(size=(30, 5)) for _ in range(2))
Y, U = X @ _random.normal(size=5), V @ _random.normal(size=5)
H, W = X.T @ X / 30 + 0.1 * np.eye(5), _random.normal(size=5)
ALPHA = V.T @ (V @ W - U) / 30  # the validation gradient
TRAIN, VAL = (jnp.asarray(X), jnp.asarray(Y)), (jnp.asarray(V), jnp.asarray(U))


def error(w, h, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2


def ridge(w, h, batch):
    return error(w, h, batch) + jnp.sum((0.1 + h) * w**2) / 2  # H, at h = 0


def descent(w, h, batch):
    """One step of gradient descent: a map with the fixed point that `ridge` has."""
    return w - RATE * jax.grad(ridge)(w, h, batch)


def found_by(optimizer):
    """The hypergradient at W; no inner step of these methods changes it."""
    state = optimizer.init(jnp.asarray(W), jnp.zeros(5))
    still = optimizer.compute_hypergradient(state, TRAIN, VAL, ridge, error)
    after = optimizer.step(state, TRAIN, VAL, ridge, error, lr_hyper=0.0).params
    return np.asarray(still), np.asarray(after)


def gradient_at(w):
    return V.T @ (V @ w - U) / 30


# -- the loops, as published -------------------------------------------------------------------


def hypertorch_fixed_point(alpha, K):
    """v <- A^T v + alpha from 0, with A = I - rate H the Jacobian of the map."""
    v = np.zeros_like(alpha)
    for _ in range(K):
        v = v - RATE * H @ v + alpha
    return RATE * v  # the map's derivative by the hyperparameters has the factor rate


def hypertorch_neumann(alpha, K):
    v, total = alpha, alpha
    for _ in range(K):
        v = v - RATE * H @ v
        total = total + v
    return RATE * total


def betty_neumann(alpha, iterations):
    v, p = alpha, alpha
    for _ in range(iterations):
        v = v - RATE * H @ v
        p = v + p
    return RATE * p


def torchopt_ns(alpha, maxiter):
    return betty_neumann(alpha, maxiter)  # `ns(A, b, maxiter, alpha=rate)` is the same loop


TERMS = {  # ours: how many of theirs
    "fixed_point": (hypertorch_fixed_point, 0),
    "hypertorch's neumann": (hypertorch_neumann, -1),
    "Betty": (betty_neumann, -1),
    "TorchOpt": (torchopt_ns, -1),
}


@pytest.mark.parametrize("library", list(TERMS))
def test_terms_of_a_series(library):
    """`Neumann(n)` has n terms."""
    loop, more = TERMS[library]
    solver = gradhpo.Neumann(7, RATE)
    found = lx.linear_solve(lx.MatrixLinearOperator(jnp.asarray(H)), jnp.asarray(ALPHA), solver)
    # Rounding of a sum of seven terms.
    np.testing.assert_allclose(found.value, loop(ALPHA, 7 + more), rtol=1e-13)
    another = loop(ALPHA, 8 + more)
    assert np.linalg.norm(another - found.value) > 1e-2 * np.linalg.norm(another)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["loss", "map"])
def test_fixed_point_of_a_whole_optimizer(kind):
    """From a loss, the series takes the descent rate; from a map, which includes it, step 1."""
    if kind == "loss":
        settings = {"inner_optimizer": optax.sgd(RATE), "linear_solver": gradhpo.Neumann(7, RATE)}
    else:
        settings = {"update_fn": descent, "linear_solver": gradhpo.Neumann(7, 1.0)}
    found, w = found_by(gradhpo.ImplicitOptimizer(**settings))
    q = hypertorch_fixed_point(gradient_at(w), 7)
    np.testing.assert_allclose(found, -q * w, rtol=1e-11)  # rounding; d2 ridge / dw dh is diag(w)


@pytest.mark.thorough
def test_a_few_iterations_of_conjugate_gradients():
    """hypertorch's CG(K=3) on I - A = rate H equals three steps on H."""
    solver = lx.CG(rtol=1e-12, atol=1e-12, max_steps=3)
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(RATE), linear_solver=solver)
    found, w = found_by(optimizer)
    alpha = gradient_at(w)
    x, r = np.zeros(5), alpha
    p = r
    for _ in range(3):
        product = RATE * H @ p
        step = r @ r / (p @ product)
        x, after = x + step * p, r - step * product
        p, r = after + (after @ after) / (r @ r) * p, after
    np.testing.assert_allclose(found, -RATE * x * w, rtol=1e-9)  # orthogonality lost in rounding


def test_bettys_darts_leaves_the_rate_out():
    """Ours differentiates a step, which includes the rate; both derivatives are linear here."""
    found, after = found_by(gradhpo.T1T2Optimizer(optax.sgd(RATE)))
    v = gradient_at(after)
    epsilon = 0.01 / np.linalg.norm(v)
    by_hyperparameters = lambda w: w**2 / 2  # of ridge
    plus, minus = (by_hyperparameters(W + sign * epsilon * v) for sign in (1, -1))
    betty = -(plus - minus) / (2 * epsilon)
    np.testing.assert_allclose(found, RATE * betty, rtol=1e-9)  # rounding over epsilon


# -- where epsilon stands ----------------------------------------------------------------------

SCALES = np.logspace(0, -4, 5)  # of the features: from the third on, gradients are below 1e-3
SMALL = tuple((jnp.asarray(x * SCALES), jnp.asarray(y)) for x, y in ((X, Y), (V, U)))


def rmsprop_as_in_torch(log_rate, decay=0.99, eps=1e-8):
    """sqrt(nu) + eps, by hand."""
    rate = jnp.exp(log_rate)

    def update(g, nu, params=None):
        nu = decay * nu + (1 - decay) * g**2
        return -rate * g / (jnp.sqrt(nu) + eps), nu

    return optax.GradientTransformation(jnp.zeros_like, update)


def adagrad_as_in_torch(log_rate, eps=1e-10):
    rate = jnp.exp(log_rate)

    def update(g, total, params=None):
        total = total + g**2
        return -rate * g / (jnp.sqrt(total) + eps), total

    return optax.GradientTransformation(jnp.zeros_like, update)


def penalised(w, h, batch):
    return error(w, h, batch) + jnp.sum(jnp.exp(h["penalties"]) * w**2) / 2


def tuned(inner):
    optimizer = gradhpo.UnrolledOptimizer(lambda h: inner(h["log_rate"]), unroll_steps=20)
    h = {"penalties": jnp.full(5, -4.0), "log_rate": jnp.asarray(-3.0)}
    state = optimizer.init(jnp.zeros(5), h)
    return optimizer.compute_hypergradient(state, *SMALL, penalised, error)


def off(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.thorough
def test_optax_can_put_epsilon_of_rmsprop_where_torch_has_it():
    """From the page's numbers: the weakest penalty, with gradients below epsilon's root."""
    by_hand = tuned(rmsprop_as_in_torch)
    outside = tuned(lambda h: optax.rmsprop(jnp.exp(h), 0.99, 1e-8, eps_in_sqrt=False))
    inside = tuned(lambda h: optax.rmsprop(jnp.exp(h), 0.99, 1e-8))
    for leaf in by_hand:
        np.testing.assert_allclose(outside[leaf], by_hand[leaf], rtol=1e-9)  # rounding
    weakest = float(inside["penalties"][-1] / by_hand["penalties"][-1])
    assert weakest == pytest.approx(0.67, abs=0.005)  # as rounded on the page
    assert off(inside["penalties"], by_hand["penalties"]) < 1e-4


DEFAULTS = {
    "RMSProp": (rmsprop_as_in_torch, optax.rmsprop, 0.94, 0.44),
    "Adagrad": (adagrad_as_in_torch, optax.adagrad, 0.98, 0.06),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(DEFAULTS))
def test_defaults_of_torch_are_others(name):
    theirs, ours, of_penalties, of_rate = DEFAULTS[name]
    found, expected = tuned(lambda h: ours(jnp.exp(h))), tuned(theirs)
    # As rounded on the page.
    assert off(found["penalties"], expected["penalties"]) == pytest.approx(of_penalties, abs=0.005)
    assert off(found["log_rate"], expected["log_rate"]) == pytest.approx(of_rate, abs=0.005)
