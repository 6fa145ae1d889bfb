"""How time and memory grow with inner steps T (`steps`), parameters P and hyperparameters H."""

import math
import statistics
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import gradhpo
from benchmarks.costs.problem import Job, cross_entropy, plain_loss
from benchmarks.costs.programs import SGD, checkpointed_program, scanned_program, step_program
from benchmarks.peers.workers.worker import seconds
from benchmarks.timed import alternating
from gradhpo.diagnostics.cost import Program


BATCH_SIZE, STEPS = 128, 10
ALGORITHMS = {
    "OneStepOptimizer": gradhpo.OneStepOptimizer(SGD),
    f"GreedyOptimizer({STEPS})": gradhpo.GreedyOptimizer(SGD, unroll_steps=STEPS),
    f"UnrolledOptimizer({STEPS})": gradhpo.UnrolledOptimizer(SGD, unroll_steps=STEPS),
}
WIDTHS = (12, 70, 281, 963, 3_125)  # of 64-w-w-10: about 10^3, 10^4, ..., 10^7 parameters


class Decayed(eqx.Module):
    """A network with weight decay: one in total, or one per array, row or parameter."""

    net: eqx.nn.MLP
    log_decays: list[jax.Array]


def parameters(net: eqx.nn.MLP) -> list[jax.Array]:
    return jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))


def decays(net: eqx.nn.MLP, for_each: str) -> list[jax.Array]:
    shape_of = {
        "network": lambda x: (),
        "array": lambda x: (),
        "row": lambda x: (*x.shape[:1], *(1 for _ in x.shape[1:])),
        "parameter": lambda x: x.shape,
    }[for_each]
    of = [jnp.full(shape_of(x), -9.0) for x in parameters(net)]
    return of[:1] if for_each == "network" else of


@gradhpo.model_loss
def train_loss(model: Decayed, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    weights = parameters(model.net)
    each = model.log_decays * (len(weights) if len(model.log_decays) == 1 else 1)
    penalties = (jnp.sum(jnp.exp(h) * w**2) for h, w in zip(each, weights, strict=True))
    return jnp.mean(cross_entropy(model, *batch)) + sum(penalties)


def decayed_program(name: str, width: int, for_each: str) -> tuple[Program, int, int]:
    """A compiled step, and its numbers of parameters and hyperparameters."""
    keys = jax.random.split(jax.random.key(0), 3)
    net = eqx.nn.MLP(64, 10, width, 2, key=keys[0])
    model = Decayed(net, decays(net, for_each))
    params, hyperparams = gradhpo.partition(model, lambda m: m.log_decays)
    x = jax.random.uniform(keys[1], (BATCH_SIZE, 64))
    batch = (x, jax.random.randint(keys[2], (BATCH_SIZE,), 0, 10))
    the_job = Job(params, hyperparams, lambda index: batch, batch, train_loss, plain_loss)
    program = step_program(ALGORITHMS[name], the_job)
    count = lambda leaves: sum(x.size for x in leaves)
    return program, count(parameters(net)), count(model.log_decays)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b in the power law a n^b, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def print_steps() -> None:
    """In T; against `jax.grad` through a scan, segments and steps under `jax.checkpoint`."""
    print(
        "\nExact hypergradient against inner steps T (MLP 64-128-10, batches of 32):\n"
        'checkpoints="sqrt", and jax.grad through a hand-written scan, segments of about root T '
        "and steps under jax.checkpoint"
    )
    lengths = [10, 100, 1_000, 10_000, 100_000]
    by_hand = {10: 2, 100: 10, 1_000: 25, 10_000: 100, 100_000: 250}  # steps of a segment
    taken, held = [], []
    print(f"  {'':13} {'gradhpo: s':>10} {'us a step':>9} {'MiB':>7} {'/ root T':>9}", end="")
    print(f" {'by hand: MiB':>13}   time of gradhpo / by hand")
    for steps in lengths:
        ours = checkpointed_program(steps, "sqrt")
        theirs = scanned_program(steps, by_hand[steps])
        if repeats := min(11, 20_000 // steps):
            found = alternating(ours, theirs, repeats=repeats)
            taken.append(found.first)
            compared = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
        else:
            taken.append(seconds(ours))
            compared = "not timed"
        held.append(ours.temporary_bytes / 2**20)
        print(
            f"  T = {steps:9,} {taken[-1]:10.4f} {1e6 * taken[-1] / steps:9.0f}"
            f" {held[-1]:7.2f} {held[-1] / math.sqrt(steps):9.3f}"
            f" {theirs.temporary_bytes / 2**20:13.2f}"
            f"   {compared}",
            flush=True,
        )
    print(
        f"  from T = 100 on: time as T^{exponent(lengths[1:], taken[1:]):.2f},"
        f" memory as T^{exponent(lengths[1:], held[1:]):.2f}"
    )


def print_scaling_in_parameters() -> None:
    print(
        f"\nA step against parameters P (MLP 64-w-w-10, batches of {BATCH_SIZE}, one weight decay)"
    )
    for name in ALGORITHMS:
        counts, taken, held = [], [], []
        for width in WIDTHS:
            program, num_parameters, _ = decayed_program(name, width, "network")
            program()
            counts.append(num_parameters)
            repeats = 21 if width < 500 else 3
            taken.append(statistics.median(seconds(program) for _ in range(repeats)))
            held.append(program.temporary_bytes / 2**20)
        row = lambda of, form: "".join(form.format(x) for x in of)
        print(f"  {name:22}  P    {row(counts, '{:12,}')}")
        print(
            f"  {'':22}  ms   {row([1e3 * x for x in taken], '{:12.2f}')}"
            f"   as P^{exponent(counts[2:], taken[2:]):.2f} from 10^5 on"
        )
        print(
            f"  {'':22}  MiB  {row(held, '{:12.2f}')}   as P^{exponent(counts[2:], held[2:]):.2f}",
            flush=True,
        )


def print_scaling_in_hyperparameters() -> None:
    print("\nA step with H weight decays / with one; temporary memory")
    for name in ALGORITHMS:
        for width in WIDTHS[1:]:
            one, num_parameters, _ = decayed_program(name, width, "network")
            counts, times = [1], [1.0]
            for for_each in ("array", "row", "parameter") if width > 1_000 else ("parameter",):
                many, _, count = decayed_program(name, width, for_each)
                found = alternating(many, one, repeats=7 if width > 500 else 41)
                counts.append(count)
                times.append(found.ratio)
                print(
                    f"  {name:22} P = {num_parameters:10,}  H = {count:10,}"
                    f"  time {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
                    f"  memory {many.temporary_bytes / one.temporary_bytes:.2f}",
                    flush=True,
                )
        print(f"  {'':22} time as H^{exponent(counts, times):.3f} at the largest P")


def print_scaling() -> None:
    print_scaling_in_parameters()
    print_scaling_in_hyperparameters()
