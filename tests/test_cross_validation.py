"""K folds at once equal K separate problems: hypergradients, steps, batches, errors."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import quick

import gradhpo


FEATURES = 3
# Both sides take the same steps, in float64; CG solves to 1e-13.
EXACT = 1e-10


def error(w, h, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def ridge(w, h, batch):
    return error(w, h, batch) / 2 + jnp.sum(jnp.exp(h) * w**2)


def problem(size):
    x = jax.random.normal(jax.random.key(0), (size, FEATURES))
    y = x @ jnp.arange(1.0, FEATURES + 1) + jax.random.normal(jax.random.key(1), (size,))
    return x, y


LOSSES = gradhpo.LossFunctions(ridge, error)
START = jnp.linspace(-2.0, 0.0, FEATURES)
DIRECT = gradhpo.ImplicitOptimizer(
    optax.sgd(0.2), optax.sgd(0.1), linear_solver=lx.LU(), inner_steps=2_000
)
BY_CG = gradhpo.ImplicitOptimizer(
    optax.sgd(0.2),
    optax.sgd(0.1),
    linear_solver=lx.CG(rtol=1e-13, atol=1e-13),
    inner_steps=2_000,
)
UNROLLED = gradhpo.UnrolledOptimizer(optax.sgd(0.1, momentum=0.9), optax.sgd(0.1), unroll_steps=6)
UNEQUAL = np.asarray([2, 0, 1, 1, 0, 2, 2, -1, 0, 1, 2, 2, 0, 1, -1])


def apart(optimizer, params, losses, data, hyperparams):
    """The hypergradients of each fold alone, in the order of the folds."""
    found = {}
    train, val = data
    for members, *stacks in zip(train.members, train.stacks, val.stacks, strict=True):
        for position, number in enumerate(members):
            batches = jax.tree.map(lambda x, at=position: x[at] if x.ndim else x, stacks)
            state = optimizer.init(params, hyperparams)
            found[number] = optimizer.compute_hypergradient(state, *batches, losses)
    return [found[number] for number in sorted(found)]


def mean(trees):
    return jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *trees)


OPTIMIZERS = {"direct": DIRECT, "CG": BY_CG, "unrolled": UNROLLED}
FOLDS = {"equal": 5, "unequal": 4, "given": UNEQUAL, "leave one out": 15}


@pytest.mark.parametrize(
    ("optimizer", "folds"),
    quick([(x, y) for x in OPTIMIZERS for y in FOLDS], keep=[]),
)
def test_it_is_the_mean_of_separate_hypergradients(optimizer, folds):
    optimizer, folds, data = OPTIMIZERS[optimizer], FOLDS[folds], problem(15)
    key = jax.random.key(2) if isinstance(folds, int) else None
    params, losses, both = gradhpo.cross_validation(jnp.zeros(FEATURES), LOSSES, data, folds, key)
    state = optimizer.init(params, START)
    found = optimizer.compute_hypergradient(state, *both, losses)
    alone = apart(optimizer, jnp.zeros(FEATURES), LOSSES, both, START)
    np.testing.assert_allclose(found, mean(alone), rtol=EXACT, atol=EXACT)
    # Folds differ: a mean over fewer of them is another number.
    assert np.max(np.abs(np.asarray(alone[0]) - np.asarray(found))) > 1e-3


@pytest.mark.parametrize("folds", [4, 5, 15])
def test_every_example_is_held_out_once_and_trains_all_other_folds(folds):
    train, val = gradhpo.cross_validation(
        jnp.zeros(1), LOSSES, jnp.arange(15), folds, jax.random.key(0)
    ).data
    held_out = [set(row.tolist()) for stack in val.stacks for row in stack]
    trained = [set(row.tolist()) for stack in train.stacks for row in stack]
    assert sorted(x for fold in held_out for x in fold) == list(range(15))
    assert all(
        a | b == set(range(15)) and not a & b for a, b in zip(held_out, trained, strict=True)
    )
    sizes = [len(fold) for fold in held_out]
    assert max(sizes) - min(sizes) <= 1
    assert train.num_folds == folds
    assert val.num_examples == 15
    assert sorted(held_out[0]) != list(range(sizes[0])) or folds == 15  # shuffled


def test_given_folds_keep_their_numbers_and_never_is_always_training():
    numbers = jnp.arange(15)
    train, val = gradhpo.cross_validation(jnp.zeros(1), LOSSES, numbers, UNEQUAL).data
    for members, trained, held_out in zip(train.members, train.stacks, val.stacks, strict=True):
        for number, mine, others in zip(members, held_out, trained, strict=True):
            assert mine.tolist() == np.flatnonzero(number == UNEQUAL).tolist()
            assert others.tolist() == np.flatnonzero(number != UNEQUAL).tolist()
    assert train.members == ((2,), (0, 1))
    own = lambda w, h, batch: jnp.sum(batch)
    found = val.each(own, jnp.zeros((3, 1)), None)
    expected = [np.flatnonzero(number == UNEQUAL).sum() for number in range(3)]
    assert found.tolist() == expected


@pytest.mark.thorough
def test_training_adds_up_and_validation_averages_with_metrics():
    data = problem(11)
    scaled = lambda w, h, batch: (ridge(w, h, batch), {"length": jnp.sum(w**2)})
    losses = gradhpo.LossFunctions(scaled, lambda *a: (error(*a), {"count": len(a[2][0])}))
    params, losses, both = gradhpo.cross_validation(
        jnp.ones(FEATURES), losses, data, 3, jax.random.key(0)
    )
    params = params * jnp.arange(1.0, 4.0)[:, None]
    of_each = [both[i].each(f, params, START) for i, f in enumerate((ridge, error))]
    train, metrics = losses.train_loss(params, START, both[0])
    # Sums of three numbers in another order.
    np.testing.assert_allclose(train, of_each[0].sum(), rtol=1e-14)
    np.testing.assert_allclose(metrics["length"], np.mean([3, 12, 27]), rtol=1e-14)
    val, metrics = losses.val_loss(params, START, both[1])
    np.testing.assert_allclose(val, of_each[1].mean(), rtol=1e-14)
    np.testing.assert_allclose(metrics["count"], 11 / 3, rtol=1e-14)


@pytest.mark.thorough
def test_frozen_leaves_are_shared_and_functions_stay():
    x, y = problem(9)
    model = {
        "features": gradhpo.frozen(jnp.eye(FEATURES)),
        "w": jnp.zeros(FEATURES),
        "times": jnp.asarray(2, jnp.int32),
        "activation": jnp.tanh,
    }

    def loss(model, h, batch):
        z = model["activation"](batch[0] @ model["features"]) @ model["w"]
        return jnp.mean((model["times"].astype(float) * z - batch[1]) ** 2) + h * jnp.sum(
            model["w"] ** 2
        )

    losses = gradhpo.LossFunctions(loss, loss)
    params, losses, both = gradhpo.cross_validation(model, losses, (x, y), 4, jax.random.key(0))
    assert gradhpo.unfrozen(params)["features"].shape == (FEATURES, FEATURES)
    assert params["w"].shape == (4, FEATURES)
    assert params["times"].shape == ()
    h = jnp.asarray(0.1)
    state = UNROLLED.init(params, h)
    found = UNROLLED.compute_hypergradient(state, *both, losses)
    alone = apart(UNROLLED, model, gradhpo.LossFunctions(loss, loss), both, h)
    np.testing.assert_allclose(found, mean(alone), rtol=EXACT)


@pytest.mark.thorough
def test_an_update_fn_of_one_model_serves_all_folds():
    """A lasso by proximal steps; leaves that it does not change are returned unchanged."""

    def proximal_step(model, h, batch):
        w = model["w"]
        moved = w - 0.2 * jax.grad(error)(w, h, batch)
        shrunk = jnp.sign(moved) * jax.nn.relu(jnp.abs(moved) - 0.2 * jnp.exp(h))
        return model | {"w": shrunk}

    model = {"w": jnp.zeros(FEATURES), "count": jnp.asarray(3, jnp.int32)}
    of_w = lambda model, h, batch: error(model["w"], h, batch)
    losses = gradhpo.LossFunctions(of_w, of_w)
    options = {"linear_solver": lx.LU(), "inner_steps": 500}
    one = gradhpo.ImplicitOptimizer(None, optax.sgd(0.1), update_fn=proximal_step, **options)
    of_all = lambda params, h, folds: folds.each(proximal_step, params, h)
    every = gradhpo.ImplicitOptimizer(None, optax.sgd(0.1), update_fn=of_all, **options)
    params, of_folds, both = gradhpo.cross_validation(model, losses, problem(11), UNEQUAL[:11])
    state = every.init(params, jnp.asarray(-1.0))
    found = every.compute_hypergradient(state, *both, of_folds)
    alone = apart(one, model, losses, both, jnp.asarray(-1.0))
    np.testing.assert_allclose(found, mean(alone), rtol=EXACT)


@pytest.mark.thorough
def test_keys_are_split_and_numbers_shared():
    data = {"x": np.ones(7), "key": jax.random.key(1), "width": 0.5, "keys": _keys(7)}
    train, val = gradhpo.cross_validation(jnp.zeros(1), LOSSES, data, 3, jax.random.key(0)).data
    draws = lambda w, h, batch: jax.random.normal(batch["key"]) * batch["width"]
    found = np.concatenate([part.each(draws, jnp.zeros((3, 1)), None) for part in (train, val)])
    assert len(set(found.tolist())) == 6
    assert [stack["width"].shape for stack in train.stacks] == [(), ()]
    assert [stack["keys"].shape for stack in val.stacks] == [(1, 3), (2, 2)]


def _keys(count):
    return jax.random.split(jax.random.key(3), count)


@pytest.mark.thorough
def test_minibatches_are_drawn_from_every_fold():
    train, _ = gradhpo.cross_validation(jnp.zeros(1), LOSSES, jnp.arange(15), UNEQUAL).data
    drawn = train.sample(jax.random.key(0), 4)
    again = train.sample(jax.random.key(1), 4)
    changed = False
    for whole, part, other in zip(train.stacks, drawn.stacks, again.stacks, strict=True):
        assert part.shape == (len(whole), 4)
        for fold, some in zip(whole, part, strict=True):
            assert len(set(some.tolist())) == 4
            assert set(some.tolist()) <= set(fold.tolist())
        changed |= bool(jnp.any(part != other))
    assert changed


@pytest.mark.thorough
def test_a_run_with_minibatches_trains_each_fold_on_its_own():
    data = problem(24)
    params, losses, (train, val) = gradhpo.cross_validation(
        jnp.zeros(FEATURES), LOSSES, data, 4, jax.random.key(0)
    )
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.01))
    state = optimizer.init(params, START)
    draw = lambda i: train.sample(jax.random.fold_in(jax.random.key(5), i), 8)
    state, history = gradhpo.run(optimizer, state, losses, draw, val, num_steps=30, progress=False)
    # From 10.7 to 5.5, close to the best that the penalties allow.
    assert history["val_loss"][-1] < 0.6 * history["val_loss"][0]
    w = np.asarray(state.params)
    assert np.min(np.abs(w[:1] - w[1:]).max(axis=1)) > 1e-4


def test_the_report_counts_held_out_examples():
    params, losses, data = gradhpo.cross_validation(
        jnp.zeros(FEATURES), LOSSES, problem(15), 5, jax.random.key(0)
    )
    optimizer = gradhpo.FOOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    of_h = gradhpo.LossFunctions(
        losses.train_loss, lambda w, h, batch: losses.val_loss(w, h, batch) + jnp.sum(h**2)
    )
    state = optimizer.init(params, START)
    _, history = gradhpo.run(optimizer, state, of_h, *data, num_steps=1, progress=False)
    assert "15 validation examples for 3 hyperparameters" in history.report


def called(*arguments):
    return gradhpo.cross_validation(jnp.zeros(FEATURES), LOSSES, problem(6), *arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((5,), ValueError, r"pass key=jax\.random\.key\(0\)"),
        ((7, "key"), ValueError, "at most 6, got folds=7"),
        ((1, "key"), ValueError, "folds must be at least 2"),
        ((True, "key"), TypeError, "folds must be a Python int"),
        ((np.arange(6) % 2, "key"), ValueError, "pass key=None"),
        ((np.arange(5) % 2,), ValueError, "5 numbers for 6 examples"),
        ((np.asarray([0, 0, 2, 2, 1, 3]) + 1,), ValueError, "numbered 0 to K - 1"),
        ((np.zeros(6, int),), ValueError, "at least 2 of them"),
        ((np.asarray([0, 1, -2, 0, 1, 0]),), ValueError, "numbered 0 to K - 1"),
    ],
)
def test_folds_that_cannot_be_say_what_to_write(arguments, kind, message):
    is_key = lambda x: isinstance(x, str)
    with pytest.raises(kind, match=message):
        called(*(jax.random.key(0) if is_key(x) else x for x in arguments))


def test_other_misuse_says_what_to_write():
    stateful = lambda w, h, batch, model_state: (jnp.sum(w), model_state)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="take no model_state"):
        gradhpo.cross_validation(
            jnp.zeros(3), gradhpo.LossFunctions(stateful, error), problem(6), 2, key
        )
    source = gradhpo.ArrayData(problem(6), batch_size=2, key=key)
    with pytest.raises(TypeError, match=r"train\.sample\(key, size\)"):
        gradhpo.cross_validation(jnp.zeros(3), LOSSES, source, 2, key)
    params, losses, data = called(2, key)
    with pytest.raises(TypeError, match=r"\*data"):
        losses.train_loss(params, START, problem(6))
    with pytest.raises(ValueError, match="pass the params that cross_validation returned"):
        losses.train_loss(jnp.zeros(FEATURES), START, data[0])
    with pytest.raises(ValueError, match="pass the params that cross_validation returned"):
        losses.train_loss(jnp.zeros(2), START, data[0])  # one model's, with a number for each fold
    with pytest.raises(TypeError, match=r"np\.asarray\(folds\)"):
        gradhpo.cross_validation(jnp.zeros(3), LOSSES, problem(6), [0, 0, 0, 1, 1, 1])
    folds = gradhpo.ArrayData(data[0], batch_size=1, key=key)
    with pytest.raises(ValueError, match="folds are not examples"):
        losses.train_loss(params, START, folds(jnp.asarray(0)))
    with pytest.raises(ValueError, match="at most 3, got size=4"):
        data[0].sample(key, 4)
    vector = gradhpo.LossFunctions(lambda w, h, batch: w, error)
    params, losses, data = gradhpo.cross_validation(jnp.zeros(3), vector, problem(6), 2, key)
    with pytest.raises(ValueError, match="train_loss must return a real scalar"):
        losses.train_loss(params, START, data[0])


def test_equal_folds_are_tasks_as_well():
    """`TaskBatched` keeps one inner optimizer for each fold; the hypergradient is the same."""
    params, losses, (train, val) = gradhpo.cross_validation(
        jnp.zeros(FEATURES), LOSSES, problem(15), 5, jax.random.key(0)
    )
    together = UNROLLED.compute_hypergradient(UNROLLED.init(params, START), train, val, losses)
    tasks = gradhpo.TaskBatched(UNROLLED, num_tasks=5)
    state = tasks.init(jnp.zeros(FEATURES), START)
    [of_train], [of_val] = train.stacks, val.stacks
    apart = tasks.compute_hypergradient(state, of_train, of_val, LOSSES)
    np.testing.assert_allclose(together, apart, rtol=EXACT)


@pytest.mark.thorough
def test_sure_of_soft_thresholding_is_its_closed_form():
    """Two models with one outer loss; the degrees of freedom are the numbers above the threshold.

    SURE = sum of min(y², λ²) / n - σ² + 2σ² #{|y| > λ} / n, whose last term is piecewise constant.
    """
    y = 2 * jax.random.normal(jax.random.key(0), (40,))
    size, sigma, epsilon = 40, 0.8, 1e-6  # no |y| is so near to the threshold
    delta = jax.random.rademacher(jax.random.key(1), (size,), y.dtype)
    both = jnp.stack([y, y + epsilon * delta])

    def step(w, log_threshold, targets):
        moved = w - 0.5 * (w - targets)
        return jnp.sign(moved) * jax.nn.relu(jnp.abs(moved) - 0.5 * jnp.exp(log_threshold))

    def train_loss(w, log_threshold, targets):
        return jnp.sum((w - targets) ** 2) / 2 + jnp.exp(log_threshold) * jnp.sum(jnp.abs(w))

    def sure(w, log_threshold, targets):
        df = jnp.sum(delta * (w[1] - w[0])) / epsilon
        return jnp.mean((targets[0] - w[0]) ** 2) - sigma**2 + 2 * sigma**2 * df / size

    optimizer = gradhpo.ImplicitOptimizer(None, optax.sgd(0.1), inner_steps=80, update_fn=step)
    threshold = 0.9
    state = optimizer.init(jnp.zeros((2, size)), jnp.log(threshold))
    found = optimizer.compute_hypergradient(state, both, both, train_loss, sure)
    state = optimizer.step(state, both, both, train_loss, sure)
    above = np.abs(np.asarray(y)) > threshold
    value = np.mean(np.minimum(y**2, threshold**2)) + sigma**2 * (2 * np.mean(above) - 1)
    # A difference quotient of numbers with 16 digits, over 1e-6.
    np.testing.assert_allclose(state.metadata["val_loss"], value, rtol=1e-8)
    slope = 2 * threshold**2 * np.mean(above)  # by the logarithm
    np.testing.assert_allclose(found, slope, rtol=1e-6)
