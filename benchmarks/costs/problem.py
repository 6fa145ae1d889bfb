"""The job of the tables: one weight per training example of a small MLP."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import gradhpo


EXAMPLES = 1_000
RATE, MOMENTUM, OUTER_RATE = 0.05, 0.9, 0.1


class Model(eqx.Module):
    net: eqx.nn.MLP
    weights: Array


class Job(NamedTuple):
    params: Any
    hyperparams: Any
    train_data: Any
    val_batch: Any
    train_loss: Any
    val_loss: Any


def cross_entropy(model: Model, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model.net)(x), y)


@gradhpo.model_loss
def train_loss(model: Model, batch: tuple[Array, Array, Array]) -> Array:
    x, y, index = batch
    return jnp.mean(jax.nn.sigmoid(model.weights[index]) * cross_entropy(model, x, y))


@gradhpo.model_loss
def val_loss(model: Model, batch: tuple[Array, Array]) -> Array:
    # A direct term, so that the first-order method has something to follow.
    return jnp.mean(cross_entropy(model, *batch)) + 1e-6 * jnp.sum(jnp.square(model.weights))


@gradhpo.model_loss
def plain_loss(model: Any, batch: tuple[Array, Array]) -> Array:
    """The same without weights, for any model with a `net`."""
    return jnp.mean(cross_entropy(model, *batch))


def job(
    batch_size: int,
    *,
    activation: str = "tanh",
    depth: int = 1,
    num_weights: int = EXAMPLES,
    val_size: int = 100,
) -> Job:
    """MLP 64-128-10 (or deeper), random data; batches of `batch_size` of 1,000 examples.

    With fewer weights than examples, examples share them.
    """
    keys = jax.random.split(jax.random.key(0), 6)
    net = eqx.nn.MLP(64, 10, 128, depth, activation=getattr(jax.nn, activation), key=keys[0])
    params, hyperparams = gradhpo.partition(Model(net, jnp.zeros(num_weights)), lambda m: m.weights)
    x = jax.random.uniform(keys[1], (EXAMPLES, 64))
    y = jax.random.randint(keys[2], (EXAMPLES,), 0, 10)
    arrays = (x, y, jnp.arange(EXAMPLES) % num_weights)
    val_x = jax.random.uniform(keys[3], (val_size, 64))
    val_batch = (val_x, jax.random.randint(keys[4], (val_size,), 0, 10))
    data = gradhpo.ArrayData(arrays, batch_size, keys[5])
    return Job(params, hyperparams, data, val_batch, train_loss, val_loss)
