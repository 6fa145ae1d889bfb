"""Problems that drift: functional hypergradients, smoothed over time, and alternatives.

Eight data sources report the same quantity. Each is wrong part of the time, so that half of all
examples are wrong, and which sources are right keeps changing. So does the truth: a function of the
ten features of scikit-learn's diabetes patients, which rotates with a period of 200 time steps.
(The features are real; the targets and their drift are synthetic.) Every time step brings eight
examples from each source and 16 correct ones, all with noise. The hyperparameters are one logit per
source, whose softmax weights the sources in the training loss of a small network. Everything is
tuned and trained online, in one pass.

Regret is half the squared error against the current truth, over all patients, averaged over the
time steps after the first 50.

- FuncID (`FunctionalOptimizer`) fits its adjoint, another network, by regression; SmoothFBO also
  averages the last 10 hypergradients (`gradhpo.moving_average`).
- Exact unrolling of a time step's inner steps, and implicit differentiation with conjugate
gradients (damping 0.1), both with and without the same average.
- All take about 40 training gradients per time step, by the unit costs of docs/which_algorithm.md:
  14 unrolled steps; 20 steps and 16 products; 20 steps and 12 steps of the adjoint.
- As baselines, equal weights, and training that is told which sources are right.

For each method and window we use the outer rate of a grid with the lowest median regret on three
other seeds. The optimizer of the adjoint, Adam(0.01), was chosen on six more, for FuncID; damping
and the number of products were not tuned.

    python examples/nonstationary.py            # about ten minutes on 2 cores
    python examples/nonstationary.py --help
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from sklearn.datasets import load_diabetes

import gradhpo


SOURCES, EACH, VAL_SIZE = 8, 8, 16  # examples per source, and correct ones, per time step
NOISE, WIDTH = 0.5, 32
PERIOD_OF_TRUTH, PERIOD_OF_SOURCES = 200, 100
SKIPPED = 50  # time steps that do not count
RATES = (1.0, 3.0, 10.0, 30.0)
WINDOW = 10
TUNING_SEEDS = 3
INNER = optax.sgd(0.05, momentum=0.9)
EQUAL, TRUTH = "equal weights", "the right sources, given"


def patients() -> Float[Array, "442 10"]:
    x = np.asarray(load_diabetes(return_X_y=True)[0])
    return jnp.asarray((x - x.mean(axis=0)) / x.std(axis=0), jnp.float32)


# -- a stream that drifts -------------------------------------------------------------------------


class Stream(eqx.Module):
    """The data of one seed: `(training batch, validation batch)` at each time."""

    x: Float[Array, "patients features"]
    key: Array

    def _directions(self, what: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.fold_in(self.key, what), (*shape, 10)) / jnp.sqrt(10)

    def truth(self, x: Array, time: Array) -> Array:
        """A linear function and a step across it, both rotating."""
        u, v = self._directions(0, 2)
        angle = 2 * jnp.pi * time / PERIOD_OF_TRUTH
        along = jnp.cos(angle) * u + jnp.sin(angle) * v
        across = jnp.cos(angle) * v - jnp.sin(angle) * u
        return x @ along + jnp.tanh(x @ across)

    def wrong(self, time: Array) -> Float[Array, " sources"]:
        """How wrong each source is, from 0 to 1."""
        phase = jax.random.uniform(jax.random.fold_in(self.key, 1), (SOURCES,))
        return jax.nn.sigmoid(6 * jnp.sin(2 * jnp.pi * (time / PERIOD_OF_SOURCES + phase)))

    def __call__(self, time: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(self.key, 2), time), 4)
        drawn = lambda key, *shape: self.x[jax.random.randint(key, shape, 0, len(self.x))]
        x, x_val = drawn(keys[0], SOURCES, EACH), drawn(keys[1], VAL_SIZE)
        share, errors = self.wrong(time)[:, None], 2 * self._directions(3, SOURCES)
        y = (1 - share) * self.truth(x, time) + share * jnp.einsum("sef,sf->se", x, errors)
        y = y + NOISE * jax.random.normal(keys[2], y.shape)
        y_val = self.truth(x_val, time) + NOISE * jax.random.normal(keys[3], (VAL_SIZE,))
        return (x, y), (x_val, y_val)


# -- a network, and two losses of its prediction --------------------------------------------------


def new_network(key: Array) -> tuple[Array, Array, Array]:
    keys = jax.random.split(key)
    hidden = jax.random.normal(keys[0], (10, WIDTH)) / jnp.sqrt(10)
    return hidden, jnp.zeros(WIDTH), jax.random.normal(keys[1], (WIDTH,)) / jnp.sqrt(WIDTH)


def predict(w: PyTree, logits: Any, batch: tuple) -> Array:
    hidden, bias, last = w
    return jnp.tanh(batch[0] @ hidden + bias) @ last


def weighted(v: Array, logits: Array, batch: tuple) -> Array:
    weights = SOURCES * jax.nn.softmax(logits)[:, None]
    return jnp.mean(weights * (v - batch[1]) ** 2) / 2


def error(v: Array, logits: Array, batch: tuple) -> Array:
    return jnp.mean((v - batch[1]) ** 2) / 2


TRAIN_LOSS = gradhpo.PredictionLoss(predict, weighted)
VAL_LOSS = gradhpo.PredictionLoss(predict, error)


# -- methods --------------------------------------------------------------------------------------


class Method(NamedTuple):
    make: Callable[[Any], gradhpo.BilevelOptimizer]  # of the outer optimizer
    window: int = 0  # 0: nothing is tuned


def unrolled(outer: Any) -> gradhpo.BilevelOptimizer:
    return gradhpo.UnrolledOptimizer(INNER, outer, unroll_steps=14)


def implicit(outer: Any) -> gradhpo.BilevelOptimizer:
    solver = lx.CG(rtol=1e-4, atol=1e-4, norm=gradhpo.tree_l2_norm, max_steps=16)
    return gradhpo.ImplicitOptimizer(
        INNER, outer, inner_steps=20, linear_solver=solver, damping=0.1
    )


def functional(outer: Any) -> gradhpo.BilevelOptimizer:
    return gradhpo.FunctionalOptimizer(
        INNER,
        outer,
        adjoint=new_network(jax.random.key(99)),
        adjoint_optimizer=optax.adam(0.01),
        inner_steps=20,
        adjoint_steps=12,
    )


def untuned(outer: Any) -> gradhpo.BilevelOptimizer:
    return gradhpo.FixedOptimizer(INNER, inner_steps=20)


METHODS = {
    EQUAL: Method(untuned),
    TRUTH: Method(untuned),
    "unrolled": Method(unrolled, 1),
    "unrolled, smoothed": Method(unrolled, WINDOW),
    "implicit": Method(implicit, 1),
    "implicit, smoothed": Method(implicit, WINDOW),
    "FuncID": Method(functional, 1),
    "SmoothFBO": Method(functional, WINDOW),
}


def paths(name: str, rates: Array, seeds: Array, steps: int) -> tuple[Array, Array]:
    """The regret and the weight on wrong sources over time: `[rates, seeds, steps]` each."""
    method, x = METHODS[name], patients()
    average = gradhpo.moving_average(max(method.window, 1))

    @jax.jit
    @lambda of_one: jax.vmap(jax.vmap(of_one, (None, 0)), (0, None))
    def follow(rate: Array, seed: Array) -> tuple[Array, Array]:
        key = jax.random.key(seed)
        stream = Stream(x, jax.random.fold_in(key, 0))
        optimizer = method.make(optax.chain(average, optax.inject_hyperparams(optax.sgd)(1.0)))
        state = optimizer.init(new_network(jax.random.fold_in(key, 1)), jnp.zeros(SOURCES))
        if method.window:  # then a new rate does not compile a new program
            at_rate = lambda s: s.outer_opt_state[1].hyperparams["learning_rate"]
            state = eqx.tree_at(at_rate, state, rate)
        arrays, rest = eqx.partition(state, eqx.is_array)

        def step(arrays: PyTree, now: Array) -> tuple[PyTree, tuple[Array, Array]]:
            state, wrong = eqx.combine(arrays, rest), stream.wrong(now)
            if name == TRUTH:
                state = state.update(hyperparams=jnp.where(wrong < 0.3, 0.0, -6.0))
            state = optimizer.step(state, *stream(now), TRAIN_LOSS, VAL_LOSS)
            away = predict(state.params, None, (x,)) - stream.truth(x, now)
            weight = jnp.sum(jax.nn.softmax(state.hyperparams) * wrong)
            return eqx.filter(state, eqx.is_array), (jnp.mean(away**2) / 2, weight)

        return jax.lax.scan(step, arrays, jnp.arange(steps))[1]

    return follow(rates, seeds)


class Row(NamedTuple):
    regret: np.ndarray  # for every seed and time
    weight: np.ndarray
    rate: float
    seconds: float


def follow_all(names: list[str], rates: tuple[float, ...], seeds: int, steps: int) -> dict:
    rows: dict[str, Row] = {}
    skipped = min(SKIPPED, steps // 2)
    for name in names:
        started = time.perf_counter()
        grid = rates if METHODS[name].window else rates[:1]
        given = jnp.asarray(grid, jnp.float32), jnp.arange(seeds + TUNING_SEEDS)
        regret, weight = map(np.asarray, paths(name, *given, steps))
        of_grid = np.median(regret[:, seeds:, skipped:].mean(axis=-1), axis=-1)
        best = int(np.argmin(np.where(np.isfinite(of_grid), of_grid, np.inf)))
        found = regret[best, :seeds], weight[best, :seeds]
        rate = grid[best] if METHODS[name].window else 0.0
        rows[name] = Row(*found, rate, time.perf_counter() - started)
        print(f"  {name}: {rows[name].seconds:.0f} s", flush=True)
    return rows


# -- results --------------------------------------------------------------------------------------


def median(values: np.ndarray) -> tuple[float, float, float]:
    """The median and the ends of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def after_start(values: np.ndarray) -> np.ndarray:
    """The mean over time, for every seed."""
    return values[:, min(SKIPPED, values.shape[1] // 2) :].mean(axis=1)


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'':26}{'regret':>26}{'weight on wrong sources':>30}{'tuned: rate':>13}"]
    for name, row in rows.items():
        both = ("{:.3f} ({:.3f} to {:.3f})".format(*median(after_start(x))) for x in row[:2])
        rate = f"{row.rate:g}" if row.rate else ""
        lines.append("{:26}{:>26}{:>30}{:>13}".format(name, *both, rate))
    return "\n".join(lines)


def against(rows: dict[str, Row], name: str) -> str:
    """Ratios of regrets, seed by seed: the median and its interval."""
    of = lambda x: after_start(rows[x].regret)
    lines = [f"{name} against, ratio of regrets (median over seeds, 95 % interval)"]
    for other in rows:
        if other != name:
            lines.append(
                "  {:26}{:.3f} ({:.3f} to {:.3f})".format(other, *median(of(name) / of(other)))
            )
    return "\n".join(lines)


def picture(rows: dict[str, Row], path: Path) -> None:
    """Regret and weight on wrong sources over time: medians over the seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    kernel = np.ones(20) / 20
    for name, row in rows.items():
        for axis, values in zip(axes, row[:2], strict=True):
            line = np.median(values, axis=0)
            line = np.convolve(line, kernel, "valid") if len(line) > 40 else line
            axis.plot(line, label=name, lw=2 if name == "SmoothFBO" else 1)
    axes[0].set(xlabel="time step", ylabel="regret", yscale="log")
    axes[1].set(xlabel="time step", ylabel="weight on wrong sources")
    axes[1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="(default 10)")
    parser.add_argument("--steps", type=int, default=300, help="time steps (default 300)")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 10 steps, three rows")
    parser.add_argument("--output", type=Path, default=Path("out/nonstationary.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 2:
        parser.error("--seeds must be at least 1, and --steps at least 2")
    names, rates = list(METHODS), RATES
    if options.quick:
        options.seeds, options.steps, rates = 2, 10, RATES[:2]
        names = [EQUAL, "FuncID", "SmoothFBO"]
    rows = follow_all(names, rates, options.seeds, options.steps)
    print(
        f"\n{options.steps} time steps; median of {options.seeds} seeds, with its 95 % interval\n"
    )
    print(table(rows))
    print(f"\n{against(rows, 'SmoothFBO')}")
    picture(rows, options.output)
    print(f"\nsaved {options.output}")
    return rows


if __name__ == "__main__":
    main()
