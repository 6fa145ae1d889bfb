"""Two processes of one program, each with batches of its own."""

import socket
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest


PROGRAM = """
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
show("own step", lambda: optimizer.step(alone, mine, mine, losses))
jax.distributed.shutdown()  # together: one that loses the other is killed
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.thorough
def test_batches_of_one_process_beside_a_state_of_all_are_refused():
    """They would be treated as equal, and parameters would silently drift apart."""
    processes.context()
    port = free_port()
    start = lambda number: processes.python("-c", PROGRAM, str(port), str(number))
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
        "run on an iterator": r"train_data[0]",
        "run on a function": r"train_data[0]",
        "run, to validate": r"val_data[0]",
    }
    for lines in (first, second):
        for what, where in refused.items():
            expected = f"{what} refuses {where} is an array of this process alone, and the state is"
            assert lines[what].startswith(expected), lines[what]
            assert "jax.make_array_from_process_local_data(sharding, part)" in lines[what]
            assert "independent state in every process" in lines[what]
    for what in ("shared step", "shared run", "shared draws"):
        assert first[what] == second[what]
        assert " gives [" in first[what]
    assert first["own step"] != second["own step"]
    assert " gives [" in first["own step"]


def name(line):
    return line.partition(" gives ")[0].partition(" refuses ")[0]
