"""A schedule of learning rate and momentum over 2,000 steps, learned by forward mode.

A small network learns scikit-learn's handwritten digits, with wrong labels in the training set.
Learning rate and momentum each have one number per window of steps, and these numbers follow the
hypergradient of the validation loss after the last step. Forward mode does not store the path, so
its memory does not grow with the number of steps.

The settings follow Micaelli and Storkey (NeurIPS 2021, arXiv:2007.07869): everything starts
at 0, every outer step trains from the same start, and `gradhpo.sign_descent` moves each number by
0.1 against the sign of its hypergradient, and by half of the previous step whenever that sign
changes.

The learned schedule is compared with the best constant learning rate and the best cosine decay of a
grid, each with the best of three momenta, and with the best of 100 random schedules with the same
windows, which cost about as much. Every row is its best run on the validation set, and all runs
share the start and the batches.

Forward mode reaches lower losses than both grids, at about three times their cost; the accuracies
are too close to distinguish. It does not beat random schedules: 100 training runs are enough to
find ten good numbers (over seeds 0 to 5 random schedules reach a validation loss of 0.715 and a
test loss of 0.738, forward mode 0.722 and 0.734).

    python examples/learned_schedule.py            # 3 seeds, about a minute on 2 cores
    python examples/learned_schedule.py --help
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
from sklearn.datasets import load_digits

import gradhpo


TRAIN_SIZE, VAL_SIZE = 1_000, 300
BATCH_SIZE, WIDTH = 32, 16
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the grids
MOMENTA = (0.0, 0.5, 0.9)
LARGEST_MOMENTUM = 0.99
PER_OUTER_STEP = 10  # plain training runs in about the time of one with ten derivatives


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]


class Result(NamedTuple):
    val_loss: float
    test_loss: float
    accuracy: float
    runs: int
    seconds: float
    seconds_each: float  # of one of these training runs
    rates: np.ndarray  # [steps]
    momenta: np.ndarray
    val_losses: np.ndarray  # of every run, in the order they were made


def load_data(noise: float, seed: int) -> Data:
    """Shuffled digits in [0, 1]; a fraction `noise` of the training labels is wrong."""
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    wrong = random.random(TRAIN_SIZE) < noise
    other = (y[:TRAIN_SIZE] + random.integers(1, 10, TRAIN_SIZE)) % 10
    given = np.concatenate([np.where(wrong, other, y[:TRAIN_SIZE]), y[TRAIN_SIZE:]])
    cuts = (TRAIN_SIZE, TRAIN_SIZE + VAL_SIZE)
    return Data(
        *(
            (jnp.asarray(inputs), jnp.asarray(labels))
            for inputs, labels in zip(np.split(x, cuts), np.split(given, cuts), strict=True)
        )
    )


def scheduled_sgd(schedule: PyTree, window: int) -> optax.GradientTransformation:
    """Gradient descent whose rate and momentum are constant over each `window` of steps."""
    return optax.inject_hyperparams(optax.sgd)(
        learning_rate=lambda count: schedule["rates"][count // window],
        momentum=lambda count: schedule["momenta"][count // window],
    )


# A loss is a function of (parameters, hyperparameters, batch). A schedule acts only in the inner
# optimizer, so the loss does not use it.
def cross_entropy(net: eqx.nn.MLP, schedule: PyTree, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y))


@eqx.filter_jit
def train(net: eqx.nn.MLP, schedule: PyTree, batches: gradhpo.ArrayData) -> eqx.nn.MLP:
    """Plain training with a rate and a momentum for every step."""
    optimizer = scheduled_sgd(schedule, window=1)
    w, static = eqx.partition(net, eqx.is_inexact_array)

    def body(carry, step):
        w, state = carry
        loss = lambda w: cross_entropy(eqx.combine(w, static), schedule, batches(step))
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(body, (w, optimizer.init(w)), jnp.arange(len(schedule["rates"])))
    return eqx.combine(w, static)


@eqx.filter_jit
def measure(net: eqx.nn.MLP, batch: tuple[Array, Array]) -> tuple[Array, Array]:
    """Cross entropy and accuracy."""
    right = jnp.argmax(jax.vmap(net)(batch[0]), axis=1) == batch[1]
    return cross_entropy(net, None, batch), jnp.mean(right)


def finished(net: eqx.nn.MLP, schedule: PyTree, batches: gradhpo.ArrayData, data: Data) -> Result:
    """One plain training with this schedule, from `net`."""
    started = time.perf_counter()
    trained = train(net, schedule, batches)
    val_loss = float(measure(trained, data.val)[0])
    seconds = time.perf_counter() - started
    test_loss, accuracy = measure(trained, data.test)
    return Result(
        val_loss=val_loss,
        test_loss=float(test_loss),
        accuracy=float(accuracy),
        runs=1,
        seconds=seconds,
        seconds_each=seconds,
        rates=np.asarray(schedule["rates"]),
        momenta=np.asarray(schedule["momenta"]),
        val_losses=np.array([val_loss]),
    )


def grid(shape: np.ndarray) -> list[PyTree]:
    """All multiples of a decay, with all momenta."""
    return [
        {"rates": jnp.asarray(peak * shape, jnp.float32), "momenta": jnp.full(len(shape), momentum)}
        for momentum in MOMENTA
        for peak in RATES
    ]


def at_random(count: int, steps: int, windows: int, seed: int) -> list[PyTree]:
    """Random schedules with the same windows, within the range of the grids."""
    random = np.random.default_rng(seed)
    of_steps = lambda x: jnp.asarray(np.repeat(x, steps // windows), jnp.float32)
    rates = np.exp(random.uniform(np.log(RATES[0]), np.log(RATES[-1]), (count, windows)))
    momenta = random.uniform(MOMENTA[0], MOMENTA[-1], (count, windows))
    return [
        {"rates": of_steps(r), "momenta": of_steps(m)} for r, m in zip(rates, momenta, strict=True)
    ]


def best_of(
    schedules: list[PyTree], net: eqx.nn.MLP, batches: gradhpo.ArrayData, data: Data
) -> Result:
    """The training with the best validation loss."""
    tried = [finished(net, schedule, batches, data) for schedule in schedules]
    # A rate that makes training diverge has no validation loss to compare.
    best = min(tried, key=lambda row: np.nan_to_num(row.val_loss, nan=np.inf))
    return best._replace(
        runs=len(tried),
        seconds=sum(row.seconds for row in tried),
        seconds_each=float(np.median([row.seconds for row in tried])),
        val_losses=np.array([row.val_loss for row in tried]),
    )


def within_bounds() -> optax.GradientTransformation:
    """Shortens an outer update so that rates stay at least 0 and momenta in [0, 1).

    The hyperparameters themselves are projected instead of clipped on use: beyond its bound a
    clipped number would have a hypergradient of 0 and never come back.
    """

    def update(updates, schedule):
        most = {"rates": jnp.inf, "momenta": LARGEST_MOMENTUM}
        project = lambda name: jnp.clip(schedule[name] + updates[name], 0.0, most[name])
        return {name: project(name) - schedule[name] for name in updates}

    return optax.stateless(update)


def forward_mode(steps: int, windows: int) -> gradhpo.ForwardModeOptimizer:
    window = steps // windows
    return gradhpo.ForwardModeOptimizer(
        lambda schedule: scheduled_sgd(schedule, window),
        optax.chain(
            # The mean over the steps of a window instead of their sum, as in the paper. Signs do
            # not depend on this; another outer optimizer would.
            optax.scale(1 / window),
            gradhpo.sign_descent({"rates": 0.1, "momenta": 0.1}, decay=0.5, tolerance=0.05),
            within_bounds(),
        ),
        unroll_steps=steps,
    )


class Repeated(eqx.Module):
    """The same batches for every run, as in the other rows of the table."""

    batches: gradhpo.ArrayData
    period: int = eqx.field(static=True)

    def __call__(self, index: Array) -> tuple[Array, Array]:
        return self.batches(index % self.period)


LOSSES = gradhpo.LossFunctions(cross_entropy, cross_entropy)


def learned(
    optimizer: gradhpo.ForwardModeOptimizer,
    net: eqx.nn.MLP,
    batches: gradhpo.ArrayData,
    data: Data,
    windows: int,
    outer_steps: int,
) -> Result:
    """The training with the best validation loss found by forward mode and sign descent from 0.

    The last training is usually the best, but a step of 0.1 can go too far.
    """
    steps = optimizer.unroll_steps
    start = {"rates": jnp.zeros(windows), "momenta": jnp.zeros(windows)}
    path = [start]
    clock = [time.perf_counter()]  # the first step compiles, and does not count in seconds_each

    def record(state, metrics):
        clock.append(time.perf_counter())
        path.append(state.hyperparams)

    _, history = gradhpo.run(
        optimizer,
        optimizer.init(net, start),
        LOSSES,
        Repeated(batches, steps),
        data.val,
        num_steps=outer_steps,
        steps_per_episode=1,
        reptile_rate=0.0,  # every outer step trains from the same network
        chunk_size=1,
        callbacks=[record],
        progress=False,
    )
    of_steps = lambda schedule: jax.tree.map(lambda x: jnp.repeat(x, steps // windows), schedule)
    last = finished(net, of_steps(path[-1]), batches, data)
    val_losses = np.append(history["val_loss"], last.val_loss)
    row = finished(net, of_steps(path[int(np.nanargmin(val_losses))]), batches, data)
    return row._replace(
        runs=outer_steps,
        seconds=clock[-1] - clock[0],
        seconds_each=float(np.median(np.diff(clock)[-max(1, outer_steps - 1) :])),
        val_losses=val_losses,
    )


def experiment(
    optimizer: gradhpo.ForwardModeOptimizer, seed: int, options: argparse.Namespace
) -> dict[str, Result]:
    """Every row of the table for one seed."""
    data = load_data(options.noise, seed)
    k1, k2 = jax.random.split(jax.random.key(seed))
    # A smooth activation. With relu the training gradient jumps at kinks; over thousands of steps
    # the loss then has many small jumps as a function of the schedule, and no derivative sees them.
    net = eqx.nn.MLP(64, 10, WIDTH, 1, activation=jnp.tanh, key=k1)
    batches = gradhpo.ArrayData(data.train, BATCH_SIZE, k2)
    time_left = 1 - np.arange(options.steps) / options.steps
    many = at_random(PER_OUTER_STEP * options.outer_steps, options.steps, options.windows, seed)
    finished(net, many[0], batches, data)  # compiles, so that no row pays for it
    rows = {}
    for name, find in {
        CONSTANT: lambda: best_of(grid(np.ones(options.steps)), net, batches, data),
        COSINE: lambda: best_of(grid(np.sin(np.pi / 2 * time_left) ** 2), net, batches, data),
        RANDOM: lambda: best_of(many, net, batches, data),
        TUNED: lambda: learned(optimizer, net, batches, data, options.windows, options.outer_steps),
    }.items():
        print(f"seed {seed}, {name}")
        rows[name] = find()
    return rows


CONSTANT, COSINE = "best constant of a grid", "best cosine decay of a grid"
RANDOM, TUNED = "best of random schedules", "tuned by forward mode"


def table(runs: list[dict[str, Result]]) -> str:
    spread = lambda values: f"{np.mean(values):.3f} ± {np.std(values):.3f}"
    plain = np.mean([run[CONSTANT].seconds_each for run in runs])
    lines = [
        f"{'':28}{'validation loss':>17}{'test loss':>16}{'test accuracy':>16}"
        f"{'runs':>11}{'cost of each':>14}{'seconds':>9}"
    ]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        percent = 100 * np.asarray([row.accuracy for row in rows])
        cost = np.mean([row.seconds_each for row in rows]) / plain
        lines.append(
            f"{name:28}{spread([row.val_loss for row in rows]):>17}"
            f"{spread([row.test_loss for row in rows]):>16}"
            f"{f'{percent.mean():.1f} ± {percent.std():.1f} %':>16}"
            f"{rows[0].runs:>11}{f'{cost:.1f} x':>14}"
            f"{np.mean([row.seconds for row in rows]):>9.1f}"
        )
    return "\n".join(lines)


def picture(rows: dict[str, Result], path: Path) -> None:
    """Both schedules of one seed, and the validation loss of its training runs."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for number, (name, row) in enumerate(rows.items()):
        colour, style = f"C{number}", "-" if name == TUNED else "--"
        steps = np.arange(len(row.rates))
        left.step(steps, row.rates, style, where="post", color=colour)
        middle.step(steps, row.momenta, style, where="post", color=colour)
        if name == TUNED:
            right.plot(row.val_losses, "o-", color=colour, label=name)
        else:
            right.axhline(row.val_loss, ls=style, color=colour, label=name)
    left.set(xlabel="step", ylabel="learning rate", yscale="log", ylim=(3e-3, 1.5))
    middle.set(xlabel="step", ylabel="momentum")
    right.set(xlabel="outer step", ylabel="validation loss", yscale="log")
    right.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Result]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noise", type=float, default=0.4, help="wrong labels (default 0.4)")
    parser.add_argument("--steps", type=int, default=2_000, help="per training (default 2000)")
    parser.add_argument("--windows", type=int, default=5, help="of the schedule (default 5)")
    parser.add_argument("--outer-steps", type=int, default=10, help="(default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="1 seed, 2 outer steps of 100 steps: a smoke test"
    )
    parser.add_argument("--output", type=Path, default=Path("out/learned_schedule.png"))
    options = parser.parse_args(arguments)
    if not 0 <= options.noise < 1:
        parser.error(f"--noise must be at least 0 and below 1, got {options.noise}")
    if options.seeds < 1 or options.outer_steps < 1:
        parser.error("--seeds and --outer-steps must be at least 1")
    if options.quick:
        options.seeds, options.outer_steps, options.steps = 1, 2, 20 * options.windows
    if options.windows < 1 or options.steps < 1 or options.steps % options.windows:
        parser.error("--windows must be at least 1 and divide --steps")

    print(
        f"{TRAIN_SIZE} training digits, {options.noise:.0%} of the labels wrong; {options.windows} "
        f"learning rates and {options.windows} momenta over {options.steps} steps"
    )
    started = time.perf_counter()
    # Created once: a new function object would be compiled again for every seed.
    optimizer = forward_mode(options.steps, options.windows)
    runs = [experiment(optimizer, seed, options) for seed in range(options.seeds)]
    print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n\n{table(runs)}")
    picture(runs[0], options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
