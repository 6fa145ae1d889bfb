"""A run overwrites states that nothing reads any more; states still referenced stay valid."""

import gc
import os
import signal
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import arrays, assert_same, quick
from problems import OUTER, relaxed
from ridge import LOSSES, X, Y, train_loss, val_loss

import gradhpo
from benchmarks.costs.run_memory import ALGORITHMS, by_hand, network, of_run
from gradhpo.training import handover
from gradhpo.training.chunk import Chunk
from gradhpo.training.record import Record
from gradhpo.training.refused import Refused
from gradhpo.utils.dispatch import compiled, copied, is_given_up


ADAM = relaxed(optax.adam(0.05, eps_root=1e-16))
OPTIMIZER = gradhpo.OneStepOptimizer(ADAM, OUTER)
DATA = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))
BATCHES = [(np.asarray(X[i : i + 4]), np.asarray(Y[i : i + 4])) for i in range(6)]
SETTINGS = {
    "steps": {},
    "episodes": {"steps_per_episode": 3, "reptile_rate": 0.5},
    "parts": {"steps_per_episode": 6, "reptile_rate": 0.5},  # two chunks each
}


def run(num_steps=12, data=DATA, state=None, losses=LOSSES, **settings):
    settings = {"chunk_size": 3, "progress": False} | settings
    state = OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0)) if state is None else state
    return gradhpo.run(OPTIMIZER, state, losses, data, (X, Y), num_steps=num_steps, **settings)


def watching(state, metrics):
    """A callback that might keep a state, so that all of them have to stay valid."""


def assert_same_run(found, expected):
    assert_same(found[0], expected[0])
    assert found[1].stop_reason == expected[1].stop_reason
    assert list(found[1]) == list(expected[1])
    for name in expected[1]:
        np.testing.assert_array_equal(found[1][name], expected[1][name])


# -- how much ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user_has_it")
@pytest.mark.parametrize("name", quick(list(ALGORITHMS), keep=[]))
def test_a_chunk_takes_the_memory_of_a_donated_scan(name):
    """With the same refusal. A small network, where the library's overhead weighs most."""
    of = network(width=128, batch_size=8)
    ours = of_run(ALGORITHMS[name], of)
    assert ours.held <= 1.1 * by_hand(of).held
    state = OPTIMIZER.init(of.params, of.log_decay)
    moved = state.params, state.inner_opt_state[0].mu, state.inner_opt_state[0].nu
    assert ours.shared >= sum(x.nbytes for x in jax.tree.leaves(moved))


SIZE = 1_237


def alive(num_steps=12, **settings):
    """How many arrays of this size there are at the end of each chunk, besides the caller's three:
    parameters and two moments.
    """
    counts = []

    def count(state, metrics):
        gc.collect()
        counts.append(sum(x.size == SIZE for x in jax.live_arrays()) - 3)

    count.reads_states = False  # pyright: ignore[reportFunctionMemberAccess]
    losses = gradhpo.LossFunctions(
        lambda w, h, batch: jnp.mean((w - h) ** 2), lambda w, h, batch: jnp.mean((w - 1.0) ** 2)
    )
    state = OPTIMIZER.init(jnp.zeros(SIZE), jnp.zeros(()))
    callbacks = [count, *settings.pop("callbacks", [])]
    run(num_steps, None, state, losses, callbacks=callbacks, **settings)
    return counts


@pytest.mark.thorough
def test_states_alive_at_the_end_of_a_chunk(monkeypatch):
    """One: that of the running chunk, or the last one at the end of a run."""
    assert alive() == [3, 3, 3, 3]
    # The one passed to the callback, and that of the running chunk.
    assert alive(callbacks=[watching]) == [6, 6, 6, 3]
    monkeypatch.setattr(handover, "_LARGE", 0)
    assert alive(callbacks=[watching]) == [3, 3, 3, 3]


@pytest.mark.thorough
def test_the_best_state_is_kept_once():
    values = [1.0, 3.0, 0.5, 2.0]
    best = gradhpo.BestState(lambda state: values[int(state.step) // 3 - 1])
    # While the first is the best, it exists besides the one being examined.
    assert alive(callbacks=[best]) == [6, 9, 9, 6]
    assert best.step == 9
    assert not is_given_up(best.state)


# -- what stays valid --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quick(list(SETTINGS), keep=["parts"]))
def test_what_the_caller_has_stays_valid(kind):
    settings = SETTINGS[kind]
    w, h = jnp.zeros(3), jnp.full(3, -2.0)
    begun = OPTIMIZER.init(w, h)
    state, _ = run(state=begun, **settings)
    assert not is_given_up((w, h, begun, state))
    again, _ = run(state=begun, **settings)
    assert not is_given_up(state)
    assert_same(again, state)
    assert_same(run(state=state, **settings)[0], run(24, **settings)[0], rtol=1e-12)
    assert not is_given_up(state)


@pytest.mark.parametrize(
    ("kind", "large"),
    quick(
        [(kind, large) for kind in SETTINGS for large in (0, 10**9)],
        keep=[("steps", 0), ("parts", 10**9)],
    ),
)
def test_states_of_callbacks_stay_valid(kind, large, monkeypatch):
    settings = SETTINGS[kind]
    monkeypatch.setattr(handover, "_LARGE", large)
    seen, copies = [], []

    def keep(state, metrics):
        seen.append(state)
        copies.append(jax.tree.map(np.array, arrays(state)))

    best = gradhpo.BestState()
    found = run(callbacks=[keep, best], **settings)
    assert not is_given_up((seen, best.state))
    for state, copy in zip(seen, copies, strict=True):
        assert_same(state, copy)
    assert int(best.state.step) == best.step
    # And a run that keeps none gives the same result, bit for bit.
    assert_same_run(run(**settings), found)


def test_one_array_in_two_places():
    """JAX refuses to donate it twice."""
    ones = jnp.ones(3)
    state = OPTIMIZER.init(ones, jnp.full(3, -2.0))
    state = eqx.tree_at(lambda s: s.inner_opt_state[0].nu, state, ones)
    state = state.update(metadata={"first": ones})
    found, _ = run(state=state, **SETTINGS["episodes"])
    np.testing.assert_array_equal(found.metadata["first"], np.ones(3))
    assert not is_given_up((ones, found))


@pytest.mark.thorough
def test_logs_need_no_states(tmp_path):
    """They are written after the states are gone."""
    run(callbacks=[gradhpo.CSVLogger(tmp_path / "kept"), watching])
    assert alive(callbacks=[gradhpo.CSVLogger(tmp_path / "log")]) == [3, 3, 3, 3]
    run(callbacks=[gradhpo.CSVLogger(tmp_path / "given_up")])
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "given_up").read_bytes()


@pytest.mark.parametrize("kind", quick(list(SETTINGS), keep=["parts"]))
def test_a_checkpoint_that_is_due_now_and_then(kind, tmp_path):
    settings = SETTINGS[kind]
    saved = gradhpo.Checkpoint(tmp_path, every_steps=6, keep=9)
    found = run(18, checkpoint=saved, **settings)
    assert_same_run(found, run(18, **settings))
    assert len(list(tmp_path.glob("*.ckpt"))) == 4  # 0, 6, 12 and 18
    (tmp_path / "step-0000000018.ckpt").unlink()
    assert_same_run(run(18, checkpoint=saved, **settings), found)


# -- endings -----------------------------------------------------------------------------------


def spoilt(*steps):
    return lambda i: (X, jnp.where(jnp.isin(i, jnp.asarray(steps, i.dtype)), jnp.nan, Y))


@pytest.mark.filterwarnings("ignore:.*consecutive steps")
@pytest.mark.parametrize(
    ("kind", "bad"),
    quick(
        [(kind, bad) for kind in SETTINGS for bad in ((1, 2), (2, 3), (7, 8))],
        keep=[("steps", (2, 3)), ("parts", (7, 8))],
    ),
)
def test_nothing_is_done_behind_the_chunk_that_ends_a_run(kind, bad):
    """Though the device already has the next chunk, with good data."""
    losses = gradhpo.LossFunctions(lambda *given: (train_loss(*given), {"two": 2.0}), val_loss)
    settings = {"data": spoilt(*bad), "losses": losses, "max_rejections": 2} | SETTINGS[kind]
    found, expected = run(30, **settings), run(30, callbacks=[watching], **settings)
    assert found[1].stop_reason == "rejected"
    assert found[0].step == len(found[1]["val_loss"]) == 3 * (bad[-1] // 3 + 1)
    assert_same_run(found, expected)


def test_refused_steps_are_counted_as_the_record_counts_them():
    random = np.random.default_rng(0)
    after = jax.jit(lambda *given: Refused.after(*given))
    for limit in (1, 2, 4, 9):
        record, refused = Record(0, 0.0, 0.0), Refused.at_first(limit, 0)
        for _ in range(6):
            before = record.rejected[-1:] and len(record.rejected)
            counted = (before or 0) + np.cumsum(random.random(5) < 0.6).astype(float)
            refused = after(refused, jnp.asarray(float(before or 0)), jnp.asarray(counted))
            nan = np.full(5, np.nan)
            metrics = dict.fromkeys(("train_loss", "val_loss", "hypergrad_norm"), nan)
            record.add(metrics | {"rejected": counted})
            assert int(refused.in_a_row) == record.in_a_row
            assert bool(refused.over) == (record.longest >= limit)


def interrupted(at, how):
    for number in range(100):
        if number == at:
            how()
        yield BATCHES[number % 6]


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def raised():
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", [ctrl_c, raised])
def test_an_interrupt_returns_the_state_of_the_last_step_in_the_history(how):
    state, history = run(30, interrupted(10, how))
    assert history.stop_reason == "interrupted"
    assert state.step == len(history["val_loss"]) in (6, 9, 12)
    assert_same(state, run(int(state.step), iter(BATCHES * 2))[0])


@pytest.mark.parametrize("kind", quick(["steps", "episodes"], keep=["steps"]))
def test_an_iterator_that_ends_leaves_the_last_state(kind):
    settings = SETTINGS[kind]
    with pytest.warns(RuntimeWarning, match="An iterator ended"):
        state, history = run(30, iter(BATCHES + BATCHES[:3]), **settings)
    assert history.stop_reason == "data exhausted"
    assert state.step == len(history["val_loss"]) == 9
    assert_same(state, run(9, iter(BATCHES * 2), **settings)[0])


def test_a_logger_that_fails_leaves_a_state(tmp_path):
    def failing(state, metrics):
        if int(state.step) == 6:
            raise OSError("no paper")

    failing.reads_states = False  # pyright: ignore[reportFunctionMemberAccess]
    saved = gradhpo.Checkpoint(tmp_path, every_steps=9)
    with pytest.warns(RuntimeWarning, match="A callback failed: OSError: no paper"):
        state, history = run(30, callbacks=[failing], checkpoint=saved)
    assert history.stop_reason == "callback error"
    assert state.step == len(history["val_loss"]) == 9  # step 6 was lost
    assert_same(state, run(9)[0])
    # It has not seen all of them: they are repeated from the previous checkpoint.
    assert gradhpo.load_checkpoint(tmp_path, state)[0].step == 0


def fragile(fails_at):
    """A check that fails at a step, from the batch."""

    def checked_loss(w, h, batch):
        w = eqx.error_if(w, batch[2] == fails_at, "a cable")
        return train_loss(w, h, batch[:2])

    losses = gradhpo.LossFunctions(checked_loss, lambda w, h, batch: val_loss(w, h, batch))
    return {"data": lambda i: (X, Y, i), "losses": losses}


@pytest.mark.parametrize("kind", quick(["steps", "episodes"], keep=["steps"]))
def test_a_check_that_may_fail_keeps_the_state_before(kind):
    settings = SETTINGS[kind]
    with pytest.warns(RuntimeWarning, match="A check within a loss failed: .*a cable"):
        state, history = run(12, **fragile(7), **settings)
    assert history.stop_reason == "loss error"
    assert state.step == len(history["val_loss"]) == 6
    assert_same(state, run(6, **fragile(99), **settings)[0])


@pytest.mark.parametrize(
    ("kind", "saves"),
    quick(
        [(kind, saves) for kind in SETTINGS for saves in (False, True)],
        keep=[("episodes", False), ("steps", True)],
    ),
)
def test_a_device_that_fails_over_a_state_leaves_the_first(kind, saves, tmp_path, monkeypatch):
    """As if the check were a failure that no program reports."""
    settings = SETTINGS[kind]
    monkeypatch.setattr(Chunk, "may_raise", lambda *_: False)
    begun = OPTIMIZER.init(jnp.zeros(3), jnp.full(3, -2.0))
    if saves:
        settings = {"checkpoint": gradhpo.Checkpoint(tmp_path, every_steps=6)} | settings
    said = "The states after its first 9 steps are gone.* was given, of step 0"
    with pytest.warns(RuntimeWarning, match=said):
        state, history = run(18, state=begun, **fragile(10), **settings)
    assert history.stop_reason == "loss error"
    assert state.step == len(history["val_loss"]) == 0
    assert_same(state, begun)
    assert not is_given_up(state)
    if saves:
        assert "The last checkpoint is from step 6" in history.report
        found, _ = gradhpo.load_checkpoint(tmp_path, begun)
        assert_same(found, run(6, **fragile(99), **settings)[0])


# -- the underlying calls ----------------------------------------------------------------------


def test_what_is_given_up_is_gone_and_nothing_else():
    moved = compiled(lambda x, tree: {"sum": x + tree["a"], "frozen": tree["frozen"]}, (1,))
    tree: Any = {"a": jnp.ones(3), "frozen": gradhpo.frozen(jnp.ones(2)), "number": jnp.ones(())}
    kept = copied(tree)
    assert kept["a"] is not tree["a"]
    assert kept["frozen"].array is tree["frozen"].array
    x = jnp.ones(3)
    found = moved(x, tree)
    assert found["frozen"].array is tree["frozen"].array
    assert tree["a"].is_deleted()
    assert not is_given_up((x, tree["frozen"], tree["number"], kept, found))
    np.testing.assert_array_equal(found["sum"], 2 * np.ones(3))
