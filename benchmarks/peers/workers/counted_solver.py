"""The solver of lineax that gradhpo and Optimistix share in the table `implicit`."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
from implicit_programs import CYCLE, LINEAR_TOLERANCE, MOST_PRODUCTS, PRODUCTS


def same_solver(*, symmetric: bool) -> lx.AbstractLinearSolver:
    euclidean = lambda x: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)))
    settings = {"rtol": LINEAR_TOLERANCE, "atol": LINEAR_TOLERANCE, "norm": euclidean}
    if symmetric:
        return lx.CG(**settings, max_steps=MOST_PRODUCTS)
    cycles = {"max_steps": MOST_PRODUCTS // CYCLE, "restart": CYCLE}
    return lx.GMRES(**settings, **cycles)


def counted(solver: lx.AbstractLinearSolver, beside: int = 0) -> lx.AbstractLinearSolver:
    """The solver, counting its products and `beside` more per solve, if counting is on."""
    if not PRODUCTS.wanted:
        return solver

    class Counted(type(solver)):
        def compute(self, state, vector, options):
            for _ in range(beside):
                PRODUCTS.count_one()
            # Here the operator is already transposed, unlike where the solver is made.
            whole = isinstance(state, tuple)
            operator = state[0] if whole else state
            tags = lx.positive_semidefinite_tag if lx.is_positive_semidefinite(operator) else ()
            product = PRODUCTS.counted(operator.mv)
            operator = lx.FunctionLinearOperator(product, operator.in_structure(), tags)
            return super().compute((operator, *state[1:]) if whole else operator, vector, options)

    fields = dataclasses.fields(solver)
    return Counted(**{field.name: getattr(solver, field.name) for field in fields})
