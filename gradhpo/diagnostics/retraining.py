"""Does a hypergradient predict what retraining at other hyperparameters does?"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.measured import without_aux
from gradhpo.core.state import BilevelState
from gradhpo.core.wrapper import algorithm_of
from gradhpo.data.passes import as_passes
from gradhpo.diagnostics.case import check_horizon, check_one_problem
from gradhpo.diagnostics.perturbations import check_perturb
from gradhpo.diagnostics.predictions import estimated
from gradhpo.diagnostics.queries import Setting
from gradhpo.diagnostics.retrain import Blocks
from gradhpo.diagnostics.retraining_kept import kept_in
from gradhpo.diagnostics.retraining_report import RetrainingScore, report_of
from gradhpo.training.segments import is_common
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import beside
from gradhpo.utils.processes import is_shared
from gradhpo.utils.progress import ProgressBar
from gradhpo.utils.settings import check_count, check_tunes
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_leading_axis, check_single_batch
from gradhpo.utils.warn import warn


# Numbers and batches of loaders move between host and device on purpose.
@jax.transfer_guard("allow")
@checked
def retraining_score(
    optimizers: BilevelOptimizer | Mapping[str, Any],
    state: BilevelState,
    train_data: Any,
    queries: PyTree,
    losses: LossFunctions,
    *,
    num_steps: int,
    perturb: Callable,
    num_retrainings: int = 100,
    key: Array,
    block_size: int | None = None,
    directory: str | Path | None = None,
    progress: bool | str = True,
) -> RetrainingScore:
    r"""Measures how well a hypergradient predicts retraining at other hyperparameters.

    It retrains at $\lambda + \Delta_j$ for random changes $\Delta_j$ of the hyperparameters,
    for example without some of the examples. Each time it compares, for every query $q$,

    $$\mathtt{true}_{jq} = L_q(w_T(\lambda + \Delta_j), \lambda + \Delta_j) - L_q(w_T(\lambda),
    \lambda)\quad\text{with}\quad \mathtt{predicted}_{jq} = g_q\cdot\Delta_j,$$

    where $L_q$ is the validation loss of the query and $g_q$ its hypergradient. The score is
    Spearman's rank correlation of the two over the retrainings $j$, as a mean over the queries: 1
    if the hypergradient orders all changes correctly, and about 0 if it tells nothing. With
    example weights and [`leave_out`][gradhpo.leave_out], this is the linear datamodeling score.

    Retrainings are exact: they take the same batches in the same order, and start from the inner
    optimizer's state as it is at $\lambda + \Delta_j$. Estimators follow the inner steps with the
    hyperparameters held fixed, as in [`compare_hypergradients`][gradhpo.compare_hypergradients];
    one with fewer inner steps per `step` gives the estimate of its last `step`. The state is left
    unchanged.

    **Arguments:**

    - `optimizers`: one optimizer, or a dict of name to optimizer; the first of them trains, and all
        must have its inner update. A dict may also hold hypergradients that you have: a tree like
        the hyperparameters, each leaf with one more leading axis, the queries. They may come from
        [`replay(queries=True)`][gradhpo.replay], for training runs of any length.
    - `state`: where training starts: from `init` of one of them, or a later one.
    - `train_data`: a function `index -> batch` such as [`ArrayData`][gradhpo.ArrayData], one batch
        for all steps, or a loader, whose batches are all in memory at once. Inner step t gets batch
        `state.step * num_inner_steps + t`, with the inner steps of the first optimizer.
    - `queries`: validation examples, a batch `[queries, ...]`. `val_loss` gets each as a batch of
        one; PRNG keys of shape `()` are shared.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `num_steps`: inner steps of a training run, T, a multiple of every optimizer's.
    - `perturb`: `(key, hyperparams) -> hyperparams`, the changed hyperparameters, of the same
        structure, shapes and dtypes; JAX must be able to trace it.
    - `num_retrainings`: number of retrainings, at least 3, default 100.
    - `key`: PRNG key of the changes (change j gets `jax.random.fold_in(key, j)`) and of the
        resamples for the intervals.
    - `block_size`: how many runs go on at once, in one compiled program, at least 1. Default
        `None`: up to 32, as many as fit into half of the device's free memory by the compiler's
        figures (2 GiB on a CPU). Results do not depend on it, up to rounding.
    - `directory`: where each block and each estimator's hypergradients are kept once they are done,
        a file for each. A killed call continues from there when it is repeated, with the same
        result bit for bit. A call with more estimators or retrainings continues too, and computes
        only what is new. Default `None`: nothing is kept.
    - `progress`: show a progress bar, which counts inner steps; a string labels it.

    **Returns:** a [report][gradhpo.diagnostics.retraining_report.RetrainingScore]: `.score[name]`,
    `.interval[name]` (95 %, by bootstrap over the retrainings, with the same resamples for all
    estimators), `.per_query[name]` of shape `[queries]`, `.true` and `.predicted[name]` of shape
    `[retrainings, queries]`, and the hypergradients, from which `.most_helpful(query)` and
    `.most_harmful(query)` read examples. `str(report)` is a table, `report.plot()` a figure.

    A retraining that ends with numbers that are not finite is left out and counted; if more than a
    tenth are, a warning says so. `.per_query` is `nan` where a correlation does not exist. If all
    true changes of a query are equal, the mean leaves it out. If all predictions are equal, or some
    are not finite, it counts as 0 in the mean. The score is `nan` if that is so for all queries,
    and the report says why.

    **Raises:** `ValueError` for `num_retrainings` below 3, a `num_steps` that is not a multiple of
    an optimizer's inner steps, no optimizer, hypergradients of other shapes, a `perturb` that
    changes structure, shapes or dtypes, returns the hyperparameters unchanged or ignores its key,
    a `directory` that holds something else, a state that several processes share, and as
    [`step`][gradhpo.BilevelOptimizer.step] for losses and batches; `TypeError` for an optimizer
    with several inner problems, or an iterator as `train_data`.

    ```python
    x = jax.random.normal(jax.random.key(0), (60, 3))
    y = x @ jnp.array([1.0, -1.0, 0.5]) + jax.random.normal(jax.random.key(1), (60,))
    train_loss = lambda w, weights, _: jnp.mean(weights * (x[:50] @ w - y[:50]) ** 2)
    val_loss = lambda w, weights, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    inner = optax.sgd(0.1)
    optimizers = {
        "exact": gradhpo.UnrolledOptimizer(inner, unroll_steps=20),
        "one step": gradhpo.OneStepOptimizer(inner),
    }
    report = gradhpo.retraining_score(
        optimizers,
        optimizers["exact"].init(jnp.zeros(3), jnp.ones(50)),
        None,
        (x[50:], y[50:]),
        gradhpo.LossFunctions(train_loss, val_loss),
        num_steps=20,
        perturb=gradhpo.leave_out(0.04),
        num_retrainings=20,
        key=jax.random.key(2),
        progress=False,
    )
    print(report)
    assert report.score["exact"] > 0.9
    ```

    ??? cite "Reference"

        Ilyas et al., *Datamodels: Predicting Predictions from Training Data*, ICML 2022,
        arXiv:2202.00622; Park et al., *TRAK: Attributing Model Behavior at Scale*, ICML 2023,
        arXiv:2303.14186, for the linear datamodeling score.
    """
    named = _named(optimizers)
    own = {name: x for name, x in named.items() if isinstance(x, BilevelOptimizer)}
    for optimizer in own.values():
        check_one_problem("retraining_score", optimizer)
        check_tunes(optimizer)
    check_count("num_steps", num_steps)
    check_horizon(own, num_steps)
    check_count("num_retrainings", num_retrainings)
    if num_retrainings < 3:
        raise ValueError(
            f"num_retrainings={num_retrainings} gives no rank correlation: pass at least 3; "
            "intervals of 0.1 take about 100"
        )
    if block_size is not None:
        check_count("block_size", block_size)
    check_single_batch(queries, "queries")
    queries = as_batch(queries, "queries")
    check_leading_axis(
        eqx.filter(queries, lambda x: not is_common(x)),
        "retraining_score takes the queries along axis 0 of every array (constants belong in the "
        "loss), and queries",
    )
    state = without_aux(state)
    if is_shared(state):
        raise ValueError(
            f"retraining_score runs in one process, but the state is shared by "
            f"{jax.process_count()}: pass, in each of them, a state of that process alone"
        )
    key = key if is_key(key) else jax.random.wrap_key_data(key)
    if key.ndim:
        raise ValueError(f"key must be one key such as jax.random.key(0), got shape {key.shape}")
    # Keys of some kinds fold differently under `vmap`.
    keys = jax.lax.map(lambda number: jax.random.fold_in(key, number), np.arange(num_retrainings))
    keys = beside(keys, state)
    check_perturb(perturb, keys, state.hyperparams)
    first = algorithm_of(next(iter(own.values())))
    passes = as_passes(train_data, first.num_inner_steps)
    setting = Setting(passes.part(0, num_steps), queries, losses, state.step, num_steps)
    kept = kept_in(directory, first, state, passes.source, setting, perturb, keys)
    total = num_steps * (len(own) + 1 + num_retrainings)
    with (
        contextlib.closing(kept),
        ProgressBar(total, shown=progress, call="gradhpo.retraining_score") as bar,
    ):
        found = estimated(named, state, setting, bar, kept)
        start = first._adopt(state, keep_memory=True)
        blocks = Blocks(first, start, setting, perturb, keys, block_size, kept)
        retrained = blocks.run(bar, num_steps)
    predicted = found.predict(perturb, keys, state.hyperparams)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    report = report_of(found, predicted, retrained, random, num_steps)
    if 10 * len(report.nonfinite) > num_retrainings:
        warn(f"retraining_score: {report.on_nonfinite()}", RuntimeWarning)
    return report


def _named(optimizers: Any) -> dict[str, Any]:
    """Optimizers by name, and hypergradients that were given."""
    if isinstance(optimizers, BilevelOptimizer):
        return {type(optimizers).__name__: optimizers}
    if not any(isinstance(x, BilevelOptimizer) for x in optimizers.values()):
        raise ValueError(
            "optimizers has no optimizer to train with: pass one, or a dict of name to optimizer"
        )
    return dict(optimizers)
