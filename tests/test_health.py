"""`check_hypergradient` finds seeded faults, each in one call; metasmoothness is its formula."""

import codecs
import contextlib
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from jaxtyping import Array
from problems import relaxed

import gradhpo
from gradhpo.utils.advice import on_jumps, on_narrow_derivative


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


def check_and_take(
    optimizer,
    train_batch=TRAIN,
    val_batch=VAL,
    losses=LOSSES,
    hyperparams=HYPERPARAMS,
    dtype=jnp.float64,
):
    """The report, and the hypergradient it describes (of the first `step`)."""
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    state = optimizer.init(cast(jnp.ones(4)), cast(hyperparams))
    arguments = (state, cast(train_batch), cast(val_batch))
    report = gradhpo.check_hypergradient(optimizer, *arguments, losses)
    if optimizer.num_inner_steps == 1:
        return report, None
    pair = (losses.train_loss, losses.val_loss)
    return report, optimizer.compute_hypergradient(*arguments, *pair)


def check(optimizer, **case):
    case = {"train_batch": TRAIN, "val_batch": VAL, "losses": LOSSES} | case
    state = optimizer.init(jnp.ones(4), HYPERPARAMS)
    return gradhpo.check_hypergradient(optimizer, state, **case)


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


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
    assert "nothing wrong with the derivative" in str(report)


def one_finding(report, *words):
    """Exactly one finding, with these words."""
    assert len(report.findings) == 1, report
    assert all(word in report.findings[0] for word in words), report
    assert "1. " in str(report)


def test_sign_error_in_an_update_fn():
    uphill = lambda w, h, batch: w + 0.05 * jax.grad(train_loss)(w, h, batch)
    one_finding(check(gradhpo.OneStepOptimizer(update_fn=uphill)), "uphill", "sign error")
    # Too large a rate diverges, but not because of its sign.
    assert check(unrolled(relaxed(optax.sgd(0.3)))).uphill_share == 0


def test_detached_hyperparameter():
    frozen = lambda h: h | {"decay": jax.lax.stop_gradient(h["decay"])}
    losses = gradhpo.LossFunctions(lambda w, h, batch: train_loss(w, frozen(h), batch), val_loss)
    report = check(unrolled(), losses=losses)
    assert report.detached == ("['decay']",)
    one_finding(report, "['decay']", "stop_gradient")


@pytest.mark.thorough
def test_detached_on_one_of_two_ways():
    """There is a derivative, but a wrong one: only finite differences of training show it."""

    def loss(w, h, batch):
        return train_loss(w, h | {"decay": jax.lax.stop_gradient(h["decay"])}, batch) + 0.01 * h[
            "decay"
        ] * jnp.sum(w)

    report = check(unrolled(), losses=gradhpo.LossFunctions(loss, val_loss))
    assert report.detached == ()
    assert report.finite_differences["['decay']"].contradicts
    assert not report.finite_differences["['shift']"].contradicts
    one_finding(report, "['decay']", "cut off")


def test_wrong_custom_rule():
    @jax.custom_jvp
    def identity(x):
        return x

    identity.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))
    reversed_ = lambda h: h | {"shift": identity(h["shift"])}
    losses = gradhpo.LossFunctions(lambda w, h, batch: train_loss(w, reversed_(h), batch), val_loss)
    one_finding(check(unrolled(), losses=losses), "['shift']", "custom derivative rule is wrong")


def squares(w, h, batch):
    return jnp.sum((w - h["shift"]) ** 2)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_nan_of_adam(dtype):
    """The last feature is 0 in every example, and so is its gradient."""
    x, y = TRAIN
    case = {"train_batch": (x.at[:, 3].set(0), y), "hyperparams": {"shift": jnp.zeros(4)}}
    loss = lambda w, h, batch: error(w - h["shift"], batch)
    case |= {"losses": gradhpo.LossFunctions(loss, val_loss), "dtype": dtype}
    for eps_root, healthy in {0.0: False, 1e-16: True}.items():
        optimizer = unrolled(relaxed(optax.adam(0.1, eps_root=eps_root)))
        report, g = check_and_take(optimizer, **case)
        assert is_finite(g) == healthy == report.healthy, report
        if not healthy:
            assert report.nonfinite.inner_step == 5
            one_finding(report, "inner step 5", "eps_root=1e-16", "training gradient")


@pytest.mark.thorough
def test_nan_in_the_data():
    x, y = TRAIN
    stack = gradhpo.BatchStack((jnp.stack([x] * 6), jnp.stack([y] * 6).at[3, 2].set(jnp.nan)))
    report = check(unrolled(), train_batch=stack)
    assert report.nonfinite.inner_step == 3
    one_finding(report, "the training loss at inner step 3", "its leaf [1]")
    report = check(unrolled(), val_batch=(VAL[0].at[0, 0].set(jnp.inf), VAL[1]))
    assert report.nonfinite.inner_step is None
    one_finding(report, "the validation loss", "its leaf [0]")


@pytest.mark.thorough
def test_nan_of_a_second_derivative():
    """A power of 1.5 has no second derivative at 0, where the first parameter starts."""
    power = lambda w, h, batch: jnp.abs(w[0] - 1 - h["shift"][0]) ** 1.5
    losses = gradhpo.LossFunctions(lambda *a: train_loss(*a) + power(*a), val_loss)
    report, g = check_and_take(unrolled(), losses=losses)
    assert not is_finite(g)
    assert report.nonfinite.inner_step == 0
    one_finding(report, "the second derivative of the training loss", "inner step 0")


@pytest.mark.thorough
def test_nan_of_the_method_alone():
    """Greedy takes validation gradients along the way: here of a norm that is 0 after one step."""
    straight = relaxed(optax.sgd(0.5))  # to h in one step
    norm = lambda w, h, batch: jnp.sqrt(jnp.sum((w - jnp.arange(4.0)) ** 2))
    loss = lambda w, h, batch: jnp.sum((w - batch * h["shift"]) ** 2)
    losses = gradhpo.LossFunctions(loss, norm)
    hyperparams = {"shift": jnp.arange(4.0)}
    batches = gradhpo.BatchStack(jnp.array([1.0, 2.0]))
    for make, healthy in ((gradhpo.GreedyOptimizer, False), (gradhpo.UnrolledOptimizer, True)):
        optimizer = make(straight, unroll_steps=2)
        report, g = check_and_take(
            optimizer, losses=losses, hyperparams=hyperparams, train_batch=batches
        )
        assert is_finite(g) == healthy == (report.nonfinite is None)
    report = check(gradhpo.T1T2Optimizer(SGD, perturb="hyperparams", epsilon=1e-18))
    assert "epsilon=1e-18 is too small" in report.nonfinite.suspect
    assert report.nonfinite.leaf == "['decay']"


@pytest.mark.thorough
def test_no_false_alarm_of_nan():
    """A non-finite intermediate value without effect is not a fault."""
    x, y = TRAIN
    masked = lambda w, h, batch: (
        jnp.mean(jnp.where(jnp.isnan(batch[1]), 0, batch[0] @ w - jnp.nan_to_num(batch[1])) ** 2)
        + jnp.exp(h["decay"]) * jnp.sum(jnp.cosh(w - h["shift"]))
    )
    losses = gradhpo.LossFunctions(masked, val_loss)
    assert check(unrolled(), train_batch=(x, y.at[2].set(jnp.nan)), losses=losses).healthy
    # First order never takes Adam's derivative, which is not finite.
    direct = lambda w, h, batch: error(w, batch) + jnp.sum(h["shift"] ** 2)
    losses = gradhpo.LossFunctions(squares, direct)
    hyperparams = {"shift": jnp.array([1.0, 0.0, 1.0, 0.0])}
    first_order = gradhpo.FOOptimizer(relaxed(optax.adam(0.1)))
    report, _ = check_and_take(first_order, losses=losses, hyperparams=hyperparams)
    assert report.healthy, report
    assert "though not this estimate" in str(report)


@pytest.mark.thorough
def test_masks_of_infinities_in_the_parameters():
    """They do not change, and hide nothing."""
    masked = lambda w, h, batch: train_loss(w["w"], h, batch) + 0 * jnp.sum(jnp.exp(w["mask"]))
    losses = gradhpo.LossFunctions(masked, lambda w, h, batch: val_loss(w["w"], h, batch))
    params = {"w": jnp.ones(4), "mask": jnp.array([0.0, -jnp.inf])}
    uphill = lambda w, h, batch: w | {"w": w["w"] + 0.05 * jax.grad(masked)(w, h, batch)["w"]}
    for optimizer, healthy in (
        (unrolled(), True),
        (gradhpo.UnrolledOptimizer(update_fn=uphill, unroll_steps=4), False),
    ):
        state = optimizer.init(params, HYPERPARAMS)
        report = gradhpo.check_hypergradient(optimizer, state, TRAIN, VAL, losses)
        assert report.healthy == healthy, report
        assert report.uphill_share == (not healthy)
        assert report.metasmoothness > 0.9


@pytest.mark.thorough
def test_momentum_may_go_uphill_for_a_while():
    """The rule is not to blame, only its memory: heavy balls overshoot."""
    optimizer = unrolled(relaxed(optax.sgd(0.05, momentum=0.95)), steps=4)
    loss = lambda w, h, batch: jnp.sum((w - h["shift"]) ** 2) + 0 * h["decay"]
    losses = gradhpo.LossFunctions(loss, val_loss)
    state = optimizer.init(jnp.ones(4), HYPERPARAMS)
    state = state.update(params=jnp.full(4, -0.1), inner_opt_state=jax.tree.map(
        lambda x: x + 5 if x.shape else x, state.inner_opt_state
    ))  # fmt: skip
    report = gradhpo.check_hypergradient(optimizer, state, TRAIN, VAL, losses)
    assert report.uphill_share == 0


@pytest.mark.thorough
def test_differences_near_the_edge_of_a_domain():
    """Steps larger than the hyperparameter itself give NaN; smaller ones still work."""
    frozen = jax.lax.stop_gradient
    loss = lambda w, h, batch: jnp.sum((w - jnp.sqrt(frozen(h))) ** 2) + h * jnp.sum(w)
    losses = gradhpo.LossFunctions(loss, val_loss)
    optimizer = unrolled()
    state = optimizer.init(jnp.ones(4), jnp.asarray(5e-4))
    report = gradhpo.check_hypergradient(optimizer, state, TRAIN, VAL, losses, step_size=1e-5)
    one_finding(report, "cut off")


def test_differences_that_contradict_one_another_vouch_for_nothing():
    """Training that jumps at every scale: a fast, detached sine plus a smooth part."""
    loss = lambda w, h, batch: (
        train_loss(w, h, batch)
        + 0.1 * jax.lax.stop_gradient(jnp.sin(1.2345e7 * h["decay"])) * jnp.sum(w)
    )
    report = check(unrolled(), losses=gradhpo.LossFunctions(loss, val_loss))
    assert report.finite_differences["['decay']"].erratic
    assert not report.finite_differences["['shift']"].erratic
    assert "nothing confirms its derivative" in report.findings[0]
    assert not report.healthy


@pytest.mark.thorough
def test_a_loss_in_float32_is_no_contradiction():
    rounded = lambda w, h, batch: val_loss(w, h, batch).astype(jnp.float32)
    tiny = lambda w, h, batch: (
        error(w, batch) + jnp.exp(h["decay"] - 7) * jnp.sum(jnp.cos(w - 1e-3 * h["shift"]))
    )
    report = check(unrolled(), losses=gradhpo.LossFunctions(tiny, rounded))
    assert not any("detached" in text for text in report.findings), report


def test_divergence():
    report = check(unrolled(relaxed(optax.sgd(1e9)), steps=40))
    assert 0 < report.nonfinite.inner_step < 40
    assert "training that diverges" in report.findings[0] or "left its range" in report.findings[0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("epsilon", "word"), [(1.0, "epsilon is too large"), (1e-15, "epsilon is too small (rounding)")]
)
def test_step_of_finite_differences(epsilon, word):
    t1t2 = gradhpo.T1T2Optimizer(SGD, inner_steps=2, epsilon=epsilon)
    report = check(t1t2)
    one_finding(report, word)
    assert report.step_error.halved > 0.01


def test_good_step_of_finite_differences():
    report = check(gradhpo.T1T2Optimizer(SGD, inner_steps=2))
    assert report.healthy, report
    # Central differences: the error falls by 10^4 with a hundredth of the step.
    ratio = report.step_error.halved / report.step_error.much_smaller
    np.testing.assert_allclose(ratio, 1e4, rtol=0.1)


@pytest.mark.thorough
def test_a_saturated_step_is_too_large():
    """Far beyond a sigmoid the differences fall with 1 / epsilon, as rounding grows."""
    weighted = lambda w, h, batch: jax.nn.sigmoid(h["decay"]) * error(w - h["shift"], batch)
    t1t2 = gradhpo.T1T2Optimizer(SGD, perturb="hyperparams", epsilon=50.0)
    report = check(t1t2, losses=gradhpo.LossFunctions(weighted, val_loss))
    assert any("epsilon is too large" in text for text in report.findings)


@pytest.mark.parametrize("steps", quick([2, 60], keep=[60]))
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


def dropped(w, h, batch):
    keep = jax.random.bernoulli(batch[1], 0.5, (4,))
    return train_loss(w * keep.astype(w.dtype), h, batch[0])


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["loss", "inner optimizer"])
def test_random_numbers_are_not_compared(place):
    if place == "loss":
        optimizer, batch = unrolled(steps=2), (TRAIN, jax.random.key(0))
        losses = gradhpo.LossFunctions(dropped, val_loss)
    else:
        optimizer, batch, losses = (
            unrolled(relaxed(optax.noisy_sgd(0.05, key=0)), steps=2),
            TRAIN,
            LOSSES,
        )
    state = optimizer.init(jnp.ones(4), HYPERPARAMS)
    report = gradhpo.check_hypergradient(optimizer, state, batch, VAL, losses)
    assert report.precision is None
    assert "random numbers" in str(report)


@pytest.mark.thorough
def test_what_cannot_be_measured_is_noted(as_a_user_has_it):
    """A loss in float32 for any input; an update without derivatives."""

    def rigid(w, h, batch):
        total, _ = jax.lax.scan(lambda s, x: (s + x, None), jnp.zeros((), jnp.float32), w - h)
        return total**2

    losses = gradhpo.LossFunctions(rigid, lambda w, h, batch: jnp.sum(w**2))
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.05), unroll_steps=3)
    state = optimizer.init(jnp.ones(4), jnp.zeros(4))
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    assert report.precision is None
    assert "the other precision does not run" in report.notes[0]
    assert report.finite_differences["(the whole tree)"].difference != 0

    def opaque(w, h, batch):
        shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
        halve = lambda w, h: np.asarray(0.5 * w + h, w.dtype)
        return jax.pure_callback(halve, shape, w, h, vmap_method="sequential")

    optimizer = gradhpo.T1T2Optimizer(update_fn=opaque, perturb="hyperparams")
    state = optimizer.init(jnp.ones(4), jnp.zeros(4))
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    assert "the exact hypergradient is not available here" in str(report)


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
    """One step to w = f(h): the three training runs are three values of f.

    The first parameter moves on, the second turns back past its start, the third only part of the
    way.
    """
    f = lambda h: jnp.array([1.0, 2.0, 3.0]) * jnp.sin(jnp.array([1.0, 5.0, 6.0]) * h)
    loss = lambda w, h, batch: jnp.sum((w - f(h)) ** 2) / 2
    v, size = np.array([1.0, -1.0, 0.5]), 0.4
    points = [np.asarray(f(jnp.asarray(k * size * v))) for k in range(3)]
    d1, d2 = points[1] - points[0], points[2] - points[1]
    weights = np.abs(d1 + d2) / np.sum(np.abs(d1 + d2))
    expected = np.sign(d1) @ (weights * np.sign(d2))
    assert (d1 * d2 > 0).tolist() == [True, False, False]
    assert (d1 * (d1 + d2) > 0).tolist() == [True, False, True]
    np.testing.assert_allclose(smoothness(loss, size, jnp.asarray(v)), expected, rtol=1e-10)
    # By default the direction of an outer Adam: down the hypergradient, whose signs are +1 here.
    np.testing.assert_allclose(
        smoothness(loss, size), smoothness(loss, size, -jnp.ones(3)), rtol=1e-12
    )
    assert smoothness(loss, 0.01) == pytest.approx(1)
    # Without a finite hypergradient there is no way down.
    start = jnp.ones(3)
    root = lambda w, h, batch: jnp.sum(jnp.sqrt((w - 1) ** 2 + h**2)) + jnp.sum(w**2)
    assert np.isnan(smoothness(root, 0.1, start=start))


def test_metasmoothness_at_its_ends():
    turning = lambda w, h, batch: jnp.sum((w - h * (0.19 - h)) ** 2) / 2
    assert smoothness(turning, 0.1, jnp.ones(3)) == pytest.approx(-1)
    assert np.isnan(
        smoothness(lambda w, h, batch: jnp.sum(w**2) + 0 * jnp.sum(h), 0.1, jnp.ones(3))
    )
    with pytest.raises(ValueError, match="direction does not fit"):
        smoothness(turning, 0.1, jnp.ones(4))


@pytest.mark.thorough
def test_how_far_a_derivative_holds():
    """A ripple of width 1e-5: right at 1e-6, and gone at any useful step."""
    at = HYPERPARAMS["decay"]
    ripple = lambda h: 1e-5 * jnp.sin((h["decay"] - at) / 1e-5)
    rippled = lambda w, h, batch: train_loss(w, h, batch) + 5 * ripple(h) * w[0]
    report = check(unrolled(), losses=gradhpo.LossFunctions(rippled, val_loss))
    found = report.finite_differences
    assert found["['decay']"].width == 1e-6
    assert found["['shift']"].width >= 1e-2
    assert "holds up to" in str(report)
    narrow = next(x for x in report.findings if "only for steps up to 1e-06" in x)
    assert "Kinks (relu, abs)" in narrow  # not a fresh Adam: it has none
    assert "Adam" not in narrow
    adam = optax.adam(0.1).init(jnp.ones(3))
    assert "A fresh Adam does this" in on_narrow_derivative(adam)
    assert "eps_root" in on_jumps(adam)
    assert "eps_root" not in on_jumps(optax.sgd(0.1).init(jnp.ones(3)))


class Block(eqx.Module):
    embedding: Array
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    log_decay: Array

    def __init__(self, key):
        k = jax.random.split(key, 3)
        self.embedding = 0.5 * jax.random.normal(k[0], (27, 16))
        self.attention = eqx.nn.MultiheadAttention(2, 16, use_key_bias=True, key=k[1])
        self.norm = eqx.nn.LayerNorm(16)
        self.mlp = eqx.nn.MLP(16, 27, 32, 1, jax.nn.gelu, key=k[2])
        self.log_decay = jnp.array(-8.0)

    def __call__(self, letters):
        x = self.embedding[letters]
        normed = jax.vmap(self.norm)(x)
        x = x + self.attention(normed, normed, normed, mask=jnp.tril(jnp.ones((8, 8), bool)))
        return jax.vmap(self.mlp)(x)


@pytest.mark.slow
def test_a_fresh_adam_in_a_transformer_holds_for_tiny_steps_and_a_warm_one_for_larger(
    as_a_user_has_it,
):
    """Letters of the Zen of Python, as described in docs/how_to/fixed.md."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    letters = [c for c in codecs.decode(this.s, "rot13").lower() if c.isalpha() or c == " "]
    codes = np.array([0 if c == " " else ord(c) - 96 for c in letters])
    windows = np.lib.stride_tricks.sliding_window_view(codes, 9)
    batches = windows[:400], windows[410:550]

    def error(model, letters):
        logits = jax.vmap(model)(letters[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, letters[:, 1:]))

    def penalised(model, letters):
        weights = eqx.filter(model, eqx.is_inexact_array)
        weights = eqx.tree_at(lambda m: m.log_decay, weights, None)
        return error(model, letters) + jnp.exp(model.log_decay) * gradhpo.tree_l2_norm(weights) ** 2

    parts = gradhpo.partition(Block(jax.random.key(0)), lambda m: m.log_decay)
    losses = gradhpo.LossFunctions(gradhpo.model_loss(penalised), gradhpo.model_loss(error))
    adam = optax.adam(3e-3, eps_root=1e-16)
    fixed, exact = gradhpo.FixedOptimizer(adam), gradhpo.UnrolledOptimizer(adam, unroll_steps=10)
    fresh = fixed.init(*parts)
    warm, _ = gradhpo.run(fixed, fresh, losses, *batches, num_steps=30, progress=False)
    width = {}
    for name, state in (("fresh", exact.init(*parts)), ("warm", exact.adopt(warm))):
        report = gradhpo.check_hypergradient(exact, state, *batches, losses)
        [found] = report.finite_differences.values()
        width[name] = found.width
    assert width["fresh"] <= 1e-4
    assert width["warm"] >= 1e-2
