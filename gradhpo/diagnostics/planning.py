"""What will fit: flops and memory of a step, from compiling it without running it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.measured import without_aux
from gradhpo.core.state import BilevelState
from gradhpo.core.wrapper import algorithm_of, rewrapped
from gradhpo.diagnostics.case import check_optimizers
from gradhpo.diagnostics.cost import Cost, Program
from gradhpo.diagnostics.reference import FAILURES
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.settings import check_count
from gradhpo.utils.tables import OPEN_LOOPS, Report, aligned, bytes_of, flops_of
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import without_warnings


@dataclasses.dataclass(frozen=True)
class Planned:
    """One optimizer at one horizon.

    - `name`, `num_steps`: the optimizer, and its inner steps per `step`.
    - `optimizer`: ready for use, with the chosen `checkpoints` and `store`.
    - `cost`: of a `step`; `None` if it does not work, and `failed` says why.
    - `fits`: whether `max_bytes` is enough; `None` if no limit was given.
    - `rejected`: total bytes with the settings that were tried before the chosen ones, such as
        `{"as it is": 6_900_000, "checkpoints='sqrt'": 880_000}`.
    - `recomputes`: whether second-derivative products recompute the activations of the training
        loss instead of keeping them: if it has a `jax.checkpoint`, or computes more than 256 MiB of
        intermediate values.
    """

    name: str
    num_steps: int
    optimizer: BilevelOptimizer
    cost: Cost | None
    fits: bool | None
    failed: str = ""
    recomputes: bool = False
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def checkpoints(self) -> Any:
        """The `checkpoints` of an `UnrolledOptimizer`, otherwise `None`."""
        return algorithm_of(self.optimizer).memory_settings.get("checkpoints")


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Report):
    """What [`plan`][gradhpo.plan] found: `rows`, and `plan[name, steps]` for one of them.

    Another name or horizon raises `KeyError`; `max_bytes` is the given limit.
    """

    rows: tuple[Planned, ...]
    max_bytes: int | None

    def __getitem__(self, key: Any) -> Planned:
        if not isinstance(key, tuple) or len(key) != 2:
            raise KeyError(f"{key!r}: write plan[name, inner steps]")
        name, num_steps = key
        for row in self.rows:
            if (row.name, row.num_steps) == (name, num_steps):
                return row
        raise KeyError(f"{key}: available: {[(row.name, row.num_steps) for row in self.rows]}")

    def __str__(self) -> str:
        head = [
            "",
            "inner steps",
            "flops",
            "per inner step",
            "temporary",
            "batches and state",
            "total",
            "",
        ]
        rows, notes = [], []
        for row in self.rows:
            if row.cost is None:
                rows.append([row.name, str(row.num_steps), *[""] * 5, "does not work here"])
                notes.append(f"{row.name}: {row.failed}")
                continue
            sign = {"at_least": row.cost.at_least}
            remark = {None: "", True: "fits", False: "does not fit"}[row.fits]
            settings = _settings_of(algorithm_of(row.optimizer))
            remarks = [text for text in (remark, settings) if text]
            if row.rejected:
                took = (f"{bytes_of(x)} {with_what}" for with_what, x in row.rejected.items())
                notes.append(f"{row.name}, {row.num_steps} inner steps: {', '.join(took)}")
            if row.recomputes:
                remarks.append("recomputes activations")
            rows.append([
                row.name,
                str(row.num_steps),
                flops_of(row.cost.flops, **sign),
                flops_of(row.cost.flops / row.num_steps, **sign),
                bytes_of(row.cost.temporary_bytes),
                bytes_of(row.cost.total_bytes - row.cost.temporary_bytes),
                bytes_of(row.cost.total_bytes),
                ", ".join(remarks),
            ])  # fmt: skip
        limit = "" if self.max_bytes is None else f"; {bytes_of(self.max_bytes)} available"
        if any(row.cost is not None and row.cost.at_least for row in self.rows):
            notes.append(OPEN_LOOPS)
        head_line = f"One step of each, compiled but not run{limit}"
        return "\n\n".join([head_line, aligned([head, *rows]), *dict.fromkeys(notes)])


@checked
def plan(
    optimizers: Mapping[str, BilevelOptimizer],
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    horizons: Sequence[int] = (),
    max_bytes: int | None = None,
) -> Plan:
    """What a step of each optimizer costs at each horizon, without running anything.

    Every step is compiled for the shapes that are passed. Memory is the compiler's own figure for
    the program that a `step` then runs; flops are its count for that program before optimisation,
    multiplied by the trip counts of loops. Of a conditional's branches the most expensive one
    counts, so the figure for `checkpoints="log"`, which chooses at every visit, is too high.

    **Arguments:**

    - `optimizers`: name to optimizer.
    - `state`: from `init` of any of them.
    - `train_batch`: one batch, or a [`BatchStack`][gradhpo.BatchStack], whose length does not
        matter: each horizon takes the length that it needs.
    - `val_batch`: one validation batch.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions].
    - `horizons`: inner steps per `step` to try, in `unroll_steps` or `inner_steps`; optimizers
        without such a setting appear once. If empty, every optimizer keeps its own number.
    - `max_bytes`: the available memory, for arguments, results and temporaries together. An
        `UnrolledOptimizer` that does not fit is tried with `checkpoints="sqrt"` (one more training
        gradient per step, the least memory of any number of segments), then with `"log"`, then with
        `store="host"` if the host's memory is separate. If nothing fits, the plan shows the one
        with the least memory.

    **Returns:** a [`Plan`][gradhpo.diagnostics.planning.Plan]: `plan[name, steps].cost.flops`,
    `.cost.temporary_bytes`, `.fits`, `.checkpoints`, and `.optimizer`, ready for use; `.failed`
    if an optimizer does not work, at all or at this horizon. `str(plan)` is a table.

    **Raises:** `ValueError` for horizons or `max_bytes` below 1, and for optimizers that
    [`compare_hypergradients`][gradhpo.compare_hypergradients] refuses.

    ```python
    loss = lambda w, h, batch: jnp.sum(jnp.cosh(w - h))
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    inner = optax.sgd(0.1)
    optimizers = {
        "exact": gradhpo.UnrolledOptimizer(inner),
        "greedy": gradhpo.GreedyOptimizer(inner),
    }
    state = optimizers["exact"].init(jnp.zeros(1000), jnp.zeros(1000))
    losses = gradhpo.LossFunctions(loss, val_loss)
    plan = gradhpo.plan(
        optimizers, state, None, None, losses, horizons=[10, 1_000], max_bytes=2**20
    )
    print(plan)
    assert plan["exact", 10].checkpoints is None and plan["exact", 1_000].checkpoints == "sqrt"
    ```
    """
    check_optimizers(optimizers)
    for horizon in horizons:
        check_count("horizons", horizon)
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
    batches = as_batch(train_batch, "train_batch"), as_batch(val_batch, "val_batch")
    problem = (state, *batches, losses, max_bytes)
    rows = [
        _planned(name, optimizer, horizon, *problem)
        for name, optimizer in optimizers.items()
        for horizon in (horizons if horizons and _has_horizon(optimizer) else [None])
    ]
    return Plan(tuple(rows), max_bytes)


def _planned(
    name: str,
    optimizer: BilevelOptimizer,
    horizon: int | None,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    max_bytes: int | None,
) -> Planned:
    """One optimizer at one horizon, with less memory and more work if it does not fit."""
    num_steps = optimizer.num_inner_steps if horizon is None else horizon
    algorithm = algorithm_of(optimizer)
    try:
        chosen = algorithm if horizon is None else algorithm.with_num_steps(horizon)
        assert chosen is not None  # `plan` checks this first
        if horizon is not None and chosen.num_inner_steps != horizon:
            raise ValueError(
                f"{type(chosen).__name__}.with_num_steps({horizon}) takes {chosen.num_inner_steps} "
                "inner steps per step"
            )
        rejected: dict[str, int] = {}
        costs = lambda algorithm: _cost_of_step(
            rewrapped(optimizer, algorithm), state, train_batch, val_batch, losses
        )
        cost, recomputes = costs(chosen)
        if max_bytes is not None:
            cost_of = lambda smaller: costs(smaller)[0]
            chosen, cost, rejected = _that_fits(chosen, cost, max_bytes, cost_of)
    except FAILURES as error:
        return Planned(name, num_steps, optimizer, None, None, str(error))
    fits = None if max_bytes is None else cost.total_bytes <= max_bytes
    chosen = rewrapped(optimizer, chosen)
    return Planned(name, num_steps, chosen, cost, fits, recomputes=recomputes, rejected=rejected)


def _that_fits(
    algorithm: Algorithm, cost: Cost, max_bytes: int, cost_of: Callable[[Algorithm], Cost]
) -> tuple[Algorithm, Cost, dict[str, int]]:
    """The first that fits of the algorithm and its variants with less memory, or the smallest.

    Also returns what the others take.
    """
    named = lambda algorithm: _settings_of(algorithm) or "as it is"
    best, smaller = (algorithm, cost), algorithm.with_less_memory()
    tried = {named(algorithm): cost.total_bytes}
    while smaller is not None and best[1].total_bytes > max_bytes:
        with contextlib.suppress(*FAILURES):  # the algorithm's own failure is known
            found = cost_of(smaller)
            tried[named(smaller)] = found.total_bytes
            if found.total_bytes < best[1].total_bytes:
                best = smaller, found
        smaller = smaller.with_less_memory()
    tried.pop(named(best[0]))
    return *best, tried


def _settings_of(algorithm: Algorithm) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in algorithm.memory_settings.items())


def _cost_of_step(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
) -> tuple[Cost, bool]:
    """The cost, and whether second-derivative products recompute activations."""
    rate = jnp.zeros(()) if optimizer.outer_optimizer is None else None
    with without_warnings():
        state = optimizer._adopt(without_aux(state), keep_memory=True)
        stack = _stack_of(train_batch, optimizer.num_inner_steps)
        inputs = Inputs(state, stack, val_batch, losses)
        found = []

        def advance(optimizer: BilevelOptimizer, inputs: Inputs, rate: Any) -> BilevelState:
            found.append(optimizer._recomputes(inputs))
            return optimizer._advance(inputs, rate).state

        return Program(advance, optimizer, inputs, rate).cost, found[0]


def _has_horizon(optimizer: BilevelOptimizer) -> bool:
    """Whether the number of inner steps per `step` can change."""
    algorithm = algorithm_of(optimizer)
    return algorithm.with_num_steps(algorithm.num_inner_steps) is not None


def _stack_of(train_batch: PyTree, count: int) -> PyTree:
    """A stack of `count` batches that has only shapes."""
    if not isinstance(train_batch, BatchStack):
        return train_batch
    shape = lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
    return BatchStack(jax.tree.map(shape, train_batch.batches))
