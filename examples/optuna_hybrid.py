"""Optuna for what has no derivative, hypergradients for what has one.

A network for scikit-learn's handwritten digits, 200 of them to train on and 200 to validate, has
four discrete hyperparameters (width, depth, activation, inner optimizer) and eight continuous ones
(learning rate, momentum, three weight decays, label smoothing, noise on inputs and on hidden
units). A training has 100 steps, and every method makes 30 of them:

- *TPE alone*: Optuna's sampler chooses all twelve, which stay fixed while the network trains.
- *descent alone*: discrete ones and the start are random. Every ten steps of a training, the
continuous ones follow the exact hypergradient through those ten; each training starts with the
values at the end of the previous one.
- *descents from random starts*: every training is such a descent from a new random choice.
- *hybrid*: TPE chooses the discrete ones and the start of the continuous ones, which then descend.
  The point where they end is added to the study as another trial.
- *hybrid without end points*: the sampler sees only where descents started.

A method's result is its training with the lowest validation loss. A step with hypergradients costs
three to four training gradients instead of one, so another row gives TPE four times the steps.

    python examples/optuna_hybrid.py            # 20 seeds, half an hour on 2 slow cores
    python examples/optuna_hybrid.py --help
"""

import argparse
import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import optuna
from jaxtyping import Array, Float, Int, PRNGKeyArray
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_digits

import gradhpo
from gradhpo.integrations.optuna import Start, TrialCallback, add_end_point, suggest


TRAIN_SIZE, VAL_SIZE, BATCH_SIZE = 200, 200, 50
WINDOW = 10  # inner steps between two hypergradients
WIDTHS, DEPTHS = [16, 64], [2, 3]
CHOICES = [WIDTHS, DEPTHS, ["relu", "tanh"], ["sgd", "adam"]]

_DECAY = Start(FloatDistribution(1e-6, 0.1, log=True), "log")
_NOISE = Start(FloatDistribution(0.01, 1.0, log=True), "log")
SPACE = {
    "rate": Start(FloatDistribution(1e-3, 1.0, log=True), "log"),  # Adam takes a fiftieth
    "momentum": Start(FloatDistribution(0.5, 0.99), "logit"),
    "decays": [_DECAY, _DECAY, _DECAY],  # first matrix, hidden ones, last one
    "smoothing": Start(FloatDistribution(1e-3, 0.3, log=True), "logit"),
    "input_noise": _NOISE,
    "hidden_noise": _NOISE,
}


class Choice(NamedTuple):
    """The hyperparameters without a derivative: each choice compiles another program."""

    width: int
    depth: int  # hidden layers
    activation: str
    optimizer: str


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]


class Row(NamedTuple):
    """One method with one seed."""

    val_loss: float
    test_loss: float
    curve: list[float]  # the lowest validation loss after each training


def load_data(seed: int) -> Data:
    """Shuffled digits in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    ends = [0, TRAIN_SIZE, TRAIN_SIZE + VAL_SIZE, len(x)]
    return Data(*((x[start:end], y[start:end]) for start, end in itertools.pairwise(ends)))


class Batches(eqx.Module):
    """Batch t of a training, with its noise: the same in every training of a seed."""

    data: tuple[Array, Array]
    order: Int[Array, "steps batch"]
    noise: Float[Array, "steps batch units"]

    @classmethod
    def of(cls, data: tuple[Array, Array], steps: int, seed: int) -> "Batches":
        random = np.random.default_rng(seed)
        epochs = [
            random.permutation(TRAIN_SIZE) for _ in range(-(-steps * BATCH_SIZE // TRAIN_SIZE))
        ]
        order = np.concatenate(epochs)[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
        noise = random.normal(size=(steps, BATCH_SIZE, 64 + max(DEPTHS) * max(WIDTHS)))
        return cls(data, jnp.asarray(order), jnp.asarray(noise, jnp.float32))

    def __call__(self, t: Array) -> tuple[tuple[Array, Array], Array]:
        return jax.tree.map(lambda x: x[self.order[t]], self.data), self.noise[t]


class Net(eqx.Module):
    layers: list[eqx.nn.Linear]
    activation: Callable = eqx.field(static=True)

    def __init__(self, choice: Choice, key: PRNGKeyArray):
        sizes = [64, *[choice.width] * choice.depth, 10]
        keys = jax.random.split(key, choice.depth + 1)
        pairs = itertools.pairwise(sizes)
        self.layers = [eqx.nn.Linear(*pair, key=k) for pair, k in zip(pairs, keys, strict=True)]
        self.activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[choice.activation]

    def __call__(self, x: Array, noise: list[Array] | None = None) -> Array:
        """Logits of a batch; noise is added to the inputs, and scales hidden units."""
        if noise is not None:
            x = x + noise[0]
        for number, layer in enumerate(self.layers[:-1], start=1):
            x = self.activation(jax.vmap(layer)(x))
            if noise is not None:
                x = x * (1 + noise[number][:, : x.shape[1]])
        return jax.vmap(self.layers[-1])(x)


def train_loss(net: Net, h: dict[str, Any], batch: tuple[tuple[Array, Array], Array]) -> Array:
    (x, y), normal = batch
    of_input, *of_hidden = jnp.split(normal, normal.shape[1] // 64, axis=1)
    noise = [jnp.exp(h["input_noise"]) * of_input]
    noise += [jnp.exp(h["hidden_noise"]) * one for one in of_hidden]
    targets = optax.smooth_labels(jax.nn.one_hot(y, 10), jax.nn.sigmoid(h["smoothing"]))
    squares = [jnp.sum(layer.weight**2) for layer in net.layers]
    first, hidden, last = (jnp.exp(decay) for decay in h["decays"])
    decay = first * squares[0] + hidden * sum(squares[1:-1]) + last * squares[-1]
    return jnp.mean(optax.softmax_cross_entropy(net(x, noise), targets)) + decay


def val_loss(net: Net, h: dict[str, Any], batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(net(x), y))


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
measure = eqx.filter_jit(val_loss)


def sgd(h: dict[str, Any]) -> optax.GradientTransformation:
    return optax.sgd(jnp.exp(h["rate"]), jax.nn.sigmoid(h["momentum"]))


def adam(h: dict[str, Any]) -> optax.GradientTransformation:
    rate = 0.02 * jnp.exp(h["rate"])
    return optax.adam(rate, jax.nn.sigmoid(h["momentum"]), eps_root=1e-12)


INNER = {"sgd": sgd, "adam": adam}


@functools.cache  # one object for all training runs: a new one would be compiled again
def descent(name: str, rate: float) -> gradhpo.BilevelOptimizer:
    outer = optax.adam(rate, b1=0.5, b2=0.9)
    return gradhpo.UnrolledOptimizer(INNER[name], outer, unroll_steps=WINDOW)


@eqx.filter_jit
def train_as_it_is(name: str, net: Net, h: Any, batches: Batches, val: Any) -> tuple[Array, Net]:
    """The validation loss after training with fixed hyperparameters, and the network."""
    optimizer = gradhpo.FixedOptimizer(INNER[name], inner_steps=len(batches.order))
    stack = gradhpo.BatchStack(jax.lax.map(batches, jnp.arange(len(batches.order))))
    state = optimizer.step(optimizer.init(net, h), stack, val, LOSSES)
    return state.get_metric("val_loss"), state.params


class Study(NamedTuple):
    """One method's training runs with one seed."""

    data: Data
    batches: Batches
    key: PRNGKeyArray
    outer_rate: float
    choices: tuple[list, ...]
    trained: list[tuple[float, float]]  # validation and test loss of each

    def choose(self, trial: optuna.trial.BaseTrial) -> Choice:
        pairs = zip(Choice._fields, self.choices, strict=True)
        return Choice(*(trial.suggest_categorical(name, values) for name, values in pairs))

    def keep(self, loss: Any, net: Net, h: Any) -> float:
        self.trained.append((float(loss), float(measure(net, h, self.data.test))))
        return float(loss)

    def fixed(self, trial: optuna.Trial) -> float:
        """An objective: all twelve stay fixed."""
        choice, h = self.choose(trial), suggest(trial, SPACE)
        net = Net(choice, self.key)
        return self.keep(*train_as_it_is(choice.optimizer, net, h, self.batches, self.data.val), h)

    def descend(self, choice: Choice, h: Any, *callbacks: Callable) -> tuple[float, Any]:
        """The validation loss and the hyperparameters at the end of a training."""
        optimizer, steps = descent(choice.optimizer, self.outer_rate), len(self.batches.order)
        start = optimizer.init(Net(choice, self.key), h)
        try:
            state, history = gradhpo.run(
                optimizer, start, LOSSES, self.batches, self.data.val,
                num_steps=steps // WINDOW, callbacks=callbacks, progress=False,
            )  # fmt: skip
        except optuna.TrialPruned:  # every step was refused: it diverged at once
            self.trained.append((np.inf, np.inf))
            raise
        return self.keep(history["val_loss"][-1], state.params, h), state.hyperparams

    def descending(self, trial: optuna.Trial, end_points: bool) -> float:
        """An objective: the eight continuous ones descend from the trial's values."""
        loss, end = self.descend(self.choose(trial), suggest(trial, SPACE), TrialCallback(trial))
        if end_points:
            add_end_point(trial.study, trial, SPACE, end, loss)
        return loss


def search(sampler: optuna.samplers.BaseSampler, objective: Callable, count: int) -> None:
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=count)


def tpe(objective: Callable, count: int, seed: int) -> None:
    search(optuna.samplers.TPESampler(seed=seed), objective, count)


def random_starts(study: Study, count: int, seed: int) -> None:
    sampler = optuna.samplers.RandomSampler(seed=seed)
    search(sampler, lambda trial: study.descending(trial, end_points=False), count)


def chain(study: Study, count: int, seed: int) -> None:
    """Descents, the first from a random start, each other from where the last one ended."""
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    choice, h = study.choose(trial), suggest(trial, SPACE)
    for _ in range(count):
        _, h = study.descend(choice, h)


METHODS: dict[str, Callable[[Study, int, int], None]] = {
    "TPE alone": lambda s, count, seed: tpe(s.fixed, count, seed),
    "TPE alone, 4 × the steps": lambda s, count, seed: tpe(s.fixed, 4 * count, seed),
    "descent alone": chain,
    "descents from random starts": random_starts,
    "hybrid without end points": lambda s, count, seed: tpe(
        lambda trial: s.descending(trial, end_points=False), count, seed
    ),
    "hybrid": lambda s, count, seed: tpe(
        lambda trial: s.descending(trial, end_points=True), count, seed
    ),
}


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, Row]:
    data, rows = load_data(seed), {}
    batches = Batches.of(data.train, options.steps, seed)
    choices = tuple([x[:1] for x in CHOICES] if options.quick else CHOICES)
    for name, method in METHODS.items():
        study = Study(data, batches, jax.random.key(seed), options.outer_rate, choices, [])
        method(study, options.runs, seed)
        losses = np.nan_to_num(np.asarray(study.trained), nan=np.inf)
        best = losses[np.argmin(losses[:, 0])].tolist()
        rows[name] = Row(*best, np.minimum.accumulate(losses[:, 0]).tolist())
    return rows


def median(values: Any) -> str:
    """The median and its 95 % bootstrap interval over the seeds."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return f"{np.median(values):.3f} | {low:.3f} to {high:.3f}"


def table(runs: list[dict[str, Row]], field: str, shown: str) -> str:
    lines = [
        f"| | {shown} | 95 % interval | hybrid minus this | 95 % interval | hybrid is lower |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    losses = {name: np.asarray([getattr(run[name], field) for run in runs]) for name in runs[0]}
    for name, values in losses.items():
        difference = losses["hybrid"] - values
        compared = [median(difference), f"{np.sum(difference < 0)} of {len(runs)}"]
        cells = [name, median(values), *(["", "", ""] if name == "hybrid" else compared)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: list[dict[str, Row]], path: Path) -> None:
    """The progress of each method by training, and every seed's result."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, name in enumerate(runs[0]):
        curve = np.median([run[name].curve for run in runs], axis=0)
        beneath = {"zorder": 1, "lw": 4, "alpha": 0.4} if "4 ×" in name else {}  # one curve is two
        left.plot(np.arange(1, len(curve) + 1), curve, label=name, color=f"C{number}", **beneath)
        values = [run[name].val_loss for run in runs]
        jitter = number + np.linspace(-0.2, 0.2, len(values))
        right.plot(jitter, values, ".", color=f"C{number}", alpha=0.6)
        right.hlines(np.median(values), number - 0.3, number + 0.3, color=f"C{number}")
    left.set(
        xlabel="training runs", ylabel="lowest validation loss, median", xscale="log", yscale="log"
    )
    left.legend(fontsize=8)
    right.set(ylabel="lowest validation loss", yscale="log")
    right.set_xticks(range(len(runs[0])), [x.replace(" ", "\n", 2) for x in runs[0]], fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Row]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--runs", type=int, default=30, help="training runs per method (default 30)"
    )
    parser.add_argument("--steps", type=int, default=100, help="per training (default 100)")
    parser.add_argument("--outer-rate", type=float, default=0.3, help="of descents (default 0.3)")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 3 short training runs each")
    parser.add_argument("--kept", type=Path, help="file of finished seeds to resume from")
    parser.add_argument("--output", type=Path, default=Path("out/optuna_hybrid.png"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.runs, options.steps = 2, 3, 2 * WINDOW
    if options.steps < WINDOW or options.steps % WINDOW:
        parser.error(f"--steps must be a multiple of {WINDOW}, got {options.steps}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The decays fall below Optuna's range, where they have no effect.
    warnings.filterwarnings("ignore", "a descent ended outside")
    started, runs = time.perf_counter(), []
    kept = options.kept.read_text().splitlines() if options.kept and options.kept.exists() else []
    for number in range(options.seeds):
        if number < len(kept):
            found = json.loads(kept[number])
            runs.append({name: Row(*row) for name, row in found.items()})
            continue
        runs.append(run_seed(options.first_seed + number, options))
        if options.kept:
            options.kept.parent.mkdir(parents=True, exist_ok=True)
            with open(options.kept, "a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    print(
        f"{options.seeds} seeds, {options.runs} training runs of {options.steps} steps each; "
        f"medians over the seeds, and of differences seed by seed\n\n"
        f"{table(runs, 'val_loss', 'validation loss')}\n\n{table(runs, 'test_loss', 'test loss')}"
    )
    picture(runs, options.output)
    read = f", {len(kept)} seeds from {options.kept}" if kept else ""
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all{read}")
    return runs


if __name__ == "__main__":
    main()
