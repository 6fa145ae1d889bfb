"""`check_hypergradient` finds seeded faults, each in one call; metasmoothness is its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import relaxed

import gradhpo


X = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)))
Y = X @ jnp.array([1.0, -1.0, 0.5, 0.0]) + jnp.asarray(np.random.default_rng(1).normal(size=30))
TRAIN, VAL = (X[:20], Y[:20]), (X[20:], Y[20:])
SGD = relaxed(optax.sgd(0.05))
HYPERPARAMS = {"decay": jnp.asarray(-2.0), "shift": jnp.zeros(4)}


def error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def train_loss(w, h, batch):
    return error(w, batch) + jnp.exp(h["decay"]) * jnp.sum(jnp.cosh(w - h["shift"]))


def val_loss(w, h, batch):
    return error(w, batch)


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


def check(optimizer, train_batch=TRAIN, val_batch=VAL, losses=LOSSES, dtype=jnp.float64):
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    state = optimizer.init(cast(jnp.ones(4)), cast(HYPERPARAMS))
    return gradhpo.check_hypergradient(optimizer, state, cast(train_batch), cast(val_batch), losses)


def unrolled(inner=SGD, steps=6):
    return gradhpo.UnrolledOptimizer(inner, unroll_steps=steps)


def test_a_healthy_hypergradient():
    report = check(unrolled())
    assert report.healthy, report
    assert report.nonfinite is None
    assert report.detached == report.unseen == ()
    assert 0 < report.rounding < 1e-5
    assert report.precision_by_leaf["['shift']"].cosine["narrow"] == pytest.approx(1)
    assert report.uphill_share == 0
    assert report.metasmoothness > 0.9
    assert set(report.finite_differences) == {"['decay']", "['shift']"}
    for compared in report.finite_differences.values():
        np.testing.assert_allclose(compared.derivative, compared.difference, rtol=1e-6)
        assert not compared.contradicts
    assert "nothing wrong" in str(report)


def one_finding(report, *words):
    """Exactly one, and it has these words."""
    assert len(report.findings) == 1, report
    assert all(word in report.findings[0] for word in words), report
    assert "1. " in str(report)


def test_sign_error_in_an_update_fn():
    uphill = lambda w, h, batch: w + 0.05 * jax.grad(train_loss)(w, h, batch)
    one_finding(check(gradhpo.OneStepOptimizer(update_fn=uphill)), "uphill", "sign error")
    # Too large a rate diverges, but not for its sign.
    assert check(unrolled(relaxed(optax.sgd(0.3)))).uphill_share == 0


def test_detached_hyperparameter():
    frozen = lambda h: h | {"decay": jax.lax.stop_gradient(h["decay"])}
    losses = gradhpo.LossFunctions(lambda w, h, batch: train_loss(w, frozen(h), batch), val_loss)
    report = check(unrolled(), losses=losses)
    assert report.detached == ("['decay']",)
    one_finding(report, "['decay']", "stop_gradient")


def test_detached_on_one_of_two_ways():
    """A derivative there is, and a wrong one: only differences of the training show it."""

    def loss(w, h, batch):
        return train_loss(w, h | {"decay": jax.lax.stop_gradient(h["decay"])}, batch) + 0.01 * h[
            "decay"
        ] * jnp.sum(w)

    report = check(unrolled(), losses=gradhpo.LossFunctions(loss, val_loss))
    assert report.detached == ()
    assert report.finite_differences["['decay']"].contradicts
    assert not report.finite_differences["['shift']"].contradicts
    one_finding(report, "['decay']", "detached")


def test_wrong_custom_rule():
    @jax.custom_jvp
    def identity(x):
        return x

    identity.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))
    reversed_ = lambda h: h | {"shift": identity(h["shift"])}
    losses = gradhpo.LossFunctions(lambda w, h, batch: train_loss(w, reversed_(h), batch), val_loss)
    one_finding(check(unrolled(), losses=losses), "['shift']", "custom derivative rule is wrong")


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_nan_of_adam(dtype):
    """The last feature is 0 in every example, and so is its gradient."""
    without_last = lambda w, batch: jnp.mean((batch[0][:, :3] @ w[:3] - batch[1]) ** 2)
    losses = gradhpo.LossFunctions(
        lambda w, h, batch: without_last(w - h["shift"], batch) * jnp.exp(h["decay"]), val_loss
    )
    report = check(unrolled(relaxed(optax.adam(0.1))), losses=losses, dtype=dtype)
    assert report.nonfinite.inner_step == 5
    one_finding(report, "inner step 5", "eps_root=1e-16")
    assert check(unrolled(relaxed(optax.adam(0.1, eps_root=1e-16))), losses=losses).healthy


def test_nan_in_the_data():
    x, y = TRAIN
    stack = gradhpo.BatchStack((jnp.stack([x] * 6), jnp.stack([y] * 6).at[3, 2].set(jnp.nan)))
    report = check(unrolled(), train_batch=stack)
    assert (report.nonfinite.inner_step, report.nonfinite.leaf) == (3, ".batches[1]"[8:])
    one_finding(report, "the training batch", "inner step 3", "missing values")
    report = check(unrolled(), val_batch=(VAL[0].at[0, 0].set(jnp.inf), VAL[1]))
    assert report.nonfinite.inner_step is None
    one_finding(report, "the validation batch", "[0]")


def test_nan_of_a_second_derivative():
    """A power of 1.5 has one derivative at 0, where the first parameter starts, and no second."""
    losses = gradhpo.LossFunctions(
        lambda w, h, batch: train_loss(w, h, batch) + jnp.abs(w[0] - 1) ** 1.5, val_loss
    )
    report = check(unrolled(), losses=losses)
    assert report.nonfinite.inner_step == 0
    one_finding(report, "the second derivative of the training loss", "inner step 0")


def test_divergence():
    report = check(unrolled(relaxed(optax.sgd(1e9)), steps=40))
    assert "not finite" in report.findings[0]
    assert report.nonfinite.inner_step is not None


@pytest.mark.parametrize(
    ("epsilon", "word"), [(1.0, "epsilon is too large"), (1e-15, "too small (rounding)")]
)
def test_step_of_finite_differences(epsilon, word):
    t1t2 = gradhpo.T1T2Optimizer(SGD, inner_steps=2, epsilon=epsilon)
    report = check(t1t2)
    one_finding(report, word)
    assert report.step_error.halved > 0.01


def test_good_step_of_finite_differences():
    report = check(gradhpo.T1T2Optimizer(SGD, inner_steps=2))
    assert report.healthy, report
    # Its error is that of its formula, and falls fourfold with half of the step.
    assert 3 < report.step_error.doubled / report.step_error.halved < 5


@pytest.mark.parametrize("steps", [2, 60])
def test_float32_noise_at_a_long_horizon(steps):
    """Training that is chaotic (w <- 4 h w (1 - w)) forgets float32 within some 50 steps."""
    loss = lambda w, h, batch: jnp.sum(w**2 / 2 - 4 * h * (w**2 / 2 - w**3 / 3))
    losses = gradhpo.LossFunctions(loss, lambda w, h, batch: jnp.sum(w))
    optimizer = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(1.0)), unroll_steps=steps)
    state = optimizer.init(jnp.full(3, 0.3, jnp.float32), jnp.asarray(0.97, jnp.float32))
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    found = [text for text in report.findings if "rounding: in float32" in text]
    assert len(found) == (steps == 60)
    assert (report.rounding > 0.5) == (steps == 60)
    if steps == 60:
        assert report.diverges  # a growth of more than 4 leaves the unit interval


def test_what_the_optimizer_does_not_see_is_noted():
    report = check(gradhpo.FOOptimizer(SGD))
    assert report.unseen == ("['decay']", "['shift']")
    assert report.healthy
    assert "not seen by FOOptimizer" in str(report)


def test_random_numbers_are_not_compared():
    def loss(w, h, batch):
        keep = jax.random.bernoulli(batch[1], 0.5, (4,))
        return train_loss(w * keep.astype(w.dtype), h, batch[0])

    optimizer = unrolled(steps=2)
    state = optimizer.init(jnp.ones(4), HYPERPARAMS)
    losses = gradhpo.LossFunctions(loss, val_loss)
    batch = (TRAIN, jax.random.key(0))
    report = gradhpo.check_hypergradient(optimizer, state, batch, VAL, losses)
    assert report.precision is None
    assert "random numbers" in str(report)


def test_bad_input():
    optimizer = gradhpo.TaskBatched(unrolled(), 2)
    state = optimizer.init(jnp.ones(4), HYPERPARAMS)
    for function in (gradhpo.check_hypergradient, gradhpo.metasmoothness):
        with pytest.raises(TypeError, match="the optimizer that it wraps"):
            function(optimizer, state, TRAIN, VAL, LOSSES)
        single = unrolled()
        with pytest.raises(ValueError, match="step_size must be positive"):
            function(single, single.init(jnp.ones(4), HYPERPARAMS), TRAIN, VAL, LOSSES, step_size=0)


# -- metasmoothness ----------------------------------------------------------------------


def smoothness(loss, size, direction=None, start=None):
    optimizer = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(1.0)), unroll_steps=1)
    state = optimizer.init(jnp.zeros(3) if start is None else start, jnp.zeros(3))
    losses = gradhpo.LossFunctions(loss, lambda w, h, batch: jnp.sum(w))
    return gradhpo.metasmoothness(
        optimizer, state, None, None, losses, direction=direction, step_size=size
    )


def test_metasmoothness_is_its_formula():
    """One step to w = f(h): the three trainings are three values of f."""
    f = lambda h: jnp.array([1.0, 2.0, 3.0]) * jnp.sin(jnp.array([1.0, 5.0, 9.0]) * h)
    loss = lambda w, h, batch: jnp.sum((w - f(h)) ** 2) / 2
    v, size = np.array([1.0, -1.0, 0.5]), 0.4
    points = [np.asarray(f(jnp.asarray(k * size * v))) for k in range(3)]
    d1, d2 = points[1] - points[0], points[2] - points[1]
    weights = np.abs(d1 + d2) / np.sum(np.abs(d1 + d2))
    expected = np.sign(d1) @ (weights * np.sign(d2))
    assert -1 < expected < 1
    np.testing.assert_allclose(smoothness(loss, size, jnp.asarray(v)), expected, rtol=1e-10)
    # By default the way of an outer Adam: down the hypergradient, whose signs are +1 here.
    np.testing.assert_allclose(
        smoothness(loss, size), smoothness(loss, size, -jnp.ones(3)), rtol=1e-12
    )
    assert smoothness(loss, 0.01) == pytest.approx(1)


def test_metasmoothness_at_its_ends():
    turning = lambda w, h, batch: jnp.sum((w - h * (0.19 - h)) ** 2) / 2
    assert smoothness(turning, 0.1, jnp.ones(3)) == pytest.approx(-1)
    assert np.isnan(
        smoothness(lambda w, h, batch: jnp.sum(w**2) + 0 * jnp.sum(h), 0.1, jnp.ones(3))
    )
    with pytest.raises(ValueError, match="direction does not fit"):
        smoothness(turning, 0.1, jnp.ones(4))
