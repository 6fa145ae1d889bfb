"""The exact hypergradient of a whole training run, in compiled segments driven from the host."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.checkpoints import square_root
from gradhpo.core.exact import ExactHypergradient, check_has_path, with_its_update
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.measured import without_aux
from gradhpo.core.metadata import placed_nan
from gradhpo.core.state import BilevelState, inner_state, with_inner_state, with_metrics
from gradhpo.core.vanishing import explain_zeros
from gradhpo.data.passes import as_passes
from gradhpo.data.sources import Feed, as_source
from gradhpo.training.boundaries import Boundaries, InDirectory, InMemory
from gradhpo.training.identity import identity
from gradhpo.training.rewind import Diverged, Rewind
from gradhpo.training.segments import Training, is_common, measured
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.description import described, described_arrays
from gradhpo.utils.placement import beside, settled
from gradhpo.utils.processes import check_alike, check_shared, is_first, is_shared
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_leading_axis, check_single_batch
from gradhpo.utils.warn import muted, warn


@dataclasses.dataclass(frozen=True)
class Replay:
    """What [`replay`][gradhpo.replay] returns.

    **Fields:**

    - `hypergradient`: a tree like the hyperparameters; with `queries=True` each leaf has one more
        leading axis, `[queries, ...]`.
    - `state`: the state at the end of training, with the hyperparameters of the start; its `step`
        has advanced by the outer steps that `num_steps` inner steps make, rounded down.
    - `report`: a few sentences on how it went.

    ```python
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1))
    replayed = gradhpo.replay(
        optimizer, optimizer.init(jnp.ones(3), jnp.zeros(3)), None, None,
        gradhpo.LossFunctions(loss, loss), num_steps=10, progress=False,
    )
    assert replayed.state.step == 10 and replayed.report.startswith("10 inner steps")
    ```
    """

    hypergradient: PyTree
    state: BilevelState
    report: str

    def __repr__(self) -> str:
        return f"Replay({self.report})"


# Numbers and batches of loaders move between host and device on purpose.
@jax.transfer_guard("allow")
@checked
def replay(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_data: Any,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    num_steps: int,
    segment: int | None = None,
    store: str | Path | None = None,
    queries: bool = False,
    progress: bool | str = True,
    data_sharding: NamedSharding | None = None,
) -> Replay:
    r"""The exact hypergradient of a whole training run of any length.

    It trains for `num_steps` inner steps at fixed hyperparameters, keeps the state at the start of
    each segment, and then goes back, segment by segment: each runs forward once more, and the
    cotangent is pulled through it. The result is that of
    [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer] with `unroll_steps=num_steps`, for twice the
    forward work. The device holds the states of one segment; the number of steps is limited by
    what `store` can hold, and the compile time does not depend on it.

    **Arguments:**

    - `optimizer`: any algorithm on one inner problem; only its `inner_optimizer`, `grad_fn` and
        `update_fn` are used.
    - `state`: where training starts, from `init` or a later one.
    - `train_data`: a function `index -> batch` such as [`ArrayData`][gradhpo.ArrayData] (inner step
        t gets batch `state.step * optimizer.num_inner_steps + t`); one batch for all steps; or a
        loader, from which `iter` makes a new iterator that yields the same batches again on the way
        back. A loader that cannot seek (see [`iterate`][gradhpo.iterate]) is read from its start
        for every segment.
    - `val_batch`: one validation batch.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `num_steps`: *inner* steps to take, T, at least 1.
    - `segment`: inner steps in a segment, default $\lceil\sqrt T\rceil$. The device holds as many
        states, and `store` T / `segment` of them.
    - `store`: where the states between segments are kept. `None`, the default: in the memory of the
        host. A directory: one file for each, and a replay that was killed continues when it is
        called again, with the same result bit for bit.
    - `queries`: one hypergradient for each validation example, all in the same pass. `val_loss`
        gets each example as a batch of one; PRNG keys of shape `()` are shared. Default `False`.
    - `progress`: show a progress bar, which counts every step twice; a text is its label.
    - `data_sharding`: how the arrays of every training batch are spread over devices, such as
        `NamedSharding(mesh, PartitionSpec("data"))`, which divides the examples. Default `None`:
        every device gets whole batches, unless your function of the index spreads them. Where
        several processes share the state, each passes its part of every batch, and with loaders
        this argument is required.

    **Returns:** a [`Replay`][gradhpo.Replay]. If training diverges, the replay stops there: the
    hypergradient is `nan`, and the report and a warning say where.

    **Raises:** `ValueError` for a `num_steps` or `segment` below 1 or a `segment` above
    `num_steps`, an optimizer with several inner problems, a directory that holds another replay, a
    loader that yields other batches on the way back, and as [`step`][gradhpo.BilevelOptimizer.step]
    for losses and batches; `TypeError` for an iterator as `train_data`.

    ```python
    train_loss = lambda w, h, batch: jnp.mean((w - h) ** 2 * batch)
    val_loss = lambda w, h, batch: jnp.mean((w - 1.0) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1, momentum=0.9))
    replayed = gradhpo.replay(
        optimizer,
        optimizer.init(jnp.zeros(3), jnp.zeros(3)),
        gradhpo.ArrayData(jnp.ones((10, 3)), batch_size=5, key=jax.random.key(0)),
        None,
        gradhpo.LossFunctions(train_loss, val_loss),
        num_steps=1_000,
        progress=False,
    )
    assert replayed.hypergradient.shape == (3,)
    ```

    ??? cite "Reference"

        Engstrom et al., *Optimizing ML Training with Metagradient Descent*, 2025,
        arXiv:2503.13751, for metagradients of whole runs by replay; segments: Griewank and Walther,
        *Evaluating Derivatives*, SIAM 2008, chapter 12.
    """
    if not isinstance(optimizer, Algorithm):
        raise ValueError(
            f"replay takes an algorithm on one inner problem, and {type(optimizer).__name__} runs "
            "several: pass the optimizer inside it, with the state of one problem"
        )
    check_has_path("replay", optimizer)
    check_count("num_steps", num_steps)
    if segment is not None:
        check_count("segment", segment, most=num_steps)
    check_single_batch(val_batch, "val_batch")
    val_batch = as_batch(val_batch, "val_batch")
    if queries:
        check_leading_axis(
            eqx.filter(val_batch, lambda x: not is_common(x)),
            "replay(queries=True) takes the examples of val_batch along axis 0 of every array "
            "(constants belong in the loss), and val_batch",
        )
    optimizer._check_inner_state(without_aux(state))
    shared = is_shared(state)
    if shared:
        about = {"num_steps": num_steps, "segment": segment, "queries": queries}
        check_alike(**about, optimizer=described(optimizer), store=store is not None)
    passes = as_passes(train_data, optimizer.num_inner_steps, data_sharding, shared)
    # What is compiled must not depend on their number, only on whether there are several.
    exact = with_its_update(optimizer, min(num_steps, 2))
    training = Training(exact, losses, val_batch, queries)
    at_start = beside(exact._adopt(without_aux(state), keep_memory=True), state)
    segment = square_root(num_steps) if segment is None else segment
    first = passes.part(0, min(segment, num_steps))
    check_shared(at_start, train_data=jax.tree.leaves(first.batches), val_batch=val_batch)
    at_start = settled(at_start, (first, val_batch))
    training.check(at_start, first)
    if store is None:
        kept: Boundaries = InMemory()
    else:
        feed = Feed(passes.source, as_source(val_batch, "val_batch", None))
        settings = {"num_steps": num_steps, "segment": segment, "queries": queries}
        about = identity(exact, at_start, feed, None, None, **settings)
        about["losses"] = described_arrays(training.responses(at_start, first))
        kept = InDirectory(Path(store), about, shared)
    shown = progress if is_first(shared) else False
    with contextlib.closing(kept), muted(not is_first(shared)):
        ways = Rewind(training, passes, first, kept, at_start, num_steps, segment, shown)
        try:
            found, where = ways.go(), ""
        except Diverged:
            lead = _num_queries(val_batch) if queries else ()
            with jax.debug_nans(False):
                nan = lambda x: jnp.full((*lead, *x.shape), jnp.nan)
                found = jax.tree.map(nan, state.hyperparams)
            where = (
                f"Training diverged: parameters are not finite after inner step {ways.at:,} (or up "
                f"to {segment} steps earlier), so the hypergradient is nan."
            )
    cast = lambda x, like: x.astype(like.dtype)
    found = jax.tree.map(cast, found, state.hyperparams)
    end = with_inner_state(without_aux(state), inner_state(ways.state))
    end = dataclasses.replace(end, step=state.step + ways.at // optimizer.num_inner_steps)
    param_norm, norm, moving, is_finite = measured(inner_state(end).w, found)
    metrics = {
        "train_loss": ways.loss,
        "val_loss": jnp.mean(ways.val_loss),
        "hypergrad_norm": placed_nan(norm.dtype) if queries else norm,
        "param_norm": param_norm,
    }
    kinds = {name: state.metadata[name] for name in metrics}
    end = beside(with_metrics(end, jax.tree.map(cast, metrics, kinds)), state)
    remark = where or _remark(exact, state, moving, bool(is_finite))
    report = " ".join(filter(None, [ways.report(), remark]))
    if remark and is_first(shared):
        warn(f"replay: {remark}", RuntimeWarning)
    return Replay(found, end, report)


def _num_queries(val_batch: PyTree) -> tuple[int]:
    return (next(x for x in jax.tree.leaves(val_batch) if not is_common(x)).shape[0],)


def _remark(exact: ExactHypergradient, state: BilevelState, moving: Array, is_finite: bool) -> str:
    """What is wrong with a hypergradient, if anything is."""
    if not is_finite:
        return (
            "The hypergradient is not finite although training is: gradhpo.check_hypergradient "
            "finds the first step whose derivative is not."
        )
    zeros = np.flatnonzero(~np.asarray(moving)).tolist()
    return explain_zeros(exact, state, zeros) + "." if zeros else ""
