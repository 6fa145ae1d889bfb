"""Penalised regression on real data, with exact hypergradients in NumPy and float64.

Ridge regression and the elastic net (diabetes, polynomial features) and logistic regression
(digits), with a penalty for each feature. Ridge, and the elastic net on its support, have closed
forms; logistic regression uses Newton's method and a dense solve.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from sklearn.datasets import load_diabetes, load_digits
from sklearn.preprocessing import PolynomialFeatures


class Data(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    u: np.ndarray  # validation
    v: np.ndarray


class Solved(NamedTuple):
    w: np.ndarray
    hypergradient: np.ndarray
    val_loss: float


def diabetes(degree: int) -> Data:
    """Half of the patients to fit, half to evaluate; features of mean 0 and variance 1."""
    x, y = load_diabetes(return_X_y=True)
    x = PolynomialFeatures(degree, include_bias=False).fit_transform(x / x.std(0))
    order = np.random.default_rng(0).permutation(len(x))
    train, val = order[: len(x) // 2], order[len(x) // 2 :]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return Data(x[train], y[train], x[val], y[val])


def digits() -> Data:
    """64 pixels and a constant; ten classes, one-hot."""
    x, y = load_digits(return_X_y=True)
    x, y = np.c_[x / 16, np.ones(len(x))], np.eye(10)[y]
    order = np.random.default_rng(0).permutation(len(x))
    train, val = order[:800], order[800:1_300]
    return Data(x[train], y[train], x[val], y[val])


class Ridge(NamedTuple):
    data: Data

    def solved(self, h: np.ndarray, start: np.ndarray | None = None) -> Solved:
        x, y, u, v = self.data
        hessian = x.T @ x / len(x) + np.diag(np.exp(h))
        w = np.linalg.solve(hessian, x.T @ y / len(x))
        error = u @ w - v
        q = np.linalg.solve(hessian, u.T @ error / len(u))
        return Solved(w, -q * np.exp(h) * w, np.mean(error**2) / 2)

    @property
    def curvature(self) -> float:
        x = self.data.x
        return np.linalg.eigvalsh(x.T @ x / len(x))[-1]

    @property
    def start(self) -> np.ndarray:
        return np.zeros(self.data.x.shape[1])


class Logistic(NamedTuple):
    data: Data

    def solved(self, h: np.ndarray, start: np.ndarray | None = None) -> Solved:
        x, y, u, v = self.data
        w = self.start if start is None else start
        penalties = np.broadcast_to(np.exp(h), w.shape)  # of a feature, for all classes
        factor, before = None, np.inf
        for _ in range(100):
            p = softmax(x @ w)
            gradient = x.T @ (p - y) / len(x) + penalties * w
            norm = np.linalg.norm(gradient)
            if norm < 1e-14:
                break
            if factor is None or norm > before / 10:  # reuse a Hessian while it is good
                factor = self._factor(p, penalties)
            w, before = w - cho_solve(factor, gradient.ravel()).reshape(w.shape), norm
        factor = self._factor(softmax(x @ w), penalties)
        p = softmax(u @ w)
        alpha = u.T @ (p - v) / len(u)
        q = cho_solve(factor, alpha.ravel()).reshape(w.shape)
        loss = -np.mean(np.log(np.sum(p * v, axis=1)))
        return Solved(w, np.sum(-q * penalties * w, axis=1, keepdims=True), loss)

    def _factor(self, p: np.ndarray, penalties: np.ndarray) -> tuple:
        x = self.data.x
        (n, features), classes = x.shape, p.shape[1]
        hessian = np.empty((features, classes, features, classes))
        for c in range(classes):
            for d in range(c + 1):
                weights = p[:, c] * ((c == d) - p[:, d]) / n
                hessian[:, c, :, d] = hessian[:, d, :, c] = (x * weights[:, None]).T @ x
        hessian = hessian.reshape(features * classes, -1)
        return cho_factor(hessian + np.diag(penalties.ravel()))

    @property
    def curvature(self) -> float:
        x = self.data.x
        return np.linalg.eigvalsh(x.T @ x / len(x))[-1] / 2  # softmax has at most 1/2

    @property
    def start(self) -> np.ndarray:
        return np.zeros((self.data.x.shape[1], self.data.y.shape[1]))


class ElasticNet(NamedTuple):
    data: Data

    def solved(self, h: np.ndarray, start: np.ndarray | None = None) -> Solved:
        x, y, u, v = self.data
        l1, l2 = np.exp(h)
        gram, target = x.T @ x / len(x), x.T @ y / len(x)
        w = self.start if start is None else start
        w = self._support(w.copy(), gram, target, l1, l2)
        on = w != 0
        sign, l1, l2 = np.sign(w[on]), l1[on], l2[on]
        hessian = gram[np.ix_(on, on)] + np.diag(l2)
        w[on] = np.linalg.solve(hessian, target[on] - l1 * sign)
        error = u @ w - v
        q = np.linalg.solve(hessian, (u.T @ error / len(u))[on])
        hypergradient = np.zeros_like(h)
        hypergradient[:, on] = -q * l1 * sign, -q * l2 * w[on]
        return Solved(w, hypergradient, np.mean(error**2) / 2)

    def _support(self, w, gram, target, l1, l2, sweeps: int = 5_000) -> np.ndarray:
        """Coordinate descent until nothing moves; only its support and signs are used."""
        for _ in range(sweeps):
            before = w.copy()
            for i in range(len(w)):
                rest = target[i] - gram[i] @ w + gram[i, i] * w[i]
                w[i] = np.sign(rest) * max(abs(rest) - l1[i], 0) / (gram[i, i] + l2[i])
            if np.abs(w - before).max() < 1e-12:
                return w
        raise RuntimeError("coordinate descent does not converge")

    curvature, start = Ridge.curvature, Ridge.start


def tuned(model: Ridge | Logistic | ElasticNet, h: np.ndarray, rate: float, steps: int) -> Solved:
    """Exact gradient descent on the penalties; the last `h` takes the place of the weights."""
    w, solved = None, None
    for _ in range(steps):
        solved = model.solved(h, w)
        w, h = solved.w, h - rate * solved.hypergradient
    return Solved(h, solved.hypergradient, solved.val_loss)


def softmax(a: np.ndarray) -> np.ndarray:
    a = np.exp(a - a.max(axis=1, keepdims=True))
    return a / a.sum(axis=1, keepdims=True)
