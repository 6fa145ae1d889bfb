"""Hypergradients of data cleaning by gradhpo, in a separate process like the peers.

Also by `jax.grad` through a checkpointed scan, as in a hand-written JAX program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from worker import serve_methods

import gradhpo
from gradhpo.diagnostics.cost import Program


class Cleaning(NamedTuple):
    params: list[tuple[Array, Array]]
    log_odds: Array
    train: tuple[Array, Array]
    val: tuple[Array, Array]


def load(path: str, dtype: str) -> Cleaning:
    data = np.load(path)
    floats = lambda name: jnp.asarray(data[name], dtype)
    params = [(floats(f"param{i}"), floats(f"param{i + 1}")) for i in (0, 2, 4)]
    train = floats("x"), jnp.asarray(data["y"])
    return Cleaning(
        params, floats("log_odds"), train, (floats("val_x"), jnp.asarray(data["val_y"]))
    )


def cross_entropy(params, batch):
    x, y = batch
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight.T + bias)
    weight, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ weight.T + bias, y)


def train_loss(params, log_odds, batch):
    return jnp.mean(jax.nn.sigmoid(log_odds) * cross_entropy(params, batch))


def val_loss(params, log_odds, batch):
    return jnp.mean(cross_entropy(params, batch))


RATE = 0.1
OPTIMIZERS = {
    "sgd": optax.sgd(RATE, momentum=0.9),
    "adam": optax.adam(1e-3, eps=1e-8, eps_root=1e-16),
}


class Method(NamedTuple):
    """Calls `compute_hypergradient` as users do."""

    bilevel: gradhpo.BilevelOptimizer
    arguments: tuple

    def __call__(self) -> Array:
        return jax.block_until_ready(self.bilevel.compute_hypergradient(*self.arguments))


def method(make: Callable[[Any, int], gradhpo.BilevelOptimizer]) -> Callable:
    """`make(inner optimizer, steps)` as a method of `serve_methods`."""

    def prepared(problem: Cleaning, optimizer: str, steps: int) -> Method:
        bilevel = make(OPTIMIZERS[optimizer], steps)
        assert bilevel.num_inner_steps == steps
        state = bilevel.init(problem.params, problem.log_odds)
        return Method(bilevel, (state, problem.train, problem.val, train_loss, val_loss))

    return prepared


class Scanned(NamedTuple):
    """`jax.grad` through `lax.scan`, with `jax.checkpoint` on its body."""

    function: Callable
    start: tuple  # weights and state of the inner optimizer
    rest: tuple

    def __call__(self) -> Array:
        return jax.block_until_ready(self.function(*self.start, *self.rest))


def scanned(problem: Cleaning, optimizer: str, steps: int) -> Scanned:
    inner = OPTIMIZERS[optimizer]

    def outer(log_odds, params, opt_state, train, val):
        def body(carry, _):
            w, s = carry
            updates, s = inner.update(jax.grad(train_loss)(w, log_odds, train), s, w)
            return (optax.apply_updates(w, updates), s), None

        body = jax.checkpoint(body, prevent_cse=False)
        (end, _), _ = jax.lax.scan(body, (params, opt_state), None, length=steps)
        return val_loss(end, log_odds, val)

    @jax.jit
    def hypergradient(params, opt_state, log_odds, train, val):
        return jax.grad(outer)(log_odds, params, opt_state, train, val)

    start = problem.params, inner.init(problem.params)
    return Scanned(hypergradient, start, (problem.log_odds, problem.train, problem.val))


def peak_mib(function: Method | Scanned) -> float:
    """The memory of the compiled program, with its result and its initial state.

    PyTorch's programs make that state in each call: a copy of the weights, the optimizer's zeros.
    """
    if isinstance(function, Method):
        program = Program(function.bilevel.compute_hypergradient, *function.arguments)
        state = function.arguments[0]
        start = state.params, state.inner_opt_state
    else:
        program = Program(function.function, *function.start, *function.rest)
        start = function.start
    arrays = jax.tree.leaves((start, function()))
    return (program.temporary_bytes + sum(x.nbytes for x in arrays)) / 2**20


def implicit(inner: Any, steps: int, terms: int, step_size: float) -> gradhpo.BilevelOptimizer:
    solver = gradhpo.Neumann(terms, step_size)
    return gradhpo.ImplicitOptimizer(inner, linear_solver=solver, inner_steps=steps)


serve_methods(
    load,
    {
        "unrolled": method(lambda o, n: gradhpo.UnrolledOptimizer(o, unroll_steps=n)),
        "sqrt": method(
            lambda o, n: gradhpo.UnrolledOptimizer(o, unroll_steps=n, checkpoints="sqrt")
        ),
        "scanned": scanned,
        "one step": method(lambda o, n: gradhpo.OneStepOptimizer(o)),
        "darts": method(lambda o, n: gradhpo.T1T2Optimizer(o, inner_steps=n)),
        "neumann": method(lambda o, n: implicit(o, n, 20, RATE)),
        "identity": method(lambda o, n: implicit(o, n, 1, 1.0)),
    },
    peak_mib,
)
