"""The promises about cost, read from the compiler (benchmarks/ times them)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick, relative_error

import gradhpo
from benchmarks.costs import networks
from benchmarks.costs.functional import gradients_of_functional
from benchmarks.costs.methods import (
    flops_ratio,
    forward_program,
    gradients_per_direction,
    gradients_per_hyperparameter,
    gradients_per_iteration,
)
from benchmarks.costs.programs import (
    ALGORITHMS,
    checkpointed_program,
    exact_programs,
    gradients_per_outer_step,
    gradients_per_step,
    job,
    scanned_program,
    step_programs,
)
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.programs import bytes_computed
from gradhpo.utils.trees import inexact_bytes


pytestmark = pytest.mark.usefixtures("as_a_user_has_it")


@pytest.mark.parametrize("name", quick(list(ALGORITHMS), keep=["UnrolledOptimizer(20)"]))
def test_flops_are_those_of_a_hand_written_program(name):
    """So are the results. A small batch, where the library's overhead weighs most."""
    ours, by_hand = step_programs(name, 32)
    assert ours.flops_with_loops_once <= 1.02 * by_hand.flops_with_loops_once
    state, (carry, metrics) = ours(), by_hand()
    for mine, written in (
        (eqx.filter(state.params, eqx.is_inexact_array), carry[0]),
        (state.hyperparams, carry[2]),
    ):
        for x, y in zip(*map(jax.tree.leaves, (mine, written)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.metadata["hypergrad_norm"], metrics[2], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "most"),
    quick(
        [
            ("FOOptimizer", 1),
            ("OneStepOptimizer", 3),
            ("T1T2Optimizer", 3),
            ("GreedyOptimizer(20)", 3),
            ("HyperDistill", 4),
            ("UnrolledOptimizer(20)", 4),
        ],
        keep=[("UnrolledOptimizer(20)", 4)],
    ),
)
def test_a_step_costs_a_few_gradients_of_a_deep_network(name, most):
    """Plus the validation gradient: 4 for one step, T1-T2 and greedy, 5 for HyperDistill."""
    assert gradients_per_step(name, 128, depth=3) <= most


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "most"),
    [("SOBAOptimizer", 3), ("PenaltyOptimizer(20)", 4), ("BOMEOptimizer(20)", 3)],
)
def test_an_outer_step_costs_a_few_gradients_of_a_deep_network(name, most):
    """With one inner step, without validation. SOBA: a gradient, and two for a product.

    F2SA: two in the inner step and two at the end (3 and 3 with validation gradients); BOME: one
    and two (1 and 3).
    """
    assert gradients_per_outer_step(name, 128, depth=3) <= most


@pytest.mark.thorough
def test_a_functional_hypergradient_takes_no_product_with_the_hessian():
    """Such a product with respect to weights would take two more gradients.

    An adjoint step is a training gradient, a forward pass and a validation gradient on 100 examples
    instead of 128; an outer step is an adjoint step and an inner step.
    """
    outer, adjoint = gradients_of_functional(128, depth=3)
    assert outer <= 3
    assert adjoint <= 1 + 1 / 3 + 100 / 128 + 0.1


@pytest.mark.parametrize(
    ("optimizer_name", "most"), quick([("SGD", 1.25), ("Adam", 1.55)], keep=[("Adam", 1.55)])
)
@pytest.mark.parametrize(("batch_size", "depth"), quick([(128, 1), (128, 3)], keep=[(128, 1)]))
def test_hyperdistill_costs_little_more_than_one_step(optimizer_name, most, batch_size, depth):
    assert flops_ratio(optimizer_name, batch_size, depth) <= most


@pytest.mark.parametrize(
    ("optimizer_name", "batch_size", "times"),
    quick(
        [("SGD", 1_000, 14), ("Adam", 1_000, 10), ("SGD", 128, 3.5), ("Adam", 128, 3.5),
         ("SGD", 32, 2), ("Adam", 32, 2)],
        keep=[("SGD", 1_000, 14)],
    ),
)  # fmt: skip
def test_exact_hypergradient_needs_a_fraction_of_the_memory(optimizer_name, batch_size, times):
    """Of a plain scan's; and no more than a checkpointed scan, the least that `jax.grad` needs.

    With SGD and 1,000 examples, 16 times less with jaxlib 0.10 and 14 with 0.12, which keeps one
    more layer of activations (1,000 x 128) in the loop, as it does in the checkpointed scan.
    """
    ours, checkpointed, plain = exact_programs(optimizer_name, batch_size)
    assert plain.temporary_bytes >= times * ours.temporary_bytes
    # The layout of the loops' scalars varies.
    assert ours.temporary_bytes <= checkpointed.temporary_bytes + 2**10


def test_memory_with_checkpoints_grows_with_the_root_of_the_steps():
    small, large = (checkpointed_program(steps, "sqrt").temporary_bytes for steps in (100, 10_000))
    assert large <= 12 * small


@pytest.mark.thorough
@pytest.mark.parametrize("segment", [None, 5])
def test_a_checkpointed_scan_by_hand_computes_the_same(segment):
    ours, by_hand = checkpointed_program(20, "sqrt")(), scanned_program(20, segment)()
    for x, y in zip(*map(jax.tree.leaves, (ours, by_hand)), strict=True):
        # float32, and sums in another order.
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-8)


def test_memory_of_bisection_grows_by_a_state_when_the_steps_double():
    """A state has parameters and momentum."""
    size = 2 * inexact_bytes(job(32).params)
    small, large = (checkpointed_program(steps, "log").temporary_bytes for steps in (64, 16_384))
    assert large - small <= (8 + 2) * size
    assert small <= 14 * size


@pytest.mark.thorough
def test_forward_mode_costs_two_gradients_per_hyperparameter_and_no_memory_per_step():
    assert gradients_per_hyperparameter(depth=3) <= 2
    small, large = (
        forward_program(4, steps, batch_size=32).temporary_bytes for steps in (10, 10_000)
    )
    assert large <= small + 2**10


@pytest.mark.thorough
def test_a_direction_costs_two_gradients_or_two_trainings():
    assert gradients_per_direction(gradhpo.ForwardGradientOptimizer, depth=3) <= 2
    # Two steps, and two losses: a third of a gradient each.
    assert gradients_per_direction(gradhpo.EvolutionOptimizer, depth=3) <= 2 + 2 / 3


@pytest.mark.thorough
def test_an_iteration_of_an_implicit_solve_costs_two_gradients():
    assert gradients_per_iteration(depth=3) <= 2


# -- a loss that recomputes its activations ----------------------------------------------------

LAYERS, WIDTH, BATCH = 10, 32, 256


def deep_loss(recompute):
    """Ten layers in a scan, each under `jax.checkpoint` or not."""

    def layer(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None

    def loss(w, log_decay, batch):
        x, _ = jax.lax.scan(jax.checkpoint(layer) if recompute else layer, batch, w)
        return jnp.mean(jnp.square(x)) + jnp.exp(log_decay) * jnp.sum(jnp.square(w))

    return loss


def deep_problem(unroll_steps=1):
    keys = jax.random.split(jax.random.key(0))
    w = 0.1 * jax.random.normal(keys[0], (LAYERS, 2, WIDTH, WIDTH))
    inner = optax.sgd(0.1)
    optimizer = gradhpo.UnrolledOptimizer(inner, optax.sgd(0.1), unroll_steps=unroll_steps)
    return optimizer, optimizer.init(w, jnp.array(-3.0)), jax.random.normal(keys[1], (BATCH, WIDTH))


def deep_program(loss, unroll_steps=1):
    """The hypergradient, its memory in training gradients, and its flops."""
    optimizer, state, batch = deep_problem(unroll_steps)
    of_gradient = Program(jax.value_and_grad(loss), state.params, state.hyperparams, batch)
    compute = lambda state: optimizer.compute_hypergradient(state, batch, batch, loss, loss)
    program = Program(compute, state)
    memory = program.temporary_bytes / of_gradient.temporary_bytes
    return program(), memory, program.cost.flops


def test_a_product_keeps_nothing_that_a_loss_recomputes():
    """One step, with the gradients of both losses, at most 2.6 times one training gradient."""
    (with_it, memory, _), (without, *_) = (deep_program(deep_loss(x)) for x in (True, False))
    np.testing.assert_allclose(with_it, without, rtol=1e-5)
    assert memory <= 2.6


@pytest.mark.thorough
def test_a_product_of_a_large_loss_keeps_less(monkeypatch):
    """Above the limit it recomputes, and `plan` says so."""
    optimizer, state, batch = deep_problem(4)
    found, memory, flops, shown = [], [], [], []
    for limit in (2**28, 2**18):
        monkeypatch.setattr("gradhpo.core.problem._LARGE", limit)
        loss = deep_loss(recompute=False)
        losses = gradhpo.LossFunctions(loss, loss)
        plan = gradhpo.plan({"exact": optimizer}, state, batch, batch, losses)
        shown.append((plan["exact", 4].recomputes, "recomputes activations" in str(plan)))
        for column, value in zip((found, memory, flops), deep_program(loss, 4), strict=True):
            column.append(value)
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert memory[1] < 2.6 < memory[0], memory
    assert flops[0] < flops[1] < 1.25 * flops[0], flops
    assert shown == [(False, False), (True, True)]


@pytest.mark.thorough
def test_ten_recomputed_layers_beside_a_checkpointed_scan():
    """The least that `jax.grad` needs; and the same numbers."""
    ours, by_jax, _ = (build() for build in networks.programs(networks.transformer()).values())
    assert ours.temporary_bytes <= 0.6 * by_jax.temporary_bytes
    assert ours.cost.flops <= 1.06 * by_jax.cost.flops
    assert relative_error(ours(), by_jax()) < 1e-4  # float32


def test_bytes_that_a_loss_computes():
    def loss(x):
        doubled, _ = jax.lax.scan(lambda x, _: (2 * x, None), x, None, 5)
        return jnp.sum(jax.lax.cond(x[0] > 0, lambda x: x + 1, lambda x: x, doubled))

    program = jax.make_jaxpr(loss)(jnp.ones(100)).jaxpr
    # Five doublings, one branch, their sum; a few numbers for the condition.
    assert 4 * 601 <= bytes_computed(program) <= 4 * 601 + 64
