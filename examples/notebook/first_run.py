# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first run, cell by cell
#
# A small network is fitted to a few noisy examples. We tune the weight decay of each of its layers
# by gradient while the network trains, and look at what gradhpo says about the run.
#
# This notebook is `first_run.py`, executed; its last cell says how to make it again. Below each
# cell of code is what it prints, and the value of its last line.

# %%
import jax
import jax.numpy as jnp
import optax

import gradhpo


# %% [markdown]
# ## The problem
#
# 40 examples to train on, and 200 to validate with.

# %%
x = jax.random.normal(jax.random.key(0), (240, 3))
y = jnp.sin(2 * x[:, 0]) + 0.5 * jax.random.normal(jax.random.key(1), (240,))
train = gradhpo.ArrayData((x[:40], y[:40]), batch_size=20, key=jax.random.key(2))
val = (x[40:], y[40:])

first, last = jax.random.split(jax.random.key(3))
params = {
    "first": jax.random.normal(first, (3, 64)),
    "last": jax.random.normal(last, (64,)) / 8,
}
hyperparams = {"first": jnp.array(-9.0), "last": jnp.array(-9.0)}  # logarithms


def val_loss(params, hyperparams, batch):
    predicted = jnp.tanh(batch[0] @ params["first"]) @ params["last"]
    return jnp.mean((predicted - batch[1]) ** 2)


def train_loss(params, hyperparams, batch):
    decay = [jnp.exp(hyperparams[name]) * jnp.sum(params[name] ** 2) for name in params]
    return val_loss(params, hyperparams, batch) + sum(decay)


losses = gradhpo.LossFunctions(train_loss, val_loss)

# %% [markdown]
# ## The optimizer
#
# Each outer step trains for five steps, differentiates the validation loss through them, and moves
# the hyperparameters by Adam. A state shows what is in it.

# %%
inner = optax.sgd(0.05, momentum=0.9)
optimizer = gradhpo.UnrolledOptimizer(inner, optax.adam(0.05), unroll_steps=5)
start = optimizer.init(params, hyperparams)
start

# %% [markdown]
# ## The run
#
# A bar shows the progress while it runs; a few sentences at the end say how it went.

# %%
state, history = gradhpo.run(optimizer, start, losses, train, val, num_steps=400)

# %%
history

# %%
print(history.report)

# %% alt="Training and validation loss: far apart until step 90, within 0.2 from step 100 on"
axes = history.plot("train_loss", "val_loss")

# %% [markdown]
# The decays that were found:

# %%
{name: round(float(jnp.exp(value)), 4) for name, value in state.hyperparams.items()}

# %% [markdown]
# ## Did it pay?
#
# `FixedOptimizer` trains in the same way, and leaves the initial decays as they are.

# %%
fixed = gradhpo.FixedOptimizer(inner, inner_steps=5)
_, untuned = gradhpo.run(
    fixed, fixed.init(params, hyperparams), losses, train, val, num_steps=400, progress=False
)
print(f"untuned {untuned['val_loss'][-1]:.3f}, tuned {history['val_loss'][-1]:.3f}")

# %% [markdown]
# ## Can the hypergradient be trusted?
#
# `check_hypergradient` compares the prediction of the first hypergradient, at `start`, with
# training for the same five steps with other hyperparameters.

# %%
gradhpo.check_hypergradient(optimizer, start, train.stack(0, 5), val, losses)

# %% [markdown]
# So five steps predict five steps well. Do they predict 20? `compare_hypergradients` compares
# estimates at the end of the run, `state`, with the exact hypergradient of 20 steps, by direction
# (the cosine), length and cost.

# %%
methods = {
    "five steps": optimizer,
    "one step": gradhpo.OneStepOptimizer(inner),
    "implicit": gradhpo.ImplicitOptimizer(inner, inner_steps=20),
}
gradhpo.compare_hypergradients(methods, state, train.stack(0, 20), val, losses)

# %% [markdown]
# They do not: at the end of the run the hypergradient of five steps points the wrong way for the
# last layer. The decays that were found are what a short horizon prefers. To tune for longer
# training, unroll 20 steps; [short horizons](../../docs/concepts/short_horizon_bias.md) explains
# why.
#
# Next: [which algorithm?](../../docs/which_algorithm.md), and
# [where hyperparameters go](../../docs/hyperparameters.md).
#
# To make this notebook again after a change of the script:
#
#     pip install -e ".[examples]" jupytext nbconvert ipykernel
#     cd examples/notebook
#     jupytext --to ipynb first_run.py
#     jupyter nbconvert --to notebook --inplace --execute \
#         --ExecutePreprocessor.record_timing=False first_run.ipynb
