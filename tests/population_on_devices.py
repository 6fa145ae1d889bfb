"""Eight members on four devices, compared with one device: printed as JSON.

export XLA_FLAGS=--xla_force_host_platform_device_count=4
python population_on_devices.py values Auto
python population_on_devices.py costs
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from on_devices import INNER, OUTER, Mesh, furthest, losses, moved, problem, two_steps

import gradhpo
from benchmarks.costs.collectives import collectives
from gradhpo.core.inputs import inputs_of
from gradhpo.diagnostics.cost import Program


SINGLE = gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=3)
# Not Adam, which amplifies the last bits of small gradients.
TEACHER = gradhpo.LearnedMutation(units=3, optimizer=optax.sgd(1.0))
KINDS = {
    "alone": gradhpo.Population(SINGLE, 8),
    "random": gradhpo.Population(SINGLE, 8, 2, mutation=gradhpo.RandomMutation(scale=0.3)),
    "learned": gradhpo.Population(SINGLE, 8, 2, mutation=TEACHER),
}


def stacked(tree):
    """Eight slightly different copies of a tree."""
    scales = 1 + 0.1 * np.arange(8.0)
    return jax.tree.map(lambda x: jnp.stack([x * s for s in scales]), tree)


def values(axes):
    here = Mesh(axes)
    *given, train, val = problem()
    given = stacked(given)
    placed = jax.device_put(given, here.split)
    batches = jax.device_put((train, val), here.everywhere)
    found = {}
    for name, optimizer in KINDS.items():
        both = losses(lambda x: x)
        expected = two_steps(optimizer, *given, train, val, *both)
        with jax.set_mesh(here.mesh):
            got = two_steps(optimizer, *placed, *batches, *both)
            run = ran(optimizer, placed, batches, both)
        found[name] = {
            "error": furthest(got[:3], expected[:3]),
            "of run": furthest(run, ran(optimizer, given, (train, val), both)),
            "compiled": got[3],
            "moved": moved(got[1], got[2]) + moved(got[1], run),
            "parents": got[2].memory.parent.tolist(),
            "best": furthest(optimizer.best(got[2]), optimizer.best(expected[2])),
        }
    return found


def ran(optimizer, given, batches, both):
    settings = {"num_steps": 4, "chunk_size": 2, "progress": False}
    state = optimizer.init(*given)
    return gradhpo.run(optimizer, state, gradhpo.LossFunctions(*both), *batches, **settings)[0]


def without_branches(text):
    """The program's text with the branches of conditionals removed."""
    return re.sub(r"(branch_computations=\{[^}]*\}|(true|false)_computation=%[\w.-]+)", "", text)


def costs():
    """Costs of a step on one of four devices, as a share of one device's; and what is sent."""
    here = Mesh()
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    params, hyperparams = {"matrix": draw(64, 64), "bias": jnp.zeros(64)}, draw(64, 64)
    batch = draw(256, 64), draw(256, 64)
    given, both = stacked((params, hyperparams)), losses(lambda x: x)
    found = {}
    for name, optimizer in KINDS.items():

        def program(given, batch, optimizer=optimizer):
            state = optimizer.init(*given)
            step = lambda optimizer, state: optimizer._advance(
                inputs_of(state, batch, batch, *both), None
            )
            teacher = sum(x.nbytes for x in jax.tree.leaves(state.memory.mutation))
            return Program(step, optimizer, state), teacher

        alone, teacher = program(given, batch)
        each, _ = program(jax.device_put(given, here.split), jax.device_put(batch, here.everywhere))
        found[name] = {
            "flops": each.flops_with_loops_once / alone.flops_with_loops_once,
            "temporary": each.temporary_bytes / alone.temporary_bytes,
            # Every device has the whole teacher.
            "arguments": (each.argument_bytes - teacher) / (alone.argument_bytes - teacher),
            "results": (each.result_bytes - teacher) / (alone.result_bytes - teacher),
            "collectives": [list(x) for x in collectives(each.text)],
            "outside of branches": len(collectives(without_branches(each.text))),
        }
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print("RESULT" + json.dumps({"values": values, "costs": costs}[sys.argv[1]](*sys.argv[2:])))
