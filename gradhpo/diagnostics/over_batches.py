"""Bias against noise: estimates of the hypergradient over many draws of the data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFunctions
from gradhpo.diagnostics.case import (
    FAILURES,
    Case,
    check_horizon,
    check_optimizers,
    estimate_along,
    start_of_episode,
)
from gradhpo.diagnostics.cost import Program
from gradhpo.diagnostics.drawing import draw_noise
from gradhpo.diagnostics.tables import aligned, number
from gradhpo.training.sources import Host, as_source
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked, without_warnings
from gradhpo.utils.validation import leaf_names


@dataclasses.dataclass(frozen=True)
class Moments:
    r"""Of one estimate over draws of the data; lengths are relative to $\|\bar r\|$.

    With $\bar g$ the mean, $\Sigma$ the covariance between draws, and $\bar r$ the mean of the
    reference:

    - `mean`, `standard_error`: trees like the hyperparameters; the error is that of the mean.
    - `cosine`: of $\bar g$ with $\bar r$.
    - `bias`: $\|\bar g - \bar r\|/\|\bar r\|$, and `bias_error`, the length of its standard
        error: a bias below it is none that these draws can show.
    - `noise`: $\sqrt{\operatorname{tr}\Sigma}/\|\bar r\|$, of a single draw.
    - `signal_to_noise`: $\|\mathrm{E}\,g\|/\sqrt{\operatorname{tr}\Sigma}$ of a single draw,
        $\|\mathrm{E}\,g\|^2$ estimated without bias by
        $\|\bar g\|^2 - \operatorname{tr}\Sigma/n$.
    - `draws_needed`: the square of its inverse, so many draws averaged (or batches so many times
        as large) have as much signal as noise; `inf` where no signal was found.
    """

    mean: PyTree
    standard_error: PyTree
    cosine: float
    bias: float
    bias_error: float
    noise: float
    signal_to_noise: float
    draws_needed: float


@dataclasses.dataclass(frozen=True)
class HypergradientNoise:
    """What [`compare_over_batches`][gradhpo.compare_over_batches] found.

    **Fields:** `overall`, name of the optimizer (and `"reference"`) to its
    [moments][gradhpo.diagnostics.over_batches.Moments]; `per_leaf`, leaf of the hyperparameters
    to the same; `failed`, why an optimizer does not work on this problem; `num_draws`,
    `num_steps`. `mean`, `standard_error`, `signal_to_noise`, `bias`, `draws_needed` are those of
    `overall` by name.
    """

    num_draws: int
    num_steps: int
    overall: dict[str, Moments]
    per_leaf: dict[str, dict[str, Moments]]
    failed: dict[str, str]

    @property
    def mean(self) -> dict[str, PyTree]:
        return {name: x.mean for name, x in self.overall.items()}

    @property
    def standard_error(self) -> dict[str, PyTree]:
        return {name: x.standard_error for name, x in self.overall.items()}

    @property
    def signal_to_noise(self) -> dict[str, float]:
        return {name: x.signal_to_noise for name, x in self.overall.items()}

    @property
    def bias(self) -> dict[str, float]:
        return {name: x.bias for name, x in self.overall.items()}

    @property
    def draws_needed(self) -> dict[str, float]:
        return {name: x.draws_needed for name, x in self.overall.items()}

    def __str__(self) -> str:
        head = ["", "cosine", "bias", "noise", "signal/noise", "draws needed"]
        rows = [
            [
                name,
                number(x.cosine),
                f"{number(x.bias)} ± {number(x.bias_error)}",
                number(x.noise),
                number(x.signal_to_noise),
                number(x.draws_needed, 1),
            ]
            for name, x in self.overall.items()
        ]
        text = (
            f"Hypergradients after {self.num_steps} inner steps over {self.num_draws} draws of the "
            "data; bias and noise in lengths of the reference's mean; draws needed: averaged, or "
            "in batches so many times as large, they have as much signal as noise\n\n"
        )
        notes = [f"{name}: {why}" for name, why in self.failed.items()]
        return "\n\n".join([text + aligned([head, *rows]), *notes])

    def plot(self) -> Any:
        """A `matplotlib` figure: squared error split into bias and variance."""
        return draw_noise(self)


@checked
def compare_over_batches(
    optimizers: Mapping[str, BilevelOptimizer],
    state: BilevelState,
    train_data: Any,
    val_data: Any,
    losses: LossFunctions,
    *,
    num_draws: int = 32,
    num_steps: int | None = None,
    reference: BilevelOptimizer | None = None,
) -> HypergradientNoise:
    r"""Bias and noise of every estimator, over draws of the training and validation batches.

    A biased estimator with little noise and an exact one that is nearly all noise both exist; one
    batch does not tell them apart. Each of `num_draws` draws has its own training batches and
    its own validation batch, the same ones for all estimators; all start from `state`.

    **Arguments:**

    - `optimizers`, `state`, `losses`: as for
        [`compare_hypergradients`][gradhpo.compare_hypergradients].
    - `train_data`, `val_data`: sources as for [`run`][gradhpo.run]: an
        [`ArrayData`][gradhpo.ArrayData] or another function `index -> batch`, an iterator, or
        one fixed batch (whose noise is 0).
    - `num_draws`: at least 2.
    - `num_steps`: inner steps of the horizon; `None`: those of the longest optimizer.
    - `reference`: an optimizer; `None`: the exact hypergradient of the horizon.

    **Returns:** a report. `report.mean[name]`, `.standard_error[name]`, `.bias[name]`,
    `.signal_to_noise[name]` and `.draws_needed[name]`, also for the `"reference"`; the same leaf
    by leaf in `report.per_leaf`. `str(report)` is a table, `report.plot()` a figure.

    **Raises:** `ValueError` for fewer than two draws, a horizon that an optimizer does not
    divide, or an iterator that ends too early.

    ```python
    loss = lambda w, h, batch: jnp.mean((w - h - batch) ** 2)
    val_loss = lambda w, h, batch: jnp.mean((w - batch) ** 2)
    x = jax.random.normal(jax.random.key(0), (100,))
    data = gradhpo.ArrayData(x, batch_size=10, key=jax.random.key(1))
    inner = optax.sgd(0.1)
    optimizers = {"one step": gradhpo.OneStepOptimizer(inner)}
    state = optimizers["one step"].init(jnp.zeros(()), jnp.ones(()))
    losses = gradhpo.LossFunctions(loss, val_loss)
    report = gradhpo.compare_over_batches(optimizers, state, data, x, losses, num_steps=10)
    print(report)
    ```

    ??? cite "Reference"

        Signal and noise of a gradient as in McCandlish et al., *An Empirical Model of
        Large-Batch Training*, 2018, arXiv:1812.06162, section 2.2.
    """
    check_count("num_draws", num_draws)
    if num_draws < 2:
        raise ValueError("num_draws must be at least 2: one draw says nothing of noise")
    first = check_optimizers(optimizers)
    everyone = {**optimizers} | ({} if reference is None else {"reference": reference})
    if num_steps is None:
        num_steps = max(optimizer.num_inner_steps for optimizer in everyone.values())
    check_count("num_steps", num_steps)
    check_horizon(everyone, num_steps)
    pair = losses.train_loss, losses.val_loss
    train = as_source(train_data, "train_data", num_steps)
    val = as_source(val_data, "val_data", None)
    train, val = (_all_of(source, num_draws) for source in (train, val))
    exact = reference or Case(state, None, None, *pair, num_steps).exact(first)

    def draws_of(optimizer: BilevelOptimizer) -> PyTree:
        def over_draws(optimizer, start, train, val):
            def one(i):
                batches = train.stack(i, i, num_steps), val.batch(i, i)
                arguments = (*batches, *pair, num_steps)
                return estimate_along(optimizer, start, *arguments)[0]

            return jax.lax.map(one, jnp.arange(num_draws, dtype=jnp.int32))

        with without_warnings():
            found = Program(over_draws, optimizer, start_of_episode(optimizer, state), train, val)()
        return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), found)

    draws, failed = {"reference": draws_of(exact)}, {}
    for name, optimizer in optimizers.items():
        try:
            draws[name] = draws_of(optimizer)
        except FAILURES as error:
            failed[name] = str(error)
    leaves = {name: jax.tree.leaves(tree) for name, tree in draws.items()}
    rows = [[x[i] for x in leaves.values()] for i in range(len(leaves["reference"]))]
    per_leaf = {
        leaf: {name: _moments(x, row[0]) for name, x in zip(leaves, row, strict=True)}
        for leaf, row in zip(leaf_names(state.hyperparams), rows, strict=True)
    }
    overall = {name: _moments(tree, draws["reference"]) for name, tree in draws.items()}
    return HypergradientNoise(num_draws, num_steps, overall, per_leaf, failed)


def _all_of(source: Any, num_draws: int) -> Any:
    if not isinstance(source, Host):
        return source
    fetched, available = source.fetch(num_draws)
    if fetched is None or available < num_draws:
        raise ValueError(
            f"{source.name} ended after the batches of {available} draws; num_draws={num_draws} "
            "were asked for: pass gradhpo.iterate(loader), or fewer draws"
        )
    return fetched


def _moments(draws: PyTree, reference: PyTree) -> Moments:
    """Of trees whose leaves have one more leading axis, the draws."""
    g, r = _rows(draws), _rows(reference)
    count = len(g)
    mean, expected = g.mean(axis=0), r.mean(axis=0)
    length, expected_length = np.linalg.norm(mean), np.linalg.norm(expected)
    variance = np.sum(g.var(axis=0, ddof=1))
    signal = max(mean @ mean - variance / count, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Moments(
            mean=jax.tree.map(lambda x: x.mean(axis=0), draws),
            standard_error=jax.tree.map(lambda x: x.std(axis=0, ddof=1) / np.sqrt(count), draws),
            cosine=float(np.float64(mean @ expected) / (length * expected_length)),
            bias=float(np.linalg.norm(mean - expected) / expected_length),
            bias_error=float(
                np.sqrt(np.sum((g - r).var(axis=0, ddof=1)) / count) / expected_length
            ),
            noise=float(np.sqrt(variance) / expected_length),
            signal_to_noise=float(np.sqrt(signal / variance)),
            draws_needed=float(variance / np.float64(signal)),
        )


def _rows(draws: PyTree) -> np.ndarray:
    leaves = jax.tree.leaves(draws)
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
