"""The smallest problem for a run: ridge regression on ten examples."""

import jax.numpy as jnp
import optax
from killed_run import train_loss, val_loss
from problems import relaxed

import gradhpo


SGD = relaxed(optax.sgd(0.1))
X, Y = jnp.linspace(-1, 1, 30).reshape(10, 3), jnp.linspace(0, 1, 10)
LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
