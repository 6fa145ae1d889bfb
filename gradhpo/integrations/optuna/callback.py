"""A callback that reports a run to Optuna's trial, prunes it, and keeps what was learned."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna

from gradhpo.core.state import BilevelState
from gradhpo.integrations.optuna.attributes import learned, of_best_member, schedule
from gradhpo.training.controls import watched_value
from gradhpo.training.history import History
from gradhpo.utils.description import described_function
from gradhpo.utils.processes import is_shared
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked


class TrialCallback:
    """Reports a run to an Optuna trial, and prunes it: a callback for `run`.

    After a chunk it reports the metric under the number of the outer step. If the pruner says so,
    the run stops cleanly (with its checkpoint), and `run` raises `optuna.TrialPruned`, which the
    study handles.

    The trial gets the user attributes `"hyperparams"`, the values at the end by their names
    (leaves of more than 16 numbers as shape, mean, min and max); `"schedule"`, scalar ones after at
    most 50 of the steps; and `"stop_reason"`. For a population they belong to the best member,
    along its lineage, with its number as `"member"`. Each attribute has less than 64 KiB of JSON,
    for any database; leaves that do not fit are counted as `"left out"`. Of several runs in a
    trial, the last one is kept.

    A run that is resumed from a checkpoint does not repeat its reports, and a pruned one stays
    pruned.

    **Arguments:**

    - `trial`: the one that Optuna passed to the objective.
    - `metric`: the name of a metric, default `"val_loss"`, or a function `state -> number`; the
        study says whether lower or higher is better. `None` reports nothing: Optuna neither takes
        reports nor prunes in a study of several objectives.
    - `every`: report at the end of the first chunk after this many steps, default 1: after every
        chunk. A report is a write to the storage.

    **Raises:** `ValueError` for `every < 1`; when `run` starts, for a state that several processes
    share; within a run, for a name that is not a metric. From `run`, at its end:
    `optuna.TrialPruned` if the run was pruned, or too many steps were refused as not finite; the
    error that ended it, so that the trial fails; `KeyboardInterrupt` after Ctrl-C, so that the
    study ends.

    ```python
    import optuna
    from gradhpo.integrations.optuna import TrialCallback

    loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
    losses = gradhpo.LossFunctions(loss, loss)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))


    def objective(trial):
        start = optimizer.init(jnp.zeros(3), jnp.full(3, trial.suggest_float("start", -1.0, 1.0)))
        state, history = gradhpo.run(
            optimizer, start, losses, jnp.ones(3), jnp.ones(3), num_steps=20, chunk_size=5,
            callbacks=[TrialCallback(trial)], progress=False,
        )
        return history["val_loss"][-1]


    study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
    study.optimize(objective, n_trials=3)
    print(study.best_trial.user_attrs["hyperparams"])
    ```
    """

    stop_reason = "pruned"

    @checked
    def __init__(
        self,
        trial: optuna.trial.BaseTrial,
        metric: str | Callable[[BilevelState], Any] | None = "val_loss",
        every: int = 1,
    ):
        check_count("every", every)
        self._trial, self._metric, self._every = trial, metric, every
        self.memory = np.zeros(2, np.int64)  # the last step reported, and whether it was pruned

    def __repr__(self) -> str:
        return f"TrialCallback(trial {self._trial.number})"

    @property
    def identity(self) -> Any:
        """What the memory is about: the same for a retry, which is another trial."""
        metric = self._metric
        return {"metric": described_function(metric) if callable(metric) else metric}

    @property
    def stopped(self) -> bool:
        """Whether the run was pruned: one that is resumed there does not continue."""
        return bool(self.memory[1])

    @property
    def why(self) -> str:
        """For the report."""
        return f"Optuna pruned trial {self._trial.number} after step {self.memory[0]}."

    def start(self, state: BilevelState, resumed: bool) -> np.ndarray:
        """The memory before the first step."""
        if is_shared(state):
            raise ValueError(
                "TrialCallback: several processes share this state, but a trial belongs to one "
                "process; report from your own callback, in process 0"
            )
        return np.asarray([int(state.step), 0], np.int64)

    def __call__(self, state: BilevelState, metrics: Mapping[str, np.ndarray]) -> bool:
        step = int(state.step)
        if self._metric is None or step - self.memory[0] < self._every:
            return False
        value = watched_value(self._metric, state, metrics, "TrialCallback")
        self._trial.report(value, step)
        self.memory = np.asarray([step, self._trial.should_prune()], np.int64)
        return self.stopped

    def end(self, state: BilevelState, history: History) -> None:
        """After the run: the attributes, and the exceptions that Optuna understands."""
        try:
            hyperparams, columns = state.hyperparams, history
            if history["val_loss"].ndim == 2:  # of a population: what its best member has
                member, hyperparams, columns = of_best_member(hyperparams, history)
                self._trial.set_user_attr("member", member)
            self._trial.set_user_attr("hyperparams", learned(hyperparams))
            self._trial.set_user_attr("schedule", schedule(columns, int(state.step)))
            self._trial.set_user_attr("stop_reason", history.stop_reason)
        finally:
            if history.error is not None:
                raise history.error
        if history.stop_reason == "interrupted":
            raise KeyboardInterrupt
        if history.stop_reason in (self.stop_reason, "rejected"):
            raise optuna.TrialPruned(history.report)
