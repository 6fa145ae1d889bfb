"""What `run` records besides its metrics (`record`, `Monitor`), and how its report uses it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import relaxed
from sklearn.datasets import load_breast_cancer

import gradhpo


SGD, OUTER = relaxed(optax.sgd(0.1)), relaxed(optax.sgd(0.2))
OPTIMIZER = gradhpo.OneStepOptimizer(SGD, OUTER)
H = {"decay": jnp.array(0.5), "target": jnp.zeros(3)}
X = jnp.arange(12.0).reshape(4, 3) / 12


def train_loss(w, h, batch):
    return jnp.sum((w - h["target"]) ** 2) + h["decay"] * jnp.sum(w**2) + 0 * jnp.sum(batch)


def val_loss(w, h, batch):
    return jnp.sum((w - 1.0) ** 2) + h["decay"] ** 2 + 0 * jnp.sum(batch[0])


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
DATA = gradhpo.ArrayData(X, 2, jax.random.key(0))
VAL = (X, X[:, 0])


def run(optimizer=OPTIMIZER, hyperparams=H, val_data=VAL, losses=LOSSES, **settings):
    state = optimizer.init(jnp.full(3, 0.2), hyperparams)
    settings = {"num_steps": 6, "progress": False} | settings
    return gradhpo.run(optimizer, state, losses, DATA, val_data, **settings)


def by_hand(num_steps=6):
    """The states after each step."""
    state = OPTIMIZER.init(jnp.full(3, 0.2), H)
    for t in range(num_steps):
        state = OPTIMIZER.step(state, DATA(t), VAL, train_loss, val_loss)
        yield state


def test_record_and_scalar_hyperparameters_are_those_after_each_step():
    record = lambda state: {
        "norm": jnp.linalg.norm(state.params),
        "target": state.hyperparams["target"],
        "count": state.step,
    }
    _, history = run(record=record, chunk_size=4)
    states = list(by_hand())
    expected = [float(s.hyperparams["decay"]) for s in states]
    np.testing.assert_allclose(history["hyperparams.decay"], expected, rtol=1e-12)
    targets = np.stack([s.hyperparams["target"] for s in states])
    assert history["target"].shape == (6, 3)
    np.testing.assert_allclose(history["target"], targets, rtol=1e-12)
    norms = [np.linalg.norm(s.params) for s in states]
    np.testing.assert_allclose(history["norm"], norms, rtol=1e-12)
    assert history["count"].tolist() == [1, 2, 3, 4, 5, 6]
    assert "hyperparams.target" not in history


def test_a_bare_scalar_and_nested_names():
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    _, history = run(hyperparams=jnp.array(0.5), losses=gradhpo.LossFunctions(loss, loss))
    assert history["hyperparams"].shape == (6,)

    nested = {"a": [jnp.array(0.5)], "b": {"c": jnp.array(0.1)}}
    of = lambda w, h, batch: jnp.sum((w - h["a"][0] - h["b"]["c"]) ** 2)
    _, history = run(hyperparams=nested, losses=gradhpo.LossFunctions(of, of))
    assert {"hyperparams.a.0", "hyperparams.b.c"} <= set(history)


def test_in_episodes_it_is_the_state_before_the_restart():
    record = lambda state: {"w": state.params}
    state, history = run(record=record, steps_per_episode=3, reptile_rate=0.0)
    assert history["w"].shape == (6, 3)
    assert_same(state.params, jnp.full(3, 0.2))
    assert np.all(history["w"][[2, 5]] != 0.2)


def test_it_survives_a_checkpoint(tmp_path):
    record = lambda state: {"target": state.hyperparams["target"], "count": state.step}
    monitor = lambda: gradhpo.Monitor({"test_loss": lambda s: jnp.sum(s.params**2)})
    _, whole = run(record=record, callbacks=[monitor()], chunk_size=2)
    for steps in (2, 6):
        _, history = run(
            record=record,
            callbacks=[monitor()],
            chunk_size=2,
            num_steps=steps,
            checkpoint=tmp_path,
        )
    for name in whole:
        np.testing.assert_array_equal(history[name], whole[name])
    with pytest.raises(ValueError, match=r"another run.*record"):
        run(num_steps=6, checkpoint=tmp_path, callbacks=[monitor()])
    with pytest.raises(ValueError, match=r"another run.*monitored"):
        run(num_steps=6, checkpoint=tmp_path, record=record)


BAD = {
    "a metric": (lambda s: {"val_loss": s.step}, ValueError, "'val_loss', which run records"),
    "a hyperparameter": (
        lambda s: {"hyperparams.decay": s.step}, ValueError, "'hyperparams.decay', which run"
    ),
    "an array": (lambda s: s.params, TypeError, "must return a dict of name to array"),
    "a tree": (lambda s: {"all": {"w": s.params}}, TypeError, "which is not an array"),
    "a key": (lambda s: {"key": jax.random.key(0)}, TypeError, "which is not an array"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_records(case):
    record, kind, said = BAD[case]
    with pytest.raises(kind, match=said):
        run(record=record)


def test_the_memory_of_an_algorithm_has_its_names():
    optimizer = gradhpo.OnlineHypergradientOptimizer(SGD, OUTER, estimation_period=None)
    with pytest.raises(ValueError, match="'theta', which run records already"):
        run(optimizer, record=lambda s: {"theta": s.step})


# -- monitors ----------------------------------------------------------------------------------


def test_a_monitor_measures_at_the_ends_of_chunks_before_the_others():
    seen = []
    test = gradhpo.Monitor({"test_loss": lambda s: jnp.sum((s.params - 0.5) ** 2)})
    watch = lambda state, metrics: seen.append(metrics["test_loss"])
    _, history = run(callbacks=[watch, test], chunk_size=4)
    states = list(by_hand())
    expected = np.full(6, np.nan)
    for i in (3, 5):
        expected[i] = np.sum((np.asarray(states[i].params) - 0.5) ** 2)
    np.testing.assert_allclose(history["test_loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate(seen), expected, rtol=1e-12)


def test_early_stopping_and_the_best_state_watch_it():
    rising = gradhpo.Monitor({"test_loss": lambda s: 1.0 + float(s.step)})
    best = gradhpo.BestState(metric="test_loss")
    stopping = gradhpo.EarlyStopping(patience=3, metric="test_loss")
    _, history = run(callbacks=[best, stopping, rising], num_steps=60, chunk_size=2)
    assert history.stop_reason == "early stopping"
    assert best.step == 2
    assert len(history["test_loss"]) == 6


def test_loggers_and_the_bar_show_it(tmp_path, capsys):
    test = gradhpo.Monitor({"test_loss": lambda s: 0.125})
    logger = gradhpo.JSONLinesLogger(tmp_path / "log.jsonl")
    record = lambda s: {"target": s.hyperparams["target"]}
    run(callbacks=[logger, test], chunk_size=3, record=record, progress=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["test_loss"] for line in lines] == [None, None, 0.125, None, None, 0.125]
    assert "hyperparams.decay" in lines[0]
    assert "target" not in lines[0]
    assert "test_loss=0.125" in capsys.readouterr().err


def test_a_monitor_that_fails_ends_the_run_and_loses_nothing():
    def fails_late(state):
        if state.step > 3:
            raise OSError("gone")
        return 0.5

    said = r"A callback failed: OSError: gone \(in Monitor 'test', called as function\(state\)\)"
    with pytest.warns(RuntimeWarning, match=said):
        state, history = run(callbacks=[gradhpo.Monitor({"test": fails_late})], chunk_size=3)
    assert history.stop_reason == "callback error"
    assert len(history["val_loss"]) == state.step == 6
    np.testing.assert_array_equal(np.isfinite(history["test"]), [0, 0, 1, 0, 0, 0])


def test_bad_monitors():
    with pytest.raises(ValueError, match="functions is empty"):
        gradhpo.Monitor({})
    with pytest.raises(TypeError, match="functions"):
        gradhpo.Monitor(lambda state: 1.0)
    with pytest.raises(ValueError, match="'val_loss', which run records already"):
        run(callbacks=[gradhpo.Monitor({"val_loss": lambda s: 1.0})])
    one = gradhpo.Monitor({"test": lambda s: 1.0})
    with pytest.raises(ValueError, match="'test', which run records already"):
        run(callbacks=[one, gradhpo.Monitor({"test": lambda s: 1.0})])
    with pytest.raises(ValueError, match="'test', which run records already"):
        run(callbacks=[one], record=lambda s: {"test": s.step})
    with pytest.raises(TypeError, match=r"'test' returned .* return one real number"):
        run(callbacks=[gradhpo.Monitor({"test": lambda s: s.params})])
    with pytest.raises(TypeError, match=r"'test' returned numbers of shape \(3,\); return one"):
        run(callbacks=[gradhpo.Monitor({"test": lambda s: jnp.zeros(3)})])


@pytest.mark.parametrize(
    ("callback", "note"),
    [
        (lambda fails: gradhpo.Monitor({"third": fails}), "in Monitor 'third', called as function"),
        (
            lambda fails: lambda state, metrics: fails(state),
            r"in callbacks\[0\] \(<lambda>\), call",
        ),
        (lambda fails: gradhpo.BestState(metric=fails), "in metric of BestState, called as metric"),
        (lambda fails: gradhpo.CSVLogger("log.csv", extra=fails), "in extra of CSVLogger, called"),
    ],
)
def test_an_error_in_a_function_says_where_it_was_called(callback, note, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError) as raised:
        run(callbacks=[callback(lambda state: 1 / 0)])
    assert re.search(note, " ".join(raised.value.__notes__))


def test_objects_print_what_they_are():
    stopping = gradhpo.EarlyStopping(patience=3, metric="third_loss")
    assert repr(stopping) == "EarlyStopping(patience=3, BestState(third_loss, nothing yet))"
    run(callbacks=[gradhpo.Monitor({"third_loss": lambda s: 0.5}), stopping], chunk_size=3)
    assert repr(stopping.best) == "BestState(third_loss=0.5 at step 3)"
    with pytest.raises(TypeError, match=r"callbacks .*Monitor\(a, b\)"):
        run(callbacks=gradhpo.Monitor({"a": lambda s: 0.5, "b": lambda s: 0.5}))


@pytest.mark.parametrize("name", ["acc", "test_accuracy", "F1", "roc_auc", "score"])
def test_a_score_to_be_minimised_warns(name):
    with pytest.warns(UserWarning, match="looks like a score, but the lowest value counts"):
        gradhpo.EarlyStopping(3, metric=name)


@pytest.mark.parametrize("name", ["val_loss", "minus_acc", "neg_score", "accumulated", "f1_error"])
def test_what_is_no_score_does_not_warn(name):
    gradhpo.BestState(metric=name)  # a warning is an error in this suite


# -- the report --------------------------------------------------------------------------------


def rising_from(lowest):
    return lambda s: 1.0 + abs(float(s.step) - lowest) / 10


def test_the_report_speaks_of_over_fitting():
    test = gradhpo.Monitor({"test_loss": rising_from(4)})
    _, history = run(callbacks=[test], chunk_size=2, num_steps=8)
    assert "test_loss has risen from 1 after 4 steps to 1.4, while the validation" in history.report
    assert "EarlyStopping(metric='test_loss')" in history.report
    assert "4 validation examples for 4 hyperparameters, 1 for each" in history.report
    assert "Monitor looked only 4 times: run(chunk_size=1) makes it look" in history.report


def test_early_stopping_says_what_it_saw():
    test = gradhpo.Monitor({"test_loss": rising_from(4)})
    stopping = gradhpo.EarlyStopping(patience=4, metric="test_loss")
    _, history = run(callbacks=[test, stopping], chunk_size=2, num_steps=60)
    said = "no lower test_loss in 4 steps. The lowest was 1, after step 4; .best.state has that"
    assert said in history.report
    assert stopping.best.state.step == 4


@pytest.mark.thorough
def test_thirty_decays_over_fit_150_patients_in_every_split():
    """Breast cancer: the validation loss falls in 5 of 5 splits, and the test loss rises."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)

    def error(w, batch):
        logits = batch[0] @ w["weights"] + w["bias"]
        return jnp.mean(jnp.logaddexp(0, logits) - batch[1] * logits)

    def penalised(w, h, batch):
        return error(w, batch) + jnp.sum(jnp.exp(h["log_decay"]) * w["weights"] ** 2)

    losses = gradhpo.LossFunctions(penalised, lambda w, h, batch: error(w, batch))
    inner = lambda h: relaxed(optax.sgd(jnp.exp(h["log_rate"]), momentum=0.9))
    optimizer = gradhpo.UnrolledOptimizer(inner, relaxed(optax.adam(0.1)), unroll_steps=50)
    state = optimizer.init(
        {"weights": jnp.zeros(30), "bias": jnp.zeros(())},
        {"log_decay": jnp.full(30, -3.0), "log_rate": jnp.array(-2.0)},
    )
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(y))
        parts = np.split(order, [100, 250])
        train, val, test = ((x[part], y[part].astype(float)) for part in parts)
        of_test = jax.jit(lambda state, test=test: error(state.params, test))
        _, history = gradhpo.run(
            optimizer, state, losses, train, val, num_steps=200, chunk_size=10, progress=False,
            callbacks=[gradhpo.Monitor({"test_loss": of_test})],
        )  # fmt: skip
        measured = history["test_loss"][9::10]
        assert history["val_loss"][-1] < 0.7 * history["val_loss"][9]
        assert measured[-1] > 1.2 * np.min(measured)
        assert "test_loss has risen from" in history.report
        assert "150 validation examples for 31 hyperparameters" in history.report


def test_the_report_is_quiet_where_nothing_rises():
    for name, function in (
        ("test_loss", lambda s: 1 / float(s.step)),
        ("accuracy", rising_from(2)),  # higher is better
    ):
        monitor = gradhpo.Monitor({name: function})
        _, history = run(callbacks=[monitor], chunk_size=2, num_steps=8)
        assert "has risen" not in history.report


@pytest.mark.thorough
def test_how_many_examples_there_are_is_known_of_arrays_alone():
    assert "4 validation examples" in run(val_data=gradhpo.ArrayData(VAL, 2, DATA.key))[1].report
    assert "examples" not in run(val_data=lambda i: VAL)[1].report
    fixed = gradhpo.FixedOptimizer(SGD)
    assert "examples" not in run(fixed)[1].report
