"""Trials of Optuna that are runs, and descents that start and end in a study."""

import importlib
import inspect
import json
import os
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from wsgiref.util import setup_testing_defaults

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, TrialState
from processes import python
from test_docs import blocks

import gradhpo
import gradhpo.integrations.optuna as bridge
from gradhpo.integrations.optuna import Start, TrialCallback, add_end_point, suggest
from gradhpo.integrations.optuna.attributes import learned, schedule


optuna.logging.set_verbosity(optuna.logging.ERROR)

# Shared by all tests, so that a chunk compiles once.
OPTIMIZER = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.05))
LOSSES = gradhpo.LossFunctions(
    lambda w, h, batch: jnp.sum((w - h["target"]) ** 2) + jnp.exp(h["log_decay"]) * jnp.sum(w**2),
    lambda w, h, batch: jnp.sum((w - batch) ** 2),
)
SPACE = {
    "target": Start(FloatDistribution(-1.0, 1.0)),
    "log_decay": Start(FloatDistribution(1e-4, 1.0, log=True), "log"),
}


def run(trial, *callbacks, params=0.0, **options):
    """20 steps in chunks of five, from where the trial starts."""
    state = OPTIMIZER.init(jnp.full(2, params), suggest(trial, SPACE))
    settings = {"num_steps": 20, "chunk_size": 5, "progress": False} | options
    return gradhpo.run(
        OPTIMIZER, state, LOSSES, None, jnp.full(2, 0.5), callbacks=callbacks, **settings
    )


def objective(trial):
    state, history = run(trial, TrialCallback(trial))
    loss = float(history["val_loss"][-1])
    add_end_point(trial.study, trial, SPACE, state.hyperparams, loss)
    return loss


def study_of(*, pruner=None):
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())


class PrunesFrom(optuna.pruners.BasePruner):
    """Prunes every trial at its first report from a given step on."""

    def __init__(self, step):
        self.step = step

    def prune(self, study, trial):
        return trial.last_step >= self.step


# -- a run reports to its trial ------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(1, [5, 10, 15, 20]), (8, [10, 20]), (20, [20])])
def test_reports_the_metric_at_the_ends_of_chunks(every, steps):
    seen = {}

    def objective(trial):
        _, history = run(trial, TrialCallback(trial, every=every))
        seen.update({step: history["val_loss"][step - 1] for step in steps})
        return history["val_loss"][-1]

    study = study_of()
    study.optimize(objective, n_trials=1)
    assert study.trials[0].intermediate_values == seen


def test_reports_a_function_of_the_state():
    study = study_of()
    metric = lambda state: state.hyperparams["target"]
    study.optimize(lambda t: run(t, TrialCallback(t, metric))[1]["val_loss"][-1], n_trials=1)
    [trial] = study.trials
    assert trial.intermediate_values[20] == trial.user_attrs["hyperparams"]["target"]
    with pytest.raises(ValueError, match="'nothing' is not a metric of this run"):
        run(study.ask(), TrialCallback(study.ask(), "nothing"))


def test_keeps_what_was_learned():
    study, found = study_of(), {}

    def objective(trial):
        state, found["history"] = run(trial, TrialCallback(trial))
        found["hyperparams"] = state.hyperparams
        return 0.0

    study.optimize(objective, n_trials=1)
    kept = study.trials[0].user_attrs
    assert kept["hyperparams"] == {name: float(x) for name, x in found["hyperparams"].items()}
    assert kept["schedule"]["step"] == list(range(1, 21))
    for name in SPACE:
        assert kept["schedule"][name] == found["history"][f"hyperparams.{name}"].tolist()
    assert kept["stop_reason"] == "num_steps"


def test_attributes_are_bounded_json():
    small = {
        "key": jax.random.key(0),
        "bad": jnp.asarray([jnp.nan, 1.0]),
        "flag": jnp.asarray(True),
    }
    large = jnp.arange(1_000.0).reshape(10, 100)
    assert learned(small | {"large": large}) == {
        "bad": [None, 1.0],
        "flag": True,
        "large": {"shape": [10, 100], "mean": 499.5, "min": 0.0, "max": 999.0},
    }
    assert learned(jnp.asarray(0.25)) == {"hyperparams": 0.25}
    many = {f"layer{i}": jnp.full(16, 1 / 3) for i in range(1_000)}
    kept = learned(many)
    assert len(json.dumps(kept, allow_nan=False)) < 65_535  # a TEXT of MySQL
    assert 0 < kept["left out"] == 1_000 - (len(kept) - 1)
    metrics = {f"hyperparams.h{i}": np.arange(1_000) / 3 for i in range(100)}
    kept = schedule(metrics | {"val_loss": np.zeros(1_000)}, last_step=5_000)
    assert len(json.dumps(kept, allow_nan=False)) < 65_535
    assert (kept["step"][0], kept["step"][-1], len(kept["step"])) == (4_001, 5_000, 50)
    assert kept["h0"][-1] == 333.0
    assert kept["left out"] == 100 - (len(kept) - 2)


# -- pruned, resumed, failed -----------------------------------------------------------------------


def test_a_pruned_run_raises_and_stays_pruned(tmp_path):
    study = study_of(pruner=PrunesFrom(10))
    objective = lambda trial: run(trial, TrialCallback(trial), checkpoint=tmp_path)
    study.optimize(objective, n_trials=1)
    [pruned] = study.trials
    assert pruned.state == TrialState.PRUNED
    assert list(pruned.intermediate_values) == [5, 10]
    assert pruned.value == pruned.intermediate_values[10]
    assert pruned.user_attrs["stop_reason"] == "pruned"
    # Resumed, as in a retry: nothing is left to do, and nothing is reported.
    study.enqueue_trial(pruned.params)
    study.optimize(objective, n_trials=1)
    again = study.trials[1]
    assert again.state == TrialState.PRUNED
    assert again.intermediate_values == {}
    # The checkpoint is complete: without the callback the run resumes from step 10.
    with pytest.warns(match="has the memory of TrialCallback"):
        _, history = run(FixedTrial(pruned.params), checkpoint=tmp_path)
    assert history.stop_reason == "num_steps"
    assert history["val_loss"][9] == pruned.value
    assert len(history["val_loss"]) == 20


def test_a_resumed_run_reports_the_rest(tmp_path):
    checkpoint = gradhpo.Checkpoint(tmp_path, every_steps=5)

    def power_cut(state, metrics):
        if state.step == 15:
            raise KeyboardInterrupt

    study = study_of()
    with pytest.raises(KeyboardInterrupt):
        study.optimize(
            lambda t: run(t, TrialCallback(t), power_cut, checkpoint=checkpoint), n_trials=1
        )
    failed = study.trials[0]
    assert failed.state == TrialState.FAIL
    study.enqueue_trial(failed.params)
    finish = lambda t: run(t, TrialCallback(t), checkpoint=checkpoint)[1]["val_loss"][-1]
    study.optimize(finish, n_trials=1)
    assert list(study.trials[1].intermediate_values) == [15, 20]  # 15 was not saved
    whole = run(FixedTrial(failed.params))[1]["val_loss"]
    assert study.trials[1].value == whole[-1]


def test_what_ends_a_run_too_early_is_no_value():
    def breaks(state, metrics):
        if state.step == 10:
            raise ZeroDivisionError("at step 10")

    study = study_of()
    with pytest.warns(RuntimeWarning, match="callback"), pytest.raises(ZeroDivisionError):
        study.optimize(lambda t: run(t, TrialCallback(t), breaks)[1]["val_loss"][-1], n_trials=1)
    assert study.trials[0].state == TrialState.FAIL

    def diverges(trial):  # the square overflows in every step
        return run(trial, TrialCallback(trial), params=1e200, max_rejections=3)

    with pytest.warns(RuntimeWarning):
        study.optimize(diverges, n_trials=1)
    assert study.trials[1].state == TrialState.PRUNED
    assert study.trials[1].user_attrs["stop_reason"] == "rejected"


def test_of_several_objectives_only_attributes_are_kept():
    study = optuna.create_study(directions=["minimize", "minimize"])

    def objective(trial):
        state, history = run(trial, TrialCallback(trial, metric=None))
        losses = history["val_loss"][-1], history["param_norm"][-1]
        add_end_point(study, trial, SPACE, state.hyperparams, losses)
        return losses

    study.optimize(objective, n_trials=1)
    trial, end = study.trials
    assert trial.values == end.values
    assert trial.user_attrs["stop_reason"] == "num_steps"
    with pytest.raises(NotImplementedError, match="multi-objective"):
        study.optimize(lambda t: run(t, TrialCallback(t)), n_trials=1)


# -- starts and ends of descents -------------------------------------------------------------------


def test_leaves_hold_what_they_say():
    pair = (lambda x: x**2, lambda leaf: leaf**0.5)
    space = {
        "a": [Start(FloatDistribution(0.0, 5.0)), Start(FloatDistribution(0.1, 9.0), "log")],
        "b": Start(FloatDistribution(0.01, 0.9, log=True), "logit"),
        "c": Start(FloatDistribution(1.0, 4.0), pair),
    }
    given = {"a.0": 2.0, "a.1": 3.0, "b": 0.25, "c": 3.0}
    found = suggest(FixedTrial(given), space)
    expected = {"a": [2.0, np.log(3.0)], "b": np.log(0.25 / 0.75), "c": 9.0}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-15), found, expected)
    starts = jax.tree.leaves(space, is_leaf=lambda x: isinstance(x, Start))
    for start, leaf, value in zip(starts, jax.tree.leaves(found), given.values(), strict=True):
        assert abs(start.value(float(leaf)) - value) < 1e-14  # rounding of exp and log
    assert suggest(FixedTrial({"hyperparams": 1.5}), space["c"]) == 1.5**2


def test_ends_are_trials_that_samplers_know():
    study = study_of()

    def objective(trial):
        trial.suggest_categorical("width", [16, 32])
        start = suggest(trial, SPACE)
        end = start | {"target": start["target"] / 2}
        add_end_point(study, trial, SPACE, end, 3.0)
        return 4.0

    study.optimize(objective, n_trials=2)
    # Within the objective, the end point finishes first, but its number is higher.
    first, end = study.trials[:2]
    assert (first.value, end.value, end.state) == (4.0, 3.0, TrialState.COMPLETE)
    assert end.params == first.params | {
        "target": first.params["target"] / 2,
        # float64 of the logarithm and back
        "log_decay": pytest.approx(first.params["log_decay"], rel=1e-14),
    }
    assert end.distributions == first.distributions
    assert end.user_attrs["end_point_of"] == first.number
    assert end.user_attrs["clipped"] == []
    assert end.user_attrs["end_point"] == first.user_attrs["end_point"] == end.params
    assert study.best_trial == end


def test_ends_out_of_range_are_said_and_kept():
    study = study_of()
    trial = study.ask()
    suggest(trial, SPACE)
    ends = {"target": jnp.asarray(3.0), "log_decay": jnp.asarray(-800.0)}
    with pytest.warns(RuntimeWarning, match="'log_decay' at 0 .*'target' at 3 "):
        added = add_end_point(study, trial, SPACE, ends, 1.0)
    assert (added.params["target"], added.params["log_decay"]) == (1.0, 1e-4)
    assert sorted(added.user_attrs["clipped"]) == ["log_decay", "target"]
    assert added.user_attrs["end_point"] == {"target": 3.0, "log_decay": 0.0}
    ends["log_decay"] = jnp.asarray(800.0)  # exp is infinite
    with pytest.warns(RuntimeWarning, match="distribution: parameter 'log_decay' at inf "):
        added = add_end_point(study, trial, SPACE, ends, 1.0)
    assert added.params["log_decay"] == 1.0
    json.dumps(added.user_attrs, allow_nan=False)
    for end, value in ((ends | {"target": jnp.asarray(jnp.nan)}, 1.0), (ends, float("nan"))):
        with pytest.warns(RuntimeWarning, match="not finite: it is not recorded"):
            assert add_end_point(study, trial, SPACE, end, value) is None
    assert len(study.trials) == 3


def test_a_space_that_is_none_is_refused():
    study = study_of()
    trial = study.ask()
    h = {"target": jnp.asarray(0.0), "log_decay": jnp.asarray(0.0)}
    with pytest.raises(ValueError, match="has no parameter 'log_decay': call suggest first"):
        add_end_point(study, trial, SPACE, h, 1.0)
    suggest(trial, SPACE)
    for wrong in ({"target": h["target"]}, h | {"target": jnp.zeros(2)}):
        with pytest.raises(ValueError, match="must have the structure of space"):
            add_end_point(study, trial, SPACE, wrong, 1.0)
    for wrong in ({}, {"target": FloatDistribution(0.0, 1.0)}, None):
        with pytest.raises(ValueError, match="must be a pytree of Start"):
            suggest(trial, wrong)
    with pytest.raises(ValueError, match=r"needs a distribution with 0 < low, got"):
        Start(FloatDistribution(0.0, 1.0), "log")
    with pytest.raises(ValueError, match="0 < low and high < 1"):
        Start(FloatDistribution(0.1, 1.0), "logit")
    with pytest.raises(ValueError, match="holds must be 'value', 'log', 'logit'"):
        Start(FloatDistribution(0.1, 1.0), "exp")
    with pytest.raises(ValueError, match="grid"):
        Start(FloatDistribution(0.0, 1.0, step=0.1))
    with pytest.raises(TypeError, match="FloatDistribution"):
        Start(optuna.distributions.IntDistribution(1, 3))
    with pytest.raises(ValueError, match="every"):
        TrialCallback(trial, every=0)


def test_tpe_moves_to_where_descents_end():
    """They end at 37, and only end points are good: TPE then samples around 37."""
    space = {"h": Start(FloatDistribution(-100.0, 100.0))}

    def near(seed, *, ends):
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        study = optuna.create_study(sampler=sampler)

        def objective(trial):
            suggest(trial, space)
            if ends:
                add_end_point(study, trial, space, {"h": jnp.asarray(37.0)}, 0.0)
            return 1.0

        study.optimize(objective, n_trials=40)
        own = [t for t in study.trials if "end_point_of" not in t.user_attrs][-20:]
        return np.mean([abs(t.params["h"] - 37.0) < 20 for t in own])

    # A fifth of the range: without end points 0.1 to 0.4 of the samples (six seeds), with them 0.5.
    with_ends, without = (np.mean([near(s, ends=e) for s in (1, 2, 3)]) for e in (True, False))
    assert without < 0.3 < 0.45 < with_ends


# -- several workers, and workers that die ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a descent ended outside")  # some start near its ends
def test_threads_share_a_study_and_nothing_is_kept():
    study = study_of()
    study.optimize(objective, n_trials=2, n_jobs=2)
    before = len(jax.live_arrays())
    study.optimize(objective, n_trials=6, n_jobs=2)
    assert len(jax.live_arrays()) == before
    assert len(study.trials) == 16
    ends = [t for t in study.trials if "end_point_of" in t.user_attrs]
    for end in ends:
        assert study.trials[end.user_attrs["end_point_of"]].value == end.value
    assert len(ends) == 8


WORKER = """
import os, signal, sys, warnings
import jax
jax.config.update("jax_enable_x64", True)
import optuna
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
import test_optuna
from gradhpo.integrations.optuna import TrialCallback, add_end_point

kind, path, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
if kind == "journal":
    storage = JournalStorage(JournalFileBackend(path + "/journal.log"))
else:
    retry = RetryHeartbeatStaleTrialCallback(max_retry=1) if kind == "retry" else None
    storage = RDBStorage(f"sqlite:///{path}/study.db", heartbeat_interval=1, grace_period=2,
                         heartbeat_stale_trial_callback=retry)
study = optuna.create_study(study_name="s", storage=storage, load_if_exists=True,
                            pruner=optuna.pruners.NopPruner(), sampler=optuna.samplers.TPESampler())


def objective(trial):
    def killer(state, metrics):
        if trial.number >= kill_at >= 0 and state.step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    frozen = study.trials[trial.number]
    number = RetryHeartbeatStaleTrialCallback.retried_trial_number(frozen)
    number = trial.number if number is None else number
    trial.set_user_attr("worker", os.getpid())
    checkpoint = test_optuna.gradhpo.Checkpoint(f"{path}/{number}", every_steps=5)
    state, history = test_optuna.run(trial, TrialCallback(trial), killer, checkpoint=checkpoint)
    loss = float(history["val_loss"][-1])
    add_end_point(study, trial, test_optuna.SPACE, state.hyperparams, loss)
    return loss


study.optimize(objective, n_trials=int(sys.argv[4]))
"""


def storage_at(kind, path):
    if kind == "journal":
        return JournalStorage(JournalFileBackend(f"{path}/journal.log"))
    return RDBStorage(f"sqlite:///{path}/study.db")


def worker(kind, path, kill_at, n_trials):
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n{WORKER}"
    arguments = ["-c", program, kind, str(path), str(kill_at), str(n_trials)]
    return python(*arguments, compiled=os.environ.get("XLA_FLAGS", ""), check=False)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["journal", "sqlite", "retry"])
def test_a_killed_worker_loses_at_most_its_trial(kind, tmp_path):
    """Numbers 0 and 1 are a trial and its end, 2 is killed after ten steps."""
    assert worker(kind, tmp_path, 2, 5).returncode == -9
    storage = storage_at(kind, tmp_path)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    complete = TrialState.COMPLETE
    assert [t.state for t in trials] == [complete, complete, TrialState.RUNNING]
    assert list(trials[2].intermediate_values) == [5, 10]
    if kind != "journal":
        time.sleep(3)  # longer than the grace period of 2 s
    done = worker(kind, tmp_path, -1, 1)
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="s", storage=storage_at(kind, tmp_path))
    assert study.trials[:2] == trials[:2]
    assert [t.state for t in study.trials[3:]] == [complete, complete]
    # Only a storage with a heartbeat notices that the trial is dead.
    running = TrialState.RUNNING if kind == "journal" else TrialState.FAIL
    assert study.trials[2].state == running
    if kind == "retry":  # resumes from its checkpoint, at step 5 or later
        again = study.trials[3]
        assert again.params == trials[2].params
        assert 20 in again.intermediate_values
        assert 5 not in again.intermediate_values
        assert again.value == run(FixedTrial(again.params))[1]["val_loss"][-1]


@pytest.mark.thorough
def test_processes_share_a_storage(tmp_path):
    with warnings.catch_warnings():  # the storage is created once, before the workers
        warnings.simplefilter("ignore")
        optuna.create_study(study_name="s", storage=storage_at("sqlite", tmp_path))
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda _: worker("sqlite", tmp_path, -1, 4), range(2)):
            assert done.returncode == 0, done.stderr
    trials = optuna.load_study(study_name="s", storage=storage_at("sqlite", tmp_path)).trials
    assert len(trials) == 16
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert len({t.user_attrs["worker"] for t in trials if "worker" in t.user_attrs}) == 2
    ends = [t for t in trials if "end_point_of" in t.user_attrs]
    assert sorted(t.user_attrs["end_point_of"] for t in ends) == sorted(
        {t.number for t in trials} - {t.number for t in ends}
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_the_dashboard_shows_what_trials_keep(kind, tmp_path):
    """Asked as a browser asks it: curves, attributes and end points."""
    dashboard = pytest.importorskip("optuna_dashboard")  # of the extra `tests`
    study = optuna.create_study(
        study_name="s", storage=storage_at(kind, tmp_path), pruner=PrunesFrom(10)
    )
    study.optimize(objective, n_trials=1)
    study.pruner = optuna.pruners.NopPruner()
    study.optimize(objective, n_trials=1)
    storage, told = storage_at(kind, tmp_path), []
    page = f"/api/studies/{storage.get_study_id_from_name('s')}"
    environ: dict[str, Any] = {"PATH_INFO": page}
    setup_testing_defaults(environ)
    answer = dashboard.wsgi(storage)(environ, lambda *x: told.append(x[0]))
    shown = json.loads(b"".join(answer))["trials"]
    assert told == ["200 OK"]
    assert [trial["state"] for trial in shown] == ["Pruned", "Complete", "Complete"]
    assert [len(trial["intermediate_values"]) for trial in shown] == [2, 4, 0]
    for trial, expected in zip(shown, study.trials, strict=True):
        found = {one["key"]: one["value"] for one in trial["user_attrs"]}
        assert found.pop("stop_reason", None) == expected.user_attrs.pop("stop_reason", None)
        assert {name: json.loads(x) for name, x in found.items()} == expected.user_attrs
    assert [len(trial["user_attrs"]) for trial in shown] == [3, 4, 3]


# -- the package -----------------------------------------------------------------------------------


def test_needs_optuna_only_when_imported(monkeypatch):
    done = python("-c", "import sys, gradhpo; print('optuna' in sys.modules)")
    assert done.stdout == "False\n"
    for name in [name for name in sys.modules if name.startswith("gradhpo.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[optuna\]"'):
        importlib.import_module("gradhpo.integrations.optuna")


@pytest.mark.usefixtures("as_a_user_has_it")
@pytest.mark.parametrize("name", bridge.__all__)
def test_docstring_example_runs(name):
    codes = blocks(inspect.getdoc(getattr(bridge, name)))
    assert codes, f"{name} has no example"
    namespace = {"gradhpo": gradhpo, "jnp": jnp, "optax": optax, "optuna": optuna}
    for code in codes:
        exec(compile(textwrap.dedent(code), name, "exec"), namespace)


def test_of_a_population_the_best_member_is_kept():
    """Along its lineage: the hyperparameters of its ancestors, step by step."""
    inner = outer = optax.sgd(0.1)
    optimizer = gradhpo.Population(
        gradhpo.OneStepOptimizer(inner, outer), 3, exploit_every=2,
        mutation=lambda key, h: jax.tree.map(lambda x: x + 0.5, h),
    )  # fmt: skip
    loss = lambda w, h, batch: jnp.square(w - h["h"])
    val = lambda w, h, batch: jnp.square(w - 1.0)
    state = optimizer.init(jnp.zeros(3), {"h": jnp.asarray([-3.0, 0.5, 2.0])})
    trial = optuna.trial.FixedTrial({})
    state, history = gradhpo.run(
        optimizer, state, gradhpo.LossFunctions(loss, val), None, None, num_steps=5,
        callbacks=[TrialCallback(trial, metric=None)], progress=False,
    )  # fmt: skip
    best, kept = optimizer.best(state), trial.user_attrs
    np.testing.assert_allclose(kept["hyperparams"]["h"], best.hyperparams["h"])
    member = kept["member"]
    assert history["val_loss"][-1, member] == min(history["val_loss"][-1])
    expected = []
    for step in range(4, -1, -1):
        expected.append(history["hyperparams.h"][step, member])
        member = history["parent"][step - 1, member] if step else member
    np.testing.assert_allclose(kept["schedule"]["h"], expected[::-1])
    assert len(kept["schedule"]["step"]) == 5
