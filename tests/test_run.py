"""The loop: equal to calling `step`, traced once, and honest about how it ended."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import arrays, assert_same, quick
from problems import OUTER, relaxed
from ridge import LOSSES, SGD, X, Y, train_loss, val_loss

import gradhpo
from gradhpo.core.types import METRICS


def unrolled(outer_optimizer=OUTER, steps=3, inner_optimizer=SGD):
    return gradhpo.UnrolledOptimizer(inner_optimizer, outer_optimizer, unroll_steps=steps)


def start(optimizer):
    return optimizer.init(jnp.zeros(3), jnp.full(3, -2.0))


def run(optimizer, train_data, val_data=(X, Y), state=None, **settings):
    state = start(optimizer) if state is None else state
    settings = {"num_steps": 7, "chunk_size": 3, "progress": False} | settings
    return gradhpo.run(optimizer, state, LOSSES, train_data, val_data, **settings)


# Sources that change from step to step, with different sizes, so that swapped batches would show.
CHANGING = {
    "train": gradhpo.ArrayData((X, Y), 4, jax.random.key(1)),
    "val": gradhpo.ArrayData((X, Y), 3, jax.random.key(2)),
}
NOISE = {"train": jax.random.key(3), "val": jax.random.key(4)}
FIRST, STEPS, INNER = 2, 6, 3  # the run resumes from step 2


def source_of(kind, side):
    """A source, and its batch at index i (of an inner step, or of a step)."""
    data = CHANGING[side]
    # An iterator starts from its position, not from the step of the state.
    first = FIRST * (INNER if side == "train" else 1)
    batches = [jax.tree.map(np.asarray, data(first + i)) for i in range(STEPS * INNER)]
    at_first = lambda i: data(0)
    sources = {
        "function": (
            lambda i: jax.tree.map(jnp.sin, data(i)),
            lambda i: jax.tree.map(jnp.sin, data(i)),
        ),
        "ArrayData": (data, data),
        "iterator": (iter(batches), data),
        "iterate": (gradhpo.iterate(batches), data),
        "a cycle": (gradhpo.iterate(batches[:5]), lambda i: batches[(i - first) % 5]),
        "one batch": (data(0), at_first),
        "one batch with a key": ((*data(0), NOISE[side]), at_first),
        "all of it": (gradhpo.ArrayData((X, Y), 10, NOISE[side]), lambda i: (X, Y)),
    }
    return sources[kind]


def noisy(loss):
    """With noise in the targets if the batch has a key for it."""

    def on(w, h, batch):
        x, y, *keys = batch
        return loss(w, h, (x, y + jax.random.normal(keys[0], y.shape) if keys else y))

    return on


NOISY = gradhpo.LossFunctions(noisy(train_loss), noisy(val_loss))
FIXED = ("one batch", "one batch with a key", "all of it")


@pytest.mark.parametrize(
    ("of_train", "of_val"),
    quick(
        [
            ("function", "function"),
            ("ArrayData", "ArrayData"),
            ("iterator", "iterator"),
            ("iterate", "iterate"),
            ("one batch with a key", "one batch with a key"),
            ("function", "iterator"),
            ("iterator", "function"),
            ("a cycle", "ArrayData"),
            ("ArrayData", "a cycle"),
            ("one batch", "ArrayData"),
            ("all of it", "iterate"),
            ("iterate", "one batch"),
        ],
        keep=[("ArrayData", "ArrayData"), ("iterator", "iterator")],
    ),
)
def test_every_kind_of_source_is_a_loop_over_step(of_train, of_val):
    optimizer = unrolled(steps=INNER)
    (train, train_at), (val, val_at) = source_of(of_train, "train"), source_of(of_val, "val")

    def folded(batch, kind, side, step):
        return (*batch, jax.random.fold_in(NOISE[side], step)) if "key" in kind else batch

    state = begun = start(optimizer).update(step=jnp.asarray(FIRST, jnp.int32))
    seen = []
    for k in range(FIRST, FIRST + STEPS):
        if of_train in FIXED:
            train_batch = folded(train_at(k), of_train, "train", k)
        else:
            train_batch = gradhpo.BatchStack.of([train_at(INNER * k + t) for t in range(INNER)])
        val_batch = folded(val_at(k), of_val, "val", k)
        state = optimizer.step(state, train_batch, val_batch, NOISY.train_loss, NOISY.val_loss)
        seen.append(state.metadata)
    found, history = gradhpo.run(
        optimizer, begun, NOISY, train, val, num_steps=STEPS, chunk_size=4, progress=False
    )
    assert_same(found, state, rtol=1e-12)
    assert set(history) == set(METRICS)
    for name in METRICS:
        np.testing.assert_allclose(history[name], [m[name] for m in seen], rtol=1e-12)
    assert history.stop_reason == "num_steps"
    assert "6 of 6 steps" in history.report
    if of_val not in FIXED:
        assert len(set(np.round(history["val_loss"], 6).tolist())) == STEPS


def test_continuing_is_one_long_run():
    optimizer, data = unrolled(), gradhpo.ArrayData((X, Y), 4, jax.random.key(1))
    whole, whole_history = run(optimizer, data, num_steps=8)
    half, first = run(optimizer, data, num_steps=4)
    found, second = run(optimizer, data, num_steps=4, state=half)
    assert_same(found, whole)
    joined = np.concatenate([first["val_loss"], second["val_loss"]])
    np.testing.assert_array_equal(joined, whole_history["val_loss"])


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bits():
    """Compiled again, for new functions; over processes in tests/test_checkpoint.py."""
    data = gradhpo.ArrayData((X, Y), 4, jax.random.key(1))
    first, history = run(unrolled(), data)
    second, again = run(unrolled(inner_optimizer=relaxed(optax.sgd(0.1))), data)
    assert_same(first, second)
    np.testing.assert_array_equal(history["val_loss"], again["val_loss"])


def test_the_callers_state_is_left_intact():
    optimizer = unrolled()
    state = start(optimizer)
    before = jax.tree.map(np.asarray, arrays(state))
    run(optimizer, (X, Y), state=state)
    assert_same(state, before)


def test_traces_full_chunks_once_and_the_remainder_once():
    traces = []

    def counted(w, h, batch):
        traces.append(1)
        return train_loss(w, h, batch)

    optimizer, losses = unrolled(None), gradhpo.LossFunctions(counted, val_loss)

    def go(key, **settings):
        data = gradhpo.ArrayData((X, Y), 4, jax.random.key(key))
        return gradhpo.run(
            optimizer, start(optimizer), losses, data, (X, Y), progress=False, **settings
        )

    go(0, num_steps=5, chunk_size=5, lr_hyper=0.1)
    per_trace = len(traces)
    go(1, num_steps=50, chunk_size=5, lr_hyper=0.2)
    assert len(traces) == per_trace
    go(2, num_steps=57, chunk_size=5, lr_hyper=0.3)
    assert len(traces) == 2 * per_trace


@pytest.mark.thorough
def test_a_data_function_made_anew_for_every_run_is_named():
    optimizer = unrolled()

    def five_runs():
        for _ in range(5):
            run(optimizer, lambda i: (X, Y), num_steps=3)

    with pytest.warns(
        UserWarning, match="run .chunks of 3. was traced.*since the last time: train_data"
    ):
        five_runs()


def test_schedule_of_the_outer_rate():
    optimizer = unrolled(None, steps=1)
    schedule = lambda step: jnp.where(step < 2, 0.0, 0.5)
    state, _ = run(optimizer, (X, Y), lr_hyper=schedule, num_steps=2)
    np.testing.assert_array_equal(state.hyperparams, jnp.full(3, -2.0))
    moved, _ = run(optimizer, (X, Y), lr_hyper=schedule, num_steps=1, state=state)
    by_hand = optimizer.step(state, (X, Y), (X, Y), train_loss, val_loss, lr_hyper=0.5)
    assert_same(moved, by_hand, rtol=1e-12)


def test_callbacks_see_every_chunk_and_may_stop():
    seen = []

    def stop_after_two(state, metrics):
        seen.append((int(state.step), metrics["val_loss"].shape))
        return len(seen) == 2

    log = []
    callbacks = [stop_after_two, lambda state, metrics: log.append(1)]
    state, history = run(unrolled(), (X, Y), callbacks=callbacks, num_steps=100)
    assert seen == [(3, (3,)), (6, (3,))]
    assert log == [1, 1]
    assert state.step == 6
    assert history.stop_reason == "callback"
    assert len(history["val_loss"]) == 6


@pytest.mark.parametrize("answer", [True, np.bool_(True), jnp.asarray(True)])
def test_a_callback_may_answer_with_any_boolean(answer):
    _, history = run(unrolled(), (X, Y), callbacks=[lambda state, metrics: answer])
    assert history.stop_reason == "callback"
    assert len(history["val_loss"]) == 3


@pytest.mark.thorough
def test_an_iterator_may_yield_keys():
    drawn = lambda w, h, batch: jnp.sum(jnp.square(w - jax.random.normal(batch[1], (3,)))) * h
    optimizer = gradhpo.UnrolledOptimizer(SGD, OUTER, unroll_steps=2)
    losses = gradhpo.LossFunctions(drawn, lambda w, h, batch: jnp.sum(jnp.square(w)))
    batches = [(np.ones(2), jax.random.key(i)) for i in range(6)]
    runs = []
    for data in (iter(batches), lambda i: (jnp.ones(2), jax.random.key(i))):
        state = optimizer.init(jnp.zeros(3), jnp.asarray(1.0))
        state, _ = gradhpo.run(optimizer, state, losses, data, None, num_steps=3, progress=False)
        runs.append(state)
    assert_same(runs[0], runs[1], rtol=1e-12)


def test_warnings_point_at_the_line_of_the_user():
    data = lambda i: (X, jnp.full_like(Y, jnp.nan))
    with pytest.warns(RuntimeWarning) as caught:
        run(unrolled(), data, max_rejections=2)
    assert caught[0].filename == __file__


def test_rejections_in_a_row_stop_the_run_with_a_report():
    data = lambda i: (X, jnp.where(i >= 6, jnp.nan, Y))  # bad from the third step on
    with pytest.warns(RuntimeWarning, match="consecutive steps were non-finite.*Usual causes"):
        state, history = run(unrolled(), data, num_steps=100, max_rejections=4, chunk_size=5)
    assert history.stop_reason == "rejected"
    expected, _ = run(unrolled(), data, num_steps=2)
    assert_same(state.params, expected.params)
    assert state.metadata["rejected"] == len(history["rejected"]) - 2


class Best(NamedTuple):
    """The state of an optimizer that stores a number."""

    best: jax.Array


def keeping(first, change=0.0):
    """Gradient descent that stores a number and adds to it."""
    init = lambda params: Best(jnp.asarray(first))
    move = lambda g: jax.tree.map(lambda x: -0.1 * x, g)
    return optax.GradientTransformation(
        init,
        lambda g, state, params=None: (move(g), Best(state.best + change)),  # pyright: ignore
    )


OF_THEIR_OWN = {
    "inner, from the start": (unrolled(inner_optimizer=keeping(np.nan)), "inner_opt_state.best"),
    "inner, in the update": (unrolled(inner_optimizer=keeping(1.0, np.inf)), "inner_opt_state.b"),
    "outer, from the start": (unrolled(keeping(np.nan)), "outer_opt_state.best"),
    "outer, in the update": (unrolled(keeping(np.inf, -np.inf)), "outer_opt_state.best"),
}


def test_a_loss_that_is_nan_from_the_first_step_blames_the_batch():
    with pytest.warns(RuntimeWarning, match="training loss of the first step was not finite"):
        _, history = run(unrolled(), (X, Y * jnp.nan), num_steps=9, max_rejections=4)
    assert "look first for a NaN, an infinity or too large a number in its batch" in history.report
    assert "Usual causes" not in history.report


@pytest.mark.parametrize(("good", "said"), [(0, "Every step was rejected. 3 of 3"), (3, "3 of 3")])
def test_a_run_in_which_every_step_was_rejected_says_so_first(good, said):
    """Though it is complete: fewer steps in a row are rejected than would end it."""
    batches = lambda i: (X, jnp.where(i < good, Y, jnp.nan))
    with pytest.warns(RuntimeWarning, match="rejected as non-finite"):
        _, history = run(unrolled(), batches, num_steps=3)
    assert history.stop_reason == "num_steps"
    assert history.report.startswith(said)


@pytest.mark.parametrize("where", OF_THEIR_OWN)
def test_a_run_refused_for_the_state_of_an_optimizer_says_so(where):
    """Losses and hypergradient are finite, so nothing else in the report would show it."""
    optimizer, leaf = OF_THEIR_OWN[where]
    with pytest.warns(RuntimeWarning, match=f"own state is not finite: {leaf}.* is accepted"):
        state, history = run(optimizer, (X, Y), max_rejections=3)
    assert history.stop_reason == "rejected"
    assert np.all(np.isfinite(history["val_loss"]))
    assert "Usual causes" not in history.report
    assert_same(state.params, start(optimizer).params)


def test_an_infinity_that_stays_is_no_reason():
    state, history = run(unrolled(inner_optimizer=keeping(np.inf)), (X, Y))
    assert state.get_metric("rejected") == 0
    assert "own state" not in history.report


def test_single_rejections_do_not_stop_the_run():
    data = lambda i: (X, jnp.where(i % 3 == 0, jnp.nan, Y))
    state, history = run(unrolled(steps=1), data, num_steps=9, max_rejections=2)
    assert history.stop_reason == "num_steps"
    assert state.metadata["rejected"] == 3
    assert "3 rejected" in history.report


def spoilt(*steps):
    """Data that are bad at these steps."""
    return lambda i: (X, jnp.where(jnp.isin(i, jnp.asarray(steps, i.dtype)), jnp.nan, Y))


@pytest.mark.thorough
def test_rejections_in_a_row_are_counted_over_chunks_and_end_with_a_good_step():
    optimizer = unrolled(steps=1)
    settings = {"num_steps": 13, "max_rejections": 4}
    # Whole chunks of bad steps, with a good chunk between them.
    state, history = run(optimizer, spoilt(3, 4, 5, 9, 10, 11), **settings)
    assert history.stop_reason == "num_steps"
    assert "(steps 4, 5, 6, 10, 11, ...)" in history.report
    # As counted by `state.step`, also when a run resumes.
    _, history = run(optimizer, spoilt(14), state=state, num_steps=3)
    assert "1 rejected as non-finite (step 15)" in history.report
    with pytest.warns(RuntimeWarning, match="4 consecutive steps"):
        _, history = run(optimizer, spoilt(1, 2, 3, 4), **settings)
    assert history.stop_reason == "rejected"


def test_an_iterator_that_ends_returns_what_was_done():
    batches = [(np.asarray(X), np.asarray(Y))] * 14  # four whole steps of three batches
    with pytest.warns(RuntimeWarning, match="An iterator ended"):
        state, history = run(unrolled(), iter(batches), num_steps=10)
    assert history.stop_reason == "data exhausted"
    assert state.step == 4
    assert len(history["val_loss"]) == 4


@pytest.mark.thorough
def test_large_batches_of_an_iterator_shorten_the_chunk():
    optimizer = unrolled(steps=1)
    big = np.ones((2**20, 3)), np.ones(2**20)  # 32 MiB
    chunks = []
    callbacks = [lambda state, metrics: chunks.append(len(metrics["val_loss"]))]
    run(optimizer, gradhpo.iterate([big]), num_steps=4, chunk_size=100, callbacks=callbacks)
    assert chunks == [2, 2]


def test_keys_in_a_fixed_batch_differ_between_steps():
    drawn = lambda w, h, batch: jnp.sum(jnp.square(w - jax.random.normal(batch["key"], (3,)))) * h
    optimizer = gradhpo.OneStepOptimizer(SGD, OUTER)
    state = optimizer.init(jnp.zeros(3), jnp.asarray(1.0))
    losses = gradhpo.LossFunctions(drawn, lambda w, h, batch: jnp.sum(jnp.square(w)))
    batch = {"key": jax.random.key(0)}
    _, history = gradhpo.run(optimizer, state, losses, batch, None, num_steps=5, progress=False)
    assert len(set(history["train_loss"].tolist())) == 5


def test_progress_bar_shows_losses(capsys):
    run(unrolled(), (X, Y), progress=True)
    shown = capsys.readouterr().err
    assert "7/7" in shown
    assert "val=" in shown


def test_history_plots(tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    _, history = run(unrolled(), (X, Y))
    axes = history.plot()
    assert [line.get_label() for line in axes.lines] == ["train_loss", "val_loss"]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), history["val_loss"])
    assert history.plot("hypergrad_norm", ax=axes) is axes
    assert "7 steps" in repr(history)
    with pytest.raises(KeyError, match=r"no metric 'valloss'; available: .*val_loss"):
        history.plot("valloss")


def test_no_warning_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(unrolled(), gradhpo.ArrayData((X, Y), 4, jax.random.key(1)))
