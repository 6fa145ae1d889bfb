"""Shared by the tests of single-loop and first-order methods: losses with their derivatives."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from problems import relaxed

import gradhpo


# -- optimizers, in optax and in NumPy --------------------------------------------------------

RATE, MOMENTUM = 0.001, 0.8
HEAVY_BALL = relaxed(optax.sgd(RATE, momentum=MOMENTUM))
ADAM = relaxed(optax.adam(0.01))
PLAIN = relaxed(optax.sgd(RATE))


class Momentum:
    def __init__(self):
        self.velocity = 0.0

    def __call__(self, x, gradient):
        self.velocity = MOMENTUM * self.velocity + gradient
        return x - RATE * self.velocity


class Adam:
    def __init__(self, rate=0.01):
        self.rate, self.count, self.first, self.second = rate, 0, 0.0, 0.0

    def __call__(self, x, gradient):
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.count), self.second / (1 - 0.999**self.count)
        return x - self.rate * mean / (np.sqrt(square) + 1e-8)


BY_HAND = {"momentum": (HEAVY_BALL, Momentum), "Adam": (ADAM, Adam)}

# -- weighted fourth powers, and squares with a direct term -----------------------------------

EXAMPLES, FEATURES = 5, 3


def quartic(w, a, batch):
    return jnp.sum(jnp.exp(a) * (batch[0] @ w - batch[1]) ** 4) / 4


def squares(w, a, batch):
    return jnp.sum((batch[0] @ w - batch[1]) ** 2) + 0.1 * jnp.sum(a**2)


class Quartic(NamedTuple):
    """The training loss at a point: derivatives by the parameters and by `a`."""

    gradient: np.ndarray
    hessian: np.ndarray
    mixed: np.ndarray  # [features, examples]
    by_a: np.ndarray


def quartic_at(w, a, batch):
    x, y = batch
    r, weights = x @ w - y, np.exp(a)
    gradient, mixed = x.T @ (weights * r**3), x.T * (weights * r**3)
    return Quartic(gradient, 3 * x.T @ ((weights * r**2)[:, None] * x), mixed, weights * r**4 / 4)


def squares_at(w, a, batch):
    """The derivatives by the parameters and by `a`."""
    x, y = batch
    return 2 * x.T @ (x @ w - y), 0.2 * a


class Data(NamedTuple):
    """Mini-batches `[steps, inner steps, ...]`, a validation batch, and a starting point."""

    x: np.ndarray
    y: np.ndarray
    val: tuple
    w: np.ndarray
    a: np.ndarray

    def batch(self, step, t):
        return self.x[step, t], self.y[step, t]

    def stack(self, step):
        return gradhpo.BatchStack((jnp.asarray(self.x[step]), jnp.asarray(self.y[step])))


def data(steps, inner_steps):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape)
    x, y = draw(steps, inner_steps, EXAMPLES, FEATURES), draw(steps, inner_steps, EXAMPLES)
    return Data(x, y, (draw(4, FEATURES), draw(4)), 0.5 * draw(FEATURES), draw(EXAMPLES))


# -- a quadratic with a known solution --------------------------------------------------------


class Quadratic(NamedTuple):
    """Inner w'Hw/2 - w'(Ja + c), outer (w - t)'Q(w - t)/2 + rho |a|^2/2."""

    h: np.ndarray
    q: np.ndarray
    j: np.ndarray
    c: np.ndarray
    t: np.ndarray
    rho: float = 0.1

    def train_loss(self, w, a, batch):
        return w @ self.h @ w / 2 - w @ (self.j @ a + self.c)

    def val_loss(self, w, a, batch):
        away = w - self.t
        return away @ self.q @ away / 2 + self.rho * jnp.sum(a**2) / 2

    def hypergradient(self, a):
        """At the inner optimum."""
        w = np.linalg.solve(self.h, self.j @ a + self.c)
        return self.rho * a + self.j.T @ np.linalg.solve(self.h, self.q @ (w - self.t))

    @property
    def solution(self):
        """Where the hypergradient is 0; it is linear."""
        zero = np.zeros(self.j.shape[1])
        slope = np.stack([self.hypergradient(x) for x in np.eye(len(zero))], 1)
        slope = slope - self.hypergradient(zero)[:, None]
        return np.linalg.solve(slope, -self.hypergradient(zero))


def quadratic(size=6, hyperparams=4):
    random = np.random.default_rng(0)
    definite = lambda a: a @ a.T / size + 0.5 * np.eye(size)
    h, q = (definite(random.normal(size=(size, size))) for _ in range(2))
    j = random.normal(size=(size, hyperparams))
    return Quadratic(h, q, j, random.normal(size=size), random.normal(size=size))
