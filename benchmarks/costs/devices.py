"""The work of one device of four in a step, and what the four exchange, as the compiler counts."""

import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

import gradhpo
from benchmarks.costs.collectives import Collective, collectives
from gradhpo.diagnostics.cost import Program


DEVICES, TASKS, STEPS = 4, 2, 3
# Many examples, so that activations outweigh copies of the state. Their number differs from that
# of the hyperparameters, whose collectives we recognise by size.
EXAMPLES, WIDTH, WEIGHTS, FEW, ENTRIES = 65_536, 256, 5_000, 8, 1_000_000
INNER, OUTER = optax.adam(1e-2, eps_root=1e-8), optax.adam(1e-2)
OPTIMIZERS = {
    "first order": gradhpo.FOOptimizer(INNER, OUTER),
    "one step": gradhpo.OneStepOptimizer(INNER, OUTER),
    "T1-T2": gradhpo.T1T2Optimizer(INNER, OUTER, inner_steps=STEPS),
    "greedy": gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=STEPS),
    "HyperDistill": gradhpo.OnlineHypergradientOptimizer(INNER, OUTER),
    "DrMAD": gradhpo.DrMADOptimizer(INNER, OUTER, unroll_steps=STEPS),
    "forward mode": gradhpo.ForwardModeOptimizer(INNER, OUTER, unroll_steps=STEPS),
    "implicit": gradhpo.ImplicitOptimizer(INNER, OUTER, inner_steps=STEPS),
    "unrolled": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=STEPS),
    "checkpointed": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=STEPS, checkpoints="sqrt"),
    "bisected": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=STEPS, checkpoints="log"),
    "tasks": gradhpo.TaskBatched(
        gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=STEPS), num_tasks=TASKS
    ),
}
KINDS = {
    "network, data": "examples spread",
    "network, state": "examples, parameters and hyperparameters spread",
    "entries, state": f"{ENTRIES:,} parameters, with a hyperparameter each, spread",
}


class Job(NamedTuple):
    params: PyTree
    hyperparams: Array
    batch: PyTree
    losses: gradhpo.LossFunctions


def network(num_weights: int) -> Job:
    """Two layers, and weights that examples look up."""
    random = np.random.default_rng(0)
    matrix = lambda: jnp.asarray(random.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5)
    params = {"first": matrix(), "second": matrix()}

    def errors(params, batch):
        x, y, _ = batch
        return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2, axis=1)

    def train_loss(params, weights, batch):
        return jnp.mean(jax.nn.sigmoid(weights[batch[2]]) * errors(params, batch))

    def val_loss(params, weights, batch):
        return jnp.mean(errors(params, batch)) + 1e-6 * jnp.sum(weights**2)

    numbers = jax.ShapeDtypeStruct((EXAMPLES, WIDTH), params["first"].dtype)
    batch = numbers, numbers, jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32)
    return Job(params, jnp.zeros(num_weights), batch, gradhpo.LossFunctions(train_loss, val_loss))


def entries(num_penalties: int) -> Job:
    """A quadratic in a million entries, each with a target; the penalties take turns."""

    def train_loss(w, penalties, target):
        each = jnp.exp(penalties)
        each = each if each.shape == w.shape else jnp.tile(each, w.size // each.size)
        return jnp.sum((w - target) ** 2 + each * w**2)

    def val_loss(w, penalties, target):
        return jnp.sum((w - target) ** 2) + 1e-6 * jnp.sum(penalties**2)

    w = jnp.zeros(ENTRIES)
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    return Job(w, jnp.zeros(num_penalties), jax.ShapeDtypeStruct(w.shape, w.dtype), losses)


class Costs(NamedTuple):
    """Costs of one device of four, as shares of a single device's; and what the four exchange."""

    arguments: float
    temporaries: float
    made: float  # results and temporaries, which often share the results' memory
    flops: float
    exchanged: list[Collective]
    num_hyperparams: int
    largest: int  # parameter

    @property
    def reductions(self) -> int:
        """All-reduces of arrays shaped like the hyperparameters, per task."""
        sums = [x for x in self.exchanged if x.kind in ("all-reduce", "reduce-scatter")]
        sizes = self.num_hyperparams, TASKS * self.num_hyperparams
        return sum(x.times for x in sums if x.size in sizes)

    @property
    def largest_exchanged(self) -> int:
        return max((x.size for x in self.exchanged), default=0)


def step_costs(name: str, kind: str) -> Costs:
    """The costs of a compiled `step` of one optimizer; `kind` is one of `KINDS`."""
    problem, spread = kind.split(", ")
    few = name == "forward mode"  # its work and memory grow with the hyperparameters
    make, count = (network, WEIGHTS) if problem == "network" else (entries, ENTRIES)
    job = make(FEW if few else count)
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("devices",)))
    alone = program(name, job)
    each = program(name, job, split if spread == "state" else everywhere, split)
    made = [x.result_bytes + x.temporary_bytes for x in (each, alone)]
    return Costs(
        arguments=each.argument_bytes / alone.argument_bytes,
        temporaries=each.temporary_bytes / alone.temporary_bytes,
        made=made[0] / made[1],
        flops=each.flops_with_loops_once / alone.flops_with_loops_once,
        exchanged=collectives(each.text),
        num_hyperparams=job.hyperparams.size,
        largest=max(x.size for x in jax.tree.leaves(job.params)),
    )


def program(
    name: str,
    job: Job,
    of_state: NamedSharding | None = None,
    of_batch: NamedSharding | None = None,
) -> Program:
    tasks = (TASKS,) * (name == "tasks")
    if of_batch is not None:
        spec = PartitionSpec(*[None] * len(tasks), *of_batch.spec)
        of_batch = NamedSharding(of_batch.mesh, spec)
    of = lambda x: jax.ShapeDtypeStruct((*tasks, *x.shape), x.dtype, sharding=of_batch)
    optimizer, batch = OPTIMIZERS[name], jax.tree.map(of, job.batch)
    given = jax.device_put((job.params, job.hyperparams), of_state)
    step = lambda state, train, val: optimizer.step(state, train, val, job.losses)
    return Program(step, optimizer.init(*given), batch, batch)


def rows() -> None:
    """Prints the rows; runs in a process that has the devices."""
    for kind in KINDS:
        print(f"  {kind}: {KINDS[kind]}")
        for name in OPTIMIZERS:
            found = step_costs(name, kind)
            shares = found.arguments, found.temporaries, found.made, found.flops
            print(
                f"    {name:14}" + "".join(f"{x:11.3f}" for x in shares)
                + f"{found.reductions:12}{found.largest_exchanged:12,}"
            )  # fmt: skip


def print_devices() -> None:
    print(
        f"\nA step of {STEPS} inner steps on {DEVICES} devices (forced on a CPU): costs of one of "
        "them, as\nshares of the costs on one device; sums over devices of arrays like the "
        "hyperparameters;\nthe largest array that devices exchange"
    )
    columns = "arguments", "temporary", "+ results", "flops"
    print(" " * 18 + "".join(f"{x:>11}" for x in columns) + f"{'sums':>12}{'largest':>12}")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from benchmarks.costs.devices import rows; rows()"],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    print(done.stdout, end="")
