"""Costs of single methods: against one step, over a horizon, per hyperparameter, per product."""

import functools
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

import gradhpo
from benchmarks.costs.loops import running
from benchmarks.costs.problem import MOMENTUM, OUTER_RATE, RATE, job
from benchmarks.costs.programs import (
    ALGORITHMS,
    INNER,
    SGD,
    call_program,
    gradient_programs,
    hypergradient_program,
    step_program,
    step_programs,
)
from benchmarks.timed import alternating
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.tracing import forget_traces


# --- `one_step`: against one step, as in table 3 of the HyperDistill paper -----------------------

BESIDE_ONE_STEP = {
    "first order": "FOOptimizer",
    "HyperDistill": "HyperDistill",
    "Neumann(20), at the end": "ImplicitOptimizer(20)",
    "DrMAD(20)": "DrMADOptimizer(20)",
}


def cost_ratios(name: str, batch_size: int, depth: int) -> tuple[float, float, float]:
    """Flops of an inner step, temporary and total memory of a step, relative to one step."""
    own, one_step = (
        step_programs(which, batch_size, depth)[0].cost for which in (name, "OneStepOptimizer")
    )
    flops = own.flops / ALGORITHMS[name].optimizer.num_inner_steps
    return (
        flops / one_step.flops,
        own.temporary_bytes / one_step.temporary_bytes,
        own.total_bytes / one_step.total_bytes,
    )


def print_beside_one_step(quick: bool = False) -> None:
    """The compiler's counts, and alternating timings of `run`."""
    labels = ["HyperDistill"] if quick else list(BESIDE_ONE_STEP)
    inner_steps, repeats = (200, 3) if quick else (600, 15)
    print(
        "\nIn units of OneStepOptimizer (published of HyperDistill: time 1.0 to 1.3, memory 1.0 to"
        "\n1.07): flops and time of an inner step; memory of a step: temporary, and with its"
        "\narguments and results. SGD with momentum, batches of 128; no fit of theta"
    )
    print(f"  {'':24} {'1 hidden layer':>20} {'3 hidden layers':>22} {'time, 1 hidden layer':>26}")
    the_job = job(128)
    for label in labels:
        name = BESIDE_ONE_STEP[label]
        shallow, deep = (
            "{:6.2f} {:6.2f} {:6.2f}".format(*cost_ratios(name, 128, depth)) for depth in (1, 3)
        )
        per_step = ALGORITHMS[name].optimizer.num_inner_steps
        found = alternating(
            running(name, the_job, inner_steps // per_step),
            running("OneStepOptimizer", the_job, inner_steps),
            repeats=repeats,
        )
        time_of = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
        print(f"  {label:24} {shallow:>20} {deep:>22} {time_of:>26}", flush=True)


# --- `distilled`: HyperDistill, and methods that use a whole episode ---------------------------


@functools.cache
def step_flops(cls: type, optimizer_name: str, batch_size: int, depth: int) -> float:
    return step_program(
        cls(INNER[optimizer_name]), job(batch_size, depth=depth)
    ).flops_with_loops_once


def flops_ratio(optimizer_name: str, batch_size: int, depth: int = 1) -> float:
    """A HyperDistill step, in units of a step of `OneStepOptimizer`."""
    ours, one_step = (
        step_flops(cls, optimizer_name, batch_size, depth)
        for cls in (gradhpo.OnlineHypergradientOptimizer, gradhpo.OneStepOptimizer)
    )
    return ours / one_step


def horizon_program(what: str, steps: int) -> Program:
    """Greedy, DrMAD or an estimate of theta over `steps` inner steps with a batch of 32 each."""
    the_job = job(32)
    stack = gradhpo.BatchStack(jax.vmap(the_job.train_data)(jnp.arange(steps)))
    if what == "theta":
        optimizer = gradhpo.OnlineHypergradientOptimizer(SGD)
        call = optimizer.estimate_theta
    else:
        cls = {"greedy": gradhpo.GreedyOptimizer, "DrMAD": gradhpo.DrMADOptimizer}[what]
        optimizer = cls(SGD, unroll_steps=steps)
        call = optimizer.compute_hypergradient
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return call_program(call, the_job, state, stack)


def episodes(batch_size: int, period: int | None, count: int, steps: int) -> Callable[[], None]:
    """A function that runs `count` episodes and fits theta once in `period` of them."""
    the_job = job(batch_size)
    optimizer = gradhpo.OnlineHypergradientOptimizer(SGD, estimation_period=period)
    state = optimizer.init(the_job.params, the_job.hyperparams)
    losses = gradhpo.LossFunctions(the_job.train_loss, the_job.val_loss)

    def run() -> None:
        new, _ = gradhpo.run(
            optimizer, state, losses, the_job.train_data, the_job.val_batch,
            num_steps=count * steps, steps_per_episode=steps, chunk_size=count * steps,
            lr_hyper=OUTER_RATE, progress=False,
        )  # fmt: skip
        jax.block_until_ready(eqx.filter(new, eqx.is_array))

    return run


def print_distilled() -> None:
    print("\nFlops of a step of HyperDistill / of OneStepOptimizer")
    for name in INNER:
        ratios = [f"{flops_ratio(name, size):.2f}" for size in (32, 128, 1_000)]
        deep = flops_ratio(name, 128, depth=3)
        print(
            f"  {name:5} batches of 32, 128, 1,000: {' '.join(ratios)}   3 layers, 128: {deep:.2f}"
        )
    print("\nTemporary memory in KiB, and seconds to compile, over T = 10, 200, 1,000 steps of 32")
    for what in ("greedy", "DrMAD", "theta"):
        kibibytes, seconds = [], []
        for steps in (10, 200, 1_000):
            start = time.perf_counter()
            kibibytes.append(horizon_program(what, steps).temporary_bytes / 2**10)
            seconds.append(time.perf_counter() - start)
        print(
            f"  {what:7} " + " ".join(f"{x:8.1f}" for x in kibibytes)
            + "  KiB  " + " ".join(f"{x:5.2f}" for x in seconds) + "  s"
        )  # fmt: skip
    print("\nTime of a run with theta fitted every 50 episodes / never (episodes of 20 steps)")
    for batch_size in (32, 128):
        runs = [episodes(batch_size, period, 50, 20) for period in (50, None)]
        found = alternating(*runs, repeats=21)
        print(
            f"  batch {batch_size:4}  ratio {found.ratio:.3f} ({found.low:.2f} to {found.high:.2f})"
        )


# --- `roads`: per hyperparameter, per direction, and per solver iteration ------------------------


def forward_program(count: int, steps: int, *, batch_size: int = 128, depth: int = 1) -> Program:
    """Forward mode over `steps` steps with `count` learning rates in rotation."""
    the_job = job(batch_size, depth=depth)
    # The example weights are not hyperparameters here; they stay fixed.
    weights = jax.lax.stop_gradient(the_job.hyperparams)
    inner = lambda rates: optax.sgd(lambda t: rates[t % count], momentum=MOMENTUM)
    return hypergradient_program(
        gradhpo.ForwardModeOptimizer(inner, unroll_steps=steps),
        the_job._replace(
            hyperparams=jnp.full(count, RATE),
            train_loss=lambda w, rates, batch: the_job.train_loss(w, weights, batch),
            val_loss=lambda w, rates, batch: the_job.val_loss(w, weights, batch),
        ),
    )


def gradients_per_hyperparameter(depth: int = 1) -> float:
    """Flops that one more hyperparameter adds to an inner step, in training gradients."""
    few, many = (forward_program(count, 10, depth=depth).flops_with_loops_once for count in (2, 10))
    train, _ = gradient_programs(128, depth=depth)
    return (many - few) / 8 / train.flops_with_loops_once


def gradients_per_direction(cls: type, depth: int = 1) -> float:
    """Flops that one more random direction adds to an inner step, in training gradients."""

    def flops(count: int) -> float:
        optimizer = cls(SGD, unroll_steps=10, num_directions=count)
        return hypergradient_program(optimizer, job(128, depth=depth)).flops_with_loops_once

    train, _ = gradient_programs(128, depth=depth)
    # The compiler counts the loop over inner steps once, and the losses at the end.
    return (flops(10) - flops(2)) / 8 / train.flops_with_loops_once


def implicit_flops(terms: int, depth: int) -> float:
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(RATE), linear_solver=gradhpo.Neumann(terms, RATE)
    )
    # A whole step: its metrics need a product with H at the end, with or without a loop.
    return step_program(optimizer, job(128, depth=depth)).flops_with_loops_once


def gradients_per_iteration(depth: int = 1) -> float:
    """Flops of one more term of a Neumann series, in training gradients."""
    train, _ = gradient_programs(128, depth=depth)
    # A loop body is counted once, for any number of iterations.
    return (implicit_flops(3, depth) - implicit_flops(1, depth)) / train.flops_with_loops_once


def iterations(outer_rate: float, *, warm: bool, tolerance: float = 1e-3) -> float:
    """CG iterations per outer step, over 30: one penalty for each of 60 features, 30 examples."""
    forget_traces()
    random = np.random.default_rng(5)
    x, v = jnp.asarray(random.normal(size=(2, 30, 60)))
    truth = jnp.asarray(random.normal(size=60))
    y, u = x @ truth, v @ truth + jnp.asarray(random.normal(size=30))
    half_mse = lambda w, x, y: jnp.mean((x @ w - y) ** 2) / 2
    train_loss = lambda w, h, batch: half_mse(w, x, y) + jnp.sum(jnp.exp(h) * w**2) / 2
    val_loss = lambda w, h, batch: half_mse(w, v, u)
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(0.1),
        optax.sgd(outer_rate),
        lx.CG(rtol=tolerance, atol=tolerance),
        inner_steps=200,
    )
    state = optimizer.init(jnp.zeros(60), jnp.full(60, -2.0))
    total, steps = 0.0, 30
    for _ in range(steps):
        state = optimizer.step(state, None, None, train_loss, val_loss)
        total += float(state.get_metric("linear_iterations"))
        if not warm:
            nothing = jnp.zeros_like(state.memory.adjoint)
            forgetful = eqx.tree_at(lambda m: m.adjoint, state.memory, nothing)
            state = state.update(memory=forgetful)
    return total / steps


def print_roads() -> None:
    print("\nForward mode: what one hyperparameter adds to an inner step, in training gradients")
    for depth in (1, 3, 6):
        print(f"  {depth} hidden layer(s), batch 128: {gradients_per_hyperparameter(depth):.2f}")
    print("\nForward gradients, evolution (windows of one step): what one more direction adds")
    for depth in (1, 3, 6):
        kinds = gradhpo.ForwardGradientOptimizer, gradhpo.EvolutionOptimizer
        added = " / ".join(f"{gradients_per_direction(cls, depth):.2f}" for cls in kinds)
        print(f"  {depth} hidden layer(s), batch 128: {added}")
    print("\nForward mode: temporary memory and seconds to compile (4 learning rates, batch 32)")
    for steps in (10, 100, 10_000):
        start = time.perf_counter()
        kibibytes = forward_program(4, steps, batch_size=32).temporary_bytes / 2**10
        print(f"  T = {steps:6}: {kibibytes:8.1f} KiB {time.perf_counter() - start:6.2f} s")
    print("\nImplicit: what one solver iteration costs, in training gradients")
    for depth in (1, 3, 6):
        print(f"  {depth} hidden layer(s), batch 128: {gradients_per_iteration(depth):.2f}")
    print("\nImplicit: iterations of CG per outer step, from the last adjoint / from zero")
    for outer_rate in (1.0, 0.1, 0.01):
        warm, cold = (iterations(outer_rate, warm=warm) for warm in (True, False))
        print(f"  outer rate {outer_rate:5}: {warm:5.1f} / {cold:5.1f}")
