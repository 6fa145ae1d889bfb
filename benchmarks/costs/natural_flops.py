"""The work of an outer step with the Fisher matrix, relative to plain training."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

import gradhpo
from benchmarks.costs.problem import job
from benchmarks.costs.programs import SGD, STEPS, call_program
from gradhpo.algorithms.fisher import STRUCTURES, sides_of
from gradhpo.diagnostics.cost import Program


BATCH = 128


def of_factorisation(structure: str, w: PyTree) -> float:
    """Flops by formula, since the compiler counts LAPACK calls as zero.

    `eigh` with eigenvectors as $9 n^3$, Cholesky as $n^3 / 3$ (Golub & Van Loan).
    """
    leaves = jax.tree.leaves(w)
    if structure == "dense":
        return sum(x.size for x in leaves) ** 3 / 3
    if structure == "diagonal":
        return 0.0
    sides = [sides_of(x.shape) or () for x in leaves]
    return 9.0 * sum(n**3 for pair in sides for n in pair)


@functools.cache
def program(structure: Any, factor_every: int = 1) -> Program:
    """An outer step on the MLP 64-128-10; without a structure, training alone."""
    the_job = job(BATCH)
    if structure is None:
        optimizer = gradhpo.FixedOptimizer(SGD, inner_steps=STEPS)
        state = optimizer.init(the_job.params, the_job.hyperparams)
        return call_program(optimizer.step, the_job, state, the_job.train_data(0))
    settings = {"structure": structure, "factor_every": factor_every}
    optimizer = gradhpo.NHGDOptimizer(SGD, None, STEPS, **settings)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return call_program(optimizer.step, the_job, state, the_job.train_data(0), lr_hyper=0.1)


def of_products(structure: str, w: PyTree) -> float:
    """Flops of the products of one gradient, and of their place in the mean."""
    rows = jax.tree.map(lambda x: x[None], w)
    kept = jax.eval_shape(STRUCTURES[structure].products, rows)
    # Decay and addition: two products, a sum and the factor b, for each stored number.
    added = 4 * sum(x.size for x in jax.tree.leaves(kept))
    return Program(STRUCTURES[structure].products, rows).flops_with_loops_once + added


def of_hessian_product(w: PyTree, gradient: Callable) -> float:
    """Flops of the gradient's derivative along a direction."""
    # A tangent of its own: with the primal for a tangent, XLA shares products between the two.
    along = lambda w, v: jax.jvp(gradient, (w,), (v,))[1]
    return Program(along, w, w).flops_with_loops_once


def of_estimate(w: PyTree, gradient: Callable, structure: str | None, terms: int) -> float:
    """What the hypergradient adds to an outer step of 20 inner steps, in training gradients.

    `gradient`: that of a batch, as a function of the parameters. With a structure of the Fisher
    matrix, 20 products of gradients, a factorisation and one mixed derivative; without, `terms`
    products with the Hessian. A mixed derivative costs as much as such a product.
    """
    product = of_hessian_product(w, gradient)
    flops = terms * product
    if structure is not None:
        flops = STEPS * of_products(structure, w) + of_factorisation(structure, w) + product
    return flops / Program(gradient, w).flops_with_loops_once


def relative(structure: str, factor_every: int = 1) -> float:
    """Flops of an outer step of 20 inner steps, relative to the inner steps alone.

    The compiler counts a loop body once: here, training and the products of one gradient. The rest
    of the step runs once. One of `factor_every` outer steps takes products and factorises; the
    compiler counts a conditional's most expensive branch.
    """
    w = eqx.filter(job(BATCH).params, eqx.is_inexact_array)
    products = of_products(structure, w)
    inner = program(None).flops_with_loops_once
    outer = program(structure, factor_every).flops_with_loops_once - inner - products
    curvature = (STEPS * products + of_factorisation(structure, w)) / factor_every
    return (STEPS * inner + outer + curvature) / (STEPS * inner)
