"""Noise over batches, contributions along the horizon, and plans."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import OUTER, relaxed
from test_compare import (
    GAMMA,
    HYPERPARAMS,
    LOSSES,
    RATE,
    SGD,
    START,
    STEPS,
    TARGET,
    B,
    H,
    Q,
    closed_forms,
)

import gradhpo
from gradhpo.diagnostics import cost
from gradhpo.diagnostics.cost import Program
from gradhpo.utils import tables


# -- over batches ------------------------------------------------------------------------


DATA = jnp.asarray(np.random.default_rng(1).normal(size=(40, 3)) + np.array([1.0, 0.1, 0.0]))


def noisy_train_loss(w, h, batch):
    return jnp.sum((w - h["a"] - h["b"] * jnp.mean(batch, axis=0)) ** 2) / 2


def noisy_val_loss(w, h, batch):
    return jnp.mean(batch, axis=0) @ w


NOISY = gradhpo.LossFunctions(noisy_train_loss, noisy_val_loss)
NOISY_HYPERPARAMS = {"a": jnp.zeros(3), "b": jnp.asarray(2.0)}


def noisy_hypergradient(batches, val_batch):
    """w <- w - rate (w - a - b mean): dw_T/da = rate sum (1 - rate)^k, alpha = mean of val."""
    age = np.arange(len(batches))[::-1]
    weights, alpha = RATE * (1 - RATE) ** age, val_batch.mean(axis=0)
    along = [weight * batch.mean(axis=0) for weight, batch in zip(weights, batches, strict=True)]
    return np.append(alpha * weights.sum(), alpha @ sum(along))


def test_moments_over_draws():
    train = gradhpo.ArrayData(DATA, batch_size=4, key=jax.random.key(0))
    val = gradhpo.ArrayData(DATA, batch_size=10, key=jax.random.key(1))
    draws, steps = 6, 4
    batches = np.stack([train(jnp.asarray(i, jnp.int32)) for i in range(draws * steps)])
    batches = batches.reshape(draws, steps, 4, 3)
    val_batches = np.stack([val(jnp.asarray(i, jnp.int32)) for i in range(draws)])
    exact = np.stack([noisy_hypergradient(x, y) for x, y in zip(batches, val_batches, strict=True)])
    last = np.stack(
        [noisy_hypergradient(x[-1:], y) for x, y in zip(batches, val_batches, strict=True)]
    )
    optimizers = {"one step": gradhpo.OneStepOptimizer(SGD)}
    state = optimizers["one step"].init(jnp.zeros(3), NOISY_HYPERPARAMS)
    # The training batches from an iterator, the validation batches from a function.
    train = iter(batches.reshape(-1, 4, 3))
    report = gradhpo.compare_over_batches(
        optimizers, state, train, val, NOISY, num_draws=draws, num_steps=steps
    )
    mean = exact.mean(axis=0)
    for name, g in {"reference": exact, "one step": last}.items():
        found, center, spread = report.overall[name], g.mean(axis=0), g.std(axis=0, ddof=1)
        total = np.sum(spread**2)
        row = np.append(found.mean["a"], found.mean["b"])
        errors = np.append(found.standard_error["a"], found.standard_error["b"])
        np.testing.assert_allclose(row, center, rtol=1e-9)
        np.testing.assert_allclose(errors, spread / np.sqrt(draws), rtol=1e-9)
        signal = max(center @ center - total / draws, 0)
        expected = {
            "signal_to_noise": np.sqrt(signal / total),
            "draws_needed": total / signal,
            "bias": np.linalg.norm(center - mean) / np.linalg.norm(mean),
            "bias_error": np.sqrt(np.sum((g - exact).var(axis=0, ddof=1)) / draws)
            / np.linalg.norm(mean),
            "noise": np.sqrt(total) / np.linalg.norm(mean),
            "cosine": center @ mean / np.linalg.norm(center) / np.linalg.norm(mean),
        }
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(found, field), value, rtol=1e-7, atol=1e-12)
        # A leaf alone.
        alone, variance = report.per_leaf["['b']"][name], g[:, 3].var(ddof=1)
        signal = max(center[3] ** 2 - variance / draws, 0)
        np.testing.assert_allclose(alone.signal_to_noise, np.sqrt(signal / variance), rtol=1e-7)
    assert "draws needed" in str(report)
    assert repr(report) == str(report)  # at the end of a notebook's cell
    import matplotlib as mpl

    mpl.use("agg")
    assert len(report.plot().axes) == 3


def test_fixed_data_have_no_noise():
    optimizers = {
        "exact": gradhpo.UnrolledOptimizer(SGD, unroll_steps=4),
        "first order": gradhpo.FOOptimizer(SGD),
    }
    state = optimizers["exact"].init(jnp.zeros(3), NOISY_HYPERPARAMS)
    report = gradhpo.compare_over_batches(optimizers, state, DATA, DATA, NOISY, num_draws=3)
    assert report.overall["exact"].noise < 1e-12
    assert report.bias["exact"] == 0
    assert "sees none" in report.failed["first order"]


def test_draws_that_are_not_finite_are_left_out():
    spoilt = DATA.at[7, 0].set(jnp.nan)
    val = lambda i: spoilt[i][None]
    inner = lambda h: relaxed(optax.sgd(jnp.exp(h["rate"])))
    optimizer = gradhpo.ImplicitOptimizer(inner, None, gradhpo.Neumann(3, 0.1))
    state = optimizer.init(jnp.zeros(3), NOISY_HYPERPARAMS | {"rate": jnp.asarray(-2.0)})
    report = gradhpo.compare_over_batches(
        {"implicit": optimizer}, state, DATA[:4], val, NOISY, num_draws=len(DATA)
    )
    assert report.nonfinite == {"reference": 1, "implicit": 1}
    all_spoilt = gradhpo.compare_over_batches(
        {"implicit": optimizer}, state, DATA[:4], DATA * jnp.nan, NOISY, num_draws=2
    )
    assert all_spoilt.nonfinite["reference"] == 2
    assert np.isnan(all_spoilt.bias["implicit"])
    assert np.isfinite(report.bias["implicit"])
    assert report.unseen == {"implicit": ("['rate']",)}
    text = str(report)
    assert "1 of 40 draws are not finite" in text
    assert "does not see ['rate'], which counts as bias" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_draws": 1}, "at least 2"),
        ({"train_data": iter([DATA])}, "ended after the batches of 0 draws"),
        ({"val_data": iter([DATA])}, "ended after the batches of 1 draws"),
        ({"num_steps": 3}, "do not divide the horizon of 3"),
        ({"train_data": [DATA]}, "train_data is a list"),
        ({"optimizers": {}}, "optimizers is empty"),
    ],
)
def test_bad_draws(change, message):
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=2)
    arguments = {
        "optimizers": {"exact": optimizer},
        "state": optimizer.init(jnp.zeros(3), NOISY_HYPERPARAMS),
        "train_data": DATA,
        "val_data": DATA,
        "losses": NOISY,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        gradhpo.compare_over_batches(**(arguments | change))


# -- along the horizon -------------------------------------------------------------------


@pytest.fixture(scope="module")
def horizon():
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=STEPS)
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    return gradhpo.explain_horizon(optimizer, state, None, None, LOSSES, greedy_gamma=GAMMA)


def test_shares_equal_closed_forms(horizon):
    P, optimum = np.eye(5) - RATE * H, np.linalg.solve(H, B)
    power = np.linalg.matrix_power
    alpha = [Q @ (optimum + power(P, t) @ (START - optimum) - TARGET) for t in range(STEPS + 1)]
    ages = np.arange(STEPS)[::-1]
    exact = np.stack([RATE * power(P, age) @ alpha[STEPS] for age in ages])
    greedy = np.stack([GAMMA**age * RATE * alpha[STEPS - age] for age in ages])
    g = exact.sum(axis=0)
    np.testing.assert_allclose(horizon.share["exact"], exact @ g / (g @ g), atol=1e-8)
    np.testing.assert_allclose(horizon.share["greedy"], greedy @ g / (g @ g), atol=1e-8)
    only_last = np.where(ages == 0, exact @ g / (g @ g), 0)
    np.testing.assert_allclose(horizon.share["one step"], only_last, atol=1e-8)
    np.testing.assert_allclose(horizon.norm, np.linalg.norm(exact, axis=1), atol=1e-8)
    first = horizon.share_of_leaf["['first']"]["exact"]
    np.testing.assert_allclose(first, exact[:, :2] @ g[:2] / (g[:2] @ g[:2]), atol=1e-8)
    tails = np.cumsum(exact[::-1], axis=0)
    cosines = tails @ g / np.linalg.norm(tails, axis=1) / np.linalg.norm(g)
    np.testing.assert_allclose(horizon.cosine_of_last, cosines, atol=1e-8)
    lengths = np.linalg.norm(tails, axis=1) / np.linalg.norm(g)
    np.testing.assert_allclose(horizon.length_of_last, lengths, atol=1e-8)
    assert horizon.direct_share == 0
    needed = horizon.steps_needed(0.97)
    assert cosines[needed - 1] >= 0.97 > cosines[needed - 2]


@pytest.mark.parametrize(
    ("cosines", "lengths", "warned"),
    [
        # Both needed truncations are short, one of them, or none; the whole is no truncation.
        ([0.0, 0.95, 1.0, 1.0], [0.1, 0.2, 0.3, 1.0], "do not truncate to 2 or 3: "),
        ([0.0, 0.95, 1.0, 1.0], [0.1, 0.2, 0.9, 1.0], "do not truncate to 2: "),
        ([0.0, 0.95, 1.0, 1.0], [0.1, 0.6, 0.9, 1.0], None),
        ([0.0, 0.2, 0.3, 1.0], [0.1, 0.2, 0.3, 0.4], None),
    ],
)
def test_a_truncation_that_is_far_too_short_is_advised_against(horizon, cosines, lengths, warned):
    found = {"cosine_of_last": np.array(cosines), "length_of_last": np.array(lengths)}
    text = str(dataclasses.replace(horizon, norm=np.ones(4), **found))
    at = lambda cosine: int(np.argmax(np.array(cosines) >= cosine))
    assert f"the last {at(0.9) + 1} of 4 (norm ratio {lengths[at(0.9)]:.2f}); of 0.99" in text
    assert ("do not truncate" in text) == (warned is not None)
    assert warned is None or warned in text


def test_hyperdistill_is_spread_over_the_horizon(horizon):
    optimizer = gradhpo.OnlineHypergradientOptimizer(SGD, OUTER)
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    report = gradhpo.compare_hypergradients(
        {"online": optimizer}, state, gradhpo.BatchStack(jnp.zeros(STEPS)), None, LOSSES
    )
    flat = lambda tree: np.concatenate(jax.tree.leaves(tree))
    g, distilled = closed_forms()["exact"], flat(report.hypergradients["online"])
    shares = horizon.share["HyperDistill"]
    np.testing.assert_allclose(shares.sum(), distilled @ g / (g @ g), rtol=1e-8)
    np.testing.assert_allclose(shares[1:] / shares[:-1], 1 / 0.99, rtol=1e-8)


def test_shares_add_up_through_optimizer_state():
    """With momentum, mini-batches and a direct term; the truncations match unrolling."""
    inner = relaxed(lambda h: optax.sgd(jnp.exp(h["rate"]), momentum=0.9))
    train_loss = lambda w, h, batch: jnp.sum(jnp.cosh(w - h["a"] * batch))
    val_loss = lambda w, h, batch: jnp.sum((w - 1) ** 2) + 0.1 * jnp.sum((w - h["a"]) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(inner, unroll_steps=5, truncation=2)
    state = optimizer.init(jnp.zeros(3), {"a": jnp.arange(3.0), "rate": jnp.asarray(-2.0)})
    stack = gradhpo.BatchStack(jnp.linspace(0.5, 1.5, 5))
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    report = gradhpo.explain_horizon(optimizer, state, stack, None, losses)
    assert report.share["exact"].sum() + report.direct_share == pytest.approx(1, abs=1e-10)
    assert report.direct_share != 0
    # Greedy's share is what GreedyOptimizer returns, with the same momentum and batches.
    greedy = gradhpo.GreedyOptimizer(inner, unroll_steps=5)
    pair = (losses.train_loss, losses.val_loss)
    kept = greedy.compute_hypergradient(state, stack, None, *pair)
    along = gradhpo.tree_dot(kept, report.hypergradient) / gradhpo.tree_dot(
        report.hypergradient, report.hypergradient
    )
    total = report.share["greedy"].sum() + report.direct_share
    assert total == pytest.approx(float(along), abs=1e-10)
    comparison = gradhpo.compare_hypergradients({"last 2": optimizer}, state, stack, None, losses)
    assert report.cosine_of_last[1] == pytest.approx(comparison.cosine["last 2"], abs=1e-10)
    assert "inner steps" in str(report)
    import matplotlib as mpl

    mpl.use("agg")
    assert len(report.plot().axes) == 2


def test_a_hypergradient_that_is_not_finite_is_said_to_be_none():
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=3)
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    nan = gradhpo.LossFunctions(LOSSES.train_loss, lambda w, h, batch: jnp.nan * jnp.sum(w))
    report = gradhpo.explain_horizon(optimizer, state, None, None, nan)
    assert "not finite; gradhpo.check_hypergradient" in str(report)
    with pytest.raises(ValueError, match="not finite"):
        report.steps_needed()


def test_other_inner_updates_are_remarked_over_batches():
    optimizers = {
        "one step": gradhpo.OneStepOptimizer(SGD),
        "faster": gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.5))),
    }
    state = optimizers["one step"].init(jnp.zeros(3), NOISY_HYPERPARAMS)
    report = gradhpo.compare_over_batches(
        optimizers, state, DATA, DATA, NOISY, num_draws=2, num_steps=3
    )
    assert list(report.remarks) == ["faster"]
    assert "same inner update" in str(report)


def test_a_hypergradient_of_zero_is_said_to_be_one():
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=3)
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    flat = gradhpo.LossFunctions(LOSSES.train_loss, lambda w, h, batch: 0 * jnp.sum(w))
    report = gradhpo.explain_horizon(optimizer, state, None, None, flat)
    assert "is 0" in str(report)
    report.plot()


def test_bad_horizons():
    optimizer = gradhpo.TaskBatched(gradhpo.UnrolledOptimizer(SGD, unroll_steps=2), 2)
    state = optimizer.init(jnp.zeros(5), HYPERPARAMS)
    with pytest.raises(TypeError, match="the optimizer that it wraps"):
        gradhpo.explain_horizon(optimizer, state, None, None, LOSSES)
    single = optimizer.optimizer
    state = single.init(jnp.zeros(5), HYPERPARAMS)
    with pytest.raises(ValueError, match="gamma must be in"):
        gradhpo.explain_horizon(single, state, None, None, LOSSES, greedy_gamma=1.5)


# -- plans -------------------------------------------------------------------------------


def bent_train_loss(w, h, batch):
    return jnp.sum(jnp.cosh(w - h)) + 0 * jnp.sum(batch)


BENT = gradhpo.LossFunctions(bent_train_loss, lambda w, h, batch: jnp.sum((w - 1) ** 2))


@pytest.fixture(scope="module")
def planned():
    """A parameter takes 8 bytes: an inner state of 1,000 of them 8 kB."""
    optimizers = {
        "exact": gradhpo.UnrolledOptimizer(SGD),
        "greedy": gradhpo.GreedyOptimizer(SGD),
        "one step": gradhpo.OneStepOptimizer(SGD),
        "first order": gradhpo.FOOptimizer(SGD),
    }
    state = optimizers["exact"].init(jnp.zeros(1_000), jnp.zeros(1_000))
    stack = gradhpo.BatchStack(jnp.zeros((1, 2)))
    limit = 2**20
    plan = gradhpo.plan(
        optimizers, state, stack, None, BENT, horizons=[10, 400, 100_000], max_bytes=limit
    )
    return plan, limit


@pytest.mark.parametrize("counts_on_the_cpu", [True, False])
def test_flops_where_the_compiler_does_not_count_them(monkeypatch, counts_on_the_cpu):
    """As on a GPU: the CPU compiler is asked; without one, flops are not reported as 0."""
    function = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, 5)[0]
    expected, count = Program(function, jnp.ones((8, 8))).cost.flops, cost._flops
    on_the_cpu = lambda: counts_on_the_cpu and jax.config.jax_default_device is not None  # pyright: ignore
    monkeypatch.setattr(cost, "_flops", lambda x: count(x) if on_the_cpu() else float("nan"))
    found = Program(function, jnp.ones((8, 8))).cost.flops
    np.testing.assert_equal(found, expected if counts_on_the_cpu else np.nan)
    assert (tables.flops_of(found) == "-") != counts_on_the_cpu


def test_plan_agrees_with_the_program_that_runs(planned):
    plan, limit = planned
    for steps, checkpoints in {10: None, 400: "sqrt"}.items():
        row = plan["exact", steps]
        assert row.fits
        assert row.checkpoints == checkpoints
        assert row.cost.total_bytes <= limit
        state = row.optimizer.init(jnp.zeros(1_000), jnp.zeros(1_000))
        stack = gradhpo.BatchStack(jnp.zeros((steps, 2)))
        losses = (BENT.train_loss, BENT.val_loss)
        step = eqx.filter_jit(type(row.optimizer).step)
        program = step.lower(row.optimizer, state, stack, None, *losses, jnp.zeros(()))
        memory = program.compile().compiled.memory_analysis()
        assert row.cost.temporary_bytes == memory.temp_size_in_bytes
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        # All but a few scalars.
        assert abs(row.cost.total_bytes - row.cost.temporary_bytes - held) <= 64


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_every_smaller_setting_is_tried_once(monkeypatch, backend):
    """Each needs less device memory; host memory counts only if there is a device."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    exact = gradhpo.UnrolledOptimizer(SGD, unroll_steps=100)

    def smaller(**settings):
        found, optimizer = [], dataclasses.replace(exact, **settings)
        while (optimizer := optimizer.with_less_memory()) is not None:
            found.append((optimizer.checkpoints, optimizer.store))
        return found

    on_device, on_host = [("sqrt", "device"), ("log", "device")], [(None, "host")]
    beside = on_host if backend == "gpu" else []
    assert smaller() == on_device + beside
    assert smaller(checkpoints=3) == on_device[1:] + beside
    assert smaller(checkpoints="log") == beside
    assert smaller(store="host") == ([] if beside else on_device)
    assert smaller(checkpoints="sqrt", store="host") == (beside or on_device[1:])


def test_plan_says_what_does_not_fit(planned):
    plan, _ = planned
    far = plan["exact", 100_000]
    assert far.fits is False
    assert far.checkpoints == "log"
    assert plan["greedy", 100_000].fits is False  # its batches alone are too many
    assert plan["greedy", 400].fits
    assert [row.num_steps for row in plan.rows if row.name == "one step"] == [1]
    assert "sees none" in plan["first order", 1].failed
    text = str(plan)
    assert "does not fit, checkpoints='log'" in text
    rejected = list(far.rejected.values())
    assert list(far.rejected) == ["as it is", "checkpoints='sqrt'"]
    assert rejected[0] > rejected[1] > far.cost.total_bytes > plan.max_bytes
    assert plan["greedy", 400].rejected == {}
    assert f"exact, 100000 inner steps: {tables.bytes_of(rejected[0])} as it is, " in text
    assert "sees none" in text
    with pytest.raises(KeyError, match="exact"):
        plan["exact", 11]
    with pytest.raises(KeyError, match="name, inner steps"):
        plan["exact"]


def test_a_horizon_that_an_optimizer_cannot_have():
    optimizer = gradhpo.UnrolledOptimizer(SGD, unroll_steps=5, truncation=5)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    arguments = ({"last 5": optimizer}, state, jnp.zeros(2), None, BENT)
    plan = gradhpo.plan(*arguments, horizons=[2, 10])
    assert "truncation must be at least 1 and at most 2" in plan["last 5", 2].failed
    assert plan["last 5", 10].cost.flops > 0


def test_planned_flops_grow_with_the_horizon(planned):
    plan, _ = planned
    short, long = (plan["greedy", steps].cost.flops for steps in (10, 400))
    assert 34 < long / short <= 40  # something is done once a step
    # One more forward pass with checkpoints.
    per_step = [plan["exact", steps].cost.flops / steps for steps in (10, 400)]
    assert 1.1 < per_step[1] / per_step[0] < 1.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizons": [0]}, "horizons must be at least 1"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"optimizers": {}}, "optimizers is empty"),
    ],
)
def test_bad_plans(change, message):
    optimizer = gradhpo.UnrolledOptimizer(SGD)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    arguments = {
        "optimizers": {"exact": optimizer},
        "state": state,
        "train_batch": jnp.zeros(2),
        "val_batch": None,
        "losses": BENT,
    }
    with pytest.raises(ValueError, match=message):
        gradhpo.plan(**(arguments | change))


def test_plan_of_tasks_with_an_outer_optimizer():
    inner = gradhpo.UnrolledOptimizer(SGD, relaxed(optax.adam(0.1)))
    optimizer = gradhpo.TaskBatched(inner, num_tasks=2)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    batch = jnp.zeros((2, 4))
    plan = gradhpo.plan({"tasks": optimizer}, state, batch, None, BENT, horizons=[3])
    chosen: Any = plan["tasks", 3].optimizer
    assert chosen.optimizer.unroll_steps == 3
    assert plan["tasks", 3].fits is None


def test_every_report_is_shown_as_its_text():
    shown = [
        x.__name__ for x in tables.Report.__subclasses__() if x.__repr__ is tables.Report.__repr__
    ]
    assert sorted(shown) == [
        "Horizon", "HypergradientCheck", "HypergradientComparison", "HypergradientNoise", "Plan",
        "RetrainingScore",
    ]  # fmt: skip
