"""NRES and PES against NumPy loops, closed forms and quadrature; functions without derivatives."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import OUTER, relaxed

import gradhpo
from gradhpo.extend import random_directions


KINDS = pytest.mark.parametrize("noise", ["episode", "window"])


def drawn_noise(state, optimizer):
    key, _ = state.memory.draws.next()
    normal = random_directions(jax.random.normal, key, state.hyperparams, optimizer.num_directions)
    return jax.tree.map(lambda x: np.asarray(optimizer.sigma * x), normal)


@pytest.mark.parametrize("noise", quick(["episode", "window"], keep=["episode"]))
def test_twenty_steps_of_adam_are_a_loop_in_numpy(noise):
    """Mini-batches, four windows in an episode and one of the next, tuned rate and decay."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(25, 6, 3)), random.normal(size=(25, 6))
    x_val, y_val = random.normal(size=(8, 3)), random.normal(size=8)
    sigma, eps, eps_root = 0.1, 1e-8, 1e-6
    error = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    penalised = lambda w, h, batch: error(w, h, batch) + jnp.exp(h["decay"]) @ w**2
    val_loss = lambda w, h, batch: error(w, h, batch) + jnp.sum(h["decay"] ** 2)
    inner = lambda h: relaxed(optax.adam(jnp.exp(h["rate"]), eps_root=eps_root))
    optimizer = gradhpo.EvolutionOptimizer(
        inner, None, unroll_steps=5, num_directions=2, sigma=sigma, noise=noise
    )
    h = {"rate": jnp.asarray(-3.0), "decay": jnp.asarray([-2.0, -1.0, -3.0])}
    w_0 = np.ones(3)

    def trained(at, rate, decay, first):
        w, m, v, t = at
        for i in range(first, first + 5):
            g = 2 * x[i].T @ (x[i] @ w - y[i]) / 6 + 2 * np.exp(decay) * w
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            w = w - np.exp(rate) * m_hat / (np.sqrt(v_hat + eps_root) + eps)
        return (w, m, v, t), np.mean((x_val @ w - y_val) ** 2) + np.sum(decay**2)

    new = (w_0, np.zeros(3), np.zeros(3), 0)
    state = first = optimizer.init(jnp.asarray(w_0), h, key=jax.random.key(5))
    rate, decay, plain, total, runs = -3.0, np.array([-2.0, -1.0, -3.0]), new, None, None
    for k in range(5):
        if k == 4:
            state, plain = optimizer.restart(state, first.params, 0.0), new
        begins = k in (0, 4)
        drawn = drawn_noise(state, optimizer)
        if begins or noise == "window":
            epsilon = drawn
        added = jax.tree.map(np.add, total, epsilon) if not begins and noise == "window" else None
        total = epsilon if added is None else added
        runs = {(i, s): new for i in range(2) for s in (1, -1)} if begins else runs
        g_rate, g_decay = 0.0, np.zeros(3)
        for i in range(2):
            losses = {}
            for s in (1, -1):
                moved = rate + s * epsilon["rate"][i], decay + s * epsilon["decay"][i]
                runs[i, s], losses[s] = trained(runs[i, s], *moved, 5 * k)
            slope = (losses[1] - losses[-1]) / (2 * sigma**2) / 2
            g_rate, g_decay = g_rate + slope * total["rate"][i], g_decay + slope * total["decay"][i]
        plain, plain_loss = trained(plain, rate, decay, 5 * k)
        stack = gradhpo.BatchStack(
            (jnp.asarray(x[5 * k : 5 * k + 5]), jnp.asarray(y[5 * k : 5 * k + 5]))
        )
        state = optimizer.step(
            state,
            stack,
            (jnp.asarray(x_val), jnp.asarray(y_val)),
            penalised,
            val_loss,
            lr_hyper=1e-3,
        )
        rate, decay = rate - 1e-3 * g_rate, decay - 1e-3 * g_decay
        np.testing.assert_allclose(state.hyperparams["rate"], rate, rtol=1e-10)
        np.testing.assert_allclose(state.hyperparams["decay"], decay, rtol=1e-10)
        np.testing.assert_allclose(state.params, plain[0], rtol=1e-10)
        np.testing.assert_allclose(state.get_metric("val_loss"), plain_loss, rtol=1e-10)


def distance(w, h, batch):
    return jnp.sum((w - 1.0) ** 2) / 2


def towards(w, h, batch):
    return jnp.sum((w - h) ** 2 * jnp.arange(1.0, 4.0)) / 2


def of_windows(optimizer, params, hyperparams, train_loss, val_loss, windows, key):
    """The estimates of the windows of an episode, at fixed hyperparameters."""
    state = optimizer.init(params, hyperparams, key=key)

    def body(carry, _):
        state = eqx.combine(carry, static)
        g = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
        state = optimizer.step(state, None, None, train_loss, val_loss, lr_hyper=0.0)
        return eqx.filter(state, eqx.is_array), g

    arrays, static = eqx.partition(state, eqx.is_array)
    _, found = jax.lax.scan(body, arrays, None, length=windows)
    return found


@pytest.mark.thorough
@KINDS
def test_the_mean_over_draws_is_exact_where_smoothing_changes_no_slope(noise):
    """All maps are linear and the loss is quadratic: the sum over the windows of an episode."""
    optimizer = gradhpo.EvolutionOptimizer(
        optax.sgd(0.2), None, unroll_steps=2, num_directions=1, sigma=0.3, noise=noise
    )
    w, h = jnp.zeros(3), jnp.asarray([0.5, 2.0, -1.0])
    one = lambda key: of_windows(optimizer, w, h, towards, distance, 3, key).sum(0)
    draws = np.asarray(eqx.filter_vmap(one)(jax.random.split(jax.random.key(0), 10_000)))
    exact = np.zeros(3)
    for steps in (2, 4, 6):
        unrolled = gradhpo.UnrolledOptimizer(optax.sgd(0.2), unroll_steps=steps)
        exact += unrolled.compute_hypergradient(unrolled.init(w, h), None, None, towards, distance)
    error = draws.std(0) / 100
    np.testing.assert_array_less(np.abs(draws.mean(0) - exact), 4 * error)  # once in 5,000 seeds
    assert np.all(error < 0.1 * np.abs(exact))  # so that the bound is meaningful


def test_the_mean_is_the_slope_of_the_smoothed_loss():
    """A loss that wiggles within sigma: the oracle is Gauss-Hermite quadrature of its values."""
    sigma, at = 0.5, 0.3
    val_loss = lambda w, h, batch: jnp.sin(4 * w) + w**2
    train_loss = lambda w, h, batch: (w - h) ** 2 / 2
    optimizer = gradhpo.EvolutionOptimizer(
        optax.sgd(0.5), unroll_steps=3, num_directions=10_000, sigma=sigma
    )
    state = optimizer.init(jnp.zeros(()), jnp.asarray(at), key=jax.random.key(2))
    found = optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    end = lambda h: h * (1 - 0.5**3)
    values = lambda h: np.sin(4 * end(h)) + end(h) ** 2
    each = values(at + sigma * nodes) * nodes / sigma
    expected = weights @ each / np.sqrt(2 * np.pi)
    antithetic = (values(at + sigma * nodes) - values(at - sigma * nodes)) * nodes / (2 * sigma)
    variance = weights @ antithetic**2 / np.sqrt(2 * np.pi) - expected**2
    assert abs(found - expected) < 4 * np.sqrt(variance) / 100
    slope = (4 * np.cos(4 * end(at)) + 2 * end(at)) * (1 - 0.5**3)
    assert abs(slope - expected) > 10 * np.sqrt(variance) / 100  # sigma matters here


@pytest.mark.thorough
def test_an_accuracy_and_an_update_without_any_derivative_warn_of_nothing():
    """All effects are seen: a rounded number in a simulator, an argmax in validation."""

    def simulated(w, h):
        return np.asarray(w + 0.3 * np.sign(np.round(h, 3) - w), np.asarray(w).dtype)

    def update_fn(w, h, batch):
        like = jax.ShapeDtypeStruct(w.shape, w.dtype)
        return jax.pure_callback(simulated, like, w, h, vmap_method="sequential")

    labels = jnp.asarray([0, 1, 0, 1, 1, 0])
    x = jnp.asarray([[2.0, 0], [0, 2], [1, 0.5], [0.2, 1], [-1, 1], [3, 1]])
    mistakes = lambda w, h, batch: jnp.mean(
        (jnp.argmax(batch * w[None], axis=1) != labels).astype(w.dtype)
    )
    optimizer = gradhpo.EvolutionOptimizer(
        None, optax.sgd(0.1), unroll_steps=3, num_directions=8, sigma=1.0, update_fn=update_fn
    )
    nothing = lambda w, h, batch: jnp.zeros(())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = optimizer.init(jnp.zeros(2), jnp.asarray([-0.5, 0.5]), key=jax.random.key(0))
        state, history = gradhpo.run(
            optimizer, state, gradhpo.LossFunctions(nothing, mistakes), None, x,
            num_steps=10, steps_per_episode=1, reptile_rate=0.0, progress=False,
        )  # fmt: skip
    # It is the accuracy, in sixths, and losses of perturbed runs differ.
    np.testing.assert_allclose(history["val_loss"] * 6, np.round(history["val_loss"] * 6))
    assert np.any(history["hypergrad_norm"] > 0)


def test_a_stopped_validation_loss_and_equal_accuracies_are_no_mistake():
    val_loss = lambda w, h, batch: jnp.sum(jax.lax.stop_gradient(w) ** 2)
    constant = lambda w, h, batch: jnp.mean((w > 100.0).astype(w.dtype))
    optimizer = gradhpo.EvolutionOptimizer(optax.sgd(0.1), OUTER)
    state = optimizer.init(jnp.zeros(3), jnp.ones(3), key=jax.random.key(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = optimizer.step(state, None, None, towards, val_loss)
        assert after.get_metric("hypergrad_norm") > 0
        after = optimizer.step(state, None, None, towards, constant)
        assert after.get_metric("hypergrad_norm") == 0


@pytest.mark.parametrize("rounded", quick([False, True], keep=[True]))
def test_perturbed_runs_start_at_perturbed_hyperparameters(rounded):
    """A rule whose initial velocity is the hyperparameter, rounded or not: only it moves w."""
    of = jnp.round if rounded else (lambda x: x)
    rule = lambda h: optax.GradientTransformation(
        lambda w: of(h), lambda g, s, w=None: (s + 0 * g, s)
    )
    loss, val_loss = (lambda w, h, batch: jnp.sum(w**2)), lambda w, h, batch: jnp.sum(w)
    optimizer = gradhpo.EvolutionOptimizer(rule, None, num_directions=3, sigma=0.7)
    state = optimizer.init(jnp.zeros(2), jnp.asarray([0.4, 1.4]), key=jax.random.key(0))
    epsilon = drawn_noise(state, optimizer)
    for window in (1, 2):  # the perturbed velocity lasts
        found = optimizer.compute_hypergradient(state, None, None, loss, val_loss)
        h = np.asarray(state.hyperparams)
        change = np.asarray(of(h + epsilon) - of(h - epsilon)).sum(1) * window
        expected = (change[:, None] * epsilon / (2 * 0.49)).mean(0)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        state = optimizer.step(state, None, None, loss, val_loss, lr_hyper=0.0)


@pytest.mark.thorough
def test_a_small_sigma_in_half_precision():
    """Its square is 0 in float16; the loss is linear, so each draw gives the slope along itself."""
    optimizer = gradhpo.EvolutionOptimizer(optax.sgd(0.1), None, num_directions=2, sigma=1e-4)
    state = optimizer.init(jnp.zeros(2, jnp.float16), jnp.zeros(2, jnp.float16))
    slope = lambda w, h, batch: jnp.sum(h * jnp.asarray([1, 3], jnp.float16))
    still = lambda w, h, batch: jnp.sum(w * w)
    found = optimizer.compute_hypergradient(state, None, None, still, slope)
    key, _ = state.memory.draws.next()
    normal = random_directions(jax.random.normal, key, state.hyperparams, 2)
    normal = np.asarray(normal, np.float64)
    expected = ((normal @ [1.0, 3.0])[:, None] * normal).mean(0)
    np.testing.assert_allclose(found, expected, rtol=0.02)  # float16 resolves 1e-4 to 0.06 %


@pytest.mark.thorough
def test_episodes_draw_anew_and_a_refused_step_spends_its_draw():
    optimizer = gradhpo.EvolutionOptimizer(optax.sgd(0.1), OUTER, num_directions=2)
    state = optimizer.init(jnp.zeros(3), jnp.ones(3), key=jax.random.key(0))
    losses = gradhpo.LossFunctions(towards, distance)
    noises = []
    for _ in range(2):
        state, _ = gradhpo.run(
            optimizer, state, losses, None, None, num_steps=2, steps_per_episode=2,
            reptile_rate=0.0, progress=False,
        )  # fmt: skip
        noises.append(np.asarray(state.memory.noise))
    assert not np.any(noises[0] == noises[1])
    assert state.memory.starts_anew  # the next step begins an episode
    nan = lambda w, h, batch: towards(w, h, batch) * batch
    after = optimizer.step(state, jnp.nan, None, nan, distance)
    assert after.get_metric("rejected") == 1
    assert after.memory.draws.count == state.memory.draws.count + 1
    assert_same(after.memory.perturbed, state.memory.perturbed)


def test_a_run_of_nres_without_episodes_is_warned_about():
    optimizer = gradhpo.EvolutionOptimizer(optax.sgd(0.1), OUTER)
    state = optimizer.init(jnp.zeros(3), jnp.ones(3))
    arguments = state, gradhpo.LossFunctions(towards, distance), None, None
    with pytest.warns(UserWarning, match="Pass steps_per_episode, or use noise='window'"):
        gradhpo.run(optimizer, *arguments, num_steps=1, progress=False)
    assert dataclasses.replace(optimizer, noise="window").without_episodes == ""


@pytest.mark.thorough
def test_memory_is_flat_in_the_horizon_and_grows_with_directions():
    losses = gradhpo.LossFunctions(
        lambda w, h, batch: jnp.sum((w - h) ** 2), lambda w, h, batch: jnp.sum(w**2)
    )
    size = 1_000
    optimizers = {
        str(n): gradhpo.EvolutionOptimizer(optax.sgd(0.1), num_directions=n) for n in (1, 9)
    }
    state = gradhpo.UnrolledOptimizer(optax.sgd(0.1)).init(jnp.zeros(size), jnp.zeros(()))
    planned = gradhpo.plan(optimizers, state, None, None, losses, horizons=[10, 1_000])
    used = lambda n, t: planned[str(n), t].cost.total_bytes
    assert used(1, 1_000) - used(1, 10) <= 2 * 8 * 990  # losses of single steps
    # 8 more pairs of w in the memory, before and after the step, and a copy or two.
    pairs = 8 * 2 * 8 * size
    assert pairs <= used(9, 10) - used(1, 10) <= 4 * pairs


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["contracting", "chaotic"])
def test_reused_noise_has_less_variance_in_a_step(kind):
    """The last of six windows; the logistic map at 3.7 is chaotic, the other map forgets."""

    def update_fn(w, h, batch):
        return h * w * (1 - w) if kind == "chaotic" else w - 0.5 * (w - h)

    loss = lambda w, h, batch: (w - 0.2) ** 2 if kind == "chaotic" else w
    at = jnp.asarray(3.7 if kind == "chaotic" else 1.0)
    steps, of_sum = {}, {}
    for noise in ("episode", "window"):
        optimizer = gradhpo.EvolutionOptimizer(
            update_fn=update_fn, unroll_steps=20, num_directions=1, sigma=0.02, noise=noise
        )
        args = jnp.asarray(0.3), at, loss, loss, 6
        one = lambda key, o=optimizer, a=args: of_windows(o, *a, key)
        draws = eqx.filter_vmap(one)(jax.random.split(jax.random.key(1), 4_000))
        steps[noise] = float(np.var(draws[:, -1]))
        of_sum[noise] = float(np.var(draws.sum(1)))
    assert steps["episode"] < steps["window"]
    if kind == "contracting":
        # Slopes of 1, from the noise of the last window only. One step: Var(e²) = 2, against
        # Var(e (e + ... + e)) = 2 + 5. The sum of six: 2 * 36, as all are the same draw, against
        # 6 * 2 + 15. Variances of 4,000 draws of these have relative errors of at most 8 %.
        np.testing.assert_allclose(steps["window"] / steps["episode"], 3.5, rtol=0.3)
        np.testing.assert_allclose(of_sum["window"] / of_sum["episode"], 27 / 72, rtol=0.3)


@pytest.mark.thorough
def test_compare_over_batches_reports_the_noise_of_the_directions():
    """On fixed batches, of a linear loss: a draw is (g·e) e, with the variance (H + 1) |g|²."""
    losses = gradhpo.LossFunctions(towards, lambda w, h, batch: jnp.sum(w * jnp.arange(1.0, 4.0)))
    inner = optax.sgd(0.2)
    optimizers = {
        str(n): gradhpo.EvolutionOptimizer(inner, unroll_steps=4, num_directions=n) for n in (1, 4)
    }
    state = optimizers["1"].init(jnp.zeros(3), jnp.ones(3))
    report = gradhpo.compare_over_batches(
        optimizers, state, None, None, losses, num_draws=2_000, num_steps=4
    )
    for n in (1, 4):
        # The variance of 2,000 draws has a relative error of at most 7 %.
        np.testing.assert_allclose(report.signal_to_noise[str(n)] ** 2, n / 4, rtol=0.3)
        assert report.bias[str(n)] < 4 * np.sqrt(4 / n / 2_000)  # the noise of their mean


@pytest.mark.thorough
@KINDS
def test_wrappers_checkpoints_and_diagnostics(noise, tmp_path):
    """A run resumed from a checkpoint equals the whole run, and reports are not empty."""
    optimizer = gradhpo.EvolutionOptimizer(
        relaxed(optax.adam(0.1, eps_root=1e-8)),
        OUTER,
        unroll_steps=2,
        num_directions=2,
        noise=noise,
    )
    losses = gradhpo.LossFunctions(towards, distance)
    for one in (optimizer, gradhpo.TaskBatched(optimizer, num_tasks=2)):
        begun = one.init(jnp.zeros(3), jnp.ones(3), key=jax.random.key(0))
        settings = {"steps_per_episode": 2, "reptile_rate": 0.0, "progress": False}
        whole, _ = gradhpo.run(one, begun, losses, None, None, num_steps=8, **settings)
        at = tmp_path / type(one).__name__
        for steps in (4, 8):
            state, _ = gradhpo.run(
                one, begun, losses, None, None, num_steps=steps, checkpoint=at, **settings
            )
        assert_same(state.hyperparams, whole.hyperparams)
        assert_same(state.memory, whole.memory)
    state = optimizer.init(jnp.zeros(3), jnp.linspace(1.0, 2.0, 3))
    adopted = optimizer.adopt(
        gradhpo.GreedyOptimizer(optimizer.inner_optimizer, OUTER).adopt(state)
    )
    assert_same(adopted.memory, state.memory)
    report = gradhpo.compare_hypergradients({"ES": optimizer}, state, None, None, losses)
    assert "ES" in str(report)
    assert str(gradhpo.check_hypergradient(optimizer, state, None, None, losses))
    assert str(gradhpo.explain_horizon(optimizer, state, None, None, losses))


def test_misuse():
    with pytest.raises(ValueError, match="sigma"):
        gradhpo.EvolutionOptimizer(optax.sgd(0.1), sigma=0.0)
    with pytest.raises(ValueError, match="num_directions"):
        gradhpo.EvolutionOptimizer(optax.sgd(0.1), num_directions=0)
