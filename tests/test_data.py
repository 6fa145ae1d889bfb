"""Batches: of arrays on the device, and of any loader."""

import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import OUTER, relaxed

import gradhpo
from gradhpo.core.batches import batch_of_step
from gradhpo.data.arrays import _permute
from gradhpo.data.buffer import Buffer
from gradhpo.data.sources import Feed, as_source


X, Y = jnp.linspace(-1, 1, 30).reshape(10, 3), jnp.linspace(0, 1, 10)
KEY = jax.random.key(0)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (10, 10), (7, 3), (2, 1), (1, 1), (33, 32)])
def test_every_example_once_per_epoch(n, size):
    data = gradhpo.ArrayData(jnp.arange(n), size, jax.random.key(0))
    stream = np.concatenate([np.asarray(data(i)) for i in range(n)])  # `size` whole epochs
    for epoch in stream.reshape(size, n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_batches_are_pure_functions_of_key_and_index():
    data = gradhpo.ArrayData(jnp.arange(100), 10, jax.random.key(0))
    together = jax.vmap(data)(jnp.arange(30))
    for i in (0, 7, 29):
        np.testing.assert_array_equal(together[i], data(i))
    other = gradhpo.ArrayData(jnp.arange(100), 10, jax.random.key(1))
    assert not np.array_equal(data(0), other(0))
    assert not np.array_equal(data(0), data(10))  # the next epoch has another order


def test_indices_far_out_do_not_overflow():
    data = gradhpo.ArrayData(jnp.arange(60_000), 500, jax.random.key(0))
    late = data(jnp.asarray(2**31 - 1, jnp.int32))
    assert len(set(late.tolist())) == 500
    # Position in the epoch with exact integers, against 32-bit arithmetic.
    epoch = (2**31 - 1) * 500 // 60_000
    keys = [jax.random.fold_in(data.key, e) for e in (epoch, epoch + 1)]
    start = (2**31 - 1) * 500 % 60_000
    expected = []
    for j in range(500):
        key = keys[(start + j) // 60_000]
        position = jnp.asarray([(start + j) % 60_000], jnp.uint32)
        expected.append(_permute(position, jax.random.bits(key, (1, 8), jnp.uint32), 60_000)[0])
        if j == 3:
            break
    np.testing.assert_array_equal(late[:4], np.asarray(expected))


def test_full_batch_keeps_the_order_of_the_data():
    data = gradhpo.ArrayData((X, Y), 10, jax.random.key(0))
    assert_same(data(3), (X, Y))


def test_shuffling_looks_uniform():
    """Over many epochs every example comes at every position equally often (chi-squared)."""
    n, epochs = 11, 4_000
    data = gradhpo.ArrayData(jnp.arange(n), 1, jax.random.key(0))
    stream = np.asarray(jax.vmap(data.indices)(jnp.arange(n * epochs))).reshape(epochs, n)
    counts = np.zeros((n, n))
    for position in range(n):
        counts[position] = np.bincount(stream[:, position], minlength=n)
    chi_squared = np.sum((counts - epochs / n) ** 2 / (epochs / n))
    # (n - 1)^2 = 100 degrees of freedom: mean 100, standard deviation 14.
    assert 50 < chi_squared < 170
    # Neighbours in one epoch are neighbours in the next no more often than by chance.
    together = np.mean(np.abs(np.diff(stream, axis=1)) == 1)
    assert abs(together - 2 / n) < 0.01


def test_iterate_cycles_and_ends_with_a_generator():
    batches = gradhpo.iterate([1, 2])
    assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert list(gradhpo.iterate(x for x in (1, 2))) == [1, 2]
    assert list(gradhpo.iterate([])) == []


def test_with_replacement_draws_are_independent():
    data = gradhpo.ArrayData(jnp.arange(7), 14, KEY, replacement=True)
    drawn = np.asarray(jax.vmap(data)(jnp.arange(3_000)))
    counts = np.bincount(drawn.reshape(-1), minlength=7)
    expected = drawn.size / 7
    # 6 degrees of freedom: mean 6, standard deviation 3.5.
    assert np.sum((counts - expected) ** 2 / expected) < 20
    # Pairs within a batch agree as often as by chance.
    assert abs(np.mean(drawn[:, 0] == drawn[:, 1]) - 1 / 7) < 0.03
    np.testing.assert_array_equal(data(5), drawn[5])


def test_with_replacement_the_whole_is_no_batch():
    """Drawing as many examples as there are does not give the data set in its order."""
    data = gradhpo.ArrayData(jnp.arange(50), 50, KEY, replacement=True)
    assert len(set(data(0).tolist())) < 50


def test_indices_come_with_the_batch():
    for size in (4, 10):
        data = gradhpo.ArrayData((X, Y), size, KEY, with_indices=True)
        (x, y), indices = data(3)
        assert_same((x, y), (X[indices], Y[indices]))
        np.testing.assert_array_equal(indices, data.indices(3))


@pytest.mark.parametrize("replacement", [False, True])
def test_pairs_stay_together_over_a_step(replacement):
    """Two sources with one key: a step trains and validates on the same tasks."""
    train = gradhpo.ArrayData(jnp.arange(10), 4, KEY, replacement, hold=3)
    val = gradhpo.ArrayData(100 + jnp.arange(10), 4, KEY, replacement)
    for step in range(6):
        for t in range(3):
            np.testing.assert_array_equal(train(3 * step + t) + 100, val(step))
    assert not np.array_equal(val(0), val(1))


def test_stack_is_the_batches_of_a_step():
    data = gradhpo.ArrayData((X, Y), 4, KEY)
    stack = data.stack(6, 3)
    assert isinstance(stack, gradhpo.BatchStack)
    for t in range(3):
        assert_same(stack.at(t), data(6 + t))
    assert_same(data.stack(6, 1).at(0), data(6))  # made in another way


@pytest.mark.parametrize("count", [1, 3])
def test_a_function_of_the_index_may_return_numbers_and_keys(count):
    draw = lambda index: {"x": X[index], "share": 0.5, "key": jax.random.fold_in(KEY, index)}
    source = as_source(draw, "train_data", count).fetch(1)
    found = source.stack(jnp.asarray(2), jnp.asarray(0), count)
    assert found.num_steps == count
    for t in range(count):
        batch, expected = found.at(t), draw(2 * count + t)
        assert_same(*(jax.random.key_data(x.pop("key")) for x in (batch, expected)))
        assert_same(batch, expected)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["function", "ArrayData", "iterator", "one batch with a key"])
def test_what_is_read_ahead_are_the_batches_of_the_steps(kind, count):
    """Batch t of a whole episode is inner step `t % count` of its outer step `t // count`."""
    data = gradhpo.ArrayData((X, Y), 4, KEY)
    made = {
        "function": lambda index: {"x": X[index % 10], "i": index},
        "ArrayData": data,
        "iterator": (jax.tree.map(np.asarray, data(7 + i)) for i in range(20)),
        "one batch with a key": (X, KEY),
    }
    source = as_source(made[kind], "train_data", count)
    assert source.draw(5, in_part=False) == 5
    batches, (step, position) = source.fetch(5), jnp.asarray([2, 1], jnp.int32)
    ahead = batches.drawn(step, position, count)
    for t in range(3 * count):
        later = t // count
        stack = batches.stack(step + later, position + later, count)
        assert_same(ahead.at(t), batch_of_step(stack, t % count))


def test_number_of_batches_of_some_epochs():
    count = lambda n, size, epochs, **more: gradhpo.ArrayData(
        jnp.arange(n), size, KEY, **more
    ).num_batches(epochs)
    assert count(10, 4, 1) == 3
    assert count(10, 4, 2) == 5
    assert count(10, 5, 3) == 6
    assert count(10, 3, 0.3) == 1
    assert count(1_000, 1, 0.3) == 300  # 300.00000000000006 in floating point
    assert count(10, 5, 1, hold=4) == 8


LOSS = lambda w, h, batch: jnp.mean(jnp.square(batch[0] @ w - batch[1])) * jnp.exp(h)
OPTIMIZER = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1)), OUTER)


def run(data):
    state = OPTIMIZER.init(jnp.zeros(3), jnp.asarray(-2.0))
    losses = gradhpo.LossFunctions(LOSS, LOSS)
    return gradhpo.run(
        OPTIMIZER, state, losses, data, (X, Y), num_steps=6, chunk_size=3, progress=False
    )[0]


@pytest.mark.thorough
def test_loaders_of_other_libraries():
    """NumPy, grain and, where it is installed, PyTorch: the same batches, the same run."""
    x, y = np.array(X), np.array(Y)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    expected = run(iter(batches * 3))

    def generator():
        while True:
            yield from batches

    found = [run(generator()), run(gradhpo.iterate(batches))]
    found.append(run(gradhpo.iterate([list(batch) for batch in batches])))
    stacked = [jnp.stack([batches[0][i], batches[1][i]]) for i in range(2)]
    found.append(run(lambda index: [x[index % 2] for x in stacked]))
    if grain := _imported("grain"):
        source = grain.MapDataset.source(list(zip(x, y, strict=True)))
        found.append(run(gradhpo.iterate(source.batch(5).to_iter_dataset())))
        workers = grain.MapDataset.source(batches).to_iter_dataset()
        found.append(run(gradhpo.iterate(workers)))
    if torch := _imported("torch"):
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        loader = torch.utils.data.DataLoader(dataset, batch_size=5)
        found.append(run(gradhpo.iterate(loader)))
    for state in found:
        assert_same(state.params, expected.params)
        assert_same(state.hyperparams, expected.hyperparams)


class Tensor:
    """Like PyTorch's, where it matters here: NumPy reads it, and it can be iterated over."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)

    def __iter__(self) -> Iterator[Any]:
        return map(Tensor, self.values)

    @property
    def shape(self):
        return self.values.shape


class Frame(Tensor):
    """Like a pandas object: iteration yields names."""

    def keys(self):
        return ["a", "b", "c"]

    def __iter__(self):
        return iter(self.keys())


def _libraries():
    found = {"tensor": Tensor, "frame": Frame, "big-endian": lambda x: np.asarray(x).astype(">f8")}
    if torch := _imported("torch"):
        found["torch"] = torch.from_numpy
    if pandas := _imported("pandas"):
        found["pandas"] = lambda x: (pandas.Series if x.ndim == 1 else pandas.DataFrame)(x)
    return found


def _imported(name):
    try:
        return __import__(name)
    except ImportError:
        return None


LIBRARIES = _libraries()
# Inputs and targets of one shape: mistaken for two batches, they would train without an error.
WANTED = np.asarray(X @ jnp.diag(jnp.asarray([2.0, 2.0, 2.0])))
ROWS = (np.array(X), WANTED)


def FIT(w, h, batch):
    x, y = batch
    return jnp.mean(jnp.square(x * w[None, :] - y))


PULLED = lambda w, h, batch: FIT(w, h, batch) + jnp.exp(h) * jnp.sum(jnp.square(w))
FITTED = gradhpo.OneStepOptimizer(relaxed(optax.sgd(1.0)), OUTER)


def fit(data, val_data=ROWS, num_steps=20):
    state = FITTED.init(jnp.zeros(3), jnp.asarray(-9.0))
    losses = gradhpo.LossFunctions(PULLED, FIT)
    return gradhpo.run(FITTED, state, losses, data, val_data, num_steps=num_steps, progress=False)[
        0
    ]


SOURCES = {
    "one batch": lambda batch: batch,
    "a DataBatch": lambda batch: gradhpo.DataBatch(*batch),
    "an iterator": lambda batch: gradhpo.iterate([batch]),
    "a function": lambda batch: lambda index: batch,
    "all of an ArrayData": lambda batch: gradhpo.ArrayData(batch, 10, KEY),
    "minibatches": lambda batch: gradhpo.ArrayData(batch, 4, KEY),
}
FITTED_ROWS = functools.cache(lambda source: fit(SOURCES[source](ROWS)))


@pytest.mark.parametrize("source", quick(list(SOURCES), keep=["one batch", "minibatches"]))
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_run_on_arrays_of_other_libraries(library, source):
    """Inputs and targets of one shape are one batch, never two."""
    theirs = tuple(LIBRARIES[library](x) for x in ROWS)
    found = fit(SOURCES[source](theirs), theirs)
    np.testing.assert_allclose(found.params, [2.0, 2.0, 2.0], atol=0.05)
    assert_same(found.params, FITTED_ROWS(source).params)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_step_on_arrays_of_other_libraries(library):
    theirs = tuple(LIBRARIES[library](x) for x in ROWS)
    stack = gradhpo.BatchStack.of([ROWS])
    assert_same(gradhpo.BatchStack.of([theirs]).batches, stack.batches)
    assert_same(gradhpo.BatchStack(theirs).batches, ROWS)
    state = FITTED.init(jnp.zeros(3), jnp.asarray(-9.0), batch=theirs)
    for call in (FITTED.step, FITTED.compute_hypergradient):
        found, expected = (call(state, batch, batch, PULLED, FIT) for batch in (theirs, ROWS))
        assert_same(found, expected)


def test_iterate_is_advised_for_what_yields_batches_alone():
    class Loader:
        def __iter__(self):
            return iter([ROWS])

    with pytest.raises(TypeError, match=r"wrap it: gradhpo.iterate\(train_data\)"):
        fit(Loader())
    for data, message in [
        ([*ROWS], r"ArrayData\(tuple\(train_data\), .*only if each is a batch by itself"),
        ((Loader(), Loader()), r"train_data\[0\] is a Loader, which is not an array"),
        ("digits.npz", "is a str, which is not a source of batches; pass gradhpo.ArrayData"),
        ((object(),), r"train_data\[0\] is a object, which is not an array"),
    ]:
        with pytest.raises(TypeError, match=message) as caught:
            fit(data)
        assert "wrap it" not in str(caught.value)
    for names in ({"x": ROWS[0]}, Frame(ROWS[0]), "digits.npz"):
        with pytest.raises(TypeError, match="which yields names or letters and not batches"):
            gradhpo.iterate(names)


def test_big_endian_parameters_and_settings_are_the_same_numbers():
    swapped = lambda x: np.asarray(x).astype(np.asarray(x).dtype.newbyteorder(">"))
    params, h = {"w": jnp.arange(3.0), "n": jnp.arange(3)}, jnp.asarray([0.5, 0.25])
    tree = jax.tree.map(swapped, {"params": params, "h": h})
    parts = gradhpo.partition(tree, lambda m: m["h"])
    optimizer = gradhpo.GreedyOptimizer(optax.sgd(0.1), OUTER, gamma=swapped(0.5))
    assert_same(optimizer.gamma, jnp.asarray(0.5))
    expected = optimizer.init(params, h)
    assert_same(optimizer.init(tree["params"], tree["h"]), expected)
    assert_same(optimizer.init(*parts).params["params"], params)
    assert_same(expected.update(params=tree["params"], hyperparams=tree["h"]), expected)
    frozen = optimizer.init({"w": jnp.ones(2), "rest": gradhpo.frozen(tree["params"])}, h)
    assert_same(gradhpo.unfrozen(frozen.params)["rest"], params)


def test_a_list_of_batches_is_no_batch_of_a_step():
    state = FITTED.init(jnp.zeros(3), jnp.asarray(-9.0))
    for batches in ([ROWS, ROWS], [gradhpo.DataBatch(*ROWS)]):
        for train, val, name in ((batches, ROWS, "train_batch"), (ROWS, batches, "val_batch")):
            for call in (FITTED.step, FITTED.compute_hypergradient):
                with pytest.raises(TypeError, match=rf"{name} is a list of . batches: pass grad"):
                    call(state, train, val, PULLED, FIT)
    # What PyTorch's loader yields: one batch.
    assert_same(
        FITTED.step(state, [*map(Tensor, ROWS)], ROWS, PULLED, FIT).params,
        FITTED.step(state, ROWS, ROWS, PULLED, FIT).params,
    )


def test_numbers_and_nested_batches_of_an_iterator():
    batches = iter([{"x": np.ones(3), "scale": 2.0, "more": [np.int32(1), None]}] * 6)
    loss = lambda w, h, batch: jnp.sum(jnp.square(w - batch["x"])) * h * batch["scale"]
    state = OPTIMIZER.init(jnp.zeros(3), jnp.asarray(1.0))
    state, history = gradhpo.run(
        OPTIMIZER, state, gradhpo.LossFunctions(loss, lambda w, h, batch: jnp.sum(w**2.0)),
        batches, None, num_steps=6, chunk_size=3, progress=False,
    )  # fmt: skip
    assert history["rejected"][-1] == 0


def test_memory_of_batches_is_used_again_once_a_chunk_is_done():
    # Two chunks in flight, as in a run; loaders that reuse their arrays, with other lengths.
    def batches(count):
        x = np.zeros(3)
        for number in range(count):
            x[:] = number
            yield {"x": x, "key": jax.random.key(number), "n": number}

    train, val = gradhpo.iterate(list(range(24))), batches(11)
    feed = Feed(as_source(train, "train_data", 2), as_source(val, "val_data", None))
    assert feed.affordable(4) == 4
    addresses, flying, first = set(), [], 0
    for expected in (4, 4, 3):  # the second iterator ends
        t, v, taken = cast(Any, feed.draw_chunk(4, 1, in_part=True))
        steps = np.arange(first, first + expected)
        assert taken == expected
        flying.append((t.values, v.values, steps))
        addresses.add(v.values["x"].ctypes.data)
        assert v.values["x"].ctypes.data % 64 == 0
        assert v.values["x"].dtype == np.float64
        if len(flying) == 2:
            of_train, of_val, of_steps = flying.pop(0)
            np.testing.assert_array_equal(of_train, 2 * of_steps[:, None] + np.arange(2))
            np.testing.assert_array_equal(of_val["x"], np.repeat(of_steps[:, None], 3, 1))
            keys = jax.vmap(jax.random.key)(of_steps)
            assert jnp.all(of_val["key"] == keys)
            assert np.array_equal(of_val["n"], of_steps)
            feed.release_oldest()
        first += expected
    assert len(addresses) == 2  # not one per chunk
    feed.close()
    # Batches of the last chunk, which did not run, and of the step that lacked its other half.
    assert [int(next(train)) for _ in range(8)] == [16, 17, 18, 19, 20, 21, 22, 23]


def test_batches_given_back_are_those_of_the_loader():
    loader = [np.full(3, number, np.float64) for number in range(4)]
    batches = gradhpo.iterate(loader)
    feed = Feed(as_source(batches, "train_data", 1), as_source(jnp.ones(3), "val_data", None))
    with jax.enable_x64(False):  # JAX would convert them to float32
        feed.draw_chunk(2, 1, in_part=True)
        feed.close()
    returned = [next(batches) for _ in range(2)]
    assert all(x.dtype == np.float64 for x in returned)
    np.testing.assert_array_equal(returned, loader[:2])


def test_an_interrupt_while_memory_is_moved_loses_nothing(monkeypatch):
    batches = gradhpo.iterate([np.full(3, number) for number in range(4)])
    host = as_source(batches, "train_data", 1)
    assert host.draw(2, in_part=True) == 2

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Buffer, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            host.draw(3, in_part=True)
    host.close()
    assert [int(next(batches)[0]) for _ in range(2)] == [0, 1]


def test_big_endian_batches_are_the_same_numbers():
    def run_on(dtype):
        batches = iter([np.full(2, number, dtype) for number in range(4)])
        one = jnp.ones(2, jnp.float32)
        optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
        loss = lambda w, h, batch: jnp.sum((w - h - batch) ** 2)
        state = optimizer.init(0 * one, 0 * one)
        losses = gradhpo.LossFunctions(loss, loss)
        return gradhpo.run(optimizer, state, losses, batches, one, num_steps=4, progress=False)[1]

    np.testing.assert_array_equal(run_on("<f4")["train_loss"], run_on(">f4")["train_loss"])


def test_batches_that_are_given_back_twice_come_in_their_order():
    batches: Any = gradhpo.iterate(list(np.arange(6.0).reshape(6, 1)))
    drawn = [next(batches) for _ in range(4)]
    batches.give_back(drawn[2:])
    batches.give_back(drawn[:2])
    np.testing.assert_array_equal([next(batches) for _ in range(6)], np.arange(6.0)[:, None])
