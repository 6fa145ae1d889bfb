"""Two processes that share a state, compared with one process: printed as JSON.

    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    python on_processes.py 12345 0 2 Auto alike greedy step &
    python on_processes.py 12345 1 2 Auto alike greedy step

The arguments: port of the first process, number of this one, number of processes, axes, task.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
import zlib
from pathlib import Path

import jax


PORT, NUMBER, COUNT = map(int, sys.argv[1:4])
if COUNT > 1:
    limits = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 20}
    jax.distributed.initialize(f"localhost:{PORT}", COUNT, NUMBER, **limits)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from on_devices import OPTIMIZERS, SETTINGS, losses, moved, problem, quarters  # noqa: E402

import gradhpo  # noqa: E402
from gradhpo.training import boundaries  # noqa: E402
from gradhpo.training.chunk import Chunk  # noqa: E402
from gradhpo.training.metrics_file import MetricsFile  # noqa: E402
from gradhpo.utils.processes import exchanged, numbers  # noqa: E402


jax.config.update("jax_enable_x64", True)
AXES = getattr(AxisType, sys.argv[4])
MESH = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AXES,))
EVERYWHERE, SPREAD = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in ([], ["devices"]))


def gathered(x):
    """What explicit axes require of a loss with sharded parameters."""
    return jax.sharding.reshard(x, EVERYWHERE) if jax.typeof(x).sharding.mesh.axis_names else x


OF_TREES = losses(gathered if AXES == AxisType.Explicit else lambda x: x)
LOSSES = gradhpo.LossFunctions(*OF_TREES)


def whole(tree):
    """All numbers of a tree on the host."""
    return jax.tree.map(lambda x: numbers(x), eqx.filter(tree, eqx.is_inexact_array))


def furthest(found, expected):
    """The largest difference; metrics not yet measured are NaN in both."""
    away = lambda x, y: np.abs(x - y)[~np.isnan(y)].max(initial=0)
    return float(max(jax.tree.leaves(jax.tree.map(away, whole(found), whole(expected)))))


def part(batch):
    """This process's part of a batch."""
    return jax.tree.map(lambda x: np.split(np.asarray(x), COUNT)[NUMBER], batch)


def joined(batch):
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(SPREAD, x), part(batch))


def everywhere(tree, sharding=SPREAD):
    """Data that all processes share, on the devices of all."""
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: np.asarray(x)[i])
    return jax.tree.map(put, tree)


def of_parts(batch):
    """Sources split over the processes, and the same for one process."""
    return {
        "iterator": [
            lambda: gradhpo.iterate(list(map(part, quarters(batch)))),
            lambda: gradhpo.iterate(quarters(batch)),
        ],
        "arrays": [
            lambda: gradhpo.ArrayData(joined(batch), 16, jax.random.key(0)),
            lambda: gradhpo.ArrayData(batch, 16, jax.random.key(0)),
        ],
        "fixed": [lambda: part(batch), lambda: batch],
    }


def alike(method, *cases):
    """A sharded state on parts of batches, and one process's state on whole batches.

    A case is `step`, or the data and the episodes of a run, `iterator, 3`.
    """
    params, hyperparams, *batches = problem()
    given, optimizer, found = everywhere((params, hyperparams)), OPTIMIZERS[method], {}
    for case in cases:
        if case == "step":
            start = optimizer.init(*given)
            got = optimizer.step(start, *map(joined, batches), LOSSES)
            expected = optimizer.step(optimizer.init(params, hyperparams), *batches, LOSSES)
            found[case] = {"error": furthest(got, expected), "moved": moved(start, got)}
            continue
        name, episodes = case.split(", ")
        settings = SETTINGS | {"steps_per_episode": int(episodes) or None}
        settings |= {"reptile_rate": 0.5} if int(episodes) else {}
        of_each = [[make() for make in of_parts(batch)[name]] for batch in batches]
        shared, alone = zip(*of_each, strict=True)
        start = optimizer.init(*given)
        got = gradhpo.run(optimizer, start, LOSSES, *shared, data_sharding=SPREAD, **settings)
        own = optimizer.init(params, hyperparams)
        expected = gradhpo.run(optimizer, own, LOSSES, *alone, **settings)
        away = np.abs(got[1]["val_loss"] - expected[1]["val_loss"]).max()
        away = max(furthest(got[0], expected[0]), float(away))
        found[case] = {"error": away, "moved": moved(start, got[0])}
    return found


def partial():
    """A run on the devices of the first two processes, without the third."""
    few = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2], axis_types=(AXES,))
    if NUMBER < 2:
        where = NamedSharding(few, PartitionSpec())
        state = SMALL.init(*everywhere((np.ones(3), np.ones(())), where))
        try:
            gradhpo.run(SMALL, state, SMALL_LOSSES, None, None, num_steps=1)
        except ValueError as error:
            return str(error)


# -- how runs end ----------------------------------------------------------------------------------


def small(data, *, callbacks=(), num_steps=12, tuned=True, **settings):
    """A run on batches of numbers with a replicated state: how it ended, or what it raised."""
    optimizer = SMALL if tuned else dataclasses.replace(SMALL, outer_optimizer=None)
    state = optimizer.init(*everywhere((np.ones(3), np.ones(())), EVERYWHERE))
    settings = {"chunk_size": 2, "progress": False, "data_sharding": SPREAD} | settings
    try:
        state, history = gradhpo.run(
            optimizer, state, SMALL_LOSSES, data, np.ones((2, 3)),
            num_steps=num_steps, callbacks=callbacks, **settings,
        )  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    error = history.error and f"{type(history.error).__name__}: {history.error}"
    return {"reason": history.stop_reason, "steps": int(state.step), "error": error}


SMALL = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
SMALL_LOSSES = gradhpo.LossFunctions(
    lambda w, h, batch: jnp.mean((batch @ w) ** 2) + h * jnp.sum((w - 1) ** 2),
    lambda w, h, batch: jnp.mean((batch @ w - 1) ** 2),
)


def batches(count=100, fails=False, examples=2):
    """An iterator over parts of batches, which differ between the processes."""
    random = np.random.default_rng(NUMBER)
    for _ in range(count):
        yield random.normal(size=(examples, 3))
    if fails:
        raise OSError("the disk is gone")


def only(number, value, other):
    """A value in one process, and another value elsewhere."""
    return value if number == NUMBER else other


def endings(directory):
    """Runs that one process ends, and calls that one process gets wrong."""
    log, folder = Path(directory, "log.jsonl"), Path(directory, "run")

    def fails(at):
        def callback(state, metrics):
            if NUMBER == 1 and state.step >= at:
                raise OSError("no more")

        return callback

    interrupts = lambda state, metrics: only(0, os.kill, print)(*only(0, INTERRUPT, ("no",)))
    logged = small(batches(), callbacks=[gradhpo.JSONLinesLogger(log)])
    extra = {"extra": lambda state: {"sum": jnp.sum(state.params)}}  # of all processes
    found = {
        "logged": logged,
        "time limit": small(batches(), callbacks=[gradhpo.TimeLimit(only(0, 1e-9, 1e9))]),
        "answer": small(batches(), callbacks=[lambda state, metrics: NUMBER == 1]),
        "callback": small(batches(), callbacks=[fails(4)]),
        "first callback": small(batches(), callbacks=[fails(1)]),
        "exhausted": small(batches(only(1, 7, 100))),
        "at first": small(batches(only(1, 0, 100))),
        "failing data": small(batches(only(1, 7, 100), fails=True)),
        "data at first": small(batches(only(1, 1, 100), fails=True)),
        "interrupt": small(batches(), callbacks=[interrupts]),
        "bar": small(batches(), progress="labelled"),
        "log": small(batches(), callbacks=[gradhpo.CSVLogger(log, **extra)]),
        "no sharding": small(batches(), data_sharding=None),
        "num_steps": small(batches(), num_steps=only(0, 12, 13)),
        "rate": small(batches(), tuned=False, lr_hyper=only(0, 0.5, 0.25)),
        "key": small(gradhpo.ArrayData(joined(np.ones((4, 3))), 4, jax.random.key(NUMBER))),
        "parts": small(batches(examples=only(0, 2, 4))),
        "whole": small(iter([joined(np.ones((4, 3)))])),
        "uneven": small(np.ones((3, 3))),
    }
    start = {"start_fn": lambda key, h: h * jax.random.normal(key, (3,)), "steps_per_episode": 2}
    found["start"] = small(batches(), key=jax.random.key(0), lr_hyper=None, **start)
    found["long"] = [len(x) for x in exchanged("x" * only(0, 10, 3000))]
    sys.modules["orbax.checkpoint"] = None
    found["orbax"] = small(batches(), checkpoint=folder)
    del sys.modules["orbax.checkpoint"]
    MetricsFile.add = only(0, full, MetricsFile.add)
    found["full disk"] = small(batches(), checkpoint=gradhpo.Checkpoint(folder, every_steps=4))
    return found


def unlaunched():
    """A run whose second chunk fails to launch on one process."""
    launch, count = Chunk.launch, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == only(1, 2, 0):
            raise OSError("no memory")
        return launch(*arguments)

    Chunk.launch = counted  # pyright: ignore
    ended = small(batches())
    raise SystemExit(f"said: {ended}")  # like a program that raises, without waiting


def full(self, metrics):
    """Replaces the writing of a run's metrics."""
    if metrics:
        raise OSError("no space")


INTERRUPT = os.getpid(), signal.SIGINT


# -- what runs leave on disk -----------------------------------------------------------------------


def digest(*trees):
    """Every bit of the numbers in trees, by a checksum."""
    content = [x.tobytes() for x in jax.tree.leaves(whole(trees))]
    return zlib.crc32(b"".join(content))


def of_everything(place):
    """The start of a run with a frozen part, on the devices of all or on one."""
    params, hyperparams, *_ = problem()
    params, hyperparams, frozen = place((params, hyperparams, np.arange(8.0)))
    model = {"trained": params, "backbone": gradhpo.frozen(frozen)}
    return OPTIMIZERS["greedy"].init(model, hyperparams)


def train(directory, num_steps, source="iterator", killed_at=None):
    """A run of a sharded state with everything that has a memory."""

    def kill(state, metrics):
        if killed_at is not None and state.step >= killed_at:
            Path(directory, f"ready {NUMBER}").touch()
            while len(list(Path(directory).glob("ready *"))) < COUNT:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    train_batch, val_batch = problem()[2:]
    data = {
        "iterator": lambda: gradhpo.iterate(list(map(part, quarters(train_batch)))),
        "arrays": lambda: gradhpo.ArrayData(joined(train_batch), 16, jax.random.key(0)),
    }[source]()
    best = gradhpo.BestState()
    of_trained = lambda loss: lambda w, h, batch: loss(w["trained"], h, batch)
    start = of_everything(everywhere)
    state, history = gradhpo.run(
        OPTIMIZERS["greedy"],
        start,
        gradhpo.LossFunctions(*map(of_trained, OF_TREES)),
        data,
        gradhpo.ArrayData(joined(val_batch), 16, jax.random.key(1)),
        num_steps=num_steps,
        steps_per_episode=3,
        reptile_rate=0.5,
        chunk_size=1,
        callbacks=[best, gradhpo.JSONLinesLogger(Path(directory, "log.jsonl")), kill],
        checkpoint=gradhpo.Checkpoint(directory, every_steps=2),
        progress=False,
        data_sharding=SPREAD,
    )
    return {
        "digest": digest(state, best.state, dict(history)),
        "of state": digest(state),
        "moved": moved(start, state),
        "hyperparams": whole(state.hyperparams).ravel().tolist(),
        "best": best.step,
    }


def kept(uninterrupted, killed):
    """A whole run, printed first; and one that is killed in both processes at once."""
    print("RESULT" + json.dumps(train(uninterrupted, 12)), flush=True)
    train(killed, 12, killed_at=8)


def resumed(directory, num_steps, source="iterator"):
    """A run that starts or resumes, and its newest checkpoint as read by a single process."""
    found = train(directory, int(num_steps), source)
    alone, _ = gradhpo.load_checkpoint(directory, of_everything(lambda tree: tree))
    return found | {"read alone": digest(alone)}


def replays(source, directory, killed):
    """A replayed run of a sharded state: compared with one process, and killed in both."""
    params, hyperparams, train, val = problem()
    optimizer, settings = OPTIMIZERS["one step"], {"num_steps": 7, "segment": 3, "progress": False}
    start = optimizer.init(*everywhere((params, hyperparams)))
    of_all, of_one = of_parts(train)[source]
    found = {}
    for queries in (False, True):
        own = optimizer.init(params, hyperparams)
        given = optimizer, own, of_one(), val, LOSSES
        expected = gradhpo.replay(*given, queries=queries, **settings)
        # Each query is whole: the parameters are sharded.
        given = start, of_all(), everywhere(val, EVERYWHERE) if queries else joined(val), LOSSES
        more = {"queries": queries, "data_sharding": SPREAD}
        got = gradhpo.replay(optimizer, *given, **more, **settings)
        pairs = (
            (got.hypergradient, got.state.params),
            (expected.hypergradient, expected.state.params),
        )
        found["queries" if queries else "one"] = {
            "error": furthest(*pairs),
            "moved": moved(start, got.state),
            "digest": digest(got.hypergradient),
        }
    if not killed:
        return found
    write, count = boundaries.write_file, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == int(killed):
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    boundaries.write_file = counted
    given = start, of_all(), everywhere(val, EVERYWHERE), LOSSES
    got = gradhpo.replay(optimizer, *given, store=directory, **more, **settings)
    return {"digest": digest(got.hypergradient), "report": got.report}


def refused(directory):
    """The error of a run that cannot resume here."""
    try:
        train(directory, 12)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    what, *arguments = sys.argv[5:]
    try:
        print("RESULT" + json.dumps(globals()[what](*arguments)), flush=True)
    except BaseException:  # at once: otherwise the other process waits for this one's shutdown
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if COUNT > 1:
        jax.distributed.shutdown()  # together: one that loses the other is killed
