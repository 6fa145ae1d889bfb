"""Where descents start and end: values from a trial to hyperparameters, and back to its study."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optuna
from jaxtyping import PyTree
from optuna.distributions import FloatDistribution

from gradhpo.integrations.optuna.attributes import leaf_name
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import warn


# From a value to what the leaf holds, and back.
_HOLDS: dict[str, tuple[Callable, Callable]] = {
    "value": (float, float),
    "log": (math.log, np.exp),
    "logit": (lambda x: math.log(x / (1 - x)), lambda x: 1 / (1 + np.exp(-x))),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where one hyperparameter starts: an Optuna distribution, and what its leaf holds.

    **Arguments:**

    - `distribution`: an `optuna.distributions.FloatDistribution` without `step`, of the value that
        Optuna knows and shows: a learning rate from 1e-4 to 1.
    - `holds`: how the leaf holds that value, and so the scale of the descent's steps: the
        `"value"` itself, its `"log"`, or its `"logit"`; or a pair of functions of a float, to the
        leaf and back.

    **Raises:** `ValueError` for another `holds`, a range outside the domain of the logarithm or the
    logit, or a distribution with `step`.

    ```python
    from optuna.distributions import FloatDistribution
    from gradhpo.integrations.optuna import Start

    rate = Start(FloatDistribution(1e-4, 1.0, log=True), "log")
    momentum = Start(FloatDistribution(0.5, 0.99), "logit")
    ```
    """

    distribution: FloatDistribution
    holds: str | tuple[Callable, Callable] = "value"

    @checked
    def __init__(
        self, distribution: FloatDistribution, holds: str | tuple[Callable, Callable] = "value"
    ):
        low, high = distribution.low, distribution.high
        if isinstance(holds, str) and holds not in _HOLDS:
            raise ValueError(f"holds must be {', '.join(map(repr, _HOLDS))}, got {holds!r}")
        if distribution.step is not None:
            raise ValueError(
                f"a descent does not end on the grid of {distribution}: leave step= out, or let "
                "Optuna alone choose this parameter"
            )
        if (holds in ("log", "logit") and low <= 0) or (holds == "logit" and high >= 1):
            raise ValueError(
                f"holds={holds!r} needs a distribution with 0 < low"
                f"{' and high < 1' if holds == 'logit' else ''}, got {distribution}"
            )
        object.__setattr__(self, "distribution", distribution)
        object.__setattr__(self, "holds", holds)

    def leaf(self, value: float) -> float:
        """What the leaf holds at this value."""
        return float(self._functions[0](value))

    def value(self, leaf: float) -> float:
        """The value of a leaf, which may be out of range."""
        with np.errstate(over="ignore"):  # exp of a large leaf, which is clipped
            return float(self._functions[1](leaf))

    @property
    def _functions(self) -> tuple[Callable, Callable]:
        return _HOLDS[self.holds] if isinstance(self.holds, str) else self.holds


def _is_start(x: Any) -> bool:
    return isinstance(x, Start)


@checked
def suggest(trial: optuna.trial.BaseTrial, space: PyTree) -> PyTree:
    """Hyperparameters where this trial starts its descent.

    **Arguments:**

    - `trial`: the one that Optuna passed to the objective.
    - `space`: a pytree of [`Start`][gradhpo.integrations.optuna.Start]. Optuna's parameters have
        the names under which `run` records hyperparameters: `"rate"`, `"decays.0"`.

    **Returns:** the same pytree with arrays of shape `()` and the default float dtype.

    ```python
    from optuna.distributions import FloatDistribution
    from gradhpo.integrations.optuna import Start, suggest

    decay = Start(FloatDistribution(1e-6, 1e-1, log=True), "log")
    space = {"rate": Start(FloatDistribution(1e-3, 1.0, log=True), "log"), "decays": [decay, decay]}
    trial = optuna.trial.FixedTrial({"rate": 0.1, "decays.0": 1e-4, "decays.1": 1e-5})
    hyperparams = suggest(trial, space)
    assert jnp.allclose(hyperparams["decays"][1], jnp.log(1e-5))
    ```
    """

    def start(path: tuple, start: Start) -> jax.Array:
        d = start.distribution
        value = trial.suggest_float(leaf_name(path), d.low, d.high, log=d.log)
        return jnp.asarray(start.leaf(value), jnp.result_type(float))

    _check_space(space)
    return jax.tree_util.tree_map_with_path(start, space, is_leaf=_is_start)


@checked
def add_end_point(
    study: optuna.Study,
    trial: optuna.trial.BaseTrial,
    space: PyTree,
    hyperparams: PyTree,
    value: Any,
) -> optuna.trial.FrozenTrial | None:
    """Adds the end of a descent to the study, as a separate finished trial.

    The sampler then knows where the descent ended, not only where it started. The new trial has the
    end values of the parameters in `space`, and every other parameter as in `trial`.

    Values outside their distribution, which a study cannot hold, are recorded at its nearest end,
    with a warning. The user attribute `"end_point"` of both trials has all parameters of the end
    point unclipped, so `study.best_trial.user_attrs["end_point"]` has them whether or not the end
    point wins; `"clipped"` lists the names that were moved, and `"end_point_of"` is the number of
    `trial`. A study's count of trials includes end points (and so does `n_startup_trials` of
    samplers and pruners); `n_trials` of `optimize` does not.

    **Arguments:**

    - `study`, `trial`: `trial.study` and the trial, in the objective, before it returns.
    - `space`: the pytree of [`Start`][gradhpo.integrations.optuna.Start] that `suggest` was given.
    - `hyperparams`: at the end, in the structure of `space`: `state.hyperparams`, or a part of it.
    - `value`: of the objective, or one for each of several. The last validation loss is free, but
        the hyperparameters moved during its training. To record what another trial would measure
        at the end point, train again with the hyperparameters fixed there.

    **Returns:** the new trial; `None`, with a warning, if anything is not finite.

    **Raises:** `ValueError` for other structures, leaves that are not of shape `()`, or a trial
    whose parameters are not from `suggest`.

    ```python
    import optuna
    from optuna.distributions import FloatDistribution
    from gradhpo.integrations.optuna import Start, add_end_point, suggest

    space = {"h": Start(FloatDistribution(0.1, 10.0, log=True), "log")}


    def objective(trial):
        h = suggest(trial, space)
        h = {"h": h["h"] - 0.5 * (h["h"] - 1)}  # a descent
        loss = float((h["h"] - 1) ** 2)
        add_end_point(trial.study, trial, space, h, loss)
        return loss


    study = optuna.create_study()
    study.optimize(objective, n_trials=5)
    assert len(study.trials) == 10
    ```
    """
    _check_space(space)
    starts, treedef = jax.tree.flatten(space, is_leaf=_is_start)
    leaves, found = jax.tree.flatten(hyperparams)
    if found != treedef or any(np.shape(leaf) != () for leaf in leaves):
        raise ValueError(
            f"hyperparams must have the structure of space, {treedef}, with leaves of shape (); "
            f"got {found} with the shapes {[np.shape(x) for x in leaves]}"
        )
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(space, is_leaf=_is_start)]
    names, leaves = list(map(leaf_name, paths)), list(map(float, leaves))
    missing = [name for name in names if name not in trial.params]
    if missing:
        raise ValueError(
            f"trial {trial.number} has no parameter {missing[0]!r}: call suggest first"
        )
    values = [float(x) for x in np.ravel(np.asarray(value, float))]
    if not all(map(math.isfinite, [*leaves, *values])):
        warn(f"the end of trial {trial.number} is not finite: it is not recorded", RuntimeWarning)
        return None
    ends = {n: start.value(x) for n, start, x in zip(names, starts, leaves, strict=True)}
    ranges = {n: start.distribution for n, start in zip(names, starts, strict=True)}
    inside = {n: min(max(x, ranges[n].low), ranges[n].high) for n, x in ends.items()}
    clipped = [name for name in names if inside[name] != ends[name]]
    if clipped:
        shown = ", ".join(f"{n!r} at {ends[n]:.4g} ({ranges[n]})" for n in clipped)
        warn(
            f"a descent ended outside its distribution: parameter {shown}. The study records "
            'the nearest end of the range, and the user attribute "end_point" the value itself',
            RuntimeWarning,
        )
    finite = {n: x if math.isfinite(x) else None for n, x in ends.items()}
    about = {"end_point": trial.params | finite}
    trial.set_user_attr("end_point", about["end_point"])
    added = optuna.trial.create_trial(
        params=trial.params | inside,
        distributions=trial.distributions,
        values=values,
        user_attrs=about | {"end_point_of": trial.number, "clipped": clipped},
    )
    study.add_trial(added)
    return added


def _check_space(space: PyTree) -> None:
    leaves: Sequence[Any] = jax.tree.leaves(space, is_leaf=_is_start)
    others = [leaf for leaf in leaves if not _is_start(leaf)]
    if others or not leaves:
        got = repr(others[0]) if others else "no leaf at all"
        raise ValueError(
            f'space must be a pytree of Start, such as {{"rate": Start(FloatDistribution(1e-3, '
            f'1.0, log=True), "log")}}; got {got}'
        )
