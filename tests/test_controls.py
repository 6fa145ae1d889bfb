"""Callbacks, loggers, progress, failures: everything in a run except its steps."""

import csv
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import types
import warnings
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import OUTER, relaxed
from ridge import LOSSES, SGD, X, Y, train_loss, val_loss
from tqdm import TqdmWarning, tqdm

import gradhpo
from gradhpo.training import driver
from gradhpo.training.chunk import Chunk
from gradhpo.utils import progress


BATCHES = [(np.asarray(X[i : i + 4]), np.asarray(Y[i : i + 4])) for i in range(6)]


OPTIMIZER = gradhpo.OneStepOptimizer(SGD, OUTER)
DATA = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))


def run(num_steps=12, data=DATA, optimizer=OPTIMIZER, **settings):
    settings = {"chunk_size": 3, "progress": False} | settings
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -2.0))
    return gradhpo.run(optimizer, state, LOSSES, data, (X, Y), num_steps=num_steps, **settings)


# -- early stopping, the best state, time ------------------------------------------------------


def values(*of_chunks):
    """A metric with these values, chunk by chunk."""
    return lambda state: of_chunks[int(state.step) // 3 - 1]


def test_best_state_is_that_of_the_lowest_value():
    states = []
    best = gradhpo.BestState(values(3.0, 1.0, np.nan, 1.0, 2.0))
    run(15, callbacks=[best, lambda state, metrics: states.append(state)])
    assert (best.value, best.step) == (1.0, 6)
    assert best.state is states[1]


def test_best_state_reads_the_metric_of_the_last_step():
    best = gradhpo.BestState("train_loss")
    _, history = run(callbacks=[best])
    ends = history["train_loss"][2::3]
    assert best.step == 3 * np.argmin(ends) + 3
    assert best.value == np.min(ends)
    assert best.value == best.state.metadata["train_loss"]


def test_callbacks_see_the_end_of_an_episode():
    """With cold restarts too: the measured parameters, not the next start."""
    best, seen = gradhpo.BestState(), []
    state, history = run(
        9, steps_per_episode=3, reptile_rate=0.0, chunk_size=3,
        callbacks=[best, lambda state, metrics: seen.append(state)],
    )  # fmt: skip
    assert not np.any(state.params)
    assert all(np.any(state.params) for state in seen)
    assert best.step in (3, 6, 9)
    np.testing.assert_allclose(val_loss(best.state.params, None, (X, Y)), best.value, rtol=1e-12)
    assert best.value == np.min(history["val_loss"][2::3])


def test_minus_infinity_is_no_best_value():
    best = gradhpo.BestState(values(1.0, -np.inf, 0.5))
    run(9, callbacks=[best])
    assert (best.value, best.step) == (0.5, 9)


def test_callbacks_may_add_to_their_metrics():
    def add(state, metrics):
        metrics["step"] = int(state.step)

    _, history = run(6, callbacks=[add, gradhpo.BestState()])
    assert "step" not in history


def test_a_memory_keeps_its_structure():
    class Growing:
        def start(self, state, resumed):
            return [np.zeros(1)]

        def __call__(self, state, metrics):
            self.memory = [*self.memory, np.zeros(1)]

        memory = None

    with pytest.raises(TypeError, match="the memory of Growing has changed its structure"):
        run(6, callbacks=[Growing()])


def test_rejected_steps_are_no_best_state():
    """The loss of a refused step belongs to parameters that are not in the state."""
    best = gradhpo.BestState(lambda state: 0.0)
    with pytest.warns(RuntimeWarning, match="rejected"):
        run(3, data=lambda i: (X, jnp.full_like(Y, jnp.nan)), callbacks=[best], chunk_size=1)
    assert best.state is None
    assert (best.value, best.step) == (np.inf, 0)


@pytest.mark.parametrize(
    ("of_chunks", "min_delta", "stops_at", "best_at"),
    [
        ((3.0, 2.0, 2.5, 2.5, 0.0), 0.0, 12, 6),
        ((3.0, 2.9, 2.8, 2.7, 2.6), 0.5, 9, 9),  # falls, but not by enough
        ((3.0, 2.7, 2.4, 2.1, 1.8), 0.5, None, 15),  # enough, taken together
        ((np.nan, np.nan, 1.0, 1.0, 1.0), 0.0, 6, 0),  # as long as patience, from the start
    ],
)
def test_early_stopping(of_chunks, min_delta, stops_at, best_at):
    stopping = gradhpo.EarlyStopping(6, values(*of_chunks), min_delta)
    state, history = run(15, callbacks=[stopping])
    assert history.stop_reason == ("num_steps" if stops_at is None else "early stopping")
    assert state.step == (stops_at or 15)
    assert stopping.best.step == best_at
    # A second run starts fresh.
    again, _ = run(15, callbacks=[stopping])
    assert again.step == state.step


def test_time_limit():
    limit = gradhpo.TimeLimit(seconds=0.2)
    slow = lambda state, metrics: time.sleep(0.1)
    _, history = run(300, callbacks=[slow, limit])
    assert history.stop_reason == "time limit"
    assert 3 <= len(history["val_loss"]) <= 9
    assert "Its time limit was reached" in history.report


# -- around the outer optimizer ----------------------------------------------------------------


def test_moving_average_is_the_mean_of_the_last():
    transformation = gradhpo.moving_average(3)
    updates = np.random.default_rng(0).normal(size=(11, 2))
    state = transformation.init({"a": jnp.zeros(2)})
    for t in range(11):
        found, state = jax.jit(transformation.update)({"a": jnp.asarray(updates[t])}, state)
        expected = np.mean(updates[max(0, t - 2) : t + 1], axis=0)
        np.testing.assert_allclose(found["a"], expected, rtol=1e-12)
    with pytest.raises(ValueError, match="window must be at least 1"):
        gradhpo.moving_average(0)


@pytest.mark.parametrize("window", [1, 2])
def test_moving_average_counts_without_end(window):
    """The count wraps around, and uses the same slots as one that does not."""
    transformation = gradhpo.moving_average(window)
    state: Any = transformation.init(jnp.zeros(()))
    seen = []
    for t in range(9):
        found, state = transformation.update(jnp.asarray(float(t)), state)
        seen.append(float(found))
    assert seen == [np.mean(range(max(0, t - window + 1), t + 1)) for t in range(9)]
    assert state.number <= 2 * window


@pytest.mark.thorough
def test_clipping_smoothing_and_warm_up_in_a_run():
    """Against the same hypergradients, transformed by hand."""
    seen = []
    due = lambda step: (step >= 4) & (step % 2 == 0)
    outer = optax.chain(
        optax.clip_by_global_norm(0.01),
        gradhpo.moving_average(2),
        relaxed(optax.conditionally_mask(optax.sgd(0.5), due)),
    )
    optimizer = gradhpo.OneStepOptimizer(SGD, relaxed(outer))
    record = lambda state, metrics: seen.append(np.asarray(state.hyperparams))
    run(8, optimizer=optimizer, callbacks=[record], chunk_size=1)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -2.0))
    clipped = []
    for t in range(8):
        g = np.asarray(
            optimizer.compute_hypergradient(state, DATA(t), (X, Y), train_loss, val_loss)
        )
        clipped.append(g * min(1, 0.01 / np.linalg.norm(g)) if np.any(g) else g)
        step = 0.5 * np.mean(clipped[-2:], axis=0) if t >= 4 and t % 2 == 0 else 0.0
        expected = np.asarray(state.hyperparams) - step
        np.testing.assert_allclose(seen[t], expected, rtol=1e-10)
        state = optimizer.step(state, DATA(t), (X, Y), train_loss, val_loss)
    assert np.all(seen[3] == -2.0)
    assert np.any(seen[4] != -2.0)


# -- logs --------------------------------------------------------------------------------------


def test_loggers_write_what_history_holds(tmp_path):
    lines, table = tmp_path / "new" / "log.jsonl", tmp_path / "log.csv"
    loggers = [gradhpo.JSONLinesLogger(lines), gradhpo.CSVLogger(str(table), every=5)]
    _, history = run(callbacks=loggers)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    with open(table) as file:
        columns = list(csv.DictReader(file))
    assert [int(row["step"]) for row in columns] == [5, 10]
    for name, expected in history.items():
        np.testing.assert_array_equal([row[name] for row in rows], expected)
        np.testing.assert_array_equal([float(row[name]) for row in columns], expected[[4, 9]])


def test_loggers_write_what_is_no_metric(tmp_path):
    lines, table = tmp_path / "log.jsonl", tmp_path / "log.csv"
    extra = lambda state: {"first": state.hyperparams[0], "doubled": 2 * int(state.step)}
    loggers = [
        gradhpo.JSONLinesLogger(lines, extra=extra), gradhpo.CSVLogger(table, 2, extra=extra),
    ]  # fmt: skip
    state, _ = run(6, callbacks=loggers)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.get("doubled") for row in rows] == [None, None, 6.0, None, None, 12.0]
    assert rows[-1]["first"] == float(state.hyperparams[0])
    with open(table) as file:
        columns = list(csv.DictReader(file))
    assert [(row["step"], row["doubled"]) for row in columns] == [
        ("2", ""), ("3", "6.0"), ("4", ""), ("6", "12.0"),
    ]  # fmt: skip


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "log.jsonl"
    data = lambda i: (X, jnp.where(i == 1, jnp.nan, Y))
    run(3, data=data, callbacks=[gradhpo.JSONLinesLogger(path)])
    second = path.read_text().splitlines()[1]
    assert json.loads(second, parse_constant=pytest.fail)["train_loss"] is None


def test_loggers_add_to_their_own_file_only(tmp_path):
    path = tmp_path / "log.csv"
    logger = gradhpo.CSVLogger(path)
    run(3, callbacks=[logger])
    run(3, callbacks=[logger])
    assert len(path.read_text().splitlines()) == 7
    before = path.read_bytes()
    with pytest.raises(ValueError, match="already has content: pass another path"):
        run(3, callbacks=[gradhpo.CSVLogger(path)])
    assert path.read_bytes() == before
    run(3, callbacks=[gradhpo.CSVLogger(path, append=True)])
    lines = path.read_text().splitlines()
    assert len(lines) == 10
    assert sum(line.startswith("step") for line in lines) == 1


def test_a_log_that_was_shortened_goes_on_with_a_warning(tmp_path):
    path = tmp_path / "log.jsonl"
    run(6, callbacks=[gradhpo.JSONLinesLogger(path)], checkpoint=tmp_path)
    path.write_text("")
    with pytest.warns(UserWarning, match="is shorter than this run left it"):
        run(9, callbacks=[gradhpo.JSONLinesLogger(path)], checkpoint=tmp_path)
    assert len(path.read_text().splitlines()) == 3


def test_lines_of_others_stay(tmp_path):
    path = tmp_path / "log.jsonl"

    def note(state, metrics):
        with open(path, "a") as file:
            file.write("mine\n")

    run(9, callbacks=[gradhpo.JSONLinesLogger(path), note, gradhpo.JSONLinesLogger(path)])
    lines = path.read_text().splitlines()
    assert lines.count("mine") == 3
    assert len(lines) == 21


def test_progress_in_a_log_is_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    run(progress=True)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    first, compiled, *lines = shown.splitlines()
    assert first == "gradhpo.run: 12 steps, compiling"
    assert compiled.startswith("gradhpo.run: 3 of 12 steps after ")
    assert compiled.endswith(" s, including compilation")
    assert [line.split()[1].rstrip(",") for line in lines] == ["3/12", "6/12", "9/12", "12/12"]
    assert all("|hypergrad|=" in line for line in lines)


def test_a_label_of_a_run(capsys, monkeypatch, tmp_path):
    """In its lines, its bar and its files."""
    lines, table = tmp_path / "log.jsonl", tmp_path / "log.csv"
    for label in ("seed 0", 'seed "1", long'):
        loggers = [
            gradhpo.JSONLinesLogger(lines, append=True, label=label),
            gradhpo.CSVLogger(table, 2, append=True, label=label),
        ]
        run(3, callbacks=loggers, progress=label)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "seed 0: 3 steps, compiling"
    assert second.startswith("seed 0: 100%")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["label"] for row in rows] == ["seed 0"] * 3 + ['seed "1", long'] * 3
    with open(table) as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["seed 0", 'seed "1", long']
    screen = Terminal()
    a_terminal(monkeypatch, screen)
    run(3, progress="seed 0")
    assert "seed 0: 100%" in screen.text
    run(3, progress=False)


def test_a_notebook_without_widgets_is_not_warned(monkeypatch):
    """`tqdm.auto` warns there when it is imported, which `import gradhpo` does."""

    class ZMQInteractiveShell:
        config: ClassVar[dict] = {"IPKernelApp": {}}

    shell = types.ModuleType("IPython")
    shell.get_ipython = ZMQInteractiveShell  # pyright: ignore
    for name in [x for x in sys.modules if x.startswith("tqdm.") and x != "tqdm.std"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("zmqshell"))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.warns(TqdmWarning, match="IProgress not found"):
        importlib.import_module("tqdm.autonotebook")
    for name in ("tqdm.autonotebook", "tqdm.auto", "tqdm.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("anew", progress.__file__)
    anew = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.loader.exec_module(anew)
    assert issubclass(anew.tqdm, tqdm)


def test_a_terminal_that_closes_does_not_end_the_run(monkeypatch):
    class Closed(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    for terminal in (True, False):
        monkeypatch.setattr(Closed, "isatty", lambda self, terminal=terminal: terminal)
        a_terminal(monkeypatch, Closed())
        assert run(6, progress=True)[1].stop_reason == "num_steps"


class Terminal:
    """A terminal that records its output."""

    columns = 100

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        return 2


def a_terminal(monkeypatch, screen):
    monkeypatch.setattr(progress.sys, "stderr", screen)
    size = os.terminal_size((screen.columns, 24))
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda *_: size)


def test_a_terminal_without_a_width_gets_lines(monkeypatch):
    screen = Terminal()
    screen.columns = 0
    a_terminal(monkeypatch, screen)
    run(6, progress=True)
    assert "6/6" in screen.text
    assert "\r" not in screen.text


@pytest.mark.parametrize("terminal", [True, False])
def test_the_estimate_leaves_out_the_first_chunk(terminal, monkeypatch, capsys):
    """100 s of compilation, then 1 s for every chunk: 8 chunks are left after the second."""
    now = [1_000.0]
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    screen = Terminal()
    if terminal:
        a_terminal(monkeypatch, screen)
    metrics = {name: np.ones(10) for name in ("train_loss", "val_loss", "hypergrad_norm")}
    with progress.ProgressBar(100) as bar:
        now[0] += 100.0
        bar.advance(10, metrics)
        now[0] += 1.0
        bar.advance(10, metrics)
        bar._print() if not terminal else bar._bar.refresh()
    shown = screen.text if terminal else capsys.readouterr().err
    assert "20/100 [00:01<00:08, 10.00step/s" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_of_one_chunk_shows_no_estimate(terminal, monkeypatch, capsys):
    screen = Terminal()
    if terminal:
        a_terminal(monkeypatch, screen)
    run(3, progress="seed 0")
    shown = screen.text if terminal else capsys.readouterr().err
    last = shown.splitlines()[-1].split("\r")[-1]
    assert last.startswith("seed 0: 100%")
    assert "3/3, train=" in last
    assert not re.search(r"\?|\d\d:\d\d|step/s", shown)


# -- interrupted -------------------------------------------------------------------------------


def interrupt(at):
    def callback(state, metrics):
        if int(state.step) == at:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def test_ctrl_c_returns_what_was_done(capsys):
    state, history = run(30, callbacks=[interrupt(6)])
    assert history.stop_reason == "interrupted"
    assert state.step == len(history["val_loss"]) == 6
    assert_same(state, run(6)[0])
    assert "interrupt again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_raises():
    twice = [interrupt(6), interrupt(6)]
    with pytest.raises(KeyboardInterrupt):
        run(30, callbacks=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_raised_by_a_callback_returns_too(tmp_path):
    def raises(state, metrics):
        if int(state.step) == 6:
            raise KeyboardInterrupt

    state, history = run(30, callbacks=[raises], checkpoint=tmp_path)
    assert history.stop_reason == "interrupted"
    assert state.step == 6
    # Callbacks have not seen all of that chunk: it is repeated from the previous checkpoint.
    assert gradhpo.load_checkpoint(tmp_path, state)[0].step == 0


def test_a_handler_of_the_users_is_left_alone():
    caught = []
    signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        _, history = run(9, callbacks=[interrupt(3)])
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert caught == [1]
    assert history.stop_reason == "num_steps"


def test_runs_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(6)))
    thread.start()
    thread.join()
    assert results[0][0].step == 6


# -- failures ----------------------------------------------------------------------------------


def fails_at(number, error):
    def loader():
        for i in range(100):
            if i == number:
                raise error
            yield BATCHES[i % 6]

    return loader()


def test_a_failing_loader_ends_the_run_with_its_state():
    with pytest.warns(RuntimeWarning, match="A data source failed: OSError: no such disk") as seen:
        state, history = run(30, data=fails_at(10, OSError("no such disk")))
    assert history.stop_reason == "data error"
    assert isinstance(history.error, OSError)
    assert state.step == len(history["val_loss"]) == 10
    assert_same(state, run(10, data=iter(BATCHES * 2))[0])
    assert seen[0].filename == __file__


def test_a_failing_callback_ends_the_run_with_its_state(tmp_path):
    def fails(state, metrics):
        if int(state.step) == 6:
            raise RuntimeError("a slip of the pen")

    message = (
        "A callback failed: RuntimeError: a slip of the pen.*The last checkpoint is from step 3"
    )
    with pytest.warns(RuntimeWarning, match=message):
        state, history = run(30, callbacks=[fails], checkpoint=gradhpo.Checkpoint(tmp_path, 1))
    assert history.stop_reason == "callback error"
    assert_same(state, run(6)[0])
    # Once repaired, the run resumes from the previous checkpoint.
    assert_same(run(12, checkpoint=tmp_path)[0], run(12)[0])


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: a cable"), "device error", "device failed"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            "out of memory",
            r"out of memory: .*allocating 9 bytes. gradhpo.plan\(",
        ),
    ],
)
def test_a_failing_device_ends_the_run_with_its_state(monkeypatch, error, reason, message):
    calls = []

    class Failing(Chunk):
        def run_steps(self, state, length):
            calls.append(1)
            if len(calls) == 3:
                raise error
            return Chunk(**vars(self)).run_steps(state, length)

    monkeypatch.setattr(driver, "Chunk", Failing)
    with pytest.warns(RuntimeWarning, match=message):
        state, history = run(30)
    assert (history.stop_reason, history.error) == (reason, error)
    monkeypatch.undo()
    assert_same(state, run(6)[0])


@pytest.mark.parametrize("fails_at", [1, 7])
def test_a_check_within_a_loss_says_what_it_found(fails_at):
    data = lambda i: (X, Y, i)

    def checked_loss(w, h, batch):
        w = eqx.error_if(w, batch[2] == fails_at, "the solver took too many steps")
        return train_loss(w, h, batch[:2])

    losses = gradhpo.LossFunctions(checked_loss, lambda w, h, batch: val_loss(w, h, batch[:2]))
    state = OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0))
    go = lambda: gradhpo.run(
        OPTIMIZER, state, losses, data, (X, Y), num_steps=9, chunk_size=3, progress=False
    )
    if fails_at == 1:
        with pytest.raises(eqx.EquinoxRuntimeError, match=r"^the solver took too many steps$"):
            go()
    else:
        with pytest.warns(RuntimeWarning, match="A check within a loss failed: .*too many steps$"):
            found, history = go()
        assert history.stop_reason == "loss error"
        assert found.step == 6


def test_no_memory_at_the_start_raises_with_advice():
    """For real: batches of 4 TB."""
    huge = lambda i: (jnp.full((10**12 // 6, 3), i, float), jnp.ones(10**12 // 6))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        run(3, data=huge)
    assert "gradhpo.plan" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"data": fails_at(1, OSError("at once"))},
        {"callbacks": [lambda state, metrics: 1 / 0]},
    ],
)
def test_what_fails_in_the_first_chunk_raises(settings):
    with pytest.raises((OSError, ZeroDivisionError)):
        run(**settings)


def test_divergence_that_stays_finite_is_said():
    data = lambda i: (30.0 * X, Y)  # far beyond the edge of stability of a step of 0.1
    _, history = run(6, data=data)
    assert history.stop_reason == "num_steps"
    assert "Does it diverge? The training loss grew from 0.35" in history.report
    assert "diverge" not in run(6)[1].report


def test_divergence_within_the_first_step_is_said():
    """Before the first metric, since the norm of the parameters is known from the start."""
    optimizer = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(30.0)), OUTER, unroll_steps=20)
    state = optimizer.init(jnp.ones(3), jnp.full(3, -2.0))
    _, history = gradhpo.run(optimizer, state, LOSSES, (X, Y), (X, Y), num_steps=1, progress=False)
    assert "norm of the parameters grew from 1.73" in history.report


def test_a_first_chunk_that_fails_costs_no_batches():
    data: Any = gradhpo.iterate(BATCHES)
    with pytest.raises(ZeroDivisionError):
        run(30, data=data, callbacks=[lambda state, metrics: 1 / 0])
    assert data.drawn == 3  # by the chunk that the callback saw


def test_a_loader_may_fill_one_buffer():
    def refilled():
        x, y = np.empty((4, 3)), np.empty(4)
        for batch in BATCHES * 2:
            x[...], y[...] = batch
            yield x, y

    assert_same(run(data=refilled())[0], run(data=iter(BATCHES * 2))[0])


def test_batches_drawn_ahead_are_given_back():
    """A run that a callback stops leaves `iterate` where its last step left it."""
    data: Any = gradhpo.iterate(BATCHES)
    state, _ = run(30, data=data, callbacks=[lambda state, metrics: int(state.step) == 6])
    assert state.step == 6
    assert data.drawn == 6
    # This one takes some of the returned batches, and gives some of those back again.
    state, _ = run(30, data=data, chunk_size=1, callbacks=[lambda state, metrics: True])
    assert state.step == 1
    for number in range(7, 12):
        np.testing.assert_array_equal(next(data)[0], BATCHES[number % 6][0])


# -- consecutive runs --------------------------------------------------------------------------


@pytest.mark.thorough
def test_two_hundred_runs_leave_nothing_behind(tmp_path):
    traces = []

    def counted(w, h, batch):
        traces.append(1)
        return train_loss(w, h, batch)

    losses = gradhpo.LossFunctions(counted, val_loss)
    state = OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0))

    def once(number):
        gradhpo.run(
            OPTIMIZER, state, losses, DATA, (X, Y), num_steps=6, chunk_size=3, progress=False,
            callbacks=[gradhpo.EarlyStopping(10), gradhpo.CSVLogger(tmp_path / f"{number}.csv")],
            checkpoint=tmp_path / str(number),
        )  # fmt: skip

    once(0)
    compiled, before, files = len(traces), len(jax.live_arrays()), len(os.listdir("/proc/self/fd"))
    for number in range(1, 200):
        once(number)
    assert len(traces) == compiled
    assert len(jax.live_arrays()) <= before + 5
    assert len(os.listdir("/proc/self/fd")) <= files + 2
