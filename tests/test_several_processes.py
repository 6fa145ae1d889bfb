"""Two processes of one program, with two devices each: runs of a shared state."""

import json
import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import processes
import pytest
from helpers import assert_same

from gradhpo.training.checkpoint_file import read_tree
from gradhpo.training.checkpoint_folder import is_folder, read_kept, remove_folder, write_folder
from gradhpo.utils.processes import exchanged


PROGRAM = str(Path(__file__).with_name("on_processes.py"))
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count="


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def started(count, *arguments, axes="Auto", devices=2, check=True):
    """What each of `count` processes has printed to stdout and stderr."""
    processes.context()
    port = free_port()

    def start(number):
        given = map(str, (port, number, count, axes, *arguments))
        return processes.python(PROGRAM, *given, compiled=f"{FLAGS}{devices}", check=check)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def on(count, *arguments, **settings):
    """The result in each of `count` processes."""
    done = started(count, *arguments, **settings)
    return [json.loads(x.stdout.split("RESULT")[1].splitlines()[0]) for x in done]


# Sums over four devices are taken in another order: a few roundings of numbers around 10.
ROUNDING = 1e-12


def test_parts_of_a_batch_are_the_whole_batch():
    """The same numbers as in one process, and nothing changes its placement."""
    first, second = on(2, "alike", "one step", "step", "iterator, 0")
    assert first == second
    for case, found in first.items():
        assert found["error"] < ROUNDING, case
        assert not found["moved"], case


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_every_kind_of_data_has_parts(axes):
    kinds = "iterator", "arrays", "fixed"
    cases = [f"{data}, {episodes}" for data in kinds for episodes in (0, 3)]
    first, second = on(2, "alike", "greedy", "step", *cases, axes=axes)
    assert first == second
    for case, found in first.items():
        assert found["error"] < ROUNDING, case
        assert not found["moved"], case


@pytest.mark.thorough
@pytest.mark.parametrize("source", ["arrays", "iterator"])
def test_a_whole_run_is_replayed(source, tmp_path):
    """As in one process; bit for bit the same after both are killed, forward and back."""
    first, second = on(2, "replays", source, tmp_path, "")
    assert first == second
    for case, found in first.items():
        assert found["error"] < ROUNDING, case
        assert not found["moved"], case
    for writes in (2, 5):  # of 4 states and 3 cotangents
        done = started(2, "replays", source, tmp_path, writes, check=False)
        assert {x.returncode for x in done} == {-signal.SIGKILL}
    again, other = on(2, "replays", source, tmp_path, 100)
    assert again["digest"] == other["digest"] == first["queries"]["digest"]
    assert "resumed on the way back" in again["report"]


@pytest.mark.thorough
def test_what_ends_a_run_in_one_process_ends_it_in_all(tmp_path):
    done = started(2, "endings", tmp_path)
    first, second = (json.loads(x.stdout.split("RESULT")[1].splitlines()[0]) for x in done)
    whole = {"reason": "num_steps", "steps": 12, "error": None}
    alike = {
        "logged": whole,
        "bar": whole,
        "start": whole,
        "full disk": whole,
        "answer": whole,  # the second process's is ignored
        "time limit": {"reason": "time limit", "steps": 2, "error": None},
        "exhausted": {"reason": "data exhausted", "steps": 7, "error": None},
        "interrupt": {"reason": "interrupted", "steps": 2, "error": None},
        "long": [10, 3000],
    }
    refused = {
        "no sharding": "train_data yields batches one by one, and the state is shared",
        "num_steps": "num_steps differs: 12 in process 0, 13 in process 1",
        "rate": "lr_hyper differs: 0.5 in process 0, 0.25 in process 1",
        "key": "ArrayData(key) differs: checksum",
        "parts": "float64[2, 3] in process 0 and batches PyTreeDef(*) of float64[4, 3] in process",
        "whole": "yield only the part of this one",
        "uneven": "of shape (3, 3) in each process",
        "orbax": 'pip install -e ".[orbax]"',
    }
    for name, expected in alike.items():
        assert first[name] == second[name] == expected, name
    for name, said in refused.items():
        assert first[name] == second[name], name
        assert said in first[name], name
    ended = {"callback": ("callback error", 4), "failing data": ("data error", 7)}
    for name, (reason, steps) in ended.items():
        said = second[name]["error"]
        assert said in ("OSError: no more", "OSError: the disk is gone")
        assert second[name] == {"reason": reason, "steps": steps, "error": said}
        assert first[name] == second[name] | {"error": f"RuntimeError: process 1 failed: {said}"}
    # Nothing to return: all of them raise.
    for name, one, other in (
        ("first callback", second, first),
        ("at first", second, first),
        ("data at first", second, first),
        ("log", first, second),
    ):
        assert isinstance(one[name], str), name
        assert other[name] == f"RuntimeError: process {int(one is second)} failed: {one[name]}"
    # Only one process writes files.
    lines = Path(tmp_path, "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert "labelled: 100% 12/12" in done[0].stderr
    assert "RuntimeWarning: 7 of 12 steps" in done[0].stderr
    assert "checkpoints could not be written; the last time: OSError: no space" in done[0].stderr
    assert "labelled" not in done[1].stderr
    assert "Warning" not in done[1].stderr


@pytest.mark.thorough
def test_a_chunk_that_one_process_does_not_begin_ends_that_process():
    """JAX then ends the others, instead of letting them wait forever."""
    first, second = started(2, "unlaunched", check=False)
    assert second.returncode == 1
    assert "said: OSError: no memory" in second.stderr
    assert first.returncode not in (None, 0)


@pytest.mark.thorough
def test_some_of_the_processes_cannot_share_a_run():
    """They could not reach agreement without the others."""
    *said, nothing = on(3, "partial", devices=1)
    assert nothing is None
    for text in said:
        assert text.startswith("the state is spread over the devices of 2 of 3 processes")


@pytest.mark.thorough
def test_both_processes_are_killed_and_go_on_bit_for_bit(tmp_path):
    whole, killed, copied = (tmp_path / name for name in ("whole", "killed", "copied"))
    whole.mkdir()
    killed.mkdir()
    done = started(2, "kept", whole, killed, check=False)
    # Or JAX stops the second a moment earlier, since the first is gone.
    assert all(x.returncode in (-signal.SIGKILL, -signal.SIGABRT) for x in done)
    first, second = (json.loads(x.stdout.split("RESULT")[1].splitlines()[0]) for x in done)
    assert first == second
    assert not first["moved"]
    shutil.copytree(killed, copied)
    (killed / "step-0000000099.orbax" / "arrays").mkdir(parents=True)  # torn: it is ignored
    for found in on(2, "resumed", killed, 12):
        assert found.pop("read alone") == found["of state"]
        assert found == first
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    kept = sorted(path.name for path in killed.glob("step-*"))
    assert kept == ["step-0000000010.orbax", "step-0000000012.orbax"]
    # Half of every batch would be missing.
    said = on(1, "refused", copied)[0]
    assert "is of a run whose train_data came from iterators in 2 processes" in said
    assert "resume it in 2" in said


@pytest.mark.thorough
def test_a_run_goes_on_in_fewer_and_in_more_processes(tmp_path):
    names = "one", "first two", "first one"
    whole, of_two, of_one = (tmp_path / name for name in names)
    for path in (whole, of_two, of_one):
        path.mkdir()
    until = lambda count, path, steps: on(count, "resumed", path, steps, "arrays", axes="Explicit")
    expected = until(1, whole, 12)[0]["hyperparams"]
    until(1, of_one, 6)
    until(2, of_two, 6)
    for found in (*until(1, of_two, 12), *until(2, of_one, 12)):
        assert found["read alone"] == found["of state"]
        assert not found["moved"]
        np.testing.assert_allclose(found["hyperparams"], expected, rtol=ROUNDING)
    assert sorted(path.suffix for path in of_two.glob("step-*")) == [".ckpt"] * 2
    assert sorted(path.suffix for path in of_one.glob("step-*")) == [".orbax"] * 2


@pytest.mark.thorough
def test_the_program_on_the_page(tmp_path):
    page = Path(PROGRAM).parents[1].joinpath("docs/how_to/scaling.md").read_text()
    program = page.split("## Several processes")[1].split("```py\n")[1].split("```")[0]
    for written, here in (("localhost:12345", f"localhost:{free_port()}"), ("runs/two", tmp_path)):
        assert written in program
        program = program.replace(written, str(here))
    processes.context()
    start = lambda number: processes.python("-c", program, str(number), compiled=f"{FLAGS}2")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, (0, 1))
    assert "\n200 of 200 steps" in first.stdout
    assert "The run is complete." in first.stdout
    assert "steps" not in second.stdout + second.stderr
    assert (tmp_path / "step-0000000200.orbax").is_dir()


def test_a_folder_holds_every_kind_of_leaf(tmp_path, getkey):
    path = tmp_path / "step-0000000001.orbax"
    tree = {
        "wide": jnp.arange(6.0).reshape(2, 3),
        "narrow": jnp.ones(3, jnp.bfloat16),
        "scalar": jnp.asarray(2, jnp.int32),
        "none": jnp.zeros((0, 3)),
        "flags": np.asarray([True, False]),
        "complex": np.asarray(1 + 2j),
        "key": getkey(),
        "number": np.float32(0.5),
        "count": 3,
    }
    more = [jnp.asarray([7.0])]
    write_folder(path, json.dumps({"leaves": [], "checksum": 1}), [tree, more])
    assert is_folder(path)
    _, body = read_kept(path, lambda header: header["checksum"] == 1)
    assert_same(read_tree(body, tree), tree)
    assert_same(read_tree(body, more), more)
    _, body = read_kept(path, lambda header: True)
    body.skip(len(tree))
    assert_same(read_tree(body, more), more)
    # The same step again: its arrays never disappear.
    before = {file.name: file.stat().st_mtime_ns for file in (path / "arrays").iterdir()}
    write_folder(path, json.dumps({"leaves": [], "checksum": 2}), [tree, more])
    header, _ = read_kept(path, lambda header: True)
    assert header["checksum"] == 2
    assert before == {file.name: file.stat().st_mtime_ns for file in (path / "arrays").iterdir()}
    remove_folder(path)
    assert not is_folder(path)
    assert not path.exists()


def test_what_is_exchanged_may_be_long():
    for text in ("", "ä" * 1000):
        assert exchanged({"text": text}) == [{"text": text}]


# -- independent states, and batches of one process ------------------------------------------------

OF_ONE = """
import sys
import jax

port, number = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", 2, number, initialization_timeout=60)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import gradhpo

mesh = jax.make_mesh((2,), ("batch",))
split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["batch"], []))
train_loss = lambda w, h, batch: jnp.mean((batch @ w) ** 2) + h * jnp.sum((w - 1) ** 2)
val_loss = lambda w, h, batch: jnp.mean((batch @ w - 1) ** 2)
losses = gradhpo.LossFunctions(train_loss, val_loss)
optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
mine = np.random.default_rng(number).normal(size=(4, 3)).astype(np.float32)
ours = jax.make_array_from_process_local_data(split, mine)
start = jnp.full(3, 0.5), jnp.ones(())
alone = optimizer.init(*start)
shared = optimizer.init(*jax.device_put(start, everywhere))
key = jax.random.key(0)


def run(data, val_data=ours):
    settings = {"num_steps": 2, "progress": False}
    return gradhpo.run(optimizer, shared, losses, data, val_data, **settings)[0]


def show(name, call):
    try:
        print(name, "gives", np.asarray(call().params).tolist())
    except ValueError as error:
        print(name, "refuses", error)


show("step", lambda: optimizer.step(shared, mine, ours, losses))
show("step on the device", lambda: optimizer.step(shared, ours, jnp.asarray(mine), losses))
stack = gradhpo.BatchStack(mine[None])
show("step on a stack", lambda: optimizer.step(shared, stack, ours, losses))
show("hypergradient", lambda: optimizer.compute_hypergradient(shared, mine, ours, losses))
show("run on one batch", lambda: run(mine))
show("run on data", lambda: run(gradhpo.ArrayData(mine, 2, key)))
show("run on an iterator", lambda: run(gradhpo.iterate([mine])))
show("run on a function", lambda: run(lambda i: jnp.asarray(mine) + i))
show("run, to validate", lambda: run(ours, {"x": mine}))
show("shared step", lambda: optimizer.step(shared, ours, ours, losses))
show("shared run", lambda: run(ours))
show("shared draws", lambda: run(lambda i: jax.random.normal(jax.random.key(i), (4, 3))))
show("retrainings", lambda: gradhpo.retraining_score(
    optimizer, shared, ours, ours, losses, num_steps=1, perturb=gradhpo.leave_out(0.5),
    key=key, progress=False,
))
show("own step", lambda: optimizer.step(alone, mine, mine, losses))
jax.distributed.shutdown()  # together: one that loses the other is killed
"""


@pytest.mark.thorough
def test_batches_of_one_process_beside_a_state_of_all_are_refused():
    """They would be treated as equal, and parameters would silently drift apart."""
    processes.context()
    port = free_port()
    start = lambda number: processes.python("-c", OF_ONE, str(port), str(number))
    with ThreadPoolExecutor(2) as pool:
        first, second = (done.stdout.splitlines() for done in pool.map(start, (0, 1)))
    first, second = ({name(x): x for x in lines if " " in x} for lines in (first, second))
    refused = {
        "step": "train_batch",
        "step on the device": "val_batch",
        "step on a stack": "train_batch.batches",
        "hypergradient": "train_batch",
        "run on one batch": r"train_data[0]",
        "run on data": r"train_data[0]",
        "run on a function": r"train_data[0]",
        "run, to validate": r"val_data[0]",
    }
    for lines in (first, second):
        for what, where in refused.items():
            expected = f"{what} refuses {where} is an array of this process alone, but the state is"
            assert lines[what].startswith(expected), lines[what]
            assert "jax.make_array_from_process_local_data(sharding, part)" in lines[what]
            assert "independent state in every process" in lines[what]
        assert (
            "run on an iterator refuses train_data yields batches one by one"
            in lines["run on an iterator"]
        )
        assert "refuses retraining_score runs in one process" in lines["retrainings"]
    for what in ("shared step", "shared run", "shared draws"):
        assert first[what] == second[what]
        assert " gives [" in first[what]
    assert first["own step"] != second["own step"]
    assert " gives [" in first["own step"]


def name(line):
    return line.partition(" gives ")[0].partition(" refuses ")[0]
