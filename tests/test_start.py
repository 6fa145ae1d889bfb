"""Hyperparameters in the inner optimizer's `init`: in the exact hypergradient, or reported."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed

import gradhpo


X = jax.random.normal(jax.random.key(0), (12, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])
W = jnp.array([0.3, 0.1, -0.4])
STEPS = 5


def train_loss(w, h, batch):
    return jnp.mean((X @ w - Y) ** 2) + 0.01 * jnp.sum(w**2)


def val_loss(w, h, batch):
    return jnp.sum((w - 1.0) ** 2)


LOSSES = (train_loss, val_loss)


def adagrad(h):
    return optax.adagrad(h[0], initial_accumulator_value=h[1], eps=0.0)


def in_both_places(h):
    return optax.adagrad(h, initial_accumulator_value=h, eps=0.0)


def with_velocity(h):
    """Momentum with a learned initial velocity for each parameter."""

    def update(gradient, trace, w=None):
        trace = gradient + 0.9 * trace
        return -0.05 * jnp.exp(h["log_rate"]) * trace, trace

    return optax.GradientTransformation(lambda w: h["velocity"] + 0.1 * w, update)


INNER = {
    "adagrad": (adagrad, jnp.array([0.1, 0.3])),
    "one number in both places": (in_both_places, jnp.array(0.2)),
    "velocity": (
        with_velocity,
        {"log_rate": jnp.array(0.1), "velocity": jnp.array([0.5, -1.0, 0.0])},
    ),
}


def by_jax(inner, h, *, rebuild=True, steps=STEPS, s=None):
    """The derivative by `jax.grad` through all of training, with `init` included or held fixed."""

    def trained(h):
        w, state = W, inner(h).init(W) if rebuild else s
        for _ in range(steps):
            updates, state = inner(h).update(jax.grad(train_loss)(w, h, None), state, w)
            w = optax.apply_updates(w, updates)
        return val_loss(w, h, None)

    return jax.grad(trained)(h)


def assert_close(found, expected, rtol=1e-10):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14)


EXACT = {
    "unrolled": lambda inner: gradhpo.UnrolledOptimizer(inner, unroll_steps=STEPS),
    "checkpoints": lambda inner: gradhpo.UnrolledOptimizer(
        inner, unroll_steps=STEPS, checkpoints=2
    ),
    "forward": lambda inner: gradhpo.ForwardModeOptimizer(inner, unroll_steps=STEPS),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    quick(
        [(kind, name) for kind in INNER for name in EXACT],
        keep=[("adagrad", "unrolled")],
    ),
)
def test_exact_methods_differentiate_init(kind, name):
    inner, h = INNER[kind]
    optimizer = EXACT[name](inner)
    found = optimizer.compute_hypergradient(optimizer.init(W, h), None, None, *LOSSES)
    assert_close(found, by_jax(inner, h))


@pytest.mark.parametrize("kind", quick(list(INNER), keep=[]))
def test_finite_differences_rebuild_the_initial_state(kind):
    inner, h = INNER[kind]
    optimizer = EXACT["unrolled"](inner)
    state = optimizer.init(W, h)
    differences = gradhpo.finite_difference_hypergradient(optimizer, state, None, None, *LOSSES)
    assert_close(differences, by_jax(inner, h), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", list(INNER))
def test_a_check_rebuilds_the_initial_state(kind):
    inner, h = INNER[kind]
    optimizer = EXACT["unrolled"](inner)
    state = optimizer.init(W, h)
    report = gradhpo.check_hypergradient(
        optimizer, state, None, None, gradhpo.LossFunctions(*LOSSES)
    )
    assert report.healthy
    for found in report.finite_differences.values():
        np.testing.assert_allclose(found.derivative, found.difference, rtol=1e-6)


@pytest.mark.thorough
def test_comparisons_and_shares_are_those_of_all_of_training():
    """Their reference also includes the coordinate that acts only in `init`."""
    inner, h = INNER["adagrad"]
    optimizer, batches = EXACT["unrolled"](inner), gradhpo.BatchStack(jnp.zeros((STEPS, 1)))
    state, losses = optimizer.init(W, h), gradhpo.LossFunctions(*LOSSES)
    compared = gradhpo.compare_hypergradients({"all": optimizer}, state, batches, None, losses)
    assert_close(compared.reference, by_jax(inner, h))


@pytest.mark.thorough
def test_drmad_pulls_its_own_cotangent_through_init():
    inner, h = INNER["adagrad"]
    one = gradhpo.DrMADOptimizer(inner, unroll_steps=1)
    found = one.compute_hypergradient(one.init(W, h), None, None, *LOSSES)
    assert_close(found, by_jax(inner, h, steps=1))
    several = gradhpo.DrMADOptimizer(inner, unroll_steps=STEPS)
    found = several.compute_hypergradient(several.init(W, h), None, None, *LOSSES)

    # Written out: the states on the line from first to last, and the backward pass through them.
    s0 = inner(h).init(W)
    step = lambda w, a, h: _adagrad_step(w, a, h)
    w, a = W, s0[0].sum_of_squares
    for _ in range(STEPS):
        w, a = step(w, a, h)
    share = np.arange(STEPS) / STEPS
    line = [(W + x * (w - W), s0[0].sum_of_squares + x * (a - s0[0].sum_of_squares)) for x in share]
    w_bar, a_bar, h_bar = jax.grad(val_loss)(w, h, None), jnp.zeros(3), jnp.zeros(2)
    for at in reversed(line):
        _, pull = jax.vjp(step, *at, h)
        w_bar, a_bar, term = pull((w_bar, a_bar))
        h_bar = h_bar + term
    assert_close(found, h_bar + jnp.array([0.0, jnp.sum(a_bar)]))


def _adagrad_step(w, accumulator, h):
    gradient = jax.grad(train_loss)(w, h, None)
    accumulator = accumulator + gradient**2
    return w - h[0] * gradient / jnp.sqrt(accumulator), accumulator


@pytest.mark.thorough
def test_only_a_fresh_state_is_differentiated():
    inner, h = INNER["adagrad"]
    optimizer = gradhpo.UnrolledOptimizer(inner, optax.sgd(0.0), unroll_steps=STEPS)
    state = optimizer.init(W, h)
    assert bool(state.fresh)
    state = optimizer.step(state, None, None, *LOSSES)
    assert not bool(state.fresh)
    back_at_w = state.update(params=W)
    found = optimizer.compute_hypergradient(back_at_w, None, None, *LOSSES)
    assert_close(found, by_jax(inner, h, rebuild=False, s=state.inner_opt_state))
    assert found[1] == 0
    again = optimizer.restart(state, W, reptile_rate=0.0)
    assert bool(again.fresh)
    found = optimizer.compute_hypergradient(again, None, None, *LOSSES)
    assert_close(found, by_jax(inner, h))
    assert not bool(state.update(inner_opt_state=state.inner_opt_state).fresh)


def test_a_refused_step_leaves_the_state_fresh():
    optimizer = EXACT["unrolled"](adagrad)
    bad = lambda w, h, batch: jnp.sum(w) * jnp.nan
    state = optimizer.init(W, INNER["adagrad"][1])
    state = optimizer.step(state, None, None, train_loss, bad, lr_hyper=0.1)
    assert state.get_metric("rejected") == 1
    assert bool(state.fresh)


def test_every_episode_of_run_starts_fresh():
    """The first step of an episode differentiates `init` at the hyperparameters of its start."""
    inner, h = INNER["adagrad"]
    optimizer = gradhpo.UnrolledOptimizer(inner, optax.sgd(0.0), unroll_steps=STEPS)
    state, history = gradhpo.run(
        optimizer,
        optimizer.init(W, h),
        gradhpo.LossFunctions(*LOSSES),
        None,
        None,
        num_steps=4,
        steps_per_episode=2,
        reptile_rate=0.0,
        progress=False,
    )
    assert bool(state.fresh)
    expected = np.linalg.norm(by_jax(inner, h))
    np.testing.assert_allclose(history["hypergrad_norm"][[0, 2]], expected, rtol=1e-10)
    assert abs(history["hypergrad_norm"][1] - expected) > 1e-3


def test_tasks():
    inner, h = INNER["adagrad"]
    together = gradhpo.TaskBatched(EXACT["unrolled"](inner), 2)
    state = together.init(W, h)
    assert bool(state.fresh)
    assert_close(together.compute_hypergradient(state, None, None, *LOSSES), by_jax(inner, h))
    stepped = together.step(state, None, None, *LOSSES, lr_hyper=0.1)
    assert not bool(stepped.fresh)
    assert bool(together.restart(stepped).fresh)


def test_an_adopted_state_is_fresh_if_its_inner_state_is_new():
    inner, h = INNER["adagrad"]
    first = gradhpo.OneStepOptimizer(relaxed(optax.adam(0.1)), optax.sgd(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = EXACT["unrolled"](inner)
        assert bool(exact.adopt(first.init(W, h)).fresh)
        assert not bool(exact.adopt(exact.init(W, h)).fresh)


LEFT_OUT = {
    "OneStepOptimizer": lambda inner: gradhpo.OneStepOptimizer(inner),
    "T1T2Optimizer": lambda inner: gradhpo.T1T2Optimizer(inner),
    "GreedyOptimizer": lambda inner: gradhpo.GreedyOptimizer(inner, unroll_steps=2),
    "OnlineHypergradientOptimizer": lambda inner: gradhpo.OnlineHypergradientOptimizer(inner),
    "UnrolledOptimizer": lambda inner: gradhpo.UnrolledOptimizer(
        inner, unroll_steps=STEPS, truncation=2
    ),
}


@pytest.mark.parametrize(
    "name", quick(list(LEFT_OUT), keep=["OneStepOptimizer", "UnrolledOptimizer"])
)
def test_methods_that_leave_it_out_name_the_coordinates(name):
    optimizer = LEFT_OUT[name](adagrad)
    state = optimizer.init(W, INNER["adagrad"][1])
    said = rf"{name} ignores the effect of hyperparams \[1\] in the init of the inner optimizer"
    with pytest.warns(UserWarning, match=said):
        optimizer.compute_hypergradient(state, None, None, *LOSSES)


def test_a_leaf_in_init_alone_is_not_seen():
    inner = lambda h: optax.adagrad(0.1, initial_accumulator_value=h)
    for optimizer in (gradhpo.OneStepOptimizer(inner), gradhpo.ImplicitOptimizer(inner)):
        state = optimizer.init(W, jnp.array(0.3))
        said = "act in the init of the inner optimizer alone; UnrolledOptimizer without truncation"
        with pytest.raises(ValueError, match=said):
            optimizer.compute_hypergradient(state, None, None, *LOSSES)


def test_injected_hyperparameters_act_where_training_starts():
    """They are kept in the state: right in the first episode, and reported."""
    inner = lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h)
    optimizer = gradhpo.UnrolledOptimizer(inner, unroll_steps=STEPS)
    with pytest.warns(UserWarning, match=r"inject_hyperparams.*until an episode begins.*schedules"):
        state = optimizer.init(W, jnp.array(0.1))
    found = optimizer.compute_hypergradient(state, None, None, *LOSSES)
    assert_close(found, by_jax(optax.sgd, jnp.array(0.1)))


# -- initial parameters of every episode -------------------------------------------------------


KEY = jax.random.key(3)
POINT = {"centre": jnp.array([0.2, -0.3, 0.1]), "log_scale": jnp.array(-1.0)}


def drawn_around(key, h):
    """A learned initial point, and the scale of the initialisation around it."""
    return h["centre"] + jnp.exp(h["log_scale"]) * jax.random.normal(key, (3,))


def trained_from(h, episode, steps=STEPS, fold=None):
    key = jax.random.fold_in(KEY, episode)
    w = drawn_around(key if fold is None else jax.random.fold_in(key, fold), h)
    for _ in range(steps):
        w = w - 0.05 * jax.grad(train_loss)(w, h, None)
    return w


def run_from(optimizer, num_steps=3, steps_per_episode=1, hyperparams=POINT, **settings):
    settings = {"start_fn": drawn_around, "key": KEY} | settings
    return gradhpo.run(
        optimizer,
        optimizer.init(W, hyperparams),
        gradhpo.LossFunctions(*LOSSES),
        None,
        None,
        num_steps=num_steps,
        steps_per_episode=steps_per_episode,
        progress=False,
        **settings,
    )


FROM_START = {
    "unrolled": lambda: gradhpo.UnrolledOptimizer(
        relaxed(optax.sgd(0.05)), relaxed(optax.sgd(0.1)), unroll_steps=STEPS
    ),
    "forward": lambda: gradhpo.ForwardModeOptimizer(
        relaxed(optax.sgd(0.05)), relaxed(optax.sgd(0.1)), unroll_steps=STEPS
    ),
}


@pytest.mark.parametrize("name", quick(list(FROM_START), keep=["forward"]))
def test_each_episode_has_its_own_start_which_is_differentiated(name):
    _, history = run_from(FROM_START[name](), record=lambda s: {"h": s.hyperparams["centre"]})
    h, centres, norms = POINT, [], []
    for episode in range(3):
        g = jax.grad(lambda h, e=episode: val_loss(trained_from(h, e), h, None))(h)
        norms.append(gradhpo.tree_l2_norm(g))
        h = jax.tree.map(lambda x, y: x - 0.1 * y, h, g)
        centres.append(h["centre"])
    np.testing.assert_allclose(history["h"], np.stack(centres), rtol=1e-10)
    np.testing.assert_allclose(history["hypergrad_norm"], norms, rtol=1e-10)


@pytest.mark.thorough
def test_a_longer_episode_starts_once():
    """Later outer steps of an episode continue from the current state: only the first starts."""
    with pytest.warns(UserWarning, match="act in start_fn alone, .* Pass steps_per_episode=1"):
        state, history = run_from(FROM_START["unrolled"](), 4, 2, record=lambda s: {"w": s.params})
    np.testing.assert_allclose(history["w"][0], trained_from(POINT, 0), rtol=1e-10)
    assert history["hypergrad_norm"][1] == 0
    # The returned state is at the start of the next episode.
    expected = drawn_around(jax.random.fold_in(KEY, 2), state.hyperparams)
    np.testing.assert_allclose(state.params, expected, rtol=1e-12)


def test_a_start_whose_first_derivative_is_0_moves_on():
    """Zeros at a first step are checked again nearby, from the start of that step."""
    squared = lambda key, h: POINT["centre"] + h["centre"] ** 2
    hyperparams = {"centre": jnp.zeros(3)}
    settings = {"hyperparams": hyperparams, "start_fn": squared}
    _, history = run_from(FROM_START["unrolled"](), 2, **settings)
    assert history.stop_reason == "num_steps"
    np.testing.assert_array_equal(history["hypergrad_norm"], 0)


def test_what_acts_in_init_alone_is_named_where_steps_go_on():
    inner = lambda h: relaxed(optax.adagrad(0.1, initial_accumulator_value=jnp.exp(h)))
    optimizer = gradhpo.UnrolledOptimizer(inner, optax.sgd(0.1), unroll_steps=2)
    loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    losses = gradhpo.LossFunctions(loss, loss)
    run = lambda **settings: gradhpo.run(
        optimizer, optimizer.init(jnp.zeros(3), jnp.array(-1.0)), losses, None, None, num_steps=2,
        progress=False, **settings,
    )[1]  # fmt: skip
    with pytest.warns(UserWarning, match="act in the init of the inner optimizer alone"):
        history = run()
    np.testing.assert_array_equal(history["hypergrad_norm"] == 0, [False, True])
    assert np.all(run(steps_per_episode=1)["hypergrad_norm"] > 0)


@pytest.mark.parametrize(
    "cls", quick([gradhpo.ForwardModeOptimizer, gradhpo.EvolutionOptimizer], keep=[])
)
def test_what_acts_in_init_alone_is_seen_by_what_goes_on_from_it(cls):
    """Tangents and perturbed runs carry it through the episode: no warning, no zeros."""
    inner = lambda h: relaxed(optax.adagrad(0.1, initial_accumulator_value=jnp.exp(h)))
    optimizer = cls(inner, optax.sgd(0.1), unroll_steps=2)
    loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    losses = gradhpo.LossFunctions(loss, loss)
    state = optimizer.init(jnp.zeros(3), jnp.array(-1.0))
    settings = {"num_steps": 4, "steps_per_episode": 4, "progress": False}
    _, history = gradhpo.run(optimizer, state, losses, None, None, **settings)
    assert np.all(history["hypergrad_norm"] > 0)


def test_differences_of_updates_leave_out_init_and_say_so():
    inner = lambda h: relaxed(
        optax.adagrad(jnp.exp(h), initial_accumulator_value=jnp.exp(h)))  # fmt: skip
    optimizer = gradhpo.T1T2Optimizer(inner, perturb="hyperparams")
    loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    state = optimizer.init(jnp.zeros(3), jnp.array(-1.0))
    with pytest.warns(UserWarning, match="T1T2Optimizer ignores .* in the init of the inner"):
        optimizer.compute_hypergradient(state, None, None, loss, loss)


def test_tasks_start_at_points_of_their_own():
    together = gradhpo.TaskBatched(FROM_START["unrolled"](), 2)
    _, history = run_from(together, 1, record=lambda s: {"w": s.params})
    expected = np.stack([trained_from(POINT, 0, fold=i) for i in range(2)])
    np.testing.assert_allclose(history["w"][0], expected, rtol=1e-10)


@pytest.mark.thorough
def test_it_resumes_bit_for_bit(tmp_path):
    whole, history = run_from(FROM_START["unrolled"](), 4, chunk_size=1)
    for steps in (2, 4):
        state, parts = run_from(FROM_START["unrolled"](), steps, chunk_size=1, checkpoint=tmp_path)
    np.testing.assert_array_equal(state.params, whole.params)
    np.testing.assert_array_equal(parts["val_loss"], history["val_loss"])
    with pytest.raises(ValueError, match="another run"):
        run_from(FROM_START["unrolled"](), 4, checkpoint=tmp_path, key=jax.random.key(4))


def test_others_name_what_they_leave_out():
    optimizer = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.05)), optax.sgd(0.1))
    with pytest.raises(ValueError, match="they act in start_fn alone; UnrolledOptimizer"):
        run_from(optimizer)


@pytest.mark.thorough
def test_a_fixed_optimizer_draws_new_parameters():
    fixed = gradhpo.FixedOptimizer(relaxed(optax.sgd(0.05)), inner_steps=STEPS)
    _, history = run_from(fixed, record=lambda s: {"w": s.params})
    expected = np.stack([trained_from(POINT, e) for e in range(3)])
    np.testing.assert_allclose(history["w"], expected, rtol=1e-10)


BAD_STARTS = {
    "no key": ({"key": None}, "run got start_fn but no key"),
    "no function": ({"start_fn": None}, "run got key but no start_fn"),
    "no episodes": ({"steps_per_episode": None}, "pass steps_per_episode"),
    "Reptile": ({"reptile_rate": 0.5}, "leave one of them out"),
    "arity": ({"start_fn": lambda key: W}, r"start_fn is called as start_fn\(key, hyperparams\)"),
    "shape": ({"start_fn": lambda key, h: W[:2]}, "what start_fn returned does not fit"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_bad_starts(case):
    settings, said = BAD_STARTS[case]
    with pytest.raises((TypeError, ValueError), match=said):
        run_from(FROM_START["unrolled"](), **settings)
