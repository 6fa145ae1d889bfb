r"""A linear system, solved by any of the solvers, and the derivative of its solution."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from gradhpo.solvers.conjugate import ConjugateGradients
from gradhpo.utils.axes import with_automatic_axes
from gradhpo.utils.trees import (
    accumulation_dtype,
    all_finite,
    tree_dot,
    tree_l2_norm,
    tree_zeros_like,
)


class LinearSolution(NamedTuple):
    """What [`solve_system`][gradhpo.extend.solve_system] returns.

    - `value`: a tree like the right-hand side.
    - `failed`: whether the solver gave up (singular, diverged), shape `()`. Being cut short is not
        a failure.
    - `iterations`: as the solver counts them, 0 for direct ones, shape `()`.
    """

    value: PyTree
    failed: Array
    iterations: Array


def solve_system(
    product: Callable[[PyTree], PyTree],
    rhs: PyTree,
    solver: lx.AbstractLinearSolver,
    *,
    symmetric: bool,
    guess: PyTree,
    shift: Array,
    numbered: Callable[[PyTree, Array], PyTree] | None = None,
    point: PyTree | None = None,
) -> LinearSolution:
    r"""Solves a linear system of trees; the solution may be differentiated.

    This is $q = A^{-1} b$ for $A v$ = `product(v)` and $b$ = `rhs`. Where $A$ and $b$ depend on
    something, so does $q$, with $q' = A^{-1}(b' - A' q)$: one more solve by the same solver, whose
    steps are not differentiated. (A solve that is cut short is therefore differentiated as its
    limit.) A failed solve has the derivative NaN, since that of $A^+ b$ has more terms. Solvers
    that only approximate $A^{-1}$, [`Neumann`][gradhpo.Neumann] and [`Nystrom`][gradhpo.Nystrom],
    declare `approximates = True`; their own operations are differentiated.

    **Arguments:**

    - `product`: a linear function of trees like `rhs`.
    - `rhs`: a tree of arrays of one dtype, float32 or float64.
    - `solver`: any `lineax` solver. The iterations of `lineax.CG` get an answer for a singular $A$
        as well: the least-squares solution of the smallest norm, which counts as failed. A subclass
        of `lineax.CG` is used as it is, without that answer and without explicit shardings.
    - `symmetric`: whether $A$ is. If it is not, reverse mode transposes it.
    - `guess`: a tree like `rhs`; iterations start from its best multiple, and keep its part that a
        singular $A$ does not see. From a guess of 0 the solution has the smallest norm.
    - `shift`: which multiple of $I$ is in $A$, shape `()`, for solvers that ask.
    - `numbered`: product number `k` with a tree like `rhs`, from 0, for solvers that take a
        different $A$ each time ([`Neumann`][gradhpo.Neumann] with `fresh_batches`).
    - `point`: the parameters that $A$ is at, a tree like `rhs`, for solvers that ask
        ([`Support`][gradhpo.Support]).

    **Returns:** a `LinearSolution`; a solve that fails raises nothing.

    **Raises:** `ValueError` for a solver that does not fit the system.

    ```python
    import lineax as lx
    from gradhpo.extend import solve_system

    def solution(h):
        zeros = jnp.zeros(3)
        system = {"symmetric": True, "guess": zeros, "shift": jnp.zeros(())}
        return solve_system(lambda v: h * v, jnp.ones(3), lx.CG(1e-6, 1e-6), **system).value

    jax.jacobian(solution)(2.0)  # -1/4
    ```
    """
    solver = _with_singular_answer(solver)
    image = product(guess)
    if getattr(solver, "approximates", False):
        solve = _Solve(solver, symmetric, guess, image, shift, numbered)
        return LinearSolution(*solve(product, rhs))
    arrays, rest = eqx.partition((solver, guess, image, shift, point), eqx.is_array)
    solver, guess, image, shift, point = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    solve = _Solve(solver, symmetric, guess, image, shift, point=point)
    return LinearSolution(*_solved(eqx.filter_closure_convert(product, rhs), rhs, solve=solve))


def solve_linearly(
    product: Callable[[PyTree], PyTree],
    rhs: PyTree,
    solver: lx.AbstractLinearSolver,
    *,
    symmetric: bool,
) -> PyTree:
    r"""$A^{-1} b$ from 0, linear in $b$: for the tangents of a derivative rule, in every mode.

    NaN where the solver gives up.
    """
    arrays, rest = eqx.partition(_with_singular_answer(solver), eqx.is_array)
    solver = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    nowhere = jax.tree.map(jnp.zeros_like, rhs)
    solve = _Solve(solver, symmetric, nowhere, nowhere, jnp.zeros((), accumulation_dtype(rhs)))
    return solve.derived(product, rhs, or_nan=True)


def _with_singular_answer(solver: lx.AbstractLinearSolver) -> lx.AbstractLinearSolver:
    if type(solver) is lx.CG:  # not a subclass, which may solve differently
        return ConjugateGradients(solver)
    return solver


class _Square(lx.FunctionLinearOperator):
    """An operator on one space, which is given and not traced: a trace would lose shardings."""

    def __init__(self, product: Callable, structure: PyTree, tags: Any):
        super().__init__(product, structure, tags, closure_convert=False)

    def out_structure(self) -> PyTree:
        """The structure of the vectors that it takes."""
        return self.in_structure()


class _Solve(eqx.Module):
    """A solver with what it is told about the system."""

    solver: lx.AbstractLinearSolver
    symmetric: bool = eqx.field(static=True)
    guess: PyTree
    image: PyTree  # of the guess
    shift: Array
    numbered: Callable | None = None
    point: PyTree | None = None

    def __call__(self, product: Callable, rhs: PyTree) -> tuple[PyTree, Array, Array]:
        """The solution, whether it failed, and iterations."""
        # Absolute tolerances are made for a length of 1. A power of 2, which rounds nothing.
        size = jax.lax.stop_gradient(tree_l2_norm(rhs))
        scale = jnp.exp2(jnp.round(jnp.log2(jnp.where(size > 0, size, 1))))
        rhs = jax.tree.map(lambda x: x / scale, rhs)
        share = _best_share(self.image, rhs)
        of_share = lambda tree: jax.tree.map(lambda x: share.astype(x.dtype) * x, tree)
        ready = dataclasses.replace(self, guess=of_share(self.guess), image=of_share(self.image))
        if getattr(self.solver, "keeps_shardings", False):
            value, (failed, iterations) = ready._found(product, rhs)
        else:
            # Others multiply vectors in ways that explicit mesh axes do not allow.
            arrays, rest = eqx.partition(ready, eqx.is_array)
            found = lambda product, rhs, arrays: eqx.combine(arrays, rest)._found(product, rhs)
            value, (failed, iterations) = with_automatic_axes(found, product, rhs, arrays)
        return jax.tree.map(lambda x: scale * x, value), failed, iterations

    def _found(self, product: Callable, rhs: PyTree) -> tuple[PyTree, tuple[Array, Array]]:
        """The answer from the guess itself."""
        tags = lx.positive_semidefinite_tag if self.symmetric else ()
        operator = _Square(product, jax.eval_shape(lambda: rhs), tags)
        options = {"y0": self.guess, "image": self.image, "shift": self.shift}
        options |= {} if self.numbered is None else {"numbered": self.numbered}
        options |= {} if self.point is None else {"point": self.point}
        # Not by `lx.linear_solve`, whose derivatives are not needed here (`_solved` has them) and
        # whose primitive loses the shardings of explicit mesh axes.
        state = self.solver.init(operator, options)
        value, result, statistics = self.solver.compute(state, rhs, options)
        failed = (result != lx.RESULTS.successful) & (result != lx.RESULTS.max_steps_reached)
        failed |= ~all_finite(value)
        return value, (failed, jnp.asarray(statistics.get("num_steps", 0)))

    def derived(self, product: Callable, rhs: PyTree, *, or_nan: bool = False) -> PyTree:
        """The solution alone, linear in `rhs`, with derivatives in every mode and of any order.

        `or_nan`: it is NaN where a solve fails.
        """
        nowhere = jax.tree.map(jnp.zeros_like, self.guess)
        transposed = dataclasses.replace(self, guess=nowhere, image=nowhere, numbered=None)
        return jax.lax.custom_linear_solve(
            product,
            rhs,
            solve=lambda product, rhs: self._value(product, rhs, or_nan),
            transpose_solve=lambda product, rhs: transposed._value(product, rhs, or_nan),
            symmetric=self.symmetric,
        )

    def _value(self, product: Callable, rhs: PyTree, or_nan: bool) -> PyTree:
        if not or_nan:
            return self(product, rhs)[0]

        def solved(rhs: PyTree) -> PyTree:
            value, failed, _ = self(product, rhs)
            return jax.tree.map(lambda x: jnp.where(failed, jnp.full_like(x, jnp.nan), x), value)

        anything = jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(rhs)]))
        return jax.lax.cond(anything, solved, tree_zeros_like, rhs)


@eqx.filter_custom_jvp
def _solved(product: Callable, rhs: PyTree, *, solve: _Solve) -> tuple[PyTree, Array, Array]:
    return solve(product, rhs)


@_solved.def_jvp
def _solved_jvp(primals: tuple, tangents: tuple, *, solve: _Solve) -> tuple:
    (product, rhs), (product_dot, rhs_dot) = primals, tangents
    found = _solved(product, rhs, solve=solve)
    value, failed, _ = found
    # A q = b, so A q' = b' - A' q. What is None does not depend on anything.
    _, moved = eqx.filter_jvp(lambda product: product(value), (product,), (product_dot,))
    minus = lambda y, x: jnp.zeros_like(x) if y is None else y
    given = jax.tree.map(minus, rhs_dot, value, is_leaf=lambda x: x is None)
    gone = jax.tree.map(minus, moved, value, is_leaf=lambda x: x is None)
    left = jax.tree.map(jnp.subtract, given, gone)
    # Linear, so that reverse mode has it too; twice, as a solver may make a number of NaN.
    known = lambda tree: jax.tree.map(
        lambda x: jnp.where(failed, jnp.nan, 1).astype(x.dtype) * x, tree
    )
    return found, (known(solve.derived(product, known(left))), None, None)


def _best_share(image: PyTree, target: PyTree) -> Array:
    """The multiple of the image that is nearest to the target: never worse than 0."""
    square = tree_dot(image, image)
    return tree_dot(image, target) / jnp.where(square > 0, square, 1)
