"""Where the hypergradient comes from: the share of each inner step, and what methods keep."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.algorithms.shares import StepWeights, short_horizons
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack
from gradhpo.core.exact import check_has_path
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.problem import Problem
from gradhpo.core.reverse import PulledStep, cotangent_at_end, pull_through, through_start
from gradhpo.core.start import pull_start
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.core.wrapper import algorithm_of
from gradhpo.diagnostics.case import Case, check_one_problem
from gradhpo.diagnostics.drawing import draw_horizon
from gradhpo.utils.tables import Report, aligned, number
from gradhpo.utils.tracing import differentiation_explained
from gradhpo.utils.trees import tree_dot
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import without_warnings


_LOOK_AT = "gradhpo.check_hypergradient finds the source"
# Rows of the table in the report's text.
_MOST_ROWS = 12
# Below it, most of the hypergradient comes from the steps that a truncation cuts off.
_LEAST_LENGTH = 0.5


@dataclasses.dataclass(frozen=True, repr=False)
class Horizon(Report):
    r"""What [`explain_horizon`][gradhpo.explain_horizon] found.

    With the contribution $c_t = \alpha_T A_T \cdots A_{t+1} B_t$ of inner step $t$ to the exact
    hypergradient $g = \partial L_{\mathrm{val}}/\partial\lambda + \sum_t c_t$:

    - `share[name]`, shape `[steps]`: $x_t \cdot g/\|g\|^2$, where $x_t$ is what `name` keeps of
        step $t$: `"exact"` ($x_t = c_t$), `"one step"` ($c_T$ at the end, otherwise 0), `"greedy"`
        ($\gamma^{T-t}\alpha_t B_t$) and `"HyperDistill"` ($\theta\gamma^{T-t} v_T$). The shares of
        `"exact"` and `direct_share` add up to 1; a negative share pulls the other way.
    - `share_of_leaf[leaf][name]`: the same within one leaf of the hyperparameters.
    - `direct_share`: the share of $\partial L_{\mathrm{val}}/\partial\lambda$, and of what
      hyperparameters
        do in the inner optimizer's `init`.
    - `norm`, shape `[steps]`: $\|c_t\|$.
    - `cosine_of_last`, shape `[steps]`: at `[K - 1]` the cosine of $g$ with the hypergradient of
        the last K steps alone (`truncation=K`).
    - `length_of_last`, shape `[steps]`: the norm ratio of that truncated hypergradient, its
        length relative to $\|g\|$. If it is far below 1, do not truncate there, even where the
        cosine is close to 1: tuning can end at other values (short-horizon bias).
    - `hypergradient`: $g$.
    """

    share: dict[str, np.ndarray]
    share_of_leaf: dict[str, dict[str, np.ndarray]]
    direct_share: float
    norm: np.ndarray
    cosine_of_last: np.ndarray
    length_of_last: np.ndarray
    hypergradient: PyTree

    @property
    def num_steps(self) -> int:
        """The number of inner steps of the horizon."""
        return len(self.norm)

    def steps_needed(self, cosine: float = 0.99) -> int:
        """The smallest truncation from which the cosine stays at least `cosine` (default 0.99).

        This is about the direction, not the length: if `length_of_last` is far below 1 there, do
        not truncate. Raises `ValueError` if the hypergradient is not finite.
        """
        if not np.all(np.isfinite(self.norm)):
            raise ValueError(f"the hypergradient is not finite; {_LOOK_AT}")
        below = np.flatnonzero(~(self.cosine_of_last >= cosine))
        return min(self.num_steps, int(below[-1]) + 2 if len(below) else 1)

    def __str__(self) -> str:
        if not np.all(np.isfinite(self.norm)):
            return f"The hypergradient of {self.num_steps} inner steps is not finite; {_LOOK_AT}"
        names = list(self.share)
        windows = np.array_split(np.arange(self.num_steps), min(_MOST_ROWS, self.num_steps))
        rows = []
        for window in windows:
            first, last = int(window[0]) + 1, int(window[-1]) + 1
            label = f"{first}" if first == last else f"{first} to {last}"
            sums = [number(float(np.sum(self.share[name][window]))) for name in names]
            rows.append([label, *sums])
        total = [number(float(np.sum(self.share[name]))) for name in names]
        if not np.any(self.share["exact"]) and not self.direct_share:
            return f"The exact hypergradient of {self.num_steps} inner steps is 0"
        return (
            f"Shares of {self.num_steps} inner steps in the exact hypergradient (1 in total, with "
            "the direct term), and what each method keeps of them\n\n"
            + aligned([["inner steps", *names], *rows, ["all", *total]])
            + f"\n\ndirect term {number(self.direct_share)}\nneeded for a cosine of 0.9 with the "
            f"whole: {self._kept(0.9)}; of 0.99: {self._kept(0.99)}{self._warning()}"
        )

    def _kept(self, cosine: float) -> str:
        steps = self.steps_needed(cosine)
        ratio = number(self.length_of_last[steps - 1], 2)
        return f"the last {steps} of {self.num_steps} (norm ratio {ratio})"

    def _warning(self) -> str:
        """Against a truncation that the cosines suggest and the lengths do not."""
        needed = sorted({self.steps_needed(0.9), self.steps_needed(0.99)} - {self.num_steps})
        short = [f"{k}" for k in needed if self.length_of_last[k - 1] < _LEAST_LENGTH]
        if not short:
            return ""
        return (
            f"\ndo not truncate to {' or '.join(short)}: with a norm ratio far below 1, most of "
            "the hypergradient comes from\nearlier steps, and tuning without them can end at other "
            "values (short-horizon bias)"
        )

    def plot(self) -> Any:
        """A `matplotlib` figure: shares by inner step, and cosine by truncation."""
        return draw_horizon(self)


@checked
def explain_horizon(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    greedy_gamma: RealScalarLike = 0.9,
    distill_gamma: RealScalarLike = 0.99,
) -> Horizon:
    r"""What each inner step contributes to the exact hypergradient, and what other methods keep.

    A short-horizon method keeps the last bars of this diagram. If the early ones matter, or point
    the other way, its hypergradient is biased: short-horizon bias, which makes learning rates too
    small.

    **Arguments:**

    - `optimizer`: any; it only defines the inner step, and the number of steps if `train_batch` is
        one batch. Not a `TaskBatched`.
    - `state`: where to start: from `init`, or from the middle of a run.
    - `train_batch`: a [`BatchStack`][gradhpo.BatchStack], whose length is the horizon; or one batch
        for all inner steps of the optimizer.
    - `val_batch`: one validation batch, any pytree of arrays.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `greedy_gamma`, `distill_gamma`: the discounts of greedy and of HyperDistill, in [0, 1].

    **Returns:** a [`Horizon`][gradhpo.diagnostics.horizon.Horizon], with the equations.
    `str(report)` is a table, `report.plot()` a figure. It takes the memory of the exact
    hypergradient without checkpoints, and about twice its time.

    **Raises:** what [`step`][gradhpo.BilevelOptimizer.step] raises; `ValueError` for a discount
    outside [0, 1]; `TypeError` for `TaskBatched`.

    ```python
    train_loss = lambda w, h, batch: jnp.sum(jnp.arange(1.0, 4.0) * (w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), unroll_steps=20)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    report = gradhpo.explain_horizon(optimizer, state, None, None, losses)
    print(report, report.share["exact"][-5:], report.steps_needed(0.99))
    ```

    ??? cite "Reference"

        Wu et al., *Understanding Short-Horizon Bias in Stochastic Meta-Optimization*,
        ICLR 2018, arXiv:1803.02021.
    """
    check_one_problem("explain_horizon", optimizer)
    check_has_path("explain_horizon", algorithm_of(optimizer))
    # A stack has its own length, which need not be that of a step.
    longest = {} if isinstance(train_batch, BatchStack) else {type(optimizer).__name__: optimizer}
    case = Case.create(state, train_batch, val_batch, losses, longest)
    algorithm = algorithm_of(optimizer)
    kept = short_horizons(
        algorithm, float(np.asarray(greedy_gamma)), float(np.asarray(distill_gamma))
    )
    looked_at = lambda *arguments: _contributions(case.problem(*arguments), case.num_steps)
    with without_warnings(), differentiation_explained("explain_horizon"):
        g, direct, before, numbers = case.compile(looked_at, algorithm)()
        estimates = {
            name: case.estimate(x.algorithm)()[0] if any(case.seen(x.algorithm)) else direct
            for name, x in kept.items()
            if x.algorithm is not None
        }
    return _report(g, direct, before, estimates, numbers, kept)


def _contributions(
    problem: Problem, num_steps: int
) -> tuple[PyTree, PyTree, PyTree, dict[str, Array]]:
    """The exact hypergradient, its terms (direct and through `init`), and numbers of every step.

    Goes through the kept states twice: products with the whole hypergradient need it first.
    """
    phi, validation, z, hyperparams = problem
    end, _, kept = phi.rollout(z, hyperparams, 0, num_steps, keep=lambda z: z)
    _, alpha, direct = validation.value_and_grads(end, hyperparams)
    bar = cotangent_at_end(alpha, end, direct)
    way_back = (phi, lambda z, _: z, kept, 0, num_steps, hyperparams, bar)
    at_start = through_start(phi, z, hyperparams, pull_through(*way_back)[0])
    g, before = at_start.hyperparams, pull_start(phi, z, hyperparams, at_start.z)

    def look(step: PulledStep) -> dict[str, Array]:
        after = validation.alpha(step.new_z, hyperparams)
        total = step.bar.hyperparams
        return {
            "exact": _dots(step.term, g),
            "right after": _dots(step.pull(after)[1], g),
            "square": _dots(step.term, step.term),
            "last": _dots(total, g),
            "last square": _dots(total, total),
        }

    return g, direct, before, pull_through(*way_back, look)[1]


def _dots(x: PyTree, y: PyTree) -> Array:
    """Inner products leaf by leaf, shape `[leaves]`."""
    return jnp.stack([tree_dot(a, b) for a, b in _pairs(x, y)])


def _pairs(x: PyTree, y: PyTree) -> Iterator[tuple[Any, Any]]:
    return zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)


def _report(
    g: PyTree,
    direct: PyTree,
    before: PyTree,
    estimates: dict[str, PyTree],
    numbers: dict[str, Array],
    short: dict[str, StepWeights],
) -> Horizon:
    g, direct, before, estimates, by_step = jax.tree.map(
        lambda x: np.asarray(x).astype(np.float64), (g, direct, before, estimates, numbers)
    )
    dots = lambda x: np.array([np.vdot(a, b) for a, b in _pairs(x, g)])  # [leaves]
    squares, directs = dots(g), dots(direct)
    age = np.arange(len(by_step["exact"]))[::-1, None]  # T - t
    kept = {"exact": by_step["exact"]}
    for name, x in short.items():
        terms = dots(estimates[name]) - directs if x.of == "estimate" else by_step[x.of]
        weights = x.weights(age)
        kept[name] = np.where(weights == 0, 0, weights * terms)
    total = squares.sum() or 1.0
    squares = np.where(squares == 0, 1.0, squares)
    with np.errstate(divide="ignore", invalid="ignore"):
        last = by_step["last"].sum(axis=1) / np.sqrt(by_step["last square"].sum(axis=1) * total)
        return Horizon(
            share={name: x.sum(axis=1) / total for name, x in kept.items()},
            share_of_leaf={
                leaf: {name: x[:, i] / squares[i] for name, x in kept.items()}
                for i, leaf in enumerate(leaf_names(g))
            },
            direct_share=float((directs + dots(before)).sum() / total),
            norm=np.sqrt(by_step["square"].sum(axis=1)),
            cosine_of_last=last[::-1],
            length_of_last=np.sqrt(by_step["last square"].sum(axis=1) / total)[::-1],
            hypergradient=g,
        )
