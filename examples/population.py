"""A population: descents inside, copies and mutations outside. When is it worthwhile?

Eight members train at the same time, each with different hyperparameters. Every few steps the two
worst become copies of the two best, and their hyperparameters mutate. In between, members either
follow their hypergradients or keep their hyperparameters (`FixedOptimizer`), which is population
based training, or PBT (Jaderberg et al., 2017, arXiv:1711.09846). A mutation multiplies by 0.8 or
1.2, adds normal noise, or comes from the teacher of HPM (Tao et al., NeurIPS 2020), which learns
from the hypergradients of all members.

- **A landscape with many basins**: the validation loss at the inner optimum is a bowl with waves,
with 49 local minima, in closed form. The regret of the best member is its loss minus the lowest
minimum.
- **A network**: learning rate, weight decay and dropout of a small network for digits with wrong
labels. Rates and decays are drawn over four orders of magnitude. Dropout is Gaussian noise of
variance p / (1 - p) on every unit, which is differentiable in p. All three are learned as
logarithms or logits, and these are what the multiplying mutations multiply.

Every row takes the same number of training steps, but rows with hypergradients take two to four
times as long, so one row is PBT with three times as many members.

In the landscape, only descents with noise find the lowest minimum reliably. With the network, PBT
with more members is as good in the same time.

    python examples/population.py            # half an hour on 2 busy cores
    python examples/population.py --help
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from sklearn.datasets import load_digits

import gradhpo


MEMBERS = 8
EVERY = 5  # outer steps between two exploits, unless a column says otherwise
LOWEST = (1.3, -0.7)  # where the landscape has its lowest minimum
TRAIN_SIZE, VAL_SIZE, WRONG = 400, 300, 0.3  # of the digits; the share of wrong labels
WIDTHS = (64, 64, 64, 10)
BATCH_SIZE = 64


class Method(NamedTuple):
    descends: bool
    mutation: gradhpo.RandomMutation | gradhpo.LearnedMutation | None = None  # None: no exploits
    members: int = MEMBERS


LEARNED, NOISE = "descents, learned, adding", "descents, noise"
METHODS = {
    "random search": Method(False),
    "PBT, factors": Method(False, gradhpo.RandomMutation()),
    "PBT, noise": Method(False, gradhpo.RandomMutation(scale=1.0)),
    "PBT, noise, 3 x the members": Method(False, gradhpo.RandomMutation(scale=1.0), 3 * MEMBERS),
    "descents alone": Method(True),
    "descents, factors": Method(True, gradhpo.RandomMutation()),
    NOISE: Method(True, gradhpo.RandomMutation(scale=1.0)),
    "descents, learned, multiplying": Method(True, gradhpo.LearnedMutation()),
    LEARNED: Method(True, gradhpo.LearnedMutation(kind="additive")),
}

Scores = dict[str, dict[str, list[float]]]  # column, row, one number for each seed


def population(name: str, every: int, inner: Any, rate: float, steps: int) -> gradhpo.Population:
    """`steps` inner steps between outer updates, or between evaluations of the loss."""
    method = METHODS[name]
    optimizer: gradhpo.BilevelOptimizer = gradhpo.FixedOptimizer(inner, inner_steps=steps)
    if method.descends:
        optimizer = gradhpo.UnrolledOptimizer(inner, optax.adam(rate), unroll_steps=steps)
    if method.mutation is None:
        return gradhpo.Population(optimizer, method.members)
    return gradhpo.Population(optimizer, method.members, every, mutation=method.mutation)


# -- a landscape ----------------------------------------------------------------------------------


def landscape(x: Float[Array, "... 2"], lowest: Float[Array, " 2"]) -> Float[Array, "..."]:
    away = x - lowest
    return jnp.sum(away**2 + 1 - jnp.cos(2 * jnp.pi * away), axis=-1)


def bowl(w: Array, h: Array, batch: None) -> Array:
    """The optimum is w = h, so the best loss with hyperparameters h is landscape(h)."""
    return jnp.sum(jnp.asarray([0.5, 0.3]) * (w - h) ** 2)


LANDSCAPE = gradhpo.LossFunctions(bowl, lambda w, h, lowest: landscape(w, lowest))


def anywhere(key: Array, h: Array) -> Array:
    return jax.random.uniform(key, h.shape, h.dtype, -5, 5)


# At the top level: a function defined inside each run would be compiled in each run.
def positions(state: gradhpo.BilevelState) -> dict[str, Array]:
    return {"at": state.hyperparams}


def search_landscape(
    optimizer: gradhpo.Population, lowest: tuple[float, float], outer_steps: int, seed: int
) -> tuple[gradhpo.BilevelState, gradhpo.History]:
    key = jax.random.key(seed)
    state = optimizer.init(jnp.zeros(2), jnp.zeros(2), spread=anywhere, key=key)
    return gradhpo.run(
        optimizer,
        state,
        LANDSCAPE,
        None,
        jnp.asarray(lowest),
        num_steps=outer_steps,
        chunk_size=outer_steps,
        record=positions,
        progress=False,
    )


def of_landscape(outer_steps: int, seeds: int, names: list[str]) -> Iterator[tuple]:
    for name in names:
        for every in (EVERY, 4 * EVERY) if METHODS[name].mutation else (EVERY,):
            optimizer = population(name, every, optax.sgd(0.8), 0.05, 5)
            for lowest in (LOWEST, (0.0, 0.0)) if every == EVERY else (LOWEST,):
                column = f"regret, every {every}" if lowest == LOWEST else "regret, lowest at 0"
                for seed in range(seeds):
                    state, _ = search_landscape(optimizer, lowest, outer_steps, seed)
                    at = optimizer.best(state).hyperparams
                    yield column, name, float(landscape(at, jnp.asarray(lowest)))


# -- a network ------------------------------------------------------------------------------------


class Batches(eqx.Module):
    """Digits, with a dropout key for each batch."""

    digits: gradhpo.ArrayData
    key: Array

    def __call__(self, index: Array) -> tuple[tuple[Array, Array], Array]:
        return self.digits(index), jax.random.fold_in(self.key, index)


def load_data(seed: int) -> list[tuple[Array, Array]]:
    """Shuffled digits to train, validate and test; some of the training labels are wrong."""
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    wrong = (np.arange(len(y)) < TRAIN_SIZE) & (random.random(len(y)) < WRONG)
    y = np.where(wrong, (y + random.integers(1, 10, len(y))) % 10, y)
    cuts = (TRAIN_SIZE, TRAIN_SIZE + VAL_SIZE)
    parts = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    return [(jnp.asarray(x), jnp.asarray(y)) for x, y in parts]


def new_network(key: Array) -> list[tuple[Array, Array]]:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    sizes = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [(jax.random.normal(k, (n, m)) / np.sqrt(n), jnp.zeros(m)) for k, n, m in sizes]


def cross_entropy(w: PyTree, batch: tuple, dropout: Any = 0.0, key: Array | None = None) -> Array:
    x, y = batch
    for number, (weight, bias) in enumerate(w):
        if number:
            x = jnp.tanh(x)
        if number and key is not None:
            noise = jax.random.normal(jax.random.fold_in(key, number), x.shape)
            x = x * (1 + jnp.sqrt(dropout / (1 - dropout)) * noise)
        x = x @ weight + bias
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y))


def training_loss(w: PyTree, h: PyTree, batch: tuple) -> Array:
    decay = jnp.exp(h["log_decay"]) * sum(jnp.sum(weight**2) for weight, _ in w) / 2
    return cross_entropy(w, batch[0], jax.nn.sigmoid(h["logit_dropout"]), batch[1]) + decay


NETWORK = gradhpo.LossFunctions(training_loss, lambda w, h, batch: cross_entropy(w, batch))
MIDDLE = {"log_rate": np.log(0.03), "log_decay": np.log(1e-3), "logit_dropout": -1.0}
REACH = {"log_rate": np.log(100), "log_decay": np.log(100), "logit_dropout": 2.0}


def around(key: Array, h: dict[str, Array]) -> dict[str, Array]:
    """Draws every hyperparameter, at most its reach away."""
    keys = jax.random.split(key, len(h))
    draw = lambda key, name: h[name] + jax.random.uniform(key, (), minval=-1) * REACH[name]
    return {name: draw(key, name) for key, name in zip(keys, h, strict=True)}


def of_network(outer_steps: int, seeds: int, names: list[str]) -> Iterator[tuple]:
    inner = lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.9)
    for name in names:
        optimizer = population(name, EVERY, inner, 0.1, 10)
        for seed in range(seeds):
            train, val, test = load_data(seed)
            keys = jax.random.split(jax.random.key(seed), 4)
            middle = {name: jnp.asarray(x, jnp.float32) for name, x in MIDDLE.items()}
            state = optimizer.init(new_network(keys[0]), middle, spread=around, key=keys[1])
            batches = Batches(gradhpo.ArrayData(train, BATCH_SIZE, keys[2]), keys[3])
            started = time.perf_counter()
            state, _ = gradhpo.run(
                optimizer,
                state,
                NETWORK,
                batches,
                val,
                num_steps=outer_steps,
                chunk_size=outer_steps,
                progress=False,
            )
            seconds = time.perf_counter() - started
            best = optimizer.best(state)
            for column, batch in (("validation loss", val), ("test loss", test)):
                yield column, name, float(cross_entropy(best.params, batch))
            for path, value in best.hyperparams.items():
                yield path, name, float(value)
            if seed or seeds == 1:  # the first compiles
                yield "seconds, fastest", name, seconds


# -- results --------------------------------------------------------------------------------------


def median(values: list[float]) -> tuple[float, float, float]:
    """The median and the ends of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def collect(found: Iterator[tuple[str, str, float]]) -> Scores:
    scores: Scores = {}
    for column, name, value in found:
        scores.setdefault(column, {}).setdefault(name, []).append(value)
    return scores


def cell(column: str, values: list[float]) -> str:
    if not values:
        return ""
    if column.startswith("seconds"):
        return f"{np.min(values):.1f}"
    return "{:.3f} ({:.3f} to {:.3f})".format(*median(values))


def table(scores: Scores) -> str:
    columns = [x for x in scores if not x.startswith("log")]
    lines = [f"{'':31}" + "".join(f"{column:>26}" for column in columns)]
    for name in scores[columns[0]]:
        cells = [cell(column, scores[column].get(name, [])) for column in columns]
        lines.append(f"{name:31}" + "".join(f"{text:>26}" for text in cells))
    return "\n".join(lines)


def picture(all_scores: dict[str, Scores], outer_steps: int, path: Path) -> None:
    """One search of the landscape, its family tree, and the results of all methods."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    optimizer = population(NOISE, EVERY, optax.sgd(0.8), 0.05, 5)
    _, history = search_landscape(optimizer, LOWEST, outer_steps, seed=0)
    side = jnp.linspace(-5, 5, 201)
    height = landscape(jnp.stack(jnp.meshgrid(side, side), axis=-1), jnp.asarray(LOWEST))
    left.contourf(side, side, height, levels=np.linspace(0, 40, 21), cmap="Blues_r", extend="max")
    at = history["at"].reshape(-1, 2)
    colours = np.repeat(np.arange(outer_steps), MEMBERS)
    dots = left.scatter(*at.T, s=3, c=colours, cmap="autumn", rasterized=True)
    left.plot(*LOWEST, "k+", ms=10)
    left.set(title="where the members are", xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
    figure.colorbar(dots, ax=left, label="step")
    optimizer.plot_family(history, middle)
    middle.set(title="who copies whom", ylim=(0, 15))

    scores = all_scores.get("network") or all_scores["landscape"]
    column = "test loss" if "network" in all_scores else f"regret, every {EVERY}"
    for row, (name, values) in enumerate(reversed(scores[column].items())):
        middle_value, low, high = median(values)
        colour = "C0" if METHODS[name].descends else "C1"
        right.plot([low, high], [row, row], color=colour)
        right.plot(middle_value, row, "o", color=colour)
    right.set_yticks(range(len(scores[column])), list(reversed(scores[column])))
    right.set(xlabel=f"{column}, median and its 95 % interval")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Scores]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["landscape", "network"], help="default: both")
    parser.add_argument("--seeds", type=int, default=20, help="of the landscape (default 20)")
    parser.add_argument("--network-seeds", type=int, default=20, help="(default 20)")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 20 steps, two methods")
    parser.add_argument("--output", type=Path, default=Path("out/population.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.network_seeds < 1:
        parser.error("--seeds and --network-seeds must be at least 1")
    of_landscapes = of_networks = list(METHODS)
    outer_steps, network_steps = 200, 100
    if options.quick:
        options.seeds, options.network_seeds, outer_steps, network_steps = 2, 1, 20, 5
        of_landscapes, of_networks = ["PBT, noise", NOISE], [NOISE]
    parts: dict[str, Callable[[], tuple[str, int, Iterator]]] = {
        "landscape": lambda: (
            f"{MEMBERS} members, {outer_steps} outer steps of 5",
            options.seeds,
            of_landscape(outer_steps, options.seeds, of_landscapes),
        ),
        "network": lambda: (
            f"{TRAIN_SIZE} digits, {MEMBERS} members, {network_steps} outer steps of 10",
            options.network_seeds,
            of_network(network_steps, options.network_seeds, of_networks),
        ),
    }
    started, all_scores = time.perf_counter(), {}
    for part in [options.only] if options.only else parts:
        about, seeds, found = parts[part]()
        all_scores[part] = collect(found)
        print(f"{part}: {about}; median of {seeds} seeds, with its 95 % interval\n")
        print(f"{table(all_scores[part])}\n", flush=True)
    picture(all_scores, outer_steps, options.output)
    print(f"picture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return all_scores


if __name__ == "__main__":
    main()
