"""Splitting a model, and leaves that must not be split off."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jaxtyping import Array

import gradhpo
from gradhpo.utils.freezing import is_frozen


class Model(eqx.Module):
    net: eqx.nn.MLP
    log_weight_decay: Array
    count: Array
    name: str = "model"


@pytest.fixture
def model(getkey):
    return Model(eqx.nn.MLP(3, 2, 4, 2, key=getkey()), jnp.array(-3.0), jnp.array(7))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (lambda m: m.log_weight_decay, 1),
        (lambda m: m.net.layers[0], 2),
        (lambda m: m.net.layers, 6),
        (lambda m: (m.log_weight_decay, m.net.layers[-1]), 3),
        (lambda m: [m.log_weight_decay, m.net.layers[-1].bias], 2),
        (lambda m: m.net, 6),
        (lambda m: m, 7),
    ],
)
def test_selects_arrays_and_combines_back(model, where, expected):
    params, hyperparams = gradhpo.partition(model, where)
    assert len(jax.tree.leaves(hyperparams)) == expected
    assert all(map(eqx.is_inexact_array, jax.tree.leaves(hyperparams)))
    assert eqx.tree_equal(eqx.combine(params, hyperparams), model)


def test_functions_and_integers_in_a_selected_subtree_stay_in_params(model):
    params, hyperparams = gradhpo.partition(model, lambda m: m)
    assert params.net.activation is model.net.activation
    assert params.count == 7
    assert hyperparams.net.activation is None
    assert hyperparams.count is None


def test_roles_may_be_exchanged_by_partitioning_again():
    """Tuned leaves are then trained, and the other way round, by intent."""
    model = {"a": jnp.ones(3), "b": jnp.zeros(3)}
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    optimizer.init(*gradhpo.partition(model, lambda d: d["a"]))
    optimizer.init(*gradhpo.partition(model, lambda d: d["b"]))
    optimizer.init(*gradhpo.partition(model, lambda d: d["a"]))


def test_one_array_may_start_both_off():
    zeros = jnp.zeros(3)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    optimizer.init(zeros, zeros)
    optimizer.init({"w": zeros, "b": zeros}, {"h": zeros})


def test_a_learning_rate_for_every_parameter_is_a_tree_like_them():
    net = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0), dtype=jnp.float64)
    rates = jax.tree.map(jnp.ones_like, eqx.filter(net, eqx.is_inexact_array))
    inner = lambda rates: optax.stateless(
        lambda gradients, _: jax.tree.map(lambda r, g: -r * g, rates, gradients)
    )
    state = gradhpo.OneStepOptimizer(inner, optax.sgd(0.1)).init(net, rates)
    assert jax.tree.structure(state.hyperparams) == jax.tree.structure(rates)


def test_partition_works_while_tracing():
    split = lambda model: gradhpo.partition(model, lambda d: d["a"])[1]["a"] * 2
    assert jax.jit(split)({"a": jnp.asarray(2.0), "b": jnp.zeros(3)}) == 4


def test_works_on_dicts():
    params, hyperparams = gradhpo.partition(
        {"w": jnp.ones(3), "decay": jnp.array(0.1)}, lambda d: d["decay"]
    )
    assert params == {"w": params["w"], "decay": None}
    assert hyperparams == {"w": None, "decay": hyperparams["decay"]}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda m: m.net.layers[0].bias.dtype, "by itself"),
        (lambda m: None, "selects nothing"),
        (lambda m: [], "selects nothing"),
        (lambda m: m.count, "int64 by itself.*jnp.asarray"),
        (lambda m: m.net.activation, "by itself"),
    ],
)
def test_refuses_what_has_no_derivative(model, where, message):
    with pytest.raises(ValueError, match=message):
        gradhpo.partition(model, where)


def test_refuses_python_numbers_complex_and_boolean_arrays():
    tree = {"a": 0.1, "b": jnp.array(1j), "c": jnp.array(True), "d": {"n": jnp.array(1)}}
    with pytest.raises(ValueError, match=r"0\.1 by itself"):
        gradhpo.partition(tree, lambda d: d["a"])
    with pytest.raises(ValueError, match="complex"):
        gradhpo.partition(tree, lambda d: d["b"])
    with pytest.raises(ValueError, match="bool by itself"):
        gradhpo.partition(tree, lambda d: d["c"])
    with pytest.raises(ValueError, match="nothing to tune"):
        gradhpo.partition(tree, lambda d: d["d"])


def test_model_loss_sees_the_whole_model(model):
    loss = gradhpo.model_loss(lambda m, batch: m.log_weight_decay * batch)
    params, hyperparams = gradhpo.partition(model, lambda m: m.log_weight_decay)
    assert loss(params, hyperparams, 2.0) == -6.0


# -- frozen -----------------------------------------------------------------------------------


class Backboned(eqx.Module):
    backbone: eqx.nn.MLP
    head: eqx.nn.Linear
    decay: Array
    vocabulary: Array

    def __call__(self, x):
        return self.head(self.backbone(x))[self.vocabulary[0]]


@pytest.fixture
def backboned(getkey):
    backbone = eqx.nn.MLP(3, 4, 4, 1, key=getkey())
    return Backboned(backbone, eqx.nn.Linear(4, 1, key=getkey()), jnp.array(-3.0), jnp.arange(2))


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (lambda m: m.backbone, 4),
        (lambda m: m.backbone.layers[0].weight, 1),
        (lambda m: [layer.bias for layer in m.backbone.layers], 2),
        (lambda m: (m.backbone, m.vocabulary), 5),
        (lambda m: (m.head, m.backbone.activation), 2),
    ],
)
def test_frozen_leaves_stay_in_params_and_come_back_plain(backboned, frozen, expected):
    params, hyperparams = gradhpo.partition(backboned, lambda m: m.decay, frozen=frozen)
    nodes = jax.tree.leaves(params, is_leaf=is_frozen)
    assert sum(map(is_frozen, nodes)) == expected
    assert len(jax.tree.leaves(hyperparams)) == 1
    assert eqx.tree_equal(eqx.combine(gradhpo.unfrozen(params), hyperparams), backboned)
    state = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1)).init(params, hyperparams)
    assert eqx.tree_equal(state.model, backboned)
    loss = gradhpo.model_loss(lambda m, x: m(x) * m.decay)
    assert loss(params, hyperparams, jnp.ones(3)) == backboned(jnp.ones(3)) * backboned.decay


def test_marks_in_a_model_are_kept(backboned):
    marked = eqx.tree_at(lambda m: m.backbone, backboned, replace_fn=gradhpo.frozen)
    selected = lambda frozen: gradhpo.partition(marked, lambda m: m.decay, frozen)[0]
    params = selected(lambda m: m.vocabulary)
    expected = gradhpo.partition(backboned, lambda m: m.decay, lambda m: (m.backbone, m.vocabulary))
    assert eqx.tree_equal(params, expected[0])
    assert eqx.tree_equal(selected(None).backbone, expected[0].backbone)
    with pytest.raises(ValueError, match=r"where and frozen both select \.backbone"):
        gradhpo.partition(marked, lambda m: m.backbone.layers[0].bias)


def test_one_array_in_two_places_is_two_leaves():
    """As everywhere in JAX: freezing applies to a place in the model."""
    tied = jnp.ones(3)
    params, _ = gradhpo.partition(
        {"embed": tied, "head": tied, "h": jnp.ones(())}, lambda d: d["h"], lambda d: d["embed"]
    )
    assert is_frozen(params["embed"])
    assert params["head"] is tied


def test_the_two_halves_are_checked_when_parts_are_frozen(backboned):
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    params, hyperparams = gradhpo.partition(backboned, lambda m: m.decay, lambda m: m.backbone)
    with pytest.raises(ValueError, match="params still contains arrays of hyperparams"):
        optimizer.init(gradhpo.partition(backboned, lambda m: m.head, lambda m: m.backbone)[0],
                       hyperparams)  # fmt: skip
    with pytest.raises(ValueError, match="swapped"):
        optimizer.init(hyperparams, params)
    everything = lambda m: (m.backbone, m.head, m.vocabulary)
    with pytest.raises(ValueError, match="is frozen, so there is nothing to train"):
        optimizer.init(*gradhpo.partition(backboned, lambda m: m.decay, everything))


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (lambda m: None, "frozen selects nothing: it returned no array"),
        (lambda m: m.backbone.activation, "frozen selects nothing"),
        (lambda m: m.decay, r"where and frozen both select \.decay"),
        (lambda m: m, r"both select \.decay.*part by part"),
    ],
)
def test_frozen_must_select_something_else_than_where(backboned, frozen, message):
    with pytest.raises(ValueError, match=message):
        gradhpo.partition(backboned, lambda m: m.decay, frozen=frozen)


def test_a_mask_is_no_function_of_the_model(model):
    mask = jax.tree.map(lambda _: True, model.net)
    with pytest.raises(TypeError, match="where must be a function of the model, not a MLP"):
        gradhpo.partition(model.net, mask)
    with pytest.raises(TypeError, match="frozen must be a function of the model, not a MLP"):
        gradhpo.partition(model.net, lambda m: m.layers[0], frozen=mask)
    with pytest.raises(TypeError, match=r"frozen must be .*: pass a function of the model"):
        gradhpo.partition({"a": jnp.ones(2)}, lambda m: m["a"], frozen={"a": True})
