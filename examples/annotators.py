"""Learn whom to trust: 25 annotators label digits, and ten of them enter the wrong class.

The data are scikit-learn's handwritten digits. Each annotator labels 40 of the 1,000 training
digits; ten annotators enter every digit as the next one (a 3 as a 4, a 9 as a 0). An expert has
checked 30 digits: few to train on, enough to validate. Annotator j has the weight
sigmoid(trust_j) in the training loss, and the trust follows the hypergradient of the validation
loss while the network trains.

    python examples/annotators.py            # 3 seeds, a minute or two on 2 cores
    python examples/annotators.py --help
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
from sklearn.datasets import load_digits

import gradhpo


ANNOTATORS, WRONG = 25, 10  # in all, and how many of them enter the wrong class
TRAIN_SIZE, CHECKED = 1_000, 30
UNROLL = 20
INNER, OUTER = optax.sgd(0.05, momentum=0.9), optax.adam(0.05)
# Optimizers that step at every inner step take smaller outer steps.
ONLINE = optax.adam(0.05 / UNROLL)


class Model(eqx.Module):
    """The network, and one weight (before the sigmoid) for each annotator."""

    net: eqx.nn.MLP
    trust: Float[Array, " annotators"]


class Data(NamedTuple):
    train: tuple[Array, Array, Array]  # digits, labels, annotators
    checked: tuple[Array, Array]
    test: tuple[Array, Array]


class Result(NamedTuple):
    steps: np.ndarray  # inner steps at which the others were measured
    accuracies: np.ndarray  # on the test set
    val_losses: np.ndarray
    seconds: float
    trust: np.ndarray


def load_data(seed: int) -> Data:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    who = np.arange(TRAIN_SIZE, dtype=np.int32) % ANNOTATORS
    given = np.where(who < WRONG, (y[:TRAIN_SIZE] + 1) % 10, y[:TRAIN_SIZE])
    end = TRAIN_SIZE + CHECKED
    parts = (x[:TRAIN_SIZE], given, who), (x[TRAIN_SIZE:end], y[TRAIN_SIZE:end]), (x[end:], y[end:])
    return Data(*jax.tree.map(jnp.asarray, parts))


def cross_entropy(model: Model, x: Array, y: Array) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model.net)(x), y)


@gradhpo.model_loss
def weighted_loss(model: Model, batch: tuple[Array, Array, Array]) -> Array:
    x, y, annotator = batch
    return jnp.mean(jax.nn.sigmoid(model.trust[annotator]) * cross_entropy(model, x, y))


@gradhpo.model_loss
def plain_loss(model: Model, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(model, *batch))


LOSSES = gradhpo.LossFunctions(weighted_loss, plain_loss)
UNTUNED = gradhpo.FixedOptimizer(INNER, inner_steps=UNROLL)
TUNED = {
    "tuned, one step": gradhpo.OneStepOptimizer(INNER, ONLINE),
    "tuned, T1-T2 (DARTS)": gradhpo.T1T2Optimizer(INNER, ONLINE),
    "tuned, HyperDistill": gradhpo.OnlineHypergradientOptimizer(INNER, ONLINE),
    "tuned, greedy over 20 steps": gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=UNROLL),
    "tuned, exact over 20 steps": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=UNROLL),
}


@eqx.filter_jit
def accuracy(model: Model, x: Array, y: Array) -> Array:
    return jnp.mean(jnp.argmax(jax.vmap(model.net)(x), axis=1) == y)


def train(
    optimizer: gradhpo.BilevelOptimizer,
    examples: tuple[Array, Array, Array],
    data: Data,
    inner_steps: int,
    seed: int,
    start: Model | gradhpo.BilevelState | None = None,
) -> tuple[Result, gradhpo.BilevelState]:
    """Trains on `examples`, validates on the checked digits, and looks at the test 20 times.

    From a state, training continues where it was.
    """
    source = gradhpo.ArrayData(examples, min(200, len(examples[0])), jax.random.key(seed))
    if isinstance(start, gradhpo.BilevelState):
        state = start
    else:
        net = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(seed))
        model = Model(net, jnp.zeros(ANNOTATORS)) if start is None else start
        params, hyperparams = gradhpo.partition(model, lambda m: m.trust)
        # The batch and the key are for HyperDistill's distilled data; the others ignore them.
        state = optimizer.init(params, hyperparams, batch=source(0), key=jax.random.key(seed))
    taken, accuracies, val_losses = [], [], []

    def look(state, metrics):
        taken.append(optimizer.num_inner_steps * int(state.step))
        accuracies.append(float(accuracy(state.model, *data.test)))
        val_losses.append(float(plain_loss(state.params, state.hyperparams, data.checked)))

    started = time.perf_counter()
    steps = inner_steps // optimizer.num_inner_steps
    online = isinstance(optimizer, gradhpo.OnlineHypergradientOptimizer)
    state, _ = gradhpo.run(
        optimizer,
        state,
        LOSSES,
        source,
        data.checked,
        num_steps=steps,
        # HyperDistill looks back to the start of an episode, which continues from the last one.
        steps_per_episode=UNROLL if online else None,
        chunk_size=steps // 20,
        callbacks=[look],
        progress=False,
    )
    seconds = time.perf_counter() - started
    trust = np.asarray(jax.nn.sigmoid(state.model.trust))
    figures = np.asarray(taken), np.asarray(accuracies), np.asarray(val_losses)
    return Result(*figures, seconds, trust), state


def joined(first: Result, second: Result, first_step: int = 0) -> Result:
    """Two training runs in a row; the second counts its steps from `first_step`."""
    both = lambda name: np.concatenate([getattr(first, name), getattr(second, name)])
    steps = np.concatenate([first.steps, first_step + second.steps])
    seconds = first.seconds + second.seconds
    return Result(steps, both("accuracies"), both("val_losses"), seconds, second.trust)


ALL, STOPPED, BEST = "untuned, all labels", "  stopped early", "  stopped at best test accuracy"
TOGETHER = "untuned, all labels and checked digits"
ALONE, THEN = "untuned, checked digits alone", "untuned, all labels, then checked digits"
RULE = "a rule: drop annotators who disagree"
AGREEMENT = 0.4  # with a network trained on the checked digits, for the rule
RIGHT = "reliable annotators alone (not known)"
EXACT = list(TUNED)[-1]


def agree(model: Model, examples: tuple[Array, Array, Array]) -> np.ndarray:
    """Which labels come from annotators who agree with the model on enough of their digits."""
    x, y, annotator = map(np.asarray, examples)
    same = np.asarray(jnp.argmax(jax.vmap(model.net)(x), axis=1)) == y
    shares = np.asarray([same[annotator == j].mean() for j in range(ANNOTATORS)])
    return shares[annotator] >= AGREEMENT


def experiment(data: Data, inner_steps: int, seed: int) -> dict[str, tuple[float, Result]]:
    """Each row of the table: its test accuracy, and the training behind it."""
    checked = *data.checked, jnp.full(CHECKED, WRONG, jnp.int32)
    reliable = jax.tree.map(lambda x: x[data.train[2] >= WRONG], data.train)
    half, state = train(UNTUNED, data.train, data, inner_steps // 2, seed)
    rest, _ = train(UNTUNED, data.train, data, inner_steps // 2, seed, state)
    both = joined(half, rest)
    # The two parts look at the test set 40 times, the other training runs 20 times.
    everyone = both._replace(**{name: getattr(both, name)[1::2] for name in both._fields[:3]})
    fine_tuned, _ = train(UNTUNED, checked, data, inner_steps // 2, seed, state.model)
    alone, expert = train(UNTUNED, checked, data, inner_steps, seed)
    together = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), data.train, checked)
    trusted = agree(expert.model, data.train)
    agreed = jax.tree.map(lambda x: x[trusted], data.train)
    ends = {
        TOGETHER: train(UNTUNED, together, data, inner_steps, seed)[0],
        ALONE: alone,
        RULE: train(UNTUNED, agreed, data, inner_steps, seed)[0],
        THEN: joined(half, fine_tuned, inner_steps // 2),
    }
    for name, optimizer in TUNED.items():
        ends[name], _ = train(optimizer, data.train, data, inner_steps, seed)
    ends[RIGHT], _ = train(UNTUNED, reliable, data, inner_steps, seed)
    rows = {ALL: (everyone.accuracies[-1], everyone)}
    rows[STOPPED] = everyone.accuracies[np.argmin(everyone.val_losses)], everyone
    rows[BEST] = everyone.accuracies.max(), everyone
    return rows | {name: (result.accuracies[-1], result) for name, result in ends.items()}


def table(runs: list[dict[str, tuple[float, Result]]]) -> str:
    """Means and standard deviations over seeds."""
    lines = [f"{'':42}{'test accuracy':>16}{'seconds':>10}"]
    for name in runs[0]:
        percent = 100 * np.asarray([run[name][0] for run in runs])
        seconds = np.mean([run[name][1].seconds for run in runs])
        shown = f"{percent.mean():.1f} ± {percent.std():.1f} %"
        lines.append(f"{name:42}{shown:>16}{seconds:>10.1f}")
    return "\n".join(lines)


# What the picture shows: a row of the table, what it is called there, and how far above its end.
SHOWN = {
    EXACT: ("tuned by gradhpo", 1.0),
    THEN: ("fine-tuned on checked digits", 1.0),
    ALONE: ("checked digits alone", 1.0),
    ALL: ("all labels, untuned", -4.0),
}


def picture(runs: list[dict[str, tuple[float, Result]]], path: Path) -> None:
    """Test accuracy while training, as means over seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.9), layout="constrained")
    for (name, (label, above)), color in zip(SHOWN.items(), ("C0", "C2", "C1", "C7"), strict=True):
        results = [run[name][1] for run in runs]
        percent = 100 * np.mean([result.accuracies for result in results], axis=0)
        steps, width = results[0].steps, 2.8 if name == EXACT else 1.6
        axes.plot(steps, percent, color=color, lw=width)
        place = steps[-1], percent[-1] + above
        axes.text(*place, f"{label}: {percent[-1]:.1f} %", color=color, ha="right", fontsize=11)
    axes.set_ylim(50, 100)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("test accuracy, %", fontsize=12)
    axes.tick_params(labelsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, tuple[float, Result]]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inner-steps", type=int, default=2_400, help="budget (default 2400)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--quick", action="store_true", help="1 seed, 800 inner steps")
    parser.add_argument("--output", type=Path, default=Path("out/annotators.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.inner_steps < 800 or options.inner_steps % 800:
        parser.error("--seeds must be at least 1, and --inner-steps a multiple of 800")
    if options.quick:
        options.seeds, options.inner_steps = 1, 800

    print(
        f"{TRAIN_SIZE:,} digits, labelled by {ANNOTATORS} annotators, of whom {WRONG} enter the "
        f"wrong class; {CHECKED} checked digits; {options.inner_steps} inner steps"
    )
    started = time.perf_counter()
    seeds = range(options.seeds)
    runs = [experiment(load_data(seed), options.inner_steps, seed) for seed in seeds]
    print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n{table(runs)}")
    trust = np.mean([run[EXACT][1].trust for run in runs], axis=0)
    print(f"\nmean weight of an annotator in the last row but one: {trust[WRONG:].mean():.2f} if")
    print(f"reliable, {trust[:WRONG].mean():.2f} if not")
    picture(runs, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
