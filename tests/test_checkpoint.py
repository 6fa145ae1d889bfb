"""Checkpoints: a resumed run is the uninterrupted one, bit for bit; nothing foreign is touched."""

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import stat
import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import killed_run
import numpy as np
import optax
import processes
import pytest
from helpers import assert_same
from problems import OUTER, relaxed
from ridge import LOSSES, SGD, X, Y

import gradhpo
from gradhpo.training import lock
from gradhpo.training.checkpoint import checkpoints_in


OPTIMIZER = gradhpo.OneStepOptimizer(SGD, OUTER)
DATA = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))


def start(optimizer=OPTIMIZER, params=0.0):
    return optimizer.init(jnp.full(3, params), jnp.full(3, -2.0))


def run(
    directory, num_steps=12, data=DATA, optimizer=OPTIMIZER, state=None, val=(X, Y), **settings
):
    settings = {"chunk_size": 3, "progress": False} | settings
    if directory is not None and "checkpoint" not in settings:
        settings["checkpoint"] = gradhpo.Checkpoint(directory, every_steps=1)
    state = start(optimizer) if state is None else state
    return gradhpo.run(optimizer, state, LOSSES, data, val, num_steps=num_steps, **settings)


def stop_at(step):
    return lambda state, metrics: int(state.step) >= step


def assert_same_run(found, expected):
    assert_same(found[0], expected[0])
    assert list(found[1]) == list(expected[1])
    for name in expected[1]:
        assert found[1][name].dtype == expected[1][name].dtype
        np.testing.assert_array_equal(found[1][name], expected[1][name])


# -- killed ------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_killed_five_times(tmp_path):
    survive(tmp_path, kills=5, num_steps=300)


@pytest.mark.slow
def test_killed_thirty_times(tmp_path):
    survive(tmp_path, kills=30, num_steps=1_500)


def survive(tmp_path, kills, num_steps):
    """Killed alternately at a random moment and at a random change on disk."""
    random = np.random.default_rng(kills)
    directory = tmp_path / "killed"
    killed, process_of = 0, processes.context().Process
    for number in range(kills):
        before = steps_saved(directory)
        if number % 2:
            call = int(random.integers(1, 30))
            arguments = (call, directory, num_steps)
            process = process_of(target=killed_run.killed_within_a_write, args=arguments)
            process.start()
        else:
            process = process_of(target=killed_run.train, args=(directory, num_steps))
            process.start()
            while process.is_alive() and steps_saved(directory) <= before:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.1))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if steps_saved(directory) >= 0:
            optimizer = killed_run.optimizer()
            gradhpo.load_checkpoint(directory, killed_run.start(optimizer))
    assert killed == kills
    with jax.numpy_dtype_promotion("standard"):  # as in the other processes
        found = killed_run.train(directory, num_steps)
        expected = killed_run.train(tmp_path / "whole", num_steps)
    assert found[1].stop_reason == "num_steps"
    assert_same_run(found, expected)
    assert found[2].step == expected[2].step > 0
    assert_same(found[2].state, expected[2].state)
    for log in ("log.jsonl", "log.csv"):
        assert (directory / log).read_bytes() == (tmp_path / "whole" / log).read_bytes()
    assert [path.name for path in directory.glob(".*")] == [".lock"]


def steps_saved(directory):
    found = checkpoints_in(directory) if directory.is_dir() else []
    return int(found[-1].name[5:15]) if found else -1


# -- resumed in one process --------------------------------------------------------------------


def test_resumes_where_a_callback_stopped(tmp_path):
    first, _ = run(tmp_path, callbacks=[stop_at(6)])
    assert first.step == 6
    assert_same_run(run(tmp_path), run(None))


def test_a_finished_run_comes_back_at_once(tmp_path):
    expected = run(tmp_path)
    chunks = []
    found = run(tmp_path, callbacks=[lambda state, metrics: chunks.append(1)])
    assert_same_run(found, expected)
    assert chunks == []
    assert "There was nothing left to do" in found[1].report
    assert found[1].stop_reason == "num_steps"
    assert "before it was resumed" in found[1].report


def test_more_steps_go_on(tmp_path):
    run(tmp_path, num_steps=6)
    assert_same_run(run(tmp_path, num_steps=12), run(None, num_steps=12))


def test_resumes_within_an_episode(tmp_path):
    episodes = {"steps_per_episode": 6, "reptile_rate": 0.5, "num_steps": 18}
    run(tmp_path, callbacks=[stop_at(9)], **episodes)
    assert_same_run(run(tmp_path, **episodes), run(None, **episodes))


def test_memory_of_algorithms_and_keys_are_kept(tmp_path):
    """HyperDistill: w*, theta, its clock, and a distilled batch that holds a PRNG key."""
    loss = lambda w, h, batch: (
        jnp.mean(jnp.square(batch["x"] @ w - 1.0)) + jnp.sum(jnp.exp(h) * jnp.square(w))
    )
    losses = gradhpo.LossFunctions(loss, loss)
    batch = {"x": X[:4], "key": jax.random.key(3)}
    optimizer = gradhpo.OnlineHypergradientOptimizer(SGD, OUTER, estimation_period=1)
    state = optimizer.init(jnp.zeros(3), jnp.full(3, -2.0), batch=batch, key=jax.random.key(4))
    settings = {"num_steps": 8, "steps_per_episode": 4, "chunk_size": 4, "progress": False}

    def go(**more):
        return gradhpo.run(optimizer, state, losses, batch, batch, **settings, **more)

    go(checkpoint=tmp_path, callbacks=[stop_at(4)])
    assert_same_run(go(checkpoint=tmp_path), go())


def test_low_precision_and_functions_in_the_model(tmp_path):
    class Model(eqx.Module):
        w: jax.Array
        decay: jax.Array
        activation: object = jax.nn.tanh
        scale: float = 2.0

    model = Model(jnp.ones(3, jnp.bfloat16), jnp.zeros((), jnp.float32))
    params, hyperparams = gradhpo.partition(model, lambda m: m.decay)
    loss = gradhpo.model_loss(
        lambda m, batch: jnp.sum(
            jnp.square(m.activation(m.w).astype(jnp.float32) - batch) * m.decay
        )
    )
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(params, hyperparams)

    def go(num_steps, **more):
        batch, losses = jnp.ones(3, jnp.float32), gradhpo.LossFunctions(loss, loss)
        return gradhpo.run(
            optimizer, state, losses, batch, batch, num_steps=num_steps, chunk_size=2,
            progress=False, **more,
        )  # fmt: skip

    go(2, checkpoint=tmp_path)
    assert_same_run(go(4, checkpoint=tmp_path), go(4))


def test_rejected_steps_are_counted_over_sessions(tmp_path):
    bad = gradhpo.ArrayData((X, jnp.full_like(Y, jnp.nan)), 4, jax.random.key(1))
    with pytest.warns(RuntimeWarning, match="first step was not finite"):
        first, _ = run(tmp_path, num_steps=3, data=bad)
    assert first.metadata["rejected"] == 3
    with pytest.warns(RuntimeWarning, match="6 rejected as non-finite .steps 1, 2, 3, 4, 5, ..."):
        _, history = run(tmp_path, data=bad, max_rejections=5)
    assert history.stop_reason == "rejected"
    # Once finished it stays finished, until more steps are allowed.
    with pytest.warns(RuntimeWarning, match="6 of 12 steps .6 of them before"):
        run(tmp_path, data=bad, max_rejections=5)
    with pytest.warns(RuntimeWarning, match="12 of 12 steps"):
        run(tmp_path, data=bad, max_rejections=20)


def test_early_stopping_stays_stopped(tmp_path):
    def go():
        stopping = gradhpo.EarlyStopping(patience=6, metric=lambda state: 1.0)
        return *run(tmp_path, num_steps=30, callbacks=[stopping]), stopping

    _, first, _ = go()
    state, history, stopping = go()
    assert first.stop_reason == history.stop_reason == "early stopping"
    assert state.step == 9
    assert stopping.best.step == 3
    assert len(history["val_loss"]) == 9


def test_load_checkpoint(tmp_path):
    expected = run(tmp_path)
    assert_same_run(gradhpo.load_checkpoint(tmp_path, start()), expected)
    best = gradhpo.BestState()
    with pytest.raises(ValueError, match=r"has no memory of BestState\(metric=val_loss\); .* none"):
        gradhpo.load_checkpoint(tmp_path, start(), callbacks=[best])
    earlier, history = gradhpo.load_checkpoint(checkpoints_in(tmp_path)[0], start())
    assert earlier.step == 9
    np.testing.assert_array_equal(history["val_loss"], expected[1]["val_loss"][:9])


def test_callbacks_come_and_go(tmp_path):
    """Each gets its own memory, in any order; new ones start fresh, old ones are dropped."""
    first = gradhpo.BestState(lambda state: float(state.step))
    logger = gradhpo.JSONLinesLogger(tmp_path / "log.jsonl")
    run(tmp_path, num_steps=6, callbacks=[gradhpo.EarlyStopping(100), first, logger])
    limit = gradhpo.TimeLimit(1000)
    again = gradhpo.BestState(lambda state: float(state.step))
    table = gradhpo.CSVLogger(tmp_path / "log.csv")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = run(tmp_path, callbacks=[limit, table, again])
    said = [str(warning.message) for warning in said]
    assert [re.search("EarlyStopping|JSONLinesLogger|CSVLogger", text)[0] for text in said] == [
        "EarlyStopping", "JSONLinesLogger", "CSVLogger",
    ]  # fmt: skip
    assert again.step == 3
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 7
    assert_same_run(found, run(None))
    best = gradhpo.BestState(lambda state: float(state.step))
    gradhpo.load_checkpoint(tmp_path, start(), callbacks=[best])
    assert best.step == 3
    assert_same(best.state, again.state)


def test_retention_and_files_of_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, checkpoint=gradhpo.Checkpoint(tmp_path, every_steps=1, keep=3))
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
    assert names == [
        "metrics.bin", "notes.txt",
        *(f"step-{step:010d}.ckpt" for step in (6, 9, 12)),
    ]  # fmt: skip
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_retention_where_a_file_system_can_do_little(tmp_path, monkeypatch):
    """No locks, directories that cannot be synced, leftovers that cannot be removed."""
    from gradhpo.training import checkpoint_file

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(checkpoint_file.os, "fsync", fsync)
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / ".step-0000000099.ckpt.tmp").mkdir()
    settings = gradhpo.Checkpoint(tmp_path, every_steps=1)
    run(tmp_path, checkpoint=settings)
    assert steps_saved(tmp_path) == 12
    foreign = tmp_path / "step-0000000001.ckpt"
    foreign.write_text("mine")
    run(tmp_path, checkpoint=settings, num_steps=18)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == [f"step-{step:010d}.ckpt" for step in (1, 15, 18)]
    assert foreign.read_text() == "mine"


def test_how_often(tmp_path):
    def saved(**settings):
        directory = tmp_path / str(settings)
        seen = []
        at_work = lambda state, metrics: seen.append(steps_saved(directory))
        run(directory, callbacks=[at_work], checkpoint=gradhpo.Checkpoint(directory, **settings))
        return seen, steps_saved(directory)

    assert saved() == ([0, 0, 0, 0], 12)
    assert saved(every_steps=3) == ([0, 3, 6, 9], 12)
    assert saved(every_steps=4) == ([0, 0, 6, 6], 12)
    assert saved(every_seconds=0) == ([0, 3, 6, 9], 12)
    assert saved(every_seconds=float("inf")) == ([0, 0, 0, 0], 12)


# -- iterators ---------------------------------------------------------------------------------


BATCHES = [(np.asarray(X[i : i + 4]), np.asarray(Y[i : i + 4])) for i in range(6)]


class Seekable:
    """A loader like grain's: its state is a position."""

    def __init__(self, batches=BATCHES, place=0):
        self.batches, self.place, self.drawn = batches, place, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        self.place += 1
        return self.batches[(self.place - 1) % len(self.batches)]

    def get_state(self):
        return {"place": self.place, "bytes": b"\x00\xff", "list": [1, "a"]}

    def set_state(self, state):
        assert state["bytes"] == b"\x00\xff"
        self.place = state["place"]


class Untold:
    """An iterator that cannot report its position."""

    def __init__(self, batches):
        self.batches = itertools.cycle(batches)

    def __next__(self):
        return next(self.batches)


class Stateful(Seekable):
    """A loader like PyTorch's stateful ones, with the methods on the loader."""

    state_dict, load_state_dict = Seekable.get_state, Seekable.set_state
    get_state = set_state = None

    def __iter__(self):
        return Seekable.__iter__(self)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("loader", [Seekable, Stateful])
def test_iterators_that_can_seek_do(tmp_path, loader, wrapped):
    wrap = gradhpo.iterate if wrapped else lambda x: x
    expected = run(None, data=iter(BATCHES * 2))
    run(tmp_path, data=wrap(loader()), callbacks=[stop_at(6)])
    again = loader()
    assert_same_run(run(tmp_path, data=wrap(again)), expected)
    assert again.drawn == 6


def test_the_same_seekable_loader_goes_on(tmp_path):
    """Batches given back by an early stop do not come twice."""
    data = gradhpo.iterate(Seekable())
    run(tmp_path, data=data, callbacks=[stop_at(6)])
    assert_same_run(run(tmp_path, data=data), run(None, data=iter(BATCHES * 2)))


@pytest.mark.parametrize(
    "data",
    [
        lambda: iter(BATCHES * 2),
        lambda: gradhpo.iterate(BATCHES),
        lambda: (batch for batch in itertools.cycle(BATCHES)),
    ],
)
def test_others_are_replayed(tmp_path, data):
    expected = run(None, data=data())
    run(tmp_path, data=data(), callbacks=[stop_at(6)])
    assert_same_run(run(tmp_path, data=data()), expected)


def test_a_state_that_json_cannot_hold_is_no_state(tmp_path):
    class Odd(Seekable):
        def get_state(self):
            return {"place": object()}

    run(tmp_path, data=Odd(), callbacks=[stop_at(6)])
    again = Odd()
    assert_same_run(run(tmp_path, data=again), run(None, data=iter(BATCHES * 2)))
    assert again.drawn == 12


@pytest.mark.thorough
def test_grain_seeks(tmp_path):
    grain = pytest.importorskip("grain")

    def loader():
        examples = [(np.asarray(x), np.asarray(y)) for x, y in zip(X, Y, strict=True)]
        data = grain.MapDataset.source(examples).seed(0).shuffle().repeat()
        return iter(data.batch(4).to_iter_dataset())

    expected = run(None, data=loader())
    run(tmp_path, data=loader(), callbacks=[stop_at(6)])
    drawn = []

    class Watched:
        def __init__(self, iterator):
            self.get_state, self.set_state = iterator.get_state, iterator.set_state
            self.iterator = iterator

        def __next__(self):
            drawn.append(1)
            return next(self.iterator)

    assert_same_run(run(tmp_path, data=Watched(loader())), expected)
    assert len(drawn) == 6
    # With `iterate`, from a data set that ends after every epoch.
    finite = lambda: gradhpo.iterate(
        grain.MapDataset.source(BATCHES).seed(0).shuffle().to_iter_dataset()
    )
    expected = run(None, data=finite())
    run(tmp_path / "finite", data=finite(), callbacks=[stop_at(6)])
    assert_same_run(run(tmp_path / "finite", data=finite()), expected)


def test_data_that_ends_can_be_lengthened(tmp_path):
    with pytest.warns(RuntimeWarning, match="An iterator ended"):
        run(tmp_path, data=iter(BATCHES[:5]))
    assert_same_run(run(tmp_path, data=iter(BATCHES * 2)), run(None, data=iter(BATCHES * 2)))


def test_an_iterator_beside_one_that_ended_is_found_again(tmp_path):
    """It had been read ahead, for steps that the other had no batch for."""
    val = lambda count: iter([*BATCHES[::-1], *BATCHES][:count])
    with pytest.warns(RuntimeWarning, match="An iterator ended"):
        run(tmp_path, data=Seekable(), val=val(5))
    expected = run(None, data=Seekable(), val=val(12))
    assert_same_run(run(tmp_path, data=Seekable(), val=val(12)), expected)


def test_an_iterator_that_was_used_is_refused(tmp_path):
    used = (batch for batch in itertools.cycle(BATCHES))
    next(used)
    with pytest.raises(ValueError, match="train_data has been drawn from already"):
        run(tmp_path, data=used)
    run(tmp_path, data=gradhpo.iterate(BATCHES), num_steps=6)
    again = gradhpo.iterate(BATCHES)
    next(again)
    with pytest.raises(ValueError, match="train_data has been drawn from already"):
        run(tmp_path, data=again)
    again = Untold(BATCHES)
    run(tmp_path / "class", data=again, num_steps=3)
    with pytest.raises(ValueError, match="train_data has been drawn from already"):
        run(tmp_path / "class", data=again)
    with pytest.raises(ValueError, match="ended after 2 batches, but the resumed run had"):
        run(tmp_path, data=iter(BATCHES[:2]))
    other = gradhpo.iterate(BATCHES[::-1])
    with pytest.raises(ValueError, match="batch 5 of train_data is not the batch that"):
        run(tmp_path, data=other)
    assert steps_saved(tmp_path) == 6


# -- refused -----------------------------------------------------------------------------------


def snapshot(directory):
    files = [path for path in directory.iterdir() if path.name != ".lock"]
    return {path.name: path.read_bytes() for path in files}


def damaged(change):
    def apply(directory):
        path = checkpoints_in(directory)[-1]
        path.write_bytes(change(path.read_bytes()))

    return apply


def history_damaged(change):
    def apply(directory):
        path = directory / "metrics.bin"
        path.write_bytes(change(path.read_bytes()))

    return apply


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = [
    (damaged(lambda content: content[:-10]), r"is damaged .it has \d+ of \d+ bytes.*Move it away"),
    (damaged(lambda content: content[:25]), "is damaged"),
    (damaged(flipped), "is damaged .its checksum does not match"),
    (damaged(lambda content: b""), "is not a checkpoint of gradhpo"),
    (damaged(lambda content: b"PK\x03\x04 an archive"), "is not a checkpoint of gradhpo"),
    (
        damaged(lambda content: b"gradhpo-checkpoint 2 1 1\n"),
        "has format 2, and this gradhpo",
    ),
    (damaged(lambda content: b"gradhpo-checkpoint x\n"), "its first line is broken"),
    (history_damaged(lambda content: content[:-8]), "the history of the run is lost"),
    (history_damaged(flipped), "metrics.bin is damaged"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    run(directory)
    return directory


@pytest.fixture
def copied(finished, tmp_path):
    for name, content in snapshot(finished).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_what_is_damaged_or_foreign_is_refused_and_left(copied, damage, message):
    damage(copied)
    before = snapshot(copied)
    with pytest.raises(ValueError, match=message):
        run(copied, num_steps=15)
    if "metrics.bin" in message or "history" in message:
        # The state is complete: it is not withheld because of a plot.
        with pytest.warns(RuntimeWarning, match=message):
            state, history = gradhpo.load_checkpoint(copied, start())
        assert state.step == 12
        assert len(history["val_loss"]) == 0
    else:
        with pytest.raises(ValueError, match=message):
            gradhpo.load_checkpoint(copied, start())
    assert snapshot(copied) == before


def test_the_checkpoint_before_serves_once_the_damaged_one_is_away(copied):
    checkpoints_in(copied)[-1].unlink()
    assert steps_saved(copied) == 9
    assert_same_run(run(copied), run(None))


GREEDY = gradhpo.GreedyOptimizer(SGD, OUTER, gamma=0.5)
OTHERS = [
    ({"optimizer": GREEDY}, "optimizer.kind was OneStepOptimizer, and is GreedyOptimizer"),
    (
        {"optimizer": gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1, momentum=0.9)), OUTER)},
        "another structure.*missing",
    ),
    (
        {"optimizer": gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.2)), OUTER)},
        "the update of inner_optimizer holds other values",
    ),
    (
        {"optimizer": gradhpo.OneStepOptimizer(lambda h: relaxed(optax.sgd(0.2)), OUTER)},
        "the update of inner_optimizer holds other values",
    ),
    (
        {"optimizer": gradhpo.OneStepOptimizer(SGD, relaxed(optax.sgd(0.123)))},
        "the update of outer_optimizer holds other values",
    ),
    ({"state": start(params=1.0)}, "state.params holds other values"),
    ({"state": start().update(step=jnp.asarray(3, jnp.int32))}, "state.step was 0, and is 3"),
    (
        {"state": start().update(hyperparams=jnp.full(3, -1.0))},
        "state.hyperparams holds other values",
    ),
    ({"data": gradhpo.ArrayData((X, Y), 4, jax.random.key(2))}, "train_data.function.key holds"),
    ({"data": gradhpo.ArrayData((X, Y), 5, jax.random.key(1))}, "batch_size was 4, and is 5"),
    ({"data": gradhpo.ArrayData((X, -Y), 4, jax.random.key(1))}, "function.arrays holds other val"),
    ({"data": iter(BATCHES)}, "train_data was Generated, and is an iterator"),
    ({"steps_per_episode": 3}, "steps_per_episode was None, and is 3"),
    ({"num_steps": 6}, "has taken 12 steps, but num_steps=6 asks for fewer"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_another_run_is_refused_and_left(finished, other, message):
    before = snapshot(finished)
    with pytest.raises(ValueError, match=message):
        run(finished, **({"num_steps": 15} | other))
    assert snapshot(finished) == before


def test_what_is_recorded_is_compared(tmp_path):
    run(tmp_path, num_steps=3)
    said = "record was None, and is a function that returns 'p'"
    with pytest.raises(ValueError, match=said) as raised:
        run(tmp_path, num_steps=6, record=lambda s: {"p": s.params[0]})
    assert "To start a new run from this state, load it with" in str(raised.value)


def test_settings_of_the_optimizer_are_compared(tmp_path):
    run(tmp_path, optimizer=GREEDY, num_steps=3)
    changed = dataclasses.replace(GREEDY, gamma=0.25)
    with pytest.raises(ValueError, match=r"optimizer\.gamma was 0\.5, and is 0\.25"):
        run(tmp_path, optimizer=changed, num_steps=6)


def test_directories_that_cannot_serve(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file; pass a directory"):
        run(file)
    (tmp_path / "metrics.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"metrics.bin exists without a checkpoint next to it"):
        run(tmp_path)
    assert (tmp_path / "metrics.bin").read_text() == "mine"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        gradhpo.load_checkpoint(tmp_path, start())
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        gradhpo.load_checkpoint(tmp_path / "nothing", start())


def test_a_disk_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    """Except at the first checkpoint, when nothing can be lost yet."""
    from gradhpo.training import checkpoint_file

    real, full = os.replace, []

    def replace(*paths):
        if full:
            raise OSError(28, "No space left on device")
        real(*paths)

    monkeypatch.setattr(checkpoint_file.os, "replace", replace)
    # Full from the second chunk to the third, then with room again.
    fill = lambda state, metrics: full.append(1) if int(state.step) == 6 else None
    free = lambda state, metrics: full.clear() if int(state.step) == 12 else None
    with pytest.warns(RuntimeWarning, match="2 checkpoints could not be written.*No space left"):
        found = run(tmp_path, callbacks=[fill, free])
    assert found[1].stop_reason == "num_steps"
    assert_same_run(gradhpo.load_checkpoint(tmp_path, start()), run(None))
    with pytest.warns(RuntimeWarning, match="No space left.*The last checkpoint is from step 3"):
        run(tmp_path / "full", callbacks=[fill])
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".lock"]


def test_callbacks_start_from_the_state_that_goes_on(tmp_path):
    started = []

    class Watching:
        memory = None

        def start(self, state, resumed):
            started.append((int(state.step), resumed))
            return np.zeros(1)

        def __call__(self, state, metrics):
            return state.step == 6

    run(tmp_path, callbacks=[Watching()])
    run(tmp_path, callbacks=[Watching()])
    assert started == [(0, False), (6, True)]


def test_two_runs_in_one_directory_do_not_mix(tmp_path):
    refused = []

    def another(state, metrics):
        with pytest.raises(ValueError, match="another run is at work in") as caught:
            run(tmp_path)
        refused.append(caught)

    assert_same_run(run(tmp_path, callbacks=[another]), run(None))
    assert len(refused) == 4
    run(tmp_path)  # the lock is free again


def test_two_runs_where_there_are_no_locks(tmp_path, monkeypatch):
    """The later one continues; the other reports that it can no longer save."""
    monkeypatch.setattr(lock, "fcntl", None)
    inner = []

    def another(state, metrics):
        if int(state.step) == 6 and not inner:
            inner.append(1)
            inner.append(run(tmp_path))

    with pytest.warns(RuntimeWarning, match="was written by another run in the same directory"):
        found = run(tmp_path, callbacks=[another])
    assert_same_run(found, inner[1])
    assert_same_run(gradhpo.load_checkpoint(tmp_path, start()), found)


def test_a_refused_run_leaves_the_directory_free(copied):
    with pytest.raises(ValueError, match="asks for fewer"):
        run(copied, num_steps=3)
    path = checkpoints_in(copied)[-1]
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(copied)
    path.write_bytes(content)
    assert_same_run(run(copied), run(None))


@pytest.mark.parametrize("loader", ["ragged", "failing"])
def test_no_batch_is_lost_where_a_loader_failed(tmp_path, loader):
    """A seekable one has already moved past what the run used."""

    class Bad(Seekable):
        def __next__(self):
            batch = super().__next__()
            if self.place == 8 and loader == "failing":
                raise OSError("for a moment")
            return (batch[0][:2], batch[1][:2]) if self.place == 8 else batch

    with pytest.warns(RuntimeWarning, match="A data source failed"):
        state, _ = run(tmp_path, data=Bad())
    assert state.step == 7
    assert_same_run(run(tmp_path, data=Seekable()), run(None, data=iter(BATCHES * 2)))


def test_chunks_stay_where_they_were(tmp_path):
    """Callbacks see the same steps, even after a chunk that was cut short."""
    ends = []
    note = lambda state, metrics: ends.append(int(state.step))
    with pytest.warns(RuntimeWarning, match="An iterator ended"):
        run(tmp_path, data=iter(BATCHES[:5]))
    run(tmp_path, data=iter(BATCHES * 2), callbacks=[note])
    assert ends == [6, 9, 12]


def test_a_loader_that_shuffles_every_pass_anew_seeks(tmp_path):
    class Shuffling:
        passes = 0

        def __iter__(self):
            self.passes += 1
            order = np.random.default_rng(self.passes).permutation(4)
            return Finite([BATCHES[i] for i in order])

    class Finite(Seekable):
        def __next__(self):
            if self.place == 4:
                raise StopIteration
            return super().__next__()

    expected = run(None, data=gradhpo.iterate(Shuffling()))
    data = gradhpo.iterate(Shuffling())
    run(tmp_path, data=data, callbacks=[stop_at(6)])
    with pytest.raises(ValueError, match="call it on a loader that has not"):
        run(tmp_path, data=data)
    assert_same_run(run(tmp_path, data=gradhpo.iterate(Shuffling())), expected)


def test_a_loader_asked_for_its_state_acts_at_the_next_pass(tmp_path):
    """Like PyTorch's stateful loaders."""

    class AtNextPass:
        def __init__(self):
            self.start = self.place = 0

        def __iter__(self):
            self.place, self.start = self.start, 0
            while True:
                self.place += 1
                yield BATCHES[(self.place - 1) % 6]

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.start = state["place"]

    data = gradhpo.iterate(AtNextPass())
    run(tmp_path, data=data, callbacks=[stop_at(6)])
    assert_same_run(run(tmp_path, data=data), run(None, data=iter(BATCHES * 2)))


def test_neighbouring_seeds_are_other_runs(tmp_path):
    seeded = lambda seed: gradhpo.ArrayData((X, Y), 4, jax.random.key(seed))
    run(tmp_path, data=seeded(20240), num_steps=3)
    with pytest.raises(ValueError, match=r"train_data\.function\.key holds other values"):
        run(tmp_path, data=seeded(20241), num_steps=6)
