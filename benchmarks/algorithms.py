"""Every algorithm beside its hand-written counterpart, on one job."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax

import gradhpo
from benchmarks import handwritten as plain, handwritten_unrolled as unrolled
from benchmarks.problem import EXAMPLES, MOMENTUM, OUTER_RATE, RATE, Job, job
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.tracing import forget_traces


SGD = optax.sgd(RATE, momentum=MOMENTUM)
STEPS = 20


class Pair(NamedTuple):
    optimizer: gradhpo.BilevelOptimizer
    write: Callable[[Job], Callable]
    init: Callable[[Job], Any] = plain.init
    num_weights: int = EXAMPLES


NEUMANN = gradhpo.Neumann(unrolled.TERMS, RATE)
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
}  # fmt: skip


class Inputs(NamedTuple):
    """What a step of the library and a step by hand start from."""

    job: Job
    state: gradhpo.BilevelState
    ours: Any  # a batch or a stack of them
    by_hand: Any
    carry: Any


def inputs(name: str, batch_size: int, **job_settings: Any) -> Inputs:
    pair = ALGORITHMS[name]
    the_job = job(batch_size, num_weights=pair.num_weights, **job_settings)
    steps = pair.optimizer.num_inner_steps
    stack = gradhpo.BatchStack.of([the_job.train_data(i) for i in range(steps)])
    single = jax.tree.map(lambda x: x[0], stack.batches)
    state = pair.optimizer.init(the_job.params, the_job.hyperparams)
    many = steps > 1
    ours, by_hand = (stack, stack.batches) if many else (single, single)
    return Inputs(the_job, state, ours, by_hand, pair.init(the_job))


@functools.cache
def step_programs(name: str, batch_size: int, depth: int = 1) -> tuple[Program, Program]:
    """Compiled step of the library and of the hand-written program, on the same batches."""
    forget_traces()  # one program for each shape is what is wanted here
    given = inputs(name, batch_size, depth=depth)
    the_job, val_batch = given.job, given.job.val_batch
    step = lambda state, batch, val_batch: ALGORITHMS[name].optimizer.step(
        state, batch, val_batch, the_job.train_loss, the_job.val_loss, lr_hyper=OUTER_RATE
    )
    ours = Program(step, given.state, given.ours, val_batch)
    return ours, Program(ALGORITHMS[name].write(the_job), given.carry, given.by_hand, val_batch)


@functools.cache
def gradient_programs(batch_size: int, *, depth: int = 1) -> tuple[Program, Program]:
    """One training and one validation gradient, by parameters and hyperparameters."""
    the_job = job(batch_size, depth=depth)
    train, val = plain.losses(the_job)
    w, h = eqx.filter(the_job.params, eqx.is_inexact_array), the_job.hyperparams
    both = lambda loss: jax.value_and_grad(loss, argnums=(0, 1))
    return Program(both(train), w, h, the_job.train_data(0)), Program(
        both(val), w, h, the_job.val_batch
    )


def gradients_per_step(name: str, batch_size: int, depth: int) -> float:
    """Flops of an inner step without its validation gradient, in training gradients."""
    train, val = gradient_programs(batch_size, depth=depth)
    # Greedy's program has its last step apart from the loop over the others.
    bodies = 2 if name.startswith("Greedy") else 1
    flops = step_programs(name, batch_size, depth)[0].flops_with_loops_once / bodies
    return (flops - val.flops_with_loops_once) / train.flops_with_loops_once


def hypergradient_inputs(optimizer: gradhpo.BilevelOptimizer, the_job: Job) -> tuple:
    """State and batches; one batch is reused for every inner step."""
    state = optimizer.init(the_job.params, the_job.hyperparams)
    return state, the_job.train_data(0), the_job.val_batch


def hypergradient_program(
    optimizer: gradhpo.BilevelOptimizer, the_job: Job, given: tuple | None = None
) -> Program:
    """The library's hypergradient, for inputs that are made here unless they are given."""
    return Program(
        lambda state, batch, val_batch: optimizer.compute_hypergradient(
            state, batch, val_batch, the_job.train_loss, the_job.val_loss
        ),
        *(given or hypergradient_inputs(optimizer, the_job)),
    )


def exact_programs(
    optimizer_name: str,
    batch_size: int,
    *,
    activation: str = "tanh",
    depth: int = 1,
    checkpoint: bool = False,
) -> tuple[Program, Program]:
    """Exact unrolling by the library, and by `jax.grad` through a plain or checkpointed scan."""
    inner = {"SGD": SGD, "Adam": optax.adam(0.01, eps_root=1e-16)}[optimizer_name]
    the_job = job(batch_size, activation=activation, depth=depth)
    ours = hypergradient_program(gradhpo.UnrolledOptimizer(inner, unroll_steps=STEPS), the_job)
    return ours, Program(
        unrolled.plain_unrolled_hypergradient(the_job, inner, STEPS, checkpoint=checkpoint),
        eqx.filter(the_job.params, eqx.is_inexact_array),
        the_job.hyperparams,
        the_job.train_data(0),
        the_job.val_batch,
    )


def checkpointed_program(steps: int, checkpoints) -> Program:
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=steps, checkpoints=checkpoints)
    return hypergradient_program(optimizer, job(32))
