"""The verdict of `check_hypergradient`, and its numbers, on problems with known answers."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import relaxed
from scipy.stats import spearmanr

import gradhpo
from gradhpo.diagnostics.nearby import DIRECTIONS, NEIGHBOURS, REDRAWS, Nearby, _one_bit_on
from gradhpo.diagnostics.trust import NOT_TRUSTED, TRUSTED, Trust, judged


FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
TARGETS = FEATURES @ jnp.array([1.0, -1.0, 0.5]) + jnp.sin(7 * jnp.arange(12.0))
VAL = (FEATURES[:6] + 0.3, TARGETS[:6])
SGD = relaxed(optax.sgd(0.05))


def error(w, weights, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def weighted(w, weights, batch):
    (x, y), index = batch
    return jnp.mean(weights[index] * (x @ w - y) ** 2)


LOSSES = gradhpo.LossFunctions(weighted, error)
ROWS = np.random.default_rng(1).permuted(np.tile(np.arange(12), (5, 1)), axis=1)[:, :4]
BATCHES = gradhpo.BatchStack(
    ((FEATURES[ROWS], TARGETS[ROWS]), jnp.asarray(ROWS, jnp.int32)),
)
LEAVE_OUT = lambda key, weights: jnp.where(jax.random.permutation(key, 12) >= 2, weights, 0)


def check(losses=LOSSES, batches=BATCHES, inner=SGD, make=None, dtype=None, **settings):
    """The report on the example weights of a small regression."""
    make = gradhpo.UnrolledOptimizer if make is None else make
    optimizer = make(inner, unroll_steps=5)
    given = jnp.zeros(3), jnp.ones(12), batches, VAL
    if dtype is not None:
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        given = jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, given)
    settings = {"perturb": LEAVE_OUT} | settings
    state = optimizer.init(*given[:2])
    return gradhpo.check_hypergradient(optimizer, state, *given[2:], losses, **settings)


def trained(weights, batches=BATCHES):
    """Parameters, training losses and updates by a plain loop."""
    w, losses, updates = jnp.zeros(3), [], []
    for t in range(5):
        loss, gradient = jax.value_and_grad(weighted)(w, weights, batches.at(t))
        losses.append(loss)
        updates.append(0.05 * gradient)
        w = w - 0.05 * gradient
    return w, losses, updates


@jax.jit
def final(weights, batches=BATCHES):
    return error(trained(weights, batches)[0], weights, VAL)


hypergradient = jax.jit(jax.grad(final))


def not_trusted(report, *words):
    assert report.verdict == "not trusted"
    assert report.trust < NOT_TRUSTED
    assert any(all(word in reason for word in words) for reason in report.reasons), report
    assert str(report).splitlines()[0].endswith(f"not trusted ({report.trust:.2f})")


@pytest.mark.thorough
def test_a_trusted_one_and_each_number_by_its_formula():
    report = check()
    measured = report.trusting
    assert report.verdict == "trusted", report
    assert report.reasons == ()
    assert str(report).startswith("UnrolledOptimizer after 5 inner steps: trusted (")

    ones = jnp.ones(12)
    gradient = hypergradient(ones)
    moved = lambda k: LEAVE_OUT(jax.random.fold_in(jax.random.key(0), k), ones)
    near = [hypergradient(moved(k)) for k in range(NEIGHBOURS)]
    keys = jax.random.split(jax.random.key(1), DIRECTIONS)
    deltas = np.asarray(jax.vmap(LEAVE_OUT, (0, None))(keys, ones)) - 1
    rank = lambda a, b: spearmanr(deltas @ np.asarray(a), deltas @ np.asarray(b))[0]
    # Ties and rounding: products of equal sets are summed in another order.
    close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6)
    close(measured.agreement["perturbed"], np.mean([rank(gradient, g) for g in near]))
    for name in ("exact", "rounded", "repeated"):
        close(measured.agreement[name], 1.0)
    pairs = [
        (gradient @ (moved(k) - ones), final(moved(k)) - final(ones)) for k in range(NEIGHBOURS)
    ]
    close(measured.changes, np.asarray(pairs))

    shuffled = []
    for k in range(REDRAWS):
        order = np.random.default_rng(k + 1).permutation(5)
        shuffled.append(jax.tree.map(lambda x, order=order: x[order], BATCHES))
    draws = np.stack([gradient, *(hypergradient(ones, other) for other in shuffled)])
    noise = np.std([final(ones), *(final(ones, other) for other in shuffled)], ddof=1)
    signal = np.std(deltas @ np.asarray(gradient))
    among = np.mean([rank(gradient, g) for g in draws[1:]])
    close(measured.agreement["redrawn"], among * signal / math.hypot(signal, noise))
    variance, mean = np.sum(np.var(draws, axis=0, ddof=1)), draws.mean(axis=0)
    close(measured.signal_to_noise, math.sqrt((mean @ mean - variance / len(draws)) / variance))

    _, losses, updates = trained(ones)
    close((measured.first_loss, measured.last_loss), (losses[0], losses[-1]))
    close(measured.growth, jnp.linalg.norm(updates[-1]) / jnp.linalg.norm(updates[0]))
    assert report.trust == min(
        measured.agreement[name] for name in ("perturbed", "exact", "rounded", "repeated")
    )


@pytest.mark.thorough
def test_without_a_perturbation_it_is_one_of_the_step_size():
    report = check(perturb=None, step_size=0.2)
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 1)[0]
    delta = 0.2 * jax.random.normal(key, (12,))
    predicted, true = report.trusting.changes[0]
    np.testing.assert_allclose(true, final(1 + delta) - final(jnp.ones(12)), rtol=1e-10)
    np.testing.assert_allclose(predicted, hypergradient(jnp.ones(12)) @ delta, rtol=1e-10)


@pytest.mark.thorough
def test_chaotic_training_is_not_trusted():
    """w <- 4 h w (1 - w): after 150 steps every neighbour has a different derivative."""
    loss = lambda w, h, batch: jnp.sum(w**2 / 2 - 4 * h * (w**2 / 2 - w**3 / 3))
    losses = gradhpo.LossFunctions(loss, lambda w, h, batch: jnp.sum(w))
    optimizer = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(1.0)), unroll_steps=150)
    state = optimizer.init(jnp.full(8, 0.3), jnp.linspace(0.93, 0.97, 8))
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses, step_size=0.01)
    not_trusted(report, "after a perturbation of the hyperparameters", "smaller")
    # A step loses half a bit, and float64 has 52.
    assert report.trusting.agreement["rounded"] < 0.99


@pytest.mark.thorough
def test_training_that_explodes_is_not_trusted():
    """Yet its hypergradient is the derivative of the whole training."""
    report = check(inner=relaxed(optax.sgd(5.0)))
    assert report.trusting.explodes
    assert report.trust == 0
    not_trusted(report, "training explodes", "a smaller inner learning rate")


@pytest.mark.thorough
def test_a_hypergradient_that_is_not_finite():
    adam = relaxed(optax.adam(0.1))
    (x, y), index = BATCHES.batches
    dead = gradhpo.BatchStack(((x.at[..., 0].set(0), y), index))
    report = check(inner=adam, batches=dead)
    not_trusted(report, "not finite", "eps_root")
    assert report.trust == 0
    assert report.trusting.agreement == {}  # there was nothing to compare


@pytest.mark.thorough
def test_exact_zeros():
    cut = lambda w, weights, batch: weighted(w, jax.lax.stop_gradient(weights), batch)
    report = check(losses=gradhpo.LossFunctions(cut, error))
    not_trusted(report, "no derivative")
    assert report.trust == 0
    assert report.is_zero


@pytest.mark.thorough
def test_an_estimator_that_sees_nothing():
    direct = gradhpo.FOOptimizer(SGD)
    state = direct.init(jnp.zeros(3), jnp.ones(12))
    report = gradhpo.check_hypergradient(direct, state, BATCHES, VAL, LOSSES)
    not_trusted(report, "sees none of the hyperparameters")


@pytest.mark.thorough
def test_an_estimator_far_from_the_exact_one():
    """The agreement with the exact one matches its formula."""
    report = check(make=lambda inner, unroll_steps: gradhpo.OneStepOptimizer(inner))
    assert report.trusting.agreement["exact"] < TRUSTED
    keys = jax.random.split(jax.random.key(1), DIRECTIONS)
    deltas = np.asarray(jax.vmap(LEAVE_OUT, (0, None))(keys, jnp.ones(12))) - 1
    before = jnp.zeros(3)
    for t in range(4):
        before = before - 0.05 * jax.grad(weighted)(before, jnp.ones(12), BATCHES.at(t))
    last = lambda weights: error(
        before - 0.05 * jax.grad(weighted)(before, weights, BATCHES.at(4)), weights, VAL
    )
    products = deltas @ np.asarray(jax.grad(last)(jnp.ones(12)))
    exact = deltas @ np.asarray(hypergradient(jnp.ones(12)))
    found = report.trusting.agreement["exact"]
    np.testing.assert_allclose(found, spearmanr(products, exact)[0], atol=1e-3)  # ties
    assert any("compare_hypergradients" in reason for reason in report.reasons)


def dropped(w, weights, batch):
    """Every example of a batch is dropped with probability .7."""
    ((x, y), index), key = batch
    keep = jax.random.bernoulli(key, 0.3, (4,))
    return jnp.mean(jnp.where(keep, weights[index] * (x @ w - y) ** 2, 0))


RANDOM = gradhpo.BatchStack((BATCHES.batches, jax.random.split(jax.random.key(2), 5)))
DROPOUT = gradhpo.LossFunctions(dropped, error)


@pytest.mark.thorough
@pytest.mark.parametrize(("replayed", "verdict"), [(None, "doubtful"), (True, "trusted")])
def test_dropout_is_trusted_if_a_retraining_repeats_it(replayed, verdict):
    report = check(losses=DROPOUT, batches=RANDOM, replayed=replayed)
    assert report.trusting.agreement["other keys"] < TRUSTED
    assert report.verdict == verdict, report
    assert any("replayed=True" in reason for reason in report.reasons) == (replayed is None)


@pytest.mark.thorough
def test_live_dropout_counts():
    report = check(losses=DROPOUT, batches=RANDOM, replayed=False)
    assert report.trust == max(0.0, report.trusting.agreement["redrawn"])
    not_trusted(report, "other random keys", "average hypergradients")


@pytest.mark.thorough
def test_random_numbers_from_elsewhere():
    """Legacy keys in the batches look like ordinary numbers: whether they repeat is unknown."""
    legacy = gradhpo.BatchStack((BATCHES.batches, jax.random.split(jax.random.PRNGKey(2), 5)))
    report = check(losses=DROPOUT, batches=legacy)
    assert report.verdict == "doubtful"
    assert any("keys that are not in the batches" in reason for reason in report.reasons)
    assert check(losses=DROPOUT, batches=legacy, replayed=True).verdict == "trusted"
    # Their effect cannot be counted either.
    live = check(losses=DROPOUT, batches=legacy, replayed=False)
    assert live.verdict != "trusted"
    assert any("keys that are not in the batches" in reason for reason in live.reasons)


@pytest.mark.thorough
def test_a_loss_with_steps_is_found_out():
    """Its derivative has the wrong sign, consistently everywhere."""

    def steps(w, weights, batch):
        of_batch, size = error(w, weights, batch), 0.01
        return 0.01 * of_batch - size * jnp.round(of_batch / size)

    fewer = lambda key, weights: jnp.where(LEAVE_OUT(key, weights) == 0, 0.5, weights)
    report = check(losses=gradhpo.LossFunctions(weighted, steps), perturb=fewer)
    pairs = np.asarray(report.trusting.changes)
    assert np.sum(pairs[:, 0] * pairs[:, 1]) < 0
    assert report.trusting.followed < 0
    assert report.verdict != "trusted"
    assert any("the loss has steps" in reason for reason in report.reasons)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_parameter_has_a_last_bit(dtype):
    """Even 0: linear models start there, and training amplifies its rounding like any other."""
    params = {"w": jnp.array([0.0, 4.0, -1.0, -jnp.inf], dtype), "bias": jnp.zeros(3, dtype)}
    state = gradhpo.UnrolledOptimizer(SGD).init(params, jnp.ones(2))
    moved = _one_bit_on(state).params
    eps = float(jnp.finfo(dtype).eps)
    by = np.abs(np.asarray(moved["w"], np.float64)[:3] - [0.0, 4.0, -1.0])
    assert by[0] == 4 * eps
    assert by[1] in (4 * eps, 2 * eps)  # its neighbour towards 0 is nearer
    assert by[2] in (eps, eps / 2)
    assert moved["w"][3] == -jnp.inf
    np.testing.assert_array_equal(np.abs(np.asarray(moved["bias"], np.float64)), eps)


@pytest.mark.thorough
def test_one_number_has_a_scale():
    """For one number, only the sign orders changes: a bad estimate with the right sign passes."""

    def decayed(w, decay, batch):
        return error(w, None, batch) + decay * jnp.sum(w**2)

    def of(**settings):
        optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=40, **settings)
        stack = gradhpo.BatchStack(jax.tree.map(lambda x: x[None].repeat(40, 0), VAL))
        state = optimizer.init(jnp.zeros(3), jnp.array(0.1))
        losses = gradhpo.LossFunctions(decayed, lambda w, h, batch: error(w, h, batch))
        return gradhpo.check_hypergradient(optimizer, state, stack, VAL, losses, step_size=0.01)

    exact, last_step = of(), of(truncation=1)
    assert exact.trusting.scale == pytest.approx(1, abs=0.2)
    assert exact.verdict == "trusted", exact
    assert last_step.trusting.agreement["exact"] == 1  # the sign is right
    assert last_step.trusting.scale < 0.5
    assert last_step.verdict == "doubtful"
    [reason] = last_step.reasons
    assert "move one number" in reason


@pytest.mark.thorough
def test_perturbations_of_what_it_does_not_see():
    """One reason, instead of agreements between zeros."""
    loss = lambda w, h, batch: weighted(w, h["weights"], batch)
    seen = lambda w, h, batch: error(w, None, batch) + jnp.sum(h["seen"] ** 2)
    optimizer = gradhpo.FOOptimizer(SGD)
    state = optimizer.init(jnp.zeros(3), {"weights": jnp.ones(12), "seen": jnp.ones(2)})
    report = gradhpo.check_hypergradient(
        optimizer, state, BATCHES.at(0), VAL, gradhpo.LossFunctions(loss, seen),
        perturb=lambda key, h: h | {"weights": LEAVE_OUT(key, h["weights"])},
    )  # fmt: skip
    assert report.verdict == "not trusted"
    assert any("same change for all perturbations" in reason for reason in report.reasons)
    assert not any("nan" in reason for reason in report.reasons)


@pytest.mark.thorough
def test_a_call_that_differs_from_itself():
    random = np.random.default_rng(0)

    def noisy(w, weights, batch):
        shape = jax.ShapeDtypeStruct((), w.dtype)
        noise = jax.pure_callback(lambda: np.asarray(random.normal(), w.dtype), shape)
        return weighted(w, weights * noise, batch)

    report = check(losses=gradhpo.LossFunctions(noisy, error))
    assert report.trusting.agreement["repeated"] < TRUSTED
    assert any("outside of JAX" in reason for reason in report.reasons)


@pytest.mark.thorough
def test_precision_of_a_narrow_state():
    """In bfloat16 the agreement with float64 compares the two estimates."""
    rough = check(dtype=jnp.bfloat16, perturb=None)
    fine = check(dtype=jnp.float32, perturb=None)
    assert rough.trusting.agreement["float64"] < fine.trusting.agreement["float64"]
    assert fine.trusting.agreement["float64"] > 0.9999
    assert "float64" not in check(perturb=None).trusting.agreement


@pytest.mark.thorough
def test_half_precision_inside_of_a_loss_is_not_called_healthy():
    def rough(w, weights, batch):
        ((x, y), index), half = batch, jnp.bfloat16
        made = (x.astype(half) @ w.astype(half)).astype(w.dtype)
        return jnp.mean(weights[index] * (made - y) ** 2)

    report = check(losses=gradhpo.LossFunctions(rough, error))
    assert report.verdict != "trusted"
    assert any("half precision" in reason for reason in report.reasons)


@pytest.mark.thorough
def test_what_cannot_be_measured_is_a_reason(as_a_user_has_it):
    def rigid(w, h, batch):
        total, _ = jax.lax.scan(lambda s, x: (s + x, None), jnp.zeros((), jnp.float32), w - h)
        return total**2

    losses = gradhpo.LossFunctions(rigid, lambda w, h, batch: jnp.sum(w**2))
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.05), unroll_steps=3)
    report = gradhpo.check_hypergradient(
        optimizer, optimizer.init(jnp.ones(4), jnp.zeros(4)), None, None, losses, step_size=1e-3
    )
    assert report.verdict == "doubtful", report
    assert any("float64 does not run" in reason for reason in report.reasons)


TRUSTWORTHY = Trust(
    agreement={"perturbed": 0.98, "exact": 1.0},
    changes=(),
    followed=1.0,
    scale=float("nan"),
    signal_to_noise=1.0,
    first_loss=1.0,
    last_loss=0.5,
    growth=1.0,
    replayed=None,
    unmeasured=(),
    leaves={},
)


@pytest.mark.parametrize(
    ("change", "value", "word"),
    [
        ({}, 0.98, None),
        ({"agreement": {"perturbed": 0.3, "exact": 1.0}}, 0.3, "agree by only 0.3 after"),
        ({"agreement": {"perturbed": -0.3}}, 0.0, "by only -0.3 "),
        ({"agreement": {"perturbed": math.nan}}, 0.0, "by only nan"),
        ({"agreement": {}}, 0.0, None),
        ({"last_loss": 102.0, "growth": 11.0}, 0.0, "explodes"),
        ({"last_loss": 102.0, "growth": 9.0}, 0.98, "makes its loss worse"),
        ({"last_loss": math.inf}, 0.0, "explodes"),
        ({"last_loss": math.nan}, 0.0, "explodes"),
        ({"last_loss": 2.5}, 0.98, "makes its loss worse"),
        ({"last_loss": 2.5, "growth": 3.0}, 0.98, "updates grow 3-fold"),
        ({"growth": 101.0}, 0.98, None),  # a rate that warms up
        ({"first_loss": math.nan, "last_loss": math.nan, "growth": math.nan}, 0.98, None),
        ({"unmeasured": ("this is not known",)}, 0.98, "this is not known"),
    ],
)
def test_the_number_and_its_reasons(change, value, word):
    trust = dataclasses.replace(TRUSTWORTHY, **change)
    assert trust.value == pytest.approx(value)
    assert bool(trust.doubts) == (word is not None)
    assert word is None or any(word in doubt for doubt in trust.doubts)
    assert "changes, predicted / true" in str(trust)


@pytest.mark.parametrize(
    ("factors", "leaf"),
    [
        ((1, -1, 1), "['b']"),
        ((0, 1, 1), "['a']"),  # unseen
        ((-1, -1, 1), None),  # equally wrong: not for the larger effect of one
        ((-1, 1, -1), "['a']"),  # the other wrong one has no effect
        ((1, 1, -1), None),  # a part without an effect
        ((2, 2, 2), None),  # too long in all parts: the order is right
        ((1, math.inf, 1), "['b']"),
        ((1, 1e30, 1), "['b']"),  # the others are below its last bit
        ((math.inf, math.inf, 1), None),  # neither alone
    ],
)
def test_the_leaf_behind_a_disagreement(factors, leaf):
    own = np.random.default_rng(0).normal(size=(DIRECTIONS, 3)) * [2.0, 1.0, 1e-4]
    parts = {
        "own": [own],
        "best": [own],
        "exact": [own * factors],
        "perturbed": [own, own * factors],
    }
    nearby = Nearby({}, {}, [], parts, ["['a']", "['b']", "['c']"], 3, 1e-16)
    assert nearby.leaf_behind("exact", TRUSTED) == leaf
    assert nearby.leaf_behind("perturbed", TRUSTED) == leaf
    np.testing.assert_array_equal(nearby.predictions["own"][0], own.sum(axis=1))
    alone = dataclasses.replace(nearby, parts={k: [-x[:, :1] for x in v] for k, v in parts.items()})
    assert dataclasses.replace(alone, leaves=["['a']"]).leaf_behind("exact", TRUSTED) is None
    trust = dataclasses.replace(TRUSTWORTHY, agreement={"exact": 0.3}, leaves={"exact": leaf})
    [reason] = trust.doubts
    assert ("(look at" in reason) == (leaf is not None)
    assert leaf is None or f"of the same steps (look at {leaf} first): use an" in reason


def nearby_of(own, others, own_loss=0.0, losses=(0.0,)):
    """With the products of both `[perturbations, leaves]`, under every name; losses redrawn."""
    one = [np.ones(1)]
    return Nearby(
        {"own": one, "perturbed": one, "redrawn": one * 3},
        {"own": [own_loss], "perturbed": [own_loss + 1.0], "redrawn": list(losses)},
        one,
        {"own": [own], "best": [own], "perturbed": [own], "exact": [others], "redrawn": [others]},
        [f"{i}" for i in range(own.shape[1])],
        2,
        1e-16,
    )


@pytest.mark.parametrize("num_leaves", [2, 8])
@pytest.mark.parametrize("noise", [0.28, 0.5, 1.0, 10.0])  # correlations of 0.96 to 0.1
def test_no_leaf_is_behind_an_error_of_all(num_leaves, noise):
    behind, worse = [], []
    for seed in range(20):
        own, error = np.random.default_rng(seed).normal(size=(2, DIRECTIONS, num_leaves))
        behind.append(nearby_of(own, own + noise * error).leaf_behind("exact", TRUSTED))
        error[:, 1] *= 10 * num_leaves
        worse.append(nearby_of(own, own + noise * error).leaf_behind("exact", TRUSTED))
    assert behind == [None] * 20
    # Among others that are noise as well, not even the worst leaf is alone.
    assert worse == [None if noise > 1 else "1"] * 20


def test_two_leaves_of_the_wrong_sign_are_both_behind():
    own = np.random.default_rng(0).normal(size=(DIRECTIONS, 2))
    for sizes in ([1, 1], [1, 3]):
        assert nearby_of(own * sizes, -own * sizes).leaf_behind("exact", TRUSTED) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_leaf_is_behind_what_is_not_finite_in_the_hypergradient_itself(bad):
    own = np.random.default_rng(0).normal(size=(DIRECTIONS, 2))
    broken = np.where([True, False], bad, own)
    assert nearby_of(broken, own).leaf_behind("exact", TRUSTED) is None
    assert nearby_of(own, broken).leaf_behind("exact", TRUSTED) == "0"


def test_no_leaf_is_behind_noise_of_the_loss():
    own, error = np.random.default_rng(0).normal(size=(2, DIRECTIONS, 2))
    for size, spread, leaf in ((0, 10, None), (0.4, 10, None), (0.4, 0, "1"), (3, 0.1, "1")):
        other = own + error * [0, size]
        nearby = nearby_of(own, other, 0.0, [-spread, 0.0, spread])
        trust = judged(nearby, None, False, ())
        assert trust.agreement["redrawn"] < TRUSTED
        assert trust.leaves["redrawn"] == leaf
        # What a retraining repeats is no reason, and costs nothing.
        assert "redrawn" not in judged(nearby, None, True, ()).leaves


def test_two_thousand_leaves_cost_little():
    own = np.random.default_rng(0).normal(size=(DIRECTIONS, 2000))
    nearby = nearby_of(own, own * np.where(np.arange(2000) == 700, -100, 1))
    began = time.process_time()
    assert nearby.leaf_behind("exact", TRUSTED) == "700"
    # 0.6 s on a slow core. Sums over all leaves for each of them take 7 s.
    assert time.process_time() - began < 4


@pytest.mark.thorough
def test_a_check_names_the_leaf_that_its_optimizer_does_not_see():
    loss = lambda w, h, batch: weighted(w, h["weights"], batch)
    seen = lambda w, h, batch: error(w, None, batch) + 0.01 * jnp.sum(h["seen"] ** 2)
    optimizer = gradhpo.FOOptimizer(SGD)
    state = optimizer.init(jnp.zeros(3), {"weights": jnp.ones(12), "seen": jnp.ones(2)})
    report = gradhpo.check_hypergradient(
        optimizer, state, BATCHES.at(0), VAL, gradhpo.LossFunctions(loss, seen)
    )
    assert report.trusting.leaves == {"exact": "['weights']"}, report
    assert any("(look at ['weights'] first): use an optimizer" in x for x in report.reasons)


def test_random_keys_count_as_a_retraining_treats_them():
    agreement = {"perturbed": 1.0, "other keys": 0.5, "redrawn": 0.2}
    with_ = lambda replayed: dataclasses.replace(
        TRUSTWORTHY, agreement=agreement, replayed=replayed
    )
    assert [with_(x).value for x in (None, True, False)] == [1.0, 1.0, 0.2]
    assert [len(with_(x).doubts) for x in (None, True, False)] == [1, 0, 1]


def test_bad_perturbations():
    for perturb, message in (
        (lambda key, weights: {"weights": weights}, "must return hyperparameters of the structure"),
        (lambda key, weights: weights[:3], r"expected f64\[12\]"),
        (lambda key, weights: weights, "returns the hyperparameters unchanged"),
    ):
        with pytest.raises(ValueError, match=message):
            check(perturb=perturb)
