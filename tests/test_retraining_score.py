"""`retraining_score` against closed forms, and trainings written out."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed
from scipy import stats

import gradhpo
from gradhpo.diagnostics.score import Scores, spearman


RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(48, 3)), RANDOM.normal(size=48)
DATA = gradhpo.ArrayData((X[:40], Y[:40]), 10, jax.random.key(0), with_indices=True)
QUERIES = jnp.asarray(X[40:45]), jnp.asarray(Y[40:45])
PARAMS = {"first": jnp.asarray(RANDOM.normal(size=(3, 4))), "last": jnp.ones(4) / 4}
HYPERPARAMS = {"weights": jnp.linspace(0.5, 1.5, 40), "rate": jnp.asarray(-3.0)}
INNER = relaxed(lambda h: optax.adam(jnp.exp(h["rate"]), eps_root=1e-12))
STEPS = 8
EXACT = gradhpo.UnrolledOptimizer(INNER, unroll_steps=STEPS)
KEY = jax.random.key(7)


def errors(w, batch):
    x, y = batch
    return (jnp.tanh(x @ w["first"]) @ w["last"] - y) ** 2


def train_loss(w, h, batch):
    batch, indices = batch
    return jnp.mean(h["weights"][indices] * errors(w, batch))


def val_loss(w, h, batch):
    """With a direct term."""
    return jnp.mean(errors(w, batch)) + 0.01 * jnp.sum(h["weights"][:4] ** 2)


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


def moved(key, h):
    """All of the hyperparameters, a little."""
    keys = dict(zip(sorted(h), jax.random.split(key, len(h)), strict=True))
    return {name: x + 0.01 * jax.random.normal(keys[name], x.shape) for name, x in h.items()}


def scored(optimizers=EXACT, **settings):
    first = next(iter(optimizers.values())) if isinstance(optimizers, dict) else optimizers
    state = settings.pop("state", None)
    state = first.init(PARAMS, HYPERPARAMS) if state is None else state
    given = {"train_data": DATA, "queries": QUERIES, "losses": LOSSES}
    given |= {"num_steps": STEPS, "perturb": moved, "num_retrainings": 7, "key": KEY}
    return gradhpo.retraining_score(optimizers, state, **given | {"progress": False} | settings)


def query(number):
    return jax.tree.map(lambda x: x[number : number + 1], QUERIES)


def trained(h, inner=INNER, num_steps=STEPS):
    """By hand, with optax alone."""
    rule, w = inner(h), PARAMS
    s = rule.init(w)
    for t in range(num_steps):
        updates, s = rule.update(jax.grad(train_loss)(w, h, DATA(t)), s, w)
        w = optax.apply_updates(w, updates)
    return w


# -- the statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1000, 3])
def test_rank_correlation_is_that_of_scipy(levels):
    """With many ties, and hardly any."""
    random = np.random.default_rng(1)
    for _ in range(20):
        x, y = random.integers(0, levels, size=(2, 30)).astype(float)
        # Sums of 30 half-integers: exact but for the last division.
        np.testing.assert_allclose(spearman(x, y), stats.spearmanr(x, y)[0], rtol=1e-13)


def test_rank_correlation_of_nothing_is_nan():
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.arange(4.0), np.ones(4)))


def test_interval_is_that_of_resamples_drawn_one_by_one():
    random = np.random.default_rng(2)
    true = random.normal(size=(40, 3))
    predicted = true + 0.5 * random.normal(size=(40, 3))
    found = Scores(true, {"it": predicted}, np.random.default_rng(0))
    by_hand = []
    for _ in range(500):
        chosen = random.integers(0, 40, size=40)
        columns = zip(true[chosen].T, predicted[chosen].T, strict=True)
        by_hand.append(np.mean([stats.spearmanr(x, y)[0] for x, y in columns]))
    # The error of a percentile of 1,000 resamples is about a tenth of the half-width.
    low, high = np.percentile(by_hand, [2.5, 97.5]) - np.median(by_hand) + found.score["it"]
    np.testing.assert_allclose(found.interval["it"], (low, high), atol=0.15 * (high - low))
    assert 0.1 < high - low < 0.5
    columns = zip(true.T, predicted.T, strict=True)
    expected = [stats.spearmanr(x, y)[0] for x, y in columns]
    np.testing.assert_allclose(found.per_query["it"], expected, rtol=1e-13)
    np.testing.assert_allclose(found.score["it"], np.mean(expected), rtol=1e-13)


@pytest.mark.thorough
def test_intervals_cover():
    """Normal pairs of correlation .8: their rank correlation is 6/pi asin(.4)."""
    expected, covered = 6 / np.pi * np.arcsin(0.4), 0
    random = np.random.default_rng(3)
    for _ in range(200):
        x = random.normal(size=(100, 1))
        y = 0.8 * x + 0.6 * random.normal(size=(100, 1))
        low, high = Scores(x, {"it": y}, random).interval["it"]
        covered += low < expected < high
    # Of 200, 190 are expected; a percentile interval of 100 pairs covers about 93 %, and the
    # standard deviation of the count is 4.
    assert 172 <= covered <= 199


def test_queries_without_a_correlation():
    random = np.random.default_rng(4)
    true = random.normal(size=(20, 4))
    true[:, 1] = 0.25
    constant, broken = true.copy(), true.copy()
    constant[:, 2], broken[3, 3] = 1.0, np.nan
    predicted = {"right": true, "constant": constant, "broken": broken, "zero": 0 * true}
    found = Scores(true, predicted, random)
    assert [found.score["right"], *found.interval["right"]] == [1, 1, 1]
    # Two of three queries are right, and the one that says nothing counts as 0.
    for name, which in (("constant", 2), ("broken", 3)):
        np.testing.assert_allclose(found.score[name], 2 / 3)
        assert np.flatnonzero(np.isnan(found.per_query[name])).tolist() == [1, which]
    assert np.all(np.isnan([found.score["zero"], *found.interval["zero"]]))


# -- closed form -------------------------------------------------------------------------------


def test_least_squares_solved_in_one_step():
    """Newton's step solves weighted least squares, whose derivative by the weights is known."""
    x, y = X[:40], Y[:40]
    xs, ys = jnp.asarray(x), jnp.asarray(y)

    def newton(w, weights, batch):
        return jnp.linalg.solve(xs.T @ (weights[:, None] * xs), xs.T @ (weights * ys))

    optimizer = gradhpo.UnrolledOptimizer(update_fn=newton, unroll_steps=1)
    of_query = lambda w, weights, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    losses = gradhpo.LossFunctions(lambda w, weights, batch: jnp.sum(w**2), of_query)
    small = lambda key, weights: weights + 1e-7 * jax.random.normal(key, weights.shape)
    weights = np.linspace(0.5, 1.5, 40)
    found = gradhpo.retraining_score(
        optimizer, optimizer.init(jnp.zeros(3), jnp.asarray(weights)), None, QUERIES, losses,
        num_steps=1, perturb=small, num_retrainings=30, key=KEY, progress=False,
    )  # fmt: skip
    hessian = x.T @ (weights[:, None] * x)
    w = np.linalg.solve(hessian, x.T @ (weights * y))
    # dw/dweight_i = H^-1 x_i (y_i - x_i w)
    by_weight = np.linalg.solve(hessian, (x * (y - x @ w)[:, None]).T)
    qx, qy = map(np.asarray, QUERIES)
    g = 2 * (qx @ w - qy)[:, None] * (qx @ by_weight)
    keys = jax.random.split(KEY, 30)
    deltas = np.stack([np.asarray(small(key, jnp.asarray(weights))) for key in keys]) - weights
    [name] = found.score
    # float64, with a condition number of about 10; relative to the largest of 30.
    expected = deltas @ g.T
    atol = 1e-8 * np.max(np.abs(expected))
    np.testing.assert_allclose(found.predicted[name], expected, rtol=1e-8, atol=atol)
    # Of second order in 1e-7, and rounding of losses of size 1 of 1e-16.
    np.testing.assert_allclose(found.true, expected, atol=1e-5 * np.max(np.abs(expected)))
    np.testing.assert_allclose(found.score[name], 1, atol=1e-12)


# -- retrainings and estimates -----------------------------------------------------------------


ADAGRAD = relaxed(lambda h: optax.adagrad(jnp.exp(h["rate"]), jnp.exp(h["rate"])))


@pytest.mark.parametrize("inner", quick([INNER, ADAGRAD], keep=[ADAGRAD]), ids=lambda x: None)
def test_retrainings_are_those_of_a_loop(inner):
    """Hyperparameters in the loss, in the inner rate, and in what the optimizer starts with."""
    found = scored(gradhpo.UnrolledOptimizer(inner, unroll_steps=STEPS))
    losses = lambda h, w: [val_loss(w, h, query(i)) for i in range(5)]
    base = np.stack(losses(HYPERPARAMS, trained(HYPERPARAMS, inner)))
    np.testing.assert_allclose(found.losses, base, rtol=1e-12)
    for j, key in enumerate(jax.random.split(KEY, 7)):
        h = moved(key, HYPERPARAMS)
        # Losses of size 1, in another order of sums.
        np.testing.assert_allclose(
            found.true[j], np.stack(losses(h, trained(h, inner))) - base, atol=1e-12
        )
