"""Callbacks: what stops a run, and which memory each one gets back when a run resumes."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import OUTER
from ridge import LOSSES, SGD, X, Y

import gradhpo
from gradhpo.utils.description import described_function, differences


OPTIMIZER = gradhpo.OneStepOptimizer(SGD, OUTER)
DATA = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))


def run(callbacks, directory=None, num_steps=6, **settings):
    state = OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0))
    if directory is not None:
        settings["checkpoint"] = gradhpo.Checkpoint(directory, every_steps=1)
    return gradhpo.run(
        OPTIMIZER, state, LOSSES, DATA, (X, Y), num_steps=num_steps, chunk_size=3,
        callbacks=callbacks, progress=False, **settings,
    )  # fmt: skip


def said_by(callbacks, directory, num_steps=12):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(callbacks, directory, num_steps)
    return [str(warning.message) for warning in said]


# -- how a run ends ----------------------------------------------------------------------------


class Ends:
    """Records its arguments at the end, and raises."""

    def __init__(self, error, directory):
        self.error, self.directory, self.given = error, directory, None

    def __call__(self, state, metrics):
        return bool(state.step == 3)

    def end(self, state, history):
        saved, at_the_end = gradhpo.load_checkpoint(self.directory, state)
        self.given = int(saved.step), int(state.step), history.stop_reason, at_the_end.stop_reason
        raise self.error


def test_what_is_raised_at_the_end_is_raised_by_run_once_all_is_saved(tmp_path):
    first, last = Ends(KeyError("first"), tmp_path), Ends(ZeroDivisionError("last"), tmp_path)
    with pytest.raises(ZeroDivisionError, match="last") as raised:
        run([first, last], tmp_path)
    assert raised.value.__context__ is first.error
    assert first.given == last.given == (3, 3, "callback", "callback")


# -- what stops a run --------------------------------------------------------------------------

NO_BOOLEANS = {
    "a JAX number": jnp.asarray(0.5),
    "a JAX integer": jnp.asarray(1),
    "a number": 0.5,
    "an integer": 1,
    "zero": 0,
    "a NumPy number": np.float64(0.5),
    "several booleans": np.asarray([True, True]),
    "one boolean in an array": jnp.asarray([True]),
    "text": "stop",
    "a state": {"val_loss": 1.0},
}


@pytest.mark.parametrize("what", NO_BOOLEANS)
def test_what_is_no_boolean_is_an_error(what):
    answer = NO_BOOLEANS[what]

    def accuracy(state, metrics):
        return answer

    with pytest.raises(TypeError, match=r"callbacks\[1\] \(accuracy\) returned .*: return True to"):
        run([lambda state, metrics: None, accuracy])


def test_a_number_in_a_later_chunk_ends_the_run_with_its_state():
    late = lambda state, metrics: jnp.asarray(0.5) if int(state.step) == 6 else None
    with pytest.warns(RuntimeWarning, match=r"callbacks\[0\] \(<lambda>\) returned Array\(0.5"):
        state, history = run([late], num_steps=12)
    assert (history.stop_reason, state.step) == ("callback error", 6)


TRUE = [True, np.bool_(True), np.asarray(True), jnp.asarray(True)]


@pytest.mark.parametrize("answer", TRUE, ids=lambda x: type(x).__name__)
def test_every_kind_of_boolean_counts(answer):
    state, history = run([lambda state, metrics: answer])
    assert (history.stop_reason, state.step) == ("callback", 3)
    false = answer & False
    state, history = run([lambda state, metrics: false, lambda state, metrics: None])
    assert (history.stop_reason, state.step) == ("num_steps", 6)


# -- whose memory ------------------------------------------------------------------------------


def falling(state):
    return -float(state.step)


def rising(state):
    return float(state.step)


def test_another_metric_begins_anew(tmp_path):
    """The best value of one metric must not count for another."""
    run([gradhpo.BestState(rising)], tmp_path)
    best = gradhpo.BestState(lambda state: 100.0 + falling(state))
    lost, new = said_by([best], tmp_path)
    assert re.search(r"has the memory of BestState\(metric=rising\), but no callback takes", lost)
    assert re.search(r"BestState\(metric=<lambda>\) was not among .*rising.*starts empty", new)
    assert (best.value, best.step) == (88.0, 12)


def test_one_in_front_takes_nobody_elses_memory(tmp_path):
    run([gradhpo.BestState(rising)], tmp_path)
    in_front, again = gradhpo.BestState("train_loss"), gradhpo.BestState(rising)
    (new,) = said_by([in_front, again], tmp_path)
    assert "BestState(metric=train_loss) was not among the callbacks" in new
    assert (again.value, again.step) == (3.0, 3)
    assert in_front.step > 6


def test_early_stopping_by_another_metric_goes_on_while_that_falls(tmp_path):
    run([gradhpo.EarlyStopping(6, rising)], tmp_path)
    stopping = gradhpo.EarlyStopping(6, falling)
    said = said_by([stopping], tmp_path, num_steps=30)
    assert len(said) == 2
    assert not stopping.stopped
    assert stopping.best.step == 30


def test_order_alone_does_not_matter(tmp_path):
    make = lambda: [gradhpo.BestState(rising), gradhpo.BestState(falling)]
    run(make(), tmp_path)
    rises, falls = make()
    assert said_by([falls, rises], tmp_path) == []
    assert (rises.step, falls.step) == (3, 12)


def test_patience_may_change(tmp_path):
    run([gradhpo.EarlyStopping(6, rising)], tmp_path, num_steps=12)
    stopping = gradhpo.EarlyStopping(15, rising, min_delta=0.1)
    assert said_by([stopping], tmp_path, num_steps=30) == []
    assert stopping.best.step == 3
    assert (
        gradhpo.load_checkpoint(tmp_path, OPTIMIZER.init(jnp.zeros(3), jnp.zeros(3)))[0].step == 18
    )


def test_logs_in_another_order_stay_whole(tmp_path):
    """A logger's memory is the length of its own file, which is truncated to it."""
    make = lambda: [
        gradhpo.CSVLogger(tmp_path / "a.csv"), gradhpo.CSVLogger(tmp_path / "b.csv", every=6),
    ]  # fmt: skip
    run(make(), tmp_path / "run")
    assert said_by(make()[::-1], tmp_path / "run") == []
    steps = [
        [int(line.split(",")[0]) for line in (tmp_path / name).read_text().splitlines()[1:]]
        for name in ("a.csv", "b.csv")
    ]
    assert steps == [list(range(1, 13)), [6, 12]]


class Counting:
    """A user's callback with a setting."""

    memory = None

    def __init__(self, what):
        self.identity = {"what": what}

    def start(self, state, resumed) -> Any:
        return np.zeros(())

    def __call__(self, state, metrics):
        self.memory = self.memory + 1


def test_callbacks_of_the_users_say_who_they_are(tmp_path):
    run([Counting("a"), Counting("b")], tmp_path)
    b, c = Counting("b"), Counting("c")
    lost, new = said_by([c, b], tmp_path)
    assert "has the memory of Counting(what=a), but no callback" in lost
    assert "Counting(what=c) was not among the callbacks" in new
    assert (b.memory, c.memory) == (4, 2)
    state = OPTIMIZER.init(jnp.zeros(3), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"no memory of Counting\(what=d\); .* Counting\(what=c\)"):
        gradhpo.load_checkpoint(tmp_path, state, callbacks=[Counting("d")])
    with pytest.raises(TypeError, match="identity of Counting must consist of numbers and"):
        run([Counting(object())])


def test_text_in_a_memory_is_refused():
    """A checkpoint would lose it."""

    class Named(Counting):
        def start(self, state, resumed):
            return {"count": np.zeros(()), "name": "first"}

    with pytest.raises(TypeError, match=r"memory of Named holds 'first' at \['name'\], which"):
        run([Named("a")])

    class Later(Counting):
        def __call__(self, state, metrics):
            self.memory = "text"

    with pytest.raises(TypeError, match="memory of Later has changed its structure"):
        run([Later("a")])


# -- functions ---------------------------------------------------------------------------------


def scaled(by):
    return lambda state: by * float(state.step)


def test_functions_are_told_by_their_code_and_what_they_close_over():
    same = lambda f, g: not differences(described_function(f), described_function(g))
    assert same(scaled(2.0), scaled(2.0))
    assert not same(scaled(2.0), scaled(3.0))
    assert not same(rising, falling)
    assert same(jax.jit(rising), rising)
    table = lambda values: lambda state: values[int(state.step)]
    assert same(table(jnp.arange(3.0)), table(jnp.arange(3.0)))
    assert not same(table(jnp.arange(3.0)), table(jnp.arange(1.0, 4.0)))
    assert not same(lambda state, x=1: x, lambda state, x=2: x)

    def recursive(state):
        return recursive(state)

    assert same(recursive, recursive)


def test_another_version_of_python_compares_names():
    """The same function with other bytecode counts as another."""
    found = described_function(rising)
    elsewhere = found | {"python": "2.7", "code": found["code"] + 1}
    assert differences(found, elsewhere) == []
    assert differences(found, elsewhere | {"@function": "falling"})
