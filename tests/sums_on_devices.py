"""Means over batches, pieces of a batch and updates, on four devices: printed as JSON.

    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    python sums_on_devices.py sums Explicit state pieces ...
    python sums_on_devices.py shares
    python sums_on_devices.py refused

The arguments are the same as for on_devices.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from on_devices import INNER, OUTER, Mesh, answer, compared, count, losses, problem

import gradhpo
from gradhpo.diagnostics.cost import Program


def descent(whole):
    """An `update_fn`."""
    gradient = jax.grad(losses(whole)[0])
    step = lambda w, g: w - 0.1 * g
    return lambda params, *given: jax.tree.map(step, params, gradient(params, *given))


def by_words(whole, num=2):
    """Losses over a vocabulary of 16, with the parameters as its matrix."""

    def error(params, batch):
        x, y = batch
        head, labels = whole(params["matrix"]).T, jnp.argmax(y, axis=-1)
        return jnp.mean(gradhpo.chunked_cross_entropy(x, head, labels, num, label_smoothing=0.1))

    def train_loss(params, penalties, batch):
        return error(params, batch) + jnp.mean(jnp.exp(penalties) * params["matrix"] ** 2)

    return train_loss, lambda params, penalties, batch: error(params, batch)


def in_pieces(whole, num=2):
    return tuple(gradhpo.microbatched(loss, num) for loss in losses(whole))


def sequences(batch):
    """Sixteen sequences of four."""
    return jax.tree.map(lambda x: x.reshape(16, 4, -1), batch)


def stacked(batch):
    """Two batches for two inner steps."""
    return gradhpo.BatchStack(jax.tree.map(lambda x: x.reshape(2, 32, -1), batch))


def in_two(**given):
    """Implicit differentiation with means over two batches."""
    settings = {"outer_optimizer": OUTER, "inner_steps": 2, "curvature_batches": 2} | given
    return gradhpo.ImplicitOptimizer(**settings)


def by_gradient(whole):
    gradient = jax.grad(losses(whole)[0])
    return in_two(inner_optimizer=INNER, grad_fn=gradient, damping=0.1)


def by_update(whole):
    return in_two(update_fn=descent(whole), linear_solver=gradhpo.Neumann(5, 0.1))


def low_rank(whole):
    solver = gradhpo.Nystrom(rank=5, damping=0.1, key=jax.random.key(0))
    return in_two(inner_optimizer=INNER, linear_solver=solver)


same = lambda batch: batch
one_step = lambda whole: gradhpo.OneStepOptimizer(INNER, OUTER)
smoothed = optax.chain(gradhpo.moving_average(2), OUTER)
# The optimizer and the losses, given a function that gathers parameters; and the two batches.
SUMS = {
    "curvature": (lambda whole: in_two(inner_optimizer=INNER), losses, stacked, same),
    "curvature, grad_fn": (by_gradient, losses, stacked, same),
    "curvature, update_fn": (by_update, losses, stacked, same),
    "curvature, low rank": (low_rank, losses, stacked, same),
    "curvature, pieces": (lambda whole: in_two(inner_optimizer=INNER), in_pieces, stacked, same),
    "pieces": (one_step, in_pieces, same, same),
    "words": (one_step, by_words, sequences, sequences),
    "smoothed": (lambda whole: gradhpo.OneStepOptimizer(INNER, smoothed), losses, same, same),
}


def sums(axes, spread, *names):
    here = Mesh(axes, spread)
    jax.monitoring.register_event_duration_secs_listener(count)
    params, hyperparams, *batches = problem()
    found = {}
    for name in names:
        make, both, *forms = SUMS[name]
        data = [form(batch) for form, batch in zip(forms, batches, strict=True)]
        later = NamedSharding(here.mesh, PartitionSpec(None, "devices"))
        where = [later if isinstance(x, gradhpo.BatchStack) else here.split for x in data]
        found[name] = compared(make, both, params, hyperparams, data, here, where)
    return found


def shares():
    """Flops of a step on one of four devices, as a share of a single device's."""
    here, random, found = Mesh(), np.random.default_rng(0), {}
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    params, hyperparams = {"matrix": draw(64, 64), "bias": jnp.zeros(64)}, draw(64, 64)
    batch = draw(16, 32, 64), draw(16, 32, 64)
    for name in ("pieces", "words"):
        make, both, *_ = SUMS[name]

        def of_step(of_state, of_batch, make=make, both=both):
            given = jax.device_put((params, hyperparams), of_state)
            optimizer, data = make(same), jax.device_put(batch, of_batch)
            step = lambda state, x: optimizer.step(state, x, x, *both(same))
            return Program(step, optimizer.init(*given), data).flops_with_loops_once

        for spread in ("data", "state"):
            own = here.split if spread == "state" else here.everywhere
            found[f"{name}, {spread}"] = of_step(own, here.split) / of_step(None, None)
    return found


def refused():
    """The error for pieces of two examples on four devices, with explicit axes."""
    here, said = Mesh("Explicit"), {}
    params, hyperparams, batch, _ = problem()
    params, hyperparams, batch = jax.device_put((params, hyperparams, batch), here.split)
    loss_of = lambda both: both(here.whole, num=32)[0](params, hyperparams, batch)
    calls = {"pieces": lambda: loss_of(in_pieces), "words": lambda: loss_of(by_words)}
    with jax.set_mesh(here.mesh):
        for name, call in calls.items():
            try:
                call()
            except ValueError as error:
                said[name] = str(error)
    return said


if __name__ == "__main__":
    answer(globals())
