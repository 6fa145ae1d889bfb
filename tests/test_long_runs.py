"""Long runs: memory that does not grow, full disks, forked workers, crafted files."""

import contextlib
import gc
import json
import os
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from helpers import assert_same
from problems import OUTER
from ridge import LOSSES, SGD, X, Y

import gradhpo
from gradhpo.training.checkpoint import checkpoints_in
from gradhpo.training.chunk import chunk_shapes
from gradhpo.training.record import Columns
from gradhpo.utils import logging, progress


OPTIMIZER = gradhpo.OneStepOptimizer(SGD, OUTER)
DATA = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))


def start():
    return OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0))


def run(directory=None, num_steps=12, state=None, **settings):
    settings = {"chunk_size": 3, "progress": False, "data": DATA} | settings
    if directory is not None:
        settings["checkpoint"] = gradhpo.Checkpoint(directory, every_steps=1)
    data = settings.pop("data")
    state = start() if state is None else state
    return gradhpo.run(OPTIMIZER, state, LOSSES, data, (X, Y), num_steps=num_steps, **settings)


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_memory_stays_flat_over_many_chunks():
    """A chunk once kept six device arrays alive, and a dict of their views."""
    found = {}

    def count(state, metrics):
        if int(state.step) in (100, 500):
            gc.collect()
            found[int(state.step)] = len(jax.live_arrays()), len(gc.get_objects())

    _, history = run(num_steps=500, chunk_size=1, callbacks=[count])
    assert len(history["val_loss"]) == 500
    arrays, objects = np.subtract(found[500], found[100])
    assert arrays <= 5
    assert objects <= 100  # a quarter of one for each chunk


def test_metrics_of_a_chunk_outlive_it_and_cannot_be_changed():
    kept = []
    _, history = run(callbacks=[lambda state, metrics: kept.append(metrics)])
    joined = np.concatenate([metrics["val_loss"] for metrics in kept])
    np.testing.assert_array_equal(joined, history["val_loss"])
    with pytest.raises(ValueError, match="read-only"):
        kept[0]["val_loss"][0] = 0.0


def test_columns_grow_by_doubling():
    columns, made = Columns(), []
    for number in range(1000):
        columns.add({"a": np.full(3, number), "b": np.full((3, 2), float(number))})
        made.append(columns.since(0)["a"].base)
    assert columns.length == 3000
    np.testing.assert_array_equal(columns.since(0)["a"], np.repeat(np.arange(1000), 3))
    np.testing.assert_array_equal(columns.since(2997)["b"], np.full((3, 2), 999.0))
    assert len(set(map(id, made))) <= 12


def test_the_shapes_of_a_billion_chunks_take_no_memory():
    shapes = chunk_shapes(10**9, 1, None, False)
    assert [next(shapes) for _ in range(3)] == [(1, 1)] * 3
    assert list(chunk_shapes(12, 5, None, False, taken=3)) == [(1, 2), (1, 5), (1, 2)]
    assert list(chunk_shapes(12, 5, 4, False, taken=2)) == [(1, 2), (1, 4), (1, 4)]
    assert list(chunk_shapes(24, 8, 4, False, taken=4)) == [(1, 4), (2, 4), (2, 4)]
    assert list(chunk_shapes(14, 3, 7, False)) == [(1, 3), (1, 3), (1, 1)] * 2


# -- the lock of a directory -------------------------------------------------------------------


@contextlib.contextmanager
def a_fork():
    """A loader's worker, which outlives the run."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads, and warns about forks
        child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    try:
        yield
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_a_forked_worker_does_not_hold_the_directory(tmp_path):
    with contextlib.ExitStack() as workers:

        def fork(state, metrics):
            if int(state.step) == 3:
                workers.enter_context(a_fork())

        run(tmp_path, num_steps=6, callbacks=[fork])
        found = run(tmp_path)
    assert_same(found[0], run()[0])


def test_a_forked_worker_that_ends_leaves_the_directory_locked(tmp_path):
    def fork(state, metrics):
        with a_fork():
            pass
        with pytest.raises(ValueError, match="another run is at work in"):
            run(tmp_path)

    run(tmp_path, num_steps=3, callbacks=[fork])


# -- logs --------------------------------------------------------------------------------------


class FullDisk:
    """A disk that fills up after a given number of bytes."""

    def __init__(self, monkeypatch):
        self.left = 10**9
        disk = self

        class File:
            def __init__(self, *args, **kwargs):
                self.file = open(*args, **kwargs)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content):
                if disk.left <= 0:
                    raise OSError(28, "No space left on device")
                written = self.file.write(content[: disk.left])
                disk.left -= written
                return written

        opened = lambda path, mode="r", **kwargs: (
            File(path, mode, **kwargs) if mode == "ab" else open(path, mode, **kwargs)
        )
        monkeypatch.setattr(logging, "open", opened, raising=False)


@pytest.mark.parametrize("logger", [gradhpo.CSVLogger, gradhpo.JSONLinesLogger])
@pytest.mark.parametrize("bytes_left", [0, 100])
def test_a_full_disk_does_not_end_a_run_through_its_logs(tmp_path, monkeypatch, logger, bytes_left):
    """No partial line is left behind, and all lines are written once there is room."""
    run(callbacks=[logger(tmp_path / "whole")])
    disk = FullDisk(monkeypatch)

    def fill(state, metrics):
        disk.left = {3: bytes_left, 9: 10**9}.get(int(state.step), disk.left)

    with pytest.warns(RuntimeWarning, match="cannot be written .OSError.*No space left") as said:
        _, history = run(callbacks=[fill, logger(tmp_path / "log")])
    assert len(said) == 1
    assert history.stop_reason == "num_steps"
    assert "lacks" not in history.report
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()


def test_lines_that_never_reached_the_disk_are_reported(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    full = lambda state, metrics: setattr(disk, "left", 0) if int(state.step) == 6 else None
    at_once = pytest.warns(RuntimeWarning, match="log cannot be written .*its lines wait")
    at_the_end = pytest.warns(RuntimeWarning, match="log lacks its last 6 lines: OSError.*No space")
    with at_once, at_the_end:
        _, history = run(callbacks=[gradhpo.CSVLogger(tmp_path / "log"), full])
    assert history.stop_reason == "num_steps"
    assert len((tmp_path / "log").read_text().splitlines()) == 7


def test_relative_paths_stay_where_they_were(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    logger, checkpoint = gradhpo.CSVLogger("log.csv"), gradhpo.Checkpoint("run")
    away = lambda state, metrics: os.chdir(tmp_path / "there")
    run(callbacks=[away, logger])
    run(callbacks=[], checkpoint=checkpoint)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["log.csv", "run"]
    assert len((tmp_path / "here" / "log.csv").read_text().splitlines()) == 13
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("name", ["val_loss", "step"])
@pytest.mark.parametrize("logger", [gradhpo.CSVLogger, gradhpo.JSONLinesLogger])
def test_extra_overwrites_no_column(tmp_path, logger, name):
    with pytest.raises(ValueError, match=f"extra of .* returned '{name}', which every line has"):
        run(callbacks=[logger(tmp_path / "log", extra=lambda state: {name: 0.0})])


def test_the_columns_of_a_table_stay(tmp_path):
    changing = lambda state: {f"at {int(state.step)}": 0.0}
    with pytest.warns(RuntimeWarning, match="extra must return the same names every time"):
        run(callbacks=[gradhpo.CSVLogger(tmp_path / "log.csv", extra=changing)])
    (tmp_path / "other.csv").write_text("step,accuracy\n1,0.5\n")
    with pytest.raises(ValueError, match=r"the first line of .*other\.csv is 'step,accuracy', and"):
        run(callbacks=[gradhpo.CSVLogger(tmp_path / "other.csv", append=True)])
    assert (tmp_path / "other.csv").read_text() == "step,accuracy\n1,0.5\n"


# -- how a program is started ------------------------------------------------------------------


@pytest.mark.thorough
def test_debugging_nans_a_run_begins():
    program = """
import jax, jax.numpy as jnp, optax, gradhpo
jax.config.update("jax_debug_nans", True)
loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
state = optimizer.init(jnp.ones(3), jnp.zeros(3))
assert jnp.isnan(jax.device_get(state.metadata["val_loss"]))
optimizer.restart(optimizer.adopt(state))
optimizer.step(state, None, None, loss, loss)
losses = gradhpo.LossFunctions(loss, loss)
gradhpo.check_hypergradient(optimizer, state, None, None, losses)
for other in (
    gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.sgd(0.1)),
    gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1)),
    gradhpo.TaskBatched(gradhpo.ImplicitOptimizer(optax.sgd(0.1), optax.sgd(0.1)), 2),
):
    begun = other.init(jnp.ones(3), jnp.zeros(3))
    gradhpo.run(other, begun, losses, None, None, num_steps=3, progress=False)
state, history = gradhpo.run(optimizer, state, losses, None, None, num_steps=3, progress=False)
print(len(history["val_loss"]))
"""
    assert processes.python("-c", program).stdout == "3\n"


def test_a_program_without_a_console_runs(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", None)
    assert run(progress=True)[1].stop_reason == "num_steps"


def test_transfers_of_a_run_are_meant(tmp_path):
    """Its metrics and its iterators' batches, though other transfers are forbidden."""
    batches = [(np.asarray(X[:4]), np.asarray(Y[:4]))]
    expected, state = run(data=gradhpo.iterate(batches))[0], start()
    with jax.transfer_guard("disallow"):
        found = run(tmp_path, state=state, data=gradhpo.iterate(batches))[0]
    assert_same(found, expected)


@pytest.mark.thorough
def test_transfers_at_every_door_of_a_run_are_meant():
    """Arrays, a function of the index, schedules, episodes with their starts, tasks, monitors."""
    single = gradhpo.OneStepOptimizer(SGD)
    tasks = gradhpo.TaskBatched(OPTIMIZER, 2)
    key, pair = jax.random.key(2), jax.tree.map(lambda x: jnp.stack([x, x]), (X, Y))
    drawn = lambda i: jax.tree.map(lambda x: x[:4] + jax.random.normal(fold(key, i)), (X, Y))
    fold = jax.random.fold_in
    falling = lambda k: 0.1 * jnp.exp(-k.astype(float))
    begin = lambda key, h: jax.random.normal(key, (3,)) + 0 * h
    monitor = lambda: gradhpo.Monitor({"norm": lambda state: jnp.sum(state.params**2)})
    doors = {
        "arrays": (OPTIMIZER, start(), (np.asarray(X), np.asarray(Y)), {}),
        "a function": (OPTIMIZER, start(), drawn, {"callbacks": [monitor(), gradhpo.BestState()]}),
        "a schedule": (
            single, single.init(*start_of(start())), DATA, {"lr_hyper": falling},
        ),
        "episodes": (
            OPTIMIZER, start(), DATA, {"steps_per_episode": 3, "start_fn": begin, "key": key},
        ),
        "tasks": (tasks, tasks.init(*start_of(start())), pair, {}),
    }  # fmt: skip
    for name, (optimizer, state, data, settings) in doors.items():
        val = data if name == "tasks" else (X, Y)
        go = lambda o=optimizer, s=state, d=data, v=val, more=settings: gradhpo.run(
            o, s, LOSSES, d, v, num_steps=6, chunk_size=3, progress=False, **more
        )
        with jax.transfer_guard("disallow"):
            found = go()[0]
        assert_same(found, go()[0])


def start_of(state):
    return state.params, state.hyperparams


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_linked_history_is_not_written_through(tmp_path, link):
    """As in a copy of the directory by `cp -al`."""
    run(tmp_path / "run", num_steps=6)
    history = tmp_path / "run" / "metrics.bin"
    before = history.read_bytes()
    history.rename(tmp_path / "kept.bin")
    link(tmp_path / "kept.bin", history)
    found = run(tmp_path / "run")
    assert (tmp_path / "kept.bin").read_bytes() == before
    assert not history.is_symlink()
    np.testing.assert_array_equal(found[1]["val_loss"], run()[1]["val_loss"])


def test_a_link_to_nothing_is_not_written_through(tmp_path):
    os.symlink(tmp_path / "elsewhere", tmp_path / "metrics.bin")
    with pytest.raises(ValueError, match=r"metrics.bin exists without a checkpoint next to it"):
        run(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def crafted(change_header=lambda header: header, change_body=lambda body: body, raw=None):
    """A checkpoint with the right length and checksum."""

    def apply(directory):
        path = checkpoints_in(directory)[-1]
        _, header, body = path.read_bytes().split(b"\n", 2)
        header = json.dumps(change_header(json.loads(header))).encode() if raw is None else raw
        content = header + b"\n" + change_body(body)
        first = b"gradhpo-checkpoint 3 %d %d\n" % (len(content), zlib.crc32(content))
        path.write_bytes(first + content)

    return apply


def inside(*keys, value):
    def change(header):
        place = header
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return header

    return crafted(change)


def a_directory(directory):
    (directory / "step-0000000099.ckpt").mkdir()


CRAFTED = {
    "deep JSON": (crafted(raw=b"[" * 200_000), "is damaged"),
    "no JSON": (crafted(raw=b"{"), "is damaged"),
    "no text": (crafted(raw=b"\xff\xfe"), "is damaged"),
    "a list": (crafted(lambda header: [header]), "is damaged .its header is not one"),
    "no leaves": (inside("leaves", value={}), "is damaged .its header is not one"),
    "no names": (inside("leaves", "state", value=[[]]), "is damaged .its header is not one"),
    "too few callbacks": (inside("callbacks", value=[{"kind": "a", "identity": 1}]), "is damaged"),
    "steps": (inside("taken", value="12"), "is damaged .its header is not one"),
    "rows": (inside("metrics", "rows", value=-1), "is damaged .its header is not one"),
    "shapes": (inside("metrics", "shapes", value={"a": "b"}), "is damaged .its header is not"),
    "dtypes": (inside("metrics", "dtypes", "val_loss", value="what"), "does not fit the header"),
    "positions": (inside("positions", value={"data": {}}), "is damaged .its header is not one"),
    "leaves missing": (crafted(change_body=lambda body: body[:200]), "is damaged"),
    "other leaves": (crafted(change_body=lambda body: b"\x80\x04" + body), "is damaged"),
    "a description": (inside("description", "state.params", value={"@leaves": 3}), "gradhpo writ"),
    "a directory": (a_directory, "is not a file, so not a checkpoint of gradhpo"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    run(directory)
    return directory


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_file_is_called_damaged(finished, tmp_path, what):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    craft, message = CRAFTED[what]
    craft(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, num_steps=15)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_directory_in_the_way_does_not_pile_up_checkpoints(tmp_path):
    (tmp_path / "step-0000000004.ckpt").mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        run(tmp_path)
    (tmp_path / "step-0000000004.ckpt").rmdir()
    in_the_way = lambda state, metrics: (tmp_path / "step-0000000006.ckpt").mkdir(exist_ok=True)
    with pytest.warns(RuntimeWarning, match="1 checkpoints could not be written"):
        run(tmp_path, callbacks=[in_the_way], num_steps=9)
    assert [path.name for path in checkpoints_in(tmp_path) if path.is_file()] == [
        "step-0000000003.ckpt", "step-0000000009.ckpt",
    ]  # fmt: skip
