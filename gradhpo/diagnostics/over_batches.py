"""Bias against noise: estimates of the hypergradient over many draws of the data."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.draws import redrawn
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.state import BilevelState
from gradhpo.data.source import Batches, Source
from gradhpo.data.sources import as_source
from gradhpo.diagnostics.case import Case, check_horizon, check_optimizers
from gradhpo.diagnostics.compare import another_training, trains_otherwise
from gradhpo.diagnostics.cost import Program, on_device
from gradhpo.diagnostics.noise import HypergradientNoise, Moments, finite_draws, moments_of
from gradhpo.diagnostics.reference import FAILURES, exact_reference, reference_explained
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import without_warnings


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

    An estimator may be biased with little noise, or exact and almost all noise; one batch does not
    tell the two apart. Each of `num_draws` draws has its own training batches and its own
    validation batch, the same for all estimators; all start from `state`. An estimator that draws
    random numbers draws new ones each time: its noise is part of the report, even on fixed batches.

    **Arguments:**

    - `optimizers`: name to optimizer. All must have the inner optimizer (or `update_fn`) that the
        state was made with; outer optimizers do not matter.
    - `state`: where to start: from `init` of any of them, or from the middle of a run.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `train_data`, `val_data`: an [`ArrayData`][gradhpo.ArrayData] or another function
        `index -> batch`, an iterator, or one fixed batch (whose noise is 0).
    - `num_draws`: $n$, at least 2; default 32.
    - `num_steps`: inner steps of the horizon; `None` (the default): as the longest optimizer.
    - `reference`: an optimizer; `None` (the default): the exact hypergradient of the horizon.

    **Returns:** a [report][gradhpo.diagnostics.noise.HypergradientNoise]. With the mean $\bar g$ of
    the draws, the covariance $\Sigma$ between them and the mean $\bar r$ of the reference,

    $$\mathtt{bias} = \frac{\|\bar g - \bar r\|}{\|\bar r\|},\qquad
    \mathtt{signal\_to\_noise}^2 = \frac{\|\bar g\|^2 - \operatorname{tr}\Sigma/n}
    {\operatorname{tr}\Sigma} = \frac{1}{\mathtt{draws\_needed}},$$

    where a negative numerator counts as 0. `report.mean[name]`, `.standard_error[name]`,
    `.bias[name]`, `.signal_to_noise[name]` and `.draws_needed[name]` also exist for the
    `"reference"`; `report.per_leaf` has the same leaf by leaf. `str(report)` is a table,
    `report.plot()` a figure.

    **Raises:** `ValueError` for fewer than two draws, a horizon that is not a multiple of an
    optimizer's inner steps, an iterator that ends too early, or optimizers that
    [`compare_hypergradients`][gradhpo.compare_hypergradients] refuses.

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
        raise ValueError("num_draws must be at least 2: one draw says nothing about noise")
    first = check_optimizers(optimizers)
    everyone = {**optimizers} | ({} if reference is None else {"reference": reference})
    if num_steps is None:
        num_steps = max(optimizer.num_inner_steps for optimizer in everyone.values())
    check_count("num_steps", num_steps)
    check_horizon(everyone, num_steps)
    train = as_source(train_data, "train_data", num_steps)
    val = as_source(val_data, "val_data", None)
    train = _all_of("train_data", train, num_draws)
    val = _all_of("val_data", val, num_draws)
    here = jnp.zeros((), jnp.int32)
    train, val = on_device((train, val))
    batches = train.stack(here, here, num_steps), val.batch(here, here)
    case = Case(state, *batches, losses, num_steps)

    def draws_of(optimizer: BilevelOptimizer) -> tuple[PyTree, float]:
        def over_draws(optimizer, start, train, val):
            def one(i):
                batches = train.stack(i, i, num_steps), val.batch(i, i)
                # A method that draws random numbers gets new ones each time: its noise counts too.
                again = start.update(memory=redrawn(start.memory, i))
                begun = case.begin(optimizer, again, *batches)
                return case.at_end(optimizer, begun, *batches)[:2]

            return jax.lax.map(one, jnp.arange(num_draws, dtype=jnp.int32))

        with without_warnings():
            found = Program(over_draws, optimizer, case.start(optimizer), train, val)()
        found, val_losses = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), found)
        return found, float(np.nanmean(val_losses)) if np.any(np.isfinite(val_losses)) else np.nan

    with reference_explained(given=reference is not None):
        draws, trained = {}, {}
        made = draws_of(
            exact_reference(first, state, num_steps) if reference is None else reference
        )
        draws["reference"], trained["reference"] = made
    names, unseen, failed = leaf_names(state.hyperparams), {}, {}
    for name, optimizer in optimizers.items():
        try:
            with without_warnings():
                seen = case.seen(optimizer)
            draws[name], trained[name] = draws_of(optimizer)
        except FAILURES as error:
            failed[name] = str(error)
            continue
        unseen[name] = tuple(leaf for leaf, s in zip(names, seen, strict=True) if not s)
    finite = {name: finite_draws(tree) for name, tree in draws.items()}
    kept = {name: finite[name] & finite["reference"] for name in draws}

    def moments(trees: Mapping[str, PyTree]) -> dict[str, Moments]:
        of_kept = lambda tree, name: jax.tree.map(lambda x: x[kept[name]], tree)
        return {
            name: moments_of(of_kept(tree, name), of_kept(trees["reference"], name))
            for name, tree in trees.items()
        }

    split = {name: jax.tree.leaves(tree) for name, tree in draws.items()}
    return HypergradientNoise(
        num_draws,
        num_steps,
        overall=moments(draws),
        per_leaf={
            leaf: moments({name: leaves[i] for name, leaves in split.items()})
            for i, leaf in enumerate(names)
        },
        unseen={name: leaves for name, leaves in unseen.items() if leaves},
        nonfinite={name: int(np.sum(~x)) for name, x in kept.items() if not np.all(x)},
        failed=failed,
        remarks={
            name: another_training(loss, trained["reference"])
            for name, loss in trained.items()
            if math.isfinite(loss) and trains_otherwise(loss, trained["reference"])
        },
    )


def _all_of(name: str, source: Source, num_draws: int) -> Batches:
    available = source.draw(num_draws, in_part=False)
    if available < num_draws:
        raise ValueError(
            f"{name} ended after the batches of {available} draws, before "
            f"num_draws={num_draws}: pass gradhpo.iterate(loader), or fewer draws"
        )
    return source.fetch(num_draws)
