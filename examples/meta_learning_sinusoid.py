"""Few-shot regression of sine waves: the layers of a network are the hyperparameters.

Every task is a sine with its own amplitude and phase, known at ten points. The last layer of a
network learns a task in 30 steps. The three layers below it are hyperparameters, shared by all
tasks; they follow hypergradients of the error at ten other points while the tasks are learned, ten
at a time (`TaskBatched`). Reptile learns the starting point of the last layer. Then the network is
tested on 1,000 new tasks, each known at ten points.

    python examples/meta_learning_sinusoid.py            # 5 seeds, about 10 minutes on 2 cores
    python examples/meta_learning_sinusoid.py --help
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
from jaxtyping import Array, Float, PyTree

import gradhpo


SHOTS = 10
TASKS = 10
INNER_STEPS = 30
REPTILE_RATE = 0.1
INNER_OPTIMIZER = optax.sgd(0.01, momentum=0.9)
OUTER_OPTIMIZER = optax.adam(1e-3)

OPTIMIZERS = {
    "first order": gradhpo.FOOptimizer(INNER_OPTIMIZER, OUTER_OPTIMIZER),
    "one step": gradhpo.OneStepOptimizer(INNER_OPTIMIZER, OUTER_OPTIMIZER),
    "HyperDistill": gradhpo.OnlineHypergradientOptimizer(
        INNER_OPTIMIZER, OUTER_OPTIMIZER, gamma=0.99
    ),
}
# Mean squared errors that the paper reports for its setting (appendix G).
PAPER = {"first order": ".567", "one step": ".670", "HyperDistill": ".327 ± .052"}


class Waves(NamedTuple):
    """`[tasks]` sine waves."""

    amplitude: Float[Array, " tasks"]
    phase: Float[Array, " tasks"]


def draw_waves(key: Array, count: int) -> Waves:
    k1, k2 = jax.random.split(key)
    return Waves(
        jax.random.uniform(k1, (count,), minval=0.1, maxval=5.0),
        jax.random.uniform(k2, (count,), minval=0.0, maxval=jnp.pi),
    )


def draw_points(key: Array, waves: Waves, count: int) -> tuple[Array, Array]:
    """Inputs and targets, `[tasks, count]` each."""
    x = jax.random.uniform(key, (len(waves.phase), count), minval=-5.0, maxval=5.0)
    return x, waves.amplitude[:, None] * jnp.sin(x + waves.phase[:, None])


class Points(eqx.Module):
    """A source for `run`: the same points of the same ten tasks throughout an episode."""

    key: Array
    purpose: int
    per_episode: int = INNER_STEPS

    def __call__(self, step: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(self.key, step // self.per_episode)
        waves = draw_waves(jax.random.fold_in(key, 0), TASKS)
        return draw_points(jax.random.fold_in(key, self.purpose), waves, SHOTS)


@gradhpo.model_loss
def squared_error(net: eqx.nn.MLP, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return jnp.mean((jax.vmap(net)(x[:, None])[:, 0] - y) ** 2)


@eqx.filter_jit
def errors_on_new_tasks(params: PyTree, hyperparams: PyTree, key: Array, count: int) -> Array:
    """Mean squared error of every task before and after each inner step, `[tasks, steps + 1]`."""
    k1, k2, k3 = jax.random.split(key, 3)
    waves = draw_waves(k1, count)
    support, query = draw_points(k2, waves, SHOTS), draw_points(k3, waves, 100)
    w, frozen = eqx.partition(params, eqx.is_inexact_array)

    def learn(support, query):
        loss = lambda w, batch: squared_error(eqx.combine(w, frozen), hyperparams, batch)

        def body(carry, _):
            w, s = carry
            updates, s = INNER_OPTIMIZER.update(jax.grad(loss)(w, support), s, w)
            return (optax.apply_updates(w, updates), s), loss(w, query)

        (w_end, _), errors = jax.lax.scan(
            body, (w, INNER_OPTIMIZER.init(w)), None, length=INNER_STEPS
        )
        return jnp.append(errors, loss(w_end, query))

    return jax.vmap(learn)(support, query)


class Result(NamedTuple):
    errors: np.ndarray  # [steps + 1], of new tasks
    curve: np.ndarray  # [episodes], validation loss at the end of each
    theta: float
    seconds: float


def meta_learn(optimizer: gradhpo.BilevelOptimizer, episodes: int, seed: int) -> Result:
    k1, k2 = jax.random.split(jax.random.key(seed))
    net = eqx.nn.MLP(1, 1, width_size=100, depth=3, key=k1)
    params, hyperparams = gradhpo.partition(net, lambda net: net.layers[:-1])
    batched = gradhpo.TaskBatched(optimizer, TASKS)
    per_episode = INNER_STEPS // optimizer.num_inner_steps  # outer steps
    started = time.perf_counter()
    state, history = gradhpo.run(
        batched,
        batched.init(params, hyperparams),
        gradhpo.LossFunctions(squared_error, squared_error),
        Points(k2, purpose=1),
        Points(k2, purpose=2, per_episode=per_episode),
        num_steps=episodes * per_episode,
        steps_per_episode=per_episode,
        reptile_rate=REPTILE_RATE,
        chunk_size=10 * per_episode,
        progress=False,
    )
    seconds = time.perf_counter() - started
    # All tasks have restarted from the same point: any of them will do.
    first = jax.tree.map(lambda x: x[0] if eqx.is_inexact_array(x) else x, state.params)
    errors = errors_on_new_tasks(first, state.hyperparams, jax.random.key(10_000 + seed), 1_000)
    theta = history["theta"][-1] if "theta" in history else np.nan
    curve = history["val_loss"][per_episode - 1 :: per_episode]
    return Result(np.mean(np.asarray(errors), axis=0), curve, float(theta), seconds)


def interval(values: list[float]) -> str:
    """Mean and its 95 % confidence interval, by the normal approximation."""
    if len(values) == 1:
        return f"{values[0]:.3f} ±  ?  "
    half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def picture(results: dict[str, list[Result]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, runs in results.items():
        window = max(1, len(runs[0].curve) // 50)
        curve = np.mean([run.curve for run in runs], axis=0)
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        left.plot(np.arange(len(smooth)) + window, smooth, label=name)
        right.plot(np.mean([run.errors for run in runs], axis=0), label=name)
    left.set(xlabel="episode", ylabel="validation loss at its end", yscale="log")
    right.set(xlabel="inner step on a new task", ylabel="mean squared error", yscale="log")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, list[Result]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=1_000, help="of 30 steps (default 1000)")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default 5)")
    parser.add_argument(
        "--quick", action="store_true", help="1 seed, 10 episodes, HyperDistill: a smoke test"
    )
    parser.add_argument("--output", type=Path, default=Path("out/meta_learning_sinusoid.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.episodes < 1:
        parser.error("--seeds and --episodes must be at least 1")
    names = list(OPTIMIZERS)
    if options.quick:
        options.seeds, options.episodes, names = 1, 10, ["HyperDistill"]

    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:
            print(f"seed {seed}, {name}")
            results[name].append(meta_learn(OPTIMIZERS[name], options.episodes, seed))
    print(
        f"\nMean squared error on 1,000 new tasks after {INNER_STEPS} steps, "
        f"mean over {options.seeds} seed(s) ± 95 %\n"
    )
    print(f"{'layers tuned by':20}{'error':>16}{'paper':>14}{'theta':>8}{'seconds':>9}")
    for name, runs in results.items():
        theta = np.mean([run.theta for run in runs])
        print(
            f"{name:20}{interval([run.errors[-1] for run in runs]):>16}{PAPER[name]:>14}"
            f"{'' if np.isnan(theta) else f'{theta:.2f}':>8}"
            f"{np.mean([run.seconds for run in runs]):>9.1f}"
        )
    picture(results, options.output)
    print(f"\npicture in {options.output}")
    return results


if __name__ == "__main__":
    main()
