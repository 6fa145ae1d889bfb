"""Every optimizer on several devices, compared with one device: printed as JSON.

    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    python on_devices.py steps Auto data greedy ...
    python on_devices.py runs Auto data greedy ...
    python on_devices.py flops greedy ...
    python on_devices.py step_costs greedy "network, data"
    python on_devices.py resumed 4 12 directory
    python on_devices.py replays Auto data
    python on_devices.py retrainings Auto data
    python on_devices.py uneven

`data` shards only the batches, `state` also parameters and hyperparameters.
"""

import json
import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradhpo
from benchmarks.costs import devices
from gradhpo.data.sources import as_source
from gradhpo.diagnostics.cost import Program
from gradhpo.training.chunk import Chunk


INNER, OUTER = optax.adam(1e-2, eps_root=1e-8), optax.adam(1e-2)
OPTIMIZERS = {
    "first order": gradhpo.FOOptimizer(INNER, OUTER),
    "one step": gradhpo.OneStepOptimizer(INNER, OUTER),
    "T1-T2": gradhpo.T1T2Optimizer(INNER, OUTER, inner_steps=2),
    "greedy": gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=3),
    "HyperDistill": gradhpo.OnlineHypergradientOptimizer(INNER, OUTER),
    "DrMAD": gradhpo.DrMADOptimizer(INNER, OUTER, unroll_steps=3),
    "forward mode": gradhpo.ForwardModeOptimizer(INNER, OUTER, unroll_steps=2),
    "implicit": gradhpo.ImplicitOptimizer(INNER, OUTER, inner_steps=3),
    "unrolled": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=3),
    "checkpointed": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=3, checkpoints="sqrt"),
    "bisected": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=3, checkpoints="log"),
    "tasks": gradhpo.TaskBatched(gradhpo.GreedyOptimizer(INNER, OUTER), num_tasks=2),
    "tasks apart": gradhpo.TaskBatched(
        gradhpo.OneStepOptimizer(INNER, OUTER), 2, average="updates", restart_every=1
    ),
}
# Their programs are made of the same parts, so only the placement of arrays is checked.
SINGLE_LOOPS = {
    "SOBA": gradhpo.SOBAOptimizer(INNER, OUTER, adjoint_optimizer=OUTER),
    "penalty": gradhpo.PenaltyOptimizer(INNER, OUTER, inner_steps=3),
    "BOME": gradhpo.BOMEOptimizer(INNER, OUTER, inner_steps=3),
}


def problem():
    """A multivariate regression, convex: parameters, hyperparameters and two batches."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    params = {"matrix": 0.3 * draw(8, 16), "bias": jnp.zeros(16)}
    return params, draw(8, 16) - 3, *((draw(64, 8), draw(64, 16)) for _ in range(2))


def losses(whole):
    """`whole` gathers parameters before they meet a batch, as JAX demands under explicit axes."""

    def error(params, batch):
        x, y = batch
        return jnp.mean(jnp.log(jnp.cosh(x @ whole(params["matrix"]) + whole(params["bias"]) - y)))

    def train_loss(params, penalties, batch):
        return error(params, batch) + jnp.mean(jnp.exp(penalties) * params["matrix"] ** 2)

    def val_loss(params, penalties, batch):
        return error(params, batch) + 1e-3 * jnp.mean(penalties**2)

    return train_loss, val_loss


num_compiled = 0


def count(event, *_, **__):
    global num_compiled
    num_compiled += "backend_compile" in event


def two_steps(optimizer, params, hyperparams, *given):
    """The hypergradient, the states before and after, and the programs compiled by each step.

    `given`: batches and losses.
    """
    first = state = optimizer.init(params, hyperparams)
    hypergradient = optimizer.compute_hypergradient(state, *given)
    compiled = []
    for _ in range(2):
        before = num_compiled
        state = jax.block_until_ready(optimizer.step(state, *given))
        compiled.append(num_compiled - before)
    return hypergradient, first, state, compiled


def compared(make, losses, params, hyperparams, batches, here, of_batches):
    """Two steps on several devices, placed by `here` and `of_batches`, compared with one device.

    `make` and `losses` take a function that gathers parameters, and return optimizer and losses.
    """
    same = lambda x: x
    expected = two_steps(make(same), params, hyperparams, *batches, *losses(same))
    given = jax.device_put((params, hyperparams), here.of_state)
    batches = jax.device_put(batches, of_batches)
    with jax.set_mesh(here.mesh):
        got = two_steps(make(here.whole), *given, *batches, *losses(here.whole))
    return {
        "error": furthest(got[:3], expected[:3]),
        "compiled": got[3],
        "moved": moved(got[1], got[2]),
        "hypergradient moved": moved(given[1], got[0]),
        "alone": alone(got[1]),
    }


def for_two(x):
    """A batch for each of two tasks."""
    return jnp.stack([x, 2 * x])


def moved(before, after):
    """The names of arrays whose sharding has changed."""
    paths, _ = jax.tree.flatten_with_path(eqx.filter(before, eqx.is_array))
    pairs = zip(paths, jax.tree.leaves(eqx.filter(after, eqx.is_array)), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, x), y in pairs
        if not y.sharding.is_equivalent_to(x.sharding, x.ndim)
    ]


def alone(state):
    """The names of arrays that are on one device."""
    paths, _ = jax.tree.flatten_with_path(eqx.filter(state, eqx.is_array))
    return [jax.tree_util.keystr(path) for path, x in paths if x.sharding.num_devices == 1]


def furthest(found, expected):
    """The largest difference; metrics not yet measured are NaN in both."""
    trees = (eqx.filter(tree, eqx.is_inexact_array) for tree in (found, expected))

    def away(x, y):
        x, y = np.asarray(x), np.asarray(y)
        differ = (x != y) & ~np.isnan(y)
        return np.abs(x[differ] - y[differ]).max(initial=0)

    return float(max(jax.tree.leaves(jax.tree.map(away, *trees))))


class Mesh:
    """The devices, and the placement of parameters and batches."""

    def __init__(self, axes="Auto", spread="state", count=4):
        kind = getattr(AxisType, axes)
        self.mesh = jax.make_mesh((count,), ("devices",), axis_types=(kind,))
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec("devices"))
        self.of_state = self.split if spread == "state" else self.everywhere
        self.explicit = axes == "Explicit"

    def whole(self, x):
        return jax.sharding.reshard(x, self.everywhere) if self.explicit else x


def steps(axes, spread, *names):
    here = Mesh(axes, spread)
    jax.monitoring.register_event_duration_secs_listener(count)
    params, hyperparams, *batches = problem()
    found = {}
    for name in names:
        tasks = name.startswith("tasks")
        data = jax.tree.map(for_two, batches) if tasks else batches
        of_batch = NamedSharding(here.mesh, PartitionSpec(*[None] * tasks, "devices"))
        make = lambda whole, name=name: (OPTIMIZERS | SINGLE_LOOPS)[name]
        found[name] = compared(make, losses, params, hyperparams, data, here, of_batch)
    return found


def quarters(batch):
    """Four batches on the host."""
    x, y = (np.split(np.asarray(x), 4) for x in batch)
    return list(zip(x, y, strict=True))


SOURCES = {
    "arrays": lambda batch: gradhpo.ArrayData(batch, 16, jax.random.key(0)),
    "iterator": lambda batch: gradhpo.iterate(quarters(batch)),
    "fixed": lambda batch: batch,
}
SETTINGS = {"num_steps": 6, "chunk_size": 3, "progress": False}


def runs(axes, spread, *names):
    here = Mesh(axes, spread)
    params, hyperparams, *batches = problem()
    found = {}
    for name in names:
        for source, of in SOURCES.items():
            for episodes in (None, 3):
                more = {"steps_per_episode": episodes, "reptile_rate": 0.0 if episodes else 1.0}

                def run(given, whole, of=of, name=name, more=more, **settings):
                    state = OPTIMIZERS[name].init(*given)
                    both = gradhpo.LossFunctions(*losses(whole))
                    data = map(of, batches)
                    found = gradhpo.run(
                        OPTIMIZERS[name], state, both, *data, **SETTINGS, **more, **settings
                    )
                    return state, *found

                expected = run((params, hyperparams), lambda x: x)
                given = jax.device_put((params, hyperparams), here.of_state)
                with jax.set_mesh(here.mesh):
                    got = run(given, here.whole, data_sharding=here.split)
                found[f"{name}, {source}, {episodes}"] = {
                    "error": furthest(got[1], expected[1]),
                    "moved": moved(got[0], got[1]),
                }
    return found


def flops(*names):
    """Flops of a chunk on one of four devices, as a share of a single device's."""
    here = Mesh()
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    params, hyperparams = {"matrix": draw(64, 64), "bias": jnp.zeros(64)}, draw(64, 64)
    batches = [(draw(512, 64), draw(512, 64)) for _ in range(2)]

    def of_chunk(optimizer, of, given, sharding):
        state = optimizer.init(*given)
        counts = optimizer.num_inner_steps, None
        sources = [
            as_source(of(batch), name, number, sharding)
            for batch, name, number in zip(batches, ("train", "val"), counts, strict=True)
        ]
        drawn = [source.fetch(source.draw(3, in_part=True)) for source in sources]
        chunk = Chunk(optimizer, gradhpo.LossFunctions(*losses(lambda x: x)), *drawn, None)
        program = Program(lambda chunk, state: chunk.run_steps(state, 3)[0], chunk, state)
        return program.flops_with_loops_once

    found = {}
    wide = {
        "arrays": lambda batch: gradhpo.ArrayData(batch, 256, jax.random.key(0)),
        "iterator": lambda batch: gradhpo.iterate([jax.tree.map(np.asarray, batch)]),
        "fixed": lambda batch: batch,
    }
    for name in names:
        for source, of in wide.items():
            alone = of_chunk(OPTIMIZERS[name], of, (params, hyperparams), None)
            for spread in ("data", "state"):
                own = here.split if spread == "state" else here.everywhere
                given = jax.device_put((params, hyperparams), own)
                each = of_chunk(OPTIMIZERS[name], of, given, here.split)
                found[f"{name}, {source}, {spread}"] = each / alone
    return found


def replays(axes, spread):
    """Whole runs, stored in memory and in a directory, and one hypergradient per example."""
    here = Mesh(axes, spread)
    params, hyperparams, train, val = problem()
    optimizer, found = OPTIMIZERS["one step"], {}
    for queries in (False, True):

        def replay(given, data, val, whole, queries=queries, **settings):
            both = gradhpo.LossFunctions(*losses(whole))
            given = optimizer, optimizer.init(*given), data, val, both
            made = gradhpo.replay(
                *given, num_steps=7, segment=3, queries=queries, progress=False, **settings
            )
            return given[1], made

        source = lambda **more: gradhpo.ArrayData(train, 16, jax.random.key(0), **more)
        _, expected = replay((params, hyperparams), source(), val, lambda x: x)
        given = jax.device_put((params, hyperparams), here.of_state)
        # Each query is whole: only the parameters are sharded.
        spread_val = jax.device_put(val, here.everywhere if queries else here.split)
        with jax.set_mesh(here.mesh), tempfile.TemporaryDirectory() as directory:
            for store in (None, directory):
                first, got = replay(
                    given, source(sharding=here.split), spread_val, here.whole, store=store
                )
                pairs = [
                    (got.hypergradient, expected.hypergradient),
                    (got.state.params, expected.state.params),
                ]
                found[f"{'queries' if queries else 'one'}, {'file' if store else 'memory'}"] = {
                    "error": furthest(*zip(*pairs, strict=True)),
                    "moved": moved(first, got.state),
                    "hypergradient moved": [] if queries else moved(given[1], got.hypergradient),
                }
    return found


def retrainings(axes, spread):
    """Training runs at other hyperparameters, in blocks, and their predicted effects."""
    here = Mesh(axes, spread)
    params, hyperparams, train, val = problem()
    names = "unrolled", "greedy"
    optimizers = {name: OPTIMIZERS[name] for name in names}
    # Axis 0 of the hyperparameters is sharded.
    perturb = gradhpo.leave_out(0.3, value=-4.0)

    def score(given, data, val, whole, **settings):
        return gradhpo.retraining_score(
            optimizers, optimizers["unrolled"].init(*given), data, val,
            gradhpo.LossFunctions(*losses(whole)), num_steps=3, perturb=perturb,
            num_retrainings=4, key=jax.random.key(1), progress=False, **settings,
        )  # fmt: skip

    source = lambda **more: gradhpo.ArrayData(train, 16, jax.random.key(0), **more)
    val = jax.tree.map(lambda x: x[:5], val)
    expected = score((params, hyperparams), source(), val, lambda x: x)
    given = jax.device_put((params, hyperparams), here.of_state)
    with jax.set_mesh(here.mesh):
        data, val = source(sharding=here.split), jax.device_put(val, here.everywhere)
        found = score(given, data, val, here.whole, block_size=2)
    parts = lambda report: (report.true, report.predicted, report.hypergradients)
    return {
        "error": furthest(parts(found), parts(expected)),
        "smallest change": float(np.min(np.abs(expected.true))),
        "failed": found.failed,
    }


def moving(axes):
    """A sharded hyperparameter and unsharded parameters, which the compiler would shard."""
    here = Mesh(axes)
    loss = lambda w, h, batch: jnp.sum((w - here.whole(h)) ** 2)
    optimizer, both = gradhpo.OneStepOptimizer(INNER), gradhpo.LossFunctions(loss, loss)
    given = jnp.arange(8.0), jnp.ones(8)
    placed = jax.device_put(given[0], here.everywhere), jax.device_put(given[1], here.split)
    settings = {"num_steps": 7, "segment": 3, "progress": False}
    whole = gradhpo.LossFunctions(*2 * [lambda w, h, batch: jnp.sum((w - h) ** 2)])
    expected = gradhpo.replay(optimizer, optimizer.init(*given), None, None, whole, **settings)
    with jax.set_mesh(here.mesh):
        start = optimizer.init(*placed)
        got = gradhpo.replay(optimizer, start, None, None, both, **settings)
    of = lambda made: (made.hypergradient, made.state.params)
    return {"error": furthest(of(got), of(expected)), "moved": moved(start, got.state)}


def uneven():
    """The errors for 18 examples on four devices, from each kind of source."""
    here = Mesh()
    x, said = jnp.ones((18, 2)), {}
    sources = {
        "arrays": gradhpo.ArrayData(x, 6, jax.random.key(0)),
        "iterator": gradhpo.iterate([np.ones((18, 2))]),
        "fixed": x,
    }
    for name, data in sources.items():
        try:
            source = as_source(data, "train_data", None, here.split)
            source.draw(1, in_part=True)
            source.fetch(1).batch(jnp.zeros((), int), jnp.zeros((), int))
        except ValueError as error:
            said[name] = str(error)
    return said


def resumed(count, num_steps, directory):
    """The end of a run on `count` devices, which may resume a run that used more or fewer."""
    here = Mesh(count=int(count))
    params, hyperparams, *batches = problem()
    state = OPTIMIZERS["greedy"].init(*jax.device_put((params, hyperparams), here.of_state))
    data = (gradhpo.ArrayData(x, 16, jax.random.key(0), sharding=here.split) for x in batches)
    both = gradhpo.LossFunctions(*losses(lambda x: x))
    settings = SETTINGS | {"num_steps": int(num_steps), "checkpoint": directory}
    end, _ = gradhpo.run(OPTIMIZERS["greedy"], state, both, *data, **settings)
    return {"moved": moved(state, end), "hyperparams": np.asarray(end.hyperparams).tolist()}


def step_costs(name, kind):
    """The costs of one optimizer, from the benchmark's table."""
    found = devices.step_costs(name, kind)
    beside = "reductions", "largest_exchanged"
    return found._asdict() | {name: getattr(found, name) for name in beside}


def answer(operations):
    """Runs the operation that the command line names, and prints what it returns."""
    jax.config.update("jax_enable_x64", True)
    what, *arguments = sys.argv[1:]
    print("RESULT" + json.dumps(operations[what](*arguments)))


if __name__ == "__main__":
    answer(globals())
