"""Whether a hypergradient can be trusted: precision, finite differences, smoothness, NaN."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.problem import Problem, seen_by
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFunctions, RealScalarLike
from gradhpo.diagnostics.agreement import agreement, agreement_by_leaf
from gradhpo.diagnostics.case import FAILURES, Case, check_one_problem, start_of_episode
from gradhpo.diagnostics.checkup import FiniteDifference, HypergradientCheck, StepError
from gradhpo.diagnostics.metasmooth import downhill, smoothness_along
from gradhpo.diagnostics.nonfinite import first_nonfinite, watch
from gradhpo.utils.settings import check_setting
from gradhpo.utils.typecheck import checked, without_warnings
from gradhpo.utils.validation import leaf_names


# Steps of the differences, relative to the largest number of a leaf (1 at least). Of two next to
# one another the pair that agrees best is believed, up to ten times what it disagrees by.
_EPSILONS = np.array([1e-3, 1e-4, 1e-5, 1e-6])


@checked
def check_hypergradient(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    step_size: RealScalarLike = 0.1,
) -> HypergradientCheck:
    r"""Looks for what makes a hypergradient wrong without making it fail.

    In one call: the estimate in the precision of the parameters against float64; the exact
    hypergradient of the same inner steps against finite differences of the whole training, along
    a random direction of every leaf; leaves whose effect is cut off from differentiation; inner
    steps that go uphill; the step of a method that itself takes finite differences;
    [`metasmoothness`][gradhpo.metasmoothness]; and for a NaN the leaf, the inner step and the
    usual suspect. It compiles some four programs and trains, in float64, eight times for every
    leaf, and keeps all inner states: for some tens of inner steps, before the long run.

    **Arguments:**

    - `optimizer`: any but `TaskBatched`.
    - `state`, `train_batch`, `val_batch`, `losses`: as for
        [`compare_hypergradients`][gradhpo.compare_hypergradients]. The losses must also run on
        float64 inputs; what they hold in float32 themselves stays so.
    - `step_size`: size of an outer step, for the metasmoothness.

    **Returns:** a [report][gradhpo.diagnostics.checkup.HypergradientCheck]: `report.findings`,
    `report.healthy`, and the measurements. `str(report)` tells all of it.

    **Raises:** `TypeError` for `TaskBatched`; what
    [`step`][gradhpo.BilevelOptimizer.step] raises for losses and batches.

    ```python
    cut_off = jax.lax.stop_gradient
    train_loss = lambda w, h, batch: jnp.sum((w - h["target"]) ** 2) * cut_off(h["scale"])
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), unroll_steps=5)
    hyperparams = {"target": jnp.zeros(3), "scale": jnp.ones(())}
    state = optimizer.init(jnp.ones(3), hyperparams)
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    print(report)
    assert report.detached == ("['scale']",)
    ```
    """
    check_one_problem("check_hypergradient", optimizer)
    check_setting("step_size", jnp.asarray(step_size), lambda x: x > 0, "positive")
    case = Case.create(state, train_batch, val_batch, losses, {"optimizer": optimizer})
    with without_warnings():  # the report says it all
        return _checked_up(case, optimizer, float(np.asarray(step_size)))


def _checked_up(case: Case, optimizer: Any, step_size: float) -> HypergradientCheck:
    start = start_of_episode(optimizer, case.state)
    problem = case.problem(optimizer, start, case.train_batch, case.val_batch)
    names, notes = leaf_names(problem.hyperparams), []
    marked = lambda marks: tuple(n for n, mark in zip(names, marks, strict=True) if mark)
    seen = case.seen(optimizer)
    acting, derived = seen_by("everything", problem), seen_by("updates", problem)

    own_dtype = _widest(case.state.params)
    is_narrow = own_dtype != jnp.float64
    own = _Estimates(case, optimizer, any(seen))
    if is_narrow:
        with jax.enable_x64(True):
            narrow, wide = own, own.cast(jnp.float64)
    else:
        narrow, wide = own.cast(jnp.float32), own
    with jax.enable_x64(True):
        trainings = _trainings(wide, step_size)
        watched = {}
        try:
            watched = wide.watched()
        except FAILURES as error:
            notes.append(f"the exact hypergradient cannot be had here: {error}")
    nonfinite = _where(own, {} if is_narrow else watched) or _where(wide, watched)
    precision, by_leaf = None, {}
    if _draws_random_numbers(problem):
        notes.append("the losses draw random numbers, others in another precision: not compared")
    elif any(seen):
        pair = {"narrow": narrow.hypergradient}, wide.hypergradient
        precision, by_leaf = agreement(*pair), agreement_by_leaf(*pair)
    return HypergradientCheck(
        name=type(optimizer).__name__,
        num_steps=case.num_steps,
        narrow=str(own_dtype if is_narrow else np.dtype(np.float32)),
        own_precision_is_narrow=is_narrow,
        nonfinite=nonfinite,
        precision=precision,
        precision_by_leaf=by_leaf,
        finite_differences=_compared(trainings, watched, names),
        detached=marked([a and not d for a, d in zip(acting, derived, strict=True)]),
        unseen=marked([d and not s for d, s in zip(derived, seen, strict=True)]),
        uphill_share=float(np.mean(watched["forward"]["uphill"])) if watched else float("nan"),
        step_error=own.step_error(),
        metasmoothness=float(trainings["smoothness"]),
        diverges=bool(np.isfinite(trainings["loss"]) and not np.isfinite(trainings["moved"])),
        step_size=step_size,
        notes=tuple(notes),
    )


class _Estimates:
    """An optimizer along a case in one precision: its estimate, and the exact way with eyes on."""

    def __init__(self, case: Case, optimizer: Any, sees_any: bool):
        self.case, self.optimizer, self._sees_any = case, optimizer, sees_any
        self._program = case.estimate(optimizer) if sees_any else None
        self.hypergradient = case.state.hyperparams
        if self._program is None:  # a `step` would raise, and say that it sees nothing
            self.hypergradient = jax.tree.map(jnp.zeros_like, case.state.hyperparams)
        else:
            self.hypergradient, _ = self._program()

    def cast(self, dtype: Any) -> "_Estimates":
        """With all floating-point arrays in one precision."""
        is_floating = lambda x: eqx.is_inexact_array(x) or _is_floats(x)
        cast = lambda x: jnp.asarray(x, dtype) if is_floating(x) else x
        of_case = (self.case.state, self.case.train_batch, self.case.val_batch)
        (state, train_batch, val_batch), optimizer = jax.tree.map(cast, (of_case, self.optimizer))
        case = dataclasses.replace(
            self.case, state=state, train_batch=train_batch, val_batch=val_batch
        )
        return _Estimates(case, optimizer, self._sees_any)

    @property
    def is_finite(self) -> bool:
        return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(self.hypergradient))

    def watched(self) -> dict[str, Any]:
        case = self.case
        looking = lambda *arguments: watch(case.problem(*arguments), case.num_steps)
        return case.compile(looking, self.optimizer)()

    def step_error(self) -> StepError | None:
        """Of an optimizer with an `epsilon`, which is traced: no other program is compiled."""
        program, case, optimizer = self._program, self.case, self.optimizer
        if program is None or not hasattr(optimizer, "epsilon"):
            return None

        def changed(factor: float) -> float:
            other = dataclasses.replace(optimizer, epsilon=factor * optimizer.epsilon)
            start = start_of_episode(other, case.state)
            found, _ = program(other, start, case.train_batch, case.val_batch)
            return agreement({"": found}, self.hypergradient).relative_error[""]

        return StepError(halved=changed(0.5), doubled=changed(2.0))


def _where(estimates: _Estimates, watched: dict[str, Any]) -> Any:
    """Where a non-finite estimate comes from; first on the exact way, and if not there, in it."""
    found = first_nonfinite(watched or (estimates.watched() if not estimates.is_finite else {}))
    if found is None and not estimates.is_finite:
        return "not finite: the estimate itself, though the exact hypergradient is finite"
    return found


def _trainings(wide: _Estimates, step_size: float) -> dict[str, Any]:
    """Differences of the loss after training, for every leaf and epsilon; the metasmoothness."""
    case = wide.case

    def function(optimizer, start, train_batch, val_batch, hypergradient, epsilons, step_size):
        problem = case.problem(optimizer, start, train_batch, val_batch)
        phi, validation, z, hyperparams = problem
        leaves, treedef = jax.tree.flatten(hyperparams)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        directions = [
            jax.random.rademacher(key, x.shape, x.dtype) * jnp.max(jnp.abs(x), initial=1.0)
            for key, x in zip(keys, leaves, strict=True)
        ]

        def loss(leaves):
            moved = jax.tree.unflatten(treedef, leaves)
            (w, _), _, _ = phi.rollout(z, moved, 0, case.num_steps)
            return validation.loss(w, moved)

        def difference(at):
            chosen, epsilon = at
            ways = [
                jnp.where(chosen == i, epsilon, 0).astype(x.dtype) * x
                for i, x in enumerate(directions)
            ]
            plus = loss([x + d for x, d in zip(leaves, ways, strict=True)])
            minus = loss([x - d for x, d in zip(leaves, ways, strict=True)])
            return (plus - minus) / (2 * epsilon)

        grid = jnp.meshgrid(jnp.arange(len(leaves)), epsilons, indexing="ij")
        found = jax.lax.map(difference, tuple(x.reshape(-1) for x in grid))
        towards = downhill(hypergradient)
        smoothness, moved = smoothness_along(problem, case.num_steps, towards, step_size)
        return {
            "smoothness": smoothness,
            "moved": moved,
            "differences": found.reshape(len(leaves), len(epsilons)),
            "directions": jax.tree.unflatten(treedef, directions),
            "loss": loss(leaves),
        }

    more = wide.hypergradient, jnp.asarray(_EPSILONS), jnp.asarray(step_size)
    return jax.tree.map(np.asarray, case.compile(function, wide.optimizer, *more)())


def _compared(
    found: dict[str, Any], watched: dict[str, Any], names: list[str]
) -> dict[str, FiniteDifference]:
    """The exact derivative along each direction beside its differences."""
    if not watched:
        return {}
    rows = zip(
        names,
        jax.tree.leaves(watched["hypergradient"]),
        jax.tree.leaves(found["directions"]),
        found["differences"],
        strict=True,
    )
    compared = {}
    for name, g, direction, differences in rows:
        gaps = np.abs(np.diff(differences))
        best = int(np.argmin(gaps)) if np.all(np.isfinite(gaps)) else 0
        compared[name] = FiniteDifference(
            derivative=float(np.vdot(g, direction)),
            difference=float(differences[best + 1]),
            uncertainty=float(10 * gaps[best] + 1e-9 * abs(found["loss"])),
        )
    return compared


def _widest(tree: PyTree) -> np.dtype:
    """The widest floating-point dtype of a tree."""
    dtypes = [x.dtype for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]
    return np.dtype(max(dtypes, key=lambda dtype: dtype.itemsize))


def _is_floats(x: Any) -> bool:
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)


def _draws_random_numbers(problem: Problem) -> bool:
    phi, validation, (w, _), hyperparams = problem
    losses = lambda w, h: (phi.train_loss(w, h, 0), validation.loss(w, h))
    return _has_random(jax.make_jaxpr(losses)(w, hyperparams).jaxpr)


def _has_random(program: Jaxpr) -> bool:
    return any(
        eqn.primitive.name.startswith(("random_", "threefry", "rng_"))
        or any(map(_has_random, jaxprs_in_params(eqn.params)))
        for eqn in program.eqns
    )
