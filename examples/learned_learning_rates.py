"""One learning rate for every parameter of a network, learned while it trains.

Five Gaussian classes in 20 dimensions, 20 % of the training labels wrong. A network trains for 20
steps from a fixed starting point, 60 times over. The hyperparameters are its learning rates, one
for every weight and bias (softplus of an unconstrained number), all equal at the start. All methods
get the same number of inner steps and are compared on clean data after the last episode.

    python examples/learned_learning_rates.py            # 3 seeds, about 2 minutes on 2 cores
    python examples/learned_learning_rates.py --help
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
from jaxtyping import Array, PyTree

import gradhpo


CLASSES, FEATURES, WIDTH = 5, 20, 32
STEPS = 20  # inner steps of an episode
FIXED_RATE = 0.05
NOISE = 0.2


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]


class Result(NamedTuple):
    val_loss: np.ndarray  # [episodes], at the end of each
    test_loss: float
    accuracy: float
    seconds: float


def load_data(seed: int) -> Data:
    """500 training examples, some with wrong labels; 500 and 2,000 clean ones."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(CLASSES, FEATURES)) * 0.6

    def draw(count: int, noise: float) -> tuple[Array, Array]:
        y = random.integers(CLASSES, size=count)
        x = centres[y] + random.normal(size=(count, FEATURES))
        wrong = random.random(count) < noise
        y = np.where(wrong, (y + random.integers(1, CLASSES, count)) % CLASSES, y)
        return jnp.asarray(x, jnp.float32), jnp.asarray(y)

    return Data(draw(500, NOISE), draw(500, 0.0), draw(2_000, 0.0))


def per_parameter(raw_rates: PyTree) -> optax.GradientTransformation:
    """Gradient descent with a separate rate for every number in the parameters."""
    scale = lambda raw, gradient: -jax.nn.softplus(raw) * gradient
    return optax.stateless(lambda gradients, _: jax.tree.map(scale, raw_rates, gradients))


# A loss is a function of (parameters, hyperparameters, batch). These hyperparameters act only in
# the inner optimizer, so neither loss uses them.
def cross_entropy(net: eqx.nn.MLP, raw_rates: PyTree, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y))


LOSSES = gradhpo.LossFunctions(cross_entropy, cross_entropy)
ONLINE, WHOLE = optax.adam(0.01), optax.adam(0.1)  # an outer update per step, or per episode

# Each with its number of outer steps per episode.
OPTIMIZERS = {
    "first order": (gradhpo.FOOptimizer(per_parameter, ONLINE), STEPS),
    "one step": (gradhpo.OneStepOptimizer(per_parameter, ONLINE), STEPS),
    "T1-T2 (DARTS)": (gradhpo.T1T2Optimizer(per_parameter, ONLINE), STEPS),
    "HyperDistill": (gradhpo.OnlineHypergradientOptimizer(per_parameter, ONLINE, gamma=0.9), STEPS),
    "greedy": (gradhpo.GreedyOptimizer(per_parameter, WHOLE, unroll_steps=STEPS), 1),
    "DrMAD": (gradhpo.DrMADOptimizer(per_parameter, WHOLE, unroll_steps=STEPS), 1),
    "exact": (gradhpo.UnrolledOptimizer(per_parameter, WHOLE, unroll_steps=STEPS), 1),
}


@eqx.filter_jit
def train_once(net: eqx.nn.MLP, raw_rates: PyTree, data: gradhpo.ArrayData) -> eqx.nn.MLP:
    """One episode with these rates, as any optax user would write it."""
    optimizer = per_parameter(raw_rates)
    w, static = eqx.partition(net, eqx.is_inexact_array)

    def body(w, step):
        loss = lambda w: cross_entropy(eqx.combine(w, static), raw_rates, data(step))
        updates, _ = optimizer.update(jax.grad(loss)(w), optax.EmptyState(), w)
        return optax.apply_updates(w, updates), None

    w, _ = jax.lax.scan(body, w, jnp.arange(STEPS))
    return eqx.combine(w, static)


@eqx.filter_jit
def measure(net: eqx.nn.MLP, batch: tuple[Array, Array]) -> tuple[Array, Array]:
    """Cross entropy and accuracy."""
    right = jnp.argmax(jax.vmap(net)(batch[0]), axis=1) == batch[1]
    return cross_entropy(net, None, batch), jnp.mean(right)


def constant_rates(net: eqx.nn.MLP, rate: float) -> PyTree:
    raw = float(np.log(np.expm1(rate)))  # softplus(raw) = rate
    return jax.tree.map(lambda x: jnp.full_like(x, raw), eqx.filter(net, eqx.is_inexact_array))


def finished(
    net: eqx.nn.MLP, rates: PyTree, source: gradhpo.ArrayData, data: Data
) -> tuple[float, float, float]:
    """Validation loss, test loss and test accuracy of one more training with these rates."""
    trained = train_once(net, rates, source)
    test_loss, accuracy = measure(trained, data.test)
    return float(measure(trained, data.val)[0]), float(test_loss), float(accuracy)


def experiment(data: Data, episodes: int, seed: int, names: list[str]) -> dict[str, Result | str]:
    """Every row of the table for one seed; the reason where a row is impossible."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    net = eqx.nn.MLP(FEATURES, CLASSES, WIDTH, 1, key=k1)
    source = gradhpo.ArrayData(data.train, batch_size=100, key=k2)
    rows: dict[str, Result | str] = {}

    def untuned(rate: float) -> Result:
        started = time.perf_counter()
        val_loss, test_loss, accuracy = finished(net, constant_rates(net, rate), source, data)
        curve = np.full(episodes, val_loss)
        return Result(curve, test_loss, accuracy, time.perf_counter() - started)

    rows["fixed rate"] = untuned(FIXED_RATE)
    grid = [untuned(float(rate)) for rate in np.geomspace(0.01, 3.0, 20)]
    best = min(grid, key=lambda row: row.val_loss[-1])
    rows["best fixed rate of 20"] = best._replace(seconds=sum(row.seconds for row in grid))
    for name in names:
        optimizer, steps_per_episode = OPTIMIZERS[name]
        print(f"seed {seed}, {name}")
        started = time.perf_counter()
        try:
            state, history = gradhpo.run(
                optimizer,
                optimizer.init(net, constant_rates(net, FIXED_RATE)),
                LOSSES,
                source,
                data.val,
                num_steps=episodes * steps_per_episode,
                steps_per_episode=steps_per_episode,
                reptile_rate=0.0,  # every episode starts from the same network
                progress=False,
            )
        except ValueError as error:
            if "sees none of the hyperparameters" not in str(error):
                raise
            rows[name] = "cannot see learning rates: they are not in the validation loss"
            continue
        seconds = time.perf_counter() - started
        _, test_loss, accuracy = finished(net, state.hyperparams, source, data)
        ends = history["val_loss"][steps_per_episode - 1 :: steps_per_episode]
        rows[name] = Result(ends, test_loss, accuracy, seconds)
    return rows


def table(runs: list[dict[str, Result | str]]) -> str:
    spread = lambda values: f"{np.mean(values):.3f} ± {np.std(values):.3f}"
    lines = [f"{'':24}{'test loss':>16}{'test accuracy':>18}{'seconds':>9}"]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        if isinstance(rows[0], str):
            lines.append(f"{name:24}{rows[0]:>16}")
            continue
        percent = 100 * np.asarray([row.accuracy for row in rows])
        lines.append(
            f"{name:24}{spread([row.test_loss for row in rows]):>16}"
            f"{f'{percent.mean():.1f} ± {percent.std():.1f} %':>18}"
            f"{np.mean([row.seconds for row in rows]):>9.1f}"
        )
    return "\n".join(lines)


def picture(runs: list[dict[str, Result | str]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, first in runs[0].items():
        if isinstance(first, str):
            continue
        curve = np.mean([run[name].val_loss for run in runs], axis=0)
        style = "--" if "fixed" in name else "-"
        axes.plot(np.arange(1, len(curve) + 1), curve, label=name, ls=style)
    axes.set(xlabel="episode of 20 steps", ylabel="validation loss at its end")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Result | str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=60, help="of 20 steps (default 60)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="1 seed, 5 episodes, 3 methods: a smoke test"
    )
    parser.add_argument("--output", type=Path, default=Path("out/learned_learning_rates.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.episodes < 1:
        parser.error("--seeds and --episodes must be at least 1")
    names = list(OPTIMIZERS)
    if options.quick:
        options.seeds, options.episodes = 1, 5
        names = ["first order", "one step", "exact"]

    parameters = (FEATURES + 1) * WIDTH + (WIDTH + 1) * CLASSES
    print(
        f"{parameters} learning rates, {options.episodes} episodes of {STEPS} steps; "
        f"{NOISE:.0%} of the training labels wrong"
    )
    started = time.perf_counter()
    datas = [load_data(seed) for seed in range(options.seeds)]
    runs = [experiment(data, options.episodes, seed, names) for seed, data in enumerate(datas)]
    print(f"\nmean ± standard deviation over {options.seeds} seed(s), learning rates tuned by\n")
    print(table(runs))
    picture(runs, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
