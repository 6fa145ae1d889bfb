# %% [markdown]
# # Short-horizon bias
#
# The learning rate that is best for the next ten steps is not the best for the next thousand. When
# the rate falls, noise falls immediately, and progress along flat directions is lost only later. So
# a rate tuned over a few steps comes out too small (Wu, Ren, Liao and Grosse, *Understanding
# Short-Horizon Bias in Stochastic Meta-Optimization*, ICLR 2018). This script shows the effect on
# the problem of that paper, a noisy quadratic, with hypergradients over horizons of 1 to 1,000
# steps.
#
#     python examples/reading/short_horizon.py            # about 15 seconds on 2 slow cores
#     python examples/reading/short_horizon.py --help

# %%
import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradhpo


parser = argparse.ArgumentParser(description="The hypergradient of a learning rate by horizon.")
parser.add_argument("--quick", action="store_true", help="short horizons: a smoke test")
parser.add_argument("--output", type=Path, default=Path("out/short_horizon.png"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

jax.config.update("jax_enable_x64", True)
LONGEST = 100 if options.quick else 1_000
HORIZONS = [steps for steps in (1, 3, 10, 30, 100, 300, 1_000) if steps <= LONGEST]

# %% [markdown]
# ## A noisy quadratic
#
# The loss is $\frac12\sum_i h_i w_i^2$, and SGD sees the gradient $h_i(w_i - c_i)$ of a mini-batch
# whose optimum $c_i$ has mean 0 and variance $1/h_i$. No sampling is needed, since the second
# moments $m_i = \mathbb{E}\,w_i^2$ follow an exact recursion, $m_i' = (1 - \eta h_i)^2 m_i +
# \eta^2 h_i$, and the expected loss is $\frac12\sum_i h_i m_i$. The recursion is the inner update,
# passed as `update_fn`. The only hyperparameter is $\log\eta$.

# %%
h = jnp.geomspace(1e-3, 1.0, 30)


def second_moments(m, log_rate, batch):
    rate = jnp.exp(log_rate)
    return (1 - rate * h) ** 2 * m + rate**2 * h


def expected_loss(m, log_rate, batch):
    return 0.5 * jnp.sum(h * m)


# %% [markdown]
# We start in the middle of training, after 300 steps with a rate of 0.3: the steep directions are
# down to their noise, and the flat ones are still far from their optimum.

# %%
START_RATE = 0.3
start = 1 / h
for _ in range(300):
    start = second_moments(start, np.log(START_RATE), None)
print(f"expected loss: {expected_loss(1 / h, 0, None):.2f} at first, ", end="")
print(f"{expected_loss(start, 0, None):.2f} after 300 steps with rate {START_RATE}")

# %% [markdown]
# ## The hypergradient by horizon
#
# After each step, forward mode has the hypergradient of all steps so far, so one run of 1,000
# steps gives the derivative for every horizon. `lr_hyper=0` keeps the rate fixed.

# %%
forward = gradhpo.ForwardModeOptimizer(update_fn=second_moments)
losses = gradhpo.LossFunctions(expected_loss, expected_loss)
log_rate = jnp.log(START_RATE)
state = forward.init(start, log_rate)
derivatives = []
for _ in range(LONGEST):
    args = (state, None, None, expected_loss, expected_loss)
    derivatives.append(float(forward.compute_hypergradient(*args)))
    state = forward.step(*args, lr_hyper=0.0)
derivatives = np.array(derivatives)
print("\nhorizon  d loss / d log rate")
for steps in HORIZONS:
    print(f"{steps:7}  {derivatives[steps - 1]:+19.4f}")

# %% [markdown]
# Up to about 100 steps the derivative is positive: a smaller rate looks better. Beyond that, it is
# negative. The training is the same; only the time at which we judge it differs.
#
# ## Tuned rates by horizon
#
# Each horizon is tuned until its rate converges: every outer step starts from the same point
# (`steps_per_episode=1, reptile_rate=0.0`) and follows the sign, since only one number is tuned.
# Then all the rates train for the same 1,000 steps.


# %%
@jax.jit
def loss_after(log_rate):
    step = lambda _, m: second_moments(m, log_rate, None)
    return expected_loss(jax.lax.fori_loop(0, LONGEST, step, start), log_rate, None)


by_signs = gradhpo.sign_descent(0.3, tolerance=0.0)
tuned = {}
for steps in (1, 10, 100, LONGEST):
    optimizer = gradhpo.ForwardModeOptimizer(
        None, by_signs, unroll_steps=steps, update_fn=second_moments
    )
    state, history = gradhpo.run(
        optimizer,
        optimizer.init(start, log_rate),
        losses,
        None,
        None,
        num_steps=30,
        steps_per_episode=1,
        reptile_rate=0.0,
        progress=False,
    )
    tuned[steps] = float(jnp.exp(state.hyperparams))

print(f"\nhorizon  tuned rate  loss after {LONGEST:,} steps with it")
for steps, rate in tuned.items():
    print(f"{steps:7}  {rate:10.4f}  {loss_after(jnp.log(rate)):10.3f}")
closed = float(jnp.sum(h**2 * start) / jnp.sum(h**3 * start + h**2))
print(f"best rate for one step in closed form: {closed:.4f}")

# %% [markdown]
# One step prefers half the current rate, ten steps even less, and 1,000 steps more than the current
# rate. In the long run, the rate that is best for ten steps costs 60 % in loss.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.axhline(0, color="0.6", lw=0.8)
x = np.arange(1, LONGEST + 1)
left.plot(x, derivatives, color="0.4", lw=1)
for sign, colour, label in ((1, "C3", "lower the rate"), (-1, "C0", "raise the rate")):
    part = sign * derivatives > 0
    left.fill_between(x, derivatives, where=part, color=colour, alpha=0.3, lw=0, label=label)
left.set(xscale="log", xlabel="horizon in inner steps", ylabel="d loss / d log rate")
left.set_title(f"hypergradient of the rate, at {START_RATE}")
left.legend(loc="lower left")
right.plot(list(tuned), list(tuned.values()), "o-", color="C0", label="tuned rate")
right.axhline(START_RATE, color="C0", ls=":", lw=1, label="rate at the start")
right.set(xscale="log", yscale="log", xlabel="horizon in inner steps", ylabel="rate")
ticks = [0.1, 0.2, 0.3, 0.5]
right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
right.minorticks_off()
beside = right.twinx()
beside.spines["right"].set_visible(True)
long_run = [float(loss_after(jnp.log(rate))) for rate in tuned.values()]
beside.plot(list(tuned), long_run, "s--", color="C1", label=f"loss after {LONGEST:,} steps with it")
beside.set(ylabel="expected loss", ylim=(0, 1.15 * max(long_run)))
right.set_title("the rate that each horizon wants")
lines = [*right.get_lines(), *beside.get_lines()]
figure.legend(handles=lines, loc="outside lower right", ncols=3)
options.output.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.output, dpi=150)
plt.close(figure)
print(f"\npicture in {options.output}")
