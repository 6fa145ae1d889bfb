"""Every setting of the inner optimizer as a hyperparameter, and the ones that are not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from helpers import quick
from problems import mse, relaxed

import gradhpo


STEPS, WINDOW = 12, 4


def problem(key):
    k1, k2, k3 = jax.random.split(key, 3)
    w = {"first": jax.random.normal(k1, (3, 4)) / 2, "last": jax.random.normal(k2, (4, 1)) / 2}
    x = jax.random.normal(k3, (2, 20, 3))
    y = jnp.sin(jnp.sum(x, axis=-1, keepdims=True))
    predict = lambda w, x: jnp.tanh(x @ w["first"]) @ w["last"]
    loss = lambda w, h, batch: jnp.mean((predict(w, batch[0]) - batch[1]) ** 2)
    return w, (x[0], y[0]), (x[1], y[1]), loss


def per_parameter(rates):
    """Gradient descent with a rate for every parameter."""
    scale = lambda rate, g: -jnp.exp(rate) * g
    return optax.stateless(lambda updates, _: jax.tree.map(scale, rates, updates))


def layers(h):
    by_layer = {name: optax.sgd(jnp.exp(rate)) for name, rate in h.items()}
    return optax.partition(by_layer, {"first": "first", "last": "last"})


# name: (hyperparams, inner optimizer)
KINDS = {
    "per layer": ({"first": jnp.asarray(-2.0), "last": jnp.asarray(-1.0)}, layers),
    "per parameter": (
        {"first": jnp.full((3, 4), -2.0), "last": jnp.full((4, 1), -1.5)},
        per_parameter,
    ),
    "schedule": (
        jnp.asarray([-1.0, -2.0]),
        lambda h: optax.sgd(lambda t: jnp.exp(h[0]) / (1 + t * jnp.exp(h[1]))),
    ),
    "windows": (
        {"rates": jnp.asarray([0.3, 0.2, 0.1]), "momenta": jnp.asarray([0.2, 0.5, 0.8])},
        lambda h: optax.inject_hyperparams(optax.sgd)(
            learning_rate=lambda t: h["rates"][t // WINDOW],
            momentum=lambda t: h["momenta"][t // WINDOW],
        ),
    ),
    "AdamW": (
        {
            "rate": jnp.asarray(-3.0), "b1": jnp.asarray(1.0), "b2": jnp.asarray(3.0),
            "eps": jnp.asarray(-6.0), "decay": jnp.asarray(-2.0),
        },
        lambda h: optax.adamw(
            jnp.exp(h["rate"]),
            b1=jax.nn.sigmoid(h["b1"]),
            b2=jax.nn.sigmoid(h["b2"]),
            eps=jnp.exp(h["eps"]),
            eps_root=1e-16,
            weight_decay=jnp.exp(h["decay"]),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", quick(list(KINDS), keep=["schedule"]))
def test_every_setting_has_an_exact_hypergradient(kind, getkey):
    w, train, val, loss = problem(getkey())
    h, inner = KINDS[kind]
    inner_optimizer = lambda h: relaxed(inner(h))
    reverse = gradhpo.UnrolledOptimizer(inner_optimizer, optax.sgd(0.1), unroll_steps=STEPS)
    forward = gradhpo.ForwardModeOptimizer(inner_optimizer, optax.sgd(0.1), unroll_steps=STEPS)
    arguments = (train, val, loss, loss)
    found = reverse.compute_hypergradient(reverse.init(w, h), *arguments)
    other = forward.compute_hypergradient(forward.init(w, h), *arguments)
    exact = gradhpo.finite_difference_hypergradient(reverse, reverse.init(w, h), *arguments)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    size = np.max(np.abs(flat(found)))
    np.testing.assert_allclose(flat(other), flat(found), rtol=1e-9, atol=1e-10 * size)
    np.testing.assert_allclose(flat(found), flat(exact), rtol=1e-5, atol=1e-6 * size)
    assert np.all(flat(found) != 0)


def test_inject_hyperparams_is_named_where_it_freezes_a_value(getkey):
    w, train, val, loss = problem(getkey())
    frozen = lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h, momentum=lambda t: 0.5)
    with pytest.warns(UserWarning, match=r"inject_hyperparams.*as schedules"):
        gradhpo.OneStepOptimizer(frozen, optax.sgd(0.1)).init(w, jnp.asarray(0.1))
    # A number that is not a hyperparameter may be kept.
    constant = lambda h: optax.inject_hyperparams(optax.sgd)(lambda t: h, momentum=0.5)
    optimizer = gradhpo.OneStepOptimizer(lambda h: relaxed(constant(h)), optax.sgd(0.1))
    state = optimizer.init(w, jnp.asarray(0.1))
    assert np.isfinite(optimizer.step(state, train, val, loss, loss).metadata["hypergrad_norm"])


# -- Adam at a gradient of exactly 0 --------------------------------------------------------


def constant_feature(inner):
    """One input is always 0, and the hyperparameter shifts the start: NaN unless guarded."""
    x, y = jnp.asarray([[1.0, 0.0], [2.0, 0.0]]), jnp.asarray([1.0, -1.0])
    train_loss = lambda w, h, batch: jnp.mean((x @ w - y) ** 2) * jnp.exp(h)
    val_loss = lambda w, h, batch: jnp.sum((w - 0.5) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(relaxed(inner), optax.sgd(0.01), unroll_steps=3)
    state = optimizer.init(jnp.zeros(2), jnp.asarray(0.0))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    return gradhpo.run(optimizer, state, losses, None, None, num_steps=12, progress=False)


def test_nan_from_the_square_root_of_adam_is_explained():
    with pytest.warns(RuntimeWarning, match=r"12 of the rejected steps.*eps_root=1e-16"):
        _, history = constant_feature(optax.adam(0.1))
    assert history.stop_reason == "rejected"
    assert np.all(np.isnan(history["hypergrad_norm"]))
    assert np.all(np.isfinite(history["val_loss"]))


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "nadam", "nadamw", "amsgrad"])
def test_eps_root_cures_it(name):
    """Except for optax.radam, whose rectification has no finite derivative in its first steps."""
    _, history = constant_feature(getattr(optax, name)(0.1, eps_root=1e-16))
    assert history["rejected"][-1] == 0
    assert history.stop_reason == "num_steps"


@pytest.mark.parametrize("name", ["adafactor", "rmsprop", "adagrad", "adabelief"])
def test_these_have_no_such_root(name):
    _, history = constant_feature(getattr(optax, name)(0.1))
    assert history["rejected"][-1] == 0


# -- positive, bounded and simplex hyperparameters ---------------------------------------------


@pytest.mark.thorough
def test_paramax_parametrisations_compose(getkey):
    """A positive decay and mixture weights, stored unconstrained, unwrapped in the loss."""
    k1, k2 = jax.random.split(getkey())
    x, y = jax.random.normal(k1, (20, 3)), jax.random.normal(k2, (20,))
    model = {
        "w": jnp.zeros(3),
        "decay": paramax.Parameterize(jnp.exp, jnp.asarray(-2.0)),
        "mixture": paramax.Parameterize(jax.nn.softmax, jnp.zeros(2)),
    }
    params, hyperparams = gradhpo.partition(model, lambda m: (m["decay"], m["mixture"]))
    assert len(jax.tree.leaves(hyperparams)) == 2

    def losses_of(model, batch):
        x, y = batch
        model = paramax.unwrap(model)
        error = x @ model["w"] - y
        both = jnp.stack([jnp.mean(error**2), jnp.mean(jnp.abs(error))])
        return jnp.sum(model["mixture"] * both), model["decay"] * jnp.sum(model["w"] ** 2)

    train_loss = gradhpo.model_loss(lambda model, batch: sum(losses_of(model, batch)))
    val_loss = gradhpo.model_loss(
        lambda model, batch: jnp.mean((batch[0] @ paramax.unwrap(model)["w"] - batch[1]) ** 2)
    )
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.sgd(0.5), unroll_steps=10)
    state = optimizer.init(params, hyperparams)
    arguments = (state, (x[:10], y[:10]), (x[10:], y[10:]), train_loss, val_loss)
    found = optimizer.compute_hypergradient(*arguments)
    exact = gradhpo.finite_difference_hypergradient(optimizer, *arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    for _ in range(5):
        state = optimizer.step(state, *arguments[1:])
    tuned = paramax.unwrap(state.model)
    assert tuned["decay"] > 0
    np.testing.assert_allclose(jnp.sum(tuned["mixture"]), 1.0)
    assert np.isfinite(mse(lambda x: x @ tuned["w"], (x, y)))


# -- what a method cannot see ------------------------------------------------------------------


def test_unseen_leaves_are_named_with_the_methods_that_see_them(getkey):
    w, train, val, loss = problem(getkey())
    decayed = lambda w, h, batch: loss(w, h, batch) + jnp.exp(h["decay"]) * jnp.sum(w["first"] ** 2)
    in_both = lambda w, h, batch: loss(w, h, batch) + h["direct"] ** 2
    inner = lambda h: optax.sgd(jnp.exp(h["rate"]))
    h = {name: jnp.asarray(-2.0) for name in ("rate", "decay", "direct", "nothing")}
    found = {}
    for optimizer in (
        gradhpo.FOOptimizer(inner, optax.sgd(0.1)),
        gradhpo.ImplicitOptimizer(inner, optax.sgd(0.1)),
        gradhpo.OneStepOptimizer(inner, optax.sgd(0.1)),
    ):
        state = optimizer.init(w, h)
        with pytest.warns(UserWarning, match="gives a hypergradient of 0") as said:
            g = optimizer.compute_hypergradient(state, train, val, decayed, in_both)
        found[type(optimizer).__name__] = {str(warning.message) for warning in said}
        assert g["direct"] != 0
        assert g["nothing"] == 0
    first_order = " ".join(found["FOOptimizer"])
    assert "['decay']: the validation loss does not" in first_order
    assert "ImplicitOptimizer, NHGDOptimizer, SOBAOptimizer, Penalty" in first_order
    implicit = " ".join(found["ImplicitOptimizer"])
    assert "['rate']: the optimum of the training loss does not depend on them" in implicit
    assert "GreedyOptimizer, OnlineHypergradientOptimizer (HyperDistill), Unrolled" in implicit
    [said] = found["OneStepOptimizer"]
    assert said.startswith(
        "OneStepOptimizer gives a hypergradient of 0 for hyperparams ['nothing']: neither the "
        "validation loss nor the inner update has a derivative with respect to them"
    )


def test_no_visible_leaf_is_an_error_that_says_who_sees_it(getkey):
    w, train, val, loss = problem(getkey())
    optimizer = gradhpo.ImplicitOptimizer(lambda h: optax.sgd(h), optax.sgd(0.1))
    state = optimizer.init(w, jnp.asarray(0.1))
    with pytest.raises(ValueError, match=r"sees none.*the whole tree.*way to it.*Unrolled"):
        optimizer.compute_hypergradient(state, train, val, loss, loss)


def test_the_starting_point_is_a_hyperparameter_of_those_who_see_the_way():
    start = jnp.asarray([1.0, -2.0])
    train_loss = lambda delta, h, batch: jnp.sum(jnp.cosh(h + delta))
    val_loss = lambda delta, h, batch: jnp.sum((h + delta - 3.0) ** 2)
    exact = gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=5)
    arguments = (exact.init(jnp.zeros(2), start), None, None, train_loss, val_loss)
    found = exact.compute_hypergradient(*arguments)
    differences = gradhpo.finite_difference_hypergradient(exact, *arguments)
    np.testing.assert_allclose(found, differences, rtol=1e-7)
    assert np.all(np.abs(found) > 0.1)


# -- other precisions, and guards -----------------------------------------------------------


def in_half_precision(inner):
    """A feature that is always 0, in float16: NaN unless Adam's eps_root is nonzero in float16."""
    half = lambda *x: jnp.asarray(x, jnp.float16)
    x, y = half([1.0, 0.0], [2.0, 0.0]), half(1.0, -1.0)
    train_loss = lambda w, h, batch: jnp.mean((x @ w - y) ** 2) * jnp.exp(h)
    val_loss = lambda w, h, batch: jnp.sum((w - 0.5) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(relaxed(inner), optax.sgd(0.01), unroll_steps=3)
    state = optimizer.init(half(0.0, 0.0), half(0.0)[0])
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    return gradhpo.run(optimizer, state, losses, None, None, num_steps=12, progress=False)


@pytest.mark.thorough
def test_the_advice_for_float16_is_not_0_there():
    with pytest.warns(
        RuntimeWarning, match=r"float32, cast to float16.*eps_root=1e-4\) is the least"
    ):
        in_half_precision(optax.adam(0.1, eps_root=1e-16))
    _, history = in_half_precision(optax.adam(0.1, eps_root=1e-4))
    assert history["rejected"][-1] == 0


@pytest.mark.parametrize(
    "guard", [lambda x: optax.chain(optax.zero_nans(), x), lambda x: optax.apply_if_finite(x, 5)]
)
def test_a_guard_in_the_inner_optimizer_is_explained(guard):
    with pytest.warns(RuntimeWarning, match=r"optax\.zero_nans.*jnp\.where\(bad, safe, x\)"):
        constant_feature(guard(optax.adam(0.1)))


@pytest.mark.thorough
def test_bfloat16_whose_rounding_hides_the_signal_is_a_finding():
    """Validation errors that nearly cancel: the sign of the hypergradient is lost."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(64, 8)), jnp.bfloat16)
    y = x @ jnp.ones(8, jnp.bfloat16) + jnp.asarray(random.normal(size=64), jnp.bfloat16)
    error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    train_loss = lambda w, h, batch: error(w, batch) + jnp.exp(h) * jnp.sum(w**2)
    optimizer = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(0.1)), unroll_steps=40)
    state = optimizer.init(jnp.zeros(8, jnp.bfloat16), jnp.asarray(-8.0, jnp.bfloat16))
    losses = gradhpo.LossFunctions(train_loss, lambda w, h, batch: error(w, batch))
    report = gradhpo.check_hypergradient(optimizer, state, (x, y), (x, y), losses)
    assert report.rounding > 0.5
    assert any(x.startswith("rounding: in bfloat16") for x in report.findings)


CLIPS = {
    "by block": lambda h: optax.chain(optax.clip_by_block_rms(h), optax.sgd(0.1)),
    "by global norm": lambda h: optax.chain(optax.clip_by_global_norm(h), optax.sgd(0.1)),
    "adaptively": lambda h: optax.chain(optax.adaptive_grad_clip(h), optax.sgd(0.1)),
    "by trust": lambda h: optax.chain(optax.scale_by_trust_ratio(0.0, h), optax.sgd(0.1)),
}
EXACT = {
    "unrolled": lambda inner: gradhpo.UnrolledOptimizer(inner, unroll_steps=3),
    "forward": lambda inner: gradhpo.ForwardModeOptimizer(inner, unroll_steps=3),
}
LAST = {
    "one step": lambda inner: gradhpo.OneStepOptimizer(inner),
    "T1-T2": lambda inner: gradhpo.T1T2Optimizer(inner),
    "greedy": lambda inner: gradhpo.GreedyOptimizer(inner),
}


@pytest.mark.parametrize("clip", quick(list(CLIPS), keep=[]))
def test_parameters_of_no_size_beside_a_learned_threshold(clip):
    """Their mean is NaN, which must not reach the threshold; validation reads them too."""
    inner = lambda h: relaxed(CLIPS[clip](h))
    loss = lambda w, h, batch: jnp.sum((w["a"] - 1.0) ** 2 * jnp.arange(1.0, 4.0))
    loss_of_both = lambda w, h, batch: loss(w, h, batch) + jnp.sum(w["empty"] ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w["a"] - 3.0) ** 2) + jnp.sum(w["empty"] ** 2)
    alone = {"a": jnp.asarray([1.5, 2.0, 4.0])}
    beside = alone | {"empty": jnp.zeros((0, 2))}
    h = jnp.asarray(0.5)

    def trained(h, steps):
        w, optimizer = alone, inner(h)
        state = optimizer.init(w)
        for _ in range(steps):
            moves, state = optimizer.update(jax.grad(loss)(w, h, None), state, w)
            w = optax.apply_updates(w, moves)
        return jnp.sum((w["a"] - 3.0) ** 2)

    for kinds, steps in ((EXACT, 3), (LAST, 1)):
        expected = jax.grad(trained)(h, steps)
        for name, kind in kinds.items():
            optimizer = kind(inner)
            state = optimizer.init(beside, h)
            found = optimizer.compute_hypergradient(state, None, None, loss_of_both, val_loss)
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=name)
