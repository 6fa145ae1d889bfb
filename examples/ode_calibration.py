"""Calibrating a population of cells: hypergradients through an ODE solver.

The state of cell i follows dx/dt = -x + p_i u(t), x(0) = q, with a known input u(t). Each of the 24
cells has its own gain p_i; all share the initial condition q. The gains are fitted to four late,
noisy observations of each cell, when it has all but forgotten its start (the inner problem: least
squares, and a prior that pulls the gains together). The validation data are four early observations
of the same cells. Three hyperparameters are tuned on the validation error: q, and the mean and the
strength of the prior.

The model is linear and correct, so a joint fit of q and all gains to both sets of data is hard to
beat. The table includes it; tuning should come close.

This needs second derivatives of a loss that contains `diffrax.diffeqsolve`: write
`adjoint=diffrax.DirectAdjoint()`. With diffrax's default, the program stops and prints gradhpo's
advice.

    python examples/ode_calibration.py                       # 3 seeds, about a minute on 2 cores
    python examples/ode_calibration.py --adjoint checkpoint  # diffrax's default: the advice
    python examples/ode_calibration.py --help
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, PyTree

import gradhpo


CELLS, NOISE = 24, 0.3
TRUE_Q, TRUE_MEAN, TRUE_SPREAD = 2.0, 1.5, 0.3  # gains are drawn from N(mean, spread²)
END, FREQUENCY = 4.0, 2.0  # the input is u(t) = 1 + sin(FREQUENCY t)
EARLY, LATE = np.linspace(0.1, 1.0, 4), np.linspace(2.0, END, 4)
WHOLE = np.linspace(0.0, END, 41)
START = {"q": 0.0, "prior_mean": 1.0, "log_prior_strength": -4.0}  # a weak prior

# Steps of constant size. A controller would choose them from the parameters, and derivatives would
# include that choice; on a fixed grid the numerical solution is one smooth function, and its
# derivatives of every order are exact. It is cheap too: DirectAdjoint always pays for `max_steps`
# steps, and here the solve takes all of them. 16 steps (it rounds up to powers of 16) of this
# fifth-order method are accurate to 2e-6.
SOLVER_STEPS = 16
ADJOINTS = {
    "direct": diffrax.DirectAdjoint(),
    "checkpoint": diffrax.RecursiveCheckpointAdjoint(),  # the default of diffrax
    "backsolve": diffrax.BacksolveAdjoint(),
}

# A gain's second derivative is about 2, so a step leaves 40 % of its distance to the optimum. The
# next outer step continues from there.
INNER_STEPS = 10
INNER = optax.sgd(0.3)
# optax.trace(0) changes nothing: it only stores the last hypergradient for us to read.
OUTER = optax.chain(optax.trace(decay=0.0), optax.adam(0.1))
OPTIMIZERS = {
    "tuned, implicit": gradhpo.ImplicitOptimizer(INNER, OUTER, inner_steps=INNER_STEPS),
    "tuned, unrolled": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=INNER_STEPS),
}


class Observations(NamedTuple):
    times: Array  # [times]
    values: Array  # [cells, times]


class Data(NamedTuple):
    gains: np.ndarray  # [cells], the true ones
    train: Observations
    val: Observations
    both: Observations
    test: Observations


class Result(NamedTuple):
    q: float
    q_error: float
    gain_error: float  # root mean square over the cells
    val_loss: float
    test_loss: float
    outer_steps: int
    seconds: float
    hypergradient_error: float  # of the first outer step, relative to finite differences
    gains: np.ndarray  # [cells]
    path: np.ndarray  # [outer steps + 1], q after each


def field(t: Array, x: Array, gains: Array) -> Array:
    """A top-level function instead of a lambda in the loss, so that its traces are reused."""
    return -x + gains * (1 + jnp.sin(FREQUENCY * t))


class Calibration(eqx.Module):
    """The model and its two losses, functions of (gains, hyperparameters, observations)."""

    adjoint: diffrax.AbstractAdjoint

    @eqx.filter_jit
    def states(self, gains: Array, q: Array, times: Array) -> Array:
        """`[cells, times]`. One system for all cells compiles faster than a vmap."""
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=END,
            dt0=END / SOLVER_STEPS,
            y0=jnp.broadcast_to(q, gains.shape),
            args=gains,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.ConstantStepSize(),
            max_steps=SOLVER_STEPS,
            adjoint=self.adjoint,
        )
        return solution.ys.T

    def error(self, gains: Array, hyperparams: PyTree, batch: Observations) -> Array:
        """The validation loss: the mean squared error."""
        return jnp.mean((self.states(gains, hyperparams["q"], batch.times) - batch.values) ** 2)

    def penalised_error(self, gains: Array, hyperparams: PyTree, batch: Observations) -> Array:
        """The training loss, a sum over the cells: a gain's step is independent of their number."""
        strength = jnp.exp(hyperparams["log_prior_strength"])
        penalty = strength * jnp.sum((gains - hyperparams["prior_mean"]) ** 2)
        return CELLS * self.error(gains, hyperparams, batch) + penalty


# The equation is linear, so everything has a closed form. These give the data, the rows that need
# no hypergradient, and finite differences independent of the solver and the library.


def closed_form(times: Array) -> tuple[np.ndarray, np.ndarray]:
    """Response r and memory d: the state of cell i is p_i r(t) + q d(t)."""
    t, w = np.asarray(times), FREQUENCY
    wave = (np.sin(w * t) - w * np.cos(w * t) + w * np.exp(-t)) / (1 + w**2)
    return 1 - np.exp(-t) + wave, np.exp(-t)


def predict(gains: np.ndarray, q: float, times: Array) -> np.ndarray:
    response, memory = closed_form(times)
    return gains[:, None] * response + q * memory


def mean_squared_error(gains: np.ndarray, q: float, batch: Observations) -> float:
    return float(np.mean((predict(gains, q, batch.times) - np.asarray(batch.values)) ** 2))


def fit_gains(hyperparams: dict[str, float], batch: Observations) -> np.ndarray:
    """The optimum of the inner problem."""
    response, memory = closed_form(batch.times)
    strength = np.exp(hyperparams["log_prior_strength"])
    explained = np.mean(response * (np.asarray(batch.values) - hyperparams["q"] * memory), axis=1)
    return (explained + strength * hyperparams["prior_mean"]) / (np.mean(response**2) + strength)


def fit_q_too(batch: Observations) -> dict[str, float]:
    """The q of a joint fit of q and the gains, with the initial prior."""
    at_q = lambda q: START | {"q": q}

    def residuals(q: float) -> np.ndarray:
        gains = fit_gains(at_q(q), batch)
        strength = np.exp(START["log_prior_strength"]) * len(batch.times)
        misfit = predict(gains, q, batch.times) - np.asarray(batch.values)
        return np.append(misfit, np.sqrt(strength) * (gains - START["prior_mean"]))

    # With the gains at their optimum, residuals are affine in q.
    first, slope = residuals(0.0), residuals(1.0) - residuals(0.0)
    return at_q(float(-first @ slope / (slope @ slope)))


def finite_differences(data: Data, epsilon: float = 1e-5) -> dict[str, float]:
    """The hypergradient at the start, by central differences of the converged inner problem."""

    def outer(name: str, change: float) -> float:
        hyperparams = START | {name: START[name] + change}
        return mean_squared_error(fit_gains(hyperparams, data.train), hyperparams["q"], data.val)

    return {name: (outer(name, epsilon) - outer(name, -epsilon)) / (2 * epsilon) for name in START}


def load_data(seed: int) -> Data:
    """New cells and noise; the test observations cover the whole interval."""
    random = np.random.default_rng(seed)
    gains = TRUE_MEAN + TRUE_SPREAD * random.normal(size=CELLS)

    def observe(times: np.ndarray) -> Observations:
        states = predict(gains, TRUE_Q, times)
        return Observations(
            jnp.asarray(times), jnp.asarray(states + NOISE * random.normal(size=states.shape))
        )

    train, val = observe(LATE), observe(EARLY)
    both = Observations(
        jnp.concatenate([val.times, train.times]), jnp.hstack([val.values, train.values])
    )
    return Data(gains, train, val, both, observe(WHOLE))


def result(
    hyperparams: dict[str, float],
    gains: np.ndarray,
    data: Data,
    seconds: float,
    path: list[float],
    hypergradient_error: float = np.nan,
) -> Result:
    q = hyperparams["q"]
    return Result(
        q=q,
        q_error=abs(q - TRUE_Q),
        gain_error=float(np.sqrt(np.mean((gains - data.gains) ** 2))),
        val_loss=mean_squared_error(gains, q, data.val),
        test_loss=mean_squared_error(gains, q, data.test),
        outer_steps=len(path) - 1,
        seconds=seconds,
        hypergradient_error=hypergradient_error,
        gains=gains,
        path=np.asarray(path),
    )


def tune(
    optimizer: gradhpo.BilevelOptimizer, losses: gradhpo.LossFunctions, data: Data, steps: int
) -> tuple[dict[str, float], Result]:
    """The tuned hyperparameters, and their row of the table."""
    hypergradients, path = [], [START["q"]]

    def record(state: gradhpo.BilevelState, _: dict[str, np.ndarray]) -> None:
        hypergradients.append(state.outer_opt_state[0].trace)
        path.append(float(state.hyperparams["q"]))

    # Starting at the inner optimum makes implicit differentiation exact immediately.
    gains, started = jnp.asarray(fit_gains(START, data.train)), time.perf_counter()
    state, _ = gradhpo.run(
        optimizer,
        optimizer.init(gains, {name: jnp.asarray(value) for name, value in START.items()}),
        losses,
        data.train,
        data.val,
        num_steps=steps,
        chunk_size=1,  # so that the callback sees every step
        callbacks=[record],
        progress=False,
    )
    seconds = time.perf_counter() - started
    reference = finite_differences(data)
    expected = np.asarray([reference[name] for name in START])
    difference = np.asarray([hypergradients[0][name] for name in START]) - expected
    hyperparams = {name: float(value) for name, value in state.hyperparams.items()}
    error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    return hyperparams, result(
        hyperparams, np.asarray(state.params), data, seconds, path, hypergradient_error=error
    )


def experiment(
    losses: gradhpo.LossFunctions, data: Data, steps: int, names: list[str]
) -> dict[str, Result]:
    """Every row of the table for one seed, tuned by the optimizers of these names."""

    def untuned(hyperparams: dict[str, float], batch: Observations) -> Result:
        started = time.perf_counter()
        gains = fit_gains(hyperparams, batch)
        seconds = time.perf_counter() - started
        return result(hyperparams, gains, data, seconds, [hyperparams["q"]])

    rows = {
        "untuned, q = 0": untuned(START, data.train),
        "untuned, q fitted to training": untuned(fit_q_too(data.train), data.train),
        "untuned, q and p fitted to both": untuned(fit_q_too(data.both), data.both),
    }
    for name in names:
        hyperparams, rows[name] = tune(OPTIMIZERS[name], losses, data, steps)
        # After tuning, the validation data can also be used to fit the gains.
        if name == "tuned, implicit":
            refitted = untuned(hyperparams, data.both)._replace(
                outer_steps=steps, seconds=rows[name].seconds
            )
    return rows | {"tuned, implicit, p refitted to both": refitted}


def table(runs: list[dict[str, Result]]) -> str:
    columns = {"q": 3, "q_error": 3, "gain_error": 3, "val_loss": 4, "test_loss": 4}
    titles = ("q", "|q - true q|", "error of p", "validation", "test")
    header = "".join(f"{title:>17}" for title in titles)
    lines = [f"{'':36}{header}{'outer steps':>13}{'seconds':>9}"]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        line = f"{name:36}"
        for column, digits in columns.items():
            values = [getattr(row, column) for row in rows]
            line += f"{f'{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}':>17}"
        seconds = np.mean([row.seconds for row in rows])
        lines.append(f"{line}{rows[0].outer_steps:>13}{seconds:>9.1f}")
    return "\n".join(lines)


def picture(runs: list[dict[str, Result]], data: Data, path: Path) -> None:
    """The first seed: three cells (smallest, median and largest gain), and q during tuning."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows, order = runs[0], np.argsort(data.gains)
    before, after = rows["untuned, q = 0"], rows["tuned, implicit"]
    for number, cell in enumerate(order[[0, CELLS // 2, -1]]):
        color, first = f"C{number}", number == 0
        label = lambda text, first=first: text if first else None
        for row, style, text in ((before, ":", "q = 0"), (after, "-", "q tuned")):
            states = predict(row.gains[[cell]], row.q, WHOLE)[0]
            left.plot(WHOLE, states, style, color=color, label=label(text))
        truth = predict(data.gains[[cell]], TRUE_Q, WHOLE)[0]
        left.plot(WHOLE, truth, color=color, alpha=0.25, lw=5, label=label("truth"))
        points = {"training": (data.train, color), "validation": (data.val, "none")}
        for text, (batch, face) in points.items():
            left.scatter(
                batch.times, batch.values[cell], s=25, facecolors=face, edgecolors=color,
                label=label(text),
            )  # fmt: skip
    left.set(xlabel="t", ylabel="x(t) of three cells")
    left.legend(frameon=False, fontsize=8)
    for name in (name for name in OPTIMIZERS if name in rows):
        style = "--" if "unrolled" in name else "-"
        right.plot(rows[name].path, style, lw=4 - 2 * (style == "--"), label=name)
    for number, name in enumerate(list(rows)[1:3]):
        right.axhline(rows[name].q, color=f"C{number + 2}", ls="-.", lw=1, label=name)
    right.axhline(TRUE_Q, color="black", lw=0.8, label="true q")
    right.set(xlabel="outer step", ylabel="q")
    right.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Result]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="outer steps (default 60)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument(
        "--adjoint", choices=ADJOINTS, default="direct", help="diffrax adjoint (default direct)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="1 seed, 5 steps, no unrolling: a smoke test"
    )
    parser.add_argument("--output", type=Path, default=Path("out/ode_calibration.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    names = list(OPTIMIZERS)
    if options.quick:
        options.seeds, options.steps, names = 1, 5, ["tuned, implicit"]

    print(
        f"{CELLS} cells, one gain p each, one initial condition q = {TRUE_Q} for all; training at "
        f"t = {LATE[0]:.1f} to {LATE[-1]:.1f}, validation at {EARLY[0]:.1f} to {EARLY[-1]:.1f}"
    )
    started = time.perf_counter()
    # The same bound methods throughout: a new function would compile again.
    calibration = Calibration(ADJOINTS[options.adjoint])
    losses = gradhpo.LossFunctions(calibration.penalised_error, calibration.error)
    with jax.enable_x64(True):  # so that rounding does not affect the comparison of hypergradients
        data = [load_data(seed) for seed in range(options.seeds)]
        try:
            runs = [experiment(losses, each, options.steps, names) for each in data]
        except ValueError as error:
            if "DirectAdjoint" not in str(error):
                raise
            sys.exit(f"--adjoint {options.adjoint} does not work here: {error}")
        print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n")
        print(table(runs))
        print("\nthe hypergradient at the start, largest relative difference to finite differences")
        for name in names:
            print(f"{name:36}{max(run[name].hypergradient_error for run in runs):.0e}")
        picture(runs, data[0], options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
