"""Whether a hypergradient can be trusted: precision, finite differences, smoothness, NaN."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.core.visibility import seen_by, where_it_is_cut
from gradhpo.core.wrapper import algorithm_of
from gradhpo.diagnostics.case import Case, check_one_problem
from gradhpo.diagnostics.checkup import HypergradientCheck
from gradhpo.diagnostics.comparison import agreement, agreement_by_leaf
from gradhpo.diagnostics.metasmooth import compared, train_around
from gradhpo.diagnostics.nearby import Perturb, by_steps, look_nearby
from gradhpo.diagnostics.nonfinite import NonFinite, first_nonfinite, in_the_estimate
from gradhpo.diagnostics.perturbations import check_perturb
from gradhpo.diagnostics.precision import Estimated, first_line
from gradhpo.diagnostics.reference import FAILURES
from gradhpo.diagnostics.trust import judged, unmeasured_of
from gradhpo.utils.advice import on_jumps, on_narrow_derivative
from gradhpo.utils.freezing import trained
from gradhpo.utils.settings import check_setting
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import without_warnings


@checked
def check_hypergradient(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: LossFunctions,
    *,
    step_size: RealScalarLike = 0.1,
    perturb: Callable[[Array, PyTree], PyTree] | None = None,
    replayed: bool | None = None,
) -> HypergradientCheck:
    r"""Checks whether a hypergradient can be trusted, and finds errors that raise no exception.

    The verdict says whether the hypergradient can be expected to predict retraining at other
    hyperparameters, as [`retraining_score`][gradhpo.retraining_score] would measure with a hundred
    training runs. It takes about ten more hypergradients, by the program of the first: at four
    perturbed hyperparameters; with the last bit of every initial parameter changed; on batches in
    another order and with other random keys; and unchanged. Their predictions are compared over 500
    random perturbations, which costs only products.

    One call also checks: the estimate in the precision of the parameters against float64; the exact
    hypergradient of the same inner steps against finite differences of the whole training, along a
    random direction of every leaf; leaves whose effect is cut off from differentiation; inner steps
    that go uphill, and a training loss that explodes; the step of a method that itself takes finite
    differences; [`metasmoothness`][gradhpo.metasmoothness]; and for a NaN, the leaf, the inner step
    and the usual suspect. It compiles about four programs, trains twelve times per leaf in float64,
    and keeps all inner states: use it for a few hundred inner steps, before the long run.

    **Arguments:**

    - `optimizer`: any except `TaskBatched`.
    - `state`: where to start: from `init`, or from the middle of a run.
    - `train_batch`: a [`BatchStack`][gradhpo.BatchStack], whose length is the number of inner
        steps; or one batch for all inner steps of the optimizer.
    - `val_batch`: one validation batch, any pytree of arrays.
    - `losses`: the [`LossFunctions`][gradhpo.LossFunctions]. They must also run on float64 inputs;
        arrays that they hold in float32 themselves stay float32.
    - `step_size`: size of an outer step, for the metasmoothness; positive, default 0.1.
    - `perturb`: `(key, hyperparams) -> hyperparams`, the changes whose effect the hypergradient
        should predict, such as [`leave_out(0.01)`][gradhpo.leave_out]. The verdict holds for
        changes of this size. `None` (the default): every number moves by a normal one times
        `step_size`, as in an outer step in a random direction.
    - `replayed`: whether a retraining repeats the random keys in the batches and the order of the
        batches, as `retraining_score` and [`replay`][gradhpo.replay] do. `False`: their effect
        counts. `None` (the default): it does not count, but keys that matter cast doubt, since the
        check cannot see whether they are repeated.

    **Returns:** a [report][gradhpo.diagnostics.checkup.HypergradientCheck]: `report.verdict` is
    `"trusted"`, `"doubtful"` or `"not trusted"`, with `report.reasons` and `report.trust`, the
    number behind it, in [0, 1]; `report.findings`, `report.healthy`, and the measurements.
    `str(report)` shows all of it.

    **Raises:** `TypeError` for `TaskBatched`; `ValueError` for `step_size <= 0` and for a `perturb`
    that changes structure, shapes or dtypes, returns the hyperparameters unchanged or ignores its
    key; what [`step`][gradhpo.BilevelOptimizer.step] raises for losses and batches.

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
    assert report.detached == ("['scale']",) and report.verdict == "doubtful"
    ```
    """
    check_one_problem("check_hypergradient", optimizer)
    check_setting("step_size", jnp.asarray(step_size), lambda x: x > 0, "positive")
    case = Case.create(state, train_batch, val_batch, losses, {type(optimizer).__name__: optimizer})
    size = float(np.asarray(step_size))
    if perturb is None:
        perturb = by_steps(size)
    else:
        check_perturb(perturb, jax.random.split(jax.random.key(0), 32), state.hyperparams)
    with without_warnings():  # the report says everything
        return _checked_up(case, algorithm_of(optimizer), size, perturb, replayed)


def _checked_up(
    case: Case, optimizer: Algorithm, step_size: float, perturb: Perturb, replayed: bool | None
) -> HypergradientCheck:
    start = case.start(optimizer)
    problem = case.problem(optimizer, start, case.train_batch, case.val_batch)
    names, notes = leaf_names(problem.hyperparams), []
    marked = lambda marks: tuple(n for n, mark in zip(names, marks, strict=True) if mark)
    seen = seen_by(optimizer.sees, problem, optimizer.differentiates_init)
    acting, derived = (seen_by(sees, problem, True) for sees in ("everything", "updates"))

    own_dtype = _widest(case.state.params)
    is_narrow = own_dtype != jnp.float64
    own = Estimated(case, optimizer, any(seen))
    moving = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(own.hypergradient)]
    vanishing = marked([s and not m for s, m in zip(seen, moving, strict=True)])
    other = None
    with jax.enable_x64(True):
        try:
            other = own.cast(jnp.float64 if is_narrow else jnp.float32)
        except FAILURES as error:
            notes.append(f"the other precision does not run: {first_line(error)}")
        narrow, wide = (own, other) if is_narrow else (other, own)
        best = own if wide is None else wide
        around = train_around(best.case, best.optimizer, best.hypergradient, step_size)
        watched = best.watched(notes)
    nonfinite = _where(own, watched if best is own else None, notes)
    if nonfinite is None and best is not own:
        nonfinite = _where(best, watched, notes)
    if nonfinite is None and watched and not _is_finite(watched["hypergradient"]):
        exact = first_nonfinite(watched)
        notes.append(f"the exact hypergradient, though not this estimate, is {exact}")
    precision, by_leaf = None, {}
    if own.draws_random_numbers:
        notes.append("random numbers differ between precisions: not compared")
    elif any(seen) and narrow is not None and wide is not None:
        pair = {"narrow": narrow.hypergradient}, wide.hypergradient
        precision, by_leaf = agreement(*pair), agreement_by_leaf(*pair)
    compare = {"best": best.hypergradient}
    if precision is not None and is_narrow:
        compare["float64"] = best.hypergradient
    if watched:
        compare["exact"] = watched["hypergradient"]
    nearby = None
    if own.program is not None and nonfinite is None:
        nearby = look_nearby(own, perturb, compare)
    # A solver has no path: the estimate itself is what differences should confirm.
    is_solved = watched is None and optimizer.inner_solver is not None
    exact = best.hypergradient if is_solved else watched and watched["hypergradient"]
    return HypergradientCheck(
        name=type(optimizer).__name__,
        num_steps=case.num_steps,
        narrow=str(own_dtype if is_narrow else np.dtype(np.float32)),
        own_precision_is_narrow=is_narrow,
        nonfinite=nonfinite,
        precision=precision,
        precision_by_leaf=by_leaf,
        finite_differences={} if exact is None else compared(around, exact),
        detached=marked([a and not d for a, d in zip(acting, derived, strict=True)]),
        why_detached=where_it_is_cut(problem),
        unseen=marked([d and not s for d, s in zip(derived, seen, strict=True)]),
        vanishing=vanishing,
        val_loss=float(around["loss"]),
        uphill_share=float(np.mean(watched["forward"]["uphill"])) if watched else float("nan"),
        step_error=own.step_error(),
        metasmoothness=float(around["smoothness"]),
        diverges=bool(np.isfinite(around["loss"]) and not np.isfinite(around["moved"])),
        step_size=step_size,
        is_zero=not any(moving),
        trusting=judged(nearby, watched, replayed, unmeasured_of(own, wide, watched, replayed)),
        notes=tuple(notes),
        why_narrow=on_narrow_derivative(problem.z.s),
        at_jumps=on_jumps(problem.z.s),
    )


def _where(run: Estimated, watched: dict[str, Any] | None, notes: list[str]) -> NonFinite | None:
    """The source of a non-finite estimate: first in the exact computation, then in the estimate."""
    if watched and not all(map(np.all, jax.tree.leaves(watched["forward"]["model_state"]))):
        return first_nonfinite(watched)  # every step is refused, with a finite hypergradient too
    if _is_finite(run.hypergradient):
        return None
    watched = run.watched(notes) if watched is None else watched
    on_the_way = None if watched is None else first_nonfinite(watched)
    exact_is_finite = watched is not None and _is_finite(watched["hypergradient"])
    if on_the_way is None or exact_is_finite:
        return in_the_estimate(watched or {}, run.hypergradient, run.optimizer.suspect)
    return on_the_way


def _is_finite(tree: PyTree) -> bool:
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def _widest(tree: PyTree) -> np.dtype:
    """The widest floating-point dtype of what is trained."""
    dtypes = [x.dtype for x in jax.tree.leaves(trained(tree))]
    return np.dtype(max(dtypes, key=lambda dtype: dtype.itemsize))
