"""Shared by the workers of the table `implicit`: problems, programs and requests.

A library supplies one function for each task, `build(problem, how)`, which returns a program: a
function without arguments that returns a dict of arrays when they are ready.

- `derive`: the hypergradient at given weights, the optimum.
- `solve`: from zero weights to the optimum, and the hypergradient there.
- `tune`: outer steps of gradient descent from the optimum, each from the previous weights.

Data are always arguments of a program, never constants.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from penalised_losses import LOSSES, Batch, Losses
from worker import serve, settled_seconds


INNER_TOLERANCE, LINEAR_TOLERANCE = 1e-8, 1e-10
MOST_STEPS, MOST_PRODUCTS = 20_000, 2_000
CYCLE = 20  # products in a cycle of GMRES


class Problem(NamedTuple):
    name: str
    losses: Losses
    train: Batch
    val: Batch
    h: jax.Array
    optimum: jax.Array
    outer_rate: float
    outer_steps: int


class Program:
    """A compiled function and its arguments."""

    def __init__(self, function: Callable[..., dict], *arguments: Any) -> None:
        self._compiled = jax.jit(function).lower(*arguments).compile()
        self._arguments = arguments

    def __call__(self) -> dict:
        return jax.block_until_ready(self._compiled(*self._arguments))

    @property
    def mib(self) -> float:
        return self._compiled.memory_analysis().temp_size_in_bytes / 2**20


class Products:
    """Counts products of linear solvers, in separate programs, since counting takes time."""

    def __init__(self) -> None:
        self.wanted, self.number = False, 0

    def counted(self, product: Callable) -> Callable:
        if not self.wanted:
            return product

        def counting(v):
            self.count_one()
            return product(v)

        return counting

    def count_one(self) -> None:
        """Adds one each time the program runs through here."""
        jax.debug.callback(self._add)

    def _add(self) -> None:
        self.number += 1


PRODUCTS = Products()


def serve_programs(**builders: Callable[[Problem, str], Callable[[], dict]]) -> None:
    problems: dict[str, Problem] = {}
    programs: dict[tuple[str, str, str], Callable[[], dict]] = {}

    def load(name: str, path: str) -> None:
        with np.load(path) as arrays:
            batch = lambda part: Batch(
                *(jnp.asarray(arrays[f"{part}_{field}"]) for field in Batch._fields)
            )
            problems[name] = Problem(
                name=name,
                losses=LOSSES[str(arrays["model"])],
                train=batch("train"),
                val=batch("val"),
                h=jnp.asarray(arrays["h"]),
                optimum=jnp.asarray(arrays["optimum"]),
                outer_rate=float(arrays["outer_rate"]),
                outer_steps=int(arrays["outer_steps"]),
            )

    def prepare(name: str, task: str, how: str) -> dict:
        """The program's results, its temporary memory, and its number of products."""
        program = builders[task](problems[name], how)
        answer = {key: np.asarray(value).tolist() for key, value in program().items()}
        PRODUCTS.wanted, PRODUCTS.number = True, 0
        try:
            builders[task](problems[name], how)()
            jax.effects_barrier()
        finally:
            PRODUCTS.wanted = False
        programs[name, task, how] = program
        return answer | {"mib": getattr(program, "mib", None), "products": PRODUCTS.number}

    def measure(name: str, task: str, how: str) -> float:
        return settled_seconds(programs[name, task, how])

    serve(load=load, prepare=prepare, measure=measure)


def tune_by_hand(problem: Problem, solved: Callable) -> Program:
    """Gradient descent in one compiled loop; `solved(w, h, train)` is `(w, iterations)`."""

    def val_loss(h, w, train, val):
        w, iterations = solved(w, h, train)
        return problem.losses.val(w, h, val), (w, iterations)

    def tuned(w, h, train, val):
        def body(carry, _):
            w, h = carry
            value_and_grad = jax.value_and_grad(val_loss, has_aux=True)
            (loss, (w, iterations)), g = value_and_grad(h, w, train, val)
            return (w, h - problem.outer_rate * g), (loss, iterations)

        (_, h), (losses, iterations) = jax.lax.scan(body, (w, h), length=problem.outer_steps)
        return {"h": h, "val_loss": losses[-1], "inner": jnp.sum(iterations)}

    return Program(tuned, problem.optimum, problem.h, problem.train, problem.val)


def solve_by_hand(problem: Problem, solved: Callable) -> Program:
    def val_loss(h, train, val):
        w, iterations = solved(jnp.zeros_like(problem.optimum), h, train)
        return problem.losses.val(w, h, val), (w, iterations)

    def both(h, train, val):
        g, (w, iterations) = jax.grad(val_loss, has_aux=True)(h, train, val)
        return {"hypergradient": g, "w": w, "inner": iterations}

    return Program(both, problem.h, problem.train, problem.val)
