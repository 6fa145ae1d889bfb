"""The contract of every optimizer. A new algorithm adds one line to OPTIMIZERS."""

import dataclasses
import functools
import io
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import OUTER, PROBLEMS, make, relaxed, stack_of

import gradhpo
from gradhpo.core.types import METRICS


def two_tasks(*arguments, **settings):
    return gradhpo.TaskBatched(gradhpo.GreedyOptimizer(*arguments, **settings), num_tasks=2)


# Created once: tests of the same optimizer share its compiled `step`.
PLAIN = relaxed(optax.sgd(0.1))
ADAM = relaxed(optax.adam(0.1, eps_root=1e-8))


def one_member(*arguments, **settings):
    return gradhpo.Population(gradhpo.GreedyOptimizer(*arguments, **settings), num_members=1)


# name: (class, settings, a numeric setting with an alternative value)
OPTIMIZERS = {
    "first order": (gradhpo.FOOptimizer, {}, None),
    "one step": (gradhpo.OneStepOptimizer, {}, None),
    "T1-T2": (gradhpo.T1T2Optimizer, {"inner_steps": 2}, ("epsilon", 0.02)),
    "T1-T2 by hyperparams": (
        gradhpo.T1T2Optimizer,
        {"perturb": "hyperparams", "epsilon": 1e-4},
        ("epsilon", 2e-4),
    ),
    "greedy": (gradhpo.GreedyOptimizer, {"unroll_steps": 4}, ("gamma", 0.5)),
    "HyperDistill": (gradhpo.OnlineHypergradientOptimizer, {}, ("distillation_weight", 0.5)),
    "DrMAD": (gradhpo.DrMADOptimizer, {"unroll_steps": 4}, None),
    "tasks": (two_tasks, {"unroll_steps": 4}, None),
    "forward mode": (gradhpo.ForwardModeOptimizer, {"unroll_steps": 4}, None),
    "forward gradient": (
        gradhpo.ForwardGradientOptimizer,
        {"unroll_steps": 4, "num_directions": 4},
        None,
    ),
    "NRES": (
        gradhpo.EvolutionOptimizer,
        {"unroll_steps": 4, "num_directions": 8},
        ("sigma", 0.02),
    ),
    "PES": (
        gradhpo.EvolutionOptimizer,
        {"unroll_steps": 4, "num_directions": 8, "noise": "window"},
        ("sigma", 0.02),
    ),
    # A direct solver: an iterative one's error, within its tolerance, varies between programs by
    # more than the 1e-12 used here.
    "implicit": (
        gradhpo.ImplicitOptimizer,
        {"inner_steps": 4, "linear_solver": lx.LU()},
        ("damping", 0.5),
    ),
    "SOBA": (gradhpo.SOBAOptimizer, {"adjoint_optimizer": PLAIN}, None),
    "AmIGO": (
        gradhpo.SOBAOptimizer,
        {"inner_steps": 4, "adjoint_steps": 3, "adjoint_optimizer": PLAIN},
        None,
    ),
    "penalty": (gradhpo.PenaltyOptimizer, {"inner_steps": 4}, ("penalty", 20.0)),
    "BOME": (gradhpo.BOMEOptimizer, {"inner_steps": 4}, ("control", 0.8)),
    # Training here has no noise and a Hessian of 1, so the damping stands in for it.
    "natural": (gradhpo.NHGDOptimizer, {"inner_steps": 4, "damping": 1.0}, ("damping", 0.5)),
    "natural, Kronecker": (
        gradhpo.NHGDOptimizer,
        {"inner_steps": 4, "damping": 1.0, "structure": "kronecker", "factor_every": 2},
        ("damping", 0.5),
    ),
    "functional": (
        gradhpo.FunctionalOptimizer,
        {"inner_steps": 4, "adjoint_steps": 3, "adjoint_optimizer": PLAIN, "adjoint": np.zeros(3)},
        ("ridge", 0.5),
    ),
    "functional, closed": (
        gradhpo.FunctionalOptimizer,
        {"inner_steps": 4, "closed_form": True, "adjoint": np.zeros(3)},
        ("ridge", 0.5),
    ),
    "unrolled": (gradhpo.UnrolledOptimizer, {"unroll_steps": 4}, None),
    "truncated": (gradhpo.UnrolledOptimizer, {"unroll_steps": 4, "truncation": 2}, None),
    "checkpointed": (gradhpo.UnrolledOptimizer, {"unroll_steps": 4, "checkpoints": "sqrt"}, None),
    "bisected": (gradhpo.UnrolledOptimizer, {"unroll_steps": 4, "checkpoints": "log"}, None),
}
# Members are in test_population.py, each compared with its own run.
EVERY = OPTIMIZERS | {"population": (one_member, {"unroll_steps": 4}, None)}
# These see settings of the inner optimizer only if the validation loss contains them too.
FUNCTIONAL = {"functional", "functional, closed"}
NATURAL = {"natural", "natural, Kronecker"}
SEES_NO_OPTIMIZER = {"first order", "implicit", "SOBA", "AmIGO", "penalty", "BOME"}
SEES_NO_OPTIMIZER |= FUNCTIONAL | NATURAL
# For tests whose losses are not written in two parts.
OF_ANY_LOSS = {name: made for name, made in OPTIMIZERS.items() if name not in FUNCTIONAL}

# The others run only with `thorough`: variants of one of these, and those with separate test files.
SINGLE_LOOPS = {"SOBA", "AmIGO", "penalty", "BOME"}
DRAW = {"forward gradient", "NRES", "PES"}
THOROUGHLY = {"T1-T2 by hyperparams", "truncated", "checkpointed", "bisected", "population"}
THOROUGHLY |= NATURAL | SINGLE_LOOPS | DRAW | FUNCTIONAL
THOROUGHLY |= {"first order", "T1-T2", "greedy", "DrMAD"}  # "tasks" are of greedy ones
QUICKLY = [name for name in OPTIMIZERS if name not in THOROUGHLY]

every = pytest.mark.parametrize("name", quick(list(EVERY), keep=QUICKLY))


def build(name, inner_optimizer=PLAIN, outer_optimizer=OUTER, params=None):
    cls, settings, _ = EVERY[name]
    if name in FUNCTIONAL and params is not None:
        settings = settings | {"adjoint": params}
    return cls(inner_optimizer, outer_optimizer, **settings)


def kept_steps(name, optimizer):
    """Inner steps that a `step` keeps: BOME discards its trial and keeps one."""
    return 1 if name == "BOME" else optimizer.num_inner_steps


# Functional methods accept only losses of the prediction; to all others these are ordinary losses.
of_prediction = functools.partial(gradhpo.PredictionLoss, lambda w, h, batch: w)


# A validation loss with a direct term, so that first order has something to follow.
@of_prediction
def train_loss(w, h, batch):
    return jnp.sum(jnp.square(w - h + 0 * jnp.sum(batch))) / 2


@of_prediction
def val_loss(w, h, batch):
    nothing = 0 * jnp.sum(batch)
    return jnp.sum(jnp.square(w - 1 + nothing) + jnp.square(h - 1 + nothing)) / 2


def start(optimizer, dtype=jnp.float64, hyperparams=None):
    # Some optimizers need an example batch and a key; the others ignore both.
    examples = {} if isinstance(optimizer, gradhpo.TaskBatched) else {"batch": jnp.zeros(2, dtype)}
    key = {"key": jax.random.key(0)} if examples else {}
    hyperparams = jnp.full(3, -1.0, dtype) if hyperparams is None else hyperparams
    if isinstance(optimizer, gradhpo.Population):
        examples["spread"] = lambda key, hyperparams: hyperparams
    return optimizer.init(jnp.zeros(3, dtype), hyperparams, **examples, **key)


def arrays_of(tree):
    return eqx.filter(tree, eqx.is_array)


def described(tree):
    arrays = arrays_of(tree)
    return jax.tree.structure(arrays), [jax.typeof(x) for x in jax.tree.leaves(arrays)]


@every
def test_converges_on_a_quadratic(name):
    optimizer = build(name)
    state = start(optimizer)
    batch = jnp.zeros(2)
    for k in range(300):
        if name == "PES" and k % 10 == 0:  # its variance grows until an episode ends
            state = optimizer.restart(state, state.params)
        state = optimizer.step(state, batch, batch, train_loss, val_loss)
    np.testing.assert_allclose(state.hyperparams, np.ones(state.hyperparams.shape), atol=1e-2)
    np.testing.assert_allclose(state.params, np.ones(state.params.shape), atol=1e-2)
    assert state.step == 300
    assert state.metadata["rejected"] == 0


@every
@pytest.mark.parametrize(
    "inner", [pytest.param(PLAIN, marks=pytest.mark.thorough), ADAM], ids=["sgd", "adam"]
)
def test_states_are_serialised_by_equinox(name, inner):
    """By default, every leaf can be written. Bit for bit, and the next step is the same."""
    optimizer, batch = build(name, inner), jnp.zeros(2)
    state = start(optimizer)
    step = lambda state: optimizer.step(state, batch, batch, train_loss, val_loss)
    state = step(step(state))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    again = eqx.tree_deserialise_leaves(file, start(optimizer))
    assert_same(again, state)
    assert_same(step(again), step(state))


# Tasks are in test_tasks.py, each compared with its own run.
@pytest.mark.parametrize(
    ("problem_name", "optimizer_name", "name"),
    quick(
        [
            (*problem, name)
            for problem in [("optimizer", "adam"), ("dicts", "momentum")]
            for name in OPTIMIZERS
            if name != "tasks"
        ],
        keep=[("dicts", "momentum", name) for name in QUICKLY if name != "tasks"]
        + [("optimizer", "adam", "unrolled")],
    ),
)
def test_filtered_models_dicts_and_stateful_optimizers(name, problem_name, optimizer_name, getkey):
    """Runs; advances optimizer state; step follows compute_hypergradient from the first step."""
    problem, inner = make(problem_name, optimizer_name, getkey())
    if name in SEES_NO_OPTIMIZER:
        direct = lambda h: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(h))
        only_weights = problem.val_loss
        val_loss = lambda p, h, batch: only_weights(p, h, batch) + direct(h)
        problem = problem._replace(val_loss=val_loss)
    of_these = {x: of_prediction(getattr(problem, x)) for x in ("train_loss", "val_loss")}
    problem = problem._replace(**of_these)
    optimizer = build(name, inner, relaxed(optax.sgd(0.1)), problem.params)
    state = optimizer.init(problem.params, problem.hyperparams)
    stack = stack_of(problem, optimizer.num_inner_steps, getkey())
    arguments = (stack, problem.val_batch, problem.train_loss, problem.val_loss)
    for step in range(1, 3):
        before, g = state, optimizer.compute_hypergradient(state, *arguments)
        state = optimizer.step(state, *arguments)
        followed = jax.tree.map(lambda h, g: h - 0.1 * g, before.hyperparams, g)
        assert_same(state.hyperparams, followed, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            state.metadata["hypergrad_norm"], gradhpo.tree_l2_norm(g), rtol=1e-12
        )
        counts = [
            x
            for x in jax.tree.leaves(state.inner_opt_state)
            if jnp.issubdtype(x.dtype, jnp.integer)
        ]
        assert all(count == step * kept_steps(name, optimizer) for count in counts)
        assert len(counts) == (optimizer_name == "adam")
        moments = eqx.filter(state.inner_opt_state, eqx.is_inexact_array)
        assert gradhpo.tree_l2_norm(moments) > 0
    assert described(state) == described(before)
    assert all(np.isfinite(state.metadata[metric]) for metric in METRICS)
    # The metrics describe the state: norms after the step, train loss before its update.
    np.testing.assert_allclose(
        state.metadata["hyperparam_norm"], gradhpo.tree_l2_norm(state.hyperparams), rtol=1e-12
    )
    np.testing.assert_allclose(
        state.metadata["param_norm"], gradhpo.tree_l2_norm(state.params), rtol=1e-12
    )
    np.testing.assert_allclose(
        state.metadata["val_loss"],
        problem.val_loss(state.params, before.hyperparams, problem.val_batch),
        rtol=1e-12,
    )


# One loss for the tests that count traces and the test of the rate: they share its programs.
TRACES: list[int] = []


@of_prediction
def counted(w, h, batch):
    TRACES.append(1)
    return train_loss(w, h, batch)


@every
def test_traces_once(name):
    """Over 100 steps with new batches, states, step counts, rates and settings."""
    optimizer = build(name, outer_optimizer=None)
    state = start(optimizer)
    state = optimizer.step(state, jnp.zeros(2), 0.0, counted, val_loss, lr_hyper=0.1)
    first = len(TRACES)
    _, _, setting = EVERY[name]
    rates = (0.1, np.float32(0.2), jnp.asarray(0.3), 1)
    for i in range(100):
        if setting and i == 50:
            optimizer = dataclasses.replace(optimizer, **{setting[0]: setting[1]})
        batch, rate = jnp.asarray(np.full(2, float(i))), rates[i % 4]
        state = optimizer.step(state, batch, float(i), counted, val_loss, lr_hyper=rate)
    assert state.step == 101
    assert len(TRACES) == first


@every
@pytest.mark.parametrize(
    "dtype", quick([jnp.float64, jnp.float32, jnp.bfloat16], keep=[jnp.bfloat16])
)
def test_structure_shapes_and_dtypes_never_change(name, dtype):
    optimizer = build(name, ADAM)
    state = start(optimizer, dtype)
    expected = described(state)
    for _ in range(2):
        state = optimizer.step(
            state, jnp.zeros(2, dtype), jnp.zeros(2, dtype), train_loss, val_loss
        )
        assert described(state) == expected
    metric_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert all(state.metadata[metric].dtype == metric_dtype for metric in METRICS)
    assert state.step.dtype == jnp.int32


@every
def test_a_nan_batch_costs_a_step_and_nothing_else(name):
    optimizer = build(name, ADAM)
    good, bad = jnp.zeros(2), jnp.full(2, jnp.nan)
    state = optimizer.step(start(optimizer), good, good, train_loss, val_loss)
    for batches in ((bad, good), (good, bad)):
        after = optimizer.step(state, *batches, train_loss, val_loss)
        kept = ("params", "hyperparams", "inner_opt_state", "outer_opt_state")
        assert_same([getattr(after, k) for k in kept], [getattr(state, k) for k in kept])
        assert after.step == state.step + 1
        assert after.metadata["rejected"] == state.metadata["rejected"] + 1
        state = after
    recovered = optimizer.step(state, good, good, train_loss, val_loss)
    assert recovered.metadata["rejected"] == 2
    assert np.isfinite(recovered.metadata["val_loss"])
    assert not np.array_equal(recovered.params, state.params)


def test_a_hypergradient_that_is_infinite_is_refused_though_clipping_hides_it():
    """The square root of 0 in the validation loss: nothing else in the step is infinite."""
    optimizer = gradhpo.OneStepOptimizer(PLAIN, optax.chain(optax.clip(1.0), optax.sgd(0.1)))
    state = start(optimizer, hyperparams=jnp.zeros(3))
    rooted = lambda w, h, batch: jnp.sum(jnp.square(w - 1)) + jnp.sum(jnp.sqrt(h))
    after = optimizer.step(state, jnp.zeros(2), None, train_loss, rooted)
    assert after.metadata["rejected"] == 1
    assert np.isfinite(after.metadata["val_loss"])
    assert after.metadata["hypergrad_norm"] == np.inf
    kept = ("params", "hyperparams", "inner_opt_state", "outer_opt_state")
    assert_same([getattr(after, k) for k in kept], [getattr(state, k) for k in kept])


@every
def test_jit_vmap_and_scan(name):
    optimizer = build(name)
    batch = jnp.zeros(2)
    state = start(optimizer)
    once = optimizer.step(state, batch, batch, train_loss, val_loss)
    twice = optimizer.step(once, batch, batch, train_loss, val_loss)

    step = lambda state: optimizer.step(state, batch, batch, train_loss, val_loss)
    assert_same(eqx.filter_jit(step)(state), once, rtol=1e-13, atol=1e-15)

    states = eqx.filter_vmap(lambda h: start(optimizer, hyperparams=h))(
        jnp.stack([jnp.full(3, -1.0), jnp.zeros(3)])
    )
    after = eqx.filter_vmap(step)(states)
    first = jax.tree.map(lambda x: x[0], arrays_of(after))
    assert_same(first, once, rtol=1e-13, atol=1e-15)

    arrays, static = eqx.partition(state, eqx.is_array)
    body = lambda arrays, _: (arrays_of(step(eqx.combine(arrays, static))), None)
    scanned, _ = jax.lax.scan(body, arrays, None, length=2)
    assert_same(scanned, twice, rtol=1e-13, atol=1e-15)


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_population_of_one_is_the_optimizer_itself(name):
    """Memory, random draws and refusals included."""
    optimizer = build(name, ADAM)
    together = gradhpo.Population(optimizer, 1)
    alone = begun = start(optimizer)
    # The same arguments as for the optimizer itself, of which tasks take none.
    examples = {} if name == "tasks" else {"batch": jnp.zeros(2), "key": jax.random.key(0)}
    spread = lambda key, hyperparams: hyperparams
    state = together.init(jnp.zeros(3), jnp.full(3, -1.0), spread=spread, **examples)
    losses = train_loss, val_loss
    for number in (0.0, 1.0, jnp.nan, 2.0):
        batch = jnp.full(2, number)
        expected = optimizer.compute_hypergradient(alone, batch, batch, *losses)
        found = together.compute_hypergradient(state, batch, batch, *losses)
        # Rounding: another program.
        assert_same(jax.tree.map(lambda x: x[0], found), expected, rtol=1e-12, atol=1e-15)
        alone = optimizer.step(alone, batch, batch, *losses)
        state = together.step(state, batch, batch, *losses)
        assert_same(together.of_member(state, 0), alone, rtol=1e-12, atol=1e-15)
    assert alone.metadata["rejected"] == 1
    assert not np.allclose(alone.hyperparams, begun.hyperparams)


WITH_SETTING = [name for name, (_, _, setting) in OPTIMIZERS.items() if setting]


@pytest.mark.parametrize("name", quick(WITH_SETTING, keep=["HyperDistill", "implicit"]))
def test_numeric_settings_are_leaves_to_vmap_over(name):
    setting, value = OPTIMIZERS[name][2]
    optimizer = build(name)
    values = jnp.asarray([float(getattr(optimizer, setting)), value])
    state = optimizer.init(jnp.ones(3), jnp.full(3, -1.0))
    arguments = (state, jnp.zeros(2), jnp.zeros(2), cubic, val_loss)

    def hypergradient(value):
        return dataclasses.replace(optimizer, **{setting: value}).compute_hypergradient(*arguments)

    together = eqx.filter_vmap(hypergradient)(values)
    for i in range(2):
        np.testing.assert_allclose(together[i], hypergradient(values[i]), rtol=1e-12)
    assert not np.array_equal(together[0], together[1])  # the setting does something


@of_prediction
def cubic(w, h, batch):
    return jnp.sum(w**3 * h**3 + w * h) + 0 * jnp.sum(batch)


@every
def test_the_outer_rate_is_plain_gradient_descent(name):
    optimizer = build(name, outer_optimizer=None)
    state = start(optimizer)
    arguments = (state, jnp.zeros(2), 0.0, counted, val_loss)
    g = optimizer.compute_hypergradient(*arguments)
    after = optimizer.step(*arguments, lr_hyper=0.25)
    np.testing.assert_allclose(after.hyperparams, state.hyperparams - 0.25 * g, rtol=1e-13)
    assert after.outer_opt_state == ()


@every
def test_program_size_does_not_grow_with_the_inner_steps(name):
    cls, settings, _ = EVERY[name]
    counts = [k for k in ("inner_steps", "unroll_steps") if k in settings]
    if not counts:
        assert build(name).num_inner_steps == 1
        return
    sizes = []
    for steps in (10, 1_000):
        optimizer = cls(PLAIN, OUTER, **(settings | {counts[0]: steps}))
        state = start(optimizer)
        step = lambda state, o=optimizer: o.step(
            state, jnp.zeros(2), jnp.zeros(2), train_loss, val_loss
        )
        text = eqx.filter_jit(step).lower(state).as_text()
        # The table of a bisection grows; the number of operations does not.
        sizes.append(text.count("\n") if name == "bisected" else len(text))
    assert sizes[1] < 1.1 * sizes[0]


# T1-T2 by weights and first-order methods need the training gradient, which an update_fn does not
# provide. SOBA's adjoint then follows another equation: test_single_loop.py.
ONLY_BY_GRADIENT = {"T1-T2", "SOBA", "AmIGO", "penalty", "BOME"}


BY_UPDATE = [name for name in OPTIMIZERS if name not in ONLY_BY_GRADIENT]


@pytest.mark.parametrize("name", quick(BY_UPDATE, keep=sorted(set(BY_UPDATE) & set(QUICKLY))))
def test_an_update_fn_is_as_good_as_an_inner_optimizer(name):
    update_fn = lambda w, h, batch: w - 0.1 * jax.grad(train_loss)(w, h, batch)
    cls, settings, _ = EVERY[name]
    by_hand, by_optax = cls(None, OUTER, update_fn=update_fn, **settings), build(name)
    found, expected = start(by_hand), start(by_optax)
    for _ in range(2):
        found, expected = (
            o.step(s, jnp.zeros(2), jnp.zeros(2), train_loss, val_loss)
            for o, s in ((by_hand, found), (by_optax, expected))
        )
    assert_same(found.hyperparams, expected.hyperparams, rtol=1e-12)
    # Implicit differentiation remembers the adjoint of another equation, scaled by the rate.
    assert_same(found.metadata, expected.metadata, rtol=1e-12)
    if name != "implicit":
        assert_same(jax.tree.leaves(found.memory), jax.tree.leaves(expected.memory), rtol=1e-12)


@every
def test_losses_may_be_modules_that_hold_arrays(name):
    class Scaled(eqx.Module):
        scale: jax.Array

        def __call__(self, w, h, batch):
            return self.scale * train_loss(w, h, batch)

    optimizer = build(name)
    arguments = (start(optimizer), jnp.zeros(2), jnp.zeros(2))
    scaled = lambda scale: of_prediction(Scaled(jnp.asarray(scale)))
    one = optimizer.step(*arguments, scaled(1.0), val_loss)
    two = optimizer.step(*arguments, scaled(2.0), val_loss)
    assert_same(one, optimizer.step(*arguments, train_loss, val_loss), rtol=1e-12)
    assert not np.array_equal(one.params, two.params)


def test_the_fifth_trace_of_one_job_warns_and_says_what_changed():
    optimizer = build("one step")
    state = start(optimizer)

    def with_a_new_loss():
        made_anew = lambda w, h, batch: train_loss(w, h, batch)
        optimizer.step(state, jnp.zeros(2), jnp.zeros(2), made_anew, val_loss)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            with_a_new_loss()
    with pytest.warns(UserWarning, match="5 times.*train_loss_fn"):
        with_a_new_loss()


def test_optimizers_of_other_counts_are_other_jobs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in range(1, 6):
            optimizer = gradhpo.FixedOptimizer(relaxed(optax.sgd(0.1)), inner_steps=steps)
            state = start(optimizer)
            optimizer.step(state, jnp.zeros(2), jnp.zeros(2), train_loss, val_loss)


@pytest.mark.parametrize(
    ("anew", "message"),
    [("optimizer", "the optimizer"), ("train_batch", "since the last time: train_batch")],
)
def test_the_warning_names_optimizers_and_ragged_batches(anew, message):
    optimizer = build("one step")
    state = start(optimizer)

    def five_times():
        nonlocal optimizer
        for i in range(5):
            if anew == "optimizer":
                optimizer = gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.1)), OUTER)
            batch = jnp.zeros(100 + i if anew == "train_batch" else 1)
            optimizer.step(state, batch, jnp.zeros(2), train_loss, val_loss)

    with pytest.warns(UserWarning, match=message):
        five_times()


def test_every_optimizer_is_in_this_suite():
    exported = {
        value
        for value in vars(gradhpo).values()
        if isinstance(value, type)
        and issubclass(value, gradhpo.BilevelOptimizer)
        and value not in (gradhpo.BilevelOptimizer, gradhpo.FixedOptimizer)  # test_fixed.py
    }
    assert exported == {type(build(name)) for name in EVERY}
    assert PROBLEMS.keys() == {"loss", "optimizer", "layers", "dicts"}


def test_numpy_arrays_are_taken_as_well():
    loss = lambda params, hyperparams, batch: jnp.sum((params["w"] - hyperparams["h"]) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1))
    params, hyperparams = {"w": np.ones(3, np.float32)}, {"h": np.zeros(3, np.float32)}
    state = optimizer.init(params, hyperparams)
    state = optimizer.step(state, None, None, loss, loss, lr_hyper=0.1)
    np.testing.assert_allclose(state.params["w"], 0.8, rtol=1e-6)
    with pytest.raises(ValueError, match=r"params\['w'\] holds NaN"):
        optimizer.init({"w": np.full(3, np.nan, np.float32)}, hyperparams)
