"""Example weights through a whole training: the problem of the table `bergson`, and our side.

Digits, batches from a file, an MLP with tanh, a weight of 1 for each of 1,000 examples. A query is
one validation example, or the mean over a batch of them.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from sklearn.datasets import load_digits

import gradhpo


EXAMPLES, QUERIES = 1_000, 5
RATE, MOMENTUM = 0.1, 0.9
# bergson's own betas and epsilons.
ADAM_RATE, BETAS, EPS, EPS_ROOT, DECAY = 3e-3, (0.95, 0.975), 1e-8, 1e-17, 0.01
OPTIMIZERS = {
    "SGD": optax.sgd(RATE, momentum=MOMENTUM),
    "AdamW": optax.adamw(
        ADAM_RATE, *BETAS, eps=EPS, eps_root=EPS_ROOT, weight_decay=DECAY
    ),
}  # fmt: skip


class Size(NamedTuple):
    width: int
    steps: int
    batch_size: int


SIZES = {"small": Size(32, 100, 50), "large": Size(512, 50, 250)}


def write_problem(path: Path, size: Size) -> None:
    """Everything that both programs start from; three tenths of the training labels are wrong."""
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    order = random.permutation(len(x))
    x, y = x[order] / 16, y[order]
    wrong = random.random(EXAMPLES) < 0.3
    val = slice(EXAMPLES, EXAMPLES + QUERIES)
    epochs = -(-size.steps * size.batch_size // EXAMPLES)
    drawn = np.concatenate([random.permutation(EXAMPLES) for _ in range(epochs)])
    arrays = {
        "x": x[:EXAMPLES],
        "y": np.where(wrong, random.integers(0, 10, EXAMPLES), y[:EXAMPLES]),
        "val_x": x[val],
        "val_y": y[val],
        "rows": drawn[: size.steps * size.batch_size].reshape(size.steps, size.batch_size),
    }
    layers = [(64, size.width), (size.width, size.width), (size.width, 10)]
    for i, (inputs, outputs) in enumerate(layers):
        arrays[f"weight{i}"] = random.normal(size=(outputs, inputs)) * inputs**-0.5
        arrays[f"bias{i}"] = np.zeros(outputs)
    np.savez(path, **arrays)


class Problem(NamedTuple):
    params: list[tuple[Array, Array]]
    weights: Array
    batches: tuple[Array, Array, Array]  # of all steps
    queries: tuple[Array, Array]

    @property
    def steps(self) -> int:
        return len(self.batches[0])

    def data(self, index: Array) -> tuple[Array, Array, Array]:
        return jax.tree.map(lambda x: x[index], self.batches)


def load(path: str | Path, dtype: str) -> Problem:
    data = np.load(path)
    floats = lambda name: jnp.asarray(data[name], dtype)
    integers = lambda name: jnp.asarray(data[name], jnp.int32)
    rows = integers("rows")
    params = [(floats(f"weight{i}"), floats(f"bias{i}")) for i in range(3)]
    batches = floats("x")[rows], integers("y")[rows], rows
    queries = floats("val_x"), integers("val_y")
    return Problem(params, jnp.ones(EXAMPLES, dtype), batches, queries)


def cross_entropy(params: list, x: Array, y: Array) -> Array:
    for weight, bias in params[:-1]:
        x = jnp.tanh(x @ weight.T + bias[None])
    weight, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ weight.T + bias[None], y)


def train_loss(params: list, weights: Array, batch: tuple[Array, Array, Array]) -> Array:
    x, y, rows = batch
    return jnp.mean(weights[rows] * cross_entropy(params, x, y))


def val_loss(params: list, weights: Array, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(params, *batch))


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


def replayed(problem: Problem, optimizer: str, queries: bool) -> Callable[[], Array]:
    """By `replay` with states in a directory, as in bergson."""
    bilevel = gradhpo.OneStepOptimizer(OPTIMIZERS[optimizer])
    state = bilevel.init(problem.params, problem.weights)

    def hypergradient() -> Array:
        with tempfile.TemporaryDirectory() as directory:
            found = gradhpo.replay(
                bilevel, state, problem.data, problem.queries, LOSSES,
                num_steps=problem.steps, store=f"{directory}/states", queries=queries,
                progress=False,
            )  # fmt: skip
        return jax.block_until_ready(found.hypergradient)

    return hypergradient


def unrolled(problem: Problem, optimizer: str, queries: bool) -> Callable[[], Array]:
    """By `UnrolledOptimizer` with checkpoints, in one compiled program; for one query only."""
    assert not queries
    bilevel = unrolled_optimizer(problem, optimizer)
    state = bilevel.init(problem.params, problem.weights)
    stack = gradhpo.BatchStack(problem.batches)
    return lambda: jax.block_until_ready(
        bilevel.compute_hypergradient(state, stack, problem.queries, train_loss, val_loss)
    )


def unrolled_optimizer(problem: Problem, optimizer: str) -> gradhpo.UnrolledOptimizer:
    inner = OPTIMIZERS[optimizer]
    return gradhpo.UnrolledOptimizer(inner, unroll_steps=problem.steps, checkpoints="sqrt")


def by_jax(problem: Problem, optimizer: str, queries: bool) -> Callable[[], Array]:
    """By `jax.vjp` of a hand-written scan, segments and steps under `jax.checkpoint`."""
    inner = OPTIMIZERS[optimizer]
    segment = next(n for n in range(int(problem.steps**0.5), 0, -1) if problem.steps % n == 0)

    @jax.jit
    def hypergradient(params, weights, batches, val):
        def trained(weights):
            def step(carry, batch):
                w, s = carry
                updates, s = inner.update(jax.grad(train_loss)(w, weights, batch), s, w)
                return (optax.apply_updates(w, updates), s), None

            def run_segment(carry, stack):
                return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, stack)

            split = lambda x: x.reshape(-1, segment, *x.shape[1:])
            of_segment = jax.checkpoint(run_segment, prevent_cse=False)
            start = params, inner.init(params)
            return jax.lax.scan(of_segment, start, jax.tree.map(split, batches))[0][0]

        end, pull = jax.vjp(trained, weights)
        if not queries:
            return pull(jax.grad(val_loss)(end, weights, val))[0]
        of_query = lambda x, y: jax.grad(val_loss)(end, weights, (x[None], y[None]))
        return jax.vmap(lambda alpha: pull(alpha)[0])(jax.vmap(of_query)(*val))

    return functools.partial(_ready, hypergradient, *problem)


def _ready(function: Callable, *arguments: Any) -> Array:
    return jax.block_until_ready(function(*arguments))
