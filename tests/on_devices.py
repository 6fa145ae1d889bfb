"""What every optimizer makes of arrays on four devices, held against one: printed as JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python on_devices.py Auto data greedy ...
"""

import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradhpo


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


def two_steps(optimizer, params, hyperparams, train_batch, val_batch, whole=lambda x: x):
    """The hypergradient, the states before and after, and programs compiled by each step."""
    given = train_batch, val_batch, *losses(whole)
    first = state = optimizer.init(params, hyperparams)
    hypergradient = optimizer.compute_hypergradient(state, *given)
    compiled = []
    for _ in range(2):
        before = num_compiled
        state = jax.block_until_ready(optimizer.step(state, *given))
        compiled.append(num_compiled - before)
    return hypergradient, first, state, compiled


def for_two(x):
    """A batch of each of two tasks."""
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
    """The largest difference; metrics that are not measured yet are NaN in both."""
    trees = (eqx.filter(tree, eqx.is_inexact_array) for tree in (found, expected))
    away = lambda x, y: np.abs(np.asarray(x) - np.asarray(y))[~np.isnan(y)].max(initial=0)
    return float(max(jax.tree.leaves(jax.tree.map(away, *trees))))


def main(axes, spread, *names):
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(getattr(AxisType, axes),))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("devices"))
    whole = lambda x: jax.sharding.reshard(x, everywhere) if axes == "Explicit" else x
    jax.monitoring.register_event_duration_secs_listener(count)
    params, hyperparams, *batches = problem()
    found = {}
    for name in names:
        tasks = name == "tasks"
        data = jax.tree.map(for_two, batches) if tasks else batches
        expected = two_steps(OPTIMIZERS[name], params, hyperparams, *data)
        of_batch = NamedSharding(mesh, PartitionSpec(*[None] * tasks, "devices"))
        own = split if spread == "state" else everywhere
        given = jax.device_put((params, hyperparams), own)
        with jax.set_mesh(mesh):
            got = two_steps(OPTIMIZERS[name], *given, *jax.device_put(data, of_batch), whole=whole)
        found[name] = {
            "error": furthest(got[:3], expected[:3]),
            "compiled": got[3],
            "moved": moved(got[1], got[2]),
            "hypergradient moved": moved(given[1], got[0]),
            "alone": alone(got[1]),
        }
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*sys.argv[1:])
