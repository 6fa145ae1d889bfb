"""Compressed sensing: tuning the penalty of basis pursuit denoising, three ways around its kink.

A signal of 200 numbers, 10 of them not 0, is measured 80 times with noise. The estimate is the x
that minimises |Ax - y|^2 / (2 * 80) + lambda |x|_1, and 40 held-out measurements choose lambda. The
objective has kinks, but its optimum can be differentiated implicitly:

- it is the fixed point of a proximal gradient step (ISTA), passed as `update_fn`,
- and of a Split Bregman sweep over (x, d, b), whose matrix is factorised once: another `update_fn`;
- or the kink is smoothed, |x| = sqrt(x^2 + eps^2), which gives an ordinary training loss.

The second table lets eps go to 0 at a fixed lambda: the hypergradient approaches that of the
proximal step, while the inner problem gets harder and x has no exact zero.

    python examples/compressed_sensing.py            # 5 signals, about 40 seconds on 2 cores
    python examples/compressed_sensing.py --help
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, PyTree

import gradhpo


jax.config.update("jax_enable_x64", True)  # optima to 1e-10, too fine for float32

LENGTH, SPIKES = 200, 10
MEASURED, HELD_OUT = 80, 40
NOISE = 0.3
START = 0.05  # lambda; if much larger, the signal is 0, and so is the hypergradient
SMALLEST, LARGEST = 1e-3, 0.2  # lambdas of the grid
FIXED = 0.02  # lambda of the second table
WIDTH = 1e-3  # eps in the first table
COUPLING = 0.1  # mu of Split Bregman: how tightly it couples x and d


class Measurements(NamedTuple):
    a: Array  # [measurements, LENGTH]
    y: Array  # [measurements]
    factor: Array  # [LENGTH, LENGTH]: of the matrix in a Split Bregman sweep, by Cholesky


class Data(NamedTuple):
    truth: np.ndarray
    train: Measurements
    val: Measurements


class Trial(NamedTuple):
    penalty: float
    val_loss: float
    signal: np.ndarray


class Result(NamedTuple):
    """One row of the first table, for one signal."""

    penalty: float
    val_loss: float
    error: float  # |x - truth| / |truth|
    nonzeros: int
    steps: int  # how many lambdas were tried
    seconds: float
    tried: list[Trial]
    signal: np.ndarray


class Smoothing(NamedTuple):
    """One row of the second table, for one signal."""

    hypergradient: float
    difference: float  # relative to the hypergradient of the proximal step
    inner_steps: int
    condition: float


def load_data(seed: int) -> Data:
    """Gaussian measurements, scaled so that the squared error's largest curvature is 1."""
    random = np.random.default_rng(seed)
    truth = np.zeros(LENGTH)
    spikes = random.choice(LENGTH, SPIKES, replace=False)
    truth[spikes] = random.choice([-1, 1], SPIKES) * random.uniform(0.5, 1.5, SPIKES)
    a = random.normal(size=(MEASURED + HELD_OUT, LENGTH))
    y = a @ truth + NOISE * random.normal(size=len(a))
    scale = np.sqrt(MEASURED) / np.linalg.norm(a[:MEASURED], 2)

    def measurements(part: slice) -> Measurements:
        a_part, y_part = jnp.asarray(scale * a[part]), jnp.asarray(scale * y[part])
        matrix = a_part.T @ a_part / len(y_part) + COUPLING * jnp.eye(LENGTH)
        return Measurements(a_part, y_part, jnp.linalg.cholesky(matrix))

    return Data(truth, measurements(slice(MEASURED)), measurements(slice(MEASURED, None)))


def half_squares(x: Array, batch: Measurements) -> Array:
    return jnp.mean((batch.a @ x - batch.y) ** 2) / 2


def signal_of(params: PyTree) -> Array:
    """Split Bregman holds the signal twice; `d` is the copy with exact zeros."""
    return params["d"] if isinstance(params, dict) else params


def val_loss(params: PyTree, hyperparams: dict[str, Array], batch: Measurements) -> Array:
    return half_squares(signal_of(params), batch)


def objective(params: PyTree, hyperparams: dict[str, Array], batch: Measurements) -> Array:
    """The objective that a fixed point minimises. Only reported; the updates below do the work."""
    x = signal_of(params)
    return half_squares(x, batch) + jnp.exp(hyperparams["log_penalty"]) * jnp.sum(jnp.abs(x))


def shrunk(x: Array, by: Array) -> Array:
    return jnp.sign(x) * jax.nn.relu(jnp.abs(x) - by)


def proximal_step(x: Array, hyperparams: dict[str, Array], batch: Measurements) -> Array:
    gradient = batch.a.T @ (batch.a @ x - batch.y) / len(batch.y)
    return shrunk(x - gradient, jnp.exp(hyperparams["log_penalty"]))


def bregman_sweep(params: PyTree, hyperparams: dict[str, Array], batch: Measurements) -> PyTree:
    """x follows the measurements, d the penalty, and b accumulates the difference of the two."""
    d, b = params["d"], params["b"]
    right = batch.a.T @ batch.y / len(batch.y) + COUPLING * (d - b)
    x = jax.scipy.linalg.cho_solve((batch.factor, True), right)
    d = shrunk(x + b, jnp.exp(hyperparams["log_penalty"]) / COUPLING)
    return {"x": x, "d": d, "b": b + x - d}


def smoothed(x: Array, hyperparams: dict[str, Array], batch: Measurements) -> Array:
    width = jnp.exp(hyperparams["log_width"])
    penalty = jnp.sum(jnp.sqrt(x**2 + width**2))
    return half_squares(x, batch) + jnp.exp(hyperparams["log_penalty"]) * penalty


def descent(hyperparams: dict[str, Array]) -> optax.GradientTransformation:
    """As fast as the curvature allows: 1 (squared error) plus lambda / eps (penalty at 0)."""
    curvature = 1 + jnp.exp(hyperparams["log_penalty"] - hyperparams["log_width"])
    return optax.sgd(1 / curvature, momentum=0.97, nesterov=True)


class Method(NamedTuple):
    optimizer: gradhpo.ImplicitOptimizer
    loss: Callable
    params: PyTree  # to start from, as the next
    hyperparams: dict[str, float]


# There is one lambda: the sign of its hypergradient and shrinking steps find it quickly. The width
# is among the hyperparameters so that `descent` knows it, but it does not change.
FIND = gradhpo.sign_descent(1.0, tolerance=0.0)
OUTER = optax.multi_transform(
    {"find": FIND, "keep": optax.set_to_zero()}, {"log_penalty": "find", "log_width": "keep"}
)
FLAT = jnp.zeros(LENGTH)
METHODS = {
    "tuned, proximal step": Method(
        gradhpo.ImplicitOptimizer(None, FIND, inner_steps=500, update_fn=proximal_step),
        objective,
        FLAT,
        {"log_penalty": np.log(START)},
    ),
    "tuned, Split Bregman sweep": Method(
        gradhpo.ImplicitOptimizer(None, FIND, inner_steps=200, update_fn=bregman_sweep),
        objective,
        {"x": FLAT, "d": FLAT, "b": FLAT},
        {"log_penalty": np.log(START)},
    ),
    f"tuned, smoothed, eps = {WIDTH:g}": Method(
        gradhpo.ImplicitOptimizer(
            descent, OUTER, lx.CG(rtol=1e-8, atol=1e-8, max_steps=500), inner_steps=500
        ),
        smoothed,
        FLAT,
        {"log_penalty": np.log(START), "log_width": np.log(WIDTH)},
    ),
}


def error(signal: np.ndarray, data: Data) -> float:
    return float(np.linalg.norm(signal - data.truth) / np.linalg.norm(data.truth))


def result(data: Data, tried: list[Trial], key: Callable, seconds: float) -> Result:
    """The trial with the smallest `key`."""
    penalty, loss, signal = best = min(tried, key=key)
    nonzeros = int(np.sum(best.signal != 0))
    far = error(signal, data)
    return Result(penalty, loss, far, nonzeros, len(tried), seconds, tried, signal)


def tune(method: Method, data: Data, steps: int) -> Result:
    """One fit per outer step; like the grid, it keeps the fit with the lowest validation loss."""
    optimizer, loss, params, hyperparams = method
    started, tried = time.perf_counter(), []
    state = optimizer.init(params, jax.tree.map(jnp.asarray, hyperparams))
    for _ in range(steps):
        # The lambda of the fit that this step starts with.
        penalty = float(jnp.exp(state.hyperparams["log_penalty"]))
        state = optimizer.step(state, data.train, data.val, loss, val_loss)
        signal = np.asarray(signal_of(state.params))
        tried.append(Trial(penalty, float(state.metadata["val_loss"]), signal))
    return result(data, tried, lambda trial: trial.val_loss, time.perf_counter() - started)


@jax.jit
def fitted_to_grid(penalties: Array, batch: Measurements) -> Array:
    """Proximal steps for each lambda, starting from the previous signal."""

    def fit(x: Array, penalty: Array) -> tuple[Array, Array]:
        hyperparams = {"log_penalty": jnp.log(penalty)}
        x = jax.lax.fori_loop(0, 500, lambda _, x: proximal_step(x, hyperparams, batch), x)
        return x, x

    return jax.lax.scan(fit, FLAT, penalties)[1]


def search(data: Data, count: int) -> tuple[Result, Result]:
    """The grid's lambda with the lowest validation loss, and the one with the smallest error."""
    started = time.perf_counter()
    penalties = np.geomspace(LARGEST, SMALLEST, count)
    signals = np.asarray(fitted_to_grid(jnp.asarray(penalties), data.train))
    tried = [
        Trial(float(penalty), float(half_squares(signal, data.val)), signal)
        for penalty, signal in zip(penalties, signals, strict=True)
    ]
    seconds = time.perf_counter() - started
    chosen = result(data, tried, lambda trial: trial.val_loss, seconds)
    return chosen, result(data, tried, lambda trial: error(trial.signal, data), seconds)


def experiment(data: Data, steps: int, count: int) -> dict[str, Result]:
    """Every row of the first table for one signal."""
    chosen, oracle = search(data, count)
    rows = {"grid": chosen, "grid, chosen by the truth": oracle}
    return rows | {name: tune(method, data, steps) for name, method in METHODS.items()}


# The second table. LU uses the whole matrix and leaves no doubt about the reference.
REFERENCE = gradhpo.ImplicitOptimizer(None, None, lx.LU(), 5_000, update_fn=proximal_step)
SMOOTH = gradhpo.ImplicitOptimizer(
    descent, None, lx.CG(rtol=1e-10, atol=1e-10, max_steps=2_000), inner_steps=250
)
MOST_STEPS = 50_000  # which eps = 1e-6 would exceed


def smoothing(data: Data, width: float, reference: float) -> Smoothing:
    """The hypergradient with this eps, once the inner problem is solved."""
    hyperparams = {"log_penalty": jnp.log(FIXED), "log_width": jnp.log(width)}
    state = SMOOTH.init(FLAT, hyperparams)
    step = lambda state, rate: SMOOTH.step(
        state, data.train, data.val, smoothed, val_loss, lr_hyper=rate
    )
    taken, residual = 0, np.inf
    while residual > 1e-9 and taken < MOST_STEPS:
        state = step(state, 0.0)
        taken += SMOOTH.num_inner_steps
        residual = float(state.get_metric("inner_residual"))
    # Descent with rate 1 moves by the hypergradient.
    moved = step(state, 1.0).hyperparams["log_penalty"]
    hypergradient = float(state.hyperparams["log_penalty"] - moved)
    a, x = np.asarray(data.train.a), np.asarray(state.params)
    curvature = a.T @ a / len(a) + np.diag(FIXED * width**2 / (x**2 + width**2) ** 1.5)
    return Smoothing(
        hypergradient=hypergradient,
        difference=abs(hypergradient - reference) / abs(reference),
        inner_steps=taken,
        condition=float(np.linalg.cond(curvature)),
    )


def sharpen(data: Data, widths: list[float]) -> dict[float, Smoothing]:
    """Every row of the second table for one signal."""
    state = REFERENCE.init(FLAT, {"log_penalty": jnp.log(FIXED)})
    found = REFERENCE.compute_hypergradient(state, data.train, data.val, objective, val_loss)
    return {width: smoothing(data, width, float(found["log_penalty"])) for width in widths}


def spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def table(runs: list[dict[str, Result]]) -> str:
    lines = [
        f"{'':30}{'lambda':>17}{'validation loss':>19}{'error':>16}{'nonzeros':>12}{'steps':>7}"
        f"{'seconds':>9}"
    ]
    for name in runs[0]:
        column = lambda field, rows=[run[name] for run in runs]: [getattr(r, field) for r in rows]
        lines.append(
            f"{name:30}{spread(column('penalty'), 4):>17}{spread(column('val_loss'), 5):>19}"
            f"{spread(column('error'), 3):>16}{spread(column('nonzeros'), 0):>12}"
            f"{column('steps')[0]:>7}{np.median(column('seconds')):>9.2f}"
        )
    return "\n".join(lines)


def second_table(runs: list[dict[float, Smoothing]]) -> str:
    lines = [f"{'eps':>8}{'relative difference':>22}{'inner steps':>13}{'condition number':>18}"]
    for width in runs[0]:
        rows = [run[width] for run in runs]
        lines.append(
            f"{width:>8g}{spread([row.difference for row in rows], 4):>22}"
            f"{np.median([row.inner_steps for row in rows]):>13.0f}"
            f"{np.median([row.condition for row in rows]):>18.0f}"
        )
    return "\n".join(lines)


def picture(rows: dict[str, Result], data: Data, path: Path) -> None:
    """A signal and its reconstruction; validation loss over lambda, and the lambdas tried."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    spikes, row = np.flatnonzero(data.truth), rows["tuned, proximal step"]
    left.axhline(0, color="gray", lw=0.5)
    left.plot(spikes, data.truth[spikes], "o", mfc="none", ms=9, color="tab:red", label="signal")
    found = np.flatnonzero(row.signal)
    left.vlines(found, 0, row.signal[found], color="tab:blue", lw=1.5)
    left.plot(found, row.signal[found], ".", color="tab:blue", label="tuned, proximal step")
    left.set(xlabel="coordinate", ylabel="value")
    left.legend(frameon=False)

    by_penalty = lambda tried: np.asarray([trial[:2] for trial in tried]).T
    right.plot(*by_penalty(rows["grid"].tried), color="gray", lw=1, label="grid")
    markers = dict(zip(METHODS, ("o", "x", "+"), strict=True))
    for name, marker in markers.items():
        style = {"ls": "none", "marker": marker, "ms": 8, "mfc": "none"}
        right.plot(*by_penalty(rows[name].tried), label=name, **style)
    best = rows["grid, chosen by the truth"].penalty
    right.axvline(best, color="tab:red", ls=":", label="smallest error on the grid")
    right.set(xscale="log", yscale="log", xlabel="lambda", ylabel="validation loss")
    right.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    arguments: list[str] | None = None,
) -> tuple[list[dict[str, Result]], list[dict[float, Smoothing]]]:
    """The rows of both tables, for each signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many signals (default 5)")
    parser.add_argument("--steps", type=int, default=12, help="outer steps (default 12)")
    parser.add_argument("--grid", type=int, default=50, help="lambdas of the grid (default 50)")
    parser.add_argument(
        "--quick", action="store_true", help="1 signal, 3 outer steps, a grid of 5, 2 widths"
    )
    parser.add_argument("--output", type=Path, default=Path("out/compressed_sensing.png"))
    options = parser.parse_args(arguments)
    if min(options.seeds, options.steps, options.grid) < 1:
        parser.error("--seeds, --steps and --grid must be at least 1")
    widths = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    if options.quick:
        options.seeds, options.steps, options.grid, widths = 1, 3, 5, [1.0, 1e-2]

    print(
        f"{SPIKES} of {LENGTH} numbers are not 0; {MEASURED} measurements, and {HELD_OUT} held "
        "out to choose lambda"
    )
    started = time.perf_counter()
    datas = [load_data(seed) for seed in range(options.seeds)]
    runs = [experiment(data, options.steps, options.grid) for data in datas]
    sharpened = [sharpen(data, widths) for data in datas]
    print(
        f"\nmean ± standard deviation over {options.seeds} signal(s); seconds: median, "
        f"without compilation\n\n{table(runs)}\n\n"
        f"smoothed, lambda = {FIXED}: relative difference to the proximal step's hypergradient; "
        f"medians of the\ninner steps to a gradient below 1e-9 and of the inner condition number"
        f"\n\n{second_table(sharpened)}"
    )
    picture(runs[0], datas[0], options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs, sharpened


if __name__ == "__main__":
    main()
