"""A hypergradient of exactly 0 for a visible hyperparameter is reported with its reason."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import relaxed

import gradhpo


START = {"w": jnp.array([0.3, -0.2, 0.5])}
H = {"target": jnp.zeros(3), "unused": jnp.ones(2)}


def train_loss(w, h, batch):
    return jnp.sum((w["w"] - h["target"]) ** 2) + 0 * jnp.sum(h["unused"])


def val_loss(w, h, batch):
    return jnp.sum((w["w"] - 1.0) ** 2) + jnp.sum(h["unused"] ** 2)


LOSSES = (train_loss, val_loss)
SIZE = "the step of the inner optimizer ignores the size of the training gradient"
ZERO = "is exactly 0: there is a stop_gradient, a gradhpo.detach outside of jax.grad, a rounding"
SIGNS = {
    "lion": relaxed(optax.lion(0.01)),
    "sign descent": relaxed(optax.sign_sgd(0.01)),
    "steps that grow and shrink by signs": relaxed(optax.rprop(0.01)),
    "momentum of signs": relaxed(optax.chain(optax.trace(0.9), optax.scale_by_sign())),
}


def exact(inner, **settings):
    return gradhpo.UnrolledOptimizer(inner, optax.sgd(0.1), unroll_steps=3, **settings)


@pytest.mark.parametrize("name", SIGNS)
def test_of_a_piecewise_constant_inner_optimizer(name):
    optimizer = exact(SIGNS[name])
    state = optimizer.init(START, H)
    with pytest.warns(UserWarning, match=rf"of 0 for hyperparams \['target'\].*{SIZE}"):
        optimizer.compute_hypergradient(state, None, None, *LOSSES)


def test_where_nothing_else_is_tuned_it_is_an_error():
    optimizer = exact(SIGNS["lion"])
    state = optimizer.init(START, jnp.zeros(3))
    loss = lambda w, h, batch: jnp.sum((w["w"] - h) ** 2)
    val = lambda w, h, batch: jnp.sum(w["w"] ** 2)
    with pytest.raises(ValueError, match=f"sees none of the hyperparameters.*{SIZE}"):
        gradhpo.run(
            optimizer,
            state,
            gradhpo.LossFunctions(loss, val),
            None,
            None,
            num_steps=20,
            progress=False,
        )


@pytest.mark.parametrize("kind", [gradhpo.OneStepOptimizer, gradhpo.T1T2Optimizer])
@pytest.mark.parametrize("name", ["lion", "sign descent"])
def test_methods_of_one_step_say_the_same(kind, name):
    optimizer = kind(SIGNS[name])
    with pytest.warns(UserWarning, match=rf"of 0 for hyperparams \['target'\].*{SIZE}"):
        optimizer.compute_hypergradient(optimizer.init(START, H), None, None, *LOSSES)


def test_its_own_rate_has_a_derivative():
    optimizer = exact(lambda rate: optax.lion(rate))
    state = optimizer.init(START, jnp.array(0.01))
    loss = lambda w, h, batch: jnp.sum((w["w"] - 1.0) ** 2)
    found = optimizer.compute_hypergradient(state, None, None, loss, loss)
    differences = gradhpo.finite_difference_hypergradient(optimizer, state, None, None, loss, loss)
    np.testing.assert_allclose(found, differences, rtol=1e-6)


# -- values -----------------------------------------------------------------------------------


def no_example(w, h, batch):
    """Example weights, none of them for an example in this batch."""
    return jnp.sum(h["target"] * batch * w["w"] ** 2) + jnp.sum(w["w"] * h["unused"][0])


NONE, SOME = jnp.zeros(3), jnp.ones(3)
SGD = relaxed(optax.sgd(0.1))


def test_of_tasks():
    together = gradhpo.TaskBatched(gradhpo.OneStepOptimizer(SGD, optax.sgd(0.1)), 2)
    state = together.init(START, H)
    batch = jnp.zeros((2, 3))
    with pytest.warns(UserWarning, match=rf"TaskBatched: .*\['target'\] {ZERO}"):
        together.step(state, batch, batch, no_example, val_loss)


def test_once_and_only_where_a_program_is_new():
    optimizer = exact(SGD)
    state = optimizer.init(START, H)
    with pytest.warns(UserWarning, match=rf"\['target'\] {ZERO}") as caught:
        state = optimizer.step(state, NONE, NONE, no_example, val_loss)
    assert len(caught) == 1
    optimizer.step(state, NONE, NONE, no_example, val_loss)  # a warning would be an error
    found = optimizer.compute_hypergradient(state, SOME, NONE, no_example, val_loss)
    assert np.all(found["target"] != 0)


def test_a_zero_that_comes_of_the_starting_point_alone_is_no_warning():
    """A penalty on parameters of 0, and a square of a hyperparameter of 0."""
    loss = lambda w, h, batch: jnp.sum(h["target"] * w["w"] ** 2) + jnp.sum(w["w"])
    squared = lambda w, h, batch: jnp.sum(w["w"] ** 2) + jnp.sum((h["unused"] - 1) ** 2)
    optimizer = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1)), optax.sgd(0.1))
    state = optimizer.init({"w": jnp.zeros(3)}, H)
    found = optimizer.compute_hypergradient(state, None, None, loss, squared)
    assert not np.any(found["target"])
    assert not np.any(found["unused"])


def test_inside_a_program_of_the_user_nothing_waits():
    optimizer = exact(SGD)
    state = optimizer.init(START, H)

    @jax.jit
    def compute(h):
        at = state.update(hyperparams=h)
        return optimizer.compute_hypergradient(at, NONE, NONE, no_example, val_loss)

    assert not np.any(compute(H)["target"])


def test_run_says_it_after_its_first_chunk_and_in_its_report():
    optimizer = exact(SGD)
    losses = gradhpo.LossFunctions(no_example, val_loss)
    run = lambda **settings: gradhpo.run(
        optimizer, optimizer.init(START, H), losses, NONE, NONE, progress=False, **settings
    )
    with pytest.warns(UserWarning, match=rf"\['target'\] {ZERO}") as caught:
        _, history = run(num_steps=20, chunk_size=5)
    assert len(caught) == 1
    assert history.stop_reason == "num_steps"
    said = f"the hypergradient of hyperparams ['target'] {ZERO}"
    assert f"In every step, UnrolledOptimizer: {said}" in history.report
    _, history = run(num_steps=4, steps_per_episode=2)
    assert said in history.report


def test_a_zero_in_the_first_step_alone_is_none_of_a_run():
    """Parameters of 0 feel no penalty until they have moved."""
    loss = lambda w, h, batch: jnp.sum(h["target"] * w["w"] ** 2) + jnp.sum(w["w"])
    optimizer = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1)), optax.sgd(0.1))
    _, history = gradhpo.run(
        optimizer,
        optimizer.init({"w": jnp.zeros(3)}, H),
        gradhpo.LossFunctions(loss, val_loss),
        None,
        None,
        num_steps=4,
        progress=False,
    )
    assert "exactly 0" not in history.report
    assert history["hypergrad_norm"][1] > 0


@pytest.mark.thorough
def test_the_checkup_reports_it():
    check = lambda optimizer, loss, batch: gradhpo.check_hypergradient(
        optimizer,
        optimizer.init(START, H),
        batch,
        batch,
        gradhpo.LossFunctions(loss, val_loss),
    )
    report = check(exact(SIGNS["lion"]), train_loss, None)
    assert report.detached == ("['target']",)
    assert any(SIZE in finding for finding in report.findings)
    report = check(exact(SGD), no_example, NONE)
    assert report.vanishing == ("['target']",)
    assert any(ZERO in finding for finding in report.findings)
    report = check(exact(SGD), train_loss, None)
    assert report.vanishing == ()
    assert report.healthy, report.findings


def test_the_norm_of_a_large_hypergradient_is_finite():
    """Squares of 1e30 overflow float32."""
    optimizer = gradhpo.FOOptimizer(relaxed(optax.sgd(0.1)), optax.sgd(0.1))
    f32 = lambda *x: jnp.asarray(x, jnp.float32)
    state = optimizer.init(f32(1.0), f32(1.0, 1.0))
    loss = lambda w, h, batch: jnp.sum(w**2)
    large = lambda w, h, batch: jnp.sum(h * f32(3e30, 4e30))
    state = optimizer.step(state, None, None, loss, large)
    np.testing.assert_allclose(state.get_metric("hypergrad_norm"), 5e30, rtol=1e-6)
    np.testing.assert_allclose(state.get_metric("hyperparam_norm"), 5e29, rtol=1e-6)
    tiny = lambda w, h, batch: jnp.sum(h * f32(3e-30, 4e-30))
    state = optimizer.step(state, None, None, loss, tiny)
    np.testing.assert_allclose(state.get_metric("hypergrad_norm"), 5e-30, rtol=1e-6)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_a_direction_of_any_length_is_normalized(size):
    """It was 0 when the norm overflowed, and HyperDistill followed it silently."""
    v = {"a": jnp.asarray([3 * size, 4 * size], jnp.float32)}
    unit = gradhpo.tree_normalize(v, np.float32(1e-38))
    np.testing.assert_allclose(unit["a"], [0.6, 0.8], rtol=1e-6)
    optimizer = gradhpo.OnlineHypergradientOptimizer(
        relaxed(optax.sgd(0.5)), normalize=True, distillation_weight=1.0
    )
    state = optimizer.init(jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32))
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val = lambda w, h, batch: jnp.sum(w * v["a"])
    found = optimizer.compute_hypergradient(state, None, None, loss, val)
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-6)
