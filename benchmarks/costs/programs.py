"""Compiled programs on one job: each algorithm with its hand-written counterpart, and alone."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax

import gradhpo
from benchmarks.costs import (
    handwritten as plain,
    handwritten_single_loop as single,
    handwritten_unrolled as unrolled,
)
from benchmarks.costs.problem import EXAMPLES, MOMENTUM, OUTER_RATE, RATE, Job, job
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.tracing import forget_traces


STEPS = 20
SGD = optax.sgd(RATE, momentum=MOMENTUM)
INNER = {"SGD": SGD, "Adam": optax.adam(0.01, eps_root=1e-16)}
NEUMANN = gradhpo.Neumann(unrolled.TERMS, RATE)


class Pair(NamedTuple):
    optimizer: gradhpo.BilevelOptimizer
    by_hand: Callable
    init: Callable[[Job], Any] = plain.init
    num_weights: int = EXAMPLES

    def write(self, the_job: Job) -> Callable:
        """The hand-written step of (state, batches, validation batch)."""
        return functools.partial(self.by_hand, *plain.losses(the_job))


ALGORITHMS = {
    "FOOptimizer": Pair(gradhpo.FOOptimizer(SGD), plain.first_order),
    "OneStepOptimizer": Pair(gradhpo.OneStepOptimizer(SGD), plain.one_step),
    "T1T2Optimizer": Pair(gradhpo.T1T2Optimizer(SGD), plain.t1_t2),
    "GreedyOptimizer(20)": Pair(gradhpo.GreedyOptimizer(SGD, unroll_steps=STEPS), unrolled.greedy),
    "HyperDistill": Pair(
        gradhpo.OnlineHypergradientOptimizer(SGD), plain.hyper_distill, plain.init_distilled
    ),
    "UnrolledOptimizer(20)": Pair(
        gradhpo.UnrolledOptimizer(SGD, unroll_steps=STEPS), unrolled.unrolled
    ),
    "  with checkpoints": Pair(
        gradhpo.UnrolledOptimizer(SGD, unroll_steps=STEPS, checkpoints="sqrt"),
        unrolled.checkpointed,
    ),
    "DrMADOptimizer(20)": Pair(gradhpo.DrMADOptimizer(SGD, unroll_steps=STEPS), unrolled.dr_mad),
    # Memory and work are proportional to the number of hyperparameters here.
    "ForwardMode(20)": Pair(
        gradhpo.ForwardModeOptimizer(SGD, unroll_steps=STEPS),
        unrolled.forward_mode, unrolled.init_forward, num_weights=8,
    ),
    "ImplicitOptimizer(20)": Pair(
        gradhpo.ImplicitOptimizer(SGD, linear_solver=NEUMANN, inner_steps=STEPS),
        unrolled.implicit, unrolled.init_implicit,
    ),
    "SOBAOptimizer": Pair(
        gradhpo.SOBAOptimizer(SGD, adjoint_optimizer=optax.sgd(RATE)), single.soba, single.init_soba
    ),
    "PenaltyOptimizer(20)": Pair(
        gradhpo.PenaltyOptimizer(SGD, inner_steps=STEPS), single.f2sa, single.init_f2sa
    ),
    "BOMEOptimizer(20)": Pair(
        gradhpo.BOMEOptimizer(SGD, inner_steps=STEPS), single.bome, single.init_bome
    ),
}  # fmt: skip


def call_program(
    call: Callable, the_job: Job, state: Any, batches: Any, **settings: Any
) -> Program:
    """`call`, a method of an optimizer that takes batches and losses, compiled for the job."""
    forget_traces()  # here, compiling for each shape is intended
    return Program(
        lambda state, batches, val_batch: call(
            state, batches, val_batch, the_job.train_loss, the_job.val_loss, **settings
        ),
        state,
        batches,
        the_job.val_batch,
    )


def step_program(optimizer: gradhpo.BilevelOptimizer, the_job: Job) -> Program:
    """One outer step; all its inner steps use the same batch."""
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return call_program(optimizer.step, the_job, state, the_job.train_data(0), lr_hyper=OUTER_RATE)


def hypergradient_program(optimizer: gradhpo.BilevelOptimizer, the_job: Job) -> Program:
    """The hypergradient alone; all inner steps use the same batch."""
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return call_program(optimizer.compute_hypergradient, the_job, state, the_job.train_data(0))


class Inputs(NamedTuple):
    """The inputs of a library step and a hand-written step."""

    job: Job
    state: gradhpo.BilevelState
    ours: Any  # a batch or a stack of them
    by_hand: Any
    carry: Any


def inputs(name: str, batch_size: int, depth: int = 1) -> Inputs:
    pair = ALGORITHMS[name]
    the_job = job(batch_size, num_weights=pair.num_weights, depth=depth)
    steps = pair.optimizer.num_inner_steps
    stack = gradhpo.BatchStack.of([the_job.train_data(i) for i in range(steps)])
    single = jax.tree.map(lambda x: x[0], stack.batches)
    state = pair.optimizer.init(the_job.params, the_job.hyperparams)
    ours, by_hand = (stack, stack.batches) if steps > 1 else (single, single)
    return Inputs(the_job, state, ours, by_hand, pair.init(the_job))


@functools.cache
def step_programs(name: str, batch_size: int, depth: int = 1) -> tuple[Program, Program]:
    """A compiled step of the library and of the hand-written program, on the same batches."""
    pair = ALGORITHMS[name]
    the_job, state, ours, by_hand, carry = inputs(name, batch_size, depth)
    step = call_program(pair.optimizer.step, the_job, state, ours, lr_hyper=OUTER_RATE)
    return step, Program(pair.write(the_job), carry, by_hand, the_job.val_batch)


@functools.cache
def gradient_programs(batch_size: int, *, depth: int = 1) -> tuple[Program, Program]:
    """One training and one validation gradient, by parameters and hyperparameters."""
    the_job = job(batch_size, depth=depth)
    train, val = plain.losses(the_job)
    w, h = eqx.filter(the_job.params, eqx.is_inexact_array), the_job.hyperparams
    both = lambda loss: jax.value_and_grad(loss, argnums=(0, 1))
    return (
        Program(both(train), w, h, the_job.train_data(0)),
        Program(both(val), w, h, the_job.val_batch),
    )


def gradients_per_step(name: str, batch_size: int, depth: int) -> float:
    """Flops of an inner step without its validation gradient, in training gradients."""
    train, val = gradient_programs(batch_size, depth=depth)
    # In greedy's program the last step is outside the loop over the others.
    bodies = 2 if name.startswith("Greedy") else 1
    flops = step_programs(name, batch_size, depth)[0].flops_with_loops_once / bodies
    return (flops - val.flops_with_loops_once) / train.flops_with_loops_once


# Validation gradients in the program of a step, if not just one at the end.
VALIDATION_GRADIENTS = {"SOBAOptimizer": 1, "PenaltyOptimizer(20)": 2, "BOMEOptimizer(20)": 1}


def gradients_per_outer_step(name: str, batch_size: int, depth: int) -> float:
    """Flops of an outer step with one inner step, in training gradients, without validation.

    That excludes validation gradients and the validation loss at the end.
    """
    train, val = gradient_programs(batch_size, depth=depth)
    the_job = job(batch_size, depth=depth)
    of_loss = Program(the_job.val_loss, the_job.params, the_job.hyperparams, the_job.val_batch)
    flops = step_programs(name, batch_size, depth)[0].flops_with_loops_once
    flops -= VALIDATION_GRADIENTS[name] * val.flops_with_loops_once
    return (flops - of_loss.flops_with_loops_once) / train.flops_with_loops_once


def exact_programs(
    optimizer_name: str,
    batch_size: int,
    *,
    activation: str = "tanh",
    depth: int = 1,
) -> tuple[Program, Program, Program]:
    """Exact unrolling by the library, and `jax.grad` through a checkpointed and a plain scan."""
    inner = INNER[optimizer_name]
    the_job = job(batch_size, activation=activation, depth=depth)
    ours = hypergradient_program(gradhpo.UnrolledOptimizer(inner, unroll_steps=STEPS), the_job)
    params = eqx.filter(the_job.params, eqx.is_inexact_array)
    given = params, the_job.hyperparams, the_job.train_data(0), the_job.val_batch
    checkpointed, plain = (
        Program(
            unrolled.plain_unrolled_hypergradient(the_job, inner, STEPS, checkpoint=checkpoint),
            *given,
        )
        for checkpoint in (True, False)
    )
    return ours, checkpointed, plain


def checkpointed_program(steps: int, checkpoints: Any) -> Program:
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=steps, checkpoints=checkpoints)
    return hypergradient_program(optimizer, job(32))


def scanned_program(steps: int, segment: int | None = None) -> Program:
    """The same by `jax.grad` through a scan, with a checkpoint on its body and its segments."""
    the_job = job(32)
    params = eqx.filter(the_job.params, eqx.is_inexact_array)
    by_hand = unrolled.plain_unrolled_hypergradient(
        the_job, SGD, steps, checkpoint=True, segment=segment
    )
    return Program(by_hand, params, the_job.hyperparams, the_job.train_data(0), the_job.val_batch)
