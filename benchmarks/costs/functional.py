"""The cost of a functional hypergradient, in training gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import gradhpo
from benchmarks.costs.problem import RATE, job
from benchmarks.costs.programs import SGD, gradient_programs, step_program
from gradhpo.diagnostics.cost import Program


def predict(params: Any, hyperparams: Any, batch: tuple) -> jax.Array:
    return jax.vmap(params.net)(batch[0])


def train_loss(v: jax.Array, hyperparams: Any, batch: tuple) -> jax.Array:
    _, y, index = batch
    errors = optax.softmax_cross_entropy_with_integer_labels(v, y)
    return jnp.mean(jax.nn.sigmoid(hyperparams.weights[index]) * errors)


def val_loss(v: jax.Array, hyperparams: Any, batch: tuple) -> jax.Array:
    errors = optax.softmax_cross_entropy_with_integer_labels(v, batch[1])
    return jnp.mean(errors) + 1e-6 * jnp.sum(jnp.square(hyperparams.weights))


def gradients_of_functional(batch_size: int, depth: int) -> tuple[float, float]:
    """Flops in training gradients: of an outer step with one of each, and of an adjoint step.

    The first excludes a validation gradient of the adjoint and the loss at the end. The adjoint
    step is the cost of adding a second one, with its validation gradient.
    """
    the_job = job(batch_size, depth=depth)
    losses = [gradhpo.PredictionLoss(predict, loss) for loss in (train_loss, val_loss)]
    the_job = the_job._replace(train_loss=losses[0], val_loss=losses[1])
    adjoint = eqx.filter(the_job.params, eqx.is_inexact_array)
    adjoint = jax.tree.map(lambda x: 0.5 * x, adjoint)
    rest = eqx.filter(the_job.params, eqx.is_inexact_array, inverse=True)
    train, val = (p.flops_with_loops_once for p in gradient_programs(batch_size, depth=depth))
    given = the_job.params, the_job.hyperparams, the_job.val_batch
    of_loss = Program(the_job.val_loss, *given).flops_with_loops_once
    settings = {"adjoint_optimizer": optax.sgd(RATE), "adjoint": eqx.combine(adjoint, rest)}
    optimizer = gradhpo.FunctionalOptimizer(SGD, **settings)
    outer = step_program(optimizer, the_job).flops_with_loops_once
    return (outer - val - of_loss) / train, _of_adjoint_step(optimizer, the_job) / train


def _of_adjoint_step(optimizer: gradhpo.FunctionalOptimizer, the_job: Any) -> float:
    """Compiled alone: predictions, product, and both pullbacks."""
    batch, h, val_batch = the_job.train_data(0), the_job.hyperparams, the_job.val_batch
    xi, rest = eqx.partition(optimizer.adjoint, eqx.is_inexact_array)
    on = lambda xi, batch: predict(eqx.combine(xi, rest), h, batch)

    def step(xi: Any, params: Any, of_v: jax.Array) -> Any:
        gradient = jax.grad(lambda v: train_loss(v, h, batch))
        a, pull = jax.vjp(lambda xi: on(xi, batch), xi)
        [curved] = jax.vjp(gradient, predict(params, h, batch))[1](a)
        asked = jax.vjp(lambda xi: on(xi, val_batch), xi)[1](of_v)[0]
        return jax.tree.map(lambda x, y, z: x - RATE * (y + z), xi, pull(curved)[0], asked)

    of_v = predict(the_job.params, h, val_batch)
    return Program(step, xi, the_job.params, of_v).flops_with_loops_once


def print_functional_units() -> None:
    print("\nFlops of functional hypergradients, in training gradients (batch 128, validation 100)")
    for depth in (1, 3, 6):
        outer, adjoint = gradients_of_functional(128, depth)
        print(
            f"  FunctionalOptimizer    {depth} hidden layer(s): outer step with one of each "
            f"{outer:.2f}, plus a validation gradient and a loss; adjoint step {adjoint:.2f}"
        )
