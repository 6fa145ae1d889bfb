"""Linear solvers on four devices, compared with one: printed as JSON.

    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    python solvers_on_devices.py steps Explicit state GMRES LU ...
    python solvers_on_devices.py twice Explicit data GMRES LU ...
    python solvers_on_devices.py running Explicit
    python solvers_on_devices.py shares Explicit

The arguments are the same as for on_devices.py.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from on_devices import (
    INNER,
    OUTER,
    Mesh,
    answer,
    compared,
    count,
    for_two,
    furthest,
    losses,
    moved,
    problem,
)

import gradhpo
from gradhpo.diagnostics.cost import Program


DAMPED = {"outer_optimizer": OUTER, "damping": 0.1}
SETTINGS = {"rtol": 1e-8, "atol": 1e-8}


def by_loss(solver):
    """Symmetric, from the training loss."""
    return lambda whole: gradhpo.ImplicitOptimizer(INNER, linear_solver=solver, **DAMPED)


def by_gradient(solver):
    """From a `grad_fn`, whose Jacobian may not be symmetric."""

    def make(whole):
        gradient = jax.grad(losses(whole)[0])
        return gradhpo.ImplicitOptimizer(INNER, grad_fn=gradient, linear_solver=solver, **DAMPED)

    return make


def by_update(solver):
    """At the fixed point of an `update_fn` whose Jacobian is not symmetric."""

    def make(whole):
        gradient = jax.grad(losses(whole)[0])

        def descent(params, penalties, batch):
            found = gradient(params, penalties, batch)
            step = lambda w, g: w - (0.1 + 0.05 * jnp.tanh(w)) * g
            return jax.tree.map(step, params, found)

        return gradhpo.ImplicitOptimizer(update_fn=descent, linear_solver=solver, **DAMPED)

    return make


def of_tasks(make):
    return lambda whole: gradhpo.TaskBatched(make(whole), num_tasks=2)


nystrom = gradhpo.Nystrom(rank=5, damping=0.1, key=jax.random.key(0))
SOLVERS = {
    "GMRES": by_update(None),
    "GMRES, grad_fn": by_gradient(None),
    "lineax.GMRES": by_update(lx.GMRES(**SETTINGS)),
    "LU": by_update(lx.LU()),
    "LU, loss": by_loss(lx.LU()),
    "Cholesky": by_loss(lx.Cholesky()),
    "SVD": by_loss(lx.SVD()),
    "BiCGStab": by_gradient(lx.BiCGStab(**SETTINGS)),
    "Neumann": by_update(gradhpo.Neumann(5, 0.1)),
    "Nystrom": by_loss(nystrom),
    "GMRES, tasks": of_tasks(by_update(None)),
}
# JAX factorises a stack of matrices in the threads that its CPU devices also wait in.
STACKED = {"LU, tasks": of_tasks(by_loss(lx.LU()))}


def steps(axes, spread, *names):
    here = Mesh(axes, spread)
    jax.monitoring.register_event_duration_secs_listener(count)
    params, hyperparams, *batches = problem()
    found = {}
    for name in names:
        tasks = "tasks" in name
        data = jax.tree.map(for_two, batches) if tasks else batches
        of_batch = NamedSharding(here.mesh, PartitionSpec(*[None] * tasks, "devices"))
        make = (SOLVERS | STACKED)[name]
        found[name] = compared(make, losses, params, hyperparams, data, here, of_batch)
    return found


def twice(axes, spread, *names):
    """The derivative of a hypergradient along a direction, forwards; and backwards."""
    here = Mesh(axes, spread)
    params, hyperparams, *batches = problem()
    found = {}
    for name in names:

        def both(make, whole, given, data):
            optimizer = make(whole)
            state = optimizer.init(*given)

            def hypergradient(h):
                of = (*data, *losses(whole))
                return optimizer.compute_hypergradient(state.update(hyperparams=h), *of)

            h = given[1]
            forwards = jax.jvp(hypergradient, (h,), (jnp.cos(h),))[1]
            return forwards, jax.vjp(hypergradient, h)[1](jnp.cos(h))[0]

        expected = both(SOLVERS[name], lambda x: x, (params, hyperparams), batches)
        given = jax.device_put((params, hyperparams), here.of_state)
        with jax.set_mesh(here.mesh):
            got = both(SOLVERS[name], here.whole, given, jax.device_put(batches, here.split))
        largest = float(max(jnp.abs(x).max() for x in expected))
        found[name] = {
            "error": furthest(got, expected) / largest,
            "moved": moved((given[1], given[1]), got),
        }
    return found


def running(axes):
    """An average of the parameters, which validation reads once it has settled."""
    here = Mesh(axes)

    def with_state(whole):
        error, val_loss = losses(whole)

        def train_loss(params, penalties, batch, average):
            towards = lambda r, w: 0.5 * r + 0.1 * jnp.tanh(r) + 0.5 * w
            return error(params, penalties, batch), jax.tree.map(towards, average, params)

        def val_of(params, penalties, batch, average):
            return val_loss(average, penalties, batch)

        return gradhpo.LossFunctions(train_loss, val_of)

    params, hyperparams, *batches = problem()
    optimizer = gradhpo.ImplicitOptimizer(INNER, OUTER, inner_steps=2, damping=0.1)

    def step(given, data, whole):
        state = optimizer.init(*given, model_state=given[0])
        return state, optimizer.step(state, *data, with_state(whole))

    _, expected = step((params, hyperparams), batches, lambda x: x)
    given = jax.device_put((params, hyperparams), here.split)
    with jax.set_mesh(here.mesh):
        first, got = step(given, jax.device_put(batches, here.split), here.whole)
    return {"error": furthest(got, expected), "moved": moved(first, got)}


def shares(axes):
    """Memory and work of a step on one of four devices, as shares of a single device's."""
    here, random, found = Mesh(axes), np.random.default_rng(0), {}
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    # Few examples, so that parameters and the solver's vectors dominate.
    given = {"matrix": draw(256, 256), "bias": jnp.zeros(256)}, draw(256, 256)
    batch = draw(64, 256), draw(64, 256)

    def of_step(make, whole, given, batch):
        optimizer = make(whole)
        step = lambda state, x: optimizer.step(state, x, x, *losses(whole))
        made = Program(step, optimizer.init(*given), batch)
        return {
            "arguments": made.argument_bytes,
            "temporaries": made.temporary_bytes,
            "flops": made.flops_with_loops_once,
        }

    for name in ("GMRES", "BiCGStab"):
        alone = of_step(SOLVERS[name], lambda x: x, given, batch)
        with jax.set_mesh(here.mesh):
            placed = jax.device_put((given, batch), here.split)
            each = of_step(SOLVERS[name], here.whole, *placed)
        found[name] = {part: each[part] / alone[part] for part in alone}
    return found


if __name__ == "__main__":
    answer(globals())
