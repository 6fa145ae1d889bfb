r"""Structures of a Fisher matrix: which products of gradients to keep, and how to solve with it."""

import abc
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.extend import accumulation_dtype, ravel, unravel


# A penalty as a function of the parameters alone.
PenaltyOf: TypeAlias = Callable[[PyTree], Array]

# Kronecker factors of longer sides would be larger than the matrix that they approximate.
LONGEST_SIDE = 5_000


class FisherStructure(eqx.Module):
    """Which part of the Fisher matrix is kept."""

    @abc.abstractmethod
    def products(self, gradients: PyTree) -> PyTree:
        """The kept products of gradients like `w`, summed over their leading axis."""

    @abc.abstractmethod
    def factorised(self, mean: PyTree, damping: Array, penalty: PenaltyOf | None, w: PyTree) -> Any:
        """The factors of the Fisher matrix plus `damping` and the penalty's Hessian."""

    @abc.abstractmethod
    def solve(self, factors: Any, a: PyTree) -> PyTree:
        """The solution for a right-hand side like `w`, in the dtype of the factors."""


class Dense(FisherStructure):
    """All products."""

    def products(self, gradients: PyTree) -> Array:
        rows = jax.vmap(lambda g: ravel(g, accumulation_dtype(g)))(gradients)
        return _product("ki,kj->ij", rows, rows)

    def factorised(
        self, mean: Array, damping: Array, penalty: PenaltyOf | None, w: PyTree
    ) -> Array:
        matrix = mean + damping * jnp.eye(len(mean), dtype=mean.dtype)
        if penalty is not None:
            of_row = lambda row: penalty(unravel(row, w))
            matrix += jax.hessian(of_row)(ravel(w, mean.dtype)).astype(mean.dtype)
        return jnp.linalg.cholesky(matrix)

    def solve(self, factors: Array, a: PyTree) -> PyTree:
        solution = jax.scipy.linalg.cho_solve((factors, True), ravel(a, factors.dtype))
        return unravel(solution, _like(a, factors.dtype))


class Diagonal(FisherStructure):
    """Squares."""

    def products(self, gradients: PyTree) -> PyTree:
        return jax.tree.map(lambda g: jnp.sum(jnp.square(_wide(g)), axis=0), gradients)

    def factorised(
        self, mean: PyTree, damping: Array, penalty: PenaltyOf | None, w: PyTree
    ) -> PyTree:
        added = diagonal_of_hessian(penalty, w)
        return jax.tree.map(lambda x, y: x + damping + y.astype(x.dtype), mean, added)

    def solve(self, factors: PyTree, a: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: y.astype(x.dtype) / x, factors, a)


class Kronecker(FisherStructure):
    r"""$L = \overline{GG^\top}$ and $R = \overline{G^\top G}$ for each matrix of weights.

    They stand for $L \otimes R / \mathrm{tr}\,L$. Squares for everything else.
    """

    def products(self, gradients: PyTree) -> list[Any]:
        def of_leaf(g: Array) -> Any:
            sides, g = sides_of(g.shape[1:]), _wide(g)
            if sides is None:
                return jnp.sum(jnp.square(g), axis=0)
            g = g.reshape(-1, *sides)
            rows = jnp.moveaxis(g, 1, 0).reshape(sides[0], -1)
            return square(rows), square(jnp.swapaxes(g.reshape(-1, sides[1]), 0, 1))

        return [of_leaf(g) for g in jax.tree.leaves(gradients)]

    def factorised(
        self, mean: list[Any], damping: Array, penalty: PenaltyOf | None, w: PyTree
    ) -> list[Any]:
        added = jax.tree.leaves(diagonal_of_hessian(penalty, w))

        def of_leaf(kept: Any, added: Array) -> Any:
            if not isinstance(kept, tuple):
                return kept + damping + added.astype(kept.dtype)
            left, right = kept
            total = jnp.trace(left)
            total = jnp.where(total > 0, total, 1)  # no gradient yet: a unit that is never active
            # Damping and penalty are s times a number per row and a number per column. Divided by
            # the roots of these numbers, the matrix is a Kronecker product plus s.
            s, row, column = separable(damping + added.reshape(len(left), -1).astype(left.dtype))
            row, column = jax.lax.rsqrt(row), jax.lax.rsqrt(column)
            of_left, u = jnp.linalg.eigh(jnp.outer(row, row) * left)
            of_right, v = jnp.linalg.eigh(jnp.outer(column, column) * right)
            of_left, of_right = jnp.maximum(of_left, 0), jnp.maximum(of_right, 0)
            spectrum = jnp.outer(of_left, of_right) / total + s
            return row[:, None] * u, column[:, None] * v, spectrum

        return [of_leaf(*pair) for pair in zip(mean, added, strict=True)]

    def solve(self, factors: list[Any], a: PyTree) -> PyTree:
        def of_leaf(factors: Any, a: Array) -> Array:
            if not isinstance(factors, tuple):
                return a.astype(factors.dtype) / factors
            u, v, spectrum = factors
            matrix = a.reshape(spectrum.shape).astype(spectrum.dtype)
            within = _product("im,ij,jn->mn", u, matrix, v) / spectrum
            return _product("im,mn,jn->ij", u, within, v).reshape(a.shape)

        leaves, treedef = jax.tree.flatten(a)
        solved = [of_leaf(*pair) for pair in zip(factors, leaves, strict=True)]
        return jax.tree.unflatten(treedef, solved)


STRUCTURES: dict[str, FisherStructure] = {
    "dense": Dense(),
    "kronecker": Kronecker(),
    "diagonal": Diagonal(),
}


def sides_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The shape of a leaf as a matrix; `None` for a vector, or if a side is too long.

    A kernel has its outputs along its first axis (Equinox) or its last (Flax). The smaller factors
    decide.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    first, last = (shape[0], math.prod(shape[1:])), (math.prod(shape[:-1]), shape[-1])
    sides = min(first, last, key=max)
    return sides if max(sides) <= LONGEST_SIDE else None


def square(rows: Array, levels: int = 2) -> Array:
    r"""$AA^\top$ for $A$ = `rows`, of shape `[..., m, n]`.

    It is symmetric: three of its four quarters are enough, and three quarters of two of these, 5/8
    of the flops. Whether it takes less time depends on the size and the device. Small and odd ones
    are computed whole.
    """
    *outer, m, n = rows.shape
    if levels == 0 or m % 2 or m < 64:
        return _product("...mn,...pn->...mp", rows, rows)
    halves = rows.reshape(*outer, 2, m // 2, n)
    within = square(halves, levels - 1)
    across = _product("...mn,...pn->...mp", halves[..., 0, :, :], halves[..., 1, :, :])
    upper = jnp.concatenate([within[..., 0, :, :], across], axis=-1)
    lower = jnp.concatenate([jnp.swapaxes(across, -1, -2), within[..., 1, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def diagonal_of_hessian(penalty: PenaltyOf | None, w: PyTree) -> PyTree:
    r"""The diagonal of a penalty's Hessian, $s \odot (\nabla^2 p)\,s$ with random signs $s$.

    Exact if the Hessian is diagonal, otherwise an unbiased estimate. Negative entries count as 0,
    so that the sum with the Fisher matrix stays positive.
    """
    if penalty is None:
        return jax.tree.map(jnp.zeros_like, w)
    leaves, treedef = jax.tree.flatten(w)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        jax.random.rademacher(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)
    ]
    signs = jax.tree.unflatten(treedef, drawn)
    _, along = jax.jvp(jax.grad(penalty), (w,), (signs,))
    return jax.tree.map(lambda s, x: jnp.maximum(s * x, 0), signs, along)


def separable(x: Array) -> tuple[Array, Array, Array]:
    """`s`, `row` and `column` with `x` = s * row * column, by geometric means if `x` is no product.

    The geometric means of `row` and `column` are 1. All entries of `x` are positive.
    """
    logarithm = jnp.log(x)
    mean = jnp.mean(logarithm)
    row, column = (jnp.exp(jnp.mean(logarithm, axis) - mean) for axis in (1, 0))
    return jnp.exp(mean), row, column


def _product(subscripts: str, *factors: Array) -> Array:
    """In full precision: with less, the matrix would not be positive."""
    return jnp.einsum(subscripts, *factors, precision=jax.lax.Precision.HIGHEST)


def _wide(x: Array) -> Array:
    return x.astype(accumulation_dtype(x))


def _like(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
