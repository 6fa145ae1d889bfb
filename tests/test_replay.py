"""Whole training runs replayed in segments: equal to unrolling, resumable, many queries at once."""

import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import killed_run
import numpy as np
import optax
import processes
import pytest
from helpers import assert_same, quick
from problems import OUTER, make, relaxed

import gradhpo
from gradhpo.core.exact import with_its_update
from gradhpo.data.passes import as_passes
from gradhpo.diagnostics.cost import Program
from gradhpo.training import boundaries
from gradhpo.training.segments import Training
from gradhpo.utils.tracing import num_traces


RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(40, 3)), RANDOM.normal(size=40)
VAL = X[:8], Y[:8]
DATA = gradhpo.ArrayData((X[8:], Y[8:]), 6, jax.random.key(0))
PARAMS = {"first": jnp.asarray(RANDOM.normal(size=(3, 4))), "last": jnp.ones(4) / 4}
HYPERPARAMS = {"decay": jnp.full(2, -4.0), "rate": jnp.asarray(-3.0)}
INNER = relaxed(lambda h: optax.adam(jnp.exp(h["rate"]), eps_root=1e-12))
OPTIMIZER = gradhpo.OneStepOptimizer(INNER, OUTER)


def error(w, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["first"]) @ w["last"] - y) ** 2)


def val_loss(w, h, batch):
    """With a direct term."""
    return error(w, batch) + 0.01 * jnp.sum(h["decay"] ** 2)


def train_loss(w, h, batch):
    squares = jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(w)])
    return error(w, batch) + jnp.exp(h["decay"]) @ squares


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


class Loader:
    """Batches in order, repeatedly, without seeking."""

    def __init__(self, examples=40):
        self.examples = examples

    def __iter__(self):
        for first in range(0, self.examples - 5, 6):
            yield X[first : first + 6], Y[first : first + 6]


class Seeking:
    """The same, with seeking."""

    def __iter__(self):
        return Places(list(Loader()))


class Places:
    def __init__(self, batches):
        self.batches, self.place = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        return self.batches[self.place - 1]

    def get_state(self):
        return self.place

    def set_state(self, place):
        self.place = place


def start(optimizer=OPTIMIZER, params=PARAMS, hyperparams=HYPERPARAMS):
    return optimizer.init(params, hyperparams)


def replayed(train_data=DATA, num_steps=23, state=None, optimizer=OPTIMIZER, val=VAL, **settings):
    state = start() if state is None else state
    given = {"num_steps": num_steps, "progress": False} | settings
    return gradhpo.replay(optimizer, state, train_data, val, LOSSES, **given)


def unrolled(stack, state=None, inner=INNER, losses=LOSSES, val=VAL, **rules):
    """Hypergradient and state of one `step` with one inner step per batch."""
    steps = stack.num_steps
    exact = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=steps, **rules)
    given = start() if state is None else state, stack, val, *losses.__dict__.values()
    return exact.compute_hypergradient(*given), exact.step(*given)


def assert_equal(found, expected, rtol=1e-12):
    """`found` is a replay. The programs differ, so the order of sums may."""
    g, state = expected
    assert_same(found.hypergradient, g, rtol=rtol, atol=rtol)
    assert_same(found.state.params, state.params, rtol=rtol, atol=rtol)
    assert_same(found.state.inner_opt_state, state.inner_opt_state, rtol=rtol, atol=rtol)
    for name in ("train_loss", "val_loss", "hypergrad_norm", "param_norm"):
        np.testing.assert_allclose(found.state.metadata[name], state.metadata[name], rtol=1e-10)


@pytest.mark.parametrize("segment", quick([None, 1, 6, 23], keep=[None]))
def test_is_the_unrolled_hypergradient(segment):
    found = replayed(segment=segment)
    assert_equal(found, unrolled(DATA.stack(0, 23)))
    assert found.state.step == 23
    assert_same(found.state.hyperparams, HYPERPARAMS)
    assert_same(found.state.outer_opt_state, start().outer_opt_state)


@pytest.mark.thorough
def test_two_hundred_steps_of_a_network():
    problem, inner = make("optimizer", "momentum", jax.random.key(1))
    losses = gradhpo.LossFunctions(problem.train_loss, problem.val_loss)
    optimizer = gradhpo.OneStepOptimizer(inner, OUTER)
    state = start(optimizer, problem.params, problem.hyperparams)
    data = gradhpo.ArrayData(problem.train_batch, 7, jax.random.key(2))
    found = gradhpo.replay(
        optimizer, state, data, problem.val_batch, losses, num_steps=200, progress=False
    )
    expected = unrolled(data.stack(0, 200), state, inner, losses, problem.val_batch)
    assert_equal(found, expected)


@pytest.mark.thorough
def test_a_later_state_goes_on_with_its_own_batches():
    """`num_steps` counts inner steps, here three per outer step."""
    optimizer = gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=3)
    first = start(optimizer)
    for step in range(2):
        first = optimizer.step(first, DATA.stack(3 * step, 3), VAL, LOSSES)
    found = replayed(num_steps=10, state=first, optimizer=optimizer)
    assert_equal(found, unrolled(DATA.stack(6, 10), first))
    assert found.state.step == 2 + 3


SOURCES = {
    "loader": Loader,
    "seeking": Seeking,
    "iterated": lambda: gradhpo.iterate(Loader()),
    "list": lambda: gradhpo.iterate(list(Loader())),
}


@pytest.mark.parametrize("kind", quick(list(SOURCES), keep=[]))
def test_loaders_are_gone_through_again(kind):
    batches = [batch for batch, _ in zip(gradhpo.iterate(Loader()), range(23), strict=False)]
    assert_equal(replayed(SOURCES[kind]()), unrolled(gradhpo.BatchStack.of(batches)))


@pytest.mark.thorough
def test_one_batch_with_a_key_is_that_of_run():
    """The key is folded with the outer and the inner step, as in `run`."""

    def noisy(w, h, batch):
        x, y, key = batch
        return train_loss(w, h, (x + jax.random.normal(key, x.shape), y))

    both = gradhpo.LossFunctions(noisy, val_loss)
    batch = (*jax.tree.map(jnp.asarray, VAL), jax.random.key(3))
    optimizer = gradhpo.UnrolledOptimizer(INNER, optax.sgd(0.0), unroll_steps=4)
    given = optimizer, start(optimizer), both, batch, VAL
    ran, _ = gradhpo.run(*given, num_steps=3, progress=False)
    found = gradhpo.replay(
        optimizer, start(optimizer), batch, VAL, both, num_steps=12, segment=5, progress=False
    )
    assert_same(found.state.params, ran.params, rtol=1e-12)


@pytest.mark.thorough
def test_hyperparameters_in_the_start_of_training():
    inner = relaxed(lambda h: optax.adagrad(jnp.exp(h["rate"]), jnp.exp(h["decay"][0])))
    optimizer = gradhpo.OneStepOptimizer(inner, OUTER)
    found = replayed(num_steps=7, segment=3, state=start(optimizer), optimizer=optimizer)
    assert_equal(found, unrolled(DATA.stack(0, 7), start(optimizer), inner))


@pytest.mark.thorough
@pytest.mark.parametrize("rule", ["grad_fn", "update_fn"])
def test_rules_of_the_user(rule):
    gradient = jax.grad(train_loss)
    rules = {
        "grad_fn": {"inner_optimizer": INNER, "grad_fn": gradient},
        "update_fn": {
            "update_fn": lambda w, h, batch: jax.tree.map(
                lambda x, g: x - jnp.exp(h["rate"]) * g, w, gradient(w, h, batch)
            )
        },
    }[rule]
    optimizer = gradhpo.OneStepOptimizer(outer_optimizer=OUTER, **rules)
    found = replayed(num_steps=7, state=start(optimizer), optimizer=optimizer)
    own = {"inner": rules.pop("inner_optimizer", None)} | rules
    assert_equal(found, unrolled(DATA.stack(0, 7), start(optimizer), **own))


@pytest.mark.thorough
def test_running_state_goes_along():
    """An average of the weights, which the validation loss reads."""

    def with_average(w, h, batch, average):
        new = jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, average, w)
        return train_loss(w, h, batch), new

    of_average = lambda w, h, batch, average: val_loss(average, h, batch)
    losses = gradhpo.LossFunctions(with_average, of_average)
    state = OPTIMIZER.init(PARAMS, HYPERPARAMS, model_state=PARAMS)
    settings = {"num_steps": 9, "segment": 4, "progress": False}
    found = gradhpo.replay(OPTIMIZER, state, DATA, VAL, losses, **settings)
    expected = unrolled(DATA.stack(0, 9), state, losses=losses)
    assert_equal(found, expected)
    assert_same(found.state.model_state, expected[1].model_state, rtol=1e-12)
    each = gradhpo.replay(OPTIMIZER, state, DATA, VAL, losses, queries=True, **settings)
    mean = jax.tree.map(lambda x: x.mean(axis=0), each.hypergradient)
    assert_same(mean, found.hypergradient, rtol=1e-10, atol=1e-12)


# -- many queries ------------------------------------------------------------------------------


@pytest.mark.thorough
def test_each_query_is_a_replay_of_its_own():
    each = replayed(queries=True)
    for number in (0, 5):
        alone = replayed(val=(VAL[0][number : number + 1], VAL[1][number : number + 1]))
        of_one = {name: x[number] for name, x in each.hypergradient.items()}
        assert_same(of_one, alone.hypergradient, rtol=1e-12, atol=1e-14)
    assert jax.tree.leaves(each.hypergradient)[0].shape == (8, 2)
    np.testing.assert_allclose(
        each.state.metadata["val_loss"], val_loss(each.state.params, HYPERPARAMS, VAL)
    )


@pytest.mark.thorough
def test_a_key_is_shared_by_all_queries():
    def noisy(w, h, batch):
        x, y, key = batch
        return val_loss(w, h, (x + jax.random.normal(key, (1, 3)), y))

    losses = gradhpo.LossFunctions(train_loss, noisy)
    val = (*VAL, jax.random.key(3))
    settings = {"num_steps": 4, "progress": False}
    each = gradhpo.replay(OPTIMIZER, start(), DATA, val, losses, queries=True, **settings)
    mean = gradhpo.replay(OPTIMIZER, start(), DATA, val, losses, **settings)
    found = jax.tree.map(lambda x: x.mean(axis=0), each.hypergradient)
    assert_same(found, mean.hypergradient, rtol=1e-10, atol=1e-12)


@pytest.mark.thorough
def test_twenty_queries_share_the_work():
    """All share one query's forward steps and linearizations."""
    wide = {"first": jnp.ones((3, 64)), "last": jnp.ones(64)}
    data = gradhpo.ArrayData((np.tile(X, (8, 1)), np.tile(Y, 8)), 256, jax.random.key(0))
    state = gradhpo.OneStepOptimizer(INNER).init(wide, HYPERPARAMS)
    part = as_passes(data, 1).part(0, 5)

    def flops(count):
        val = jax.tree.map(lambda x: x[:count], (np.tile(X, (8, 1)), np.tile(Y, 8)))
        training = Training(with_its_update(OPTIMIZER, 5), LOSSES, val, queries=True)
        at_start = training.exact._adopt(state, keep_memory=True)
        bar = eqx.filter_eval_shape(lambda *x: training.at_end(*x)[1], at_start, part)
        back = lambda state, part, bar: training.back(state, part, 5, bar)
        return Program(back, at_start, part, bar).cost.flops

    assert flops(20) < 0.6 * 20 * flops(1)


# -- programs ----------------------------------------------------------------------------------


def test_what_is_compiled_does_not_depend_on_the_number_of_steps():
    def traces(num_steps):
        before = num_traces()
        replayed(num_steps=num_steps, segment=4)
        return num_traces() - before

    assert traces(8) <= 3  # forward, the end, and back
    assert traces(64) == 0


# -- a directory -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(monkeypatch, writes, **settings):
    """A replay whose process is killed after writing this number of files."""
    write, count = boundaries.write_file, 0

    def counted(*arguments):
        nonlocal count
        if count == writes:
            raise Killed
        count += 1
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(boundaries, "write_file", counted)
        with pytest.raises(Killed):
            replayed(**settings)


@pytest.mark.parametrize(
    ("queries", "source"),
    quick(
        [(queries, source) for queries in (False, True) for source in ("arrays", "loader")],
        keep=[(True, "loader")],
    ),
)
def test_goes_on_where_it_was_bit_for_bit(tmp_path, monkeypatch, queries, source):
    of = {"arrays": lambda: DATA, "loader": Loader}[source]
    whole = replayed(of(), queries=queries)
    settings = {"queries": queries, "store": tmp_path}
    for writes in (0, 2, 3, 1, 2):  # of 6 states and 5 cotangents
        killed_after(monkeypatch, writes, train_data=of(), **settings)
    found = replayed(of(), **settings)
    assert "resumed on the way back" in found.report
    assert_same(found.hypergradient, whole.hypergradient)
    assert_same(found.state, whole.state)
    again = replayed(of(), **settings)
    assert "It was complete." in again.report
    assert_same(again.hypergradient, whole.hypergradient)
    assert sorted(name for name in os.listdir(tmp_path) if name != ".lock") == [
        "bar-0000000000.ckpt",
        "state-0000000023.ckpt",
    ]


@pytest.mark.thorough
def test_killed_five_times(tmp_path):
    """At random changes on disk; the last two kills are during the backward pass."""
    random, kills = np.random.default_rng(0), []
    for least in (1, 50, 50, 150, 50):
        before = set(os.listdir(tmp_path / "killed")) if kills else set()
        arguments = int(random.integers(least, least + 40)), tmp_path / "killed", 200
        process = processes.context().Process(
            target=killed_run.killed_within_a_write, args=(*arguments, killed_run.replay)
        )
        process.start()
        process.join(processes.LIMIT)
        kills.append(process.exitcode)
        assert set(os.listdir(tmp_path / "killed")) != before
    assert kills == [-signal.SIGKILL] * 5
    assert list((tmp_path / "killed").glob("bar-*"))
    with jax.numpy_dtype_promotion("standard"):  # as in the other processes
        found = killed_run.replay(tmp_path / "killed", 200)
        expected = killed_run.replay(tmp_path / "whole", 200)
    assert "resumed on the way back" in found.report
    assert_same(found.hypergradient, expected.hypergradient)
    assert_same(found.state, expected.state)


OTHERS = [
    {"segment": 3},
    *(
        pytest.param(other, marks=pytest.mark.thorough)
        for other in ({"num_steps": 24}, {"queries": True}, {"val": (X[1:9], VAL[1])})
    ),
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_directory_holds_one_replay(tmp_path, monkeypatch, other):
    killed_after(monkeypatch, 3, store=tmp_path)
    with pytest.raises(ValueError, match="holds another replay"):
        replayed(store=tmp_path, **other)


@pytest.mark.parametrize("which", quick(["train_loss", "val_loss"], keep=["val_loss"]))
def test_another_loss_is_another_replay(tmp_path, which):
    replayed(store=tmp_path)
    functions = {"train_loss": train_loss, "val_loss": val_loss}
    functions[which] = lambda w, h, batch: 1.01 * vars(LOSSES)[which](w, h, batch)
    with pytest.raises(ValueError, match=f"losses holds other values .at \\['{which}'\\]"):
        gradhpo.replay(
            OPTIMIZER, start(), DATA, VAL, gradhpo.LossFunctions(**functions),
            num_steps=23, store=tmp_path, progress=False,
        )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("damaged", ["state-0000000010", "state-0000000023", "bar-0000000010"])
def test_a_damaged_file_is_made_again(tmp_path, monkeypatch, damaged):
    killed_after(monkeypatch, 9, store=tmp_path)  # 6 states, and 3 of 5 cotangents
    path = tmp_path / f"{damaged}.ckpt"
    path.write_bytes(path.read_bytes()[:-8])
    if damaged != "state-0000000010" or not list(tmp_path.glob("bar-*")):
        with pytest.raises(ValueError, match="Move it away, and the replay recreates it"):
            replayed(store=tmp_path)
    path.unlink()
    assert_same(replayed(store=tmp_path).hypergradient, replayed().hypergradient)


@pytest.mark.thorough
def test_batches_that_are_placed_compile_nothing_twice():
    device = jax.devices()[0]
    of_all = gradhpo.ArrayData(jax.device_put((X[8:], Y[8:]), device), 6, jax.random.key(0))
    before = num_compiled[0]
    replayed(of_all, num_steps=24, segment=6, val=jax.device_put(VAL, device))
    compiled = num_compiled[0] - before
    replayed(of_all, num_steps=36, segment=6, val=jax.device_put(VAL, device))
    assert num_compiled[0] - before == compiled


num_compiled = [0]


def _count(event, *_, **__):
    num_compiled[0] += "backend_compile" in event


jax.monitoring.register_event_duration_secs_listener(_count)


def test_under_debug_nans():
    with jax.debug_nans(True):
        found = replayed(num_steps=4, queries=True)
    assert np.isnan(found.state.metadata["hypergrad_norm"])


# -- misuse and failures -----------------------------------------------------------------------


def test_iterators_are_refused():
    for data in (iter(Loader()), gradhpo.iterate(iter(Loader()))):
        with pytest.raises(TypeError, match="can be read only once"):
            replayed(data)
    begun = gradhpo.iterate(Loader())
    next(begun)
    with pytest.raises(ValueError, match="drawn from already"):
        replayed(begun)


def test_a_loader_that_shuffles_anew_is_found_out():
    class Shuffling(Loader):
        def __iter__(self):
            order = RANDOM.permutation(len(X))
            for first in range(0, 30, 6):
                yield X[order[first : first + 6]], Y[order[first : first + 6]]

    with pytest.raises(ValueError, match="differs on the way back"):
        replayed(Shuffling())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"segment": 0}, "segment"),
        ({"segment": 24}, "segment"),
        ({"val": jnp.zeros(()), "queries": True}, "leading axis"),
        ({"val": DATA}, "val_batch is a function or a data source"),
        ({"train_data": gradhpo.BatchStack((X[None], Y[None]))}, "serves one step"),
        ({"train_data": gradhpo.iterate([])}, "without a single batch"),
    ],
)
def test_bad_arguments(settings, said):
    with pytest.raises((ValueError, TypeError), match=said):
        replayed(**settings)


def test_wrappers_are_refused():
    tasks = gradhpo.TaskBatched(OPTIMIZER, num_tasks=2)
    with pytest.raises(ValueError, match="TaskBatched runs several"):
        replayed(optimizer=tasks)


def test_a_state_of_another_optimizer_is_refused():
    other = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1)), OUTER)
    with pytest.raises(ValueError, match=r"state.inner_opt_state"):
        replayed(state=start(other))


@pytest.mark.thorough
def test_the_outer_optimizer_of_the_state_does_not_matter():
    tuned = replayed(state=start(gradhpo.UnrolledOptimizer(INNER, relaxed(optax.adam(0.1)))))
    assert_same(tuned.hypergradient, replayed().hypergradient)


def test_losses_are_checked_before_the_first_step():
    of_two = lambda w, h: 0.0
    with pytest.raises(TypeError, match="val_loss_fn is called as"):
        gradhpo.replay(
            OPTIMIZER, start(), DATA, VAL, gradhpo.LossFunctions(train_loss, of_two), num_steps=9
        )


def test_training_that_diverges_ends_the_replay():
    high = HYPERPARAMS | {"rate": jnp.asarray(800.0)}
    state = start(hyperparams=high)
    with pytest.warns(RuntimeWarning, match="not finite after inner step 5"):
        found = replayed(state=state)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(found.hypergradient))
    assert "diverged" in found.report
    assert found.report.startswith("5 of 23 inner steps in 1 segment of 5")
    assert found.state.step == 5


@pytest.mark.thorough
def test_a_hypergradient_of_zero_is_explained():
    clipped = lambda h: h | {"decay": jnp.minimum(h["decay"], -9.0)}
    losses = gradhpo.LossFunctions(
        lambda w, h, batch: train_loss(w, clipped(h), batch), lambda w, h, batch: error(w, batch)
    )
    with pytest.warns(RuntimeWarning, match=r"hyperparams \['decay'\] is exactly 0"):
        found = gradhpo.replay(OPTIMIZER, start(), DATA, VAL, losses, num_steps=3, progress=False)
    assert np.all(found.hypergradient["decay"] == 0)
    assert found.hypergradient["rate"] != 0


def test_shows_its_progress(capsys):
    replayed(progress="digits")
    said = capsys.readouterr().err
    assert said.startswith("digits: 46 steps, compiling")
    assert "46/46" in said
