"""DrMAD: its formula, where it is exact, and how close it comes elsewhere."""

import jax
import numpy as np
import pytest
from helpers import flat, quick, relative_error
from problems import OUTER, make, stack_of, warmed
from test_hyperdistill import flattened

import gradhpo


@pytest.mark.parametrize("optimizer_name", quick(["momentum", "adam"], keep=["momentum"]))
def test_is_reverse_mode_along_the_line(optimizer_name, getkey):
    steps = 6
    problem, inner = make("optimizer", optimizer_name, getkey())
    stack = stack_of(problem, steps, getkey())
    batches = [stack.at(t) for t in range(steps)]
    optimizer = gradhpo.DrMADOptimizer(inner, OUTER, unroll_steps=steps)
    state = optimizer.init(problem.params, problem.hyperparams)
    found = optimizer.compute_hypergradient(
        state, stack, problem.val_batch, problem.train_loss, problem.val_loss
    )
    problem_flat = flattened(problem, inner)
    with jax.numpy_dtype_promotion("standard"):
        d, z = problem_flat.d, problem_flat.z0
        for t in range(steps):
            z = np.asarray(problem_flat.phi(z, problem_flat.h0, t, batches[t]))
        size = problem_flat.size_w
        alpha = np.asarray(d.alpha(z[:size], problem_flat.h0))
        bar = np.concatenate([alpha, np.zeros(z.size - size)])
        g = np.asarray(d.direct(z[:size], problem_flat.h0))
        for t in reversed(range(steps)):
            at = (1 - t / steps) * problem_flat.z0 + (t / steps) * z
            g = g + bar @ np.asarray(d.b(at, problem_flat.h0, t, batches[t]))
            bar = bar @ np.asarray(d.a(at, problem_flat.h0, t, batches[t]))
    np.testing.assert_allclose(flat(found), g, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("optimizer_name", quick(["sgd", "adam"], keep=[]))
def test_one_step_is_exact(optimizer_name, getkey):
    problem, inner = make("optimizer", optimizer_name, getkey())
    arguments = warmed(gradhpo.OneStepOptimizer(inner), problem, problem.train_batch)
    found, exact = (
        o.compute_hypergradient(*arguments)
        for o in (gradhpo.DrMADOptimizer(inner), gradhpo.OneStepOptimizer(inner))
    )
    assert relative_error(found, exact) < 1e-12


@pytest.mark.parametrize(
    ("problem_name", "optimizer_name"),
    quick([("loss", "adam"), ("layers", "adam")], keep=[]),
)
def test_with_adam_it_is_near_the_exact_one_on_a_smooth_problem(
    problem_name, optimizer_name, getkey
):
    """Cosine at least 0.9, with the optimizer's state on the line as well."""
    problem, inner = make(problem_name, optimizer_name, getkey())
    exact = gradhpo.UnrolledOptimizer(inner, unroll_steps=20)
    ours = gradhpo.DrMADOptimizer(inner, unroll_steps=20)
    state = exact.init(problem.params, problem.hyperparams)
    rest = (problem.train_batch, problem.val_batch, problem.train_loss, problem.val_loss)
    a, b = (flat(o.compute_hypergradient(state, *rest)) for o in (ours, exact))
    assert a @ b >= 0.9 * np.linalg.norm(a) * np.linalg.norm(b)
    assert 0.5 < np.linalg.norm(a) / np.linalg.norm(b) < 2
