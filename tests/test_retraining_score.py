"""`retraining_score` against closed forms, and trainings written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed
from scipy import stats

import gradhpo
from gradhpo.diagnostics.score import Scores, spearman
from gradhpo.training import boundaries
from gradhpo.utils.tracing import num_traces


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


def keys_of(count):
    return [jax.random.fold_in(KEY, number) for number in range(count)]


def losses_by_hand(inner):
    """Of every query after a training with optax alone, as a function of the hyperparameters."""

    @jax.jit
    def losses(h):
        rule, w = inner(h), PARAMS

        def step(carry, batch):
            w, s = carry
            updates, s = rule.update(jax.grad(train_loss)(w, h, batch), s, w)
            return (optax.apply_updates(w, updates), s), None

        (w, _), _ = jax.lax.scan(step, (w, rule.init(w)), DATA.stack(0, STEPS).batches)
        return jnp.stack([val_loss(w, h, query(number)) for number in range(5)])

    return losses


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
    keys = keys_of(30)
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
    losses = losses_by_hand(inner)
    base = losses(HYPERPARAMS)
    np.testing.assert_allclose(found.losses, base, rtol=1e-12)
    for j, key in enumerate(keys_of(7)):
        # Losses of size 1, in another order of sums.
        expected = losses(moved(key, HYPERPARAMS)) - base
        np.testing.assert_allclose(found.true[j], expected, atol=1e-12)
        assert np.max(np.abs(expected)) > 1e-4


ESTIMATORS = {
    "exact": EXACT,
    "one step": gradhpo.OneStepOptimizer(INNER),
    "greedy": gradhpo.GreedyOptimizer(INNER, unroll_steps=4),
    "T1-T2": gradhpo.T1T2Optimizer(INNER, inner_steps=2),
    "DrMAD": gradhpo.DrMADOptimizer(INNER, unroll_steps=STEPS),
    "implicit": gradhpo.ImplicitOptimizer(INNER, None, gradhpo.Neumann(5, 0.1), inner_steps=4),
}


def assert_predicts(found, name):
    """The products of the hypergradients with the changes, written out."""
    g = found.hypergradients[name]
    for j, key in enumerate(keys_of(7)):
        new = moved(key, HYPERPARAMS)
        products = lambda leaf, new=new: g[leaf] * np.asarray(new[leaf] - HYPERPARAMS[leaf])
        expected = [np.sum(products("weights"), axis=1), products("rate")]
        # Sums of 41 products.
        np.testing.assert_allclose(found.predicted[name][j], sum(expected), rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("name", quick(list(ESTIMATORS), keep=["one step"]))
def test_hypergradients_are_those_of_every_query_alone(name):
    """Steps of each on its own batches, up to the last, with the hyperparameters as they are."""
    optimizer = ESTIMATORS[name]
    found = scored({name: optimizer})
    per_step, state = optimizer.num_inner_steps, optimizer.init(PARAMS, HYPERPARAMS)
    batches = lambda step: DATA.stack(step * per_step, per_step)
    last = STEPS // per_step - 1
    for step in range(last):
        state = optimizer.step(state, batches(step), QUERIES, LOSSES, lr_hyper=0.0)
    for number in (0, 3):
        alone = optimizer.compute_hypergradient(state, batches(last), query(number), LOSSES)
        of_one = {leaf: x[number] for leaf, x in found.hypergradients[name].items()}
        # The same sums in another order, through eight steps.
        assert_same(of_one, alone, rtol=1e-9, atol=1e-12)
    assert_predicts(found, name)
    assert not found.failed
    assert not found.remarks


@pytest.mark.thorough
def test_one_query_is_what_compare_hypergradients_looks_at():
    """Also for an estimator with a memory, which reads the batches ahead."""
    optimizers = ESTIMATORS | {"HyperDistill": gradhpo.OnlineHypergradientOptimizer(INNER)}
    found = scored(optimizers, queries=query(0))
    given = EXACT.init(PARAMS, HYPERPARAMS), DATA.stack(0, STEPS), query(0), LOSSES
    expected = gradhpo.compare_hypergradients(optimizers, *given).hypergradients
    of_one = jax.tree.map(lambda x: x[0], found.hypergradients)
    assert_same(of_one, expected, rtol=1e-9, atol=1e-12)  # sums in another order
    assert found.unseen == {"implicit": ("['rate']",)}
    assert "implicit does not see ['rate']" in str(found)


# -- blocks and programs -----------------------------------------------------------------------


@pytest.mark.parametrize("block_size", quick([1, 3, 8, 100], keep=[3]))
def test_blocks_of_any_size_give_the_same(block_size):
    """Of three programs: hypergradients, a block of trainings, predictions."""
    before = num_traces()
    found = scored(block_size=block_size)
    assert num_traces() - before == 2  # what is predicted takes no training
    expected = scored()
    np.testing.assert_allclose(found.true, expected.true, atol=1e-13)  # losses of size 1
    np.testing.assert_array_equal(*[x.predicted["UnrolledOptimizer"] for x in (found, expected)])
    assert found.score == expected.score


@pytest.mark.thorough
def test_functions_that_are_not_for_several_at_once():
    """A callback without a rule for `vmap`: one training, and one query, after another."""

    def on_host(x):
        return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((), x.dtype), x)

    @jax.custom_jvp
    def opaque(x):
        return on_host(x)

    opaque.defjvp(lambda primals, tangents: (opaque(*primals), *tangents))
    alone = gradhpo.LossFunctions(
        lambda *given: opaque(train_loss(*given)), lambda *given: opaque(val_loss(*given))
    )
    found, expected = scored(losses=alone), scored()
    np.testing.assert_allclose(found.true, expected.true, atol=1e-13)  # losses of size 1
    for x, y in ((found.hypergradients, expected.hypergradients),):
        assert_same(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("room", quick([0, 300_000], keep=[0]))
def test_what_does_not_fit_is_done_in_parts(monkeypatch, room):
    """By the compiler's figure for the memory of so many at once."""
    expected = scored()
    for where in ("retrain", "predictions"):
        monkeypatch.setattr(f"gradhpo.diagnostics.{where}.free_bytes", lambda: room)
    before = num_traces()
    found = scored()
    assert num_traces() - before > 2  # the first try, and others
    np.testing.assert_allclose(found.true, expected.true, atol=1e-13)  # losses of size 1
    assert_same(found.hypergradients, expected.hypergradients, rtol=1e-9, atol=1e-12)


# -- data --------------------------------------------------------------------------------------


class Loader:
    """The batches of `DATA` in order."""

    def __iter__(self):
        for t in range(STEPS):
            yield jax.tree.map(np.asarray, DATA(t))


@pytest.mark.thorough
def test_data_of_every_kind():
    """A loader, a function of the index, and a later state with batches of its own."""
    expected = scored()
    for data in (Loader(), gradhpo.iterate(Loader()), lambda t: DATA(t)):
        np.testing.assert_allclose(scored(train_data=data).true, expected.true, atol=1e-13)
    optimizer = gradhpo.UnrolledOptimizer(INNER, unroll_steps=4)
    state = optimizer.step(
        optimizer.init(PARAMS, HYPERPARAMS), DATA.stack(0, 4), QUERIES, LOSSES, lr_hyper=0.0
    )
    found = scored(optimizer, state=state, num_steps=4)
    # From the middle, where the inner optimizer's state is no longer its first.
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-13)


# -- a directory -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(monkeypatch, writes, **settings):
    """A call that ends with its process, which is after this number of files."""
    write, left = boundaries.write_file, [writes]

    def counted(*arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(boundaries, "write_file", counted)
        with pytest.raises(Killed):
            scored(**settings)


def test_goes_on_where_it_was_bit_for_bit(tmp_path, monkeypatch):
    """Also with more estimators and more retrainings than before."""
    settings = {"directory": tmp_path, "block_size": 3}
    killed_after(monkeypatch, 2, **settings)  # of one estimate and three blocks
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    killed_after(monkeypatch, 1, **settings)
    found = scored(**settings)
    before = num_traces()
    again = scored(**settings | {"block_size": None})
    assert num_traces() - before <= 2  # losses on their first batches; nothing is trained
    expected = scored(block_size=3)
    for report in (found, again):
        assert_same(report.true, expected.true)
        assert_same(report.hypergradients, expected.hypergradients)
        assert (report.score, report.interval) == (expected.score, expected.interval)
    assert again.seconds == found.seconds
    assert again.retraining_seconds == found.retraining_seconds


@pytest.mark.thorough
def test_more_of_the_same(tmp_path):
    """More estimators and more retrainings than an earlier call had: it does what is new."""
    settings = {"directory": tmp_path, "block_size": 3}
    scored(**settings)
    optimizers = {"UnrolledOptimizer": EXACT, "one step": ESTIMATORS["one step"]}
    names = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.ckpt")}
    found = scored(optimizers, **settings, num_retrainings=10)
    expected = scored(optimizers, block_size=3, num_retrainings=10)
    assert_same(found.true, expected.true)
    assert_same(found.hypergradients, expected.hypergradients)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.ckpt")}
    changed = {name for name in kept if names.get(name) != kept[name]}
    assert len([name for name in changed if name.startswith("estimate")]) == 1
    # The third block had two trainings, and has three.
    assert {name for name in changed if name.startswith("losses")} == {
        f"losses-{number:010d}.ckpt" for number in (6, 9)
    }


OTHERS = {
    "steps": {"num_steps": 16},
    "data": {"train_data": gradhpo.ArrayData((X[:40], Y[:40]), 10, KEY, with_indices=True)},
    "queries": {"queries": query(0)},
    "perturb": {"perturb": gradhpo.leave_out(0.1, lambda h: h["weights"])},
    "key": {"key": jax.random.key(8)},
    "losses": {"losses": gradhpo.LossFunctions(train_loss, lambda *x: 1.01 * val_loss(*x))},
}


@pytest.mark.parametrize("other", quick(list(OTHERS), keep=["key"]))
def test_a_directory_holds_one_problem(tmp_path, other):
    one = {"optimizers": ESTIMATORS["one step"], "directory": tmp_path}
    scored(**one)
    with pytest.raises(ValueError, match="holds another retraining: .* call retraining_score as"):
        scored(**one | OTHERS[other])


@pytest.mark.thorough
def test_a_directory_holds_one_optimizer_of_a_name(tmp_path):
    greedy = lambda gamma: gradhpo.GreedyOptimizer(INNER, unroll_steps=4, gamma=gamma)
    scored({"it": greedy(0.9)}, directory=tmp_path, block_size=3)
    with pytest.raises(ValueError, match="hypergradients of another optimizer .*'it'.*gamma was"):
        scored({"it": greedy(0.5)}, directory=tmp_path)
    with pytest.raises(ValueError, match="block_size=4, and there are blocks of 3 trainings"):
        scored({"it": greedy(0.9)}, directory=tmp_path, block_size=4)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="directory=.* is a file"):
        scored({"it": greedy(0.9)}, directory=tmp_path / "file")
