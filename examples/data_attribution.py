"""Which training images made the network classify this digit as it did?

One hypergradient answers for all 1,000 training images at once. Each has a weight of 1 in the
training loss, and the derivative of a query's loss with respect to that weight is the image's
effect on the query: images with a negative derivative helped, the others harmed. The data are
scikit-learn's handwritten digits, the network an MLP, and training is 200 steps of SGD with
momentum.

Is the answer right? `retraining_score` retrains the network 100 times, each time without a random
1 % of the images, and compares the true changes in the queries' losses with the predicted ones.
Then the network is retrained for each query without the 1 % that harmed it most.

    python examples/data_attribution.py            # under 3 minutes on 2 cores
    python examples/data_attribution.py --help
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits

import gradhpo
from gradhpo.diagnostics.retraining_report import RetrainingScore


TRAIN_SIZE, BATCH_SIZE = 1_000, 100
STEPS = 200  # per training; an epoch has ten
FRACTION = 0.01  # of the training images, left out at once
SHOWN = 5  # queries in the picture, and images on either side of each


class Data(NamedTuple):
    train: tuple[Array, Array]
    test: tuple[Array, Array]


class Removal(NamedTuple):
    """Results on the queries, each after retraining without some of the images."""

    predicted: float  # mean loss, to first order
    loss: float
    right: int  # how many are classified correctly


class Result(NamedTuple):
    report: RetrainingScore
    removals: dict[str, Removal]


def load_data(seed: int) -> Data:
    """Shuffled digits in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return Data((x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:]))


def cross_entropy(net: eqx.nn.MLP, x: Array, y: Array) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y)


def weighted_loss(net: eqx.nn.MLP, weights: Array, batch: tuple[tuple, Array]) -> Array:
    """Divided by the batch size: a weight of 0 removes the image and changes nothing else."""
    (x, y), index = batch
    return jnp.mean(weights[index] * cross_entropy(net, x, y))


def plain_loss(net: eqx.nn.MLP, weights: Array, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(net, *batch))


def estimators(inner: Any, steps: int) -> dict[str, gradhpo.BilevelOptimizer]:
    """The exact hypergradient and its approximations."""
    epoch = min(steps, TRAIN_SIZE // BATCH_SIZE)
    # H has directions of negative curvature. 0.1 is the best of 0.001, 0.01 and 0.1.
    implicit = gradhpo.ImplicitOptimizer(inner, inner_steps=steps, damping=0.1)
    return {
        "exact": gradhpo.UnrolledOptimizer(inner, unroll_steps=steps),
        "DrMAD": gradhpo.DrMADOptimizer(inner, unroll_steps=steps),
        "greedy": gradhpo.GreedyOptimizer(inner, unroll_steps=steps, gamma=0.99),
        "truncated to an epoch": gradhpo.UnrolledOptimizer(inner, unroll_steps=epoch),
        "implicit over an epoch": dataclasses.replace(implicit, curvature_batches=epoch),
        "implicit on one batch": implicit,
        "HyperDistill": gradhpo.OnlineHypergradientOptimizer(inner),
        "one step": gradhpo.OneStepOptimizer(inner),
        "T1-T2": gradhpo.T1T2Optimizer(inner),
    }


class Problem(NamedTuple):
    """One training, from `state` on batches from `source`."""

    inner: Any
    state: gradhpo.BilevelState
    source: gradhpo.ArrayData
    losses: gradhpo.LossFunctions
    steps: int

    @classmethod
    def of(cls, data: Data, rate: float, steps: int, seed: int) -> "Problem":
        inner = optax.sgd(rate, momentum=0.9)
        net = eqx.nn.MLP(64, 10, 64, 1, jnp.tanh, key=jax.random.key(seed))
        source = gradhpo.ArrayData(data.train, BATCH_SIZE, jax.random.key(seed), with_indices=True)
        # The batch and the key are for HyperDistill's distilled data; the others ignore them.
        state = gradhpo.OnlineHypergradientOptimizer(inner).init(
            net, jnp.ones(TRAIN_SIZE), batch=source(0), key=jax.random.key(0)
        )
        losses = gradhpo.LossFunctions(weighted_loss, plain_loss)
        return cls(inner, state, source, losses, steps)

    def trained(self, weights: Float[Array, " examples"]) -> eqx.nn.MLP:
        """The network after training with these weights, on the same batches."""
        fixed = gradhpo.FixedOptimizer(self.inner, inner_steps=self.steps)
        batches = gradhpo.BatchStack(jax.lax.map(self.source, jnp.arange(self.steps)))
        start = fixed.init(self.state.params, weights)
        image = jax.tree.map(lambda x: x[0, :1], batches.batches[0])  # its loss is not used
        return fixed.step(start, batches, image, self.losses).params


@eqx.filter_jit
def logits_of(net: eqx.nn.MLP, x: Array) -> Float[Array, "queries 10"]:
    return jax.vmap(net)(x)


def choose_queries(logits: Array, y: Array, count: int, seed: int) -> Int[np.ndarray, " queries"]:
    """Half are the test images with the highest loss, the others random."""
    losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, y))
    order = np.argsort(-losses, kind="stable")
    others = np.random.default_rng(seed).permutation(order[count // 2 :])
    return np.concatenate([order[: count // 2], others[: count - count // 2]])


def removals(
    problem: Problem, report: RetrainingScore, queries: tuple[Array, Array]
) -> dict[str, Removal]:
    """Retrains for each query without some of the images."""
    x, y = queries
    count, numbers, random = round(FRACTION * TRAIN_SIZE), range(len(y)), np.random.default_rng(0)

    @eqx.filter_jit
    def after(left_out: Int[Array, "queries images"]) -> Float[Array, "queries 10"]:
        def of_one(images: Array, x: Array) -> Array:
            weights = jnp.ones(TRAIN_SIZE).at[images].set(0.0, mode="drop")
            return problem.trained(weights)(x)

        return jax.vmap(of_one)(left_out, x)

    def row(left_out: list[np.ndarray], name: str | None) -> Removal:
        # Where an estimator finds fewer harmful images, indices out of range do nothing.
        fill = lambda images: np.pad(images, (0, count - len(images)), constant_values=TRAIN_SIZE)
        logits = after(jnp.asarray(np.stack(list(map(fill, left_out)))))
        predicted = np.nan
        if name is not None:
            g = report.hypergradients[name]
            changes = [-g[query][left_out[query]].sum() for query in numbers]
            predicted = float(np.mean(report.losses + changes))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        read = int(jnp.sum(jnp.argmax(logits, axis=1) == y))
        return Removal(predicted, float(jnp.mean(losses)), read)

    rows = {
        "nothing": row([np.zeros(0, int) for _ in numbers], None),
        "1 % at random": row([random.permutation(TRAIN_SIZE)[:count] for _ in numbers], "exact"),
    }
    for name in report.score:
        harmful = [report.most_harmful(query, count, name) for query in numbers]
        rows[f"most harmful by {name}"] = row(harmful, name)
    return rows


def table(rows: dict[str, Removal], count: int) -> str:
    lines = [f"{'left out':40}{'loss of the queries':>20}{'predicted':>11}{'correct':>14}"]
    for name, row in rows.items():
        predicted = "" if np.isnan(row.predicted) else f"{row.predicted:.3f}"
        lines.append(f"{name:40}{row.loss:>20.3f}{predicted:>11}{f'{row.right} of {count}':>14}")
    return "\n".join(lines)


def picture(
    data: Data, queries: np.ndarray, logits: Array, report: RetrainingScore, path: Path
) -> None:
    """Queries with their most influential images, scores, and predicted against true changes."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    (train_x, train_y), (test_x, test_y) = data
    ratios = [1.3, *[1] * SHOWN, 0.3, *[1] * SHOWN]
    grid = left.subplots(SHOWN, len(ratios), width_ratios=ratios)

    def show(axes: Any, x: Array, text: str, color: str) -> None:
        axes.imshow(np.asarray(x).reshape(8, 8), cmap="gray_r")
        axes.set_title(text, fontsize=9, color=color, pad=2)

    for axes in grid.flat:
        axes.axis("off")
    for query, row in zip(range(SHOWN), grid, strict=True):
        number = queries[query]
        read = int(jnp.argmax(logits[number]))
        show(row[0], test_x[number], f"{int(test_y[number])}, read as {read}", "black")
        helpful = (1, "tab:blue", report.most_helpful(query, SHOWN))
        harmful = (SHOWN + 2, "tab:red", report.most_harmful(query, SHOWN))
        for first, color, images in (helpful, harmful):
            for axes, image in zip(row[first:], images, strict=False):
                show(axes, train_x[image], f"{int(train_y[image])}", color)
    left.suptitle("Digits, and the images that helped (blue) and harmed (red)", fontsize=10)

    top, bottom = right.subplots(2, 1)
    names = sorted(report.score, key=report.score.__getitem__)
    scores = np.asarray([report.score[name] for name in names])
    ends = np.asarray([report.interval[name] for name in names]).T
    top.barh(names, scores, xerr=np.abs(ends - scores), color="tab:blue", ecolor="black")
    top.set(xlabel="score, with 95 % interval", xlim=(min(0, ends.min()), 1.02))
    limits = np.nanmin(report.true), np.nanmax(report.true)
    bottom.plot(limits, limits, color="tab:gray", lw=0.8)
    bottom.plot(report.true, report.predicted["exact"], ".", ms=5, alpha=0.5, c="tab:blue", mew=0)
    bottom.set(xlabel="true change of a digit's loss", ylabel="predicted, exact")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate (default 0.02)")
    parser.add_argument("--steps", type=int, default=200, help="inner steps (default 200)")
    parser.add_argument("--queries", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--retrainings", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of data and network (default 0)")
    parser.add_argument(
        "--quick", action="store_true", help="20 steps, 10 retrainings, two estimators"
    )
    parser.add_argument("--output", type=Path, default=Path("out/data_attribution.png"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.retrainings = 20, 10
    if options.steps < 1 or options.retrainings < 3:
        parser.error("--steps must be at least 1 and --retrainings at least 3")
    if not SHOWN <= options.queries <= 700:
        parser.error(f"--queries must be {SHOWN} to 700, got {options.queries}")
    started = time.perf_counter()
    data = load_data(options.seed)
    problem = Problem.of(data, options.rate, options.steps, options.seed)
    logits = logits_of(eqx.filter_jit(problem.trained)(jnp.ones(TRAIN_SIZE)), data.test[0])
    right = float(jnp.mean(jnp.argmax(logits, axis=1) == data.test[1]))
    print(
        f"{TRAIN_SIZE} training digits, {options.steps} steps of {BATCH_SIZE} at rate "
        f"{options.rate}: {right:.1%} of {len(logits)} test digits correct\n"
    )
    numbers = choose_queries(logits, data.test[1], options.queries, options.seed)
    queries = data.test[0][numbers], data.test[1][numbers]
    named = estimators(problem.inner, options.steps)
    report = gradhpo.retraining_score(
        {name: named[name] for name in ("exact", "one step")} if options.quick else named,
        problem.state,
        problem.source,
        queries,
        problem.losses,
        num_steps=options.steps,
        perturb=gradhpo.leave_out(FRACTION),
        num_retrainings=options.retrainings,
        key=jax.random.key(options.seed),
        progress="retraining",
    )
    rows = removals(problem, report, queries)
    print(f"{report}\n\n{table(rows, len(numbers))}")
    picture(data, numbers, logits, report, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return Result(report, rows)


if __name__ == "__main__":
    main()
