"""Where each algorithm fails: four small tables.

- Greedy, restarted far from the optimum at every outer step: the bowl with waves from its paper.
- Implicit differentiation before training has converged: penalties of a logistic regression.
- DrMAD where the training path is not straight: example weights, by inner learning rate.
- One step through a fresh Adam: the result depends on `eps_root`.

docs/which_algorithm/more_problems.md discusses these tables; which_algorithm.py has the same
problems.

    python examples/where_algorithms_fail.py            # half a minute on 2 slow cores
    python examples/where_algorithms_fail.py --help
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import optax
from jaxtyping import Array
from which_algorithm import (
    STEPS,
    Rows,
    example_weights,
    penalties,
    table,
    unweighted_loss,
    weighted_loss,
)

import gradhpo


def cosine(a: Any, b: Any) -> float:
    return float(gradhpo.tree_dot(a, b) / (gradhpo.tree_l2_norm(a) * gradhpo.tree_l2_norm(b)))


def greedy_on_cold_restarts(outer_steps: list[int]) -> Rows:
    """A bowl with waves, tuned by greedy and compared with the exact hypergradient."""
    train = lambda w, a, batch: (w[0] - a[0]) ** 2 + (w[1] - a[1]) ** 2 / 2
    val = lambda w, a, batch: jnp.sum(w**2) + 10 * jnp.sum(jnp.sin(w) ** 2)
    inner, outer = optax.sgd(0.1), optax.sgd(1e-4)
    greedy = gradhpo.GreedyOptimizer(inner, outer, unroll_steps=5)
    exact = gradhpo.UnrolledOptimizer(inner, outer, unroll_steps=5)
    losses = gradhpo.LossFunctions(train, val)
    rows: Rows = {f"{k}": {} for k in outer_steps}
    for name, restart in (("restarted", {"steps_per_episode": 1, "reptile_rate": 0.0}),
                          ("carried on", {})):  # fmt: skip
        state, done = greedy.init(jnp.full(2, 2.0), jnp.ones(2)), 0
        for k in outer_steps:
            if k > done + 1:
                state, _ = gradhpo.run(
                    greedy, state, losses, None, None, num_steps=k - 1 - done, progress=False,
                    **restart,
                )  # fmt: skip
                done = k - 1
            g, r = (o.compute_hypergradient(state, None, None, train, val) for o in (greedy, exact))
            after = exact.step(state, None, None, train, val)
            rows[f"{k}"] |= {
                f"{name}: cosine": cosine(g, r),
                f"{name}: loss": float(after.get_metric("val_loss")),
            }
    return rows


def implicit_before_convergence(seed: int, counts: list[int]) -> Rows:
    """Only penalties; forward mode gives the exact hypergradient at every step."""
    problem = penalties(seed)
    h, pair = problem.state.hyperparams, (problem.losses.train_loss, problem.losses.val_loss)
    arguments = (problem.source, problem.val, *pair)
    makers = (gradhpo.ForwardModeOptimizer(problem.inner), gradhpo.ImplicitOptimizer(problem.inner))
    states, rows = [o.init(problem.state.params, h) for o in makers], {}
    warnings.filterwarnings("ignore", "ImplicitOptimizer gives a hypergradient of 0")  # of rates
    for n in range(1, max(counts) + 1):
        pairs = list(zip(makers, states, strict=True))
        if n in counts:
            r, g = (o.compute_hypergradient(s, *arguments)["log_penalty"] for o, s in pairs)
        states = [o.step(s, *arguments, lr_hyper=0.0) for o, s in pairs]
        if n in counts:
            residuals = {"inner residual": "inner_residual", "linear residual": "linear_residual"}
            rows[f"{n}"] = {
                **{k: f"{float(states[1].get_metric(m)):.1e}" for k, m in residuals.items()},
                "relative error": float(jnp.linalg.norm(g - r) / jnp.linalg.norm(r)),
                "cosine": cosine(g, r),
                "length": float(jnp.linalg.norm(g) / jnp.linalg.norm(r)),
            }
    return rows


def descend(params: Any, h: Any, batch: Any) -> Any:
    """Gradient descent whose rate is data, so that a new rate does not recompile."""
    data, rate = batch
    gradients = eqx.filter_grad(lambda params: weighted_loss(params, h, data))(params)
    return eqx.apply_updates(params, jax.tree.map(lambda g: -rate * g, gradients))


@eqx.filter_jit
def largest_curvature(params: Any, h: Any, data: Any) -> Array:
    """By power iteration on the Hessian of the training loss."""
    w, static = eqx.partition(params, eqx.is_inexact_array)
    gradient = jax.grad(lambda w: weighted_loss(eqx.combine(w, static), h, data))

    def body(v: Any, _: None) -> tuple[Any, Array]:
        product = jax.jvp(gradient, (w,), (v,))[1]
        norm = gradhpo.tree_l2_norm(product)
        return jax.tree.map(lambda x: x / norm, product), norm

    return jax.lax.scan(body, jax.tree.map(jnp.ones_like, w), length=50)[1][-1]


def off_the_straight_line(seed: int, rates: list[float]) -> Rows:
    """Example weights of 200 digits, full batches, 20 steps of plain gradient descent."""
    problem = example_weights(seed)
    data = jax.tree.map(lambda x: x[:200], problem.source.arrays)
    train = lambda params, h, batch: weighted_loss(params, h, batch[0])
    settings = {"update_fn": descend, "unroll_steps": STEPS}
    exact = gradhpo.UnrolledOptimizer(**settings)
    others = {
        "DrMAD": gradhpo.DrMADOptimizer(**settings),
        "greedy": gradhpo.GreedyOptimizer(**settings),
        "last step": gradhpo.UnrolledOptimizer(**settings, truncation=1),
        "last 5": gradhpo.UnrolledOptimizer(**settings, truncation=5),
    }
    state, rows = exact.init(problem.state.params, problem.state.hyperparams), {}
    for rate in rates:
        arguments = (state, (data, jnp.asarray(rate)), problem.val, train, unweighted_loss)
        r = exact.compute_hypergradient(*arguments)
        end = exact.step(*arguments, lr_hyper=0.0)
        curvature = rate * float(largest_curvature(end.params, end.hyperparams, data))
        found = {n: cosine(o.compute_hypergradient(*arguments), r) for n, o in others.items()}
        rows[f"{rate:g}"] = {
            "rate x curvature": curvature,
            "training loss": float(end.get_metric("train_loss")),
            **found,
        }
    return rows


def fresh_adam(seed: int, counts: list[int]) -> Rows:
    """The one-step hypergradient compared with itself at another eps_root, along one run."""
    small, large = (optax.adam(3e-3, eps_root=eps) for eps in (1e-16, 1e-8))
    problem, rows = example_weights(seed, small), {}
    makers = [gradhpo.OneStepOptimizer(inner) for inner in (small, large)]
    pair, state = (problem.losses.train_loss, problem.losses.val_loss), problem.state
    for n in range(1, max(counts) + 1):
        arguments = (state, problem.source(n), problem.val, *pair)
        if n in counts:
            first, second = (o.compute_hypergradient(*arguments) for o in makers)
            lengths = [f"{float(gradhpo.tree_l2_norm(g)):.1e}" for g in (first, second)]
            row = dict(zip(("length, 1e-16", "length, 1e-8"), lengths, strict=True))
            rows[f"{n}"] = {**row, "cosine": cosine(first, second)}
        state = makers[0].step(*arguments, lr_hyper=0.0)
    return rows


def picture(tables: dict[str, Rows], path: Path) -> None:
    """Cosine with the exact hypergradient where each algorithm breaks down."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.2 * len(tables), 3.4)
    figure, axes = plt.subplots(1, len(tables), figsize=size, layout="constrained")
    for ax, (title, rows) in zip(axes, tables.items(), strict=True):
        x = range(len(rows))
        columns = [c for c in next(iter(rows.values())) if "cosine" in c]
        columns = columns or ["DrMAD", "greedy", "last step", "last 5"]
        for column in columns:
            ax.plot(x, [row[column] for row in rows.values()], "o-", ms=4, label=column)
        ax.axhline(0, color="0.6", lw=0.8)
        ax.set(title=title.partition(",")[0], xlabel=title.partition("by ")[2], ylim=(-1.05, 1.05))
        ax.set_xticks(x, rows, fontsize=8)
        ax.legend(fontsize=8, loc="lower left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("cosine with the exact hypergradient")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Rows]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and networks (default 0)")
    parser.add_argument("--quick", action="store_true", help="few steps of two of them")
    parser.add_argument("--output", type=Path, default=Path("out/where_algorithms_fail.png"))
    options = parser.parse_args(arguments)
    seed, quick = options.seed, options.quick
    outer_steps = [1, 51] if quick else [1, 1_001, 2_001, 3_001, 3_501, 4_001, 4_501]
    makers = {
        "greedy, by outer step": lambda: greedy_on_cold_restarts(outer_steps),
        "implicit, by inner step": lambda: implicit_before_convergence(
            seed, [5, 20] if quick else [5, 20, 50, 100, 200, 500]
        ),
    }
    if not quick:
        makers |= {
            "DrMAD, by inner learning rate": lambda: off_the_straight_line(
                seed, [0.1, 0.3, 1.0, 1.5, 2.0, 3.0]
            ),
            "one step through a fresh Adam, by inner step": lambda: fresh_adam(
                seed, [1, 2, 5, 20, 100]
            ),
        }
    tables: dict[str, Rows] = {}
    for title, make in makers.items():
        started = time.perf_counter()
        tables[title] = make()
        seconds = time.perf_counter() - started
        print(f"\n{title} ({seconds:.0f} s)\n\n{table(tables[title])}", flush=True)
    picture(tables, options.output)
    return tables


if __name__ == "__main__":
    main()
