"""Frozen leaves: as if the loss had closed over them, and stored once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed
from test_contract import OF_ANY_LOSS

import gradhpo
from gradhpo.diagnostics.cost import Program
from gradhpo.utils.freezing import is_frozen


KEYS = jax.random.split(jax.random.key(0), 4)
BACKBONE = {"w": jax.random.normal(KEYS[0], (3, 5)), "picked": jnp.arange(4)}
HEAD = {"w": jax.random.normal(KEYS[1], (4,)), "b": jnp.asarray(0.1)}
DECAY = jnp.linspace(-2.0, -1.0, 4)
X = jax.random.normal(KEYS[2], (6, 3))
BATCH = (X, jnp.sin(X[:, 0]))
ADAM = relaxed(optax.adam(0.03, eps_root=1e-8))
SGD = relaxed(optax.sgd(0.1))


def error(params, batch):
    (x, y), backbone, head = batch, params["backbone"], params["head"]
    features = jnp.tanh(x @ backbone["w"])[:, backbone["picked"]]
    return jnp.mean((features @ head["w"] + head["b"] - y) ** 2)


def train_loss(params, decay, batch):
    return error(params, batch) + jnp.sum(jnp.exp(decay) * params["head"]["w"] ** 2)


# First order follows the direct term.
def val_loss(params, decay, batch):
    return error(params, batch) + 0.01 * jnp.sum(decay**2)


class Closed(eqx.Module):
    """A loss that contains the backbone, as an argument of the program."""

    backbone: dict
    loss: object = eqx.field(static=True)

    def __call__(self, params, decay, batch):
        return self.loss(params | {"backbone": self.backbone}, decay, batch)


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
CLOSED = gradhpo.LossFunctions(Closed(BACKBONE, train_loss), Closed(BACKBONE, val_loss))


def params_with(backbone):
    return {"backbone": gradhpo.frozen(backbone), "head": HEAD}


PARAMS, ALONE = params_with(BACKBONE), {"head": HEAD}


def stepped(optimizer, params, losses, batch, count=2):
    state = optimizer.init(params, DECAY)
    for _ in range(count):
        state = optimizer.step(state, batch, batch, losses.train_loss, losses.val_loss)
    return state


@pytest.mark.parametrize(
    "name",
    quick(
        list(OF_ANY_LOSS),
        keep=["HyperDistill", "tasks", "implicit"],
    ),
)
def test_every_optimizer_does_what_it_does_with_a_closure(name):
    """The outer rate is 1, so that hyperparameters differ by as much as hypergradients do."""
    cls, settings, _ = OF_ANY_LOSS[name]
    optimizer = cls(ADAM, relaxed(optax.sgd(1.0)), **settings)
    tasks = isinstance(optimizer, gradhpo.TaskBatched)
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), BATCH) if tasks else BATCH
    found = stepped(optimizer, PARAMS, LOSSES, batch)
    expected = stepped(optimizer, ALONE, CLOSED, batch)
    assert found.get_metric("rejected") == 0
    assert float(found.get_metric("hypergrad_norm")) > 1e-3
    assert_same(found.hyperparams, expected.hyperparams, rtol=1e-12, atol=1e-12)
    assert_same(found.params["head"], expected.params["head"], rtol=1e-12, atol=1e-12)
    assert_same(found.inner_opt_state[0].count, expected.inner_opt_state[0].count)
    # Norms and losses: the backbone does not count, not even under a task axis.
    assert_same(dict(found.metadata), dict(expected.metadata), rtol=1e-12, atol=1e-12)
    # Not copied, not broadcast: the same arrays that were passed.
    for mine, given in zip(
        *map(jax.tree.leaves, (found.params["backbone"], BACKBONE)), strict=True
    ):
        assert mine is given
    moments = found.inner_opt_state[0].mu
    assert jax.tree.leaves(moments["backbone"]) == []


def gradient(params, decay, batch):
    """With respect to all floating-point arrays, as most people would write it."""
    floats, rest = eqx.partition(params, eqx.is_inexact_array)
    return jax.grad(lambda x: train_loss(eqx.combine(x, rest), decay, batch))(floats)


def update(params, decay, batch):
    moves = jax.tree.map(lambda g: -0.1 * g, gradient(params, decay, batch))
    return eqx.apply_updates(params, moves)


@pytest.mark.parametrize("own", [{"update_fn": update}, {"grad_fn": gradient}])
def test_own_rules_see_plain_arrays_and_leave_frozen_ones_alone(own):
    arguments = {"outer_optimizer": relaxed(optax.sgd(1.0)), "unroll_steps": 3}
    by_hand = gradhpo.UnrolledOptimizer(None if "update_fn" in own else SGD, **arguments, **own)
    by_optax = gradhpo.UnrolledOptimizer(SGD, **arguments)
    found = stepped(by_hand, PARAMS, LOSSES, BATCH)
    expected = stepped(by_optax, PARAMS, LOSSES, BATCH)
    assert_same(found.hyperparams, expected.hyperparams, rtol=1e-12)
    assert_same(found.params, expected.params, rtol=1e-12)


def test_products_with_an_update_leave_frozen_leaves_out():
    w_part, _ = gradhpo.vjp_wrt_both(update, PARAMS, DECAY, BATCH, PARAMS)
    assert eqx.is_inexact_array(w_part["head"]["w"])
    assert w_part["backbone"] == {"w": None, "picked": None}


def test_differences_of_trainings_agree():
    optimizer = gradhpo.UnrolledOptimizer(SGD, SGD, unroll_steps=4)
    arguments = optimizer.init(PARAMS, DECAY), BATCH, BATCH, train_loss, val_loss
    exact = optimizer.compute_hypergradient(*arguments)
    differences = gradhpo.finite_difference_hypergradient(optimizer, *arguments)
    np.testing.assert_allclose(differences, exact, rtol=1e-6)


# -- memory -----------------------------------------------------------------------------------


WIDTH, STEPS = 512, 16
WIDE = jax.random.normal(KEYS[3], (WIDTH, WIDTH), jnp.float32) / 20
MIB = 2**20


def wide_error(params, batch):
    x, y = batch
    for w, adapter in zip(params["backbone"], params["adapters"], strict=True):
        x = jnp.tanh(x @ w + (x @ adapter["a"]) @ adapter["b"])  # LoRA
    return jnp.mean((jnp.sum(x, axis=1) - y) ** 2)


def wide_train_loss(params, decay, batch):
    squares = [jnp.sum(x**2) for x in jax.tree.leaves(params["adapters"])]
    return wide_error(params, batch) + jnp.exp(decay) * sum(squares)


def wide_val_loss(params, decay, batch):
    return wide_error(params, batch)


def temporary_bytes(optimizer, params, backbone=None):
    """For one step on a backbone of 2 MiB, in params or closed over."""
    x = jnp.ones((16, WIDTH), jnp.float32)
    batch = (x, x[:, 0])
    losses = wide_train_loss, wide_val_loss
    if backbone is not None:
        losses = tuple(Closed(backbone, loss) for loss in losses)
    state = optimizer.init(params, jnp.asarray(-3.0, jnp.float32))
    step = lambda state, *losses: optimizer.step(state, batch, batch, *losses)
    return Program(step, state, *losses).temporary_bytes


@pytest.fixture(scope="module")
def lora():
    a, b = jnp.full((WIDTH, 4), 0.01, jnp.float32), jnp.zeros((4, WIDTH), jnp.float32)
    return [WIDE, WIDE.T], {"adapters": [{"a": a, "b": b}, {"a": b.T, "b": a.T}]}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make",
    [
        lambda *two: gradhpo.UnrolledOptimizer(*two, unroll_steps=STEPS),
        lambda *two: gradhpo.UnrolledOptimizer(*two, unroll_steps=STEPS, checkpoints="sqrt"),
        lambda *two: gradhpo.GreedyOptimizer(*two, unroll_steps=STEPS),
    ],
)
def test_lora_takes_the_memory_of_a_closure(make, lora):
    backbone, adapters = lora
    optimizer = make(ADAM, SGD)
    frozen = adapters | {"backbone": gradhpo.frozen(backbone)}
    ours = temporary_bytes(optimizer, frozen)
    assert ours <= 1.1 * temporary_bytes(optimizer, adapters, backbone)


@pytest.mark.thorough
def test_kept_inner_states_do_not_hold_the_backbone(lora):
    """With a do-nothing optimizer for it they would: 16 times 2 MiB."""
    backbone, adapters = lora
    label = lambda w: {name: "rest" if name == "backbone" else "trained" for name in w}
    does_nothing = optax.partition({"trained": ADAM, "rest": optax.set_to_zero()}, label)
    exact = lambda inner: gradhpo.UnrolledOptimizer(inner, SGD, unroll_steps=STEPS)
    before = temporary_bytes(exact(does_nothing), adapters | {"backbone": backbone})
    assert before > STEPS * 2 * MIB
    ours = temporary_bytes(exact(ADAM), adapters | {"backbone": gradhpo.frozen(backbone)})
    assert ours < before - STEPS * 2 * MIB


def test_a_plan_counts_the_backbone_once(lora):
    backbone, adapters = lora
    optimizers = {"one": gradhpo.OneStepOptimizer(SGD, SGD)}
    state = optimizers["one"].init(
        adapters | {"backbone": gradhpo.frozen(backbone)}, jnp.asarray(-3.0, jnp.float32)
    )
    x = jnp.ones((16, WIDTH), jnp.float32)
    losses = gradhpo.LossFunctions(wide_train_loss, wide_val_loss)
    cost = gradhpo.plan(optimizers, state, (x, x[:, 0]), (x, x[:, 0]), losses)["one", 1].cost
    assert 2 * MIB < cost.total_bytes - cost.temporary_bytes < 3 * MIB


# -- untrained leaves are ignored ----------------------------------------------------------------


def test_tree_algebra_leaves_frozen_leaves_out():
    norm = gradhpo.tree_l2_norm(HEAD)
    assert gradhpo.tree_l2_norm(PARAMS) == norm
    np.testing.assert_allclose(gradhpo.tree_dot(PARAMS, PARAMS), norm**2, rtol=1e-14)
    between = gradhpo.tree_lerp(PARAMS, jax.tree.map(lambda x: 2 * x, PARAMS), 0.5)
    assert_same(between, PARAMS | {"head": jax.tree.map(lambda x: 1.5 * x, HEAD)}, rtol=1e-14)


@pytest.mark.thorough
def test_precision_is_that_of_what_is_trained():
    """A table in float64 does not make the program float64, and does not change."""

    def loss(params, decay, batch):
        table = params["table"].astype(params["head"].dtype)
        return jnp.sum((params["head"] - table * decay) ** 2)

    table = np.linspace(0.5, 1.5, 3)
    params = {"table": gradhpo.frozen(table), "head": np.ones(3, np.float32)}
    optimizer = gradhpo.UnrolledOptimizer(SGD, SGD, unroll_steps=3)
    state = optimizer.init(params, jnp.asarray(0.5, jnp.float32))
    assert state.get_metric("val_loss").dtype == jnp.float32
    losses = gradhpo.LossFunctions(loss, loss)
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    assert report.narrow == "float32"
    assert report.own_precision_is_narrow
    assert report.healthy, report
    assert gradhpo.unfrozen(state.params)["table"].dtype == jnp.float64


def test_anything_may_be_frozen():
    """Integers, booleans, complex numbers and keys, next to functions and text."""
    constants = {
        "phases": jnp.asarray(np.exp(1j * np.arange(3.0))),
        "mask": jnp.array([True, False, True]),
        "key": jax.random.key(3),
        "numpy": np.arange(3),
        "activation": jnp.tanh,
        "name": "rotary",
        "nothing": None,
    }

    def loss(params, decay, batch):
        c = params["constants"]
        turned = jnp.real(c["phases"] * params["w"]) * c["mask"] * c["numpy"]
        noise = jax.random.normal(c["key"], (3,))
        return jnp.sum((c["activation"](turned) - decay + noise) ** 2)

    optimizer = gradhpo.OneStepOptimizer(SGD, SGD)
    state = optimizer.init({"constants": gradhpo.frozen(constants), "w": jnp.ones(3)}, DECAY[0])
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.step(state, None, None, loss, loss)
    assert state.get_metric("rejected") == 0
    found = gradhpo.unfrozen(state.params)["constants"]
    assert_same(found, constants | {"numpy": jnp.arange(3)})
    assert found["activation"] is jnp.tanh


def test_a_derivative_of_zero_is_looked_for_with_the_backbone_as_it_is():
    """With a head of zeros the penalty still has a derivative, so there is no report."""
    params = {"backbone": gradhpo.frozen(BACKBONE), "head": jax.tree.map(jnp.zeros_like, HEAD)}
    optimizer = gradhpo.OneStepOptimizer(SGD, SGD)
    state = optimizer.init(params, DECAY)

    def penalty(params, decay, batch):
        same = jnp.sum((params["backbone"]["w"] - BACKBONE["w"]) ** 2)
        return error(params, batch) + jnp.where(same == 0, 1.0, 0.0) * jnp.sum(
            jnp.exp(decay) * params["head"]["w"] ** 2
        )

    losses = gradhpo.LossFunctions(penalty, lambda params, decay, batch: error(params, batch))
    gradhpo.run(optimizer, state, losses, BATCH, BATCH, num_steps=1, progress=False)


@pytest.mark.thorough
def test_comparisons_are_those_of_a_closure():
    """HyperDistill reads ahead, so a separate program makes its start."""
    optimizers = {"HyperDistill": gradhpo.OnlineHypergradientOptimizer(SGD)}
    stack = gradhpo.BatchStack(jax.tree.map(lambda x: jnp.stack([x, 2 * x, x]), BATCH))
    errors = []
    for params, losses in ((PARAMS, LOSSES), (ALONE, CLOSED)):
        state = optimizers["HyperDistill"].init(params, DECAY)
        report = gradhpo.compare_hypergradients(optimizers, state, stack, BATCH, losses)
        errors.append(report.relative_error["HyperDistill"])
    np.testing.assert_allclose(*errors, rtol=1e-10)
    assert errors[0] > 1e-6


# -- the state ----------------------------------------------------------------------------------


def test_trees_and_serialisation_show_the_arrays(tmp_path):
    optimizer = gradhpo.OneStepOptimizer(ADAM, SGD)
    state = optimizer.init(PARAMS, DECAY)
    shapes = jax.tree.map(jnp.shape, state.params)
    assert (
        gradhpo.unfrozen(jax.tree.map(lambda x: x, state.params))["backbone"]["w"] is BACKBONE["w"]
    )
    assert len(jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))) == 4
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    other = optimizer.init(params_with(jax.tree.map(jnp.zeros_like, BACKBONE)), DECAY)
    assert_same(eqx.tree_deserialise_leaves(tmp_path / "state.eqx", other), state)
    assert "array=f64[3,5]" in eqx.tree_pformat(state)


def test_new_params_are_frozen_as_the_old_ones_were():
    """Plain arrays would be trained from then on, unnoticed with SGD."""
    optimizer = gradhpo.OneStepOptimizer(SGD, SGD)
    state = optimizer.init(PARAMS, DECAY)
    plain = jax.tree.map(lambda x: 2 * x, gradhpo.unfrozen(PARAMS))
    state = state.update(params=plain)
    state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss)
    after = gradhpo.unfrozen(state.params)
    assert_same(after["backbone"], plain["backbone"])
    assert not np.array_equal(after["head"]["w"], plain["head"]["w"])
    back = optimizer.restart(state, start=plain, reptile_rate=0.0)
    assert_same(gradhpo.unfrozen(back.params), plain)
    with pytest.raises(ValueError, match=r"update\(params=...\) differs in structure"):
        state.update(params=HEAD)
    with pytest.raises(ValueError, match="start differs in structure"):
        optimizer.restart(state, start=HEAD, reptile_rate=0.5)


def test_a_loop_of_ones_own_may_carry_the_state():
    optimizer = gradhpo.OneStepOptimizer(ADAM, SGD)
    state = optimizer.init(PARAMS, DECAY)
    arrays, static = eqx.partition(state, eqx.is_array)
    step = lambda state: optimizer.step(state, BATCH, BATCH, train_loss, val_loss)
    body = lambda arrays, _: (eqx.filter(step(eqx.combine(arrays, static)), eqx.is_array), None)
    found = eqx.combine(jax.lax.scan(body, arrays, None, length=2)[0], static)
    assert_same(found, stepped(optimizer, PARAMS, LOSSES, BATCH), rtol=1e-13, atol=1e-15)
    over_decays = eqx.filter_vmap(lambda decay: step(optimizer.init(PARAMS, decay)).hyperparams)
    together = over_decays(jnp.stack([DECAY, 2 * DECAY]))
    np.testing.assert_allclose(together[0], step(state).hyperparams, rtol=1e-13)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda o: o.init(gradhpo.frozen(HEAD), DECAY), "every .* is frozen, so there is nothing"),
        (lambda o: o.init(HEAD, {"h": gradhpo.frozen(DECAY)}), r"hyperparams\['h'\] is frozen"),
        (lambda o: gradhpo.frozen({"rate": 0.1, "f": jnp.tanh}), r"frozen\(tree\) got no array"),
        (
            lambda o: o.init(params_with({"w": jnp.asarray([1.0, jnp.nan])}), DECAY),
            r"params\['backbone'\]\['w'\] holds NaN",
        ),
    ],
)
def test_misuse_is_explained(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt(gradhpo.OneStepOptimizer(SGD, SGD))


def test_marks_are_made_once():
    twice = gradhpo.frozen(PARAMS)
    assert all(map(is_frozen, jax.tree.leaves(twice, is_leaf=is_frozen)))
    assert_same(gradhpo.unfrozen(twice), gradhpo.unfrozen(PARAMS))
    plain = {"w": jnp.ones(3), "none": None}
    assert gradhpo.unfrozen(plain)["w"] is plain["w"]
