# %% [markdown]
# # A first hypergradient
#
# A hypergradient is the derivative of a validation loss with respect to a hyperparameter. Here we
# compute one by hand, in pure JAX, and then with gradhpo, exactly and by approximations. The
# problem is logistic regression on scikit-learn's breast cancer data: 60 patients for training, a
# fifth of them with the wrong diagnosis, and the other 509 for validation. The hyperparameter is
# the logarithm of the weight decay.
#
#     python examples/reading/first_hypergradient.py            # about 20 seconds on 2 slow cores
#     python examples/reading/first_hypergradient.py --help
#
# The cells run in order, in an editor that supports `# %%` or as one script.

# %%
import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import gradhpo


parser = argparse.ArgumentParser(description="A hypergradient by hand, and by gradhpo.")
parser.add_argument("--quick", action="store_true", help="coarser curves: a smoke test")
parser.add_argument("--output", type=Path, default=Path("out/first_hypergradient.png"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

jax.config.update("jax_enable_x64", True)  # finite differences need it

# %% [markdown]
# ## The problem
#
# Training minimises `train_loss`: the error on the training patients plus a penalty on the weights.
# We care about `val_loss`: the error on the other patients, without a penalty.

# %%
x, y = load_breast_cancer(return_X_y=True)
x = (x - x.mean(axis=0)) / x.std(axis=0)
random = np.random.default_rng(0)
order = random.permutation(len(y))
x, y = x[order], np.where(y[order] == 1, 1.0, -1.0)
y[:60] *= np.where(random.random(60) < 0.2, -1, 1)
train, val = (jnp.asarray(x[:60]), jnp.asarray(y[:60])), (jnp.asarray(x[60:]), jnp.asarray(y[60:]))


def error(w, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def train_loss(w, log_decay, batch):
    return error(w, batch) + 0.5 * jnp.exp(log_decay) * w @ w


def val_loss(w, log_decay, batch):
    return error(w, batch)


# %% [markdown]
# ## By hand
#
# Training is 100 steps of gradient descent from 0. The validation loss at its end is a function of
# the log decay. JAX differentiates it like any other function: backwards through all 100 steps.

# %%
RATE, STEPS = 0.3, 100


@jax.jit
def trained(log_decay):
    """The parameters before the first step and after each, `[STEPS + 1, 30]`."""

    def step(w, _):
        new = w - RATE * jax.grad(train_loss)(w, log_decay, train)
        return new, new

    zeros = jnp.zeros(x.shape[1])
    return jnp.vstack([zeros, jax.lax.scan(step, zeros, None, length=STEPS)[1]])


@jax.jit
def outer(log_decay):
    return error(trained(log_decay)[-1], val)


log_decay = jnp.array(-5.0)
loss, by_hand = jax.value_and_grad(outer)(log_decay)
epsilon = 1e-5
difference = (outer(log_decay + epsilon) - outer(log_decay - epsilon)) / (2 * epsilon)
print(f"validation loss after training   {loss:.6f}")
print(f"hypergradient by hand           {by_hand:+.8f}")
print(f"central difference              {difference:+.8f}")

# %% [markdown]
# It is negative: more decay would help. Two shortcuts are just as quick to write.
#
# Implicit differentiation assumes that training ends where the gradient of the training loss is 0.
# That equation makes $w$ a function of the log decay, and its derivative takes one linear system
# with the Hessian. One step differentiates only the last step, as if the earlier parameters did not
# depend on the log decay.

# %%
mixed = jax.jacfwd(jax.grad(train_loss), argnums=1)


@jax.jit
def short_cuts(log_decay):
    before, w = trained(log_decay)[-2:]
    v = jax.grad(error)(w, val)
    q = jnp.linalg.solve(jax.hessian(train_loss)(w, log_decay, train), v)
    return -q @ mixed(w, log_decay, train), -RATE * v @ mixed(before, log_decay, train)


implicit_by_hand, one_step_by_hand = short_cuts(log_decay)
print(f"implicit by hand                {implicit_by_hand:+.8f}")
print(f"one step by hand                {one_step_by_hand:+.8f}")

# %% [markdown]
# ## With gradhpo
#
# The same three estimates, and greedy. An optimizer combines the inner optimizer and the estimate;
# `compute_hypergradient` trains from the state and returns the estimate at the end. One step takes
# only one inner step, so it starts from a state trained for 99 steps.

# %%
sgd = optax.sgd(RATE)
optimizers = {
    "exact": gradhpo.UnrolledOptimizer(sgd, unroll_steps=STEPS),
    "implicit": gradhpo.ImplicitOptimizer(sgd, inner_steps=STEPS),
    "greedy": gradhpo.GreedyOptimizer(sgd, unroll_steps=STEPS, gamma=0.9),
    "one step": gradhpo.OneStepOptimizer(sgd),
}


def estimate(name, log_decay):
    optimizer = optimizers[name]
    start = jnp.zeros(x.shape[1]) if name != "one step" else trained(log_decay)[-2]
    state = optimizer.init(start, log_decay)
    return float(optimizer.compute_hypergradient(state, train, val, train_loss, val_loss))


found = {name: estimate(name, log_decay) for name in optimizers}
print("\nby gradhpo")
for name, value in found.items():
    print(f"{name:10}                      {value:+.8f}")
references = {"exact": by_hand, "implicit": implicit_by_hand, "one step": one_step_by_hand}
for name, value in references.items():
    print(f"{name}, relative difference to that by hand: {abs(found[name] / value - 1):.1e}")

# %% [markdown]
# One step and greedy have the wrong sign. One step of decay shrinks the parameters along
# themselves, and that alone would raise the validation error. Over a hundred steps, decay does
# something else: it changes the directions in which the parameters grow, and only a derivative of
# the whole path sees that. Implicit differentiation has the right sign, but is three times too
# long: it gives the effect at the optimum, which training has not reached yet.
#
# ## Going downhill
#
# Twelve steps of gradient descent on the log decay, each with a training run of 100 steps from 0
# (`steps_per_episode=1, reptile_rate=0.0`: every outer step starts over).

# %%
optimizer = gradhpo.UnrolledOptimizer(sgd, unroll_steps=STEPS)
visited = []
state, history = gradhpo.run(
    optimizer,
    optimizer.init(jnp.zeros(x.shape[1]), log_decay),
    gradhpo.LossFunctions(train_loss, val_loss),
    train,
    val,
    num_steps=12,
    lr_hyper=100.0,
    steps_per_episode=1,
    reptile_rate=0.0,
    progress=False,
    chunk_size=1,
    callbacks=[lambda state, metrics: visited.append(float(state.hyperparams))],
)
visited = np.array([float(log_decay), *visited])
there = estimate("exact", visited[-1])
print(f"\ntuned log decay {visited[-1]:.4f}, hypergradient there {there:+.1e}")
print(f"validation loss {loss:.4f} -> {history['val_loss'][-1]:.4f}")

# %% [markdown]
# ## Pictures
#
# The two levels: training for several decays, and the final validation loss as a function of the
# decay, with its tangent, whose slope is the hypergradient.

# %%
options.output.parent.mkdir(parents=True, exist_ok=True)
grid = np.linspace(-7.0, -2.0, 11 if options.quick else 51)
curve = np.asarray(jax.vmap(outer)(grid))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
errors = jax.jit(jax.vmap(lambda w: (error(w, train), error(w, val))))
for number, one in enumerate((-7.0, -3.5, -1.0)):
    on_train, on_val = errors(trained(one))
    left.plot(on_train, "--", color=f"C{number}", lw=1)
    left.plot(on_val, color=f"C{number}", label=f"log decay {one:g}")
left.set(xlabel="inner step", ylabel="error", title="inner: training (dashed), validation (solid)")
left.set(ylim=(0.2, 0.7))
left.legend()
right.plot(grid, curve, color="0.4")
reach = np.array([-0.8, 0.8])
right.plot(log_decay + reach, loss + by_hand * reach, color="C3", label="slope: hypergradient")
heights = np.interp(visited, grid, curve)
right.plot(visited, heights, "o", ms=4, color="C3", label="outer steps")
right.set(xlabel="log decay", title=f"outer: validation error after {STEPS} steps")
right.legend()
figure.savefig(options.output.with_stem(options.output.stem + "_levels"), dpi=150)
plt.close(figure)

# %% [markdown]
# The estimates, for every decay after 100 steps, and for one decay after each number of steps. The
# second needs no new training: forward mode carries the derivative of the parameters along.

# %%


@jax.jit
def along_the_way(log_decay):
    """Exact, implicit, greedy and one-step hypergradients after each step, from one run."""

    def step(carry, _):
        w, tangent, greedy = carry
        last = -RATE * mixed(w, log_decay, train)
        update = lambda w, log_decay: w - RATE * jax.grad(train_loss)(w, log_decay, train)
        w, tangent = jax.jvp(update, (w, log_decay), (tangent, jnp.ones(())))
        v = jax.grad(error)(w, val)
        greedy = 0.9 * greedy + v @ last
        q = jnp.linalg.solve(jax.hessian(train_loss)(w, log_decay, train), v)
        implicit = -q @ mixed(w, log_decay, train)
        return (w, tangent, greedy), jnp.stack([v @ tangent, implicit, greedy, v @ last])

    zeros = jnp.zeros(x.shape[1])
    return jax.lax.scan(step, (zeros, zeros, jnp.zeros(())), None, length=1_000)[1]


STYLES = {"exact": "-", "implicit": "--", "greedy": "-.", "one step": ":"}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
places = grid[::2]
for number, (name, style) in enumerate(STYLES.items()):
    left.plot(
        places, [estimate(name, one) for one in places], style, color=f"C{number}", label=name
    )
middles, slopes = (grid[1:] + grid[:-1]) / 2, np.diff(curve) / np.diff(grid)
every = slice(None, None, max(1, len(slopes) // 12))
left.plot(middles[every], slopes[every], "o", ms=4, color="0.3", label="finite differences")
left.set(xlabel="log decay", ylabel="hypergradient", title=f"after {STEPS} steps")
left.set(ylim=(-0.01, 0.04))  # greedy continues beyond
left.legend()

values = np.asarray(along_the_way(log_decay))
for number, (name, style) in enumerate(STYLES.items()):
    right.plot(np.arange(1, 1_001), values[:, number], style, color=f"C{number}", label=name)
right.axvline(STEPS, color="0.8", lw=0.8)
right.set(xscale="log", xlabel="inner steps", title=f"log decay {float(log_decay):g}")
for ax in (left, right):
    ax.axhline(0, color="0.6", lw=0.8)
figure.savefig(options.output, dpi=150)
plt.close(figure)
at = {steps: values[steps - 1] for steps in (10, STEPS, 1_000)}
print(f"\nafter  {'  '.join(f'{name:>9}' for name in STYLES)}")
for steps, row in at.items():
    print(f"{steps:5}  {'  '.join(f'{value:+9.5f}' for value in row)}")
print(f"\npictures in {options.output} and next to it")
