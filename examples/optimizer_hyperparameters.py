"""Momentum for every coordinate, and Adam's own three numbers, learned by unrolling.

**Momentum.** Gradient descent with momentum descends a quadratic bowl with 30 curvatures h from
flat (0.01) to steep (1), with one momentum coefficient per coordinate. All start near 0. Tuning
finds high momentum in flat directions, close to the values known to be best over infinitely many
steps, (1 - sqrt(rate h))^2. Over 100 steps the best values are a little higher: with them a
coordinate swings through the minimum just as training ends, and the loss becomes tiny to no
practical benefit. So momenta tuned for 100 steps are also measured after 150, where this effect is
gone: they are then about as good as the asymptotic values.

**Adam.** The learning rate, b1 and b2 of Adam follow the hypergradient of the validation loss at
the end of short training runs of a small network on scikit-learn's digits. They are compared with
Adam's defaults and with the best learning rate of a grid at the default b1 and b2, all in new
training runs with other starting points and batch orders. Nearly all of the gain over the defaults
comes from the learning rate, and a grid of ten is far cheaper.

    python examples/optimizer_hyperparameters.py            # 3 seeds, about a minute on 2 cores
    python examples/optimizer_hyperparameters.py --help
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.scipy.special import logit
from jaxtyping import Array, PyTree
from sklearn.datasets import load_digits

import gradhpo


# The squared distance of a steep coordinate from its minimum falls to 1e-54, and so does its
# hypergradient: below the range of float32.
jax.config.update("jax_enable_x64", True)

COORDINATES, RATE, BOWL_STEPS = 30, 0.5, 100
ADAM_STEPS = 100
WIDTH, BATCH_SIZE = 32, 50
DEFAULT = {"rate": 1e-3, "b1": 0.9, "b2": 0.999}
RATES = np.geomspace(3e-4, 0.3, 10)  # of the grid
FRESH_STARTS = 5


class Bowl(NamedTuple):
    """Final losses of the quadratic problem, and what was learned."""

    loss: dict[str, float]  # after the number of steps used for tuning
    later: dict[str, float]  # after 1.5 times as many
    curvatures: np.ndarray
    momenta: np.ndarray
    asymptotic: np.ndarray


class Adam(NamedTuple):
    """One row of the second table."""

    rate: float
    b1: float
    b2: float
    test_loss: float
    accuracy: float
    seconds: float


class Run(NamedTuple):
    bowl: Bowl
    adam: dict[str, Adam]
    path: np.ndarray  # [outer steps, 3], of the learned Adam


# --- one momentum for every coordinate ---------------------------------------------------------


def momentum_of_each(logits: PyTree) -> optax.GradientTransformation:
    """Gradient descent with a separate momentum for every number in the parameters."""
    init = lambda params: jax.tree.map(jnp.zeros_like, params)

    def update(gradients, velocity, params=None):
        push = lambda raw, g, v: g + jax.nn.sigmoid(raw) * v
        velocity = jax.tree.map(push, logits, gradients, velocity)
        return jax.tree.map(lambda v: -RATE * v, velocity), velocity

    return optax.GradientTransformation(init, update)


def bowl_loss(w: Array, logits: Array, curvatures: Array) -> Array:
    return 0.5 * jnp.sum(curvatures * w**2)


@eqx.filter_jit
def descend(w: Array, logits: Array, curvatures: Array, steps: int) -> Array:
    """The loss after plain descent with these momenta."""
    optimizer = momentum_of_each(logits)

    def body(carry, _):
        w, velocity = carry
        gradient = jax.grad(bowl_loss)(w, logits, curvatures)
        updates, velocity = optimizer.update(gradient, velocity)
        return (optax.apply_updates(w, updates), velocity), None

    (w, _), _ = jax.lax.scan(body, (w, optimizer.init(w)), length=steps)
    return bowl_loss(w, logits, curvatures)


# Steep coordinates arrive long before the end and have tiny hypergradients, so each momentum
# follows the sign of its hypergradient. Short steps from near 0 stop at the first value with which
# a coordinate arrives exactly, just above the asymptotic one; there are more such values above it.
BOWL_OPTIMIZER = gradhpo.UnrolledOptimizer(
    momentum_of_each, gradhpo.sign_descent(0.1, tolerance=0.0), unroll_steps=BOWL_STEPS
)
BOWL_LOSSES = gradhpo.LossFunctions(bowl_loss, bowl_loss)


def tune_bowl(seed: int, outer_steps: int) -> Bowl:
    random = np.random.default_rng(seed)
    inner = np.exp(random.uniform(np.log(0.01), 0.0, COORDINATES - 2))
    curvatures = np.sort(np.concatenate([[0.01, 1.0], inner]))
    start, of_bowl = jnp.asarray(random.normal(size=COORDINATES)), jnp.asarray(curvatures)
    state, _ = gradhpo.run(
        BOWL_OPTIMIZER,
        BOWL_OPTIMIZER.init(start, jnp.full(COORDINATES, -4.0)),
        BOWL_LOSSES,
        of_bowl,
        of_bowl,
        num_steps=outer_steps,
        steps_per_episode=1,
        reptile_rate=0.0,  # every outer step starts from the same point
        progress=False,
    )
    asymptotic = (1 - np.sqrt(RATE * curvatures)) ** 2
    common = np.linspace(0.0, 0.98, 99)
    losses = [
        float(descend(start, logit(jnp.full(COORDINATES, beta)), of_bowl, BOWL_STEPS))
        for beta in common
    ]
    tried = {
        "no momentum": jnp.full(COORDINATES, -jnp.inf),
        "best common momentum of 99": logit(jnp.full(COORDINATES, common[np.argmin(losses)])),
        "asymptotic optimum for each": logit(jnp.asarray(asymptotic)),
        "tuned, one per coordinate": state.hyperparams,
    }
    after = lambda steps: {
        name: float(descend(start, logits, of_bowl, steps)) for name, logits in tried.items()
    }
    return Bowl(
        loss=after(BOWL_STEPS),
        later=after(3 * BOWL_STEPS // 2),
        curvatures=curvatures,
        momenta=np.asarray(jax.nn.sigmoid(state.hyperparams)),
        asymptotic=asymptotic,
    )


# --- Adam's learning rate, b1 and b2 -----------------------------------------------------------


def adam(raw: PyTree) -> optax.GradientTransformation:
    """Adam with unconstrained hyperparameters."""
    return optax.adam(
        jnp.exp(raw["log_rate"]),
        b1=jax.nn.sigmoid(raw["logit_b1"]),
        b2=jax.nn.sigmoid(raw["logit_b2"]),
        eps_root=1e-16,  # without it, a pixel that is always 0 makes the hypergradient NaN
    )


def unconstrained(rate: float, b1: float, b2: float) -> PyTree:
    return {"log_rate": jnp.log(rate), "logit_b1": logit(b1), "logit_b2": logit(b2)}


def constrained(raw: PyTree) -> np.ndarray:
    """Rate, b1 and b2."""
    numbers = [
        jnp.exp(raw["log_rate"]), jax.nn.sigmoid(raw["logit_b1"]), jax.nn.sigmoid(raw["logit_b2"])
    ]  # fmt: skip
    return np.asarray(jnp.stack(numbers))


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]


def load_data(seed: int) -> Data:
    """1,000 digits to train on, 300 to tune on, 497 to test on, shuffled."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    part = lambda rows: (jnp.asarray(x[rows] / 16), jnp.asarray(y[rows]))
    return Data(*map(part, np.split(order, (1_000, 1_300))))


def cross_entropy(net: eqx.nn.MLP, raw: PyTree, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y))


@eqx.filter_jit
def train(net: eqx.nn.MLP, raw: PyTree, batches: gradhpo.ArrayData) -> eqx.nn.MLP:
    """Plain training, as any optax user would write it."""
    optimizer = adam(raw)
    w, static = eqx.partition(net, eqx.is_inexact_array)

    def body(carry, step):
        w, state = carry
        loss = lambda w: cross_entropy(eqx.combine(w, static), raw, batches(step))
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(body, (w, optimizer.init(w)), jnp.arange(ADAM_STEPS))
    return eqx.combine(w, static)


@eqx.filter_jit
def measure(net: eqx.nn.MLP, batch: tuple[Array, Array]) -> tuple[Array, Array]:
    """Cross entropy and accuracy."""
    right = jnp.argmax(jax.vmap(net)(batch[0]), axis=1) == batch[1]
    return cross_entropy(net, None, batch), jnp.mean(right)


def new_net(key: Array) -> eqx.nn.MLP:
    # A smooth activation: at relu's kinks the training gradient jumps, which no derivative of the
    # training path sees.
    return eqx.nn.MLP(64, 10, WIDTH, 1, activation=jnp.tanh, key=key)


def fresh_trainings(raw: PyTree, data: Data, seed: int) -> tuple[float, float]:
    """Mean test loss and accuracy of training runs from new starts, with new batch orders."""
    ends = []
    for key in jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), FRESH_STARTS):
        k1, k2 = jax.random.split(key)
        trained = train(new_net(k1), raw, gradhpo.ArrayData(data.train, BATCH_SIZE, k2))
        ends.append(measure(trained, data.test))
    test_loss, accuracy = np.mean(np.asarray(ends), axis=0)
    return float(test_loss), float(accuracy)


# Created once: a new function object would be compiled again for every seed.
ADAM_OPTIMIZER = gradhpo.UnrolledOptimizer(adam, optax.adam(0.15), unroll_steps=ADAM_STEPS)
ADAM_LOSSES = gradhpo.LossFunctions(cross_entropy, cross_entropy)


def tune_adam(seed: int, outer_steps: int) -> tuple[dict[str, Adam], np.ndarray]:
    data = load_data(seed)
    k1, k2 = jax.random.split(jax.random.key(seed))
    net, batches = new_net(k1), gradhpo.ArrayData(data.train, BATCH_SIZE, k2)

    def row(raw: PyTree, started: float) -> Adam:
        seconds = time.perf_counter() - started
        return Adam(*map(float, constrained(raw)), *fresh_trainings(raw, data, seed), seconds)

    rows = {"defaults": row(unconstrained(**DEFAULT), time.perf_counter())}

    started = time.perf_counter()
    grid = [unconstrained(float(rate), DEFAULT["b1"], DEFAULT["b2"]) for rate in RATES]
    ends = [float(measure(train(net, raw, batches), data.val)[0]) for raw in grid]
    rows[f"best rate of {len(grid)}, default b1 and b2"] = row(grid[np.argmin(ends)], started)

    started = time.perf_counter()
    path = []
    state, _ = gradhpo.run(
        ADAM_OPTIMIZER,
        ADAM_OPTIMIZER.init(net, unconstrained(**DEFAULT)),
        ADAM_LOSSES,
        batches,
        data.val,
        num_steps=outer_steps,
        steps_per_episode=1,
        reptile_rate=0.0,
        chunk_size=1,
        callbacks=[lambda state, metrics: path.append(constrained(state.hyperparams))],
        progress=False,
    )
    rows["tuned, rate, b1 and b2"] = row(state.hyperparams, started)
    return rows, np.stack(path)


# --- tables and pictures -----------------------------------------------------------------------


def bowl_table(runs: list[Run]) -> str:
    """Losses span many orders of magnitude, so the exponents are averaged."""
    lines = [
        f"{'log10 of the loss after':28}{f'{BOWL_STEPS} steps':>16}"
        f"{f'{3 * BOWL_STEPS // 2} steps':>16}"
    ]
    for name in runs[0].bowl.loss:
        shown = [
            np.log10([getattr(run.bowl, field)[name] for run in runs])
            for field in ("loss", "later")
        ]
        cells = [f"{exponents.mean():.2f} ± {exponents.std():.2f}" for exponents in shown]
        lines.append(f"{name:28}{cells[0]:>16}{cells[1]:>16}")
    return "\n".join(lines)


def adam_table(runs: list[Run]) -> str:
    spread = lambda values, digits: f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"
    tiny = lambda values: f"{np.mean(values):.1e} ± {np.std(values):.1e}"
    lines = [
        f"{'Adam':36}{'rate':>16}{'b1':>14}{'1 - b2':>20}{'test loss':>16}{'test accuracy':>16}"
        f"{'seconds':>9}"
    ]
    for name in runs[0].adam:
        rate, b1, b2, test_loss, accuracy, seconds = np.transpose([run.adam[name] for run in runs])
        lines.append(
            f"{name:36}{spread(rate, 4):>16}{spread(b1, 2):>14}{tiny(1 - b2):>20}"
            f"{spread(test_loss, 3):>16}{spread(100 * accuracy, 1) + ' %':>16}"
            f"{np.mean(seconds):>9.1f}"
        )
    return "\n".join(lines)


def picture(runs: list[Run], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    line = np.geomspace(0.01, 1.0, 100)
    left.plot(
        line, (1 - np.sqrt(RATE * line)) ** 2, "k--", label=r"best over infinitely many steps"
    )
    for seed, run in enumerate(runs):
        left.plot(run.bowl.curvatures, run.bowl.momenta, "o", ms=4, label=f"learned, seed {seed}")
    left.set(xscale="log", xlabel="curvature", ylabel="momentum", title="One for every coordinate")
    left.legend(frameon=False, fontsize=8)

    for seed, run in enumerate(runs):
        for name, numbers, colour in zip(
            ("rate", "1 - b1", "1 - b2"), as_small(run.path), COLOURS, strict=True
        ):
            label = name if seed == 0 else None
            right.plot(np.arange(len(numbers)), numbers, color=colour, label=label)
    right.set(
        yscale="log", xlabel=f"training of {ADAM_STEPS} steps", title="Adam, from its defaults"
    )
    right.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


COLOURS = ("tab:blue", "tab:orange", "tab:green")


def as_small(path: np.ndarray) -> np.ndarray:
    """Rate, 1 - b1 and 1 - b2, each over the outer steps, starting at the defaults."""
    rate, b1, b2 = np.vstack([list(DEFAULT.values()), path]).T
    return np.stack([rate, 1 - b1, 1 - b2])


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--outer-steps",
        type=int,
        default=40,
        help="for Adam (default 40); the momenta are cheap and take three times as many",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="1 seed, 5 outer steps: a smoke test, too short"
    )
    parser.add_argument("--output", type=Path, default=Path("out/optimizer_hyperparameters.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.outer_steps < 1:
        parser.error("--seeds and --outer-steps must be at least 1")
    if options.quick:
        options.seeds, options.outer_steps = 1, 5

    print(
        f"{COORDINATES} momenta over {BOWL_STEPS} steps, and Adam's rate, b1 and b2 over "
        f"{ADAM_STEPS} steps; {3 * options.outer_steps} and {options.outer_steps} outer steps"
    )
    started, runs = time.perf_counter(), []
    for seed in range(options.seeds):
        print(f"seed {seed}")
        bowl = tune_bowl(seed, 3 * options.outer_steps)
        runs.append(Run(bowl, *tune_adam(seed, options.outer_steps)))
    print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n")
    print(f"{bowl_table(runs)}\n\n{adam_table(runs)}")
    picture(runs, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
