"""What the other two roads cost: forward mode by hyperparameter, implicit by iteration."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

import gradhpo
from benchmarks.algorithms import gradient_programs
from benchmarks.problem import MOMENTUM, OUTER_RATE, RATE, job
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.tracing import forget_traces


def forward_program(count: int, steps: int, *, batch_size: int = 128, depth: int = 1) -> Program:
    """Forward mode over `steps` steps with `count` learning rates, taken in turn."""
    forget_traces()  # one program for each shape is what is wanted here
    the_job = job(batch_size, depth=depth)
    # The example weights are no hyperparameters here; they stay as they are.
    weights = jax.lax.stop_gradient(the_job.hyperparams)
    loss = lambda w, rates, batch: the_job.train_loss(w, weights, batch)
    val_loss = lambda w, rates, batch: the_job.val_loss(w, weights, batch)
    inner = lambda rates: optax.sgd(lambda t: rates[t % count], momentum=MOMENTUM)
    optimizer = gradhpo.ForwardModeOptimizer(inner, unroll_steps=steps)
    return Program(
        lambda state, batch, val_batch: optimizer.compute_hypergradient(
            state, batch, val_batch, loss, val_loss
        ),
        optimizer.init(the_job.params, jnp.full(count, RATE)),
        the_job.train_data(0),
        the_job.val_batch,
    )


def gradients_per_hyperparameter(depth: int = 1) -> float:
    """Flops that one more hyperparameter adds to an inner step, in training gradients."""
    few, many = (forward_program(count, 10, depth=depth).flops_with_loops_once for count in (2, 10))
    train, _ = gradient_programs(128, depth=depth)
    return (many - few) / 8 / train.flops_with_loops_once


def implicit_flops(terms: int, depth: int) -> float:
    the_job = job(128, depth=depth)
    optimizer = gradhpo.ImplicitOptimizer(
        optax.sgd(RATE), linear_solver=gradhpo.Neumann(terms, RATE)
    )
    # A whole step: its metrics need a product with H at the end, with a loop before it or not.
    return Program(
        lambda state, batch, val_batch: optimizer.step(
            state, batch, val_batch, the_job.train_loss, the_job.val_loss, lr_hyper=OUTER_RATE
        ),
        optimizer.init(the_job.params, the_job.hyperparams),
        the_job.train_data(0),
        the_job.val_batch,
    ).flops_with_loops_once


def gradients_per_iteration(depth: int = 1) -> float:
    """Flops of one more term of a Neumann series, in training gradients."""
    train, _ = gradient_programs(128, depth=depth)
    # The body of a loop is counted once, however often it runs.
    return (implicit_flops(3, depth) - implicit_flops(1, depth)) / train.flops_with_loops_once


def iterations(outer_rate: float, *, warm: bool, tolerance: float = 1e-3) -> float:
    """Of CG per outer step, over 30 of them: one penalty for each of 60 features, 30 examples."""
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
