"""Checks that hypergradients are right on this device before anything is timed.

Run it in float64: `JAX_ENABLE_X64=1 python -m benchmarks.costs.gpu_numbers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import gradhpo
from gradhpo.utils.memory_space import from_space, to_space


STEPS = 12


class Model(eqx.Module):
    net: eqx.nn.MLP
    log_decay: jax.Array  # one for each layer
    log_rate: jax.Array


def squared_error(model: Model, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((jax.vmap(model.net)(x) - y) ** 2)


def penalised(model: Model, batch: Any) -> jax.Array:
    squares = jnp.stack([jnp.sum(layer.weight**2) for layer in model.net.layers])
    return squared_error(model, batch) + jnp.sum(jnp.exp(model.log_decay) * squares)


def adam(model: Model) -> optax.GradientTransformation:
    return optax.adam(jnp.exp(model.log_rate), eps_root=1e-16)


def problem() -> tuple[Any, ...]:
    """The arguments of `init` and `compute_hypergradient`.

    Each inner step has a different batch, so that mixed-up states show.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    net = eqx.nn.MLP(8, 2, 16, 2, activation=jnp.tanh, key=keys[0])
    model = Model(net, jnp.full(3, -4.0), jnp.asarray(-4.0))
    params, hyperparams = gradhpo.partition(model, lambda m: (m.log_decay, m.log_rate))
    x = jax.random.normal(keys[1], (STEPS + 1, 32, 8))
    y = jnp.sin(x @ jax.random.normal(keys[2], (8, 2)))
    losses = gradhpo.model_loss(penalised), gradhpo.model_loss(squared_error)
    return (params, hyperparams), (gradhpo.BatchStack((x[1:], y[1:])), (x[0], y[0]), *losses)


class Check(NamedTuple):
    """`found()` must equal `expected` to within `limit` times its largest number."""

    name: str
    found: Callable[[], Any]
    expected: Any
    limit: float

    def __str__(self) -> str:
        try:
            found, _ = ravel_pytree(self.found())
        except jax.errors.JaxRuntimeError as error:
            return f"  {self.name:48} FAILED: {str(error).splitlines()[0]}"
        expected, _ = ravel_pytree(self.expected)
        error = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
        right = "right" if error <= self.limit else f"WRONG: more than {self.limit:g}"
        return f"  {self.name:48} {error:8.1e}   {right}"


def checks() -> list[Check]:
    start, given = problem()
    unrolled = lambda **settings: gradhpo.UnrolledOptimizer(adam, unroll_steps=STEPS, **settings)
    forward = gradhpo.ForwardModeOptimizer(adam, unroll_steps=STEPS)
    by = lambda method: lambda: method.compute_hypergradient(method.init(*start), *given)
    differences = lambda: gradhpo.finite_difference_hypergradient(
        unrolled(), unrolled().init(*start), *given
    )
    exact = by(unrolled())()
    rows = 1.0 + jnp.arange(STEPS * 1_000.0).reshape(STEPS, 1_000)
    # Rounding: a few hundred operations in sequence, with sums in another order.
    rounding = 1e-10
    # Differences have an error of the squared step (6e-6) times the third derivative.
    on_host = by(unrolled(store="host"))
    segments_on_host = by(unrolled(store="host", checkpoints="sqrt"))
    return [
        Check('store="host"', on_host, exact, rounding),
        # What `store="host"` relies on: if this is wrong, the compiler is.
        Check("JAX alone: from the host, backwards", lambda: backwards(rows), rows, 0.0),
        Check("forward mode", by(forward), exact, rounding),
        Check("finite differences", differences, exact, 1e-6),
        Check("JAX alone: the same by a carried counter", lambda: counting(rows), rows, 0.0),
        Check('checkpoints="sqrt"', by(unrolled(checkpoints="sqrt")), exact, rounding),
        Check('checkpoints="log"', by(unrolled(checkpoints="log")), exact, rounding),
        Check('store="host", checkpoints="sqrt"', segments_on_host, exact, rounding),
    ]


def put_away(rows: jax.Array) -> jax.Array:
    """Twice the rows, stored on the host one by one."""
    return jax.lax.scan(lambda carry, row: (carry, to_space(2 * row, "host")), None, rows)[1]


@jax.jit
def backwards(rows: jax.Array) -> jax.Array:
    read = lambda carry, row: (carry, from_space(row, "host") / 2)
    return jax.lax.scan(read, None, put_away(rows), reverse=True)[1]


@jax.jit
def counting(rows: jax.Array) -> jax.Array:
    kept = put_away(rows)

    def read(carry, _):
        i, out = carry
        row = jax.lax.dynamic_index_in_dim(kept, i, keepdims=False)
        return (i - 1, out.at[i].set(from_space(row, "host") / 2)), None

    start = jnp.asarray(len(rows) - 1), jnp.zeros_like(rows)
    return jax.lax.scan(read, start, length=len(rows))[0][1]


def print_numbers() -> None:
    print(f"\nHypergradients of an MLP over {STEPS} steps of Adam, in float64, against unrolling")
    for check in checks():
        print(check, flush=True)


if __name__ == "__main__":
    print_numbers()
