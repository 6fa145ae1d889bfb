"""A stop_gradient on a function of the parameters is reported; `detach` replaces it correctly."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed

import gradhpo
from gradhpo.utils.warn import forget_warnings


X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5]))
START = {"w": jnp.array([0.3, 0.1, -0.4]), "head": jnp.array([0.5, -0.5, 0.2])}
SGD = relaxed(optax.sgd(0.1))
STEPS = 6


def semi_gradient(stop):
    """As in temporal differences: the target is a function of the same parameters."""

    def loss(p, h, batch):
        target = stop(jnp.tanh(X[::-1] @ p["w"])) + Y
        return jnp.mean((X @ p["w"] - target) ** 2) + jnp.exp(h) * jnp.sum(p["w"] ** 2)

    return loss


def self_distillation(stop):
    """BYOL without its moving average: a head predicts the other view's embedding."""

    def loss(p, h, batch):
        one, other = jnp.tanh(X @ p["w"]), jnp.tanh((X + 0.1) @ p["w"])
        fits = 3 * jnp.mean((one * jnp.sum(p["head"]) - stop(other)) ** 2) + jnp.mean(one - Y)
        return fits + jnp.exp(h) * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    return loss


KINDS = {"semi-gradient": semi_gradient, "self-distillation": self_distillation}


def val_loss(p, h, batch):
    return jnp.mean((X @ p["w"] - 1.0) ** 2)


METHODS = {
    "unrolled": lambda: gradhpo.UnrolledOptimizer(SGD, unroll_steps=STEPS),
    "forward": lambda: gradhpo.ForwardModeOptimizer(SGD, unroll_steps=STEPS),
}


def hypergradients(loss, optimizer=None):
    optimizer = METHODS["unrolled"]() if optimizer is None else optimizer
    given = (optimizer.init(START, jnp.array(-2.0)), None, None, loss, val_loss)
    found = optimizer.compute_hypergradient(*given)
    return found, gradhpo.finite_difference_hypergradient(optimizer, *given)


@pytest.mark.parametrize(
    ("kind", "method"),
    quick(
        [(kind, method) for kind in KINDS for method in METHODS],
        keep=[("semi-gradient", "unrolled"), ("self-distillation", "forward")],
    ),
)
def test_detach_is_exact(kind, method):
    found, differences = hypergradients(KINDS[kind](gradhpo.detach), METHODS[method]())
    np.testing.assert_allclose(found, differences, rtol=1e-6)


@pytest.mark.parametrize("kind", quick(list(KINDS), keep=["semi-gradient"]))
def test_stop_gradient_is_not_and_is_named_with_the_line_to_write(kind):
    loss = KINDS[kind](jax.lax.stop_gradient)
    named = r"train_loss_fn \(loss at .* stops the gradient.*gradhpo\.detach\(x\)"
    with pytest.warns(UserWarning, match=named):
        found, differences = hypergradients(loss)
    assert abs(found - differences) > 0.12 * abs(differences)
    # The training itself is the same.
    gradient = lambda stop: jax.grad(KINDS[kind](stop))(START, jnp.array(-2.0), None)
    assert_same(gradient(gradhpo.detach), gradient(jax.lax.stop_gradient))


def ascent(stop):
    """SAM: the gradient at parameters moved along the gradient."""

    def gradient(p, h, batch):
        up = stop(jax.grad(loss_of_sam)(p, h, batch))
        return jax.grad(loss_of_sam)(jax.tree.map(lambda x, g: x + jnp.exp(h) * g, p, up), h, batch)

    return gradient


def loss_of_sam(p, h, batch):
    return jnp.mean((jnp.tanh(X @ p["w"]) * jnp.sum(p["head"]) - Y) ** 2)


@pytest.mark.parametrize("stop", [jax.lax.stop_gradient, gradhpo.detach], ids=["stop", "detach"])
@pytest.mark.parametrize("rule", quick(["grad_fn", "update_fn"], keep=["grad_fn"]))
def test_a_stop_outside_of_jax_grad_is_named_with_the_line_to_write(rule, stop):
    """As in code from elsewhere, where nothing needs it and a derivative is lost."""

    def optimizer(stop):
        if rule == "grad_fn":
            return gradhpo.UnrolledOptimizer(SGD, grad_fn=ascent(stop), unroll_steps=3)
        descend = lambda p, h, batch: jax.tree.map(
            lambda x, g: x - 0.1 * g, p, ascent(stop)(p, h, batch)
        )
        return gradhpo.UnrolledOptimizer(update_fn=descend, unroll_steps=3)

    found, differences = hypergradients(loss_of_sam, optimizer(lambda x: x))
    np.testing.assert_allclose(found, differences, rtol=1e-6)
    forget_warnings()
    with pytest.warns(UserWarning, match=rf"{rule} \(\S+ at .*outside of jax.grad needs no stop"):
        lost, differences = hypergradients(loss_of_sam, optimizer(stop))
    np.testing.assert_allclose(found, differences, rtol=1e-6)
    assert abs(lost - found) > 1e-3 * abs(found)


@pytest.mark.thorough
def test_detach_within_a_loss_that_grad_fn_differentiates_is_exact():
    loss = semi_gradient(gradhpo.detach)
    for rule in (jax.grad(loss), lambda p, h, batch: jax.grad(loss)(p, h, batch)):
        optimizer = gradhpo.UnrolledOptimizer(SGD, grad_fn=rule, unroll_steps=3)
        found, differences = hypergradients(loss, optimizer)
        np.testing.assert_allclose(found, differences, rtol=1e-6)
        state = optimizer.init(START, jnp.array(-2.0))
        given = (None, None, loss, val_loss)
        of = lambda h, optimizer=optimizer, state=state, given=given: (
            optimizer.compute_hypergradient(state.update(hyperparams=h), *given)
        )
        forward, reverse = jax.jacfwd(of)(state.hyperparams), jax.jacrev(of)(state.hyperparams)
        np.testing.assert_allclose(forward, reverse, rtol=1e-10)


@pytest.mark.parametrize("stop", [jax.lax.stop_gradient, gradhpo.detach], ids=["stop", "detach"])
def test_a_stop_in_the_validation_loss_is_named(stop):
    shared = lambda p, h, batch: val_loss(stop(p), h, batch) + val_loss(p, h, batch)
    optimizer = gradhpo.OneStepOptimizer(SGD)
    state = optimizer.init(START, jnp.array(-2.0))
    with pytest.warns(UserWarning, match="val_loss_fn .*: remove the stop"):
        optimizer.compute_hypergradient(state, None, None, semi_gradient(gradhpo.detach), shared)


def test_a_second_loss_is_named_as_well():
    """Each is a separate mistake; the same one is reported once, even if compiled again."""

    def first(p, h, batch):
        return jnp.sum((p["w"] - STOP(2 * p["w"])) ** 2) + h**2

    def second(p, h, batch):
        return jnp.sum((p["w"] - STOP(2 * p["w"])) ** 2) + h**2

    assert [warns_of(loss) for loss in (first, first, second, second)] == [1, 0, 1, 0]


@pytest.mark.thorough
def test_the_checkup_decides_by_numbers():
    check = lambda stop: gradhpo.check_hypergradient(
        METHODS["unrolled"](),
        METHODS["unrolled"]().init(START, jnp.array(-2.0)),
        None,
        None,
        gradhpo.LossFunctions(semi_gradient(stop), val_loss),
    )
    assert any("gradhpo.detach" in x for x in check(jax.lax.stop_gradient).findings)
    assert check(gradhpo.detach).healthy


def test_one_step_of_every_kind_equals_the_derivative_of_that_step():
    loss = semi_gradient(gradhpo.detach)

    def after(h):
        gradient = jax.grad(loss)(START, h, None)
        return val_loss(jax.tree.map(lambda x, g: x - 0.1 * g, START, gradient), h, None)

    expected = jax.grad(after)(jnp.array(-2.0))
    for optimizer in (
        gradhpo.OneStepOptimizer(SGD),
        gradhpo.T1T2Optimizer(SGD),
        gradhpo.GreedyOptimizer(SGD),
        gradhpo.DrMADOptimizer(SGD),
    ):
        found = optimizer.compute_hypergradient(
            optimizer.init(START, jnp.array(-2.0)), None, None, loss, val_loss
        )
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def warns_of(loss, optimizer=None):
    """Whether tracing a step with this loss reports a stop_gradient."""
    optimizer = gradhpo.OneStepOptimizer(SGD) if optimizer is None else optimizer
    state = optimizer.init(START, jnp.array(-2.0))
    both = lambda p, h, batch: val_loss(p, h, batch) + h**2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        jax.eval_shape(lambda s: optimizer.compute_hypergradient(s, None, None, loss, both), state)
    return any("stops the gradient" in str(warning.message) for warning in said)


def decayed(of_params):
    return lambda p, h, batch: of_params(p) + jnp.exp(h) * jnp.sum(p["w"] ** 2)


STOP = jax.lax.stop_gradient
LOGITS = lambda p: X @ jnp.outer(p["w"], p["head"])
LABELS = jnp.arange(8) % 3
HARMLESS = {
    "softmax": lambda p: -jnp.mean(jnp.log(jax.nn.softmax(LOGITS(p)))[:, 0]),
    "log_softmax": lambda p: -jnp.mean(jax.nn.log_softmax(LOGITS(p))[:, 0]),
    "logsumexp": lambda p: jnp.mean(jax.nn.logsumexp(LOGITS(p), axis=1)),
    "masked softmax": lambda p: jnp.sum(
        jax.nn.softmax(LOGITS(p), where=jnp.arange(3)[None] < 2) ** 2
    ),
    "optax, integers": lambda p: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(LOGITS(p), LABELS)
    ),
    "optax, one hot": lambda p: jnp.mean(
        optax.softmax_cross_entropy(LOGITS(p), jax.nn.one_hot(LABELS, 3))
    ),
    "optax, sigmoid": lambda p: jnp.mean(
        optax.sigmoid_binary_cross_entropy(LOGITS(p)[:, 0], jnp.ones(8))
    ),
    "within scan, checkpoint and jit": lambda p: jax.lax.scan(
        jax.checkpoint(lambda c, x: (c + jax.jit(jax.nn.logsumexp)(c * x * p["w"]), None)),
        jnp.zeros(()),
        jnp.arange(3.0),
    )[0],
    "of data": lambda p: jnp.sum(p["w"] * STOP(jnp.mean(X, 0))),
    "not used": lambda p: (STOP(p["w"]), jnp.sum(p["w"]))[1],
}
HARMFUL = {
    "in scan": lambda p: jax.lax.scan(
        lambda c, x: (STOP(jnp.tanh(c * x)) + p["w"], None), p["w"], jnp.arange(1.0, 3.0)
    )[0].sum(),
    "in jit": lambda p: jax.jit(lambda w: jnp.sum(w * STOP(w)))(p["w"]),
    "in checkpoint": lambda p: jax.checkpoint(lambda w: jnp.sum(w * STOP(w)))(p["w"]),
    "in cond": lambda p: jax.lax.cond(
        X[0, 0] > 0, lambda w: jnp.sum(w * STOP(w)), lambda w: jnp.sum(w), p["w"]
    ),
    "of a mean beside a maximum": lambda p: jnp.sum(p["w"] * STOP(jnp.mean(p["w"]) + p["w"].max())),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_does_no_harm_is_not_named(kind):
    assert not warns_of(decayed(HARMLESS[kind]))


@pytest.mark.parametrize("kind", HARMFUL)
def test_it_is_found_within_programs(kind):
    assert warns_of(decayed(HARMFUL[kind]))


@pytest.mark.thorough
def test_layers_of_equinox_are_not_named():
    keys = jax.random.split(jax.random.key(0), 5)
    layers = (
        eqx.nn.Conv2d(1, 2, 3, key=keys[0]),
        eqx.nn.GroupNorm(1, 2),
        eqx.nn.MultiheadAttention(2, 4, key=keys[1]),
        eqx.nn.LayerNorm(4),
        eqx.nn.GRUCell(4, 3, key=keys[2]),
        eqx.nn.Linear(3, 1, key=keys[3]),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.PReLU(),
        eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=keys[4])),
        eqx.nn.RMSNorm(4),
    )

    def loss(layers, h, batch):
        conv, group, attend, norm, cell, linear, pool, prelu, weight_norm, rms = layers
        image = prelu(group(conv(jnp.ones((1, 6, 6)))))
        rows = pool(image).reshape(2, 4)
        rows = jax.vmap(lambda x: rms(weight_norm(norm(x))))(attend(rows, rows, rows))
        hidden = cell(rows[0], jnp.zeros(3))
        return linear(hidden)[0] ** 2 + h * jnp.sum(hidden**2)

    optimizer = gradhpo.OneStepOptimizer(SGD)
    state = optimizer.init(layers, jnp.array(0.1))
    compute = lambda s: optimizer.compute_hypergradient(s, None, None, loss, loss)
    eqx.filter_eval_shape(compute, state)  # a warning would be an error


@pytest.mark.thorough
def test_layers_of_flax_are_not_named():
    """Except SpectralNorm, whose stopped vectors move with W."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.PReLU()(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x))), (2, 2), (2, 2))
            x = nn.RMSNorm()(nn.LayerNorm()(x.reshape(2, -1, 4)))
            x = nn.WeightNorm(nn.Dense(4))(nn.MultiHeadDotProductAttention(2)(x))
            x = nn.RNN(nn.OptimizedLSTMCell(4))(nn.RNN(nn.GRUCell(4))(x))
            return nn.Dense(3)(nn.InstanceNorm()(x)).mean(1)

    images, net = jnp.ones((2, 8, 8, 1), jnp.float32), Net()

    def loss(p, h, batch):
        logits = net.apply({"params": p}, images)
        fits = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2))
        return jnp.mean(fits) + h * jnp.sum(logits**2)

    optimizer = gradhpo.OneStepOptimizer(SGD)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = net.init(jax.random.key(0), images)["params"]
        state = optimizer.init(params, jnp.array(0.1, jnp.float32))
        compute = lambda s: optimizer.compute_hypergradient(s, None, None, loss, loss)
        eqx.filter_eval_shape(compute, state)  # a warning would be an error


def test_methods_that_do_not_differentiate_the_gradient_are_not_told():
    loss = semi_gradient(STOP)
    assert not warns_of(loss, gradhpo.FOOptimizer(SGD))
    assert not warns_of(loss, gradhpo.T1T2Optimizer(SGD, perturb="hyperparams"))


def test_detach_keeps_other_leaves():
    tree = {"a": jnp.ones(2), "n": jnp.arange(2), "f": jnp.tanh}
    found = gradhpo.detach(tree)
    assert found["f"] is jnp.tanh
    assert found["n"] is tree["n"]
