"""A hundred penalties tuned by cross-validation: the gain in its loss, and on new data.

Two data sets and 5-fold cross-validation. `diabetes`: 442 patients, 353 of them known, 10 features
with their squares and products, 64 in all. `sparse`: 100 known examples with 1,000 features in 100
groups, 5 of them relevant. An elastic net has two penalties, a weighted lasso one for each group
(each feature of `diabetes`).

`gradhpo.cross_validation` makes one problem of the 5 folds, so one hypergradient moves all
penalties. The weights come from scikit-learn's coordinate descent, which is never differentiated:
implicit differentiation needs only the optimum, as the fixed point of a proximal step. With
proximal steps alone the hypergradient is the same, up to rounding.

A fit is one training run on one fold. scikit-learn's ElasticNetCV makes 5,000 of them, 10 ratios of
100 penalties; the elastic net is tuned with 250, the weighted lasso with 500. With a penalty for
each group, the loss of cross-validation is far lower and no longer estimates the test loss, which
is measured with weights fitted to all known examples.

    python examples/cross_validation.py          # 10 splits, 20 minutes on 2 busy cores
    python examples/cross_validation.py --help
"""

import argparse
import functools
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib
import numpy as np
import optax
from jaxtyping import Array
from regularisation import ELASTIC_NET, Batch, error, proximal_step
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNetCV, LassoCV, enet_path
from sklearn.model_selection import PredefinedSplit

import gradhpo


FOLDS = 5
GROUPS, ACTIVE, PER_GROUP = 100, 5, 10  # of the sparse problem
SHARED = 20  # outer steps with one penalty, before all move on their own
MANY = re.compile(r"\d\d penalties")
Penalties = dict[str, Array]


class Data(NamedTuple):
    known: Batch
    test: Batch
    folds: np.ndarray  # the fold that holds out each known example
    groups: int  # of equally many features, each with an l1 penalty


class Row(NamedTuple):
    """One row of the table, for one split; losses are mean squared errors."""

    cv_loss: float
    test_loss: float
    nonzeros: int
    fits: int
    seconds: float
    curve: np.ndarray  # [outer steps], loss of cross-validation
    l1: np.ndarray


# -- data ------------------------------------------------------------------------------------------


def batch_of(x: np.ndarray, y: np.ndarray) -> Batch:
    """With a bound on the curvature of every training part (4 of 5 examples)."""
    curvature = np.linalg.norm(x, 2) ** 2 / len(x) * FOLDS / (FOLDS - 1)
    return Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(curvature))


def scaled(x: np.ndarray, y: np.ndarray, known: int, groups: int, random) -> Data:
    """Known examples with mean 0 and variance 1, so no intercept."""
    x = (x - x[:known].mean(0)) / x[:known].std(0)
    y = (y - y[:known].mean()) / y[:known].std()
    folds = random.permutation(np.arange(known) % FOLDS)
    parts = slice(known), slice(known, None)
    return Data(*(batch_of(x[part], y[part]) for part in parts), folds, groups)


def diabetes(seed: int) -> Data:
    """Features, squares of all except sex, and products: 10 + 9 + 45."""
    random = np.random.default_rng(seed)
    x, y = load_diabetes(return_X_y=True)
    order = random.permutation(len(x))
    x, y = x[order] / x.std(0), y[order]
    first, second = np.triu_indices(10)
    keep = (first != second) | (first != 1)
    x = np.hstack([x, x[:, first[keep]] * x[:, second[keep]]])
    return scaled(x, y, 353, x.shape[1], random)


def sparse(seed: int) -> Data:
    """Features correlated within groups; 4 of 10 matter in 5 of 100 groups; noise of 2."""
    random = np.random.default_rng(seed)
    size, features = 1_100, GROUPS * PER_GROUP
    common = np.repeat(random.normal(size=(size, GROUPS)), PER_GROUP, axis=1)
    x = np.sqrt(0.3) * common + np.sqrt(0.7) * random.normal(size=(size, features))
    weights = np.zeros((GROUPS, PER_GROUP))
    weights[random.choice(GROUPS, ACTIVE, replace=False), :4] = 0.5
    y = x @ weights.ravel() + 2 * random.normal(size=size)
    return scaled(x, y, 100, GROUPS, random)


# -- the inner problem -----------------------------------------------------------------------------


def by_feature(penalties: Penalties, features: int) -> Penalties:
    """Expands one penalty per group of neighbours to one per feature; no l2 penalty if absent."""
    l1 = penalties["log_l1"]
    l1 = jnp.repeat(l1, features // l1.size) if l1.ndim else l1
    return {"log_l2": jnp.array(-jnp.inf)} | penalties | {"log_l1": l1}


def loss(w: Array, penalties: Penalties, batch: Batch) -> Array:
    return ELASTIC_NET.train_loss(w, by_feature(penalties, len(w)), batch)


def step(w: Array, penalties: Penalties, batch: Batch) -> Array:
    return proximal_step(w, by_feature(penalties, len(w)), batch)


LOSSES = gradhpo.LossFunctions(loss, ELASTIC_NET.val_loss)


def fitted(w, x, y, l1, l2, tolerance: float = 1e-6) -> np.ndarray:
    """An elastic net or a weighted lasso by scikit-learn's coordinate descent, from weights w.

    Dividing each feature by its share of the largest l1 penalty makes it an ordinary lasso.
    """
    w, x, y, l1, l2 = (np.array(a) for a in (w, x, y, l1, l2))
    share = l1 / l1.max()  # 1 in an elastic net
    found = enet_path(
        x / share, y, alphas=[l1.max() + l2], l1_ratio=l1.max() / (l1.max() + l2),
        coef_init=w * share, precompute=False, tol=tolerance, max_iter=100_000,
    )  # fmt: skip
    return found[1][:, 0] / share


def by_coordinates(w: Array, penalties: Penalties, batch: Batch, fit=fitted) -> Array:
    """The same as an inner solver, which is never differentiated."""
    each = by_feature(penalties, len(w))
    l1, l2 = (jnp.exp(each[name]) for name in ("log_l1", "log_l2"))
    given = w, batch.x, batch.y, jnp.broadcast_to(l1, w.shape), l2
    return jax.pure_callback(fit, w, *given, vmap_method="sequential")


# -- tuned -----------------------------------------------------------------------------------------


def step_folds(params: Array, penalties: Penalties, folds) -> Array:
    """A proximal step of every fold; its fixed point is the optimum."""
    return folds.each(step, params, penalties)


def fit_folds(params: Array, penalties: Penalties, folds) -> Array:
    """Every fold by scikit-learn."""
    return folds.each(by_coordinates, params, penalties)


def fit_folds_closely(params: Array, penalties: Penalties, folds) -> Array:
    """As closely as scikit-learn can."""
    closely = functools.partial(by_coordinates, fit=functools.partial(fitted, tolerance=1e-14))
    return folds.each(closely, params, penalties)


# The fixed point's matrix has one block per fold, and involves only nonzero weights.
OUTER = optax.adam(optax.cosine_decay_schedule(0.3, 100), b1=0.5)
OPTIMIZER = gradhpo.ImplicitOptimizer(
    None,
    OUTER,
    linear_solver=lx.GMRES(rtol=1e-6, atol=1e-6, norm=gradhpo.tree_l2_norm),
    update_fn=step_folds,
    inner_solver=fit_folds,
)


def tuned(data: Data, steps: int, own: bool) -> Row:
    """One fit of every fold per outer step; like a grid, it keeps the best.

    `own`: a lasso with one penalty per group, after `SHARED` steps with a shared one. Otherwise an
    elastic net with two penalties.
    """
    started = time.perf_counter()
    known = data.known
    params, losses, (train, val) = gradhpo.cross_validation(
        jnp.zeros(known.x.shape[1]), LOSSES, known, data.folds
    )
    largest = float(jnp.max(jnp.abs(known.x.T @ known.y))) / len(known.y)
    shared = {"log_l1": jnp.log(largest / 10)}
    tried = []

    def search(params: Array, penalties: Penalties, steps: int) -> None:
        state = OPTIMIZER.init(params, penalties)
        for _ in range(steps):
            penalties = state.hyperparams
            state = OPTIMIZER.step(state, train, val, losses)
            tried.append((float(state.metadata["val_loss"]), state.params, penalties))

    if own:
        search(params, shared, SHARED)
        _, fits, best = min(tried, key=lambda row: row[0])
        search(fits, {"log_l1": jnp.full(data.groups, best["log_l1"])}, steps - SHARED)
    else:
        search(params, shared | {"log_l2": jnp.log(largest / 100)}, steps)
    cv_loss, fits, best = min(tried, key=lambda row: row[0])
    w = by_coordinates(jnp.mean(fits, axis=0), best, known)
    return Row(
        cv_loss=cv_loss,
        test_loss=error(w, data.test),
        nonzeros=int(jnp.sum(w != 0)),
        fits=FOLDS * steps,
        seconds=time.perf_counter() - started,
        curve=np.asarray([row[0] for row in tried]),
        l1=np.exp(best["log_l1"]),
    )


def by_sklearn(model, data: Data, fits: int) -> Row:
    """A grid on the same folds, with the weights that it fits to all known examples."""
    started = time.perf_counter()
    model.fit(np.asarray(data.known.x), np.asarray(data.known.y))
    ratio = getattr(model, "l1_ratio_", 1.0)
    return Row(
        cv_loss=float(np.min(np.mean(model.mse_path_, axis=-1))),
        test_loss=error(model.coef_, data.test),
        nonzeros=int(np.sum(model.coef_ != 0)),
        fits=fits,
        seconds=time.perf_counter() - started,
        curve=np.empty(0),
        l1=np.asarray(model.alpha_ * ratio),
    )


def table(runs: list[dict[str, Row]]) -> str:
    def spread(values: list[float]) -> str:
        return f"{np.mean(values):.3f} ± {np.std(values):.3f}"

    lines = [
        f"{'':40}{'CV loss':>16}{'test loss':>16}{'not 0':>7}{'fits':>7}{'seconds':>9}",
    ]
    for name in runs[0]:
        rows = [run[name] for run in runs if name in run]
        lines.append(
            f"{name:40}{spread([row.cv_loss for row in rows]):>16}"
            f"{spread([row.test_loss for row in rows]):>16}"
            f"{np.mean([row.nonzeros for row in rows]):>7.0f}{rows[0].fits:>7,}"
            f"{np.median([row.seconds for row in rows]):>9.1f}"
        )
    return "\n".join(lines)


def verdict(runs: list[dict[str, Row]], problem: str) -> str:
    """The tuned rows against scikit-learn's, split by split."""
    lines = []
    runs = [run for run in runs if f"{problem}: LassoCV" in run]
    rows = lambda name, loss: np.asarray([getattr(run[f"{problem}: {name}"], loss) for run in runs])
    many = next(name for name in runs[0] if name.startswith(problem) and MANY.search(name))
    many = many.removeprefix(f"{problem}: ")
    for name, other in (("tuned, 2 penalties", "ElasticNetCV"), (many, "LassoCV")):
        words = []
        for what, loss in (("CV", "cv_loss"), ("test", "test_loss")):
            after, before = rows(name, loss), rows(other, loss)
            # Both results may differ in their last digits.
            lower = np.sum(after < before * (1 + 1e-6))
            change = 100 * np.mean(after / before - 1)
            words.append(f"{what} loss {change:+.1f} % ({lower} of {len(runs)})")
        lines.append(f"{problem}: {name}, against {other}: {', '.join(words)}")
    return "\n".join(lines)


# -- the same hypergradient ------------------------------------------------------------------------


def difference(data: Data, steps: int) -> float:
    """How far the hypergradients differ, with scikit-learn's weights and with proximal steps."""
    params, losses, (train, val) = gradhpo.cross_validation(
        jnp.zeros(data.known.x.shape[1]), LOSSES, data.known, data.folds
    )
    penalties = {"log_l1": jnp.log(0.05), "log_l2": jnp.log(0.1)}
    found = []
    for how in ({"inner_solver": fit_folds_closely}, {"inner_steps": steps}):
        method = gradhpo.ImplicitOptimizer(
            None, OUTER, linear_solver=lx.LU(), update_fn=step_folds, **how
        )
        state = method.init(params, penalties)
        gradient = method.compute_hypergradient(state, train, val, losses)
        found.append(np.asarray([gradient["log_l1"], gradient["log_l2"]]))
    return float(np.max(np.abs(found[0] - found[1])) / np.max(np.abs(found[1])))


def picture(runs: list[dict[str, Row]], path: Path) -> None:
    """Cross-validation loss over fits, and against the test loss."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for problem, colour in (("diabetes", "tab:blue"), ("sparse", "tab:orange")):
        names = [name for name in runs[0] if name.startswith(problem) and "tuned" in name]
        if not names:
            continue
        of = lambda name, field, at=problem: np.asarray(
            [
                getattr(run[name if ":" in name else f"{at}: {name}"], field)
                for run in runs
                if f"{at}: LassoCV" in run
            ]
        )
        lasso = of("LassoCV", "cv_loss")
        grid = np.mean(of("ElasticNetCV", "cv_loss") / lasso)
        left.axhline(grid, color=colour, ls="--", lw=1, label=f"{problem}: ElasticNetCV's grid")
        for name in names:
            curve = np.minimum.accumulate(of(name, "curve"), axis=1) / lasso[:, None]
            ls = "-" if MANY.search(name) else ":"
            fits = FOLDS * np.arange(1, curve.shape[1] + 1)
            left.plot(fits, curve.mean(0), ls, color=colour, label=name)
            change = [of(name, x) / of("LassoCV", x) - 1 for x in ("cv_loss", "test_loss")]
            marker = "o" if MANY.search(name) else "x"
            right.plot(*(100 * np.asarray(change)), marker, color=colour, ms=5, label=name)
    left.set(xlabel="fits of one fold", ylabel="lowest CV loss so far, LassoCV = 1")
    right.axhline(0, color="gray", lw=1)
    right.axvline(0, color="gray", lw=1)
    right.set(xlabel="CV loss against LassoCV, %", ylabel="test loss against LassoCV, %")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def experiment(problem: str, data: Data, steps: int, side: int) -> dict[str, Row]:
    """Every row of one problem, on one split."""
    grid = {
        "alphas": side**2, "fit_intercept": False, "cv": PredefinedSplit(data.folds),
        "max_iter": 10_000,
    }  # fmt: skip
    ratios = np.linspace(0.1, 1, side)
    fits = side**2 * FOLDS
    many = f"tuned, {data.groups} penalties"
    rows = {
        "LassoCV": by_sklearn(LassoCV(**grid), data, fits),
        "ElasticNetCV": by_sklearn(ElasticNetCV(l1_ratio=ratios, **grid), data, side * fits),
        "tuned, 2 penalties": tuned(data, steps - steps // 2, own=False),
        many: tuned(data, steps, own=True),
    }
    return {f"{problem}: {name}": row for name, row in rows.items()}


def main(arguments: list[str] | None = None) -> list[dict[str, Row]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--splits",
        type=int,
        default=10,
        help="random splits; half as many for the sparse problem (default 10)",
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="outer steps, 5 fits each (default 100)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="1 split, 24 steps, diabetes alone: a smoke test"
    )
    parser.add_argument("--output", type=Path, default=Path("out/cross_validation.png"))
    options = parser.parse_args(arguments)
    if options.splits < 1 or options.steps <= SHARED:
        parser.error(f"--splits must be at least 1, --steps more than {SHARED}")
    jax.config.update("jax_enable_x64", True)
    problems, side = {"diabetes": diabetes, "sparse": sparse}, 10
    if options.quick:
        options.splits, options.steps, side = 1, 24, 3
        del problems["sparse"]

    started = time.perf_counter()
    far = difference(diabetes(0), 5_000)
    print(f"hypergradients with scikit-learn inside and with proximal steps differ by {far:.0e}")
    runs = []
    for seed in range(options.splits):
        rows: dict[str, Row] = {}
        for problem, make in problems.items():
            if problem == "diabetes" or 2 * seed < options.splits:
                rows |= experiment(problem, make(seed), options.steps, side)
        runs.append(rows)
    print(
        f"\nmean ± standard deviation over {options.splits} split(s), half as many for `sparse`; "
        f"not 0: weights; seconds: median\n\n{table(runs)}\n"
    )
    for problem in problems:
        print(verdict(runs, problem))
    print("(in brackets: splits in which it is not higher)")
    picture(runs, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
