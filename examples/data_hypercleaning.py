"""Clean a data set by gradient: one weight per training example, 1,000 hyperparameters.

The data are scikit-learn's 1,797 handwritten digits. Some of the training labels are replaced by
wrong ones; 100 digits with true labels form the validation set. Every training example i has a
weight sigmoid(a_i) in the training loss, and the a_i follow the hypergradient of the validation
loss while the network trains. All methods have the same budget of inner steps.

    python examples/data_hypercleaning.py            # 3 seeds, about a minute on 2 cores
    python examples/data_hypercleaning.py --help
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import gradhpo


TRAIN_SIZE = 1_000
BATCH_SIZE = 200
INNER_OPTIMIZER = optax.sgd(0.05, momentum=0.9)


class Model(eqx.Module):
    """The network, and one weight (before the sigmoid) per training example."""

    net: eqx.nn.MLP
    example_weights: Float[Array, " examples"]


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]
    corrupted: np.ndarray


class Result(NamedTuple):
    accuracy: float
    auroc: float
    seconds: float
    accuracies: np.ndarray  # on the test set, at some steps
    val_losses: np.ndarray  # at the same
    inner_steps: np.ndarray
    example_weights: np.ndarray | None


def load_data(noise: float, val_size: int, seed: int) -> Data:
    """Shuffled digits in [0, 1]; a fraction `noise` of the training labels is wrong."""
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    corrupted = np.zeros(TRAIN_SIZE, bool)
    corrupted[random.permutation(TRAIN_SIZE)[: round(noise * TRAIN_SIZE)]] = True
    given = np.where(
        corrupted, (y[:TRAIN_SIZE] + random.integers(1, 10, TRAIN_SIZE)) % 10, y[:TRAIN_SIZE]
    )
    end = TRAIN_SIZE + val_size
    return Data(
        train=(jnp.asarray(x[:TRAIN_SIZE]), jnp.asarray(given)),
        val=(jnp.asarray(x[TRAIN_SIZE:end]), jnp.asarray(y[TRAIN_SIZE:end])),
        test=(jnp.asarray(x[end:]), jnp.asarray(y[end:])),
        corrupted=corrupted,
    )


def cross_entropy(model: Model, x: Array, y: Array) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model.net)(x), y)


@gradhpo.model_loss
def weighted_loss(model: Model, batch: tuple[Array, Array, Array]) -> Array:
    x, y, index = batch
    weights = jax.nn.sigmoid(model.example_weights[index])
    return jnp.mean(weights * cross_entropy(model, x, y))


@gradhpo.model_loss
def plain_loss(model: Model, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(model, *batch))


@eqx.filter_jit
def accuracy(model: Model, x: Array, y: Array) -> Array:
    return jnp.mean(jnp.argmax(jax.vmap(model.net)(x), axis=1) == y)


def new_model(seed: int) -> Model:
    net = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(seed))
    return Model(net, jnp.zeros(TRAIN_SIZE))


evaluate = eqx.filter_jit(plain_loss)


@eqx.filter_jit
def train_for(steps: int, params, opt_state, hyperparams, data: Callable, start: Array):
    """Plain training, as every optax user writes it."""
    arrays, static = eqx.partition(params, eqx.is_inexact_array)

    def body(carry, step):
        arrays, opt_state = carry
        loss = lambda arrays: plain_loss(eqx.combine(arrays, static), hyperparams, data(step))
        updates, opt_state = INNER_OPTIMIZER.update(jax.grad(loss)(arrays), opt_state, arrays)
        return (optax.apply_updates(arrays, updates), opt_state), None

    (arrays, opt_state), _ = jax.lax.scan(body, (arrays, opt_state), start + jnp.arange(steps))
    return eqx.combine(arrays, static), opt_state


def train_untuned(phases: list[tuple[tuple[Array, Array], int]], data: Data, seed: int) -> Result:
    """All examples have the same weight; each phase is some examples and a number of steps."""
    params, hyperparams = gradhpo.partition(new_model(seed), lambda m: m.example_weights)
    opt_state = INNER_OPTIMIZER.init(eqx.filter(params, eqx.is_inexact_array))
    piece = max(1, sum(steps for _, steps in phases) // 20)
    taken, accuracies, val_losses = [0], [], []
    started = time.perf_counter()
    for arrays, steps in phases:
        source = gradhpo.ArrayData(arrays, min(BATCH_SIZE, len(arrays[0])), jax.random.key(seed))
        for start in range(0, steps, piece):
            params, opt_state = train_for(
                piece, params, opt_state, hyperparams, source, jnp.asarray(start)
            )
            accuracies.append(float(accuracy(eqx.combine(params, hyperparams), *data.test)))
            val_losses.append(float(evaluate(params, hyperparams, data.val)))
            taken.append(taken[-1] + piece)
    return Result(
        accuracy=accuracies[-1],
        auroc=float("nan"),
        seconds=time.perf_counter() - started,
        accuracies=np.asarray(accuracies),
        val_losses=np.asarray(val_losses),
        inner_steps=np.asarray(taken[1:]),
        example_weights=None,
    )


def train_tuned(
    optimizer: gradhpo.BilevelOptimizer, data: Data, inner_steps: int, seed: int, name: str
) -> Result:
    """The example weights follow the hypergradient while the network trains."""
    params, hyperparams = gradhpo.partition(new_model(seed), lambda m: m.example_weights)
    source = gradhpo.ArrayData(
        (*data.train, jnp.arange(TRAIN_SIZE)), BATCH_SIZE, jax.random.key(seed)
    )
    # The example batch and the key are for HyperDistill's distilled data; the others ignore them.
    state = optimizer.init(params, hyperparams, batch=source(0), key=jax.random.key(seed))
    episode = EPISODES.get(name)
    steps = inner_steps // optimizer.num_inner_steps
    steps -= steps % (episode or 1)
    chunk = max(1, steps // 20)
    clock, accuracies, val_losses, taken = [time.perf_counter()], [], [], []

    def look(state, metrics):
        val_losses.append(float(metrics["val_loss"][-1]))
        accuracies.append(float(accuracy(state.model, *data.test)))
        taken.append(optimizer.num_inner_steps * int(state.step))
        clock.append(time.perf_counter())

    print(f"seed {seed}, {name}")
    state, _ = gradhpo.run(
        optimizer,
        state,
        gradhpo.LossFunctions(weighted_loss, plain_loss),
        source,
        data.val,
        num_steps=steps,
        steps_per_episode=episode,
        chunk_size=chunk,
        callbacks=[look],
    )
    weights = np.asarray(jax.nn.sigmoid(state.model.example_weights))
    return Result(
        accuracy=accuracies[-1],
        auroc=float(roc_auc_score(~data.corrupted, weights)) if data.corrupted.any() else np.nan,
        seconds=clock[-1] - clock[0],
        accuracies=np.asarray(accuracies),
        val_losses=np.asarray(val_losses),
        inner_steps=np.asarray(taken),
        example_weights=weights,
    )


def stopped_early(result: Result) -> Result:
    """The same training, stopped where its validation loss was lowest."""
    best = int(np.argmin(result.val_losses))
    return result._replace(accuracy=result.accuracies[best])


def at_its_best(result: Result) -> Result:
    """The same training, stopped where its *test* accuracy was highest: no one can know where."""
    return result._replace(accuracy=float(np.max(result.accuracies)))


OPTIMIZERS = {
    "tuned, first order": gradhpo.FOOptimizer(INNER_OPTIMIZER, optax.adam(0.02)),
    "tuned, one step": gradhpo.OneStepOptimizer(INNER_OPTIMIZER, optax.adam(0.02)),
    "tuned, T1-T2 (DARTS)": gradhpo.T1T2Optimizer(INNER_OPTIMIZER, optax.adam(0.02)),
    "tuned, greedy over 10 steps": gradhpo.GreedyOptimizer(
        INNER_OPTIMIZER, optax.adam(0.05), unroll_steps=10
    ),
    "tuned, HyperDistill": gradhpo.OnlineHypergradientOptimizer(
        INNER_OPTIMIZER, optax.adam(0.02), estimation_period=20
    ),
    "tuned, exact over 20 steps": gradhpo.UnrolledOptimizer(
        INNER_OPTIMIZER, optax.adam(0.05), unroll_steps=20
    ),
}
# HyperDistill looks back to the start of an episode; each continues from the previous parameters.
EPISODES = {"tuned, HyperDistill": 20}


def experiment(data: Data, inner_steps: int, seed: int) -> dict[str, Result | str]:
    """Every row of the table for one seed; if a row is not possible, the reason."""
    both = tuple(jnp.concatenate(pair) for pair in zip(data.train, data.val, strict=True))
    half = inner_steps // 2
    trained = lambda *phases: train_untuned(list(phases), data, seed)
    untuned = trained((data.train, inner_steps))
    together = trained((both, inner_steps))
    rows: dict[str, Result | str] = {
        "untuned, training set": untuned,
        "  stopped early": stopped_early(untuned),
        "untuned, validation set alone": trained((data.val, inner_steps)),
        "untuned, both together": together,
        "  stopped at best test accuracy": at_its_best(together),
        "training set, then validation set": trained((data.train, half), (data.val, half)),
    }
    for name, optimizer in OPTIMIZERS.items():
        try:
            rows[name] = train_tuned(optimizer, data, inner_steps, seed, name)
        except ValueError as error:
            if "sees none of the hyperparameters" not in str(error):
                raise
            rows[name] = "cannot see the example weights: they are not in the validation loss"
    return rows


def table(runs: list[dict[str, Result | str]]) -> str:
    """Means over seeds."""
    lines = [
        f"{'':33}{'test accuracy':>16}{'AUROC':>15}{'seconds':>9}",
    ]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        if isinstance(rows[0], str):
            lines.append(f"{name:33}{rows[0]:>16}")
            continue
        percent = 100 * np.asarray([row.accuracy for row in rows])
        auroc = np.asarray([row.auroc for row in rows])
        shown = "" if np.isnan(auroc).any() else f"{auroc.mean():.3f} ± {auroc.std():.3f}"
        lines.append(
            f"{name:33}{f'{percent.mean():.1f} ± {percent.std():.1f} %':>16}{shown:>15}"
            f"{np.mean([row.seconds for row in rows]):>9.1f}"
        )
    return "\n".join(lines)


# What the picture shows: a row of the table, what it is called there, and where.
SHOWN = {
    "tuned, exact over 20 steps": ("1,000 example weights tuned by gradhpo", (2_000, 95)),
    "training set, then validation set": ("fine-tuned on the clean digits", (2_000, 91.5)),
    "untuned, validation set alone": ("100 clean digits alone", (2_000, 86.5)),
    "untuned, training set": ("all digits, untuned", (1_150, 75)),
}


def picture(runs: list[dict[str, Result | str]], path: Path) -> None:
    """Test accuracy while training, as means over seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.9), layout="constrained")
    for (name, (label, place)), color in zip(SHOWN.items(), ("C0", "C1", "C2", "C7"), strict=True):
        rows = [row for run in runs if isinstance(row := run[name], Result)]
        percent = 100 * np.mean([row.accuracies for row in rows], axis=0)
        width = 2.8 if name.startswith("tuned") else 1.6
        axes.plot(rows[0].inner_steps, percent, color=color, lw=width, label=label)
        axes.text(*place, f"{label}: {percent[-1]:.1f} %", color=color, ha="right", fontsize=12)
    axes.set_ylim(None, 98)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("test accuracy, %", fontsize=12)
    axes.tick_params(labelsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def picture_of_weights(rows: dict[str, Result | str], data: Data, path: Path) -> None:
    """Weights of clean and corrupted examples, and the least trusted digits."""
    import matplotlib.pyplot as plt

    results = [row for row in rows.values() if isinstance(row, Result)]
    weights = next(
        row.example_weights for row in reversed(results) if row.example_weights is not None
    )
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    bins = np.linspace(0, 1, 31)
    axes.hist(weights[~data.corrupted], bins, alpha=0.7, label="right label", color="tab:blue")
    axes.hist(weights[data.corrupted], bins, alpha=0.7, label="wrong label", color="tab:red")
    axes.set(xlabel="learned weight of the example", ylabel="training examples")
    axes.legend(frameon=False, loc="upper center")

    grid = right.subplots(4, 6)
    for axes, example in zip(grid.flat, np.argsort(weights), strict=False):
        axes.imshow(np.asarray(data.train[0][example]).reshape(8, 8), cmap="gray_r")
        wrong = data.corrupted[example]
        label = f"“{int(data.train[1][example])}”"
        axes.set_title(label, fontsize=9, color="tab:red" if wrong else "tab:blue", pad=2)
        axes.axis("off")
    right.suptitle("Trusted least, with their given labels", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Result | str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noise", type=float, default=0.3, help="wrong labels (default 0.3)")
    parser.add_argument("--validation", type=int, default=100, help="clean digits (default 100)")
    parser.add_argument(
        "--inner-steps", type=int, default=2_000, help="multiple of 40 (default 2000)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--quick", action="store_true", help="1 seed, 200 inner steps")
    parser.add_argument("--output", type=Path, default=Path("out/data_hypercleaning.png"))
    options = parser.parse_args(arguments)
    if not 0 <= options.noise < 1:
        parser.error(f"--noise must be at least 0 and below 1, got {options.noise}")
    if not 10 <= options.validation <= 700:
        parser.error(f"--validation must be 10 to 700, got {options.validation}")
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    # 20 looks at a training, also where it has two phases; optimizers with 20 inner steps.
    if options.inner_steps < 40 or options.inner_steps % 40:
        parser.error(f"--inner-steps must be a multiple of 40, got {options.inner_steps}")
    if options.quick:
        options.seeds, options.inner_steps = 1, 200

    print(
        f"{TRAIN_SIZE} training digits, {options.noise:.0%} of the labels wrong; "
        f"{options.validation} clean validation digits; {options.inner_steps} inner steps"
    )
    started, runs = time.perf_counter(), []
    for seed in range(options.seeds):
        data = load_data(options.noise, options.validation, seed)
        runs.append(experiment(data, options.inner_steps, seed))
    print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n{table(runs)}")
    picture(runs, options.output)
    weights = options.output.with_stem(f"{options.output.stem}_weights")
    picture_of_weights(runs[-1], data, weights)
    seconds = time.perf_counter() - started
    print(f"\npictures in {options.output} and {weights}; {seconds:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
