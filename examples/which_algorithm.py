"""Which algorithm? Every estimator on four problems, compared by gradhpo's own diagnostics.

Cosine, length and signs of each estimate compared with the exact hypergradient of the same inner
steps, and its cost; then bias against noise, and the horizon inner step by inner step. The
hyperparameters:

- 1,000 example weights, 30 % of the labels wrong (digits);
- one learning rate for each of 4,810 parameters (digits);
- 30 penalties of a logistic regression, with its learning rate and momentum (breast cancer);
- 8 mixing weights of activations in two hidden layers, as in DARTS (digits).

All data ship with scikit-learn. docs/which_algorithm.md discusses the table of example weights, and
docs/which_algorithm/more_problems.md the others, with where_algorithms_fail.py.

    python examples/which_algorithm.py            # about 5 minutes on 2 slow cores
    python examples/which_algorithm.py --seed 1 --only "mixing weights"
    python examples/which_algorithm.py --help
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array
from sklearn.datasets import load_breast_cancer, load_digits

import gradhpo


STEPS = 20  # inner steps of the horizon, unless stated otherwise
BATCH_SIZE = 50
MOMENTUM = optax.sgd(0.05, momentum=0.9)
Rows = dict[str, dict[str, Any]]  # a table: row to column to cell


class Problem(NamedTuple):
    """A starting point and its data; `source` draws batches by number, or is a single batch."""

    inner: Any
    state: gradhpo.BilevelState
    source: Any
    val: Any
    losses: gradhpo.LossFunctions

    def batches(self, steps: int, first: int = 0) -> Any:
        if not callable(self.source):
            return self.source
        return gradhpo.BatchStack(jax.lax.map(self.source, first + jnp.arange(steps)))


def estimators(
    inner: Any, steps: int, implicit: Any, *, forward: bool = False, **natural: Any
) -> dict[str, Any]:
    """All of them over one horizon; forward mode if there are few hyperparameters.

    `natural` has settings of `NHGDOptimizer`. Not included: BOME, which follows a joint direction
    of parameters and hyperparameters instead of a hypergradient, and FuncID, which takes losses of
    the prediction.
    """
    over: dict[str, Any] = {"inner_steps": steps}
    natural = {"structure": "kronecker"} | natural | over
    found = {
        "first order": gradhpo.FOOptimizer(inner),
        "one step": gradhpo.OneStepOptimizer(inner),
        "T1-T2": gradhpo.T1T2Optimizer(inner),
        "greedy": gradhpo.GreedyOptimizer(inner, unroll_steps=steps),
        "HyperDistill": gradhpo.OnlineHypergradientOptimizer(inner),
        "truncated, last 5": gradhpo.UnrolledOptimizer(inner, unroll_steps=steps, truncation=5),
        "DrMAD": gradhpo.DrMADOptimizer(inner, unroll_steps=steps),
        "implicit": gradhpo.ImplicitOptimizer(inner, linear_solver=implicit, inner_steps=steps),
        "natural": gradhpo.NHGDOptimizer(inner, **natural),
        "SOBA": gradhpo.SOBAOptimizer(
            inner, **over, adjoint_steps=steps, adjoint_optimizer=MOMENTUM
        ),
        "F2SA": gradhpo.PenaltyOptimizer(inner, **over),
        "forward gradient": gradhpo.ForwardGradientOptimizer(
            inner, unroll_steps=steps, num_directions=8
        ),
        "evolution": gradhpo.EvolutionOptimizer(inner, unroll_steps=steps, num_directions=8),
    }
    if forward:
        found["forward mode"] = gradhpo.ForwardModeOptimizer(inner, unroll_steps=steps)
    return found


def new_state(inner: Any, params: Any, hyperparams: Any, source: Any) -> gradhpo.BilevelState:
    """The batch and the key let HyperDistill keep a distilled batch; the others ignore them."""
    maker = gradhpo.OnlineHypergradientOptimizer(inner)
    batch = source(0) if callable(source) else source
    return maker.init(params, hyperparams, batch=batch, key=jax.random.key(0))


def trained(problem: Problem, steps: int) -> Problem:
    """The same problem after plain inner steps, with HyperDistill's memory kept."""
    plain = gradhpo.FixedOptimizer(problem.inner, inner_steps=steps)
    data = (problem.batches(steps, first=10_000), problem.val)
    after = plain.step(plain.adopt(problem.state), *data, problem.losses)
    return problem._replace(state=dataclasses.replace(after, memory=problem.state.memory))


# ---------------------------------------------------------------------------- the four problems


def digits(seed: int, train: int, val: int) -> tuple[tuple, tuple]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))[: train + val]
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return (x[:train], y[:train]), (x[train:], y[train:])


def cross_entropy(net: Any, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y)


@gradhpo.model_loss
def weighted_loss(model: Any, batch: tuple[Array, Array, Array]) -> Array:
    x, y, index = batch
    return jnp.mean(jax.nn.sigmoid(model["weights"][index]) * cross_entropy(model["net"], x, y))


@gradhpo.model_loss
def unweighted_loss(model: Any, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(model["net"], *batch))


def example_weights(seed: int, inner: Any = MOMENTUM) -> Problem:
    """Hyper-cleaning: the hyperparameters are not in the validation loss."""
    (x, y), val = digits(seed, 1_000, 100)
    random = np.random.default_rng(seed)
    wrong = random.random(len(y)) < 0.3
    y = jnp.where(wrong, (y + random.integers(1, 10, len(y))) % 10, y)
    model = {"net": eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(seed)), "weights": jnp.zeros(1000)}
    params, hyperparams = gradhpo.partition(model, lambda m: m["weights"])
    source = gradhpo.ArrayData((x, y, jnp.arange(len(y))), BATCH_SIZE, jax.random.key(seed))
    losses = gradhpo.LossFunctions(weighted_loss, unweighted_loss)
    return Problem(inner, new_state(inner, params, hyperparams, source), source, val, losses)


def by_parameter(raw: Any) -> optax.GradientTransformation:
    """Gradient descent with a separate rate for every number in the parameters."""
    scale = lambda r, g: -jax.nn.softplus(r) * g
    return optax.stateless(lambda gradients, _: jax.tree.map(scale, raw, gradients))


def plain_loss(net: Any, raw: Any, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(net, *batch))


def learning_rates(seed: int) -> Problem:
    """The hyperparameters act only in the inner optimizer."""
    train, val = digits(seed, 1_000, 500)
    net = eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(seed))
    raw = jax.tree.map(lambda x: jnp.full_like(x, -2.0), eqx.filter(net, eqx.is_inexact_array))
    source = gradhpo.ArrayData(train, BATCH_SIZE, jax.random.key(seed))
    losses = gradhpo.LossFunctions(plain_loss, plain_loss)
    state = new_state(by_parameter, net, raw, source)
    return Problem(by_parameter, state, source, val, losses)


def tuned_momentum(h: dict[str, Array]) -> optax.GradientTransformation:
    return optax.sgd(jnp.exp(h["log_rate"]), momentum=jax.nn.sigmoid(h["logit_momentum"]))


def logistic(w: Array, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w[:-1] + w[-1])))


def penalty(w: Array, h: dict[str, Array]) -> Array:
    return jnp.sum(jnp.exp(h["log_penalty"]) * w[:-1] ** 2) / 2


def penalised(w: Array, h: dict[str, Array], batch: tuple[Array, Array]) -> Array:
    return logistic(w, batch) + penalty(w, h)


def unpenalised(w: Array, h: dict[str, Array], batch: tuple[Array, Array]) -> Array:
    return logistic(w, batch)


def penalties(seed: int) -> Problem:
    """A convex problem, full batches: one penalty per feature, a rate, a momentum."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = jnp.asarray(x[order], jnp.float32), jnp.asarray(2.0 * y[order] - 1, jnp.float32)
    train, val = (x[:200], y[:200]), (x[200:], y[200:])
    h = {
        "log_penalty": jnp.full(30, -4.0),
        "log_rate": jnp.log(0.1),
        "logit_momentum": jnp.log(9.0),
    }
    losses = gradhpo.LossFunctions(penalised, unpenalised)
    state = new_state(tuned_momentum, jnp.zeros(31), h, train)
    return Problem(tuned_momentum, state, train, val, losses)


OPERATIONS = (lambda x: x, jnp.tanh, lambda x: jnp.maximum(x, 0), jnp.sin)


class Mixed(eqx.Module):
    """A network whose activations are mixtures: a softmax over logits, one per operation."""

    layers: list[eqx.nn.Linear]
    logits: list[Array]

    def __init__(self, sizes: tuple[int, ...], key: Array):
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(sizes[:-1], sizes[1:], keys, strict=True)
        self.layers = [eqx.nn.Linear(m, n, key=k) for m, n, k in pairs]
        self.logits = [jnp.zeros(len(OPERATIONS)) for _ in sizes[2:]]

    def __call__(self, x: Array) -> Array:
        for layer, logits in zip(self.layers[:-1], self.logits, strict=True):
            h = layer(x)
            x = sum(p * f(h) for p, f in zip(jax.nn.softmax(logits), OPERATIONS, strict=True))
        return self.layers[-1](x)


@gradhpo.model_loss
def mixed_loss(model: Mixed, batch: tuple[Array, Array]) -> Array:
    return jnp.mean(cross_entropy(model, *batch))


def mixing_weights(seed: int) -> Problem:
    """Differentiable architecture search: both losses contain the hyperparameters."""
    train, val = digits(seed, 800, 400)
    model = Mixed((64, 32, 32, 10), jax.random.key(seed))
    params, hyperparams = gradhpo.partition(model, lambda m: m.logits)
    source = gradhpo.ArrayData(train, BATCH_SIZE, jax.random.key(seed))
    losses = gradhpo.LossFunctions(mixed_loss, mixed_loss)
    state = new_state(MOMENTUM, params, hyperparams, source)
    return Problem(MOMENTUM, state, source, val, losses)


# ------------------------------------------------------------------------------------- tables


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def table(rows: Rows) -> str:
    """Markdown; a row may lack columns."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(shown(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows_of(report: Any) -> Rows:
    """The results of `compare_hypergradients`; costs relative to training alone."""
    training, rows = report.costs["training alone"], {}
    for name in ("reference", *report.hypergradients):
        if name in report.hypergradients and report.sees_none(name):
            rows[name] = {"cosine": "sees none"}
            continue
        measures = (report.cosine, report.norm_ratio, report.sign_agreement)
        agreed = [measure.get(name, 1.0) for measure in measures]
        cost = report.costs[name]
        rows["exact" if name == "reference" else name] = {
            **dict(zip(("cosine", "length", "same signs"), agreed, strict=True)),
            "flops": f"{'> ' * cost.at_least}{cost.flops / training.flops:.1f} x",
            "time": f"{cost.seconds / training.seconds:.1f} x",
            "memory": f"{cost.temporary_bytes / training.temporary_bytes:.1f} x",
        }
    return rows | {name: {"cosine": "does not work"} for name in report.failed}


def leaves_of(report: Any) -> Rows:
    """Cosine and length of every leaf; for the exact hypergradient, the length itself."""
    leaves = [leaf.strip("[]'") for leaf in report.per_leaf]
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(report.reference)]
    rows: Rows = {"exact": {leaf: f"{n:.1e}" for leaf, n in zip(leaves, norms, strict=True)}}
    for name in report.hypergradients:
        if report.sees_none(name):
            continue
        rows[name] = {
            leaf.strip("[]'"): "unseen"
            if leaf in report.unseen.get(name, ())
            else f"{found.cosine[name]:.3f}, {found.norm_ratio[name]:.3g} x"
            for leaf, found in report.per_leaf.items()
        }
    return rows


class Session:
    """Results of a run of this script: tables by title, reports for the figures."""

    def __init__(self, quick: bool):
        self.quick, self.tables, self.reports, self.seconds = quick, {}, {}, {}

    def tell(self, title: str, rows: Rows, seconds: float) -> None:
        self.tables[title], self.seconds[title] = rows, seconds
        print(f"\n{title} ({seconds:.0f} s)\n\n{table(rows)}", flush=True)

    def some(self, found: dict[str, Any], *without: str) -> dict[str, Any]:
        """All but `without`; a quick run keeps only three, to save compilation."""
        if self.quick:
            without = (*without, *(n for n in found if n not in ("one step", "greedy", "implicit")))
        return {name: x for name, x in found.items() if name not in without}

    def compare(
        self, title: str, problem: Problem, optimizers: dict, steps: int = STEPS, **more: Callable
    ) -> Any:
        """`more` columns are functions of a hypergradient and of the exact one."""
        started = time.perf_counter()
        batches = problem.batches(steps)
        report = gradhpo.compare_hypergradients(
            self.some(optimizers), problem.state, batches, problem.val, problem.losses
        )
        self.reports[title], rows = report, rows_of(report)
        for column, measure in more.items():
            for name, g in {"exact": report.reference, **report.hypergradients}.items():
                if name == "exact" or not report.sees_none(name):
                    rows[name][column] = measure(g, report.reference)
        self.tell(title, rows, time.perf_counter() - started)
        return report

    def noise(self, title: str, problem: Problem, optimizers: dict, val: Any) -> None:
        """Bias and noise over draws of the batches."""
        started = time.perf_counter()
        report = gradhpo.compare_over_batches(
            self.some(optimizers), problem.state, problem.source, val, problem.losses,
            num_draws=4 if self.quick else 32, num_steps=STEPS,
        )  # fmt: skip
        rows = {
            "exact" if name == "reference" else name: {
                "cosine of the mean": x.cosine,
                "bias": f"{x.bias:.2f} ± {x.bias_error:.2f}",
                "noise": x.noise,
                "signal / noise": x.signal_to_noise,
                "draws needed": f"{x.draws_needed:.1f}",
            }
            for name, x in report.overall.items()
        }
        self.reports[title] = report
        self.tell(title, rows, time.perf_counter() - started)


# ------------------------------------------------------------------------ what each part prints

SHORT_SERIES = gradhpo.Neumann(terms=20, step_size=0.05)


def tell_example_weights(session: Session, seed: int) -> None:
    problem = example_weights(seed)
    everyone = estimators(problem.inner, STEPS, SHORT_SERIES)
    if not session.quick:
        session.compare("tuned: example weights, at the start", problem, everyone)
        later = trained(problem, 300)
        session.compare("tuned: example weights, 300 steps later", later, everyone)
    noise = "tuned: example weights, at the start, over draws of the training batches"
    without = ("first order", "T1-T2") + ("implicit",) * session.quick
    session.noise(noise, problem, session.some(everyone, *without), problem.val)


def tell_learning_rates(session: Session, seed: int) -> None:
    problem = learning_rates(seed)
    everyone = estimators(problem.inner, STEPS, SHORT_SERIES)
    total = lambda g: float(sum(jnp.sum(x) for x in jax.tree.leaves(g)))
    # For all rates together: 1 if raised as by the exact one, below 0 if moved the other way.
    pull = lambda g, exact: total(g) / total(exact)
    session.compare("tuned: learning rates, at the start", problem, everyone, pull=pull)
    later = trained(problem, 300)
    report = session.compare("tuned: learning rates, 300 steps later", later, everyone, pull=pull)
    print(f"\nThe exact one {'lowers' if total(report.reference) > 0 else 'raises'} the rates.")
    started = time.perf_counter()
    exact = gradhpo.UnrolledOptimizer(problem.inner)
    horizon = gradhpo.explain_horizon(
        exact, later.state, later.batches(100), later.val, later.losses
    )
    session.reports["horizon"] = horizon
    fifths = np.split(np.arange(100), 5)
    rows = {
        f"{f[0] + 1} to {f[-1] + 1}": {n: float(x[f].sum()) for n, x in horizon.share.items()}
        for f in fifths
    }
    rows["all"] = {name: float(x.sum()) for name, x in horizon.share.items()}
    title = "tuned: learning rates, 300 steps later, shares of 100 inner steps"
    session.tell(title, rows, time.perf_counter() - started)
    needed = {c: horizon.steps_needed(c) for c in (0.9, 0.99)}
    print(
        "\nThe last steps needed for a cosine of: "
        + ", ".join(f"{c}: {n}" for c, n in needed.items())
    )


def tell_penalties(session: Session, seed: int) -> None:
    problem = penalties(seed)
    places = {"at the start, 20 steps": (problem, 20)}
    if not session.quick:
        places["at the optimum, 500 steps"] = (trained(problem, 3_000), 500)
    for when, (at, steps) in places.items():
        title = f"tuned: penalties, rate and momentum, {when}"
        natural = {"structure": "dense", "per_example": True, "penalty": penalty}
        everyone = estimators(at.inner, steps, None, forward=True, **natural)
        report = session.compare(title, at, everyone, steps)
        session.tell(f"{title}: leaf by leaf", leaves_of(report), 0.0)


def tell_mixing_weights(session: Session, seed: int) -> None:
    problem = mixing_weights(seed)
    later = trained(problem, 300)
    everyone = estimators(problem.inner, STEPS, SHORT_SERIES, forward=True)
    session.compare("tuned: mixing weights, at the start", problem, everyone)
    everyone = session.some(everyone, "forward mode")
    title = "tuned: mixing weights, 300 steps later"
    session.compare(title, later, everyone)
    few = session.some(everyone, "T1-T2", "HyperDistill", "truncated, last 5", "implicit")
    val = gradhpo.ArrayData(problem.val, BATCH_SIZE, jax.random.key(seed))
    session.noise(f"{title}, over draws of batches of {BATCH_SIZE}", later, few, val)


PARTS: dict[str, Callable[[Session, int], None]] = {
    "penalties": tell_penalties,
    "example weights": tell_example_weights,
    "learning rates": tell_learning_rates,
    "mixing weights": tell_mixing_weights,
}


# ------------------------------------------------------------------------------------ pictures


def overview(session: Session) -> Any:
    """Cosines of all estimators in all comparisons."""
    import matplotlib.pyplot as plt

    compared = {
        title.removeprefix("tuned: "): report
        for title, report in session.reports.items()
        if hasattr(report, "hypergradients")
    }
    names = list(dict.fromkeys(n for r in compared.values() for n in r.hypergradients))
    cosines = np.full((len(names), len(compared)), np.nan)
    for j, report in enumerate(compared.values()):
        for name, value in report.cosine.items():
            if not report.sees_none(name):
                cosines[names.index(name), j] = value
    size = (3 + 1.05 * len(compared), 1 + 0.38 * len(names))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    image = ax.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(cosines):
        report = list(compared.values())[j]
        text = f"{value:.2f}"
        if np.isnan(value):
            text = "sees\nnone" if names[i] in report.hypergradients else ""
        ax.text(j, i, text, ha="center", va="center", fontsize=8,
                color="white" if abs(value) > 0.7 else "black")  # fmt: skip
    labels = [title.replace(" rate and momentum,", "").replace(", ", "\n") for title in compared]
    ax.set_xticks(range(len(compared)), labels, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.spines[:].set_visible(False)
    figure.colorbar(image, label="cosine with the exact hypergradient")
    return figure


def pictures(session: Session, path: Path) -> None:
    """The overview in `path`, and next to it one of the library's figures of each kind."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    of = lambda kind: [r for r in session.reports.values() if hasattr(r, kind)]
    kinds = {"compared": of("hypergradients"), "noise": of("draws_needed"), "horizon": of("share")}
    figures = {f"_{kind}": found[0].plot() for kind, found in kinds.items() if found}
    if kinds["compared"]:
        figures[""] = overview(session)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, figure in figures.items():
        figure.savefig(path.with_stem(path.stem + suffix), dpi=110)
        plt.close(figure)
    print(f"\nPictures: {', '.join(path.stem + suffix for suffix in figures) or 'none'}")


def main(arguments: list[str] | None = None) -> dict[str, Rows]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument("--seed", type=int, default=0, help="of data and networks (default 0)")
    parser.add_argument("--quick", action="store_true", help="three estimators, one problem")
    parser.add_argument("--output", type=Path, default=Path("out/which_algorithm.png"))
    options = parser.parse_args(arguments)
    started, session = time.perf_counter(), Session(options.quick)
    parts = ("penalties",) if options.quick else tuple(PARTS)
    for name in parts if options.only is None else (options.only,):
        PARTS[name](session, options.seed)
    pictures(session, options.output)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return session.tables


if __name__ == "__main__":
    main()
