"""A user-defined training gradient with an optax optimizer, differentiated exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed

import gradhpo


X = jax.random.normal(jax.random.key(0), (6, 3))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5]))
W = jnp.array([0.3, 0.1, -0.4])
STEPS = 4
ADAM = relaxed(optax.adam(0.1, eps_root=1e-8))
SGD = relaxed(optax.sgd(0.1))


def train_loss(w, h, batch):
    return jnp.mean((jnp.tanh(X @ w) - Y) ** 2) + jnp.exp(h[0]) * jnp.sum(w**2)


def val_loss(w, h, batch):
    return jnp.sum((w - 1.0) ** 2)


LOSSES = (train_loss, val_loss)
H = jnp.array([-2.0, 0.1])


def sharpness_aware(w, h, batch):
    """SAM: the gradient at the worst point within a tuned radius."""
    gradient = jax.grad(train_loss)(w, h, batch)
    return jax.grad(train_loss)(w + h[1] * gradient / jnp.linalg.norm(gradient), h, batch)


def clipped(w, h, batch):
    """DP-SGD without its noise: the gradient of every example is clipped."""
    of_one = lambda x, y: jax.grad(lambda w: (jnp.tanh(x @ w) - y) ** 2)(w)
    gradients = jax.vmap(of_one)(X, Y)
    norms = jnp.linalg.norm(gradients, axis=1, keepdims=True)
    return jnp.mean(gradients / jnp.maximum(1, norms / jnp.exp(h[1])), 0) + jnp.exp(h[0]) * w


def semi_gradient(w, h, batch):
    """As in temporal differences: the target is held, though it depends on the parameters."""
    target = Y + jnp.exp(h[0]) * jnp.tanh(X[::-1] @ w)
    return jax.grad(lambda v: jnp.mean((X @ v - target) ** 2) + h[1] * jnp.sum(v**2))(w)


RULES = {"SAM": sharpness_aware, "clipped": clipped, "semi-gradient": semi_gradient}


def by_jax(rule, inner, h, *, steps=STEPS):
    def trained(h):
        w, s = W, inner.init(W)
        for _ in range(steps):
            updates, s = inner.update(rule(w, h, None), s, w)
            w = optax.apply_updates(w, updates)
        return val_loss(w, h, None)

    return jax.grad(trained)(h)


EXACT = {
    "unrolled": lambda rule: gradhpo.UnrolledOptimizer(ADAM, unroll_steps=STEPS, grad_fn=rule),
    "checkpoints": lambda rule: gradhpo.UnrolledOptimizer(
        ADAM, unroll_steps=STEPS, checkpoints=2, grad_fn=rule
    ),
    "forward": lambda rule: gradhpo.ForwardModeOptimizer(ADAM, unroll_steps=STEPS, grad_fn=rule),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    quick(
        [(kind, name) for kind in RULES for name in EXACT],
        keep=[("semi-gradient", "unrolled")],
    ),
)
def test_exact_methods_differentiate_it(kind, name):
    optimizer = EXACT[name](RULES[kind])
    found = optimizer.compute_hypergradient(optimizer.init(W, H), None, None, *LOSSES)
    np.testing.assert_allclose(found, by_jax(RULES[kind], ADAM, H), rtol=1e-10)


ONE_STEP = {
    "one step": lambda rule: gradhpo.OneStepOptimizer(SGD, grad_fn=rule),
    "T1-T2": lambda rule: gradhpo.T1T2Optimizer(SGD, grad_fn=rule),
    "T1-T2 by hyperparams": lambda rule: gradhpo.T1T2Optimizer(
        SGD, perturb="hyperparams", epsilon=1e-6, grad_fn=rule
    ),
    "greedy": lambda rule: gradhpo.GreedyOptimizer(SGD, grad_fn=rule),
    "HyperDistill": lambda rule: gradhpo.OnlineHypergradientOptimizer(
        SGD, distillation_weight=1.0, grad_fn=rule
    ),
    "DrMAD": lambda rule: gradhpo.DrMADOptimizer(SGD, grad_fn=rule),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_other_methods_take_its_last_step(name):
    """Its Jacobian is not symmetric: a derivative along v instead of by v would show here."""
    optimizer = ONE_STEP[name](semi_gradient)
    found = optimizer.compute_hypergradient(optimizer.init(W, H), None, None, *LOSSES)
    rtol = 1e-7 if "by hyperparams" in name else 1e-10
    np.testing.assert_allclose(found, by_jax(semi_gradient, SGD, H, steps=1), rtol=rtol)


@pytest.mark.thorough
def test_implicit_differentiation_of_its_zero():
    """At the zero of the semi-gradient, with a system that is not symmetric."""
    optimizer = gradhpo.ImplicitOptimizer(SGD, inner_steps=500, grad_fn=semi_gradient)
    found = optimizer.compute_hypergradient(optimizer.init(W, H), None, None, *LOSSES)
    w = optimizer.step(optimizer.init(W, H), None, None, *LOSSES, lr_hyper=0.0).params
    np.testing.assert_allclose(semi_gradient(w, H, None), 0, atol=1e-12)
    by_w, by_h = jax.jacobian(semi_gradient, (0, 1))(w, H, None)
    exact = -jnp.linalg.solve(by_w.T, jax.grad(val_loss)(w, H, None)) @ by_h
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_the_loss_is_a_metric_alone():
    optimizer = gradhpo.GreedyOptimizer(SGD, optax.sgd(0.1), unroll_steps=3, grad_fn=clipped)
    state = optimizer.init(W, H)
    before = state.params
    for _ in range(2):
        before = before - 0.1 * clipped(before, H, None)
    state = optimizer.step(state, None, None, *LOSSES)
    expected = train_loss(before, H, None)
    np.testing.assert_allclose(state.get_metric("train_loss"), expected, rtol=1e-12)


@pytest.mark.thorough
def test_diagnostics_take_it_for_the_gradient():
    optimizer = EXACT["unrolled"](sharpness_aware)
    state, losses = optimizer.init(W, H), gradhpo.LossFunctions(*LOSSES)
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    assert report.healthy, report.findings
    for found in report.finite_differences.values():
        np.testing.assert_allclose(found.derivative, found.difference, rtol=1e-5)
    one = gradhpo.OneStepOptimizer(ADAM, grad_fn=sharpness_aware)
    batches = gradhpo.BatchStack(jnp.zeros((STEPS, 1)))
    compared = gradhpo.compare_hypergradients({"one step": one}, state, batches, None, losses)
    np.testing.assert_allclose(compared.reference, by_jax(sharpness_aware, ADAM, H), rtol=1e-10)


def test_of_a_model_with_other_leaves():
    """A gradient from `eqx.filter_grad` has None for untrained leaves."""
    params = {"w": W, "count": jnp.array(3), "name": None}
    of_dict = lambda p, h, batch: {
        "w": sharpness_aware(p["w"], h, batch), "count": None, "name": None
    }  # fmt: skip
    loss = lambda p, h, batch: train_loss(p["w"], h, batch)
    val = lambda p, h, batch: val_loss(p["w"], h, batch)
    optimizer = gradhpo.OneStepOptimizer(SGD, grad_fn=of_dict)
    found = optimizer.compute_hypergradient(optimizer.init(params, H), None, None, loss, val)
    np.testing.assert_allclose(found, by_jax(sharpness_aware, SGD, H, steps=1), rtol=1e-10)


BAD = {
    "both": (dict(inner_optimizer=SGD, grad_fn=clipped, update_fn=clipped), "pass only one of"),
    "alone": (dict(grad_fn=clipped), "grad_fn without an inner_optimizer"),
    "with an update_fn": (dict(grad_fn=clipped, update_fn=clipped), "without an inner_optimizer"),
    "no function": (dict(inner_optimizer=SGD, grad_fn=1.0), "grad_fn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rules(case):
    settings, said = BAD[case]
    with pytest.raises((TypeError, ValueError), match=said):
        gradhpo.OneStepOptimizer(**settings)


def test_bad_gradients():
    step = lambda rule: gradhpo.OneStepOptimizer(SGD, grad_fn=rule).compute_hypergradient(
        gradhpo.OneStepOptimizer(SGD, grad_fn=rule).init(W, H), None, None, *LOSSES
    )
    with pytest.raises(ValueError, match="grad_fn must return a gradient of the structure"):
        step(lambda w, h, batch: clipped(w, h, batch)[:2])
    with pytest.raises(ValueError, match=r"return the gradient alone, not \(value, gradient\)"):
        step(lambda w, h, batch: (jnp.sum(w), clipped(w, h, batch)))
    with pytest.raises(TypeError, match=r"grad_fn is called as grad_fn\(params, hyperparams"):
        step(lambda w, h: w)
