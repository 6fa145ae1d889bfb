"""What losses return besides their values: metrics, which are never differentiated."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import OUTER, relaxed
from test_contract import ADAM, OF_ANY_LOSS, PLAIN, build

import gradhpo
from gradhpo.core.measured import without_aux
from gradhpo.extend import Estimate
from gradhpo.utils.tracing import num_traces


W, H, BATCH = jnp.array([0.5, -1.0]), jnp.array([0.1, 0.2]), jnp.array([0.3, -0.4])


def train(w, h, batch):
    return jnp.sum((w - h - batch) ** 2)


def val(w, h, batch):
    return jnp.sum((w - 1.0) ** 2) + 0.1 * jnp.sum(h**2)


def measured(loss):
    """The loss, with metrics: twice the loss, a flag, a count and NaN."""

    def both(w, h, batch):
        value = loss(w, h, batch)
        beside = {"twice": 2 * value, "positive": w[0] > 0, "size": w.size, "undefined": jnp.nan}
        return value, beside

    return both


PLAIN_LOSSES = gradhpo.LossFunctions(train, val)
LOSSES = gradhpo.LossFunctions(measured(train), measured(val))
NAMES = {f"{which}_{x}" for which in ("train", "val") for x in measured(train)(W, H, BATCH)[1]}


def check(metrics, of=lambda x: x):
    for which in ("train", "val"):
        np.testing.assert_allclose(
            of(metrics[f"{which}_twice"]), 2 * of(metrics[f"{which}_loss"]), rtol=1e-12
        )
        assert np.all(of(metrics[f"{which}_size"]) == 2)
        assert np.all(np.isin(of(metrics[f"{which}_positive"]), [0, 0.5, 1]))
        assert np.all(np.isnan(of(metrics[f"{which}_undefined"])))


@pytest.mark.parametrize(
    "name",
    quick(list(OF_ANY_LOSS), keep=["tasks"]),
)
def test_every_optimizer_measures_them_and_computes_what_it_does_without(name):
    optimizer = build(name, ADAM)
    batch = jnp.stack([BATCH, 2 * BATCH]) if name == "tasks" else BATCH
    state = plain = optimizer.init(W, H)
    for step in range(3):
        traces = num_traces()
        state = optimizer.step(state, batch, batch, LOSSES)
        assert step == 0 or num_traces() == traces
        plain = optimizer.step(plain, batch, batch, PLAIN_LOSSES)
        assert state.metadata.aux == NAMES
        check(state.metadata)
        assert all(state.metadata[x].dtype == jnp.float64 for x in NAMES)
        assert_same(without_aux(state), plain, rtol=1e-12)
    assert state.get_metric("rejected") == 0  # the NaN is not used
    given = batch, batch
    assert_same(
        optimizer.compute_hypergradient(state, *given, LOSSES),
        optimizer.compute_hypergradient(plain, *given, PLAIN_LOSSES),
        rtol=1e-12,
    )


def with_average(loss, form):
    """With an average of the weights as running state, which validation reads too."""

    def both(w, h, batch, r):
        new = {"average": 0.5 * (r["average"] + w)}
        value = loss(w + r["average"], h, batch)
        return form(value, new, {"twice": 2 * value})

    return both


@pytest.mark.parametrize("name", quick(["unrolled", "DrMAD", "greedy"], keep=["unrolled"]))
def test_with_running_state(name):
    nested = lambda value, new, aux: (value, (new, aux))
    alone = lambda value, new, aux: (value, aux)
    optimizer, r = build(name, ADAM), {"average": W}
    states = []
    for form in (nested, alone):
        losses = gradhpo.LossFunctions(with_average(train, nested), with_average(val, form))
        state = optimizer.step(optimizer.init(W, H, model_state=r), BATCH, BATCH, losses)
        assert state.metadata.aux == {"train_twice", "val_twice"}
        for which in ("train", "val"):
            np.testing.assert_allclose(
                state.metadata[f"{which}_twice"], 2 * state.metadata[f"{which}_loss"]
            )
        assert not np.allclose(state.model_state["average"], W)
        states.append(state)
    assert_same(*states)


def gradient_by_hand(w, h, batch):
    return jax.grad(train)(w, h, batch)


def update_by_hand(w, h, batch):
    return w - 0.1 * jax.grad(train)(w, h, batch)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            gradhpo.UnrolledOptimizer(PLAIN, OUTER, unroll_steps=3, grad_fn=gradient_by_hand),
            marks=pytest.mark.thorough,
        ),
        gradhpo.UnrolledOptimizer(None, OUTER, unroll_steps=3, update_fn=update_by_hand),
        pytest.param(
            gradhpo.ImplicitOptimizer(relaxed(optax.lbfgs()), OUTER, inner_steps=3),
            marks=pytest.mark.thorough,
        ),
        pytest.param(gradhpo.FixedOptimizer(PLAIN, inner_steps=3), marks=pytest.mark.thorough),
        gradhpo.ImplicitOptimizer(PLAIN, OUTER, inner_steps=3, curvature_batches=3),
    ],
    ids=["grad_fn", "update_fn", "line search", "fixed", "curvature of several batches"],
)
def test_however_the_inner_step_is_taken(optimizer):
    batch = gradhpo.BatchStack(jnp.stack([BATCH, 2 * BATCH, 3 * BATCH]))
    if optimizer.inner_optimizer is not None and optimizer.passes_loss:
        batch = BATCH  # the same for all steps: the search's evaluation could be reused
    state = optimizer.step(optimizer.init(W, H), batch, BATCH, LOSSES)
    check(state.metadata)
    plain = optimizer.step(optimizer.init(W, H), batch, BATCH, PLAIN_LOSSES)
    assert_same(without_aux(state), plain, rtol=1e-9)


# -- runs --------------------------------------------------------------------------------------


def stream(index):
    return BATCH + 0.01 * index.astype(float)


def run(optimizer, state, losses=LOSSES, **settings):
    settings = {"num_steps": 6, "chunk_size": 2, "progress": False} | settings
    return gradhpo.run(optimizer, state, losses, stream, BATCH, **settings)


def test_a_run_records_logs_and_shows_them(tmp_path, capfd):
    optimizer = build("unrolled", ADAM)
    log, seen = tmp_path / "log.jsonl", []
    watch = lambda state, metrics: seen.append((set(state.metadata), set(metrics)))
    callbacks = [watch, gradhpo.JSONLinesLogger(log)]
    state, history = run(optimizer, optimizer.init(W, H), callbacks=callbacks, progress=True)
    assert NAMES <= set(history)
    assert all(history[x].shape == (6,) for x in NAMES)
    check(history)
    check(state.metadata, float)
    assert all(NAMES <= of_state and NAMES <= of_chunk for of_state, of_chunk in seen)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["val_twice"] for line in lines] == history["val_twice"].tolist()
    assert "val_twice=" in capfd.readouterr().err
    # A longer run resumes from there, with other losses too.
    state, more = run(optimizer, state, PLAIN_LOSSES)
    assert state.metadata.aux == set()
    assert not NAMES & set(more)


def test_episodes_and_early_stopping_take_them():
    optimizer = build("one step", ADAM)
    stopping = gradhpo.EarlyStopping(patience=1, metric="val_size")
    state, history = run(
        optimizer, optimizer.init(W, H), steps_per_episode=2, reptile_rate=0.5,
        callbacks=[stopping, gradhpo.BestState("val_twice")], num_steps=40,
    )  # fmt: skip
    assert history.stop_reason == "early stopping"
    assert len(history["val_size"]) < 40
    check(history)
    assert state.metadata.aux == NAMES


def test_an_interrupted_run_is_resumed_with_them(tmp_path):
    optimizer = build("HyperDistill", ADAM)
    start = optimizer.init(W, H)
    once = gradhpo.BestState()
    settings = {"steps_per_episode": 3, "num_steps": 12, "chunk_size": 3}
    whole, history = run(optimizer, start, callbacks=[once], **settings)
    here = {"checkpoint": gradhpo.Checkpoint(tmp_path, every_steps=3), **settings}
    stop = lambda state, metrics: int(state.step) == 6
    run(optimizer, start, callbacks=[gradhpo.BestState(), stop], **here)
    best = gradhpo.BestState()
    part, _ = gradhpo.load_checkpoint(tmp_path, start, [best])
    assert part.step == 6
    assert part.metadata.aux == NAMES
    check(part.metadata)
    check(best.state.metadata)
    best = gradhpo.BestState()
    state, again = run(optimizer, start, callbacks=[best], **here)
    assert_same(state, whole)
    assert_same(best.state, once.state)
    assert state.metadata.aux == best.state.metadata.aux == NAMES
    for name in history:
        np.testing.assert_array_equal(again[name], history[name])
    # Again, with nothing left to do.
    state, _ = run(optimizer, start, callbacks=[gradhpo.BestState()], **here)
    assert_same(state, whole)


# -- the user's programs -----------------------------------------------------------------------


def scanned(optimizer, state, losses):
    body = lambda state, _: (optimizer.step(state, BATCH, BATCH, losses), None)
    return jax.lax.scan(body, state, None, 3)[0]


def test_a_scan_carries_them_from_init():
    optimizer = build("unrolled", ADAM)
    bare = optimizer.init(W, H)
    with pytest.raises(ValueError, match=r"(?s)train_twice.*scan, jit or vmap.*losses=losses,"):
        scanned(optimizer, bare, LOSSES)
    state = optimizer.init(W, H, losses=LOSSES, batch=BATCH, val_batch=BATCH)
    assert state.metadata.aux == NAMES
    assert all(np.isnan(state.metadata[x]) for x in NAMES)
    assert "val_twice=nan" in repr(state)
    by_hand = state
    for _ in range(3):
        by_hand = optimizer.step(by_hand, BATCH, BATCH, LOSSES)
    assert_same(scanned(optimizer, state, LOSSES), by_hand, rtol=1e-12)
    # A loop whose losses have none keeps the names.
    without = scanned(optimizer, by_hand, PLAIN_LOSSES)
    assert without.metadata.aux == NAMES
    assert np.isnan(without.metadata["val_twice"])
    vmapped = jax.vmap(lambda h: optimizer.step(
        eqx.tree_at(lambda s: s.hyperparams, bare, h), BATCH, BATCH, LOSSES
    ))  # fmt: skip
    assert vmapped(jnp.stack([H, 2 * H])).metadata["val_twice"].shape == (2,)


def test_adopt_keeps_them_and_notes_stay_notes():
    optimizer = build("unrolled", ADAM)
    state = optimizer.step(optimizer.init(W, H), BATCH, BATCH, LOSSES)
    state = state.update(metadata={"epoch": jnp.asarray(1)})
    adopted = build("one step", ADAM).adopt(state)
    assert adopted.metadata.aux == NAMES
    after = build("one step", ADAM).step(adopted, BATCH, BATCH, PLAIN_LOSSES)
    assert after.metadata.aux == set()
    assert after.metadata["epoch"] == 1
    with pytest.raises(ValueError, match="val_twice, which is a metric"):
        state.update(metadata={"val_twice": jnp.asarray(1.0)})


@pytest.mark.thorough
def test_diagnostics_take_such_losses():
    optimizers = {
        "one step": build("one step", relaxed(optax.sgd(0.1))),
        "exact": build("unrolled"),
    }
    start = optimizers["exact"].init(W, H)
    reports = [
        gradhpo.compare_hypergradients(optimizers, start, BATCH, BATCH, losses)
        for losses in (LOSSES, PLAIN_LOSSES)
    ]
    assert reports[0].overall.cosine == reports[1].overall.cosine
    found = gradhpo.check_hypergradient(optimizers["exact"], start, BATCH, BATCH, LOSSES)
    assert not found.findings


class Careless(gradhpo.FOOptimizer):
    """First order, as a user may write it: only with the losses."""

    def estimate(self, problem, memory):
        found = super().estimate(problem, memory)
        return Estimate(
            found.z, found.hypergradient, jnp.asarray(found.train_loss), jnp.asarray(found.val_loss)
        )


def test_an_algorithm_that_drops_them_is_named():
    optimizer = Careless(PLAIN, OUTER)
    with pytest.warns(UserWarning, match="Careless.estimate returned losses without .*train_twice"):
        state = optimizer.step(optimizer.init(W, H), BATCH, BATCH, LOSSES)
    assert state.metadata.aux == set()
    plain = gradhpo.FOOptimizer(PLAIN, OUTER)
    plain = plain.step(plain.init(W, H), BATCH, BATCH, PLAIN_LOSSES)
    np.testing.assert_allclose(state.metadata["val_loss"], plain.metadata["val_loss"])


def test_record_reads_them_where_the_state_has_their_names():
    optimizer = build("one step")
    settings = {"record": lambda state: {"half": state.metadata["val_twice"] / 2}}
    with pytest.raises(KeyError, match=r"init\(params, hyperparams, losses="):
        run(optimizer, optimizer.init(W, H), **settings)
    state = optimizer.init(W, H, losses=LOSSES, batch=BATCH, val_batch=BATCH)
    _, history = run(optimizer, state, **settings)
    np.testing.assert_allclose(history["half"], history["val_loss"], rtol=1e-12)


def test_a_monitor_compiles_nothing():
    optimizer = build("one step")
    state = optimizer.init(W, H)
    run(optimizer, state)
    traces = num_traces()
    run(optimizer, state, callbacks=[gradhpo.Monitor({"third": lambda state: 1.0})])
    assert num_traces() == traces


# -- misuse ------------------------------------------------------------------------------------


def returning(beside):
    return lambda w, h, batch: (train(w, h, batch), beside(w))


BAD = {
    "not a dict": (returning(lambda w: jnp.sum(w)), TypeError, r"dict of scalar metrics.*'acc"),
    "another pytree": (
        returning(lambda w: [w]),
        TypeError,
        "a loss and a list: .*dict of scalar metrics",
    ),
    "keys that are no texts": (
        returning(lambda w: {0: w[0]}),
        TypeError,
        "a dict of scalar metrics",
    ),
    "an array": (returning(lambda w: {"x": w}), ValueError, r"'x', shape \(2,\).*record="),
    "a text": (returning(lambda w: {"x": "good"}), ValueError, "'x', a str, as a metric"),
    "None": (returning(lambda w: {"x": None}), ValueError, "'x', a NoneType, as a metric"),
    "no name": (returning(lambda w: {"": w[0]}), ValueError, "without a name"),
    "a complex number": (returning(lambda w: {"x": 1j}), ValueError, "'x'.*complex"),
    "a metric of every step": (returning(lambda w: {"loss": w[0]}), ValueError, "train_loss"),
    "three things": (lambda w, h, b: (train(w, h, b), {}, {}), TypeError, "got a tuple"),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse_is_named(case):
    loss, error, said = BAD[case]
    optimizer = build("one step")
    with pytest.raises(error, match=said):
        optimizer.step(optimizer.init(W, H), BATCH, BATCH, loss, val)


@pytest.mark.parametrize("which", ["train", "val"])
def test_what_a_loss_returns_is_not_blamed_on_a_batch_of_none(which):
    optimizer = build("one step")
    losses = {"train": lambda w, h, b: jnp.sum((w - h) ** 2), "val": lambda w, h, b: jnp.sum(w**2)}
    losses[which] = lambda w, h, b: (jnp.sum((w - h) ** 2), w)
    with pytest.raises(TypeError, match=f"^{which}_loss_fn returned a loss and an array"):
        optimizer.step(optimizer.init(W, H), None, None, losses["train"], losses["val"])


def test_names_that_are_taken():
    optimizer = build("one step")
    state = optimizer.init(W, H)
    noted = state.update(metadata={"val_twice": jnp.asarray(1.0)})
    with pytest.raises(ValueError, match=r"a note of that name: remove the note, .*'val_twice'"):
        optimizer.step(noted, BATCH, BATCH, LOSSES)
    record = lambda state: {"val_twice": state.hyperparams}
    monitor = gradhpo.Monitor({"val_twice": lambda state: 1.0})
    for settings in ({"record": record}, {"callbacks": [monitor]}):
        with pytest.raises(ValueError, match=r"a loss returns the metric val_twice.*another"):
            run(optimizer, state, **settings)


@pytest.mark.parametrize(
    "returned",
    [
        lambda loss, aux, new: (loss, new, aux),
        lambda loss, aux, new: ((loss, aux), new),
    ],
    ids=["three results", "metrics beside the loss"],
)
def test_metrics_in_another_place_than_beside_the_model_state(returned):
    def train_loss(w, h, batch, r):
        loss = jnp.sum((w - h) ** 2)
        return returned(loss, {"twice": 2 * loss}, r + 1)

    val_loss = lambda w, h, batch, r: jnp.sum(w**2)
    optimizer = build("one step")
    state = optimizer.init(W, H, model_state=jnp.zeros(()))
    with pytest.raises((TypeError, ValueError), match=r"\(loss, \(new_model_state, \{"):
        optimizer.step(state, BATCH, BATCH, train_loss, val_loss)
