"""Populations: every member is its own run; exploiting copies, mutates, and records parents."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick, relative_error
from problems import OUTER, make, relaxed, stack_of

import gradhpo
from gradhpo.core.inputs import inputs_of
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.lineage import lineage, lowest_at_the_end
from gradhpo.utils.tracing import num_traces
from gradhpo.wrappers.exploiting import running_mean, sources


INNER = relaxed(optax.adam(0.1, eps_root=1e-8))
PLAIN = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(0.1)), OUTER, unroll_steps=3)
MOVED = lambda key, hyperparams: jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype), hyperparams
)


def train_loss(w, h, batch):
    return jnp.sum(jnp.square(w - h + 0 * jnp.sum(batch))) / 2


def val_loss(w, h, batch):
    nothing = 0 * jnp.sum(batch)
    return jnp.sum(jnp.square(w - 1 + nothing)) + jnp.sum(jnp.sin(4 * h))


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
BATCH = jnp.zeros(2)


def stacked(trees):
    arrays = [eqx.filter(tree, eqx.is_inexact_array) for tree in trees]
    return eqx.combine(jax.tree.map(lambda *x: jnp.stack(x), *arrays), trees[0])


def started(optimizer, members=4, **settings):
    hyperparams = jnp.tile(jnp.linspace(-2.0, 2.0, members)[:, None], (1, 3))
    return optimizer.init(jnp.zeros((members, 3)), hyperparams, **settings)


def trained(optimizer, state, steps, **settings):
    given = optimizer, state, LOSSES, BATCH, BATCH
    return gradhpo.run(*given, num_steps=steps, progress=False, **settings)


# -- members on their own --------------------------------------------------------------------------

OPTIMIZERS = {
    "unrolled": lambda *both: gradhpo.UnrolledOptimizer(*both, unroll_steps=3),
    "HyperDistill": lambda *both: gradhpo.OnlineHypergradientOptimizer(*both),
    "greedy": lambda *both: gradhpo.GreedyOptimizer(*both, unroll_steps=3),
    "fixed": lambda inner, outer: gradhpo.FixedOptimizer(inner, inner_steps=3),
}


@pytest.mark.parametrize("name", quick(list(OPTIMIZERS), keep=["fixed"]))
def test_every_member_is_its_own_run(name, getkey):
    """Members differ in parameters and hyperparameters, and share their batches."""
    problem, inner = make("optimizer", "adam", getkey())
    single = OPTIMIZERS[name](inner, OUTER)
    together = gradhpo.Population(single, 3)
    scaled = lambda tree, k: jax.tree.map(
        lambda x: x * (1 + 0.1 * k) if eqx.is_inexact_array(x) else x, tree
    )
    params = [scaled(problem.params, k) for k in range(3)]
    hyperparams = [scaled(problem.hyperparams, k) for k in range(3)]
    state = together.init(stacked(params), stacked(hyperparams))
    alone = [single.init(*each) for each in zip(params, hyperparams, strict=True)]
    losses = problem.train_loss, problem.val_loss
    for _ in range(2):
        batches = stack_of(problem, single.num_inner_steps, getkey()), problem.val_batch
        if single.tunes:
            every = [single.compute_hypergradient(one, *batches, *losses) for one in alone]
            found = together.compute_hypergradient(state, *batches, *losses)
            assert_same(found, stacked(every), rtol=1e-9, atol=1e-13)
        alone = [single.step(one, *batches, *losses) for one in alone]
        state = together.step(state, *batches, *losses)
    for number, one in enumerate(alone):
        # One product with many vectors is not the same program as many products.
        assert_same(together.of_member(state, number), one, rtol=1e-9, atol=1e-13)
    best = min(alone, key=lambda one: float(one.metadata["val_loss"]))
    assert_same(together.best(state), best, rtol=1e-9, atol=1e-13)


@pytest.mark.thorough
@pytest.mark.parametrize("episodes", [False, True])
def test_one_member_is_the_wrapped_optimizer(episodes, getkey):
    """In a run, with random batches, running state, episodes, and a learned start."""
    single = gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=2)
    alone = gradhpo.Population(single, 1)

    def loss(w, h, key, r):
        noise = jax.random.normal(key, w.shape, w.dtype)
        return jnp.sum(jnp.square(w - h["h"] + noise + r)), 0.9 * r + 0.1 * w

    val = lambda w, h, key, r: jnp.sum(jnp.square(w - 1.0 + r))
    given = jnp.ones(2), {"h": jnp.zeros(2), "start": jnp.ones(2)}
    more = {"model_state": jnp.zeros(2)}
    if not episodes:
        given = given[0], {"h": given[1]["h"]}
    same = alone.init(*given, spread=lambda key, h: h, **more), alone
    results = []
    for state, optimizer in (same, (single.init(*given, **more), single)):
        settings = {}
        if episodes:
            start = lambda key, h: h["start"] + 0.1 * jax.random.normal(key, (2,), jnp.float64)
            settings = {"steps_per_episode": 1, "start_fn": start, "key": jax.random.key(3)}
        keys = lambda i: jax.random.fold_in(jax.random.key(7), i)
        losses = gradhpo.LossFunctions(loss, val)
        results.append(
            gradhpo.run(
                optimizer, state, losses, keys, keys, num_steps=6, progress=False, **settings
            )
        )
    (found, history), (expected, of_one) = results
    assert relative_error(alone.of_member(found, 0), expected) < 1e-12
    for name in of_one:
        np.testing.assert_allclose(history[name][:, 0], of_one[name], rtol=1e-12, atol=1e-15)


def test_tasks_within_members(getkey):
    single = gradhpo.TaskBatched(PLAIN, 2)
    together = gradhpo.Population(single, 3, 2, mutation=MOVED)
    batch = jnp.arange(2.0)
    state = started(together, 3)
    assert state.params.shape == (3, 2, 3)
    first = [together.of_member(state, k) for k in range(3)]
    losses = (
        lambda w, h, x: jnp.sum(jnp.square(w - h + x)),
        lambda w, h, x: jnp.sum(jnp.square(w - x)) + jnp.sum(h),
    )
    state = together.step(state, batch, batch, *losses)
    for number, one in enumerate(first):
        expected = single.step(one, batch, batch, *losses)
        assert_same(together.of_member(state, number), expected, rtol=1e-12, atol=1e-14)
    state = together.step(state, batch, batch, *losses)
    parent = np.asarray(state.memory.parent)
    (worst,) = np.flatnonzero(parent != np.arange(3))
    assert_same(state.params[worst], state.params[parent[worst]])


# -- exploiting ------------------------------------------------------------------------------------


def test_the_running_mean_is_that_of_the_losses(getkey):
    losses = np.array(jax.random.normal(getkey(), (12, 3), jnp.float64))
    losses[4, 1] = np.nan
    mean, count = jnp.full(3, jnp.inf), jnp.zeros(3, jnp.int32)
    for number, row in enumerate(losses):
        mean, count = running_mean(mean, count, jnp.asarray(row), jnp.isfinite(jnp.asarray(row)))
        if number == 4:
            assert mean[1] == jnp.inf
    for member in range(3):
        counted = losses[5 if member == 1 else 0 :, member]
        weights = 0.9 ** np.arange(len(counted))[::-1]
        expected = np.sum(weights * counted) / np.sum(weights)
        np.testing.assert_allclose(mean[member], expected, rtol=1e-13)
        assert count[member] == len(counted)


def test_the_worst_copy_the_best():
    mean = jnp.asarray([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    chosen = [sources(jax.random.key(i), mean, 2) for i in range(30)]
    for parent in chosen:
        np.testing.assert_array_equal(parent[jnp.asarray([1, 2, 3, 4])], [1, 2, 3, 4])
    assert {int(x) for parent in chosen for x in parent[jnp.asarray([0, 5])]} == {1, 3}


@pytest.mark.parametrize(
    ("mean", "replaced", "copied"),
    [
        ([np.inf, np.inf, 2.0, np.inf, 1.0, np.nan], {0, 1, 3, 5}, {2, 4}),
        pytest.param(
            [np.inf, np.inf, np.inf, 2.0, np.inf, np.nan],
            {0, 1, 2, 4, 5},
            {3},
            marks=pytest.mark.thorough,
        ),
        pytest.param([np.inf, np.nan, np.inf], set(), set(), marks=pytest.mark.thorough),
    ],
)
def test_members_that_are_not_finite_are_replaced_however_many(mean, replaced, copied):
    for i in range(20):
        parent = np.asarray(sources(jax.random.key(i), jnp.asarray(mean), 2))
        assert set(np.flatnonzero(parent != np.arange(len(mean)))) == replaced
        assert set(parent[sorted(replaced)]) <= copied


def test_a_copy_has_everything_of_its_source_and_mutates():
    """Written out: one step of every member, then the exploit."""
    single = gradhpo.UnrolledOptimizer(INNER, relaxed(optax.adam(0.05)), unroll_steps=3)
    optimizer = gradhpo.Population(single, 4, exploit_every=3, fraction=0.5, mutation=MOVED)
    state = started(optimizer, key=jax.random.key(5))
    alone = [optimizer.of_member(state, number) for number in range(4)]
    means, weight = np.zeros(4), 0.0
    for step in range(1, 7):
        alone = [single.step(one, BATCH, BATCH, LOSSES) for one in alone]
        state = optimizer.step(state, BATCH, BATCH, LOSSES)
        losses = np.array([one.metadata["val_loss"] for one in alone])
        np.testing.assert_allclose(state.metadata["val_loss"], losses, rtol=1e-12)
        means, weight = means * 0.9 + losses, weight * 0.9 + 1
        if step % 3:
            np.testing.assert_array_equal(state.memory.parent, np.arange(4))
            continue
        order, parent = np.argsort(means), np.asarray(state.memory.parent)
        np.testing.assert_array_equal(parent[order[:2]], order[:2])
        assert set(parent[order[2:]]) <= set(order[:2])
        means = means[parent]
        np.testing.assert_allclose(state.memory.mean_val_loss, means / weight, rtol=1e-12)
        moved = np.abs(state.hyperparams - jnp.stack([alone[p].hyperparams for p in parent]))
        np.testing.assert_array_equal(np.all(moved > 1e-4, axis=1), parent != np.arange(4))
        assert moved.max() < 0.5
        for number, source in enumerate(parent):
            found = optimizer.of_member(state, number)
            for part in ("params", "inner_opt_state", "outer_opt_state"):
                expected = getattr(alone[source], part)
                assert_same(getattr(found, part), expected, rtol=1e-11, atol=1e-14)
        measured = np.where(parent == np.arange(4), losses, np.inf)
        assert_same(optimizer.best(state).params, state.params[np.argmin(measured)])
        alone = [optimizer.of_member(state, number) for number in range(4)]
    np.testing.assert_array_equal(state.memory.origin, state.memory.origin[parent])


def test_a_member_that_is_not_finite_holds_up_nobody(getkey):
    """Only its step is refused, and it is replaced at the next exploit."""
    bad = lambda w, h, batch: jnp.where(h[0] > 1.5, jnp.nan, 1.0) * train_loss(w, h, batch)
    losses = gradhpo.LossFunctions(bad, val_loss)
    optimizer = gradhpo.Population(PLAIN, 4, exploit_every=3, fraction=0.25, mutation=MOVED)
    state = started(optimizer)
    others = gradhpo.Population(PLAIN, 3)
    good = others.init(state.params[:3], state.hyperparams[:3])
    for step in range(1, 4):
        good = others.step(good, BATCH, BATCH, losses)
        state = optimizer.step(state, BATCH, BATCH, losses)
        np.testing.assert_array_equal(state.metadata["rejected"], [0, 0, 0, step])
        assert_same(state.hyperparams[:3], good.hyperparams, rtol=1e-12)
        if step < 3:
            assert state.hyperparams[3, 0] == 2.0
            assert state.memory.mean_val_loss[3] == np.inf
    assert state.memory.parent[3] != 3
    state = optimizer.step(state, BATCH, BATCH, losses)
    np.testing.assert_array_equal(state.metadata["rejected"], [0, 0, 0, 3])
    assert np.all(np.isfinite(state.memory.mean_val_loss))


def test_a_run_stops_when_all_members_are_refused(getkey):
    nan_if = lambda bad: jnp.where(bad, jnp.nan, 1.0)
    one = lambda w, h, batch: nan_if(h[0] > 1.5) * train_loss(w, h, batch)
    every = lambda w, h, batch: nan_if(jnp.sum(batch) > 2.5) * train_loss(w, h, batch)
    optimizer = gradhpo.Population(PLAIN, 4)
    run = lambda loss, data: gradhpo.run(
        optimizer, started(optimizer), gradhpo.LossFunctions(loss, val_loss), data, BATCH,
        num_steps=30, chunk_size=4, max_rejections=3, progress=False,
    )  # fmt: skip
    state, history = run(one, BATCH)
    assert history.stop_reason == "num_steps"
    assert state.metadata["rejected"][3] == 30
    count = lambda i: jnp.full(2, i / 6, jnp.float64)
    with pytest.warns(RuntimeWarning, match="consecutive steps"):
        state, history = run(every, count)
    assert history.stop_reason == "rejected"
    assert history["rejected"].shape == (len(history["val_loss"]), 4)
    assert state.metadata["rejected"].tolist() == [6, 6, 6, 6]  # to the end of the chunk


@pytest.mark.thorough
def test_a_copy_restarts_where_its_source_began():
    """Reptile moves part of the way back to the start of the copied member."""
    optimizer = gradhpo.Population(PLAIN, 4, exploit_every=2, mutation=lambda key, h: h)
    state = started(optimizer)
    params = jnp.arange(12.0).reshape(4, 3)
    state = start = state.update(params=params)
    for _ in range(2):
        state = optimizer.step(state, BATCH, BATCH, LOSSES)
    parent = np.asarray(state.memory.parent)
    assert np.any(parent != np.arange(4))
    again = optimizer.restart(state, start, reptile_rate=0.25)
    expected = 0.75 * params[parent] + 0.25 * state.params
    np.testing.assert_allclose(again.params, expected, rtol=1e-12)
    np.testing.assert_array_equal(again.memory.origin, np.arange(4))
    ran, _ = trained(optimizer, start, 2, steps_per_episode=2, reptile_rate=0.25)
    assert_same(ran.params, again.params, rtol=1e-12)


# -- mutations -------------------------------------------------------------------------------------


def test_factors_are_drawn_for_every_entry(getkey):
    hyperparams = {"a": jnp.ones((50, 4)), "b": jnp.asarray(2.0), "c": jnp.ones(3, jnp.float32)}
    mutation = gradhpo.RandomMutation((0.5, 1.0, 3.0))
    new = mutation.mutate((), getkey(), hyperparams)
    assert set(np.unique(new["a"])) == {0.5, 1.0, 3.0}
    assert float(new["b"]) in (1.0, 2.0, 6.0)
    assert new["c"].dtype == jnp.float32
    assert set(np.unique(gradhpo.RandomMutation().mutate((), getkey(), jnp.ones(99)))) == {0.8, 1.2}


def test_noise_has_the_scale(getkey):
    mutation = gradhpo.RandomMutation(scale=0.3)
    noise = mutation.mutate((), getkey(), jnp.full(4000, 5.0)) - 5.0
    np.testing.assert_allclose([np.mean(noise), np.std(noise)], [0, 0.3], atol=0.02)  # 4 sigma


def test_entries_are_drawn_anew_with_the_probability(getkey):
    sampler = lambda key, h: jax.random.uniform(key, h.shape, h.dtype)
    for probability in (0.0, 0.3, 1.0):
        mutation = gradhpo.ResampleMutation(sampler, probability)
        drawn = mutation.mutate((), getkey(), jnp.full(4000, -1.0)) >= 0
        assert abs(float(np.mean(drawn)) - probability) < 0.03  # 4 sigma of 4,000 draws


@pytest.mark.parametrize("kind", quick(["multiplicative", "additive"], keep=["additive"]))
def test_the_teacher_is_that_of_the_paper(kind, getkey):
    """Written out; members whose hypergradient is not finite are left out."""
    mutation = gradhpo.LearnedMutation(units=4, kind=kind, scale=0.7)
    hyperparams = {"a": jax.random.normal(getkey(), (5, 2)), "b": jax.random.normal(getkey(), (5,))}
    draw = lambda: jax.random.normal(getkey(), (3, 4), jnp.float64)
    memory = mutation.init(getkey(), {"a": hyperparams["a"][0], "b": hyperparams["b"][0]})
    assert not np.any(memory.teacher.W)
    teacher = memory.teacher._replace(W=draw(), V=draw())
    g = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape, x.dtype), hyperparams)
    g["b"] = g["b"].at[2].set(jnp.nan)
    rows = lambda tree: np.concatenate([tree["a"], tree["b"][:, None]], axis=1)
    g_rows, h_rows = rows(g), rows(hyperparams)
    W, V = np.asarray(teacher.W), np.asarray(teacher.V)
    dW, dV = np.zeros_like(W), np.zeros_like(V)
    for k in range(5):
        logits = V.T @ h_rows[k]
        p = np.exp(logits) / np.sum(np.exp(logits))
        tanh = np.tanh(W @ p)
        factor = h_rows[k] if kind == "multiplicative" else 0.7
        moved = (1 + tanh) * h_rows[k] if kind == "multiplicative" else h_rows[k] + 0.7 * tanh
        row = {"a": hyperparams["a"][k], "b": hyperparams["b"][k]}
        found = mutation.mutate(eqx.tree_at(lambda m: m.teacher, memory, teacher), getkey(), row)
        np.testing.assert_allclose(rows(jax.tree.map(lambda x: x[None], found))[0], moved, 1e-13)
        if k == 2:
            continue
        bar = g_rows[k] * factor * (1 - tanh**2)  # of W p
        dW += np.outer(bar, p)
        p_bar = W.T @ bar
        dV += np.outer(h_rows[k], p * (p_bar - p @ p_bar))
    gradient = mutation.teacher_gradient(teacher, g, hyperparams)
    np.testing.assert_allclose(gradient.W, dW, rtol=1e-10)
    np.testing.assert_allclose(gradient.V, dV, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", quick(["multiplicative", "additive"], keep=[]))
def test_the_teacher_descends_the_validation_losses_of_all_members(kind, getkey):
    """At W = 0 its gradient equals that of full training at the mutated hyperparameters."""
    problem, inner = make("dicts", "momentum", getkey())
    single = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=3)
    mutation = gradhpo.LearnedMutation(kind=kind, optimizer=relaxed(optax.adam(0.1)))
    optimizer = gradhpo.Population(single, 3, mutation=mutation)
    spread = lambda key, h: MOVED(key, h)
    state = optimizer.init(problem.params, problem.hyperparams, spread=spread)
    teacher = state.memory.mutation.teacher
    given = problem.train_batch, problem.val_batch, problem.train_loss, problem.val_loss

    def total(teacher):
        memory = eqx.tree_at(lambda m: m.teacher, state.memory.mutation, teacher)
        loss = 0.0
        for number in range(3):
            one = optimizer.of_member(state, number)
            new = mutation.mutate(memory, getkey(), one.hyperparams)
            w, s = one.params, one.inner_opt_state
            for _ in range(3):
                g = jax.grad(problem.train_loss)(w, new, problem.train_batch)
                updates, s = inner.update(g, s, w)
                w = optax.apply_updates(w, updates)
            loss += problem.val_loss(w, new, problem.val_batch)
        return loss

    expected = jax.grad(total)(teacher)
    hypergradients = optimizer.compute_hypergradient(state, *given)
    found = mutation.teacher_gradient(teacher, hypergradients, state.hyperparams)
    np.testing.assert_allclose(found.W, expected.W, rtol=1e-10, atol=1e-15)
    np.testing.assert_array_equal(found.V, expected.V)  # 0, because W is
    # And a step of the population is a step of the teacher's optimizer.
    updates, _ = mutation.optimizer.update(found, state.memory.mutation.teacher_opt_state, teacher)
    new = optimizer.step(state, *given)
    expected = optax.apply_updates(teacher, updates)
    assert_same(new.memory.mutation.teacher, expected, rtol=1e-9, atol=1e-12)


# -- runs ------------------------------------------------------------------------------------------

LEARNED = gradhpo.Population(
    PLAIN,
    4,
    exploit_every=3,
    mutation=gradhpo.LearnedMutation(kind="additive", optimizer=relaxed(optax.adam(0.1))),
)


def test_a_run_is_a_loop_over_step_and_compiles_once(tmp_path):
    state = started(LEARNED)
    seen, files = [], [tmp_path / "log.jsonl", tmp_path / "log.csv"]
    callbacks = [
        lambda state, metrics: seen.append(metrics),
        gradhpo.JSONLinesLogger(files[0]),
        gradhpo.CSVLogger(files[1]),
        best := gradhpo.BestState(),
        gradhpo.Monitor({"best": lambda state: LEARNED.best(state).metadata["val_loss"]}),
    ]
    record = lambda state: {"spread": jnp.std(state.hyperparams, axis=0)}
    found, history = trained(LEARNED, state, 8, chunk_size=4, callbacks=callbacks, record=record)
    rows, before = [], num_traces()
    for _ in range(8):
        state = LEARNED.step(state, BATCH, BATCH, LOSSES)
        rows.append(state)
    assert num_traces() - before <= 1
    assert_same(found, state, rtol=1e-12, atol=1e-15)
    for name in ("train_loss", "val_loss", "hypergrad_norm", "rejected"):
        expected = np.stack([row.metadata[name] for row in rows])
        np.testing.assert_allclose(history[name], expected, rtol=1e-12)
        together = np.concatenate([metrics[f"members.{name}"] for metrics in seen])
        np.testing.assert_array_equal(together, history[name])
        lowest = np.concatenate([metrics[name] for metrics in seen])
        np.testing.assert_array_equal(lowest, np.min(history[name], axis=1))
    np.testing.assert_array_equal(history["parent"], [row.memory.parent for row in rows])
    assert np.flatnonzero(np.any(history["parent"] != np.arange(4), axis=1)).tolist() == [2, 5]
    assert history["spread"].shape == (8, 3)
    np.testing.assert_array_equal(seen[0]["spread"], history["spread"][:4])
    np.testing.assert_allclose(history["best"][[3, 7]], np.min(history["val_loss"], 1)[[3, 7]])
    assert best.value == min(np.min(history["val_loss"], axis=1)[[3, 7]])
    last = json.loads(files[0].read_text().splitlines()[-1])
    assert [last[f"members.val_loss.{k}"] for k in range(4)] == history["val_loss"][-1].tolist()
    assert last["val_loss"] == min(history["val_loss"][-1])
    assert "members.val_loss.3" in files[1].read_text().splitlines()[0]
    assert str(state).count("f64[4]") or "val_loss=[" in str(state)


def test_scalar_hyperparameters_of_members_are_recorded():
    loss = lambda w, h, batch: jnp.sum(jnp.square(w - h["rate"]))
    optimizer = gradhpo.Population(PLAIN, 3)
    state = optimizer.init(jnp.ones((3, 2)), {"rate": jnp.arange(3.0)})
    seen = []
    state, history = gradhpo.run(
        optimizer, state, gradhpo.LossFunctions(loss, loss), None, None, num_steps=2,
        callbacks=[lambda state, metrics: seen.append(metrics)], progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(history["hyperparams.rate"][-1], state.hyperparams["rate"])
    assert seen[0]["members.hyperparams.rate"].shape == (2, 3)


def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path):
    settings = {"chunk_size": 2}
    whole, history = trained(LEARNED, started(LEARNED), 8, **settings)
    kept = gradhpo.Checkpoint(tmp_path, every_steps=2)
    stop = lambda state, metrics: bool(state.step == 4)
    trained(LEARNED, started(LEARNED), 8, callbacks=[stop], checkpoint=kept, **settings)
    resumed, again = trained(LEARNED, started(LEARNED), 8, checkpoint=kept, **settings)
    assert_same(resumed, whole)
    for name in history:
        np.testing.assert_array_equal(again[name], history[name])
        assert again[name].dtype == history[name].dtype


def test_the_report_speaks_of_the_lowest():
    optimizer = gradhpo.Population(gradhpo.FixedOptimizer(relaxed(optax.sgd(-0.5))), 2)
    state = started(optimizer, 2).update(params=jnp.asarray([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    _, history = trained(optimizer, state, 20)
    assert f"parameters grew from {np.sqrt(14):.3g}" in history.report


def test_pictures(tmp_path):
    _, history = trained(LEARNED, started(LEARNED), 9)
    axes = history.plot("val_loss")
    assert len(axes.lines) == 5  # four members, and the lowest
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["val_loss, lowest"]
    tree = LEARNED.plot_family(history)
    assert len(tree.lines) == 5
    assert len(tree.texts) == np.sum(history["parent"] != np.arange(4)) == 3
    with pytest.raises(ValueError, match="exploit_every"):
        LEARNED.plot_family({"val_loss": history["val_loss"]})


def test_a_lineage_follows_its_parents():
    parent = np.array([[0, 1, 2], [0, 0, 2], [0, 1, 1], [0, 1, 2]])
    loss = np.array([[1.0, 2, 3], [1, 2, 3], [3, 2, 9], [3, 2, 1]])
    best = lowest_at_the_end(parent, loss)
    np.testing.assert_array_equal(lineage(parent, best), [0, 0, 1, 2])
    # In step 3 member 2 became a copy of 1, which had become one of 0 in step 2.


# -- other features --------------------------------------------------------------------------------


@pytest.mark.thorough
def test_diagnostics_take_populations():
    exact = gradhpo.Population(PLAIN, 3)
    state = started(exact, 3)
    cheap = gradhpo.Population(gradhpo.OneStepOptimizer(PLAIN.inner_optimizer, OUTER), 3)
    stack = gradhpo.BatchStack(jnp.zeros((3, 2)))
    report = gradhpo.compare_hypergradients(
        {"exact": exact, "cheap": cheap}, state, stack, BATCH, LOSSES
    )
    np.testing.assert_allclose(report.relative_error["exact"], 0, atol=1e-12)
    assert report.cosine["cheap"] < 1
    assert not report.remarks
    expected = gradhpo.finite_difference_hypergradient(exact, state, stack, BATCH, LOSSES)
    found = exact.compute_hypergradient(state, stack, BATCH, LOSSES)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    plan = gradhpo.plan({"exact": exact}, state, BATCH, BATCH, LOSSES)
    assert "exact" in str(plan)
    adopted = cheap.adopt(exact.step(state, BATCH, BATCH, LOSSES))
    cheap.step(adopted, BATCH, BATCH, LOSSES)


@pytest.mark.thorough
@pytest.mark.usefixtures("as_a_user_has_it")
def test_eight_members_cost_eight_times_as_much():
    """Flops of a step at a batch of 32, exploiting with a teacher included."""
    net = eqx.nn.MLP(16, 1, 64, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    decay = jnp.full(3, -4.0)

    def loss(params, decay, batch):
        net = eqx.combine(params, static)
        weights = [jnp.sum(jnp.square(layer.weight)) for layer in net.layers]
        error = jnp.mean(jnp.square(jax.vmap(net)(batch)))
        return error + jnp.sum(jnp.exp(decay) * jnp.stack(weights))

    val = lambda params, decay, batch: jnp.mean(
        jnp.square(jax.vmap(eqx.combine(params, static))(batch) - 1)
    )
    batch = jnp.ones((32, 16))
    single = gradhpo.UnrolledOptimizer(optax.adam(1e-2), optax.adam(1e-2), unroll_steps=4)
    together = gradhpo.Population(single, 8, 10, mutation=gradhpo.LearnedMutation())
    spread = lambda key, h: h + jax.random.normal(key, h.shape)
    states = single.init(params, decay), together.init(params, decay, spread=spread)
    given = batch, batch, loss, val
    step = lambda optimizer, state: optimizer._advance(inputs_of(state, *given), None)[0]
    flops = [
        Program(step, optimizer, state).flops_with_loops_once
        for optimizer, state in zip((single, together), states, strict=True)
    ]
    assert flops[1] <= 8.3 * flops[0]


def test_frozen_leaves_are_shared():
    weights = {"w": jnp.ones(3), "backbone": gradhpo.frozen(jnp.ones(1000))}
    loss = lambda p, h, batch: jnp.sum(jnp.square(p["w"] - h)) * jnp.mean(p["backbone"])
    optimizer = gradhpo.Population(PLAIN, 5, exploit_every=1)
    state = optimizer.init(weights, jnp.zeros(3), spread=MOVED)
    state = optimizer.step(state, None, None, loss, loss)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 1000 + 5 * 3
    assert gradhpo.unfrozen(optimizer.best(state).params)["backbone"].shape == (1000,)


MISUSE = {
    "no members": (lambda: gradhpo.Population(PLAIN, 0), "num_members must be at least 1"),
    "nested": (lambda: gradhpo.Population(gradhpo.Population(PLAIN, 2), 2), "one member axis"),
    "in tasks": (
        lambda: gradhpo.TaskBatched(gradhpo.Population(PLAIN, 2), 2),
        r"Population\(TaskBatched\(optimizer, num_tasks\), num_members\)",
    ),
    "fraction": (lambda: gradhpo.Population(PLAIN, 4, 2, fraction=0.6), r"in \(0, 0.5\]"),
    "alone": (lambda: gradhpo.Population(PLAIN, 1, 2), "two members or more"),
    "never": (lambda: gradhpo.Population(PLAIN, 2, 0), "exploit_every must be at least 1"),
    "no mutation": (
        lambda: gradhpo.Population(PLAIN, 2, mutation=gradhpo.RandomMutation),
        r"write mutation=RandomMutation\(\.\.\.\)",
    ),
    "nothing to learn from": (
        lambda: gradhpo.Population(
            gradhpo.FixedOptimizer(PLAIN.inner_optimizer), 2, mutation=gradhpo.LearnedMutation()
        ),
        "FixedOptimizer computes none",
    ),
    "no axis": (
        lambda: gradhpo.Population(PLAIN, 2).init(jnp.ones((2, 3)), jnp.ones(3)),
        r"hyperparams has shape \(3,\).*needs the members first, \[2, \.\.\.\].*spread=",
    ),
    "another shape": (
        lambda: gradhpo.Population(PLAIN, 2).init(
            jnp.ones(3), jnp.ones(3), spread=lambda key, h: h[:2]
        ),
        "spread",
    ),
    "another number": (
        lambda: gradhpo.Population(PLAIN, 3).step(
            started(gradhpo.Population(PLAIN, 2), 2), BATCH, BATCH, LOSSES
        ),
        "for 2 members, and Population has num_members=3",
    ),
    "one state": (
        lambda: gradhpo.Population(PLAIN, 2).adopt(PLAIN.init(jnp.ones(2), jnp.ones(2))),
        "without a member axis",
    ),
    "several states": (
        lambda: PLAIN.adopt(started(gradhpo.Population(PLAIN, 2), 2)),
        "several inner problems",
    ),
    "before the first step": (
        lambda: gradhpo.Population(PLAIN, 2).best(started(gradhpo.Population(PLAIN, 2), 2)),
        "take a step first",
    ),
    "another member": (
        lambda: gradhpo.Population(PLAIN, 2).of_member(started(gradhpo.Population(PLAIN, 2), 2), 2),
        "numbered from 0 to 1",
    ),
    "mutation of another shape": (
        lambda: gradhpo.Population(PLAIN, 2, 1, mutation=lambda key, h: h[:1]).step(
            started(gradhpo.Population(PLAIN, 2), 2), BATCH, BATCH, LOSSES
        ),
        r"mutation\(key, hyperparams\)",
    ),
    "no factors": (lambda: gradhpo.RandomMutation(()), "nothing to draw from"),
    "no noise": (lambda: gradhpo.RandomMutation(scale=0.0), "scale must be positive"),
    "no probability": (
        lambda: gradhpo.ResampleMutation(lambda key, h: h, 1.5),
        r"probability must be in \[0, 1\]",
    ),
    "no units": (lambda: gradhpo.LearnedMutation(units=0), "units must be at least 1"),
}


@pytest.mark.parametrize("name", list(MISUSE))
def test_misuse_is_explained(name):
    misuse, said = MISUSE[name]
    with pytest.raises((ValueError, TypeError), match=said):
        misuse()
