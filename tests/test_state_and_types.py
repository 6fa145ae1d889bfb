"""The state and the small containers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same

import gradhpo
from gradhpo.core.types import METRICS


def test_create_starts_at_step_0_with_metrics_unmeasured():
    state = gradhpo.BilevelState.create(jnp.ones(3, jnp.float32), jnp.zeros(3), (), ())
    assert state.step.dtype == jnp.int32
    assert state.step == 0
    assert set(state.metadata) == set(METRICS)
    assert state.get_metric("rejected") == 0
    assert np.isnan(state.get_metric("val_loss"))
    assert state.get_metric("val_loss").dtype == jnp.float32
    assert state.get_metric("none of these", default=7) == 7


def test_update_replaces_what_is_given_and_merges_metadata():
    state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
    new = state.update(
        params=jnp.zeros(3), step=jnp.asarray(4, jnp.int32), metadata={"mine": jnp.ones(())}
    )
    assert new.step == 4
    assert new.get_metric("mine") == 1
    assert set(new.metadata) == {*METRICS, "mine"}
    np.testing.assert_array_equal(new.params, np.zeros(3))
    assert new.hyperparams is state.hyperparams
    np.testing.assert_array_equal(state.params, np.ones(3))
    assert "mine" not in state.metadata


def test_state_is_an_immutable_pytree():
    state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
    leaves, treedef = jax.tree.flatten(state)
    assert jax.tree.leaves(jax.tree.unflatten(treedef, leaves)) == leaves
    with pytest.raises(AttributeError):
        state.params = jnp.zeros(3)


def test_numbers_and_numpy_arrays_become_arrays_of_the_state():
    """A static step counter would recompile at every step."""
    state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros((), jnp.float32), (), ())
    new = state.update(step=5, hyperparams=0.5, params=np.zeros(3))
    assert_same(new.step, jnp.asarray(5, jnp.int32))
    assert_same(new.hyperparams, jnp.asarray(0.5, jnp.float32))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(new))
    weak = state.update(hyperparams=jnp.asarray(1, jnp.float32) * 2.0)
    assert not weak.hyperparams.weak_type


WRONG = {
    "shape": ({"hyperparams": jnp.ones(5)}, r"update\(hyperparams=...\) is of shape \(5,\)"),
    "dtype": ({"params": {"w": jnp.ones(3, jnp.float32)}}, r"\['w'\] is .* float32, but should be"),
    "structure": ({"params": jnp.ones(3)}, r"params=...\) differs in structure"),
    "no array": ({"hyperparams": "large"}, "is no array, but should be of shape"),
    "a share of a step": ({"step": 1.5}, r"update\(step=...\) is of shape \(\) and dtype float"),
    "another optimizer": (
        {"inner_opt_state": ()},
        r"inner_opt_state=.* in structure.*adopt",
    ),
    "outer state": (
        {"outer_opt_state": jnp.ones(2)},
        r"outer_opt_state=...\) differs in struc",
    ),
    "memory": ({"memory": jnp.ones(2)}, r"memory=...\) differs in structure"),
    "two flags": ({"fresh": jnp.ones(2, bool)}, r"fresh=...\) is of shape \(2,\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_update_keeps_structure_shapes_and_dtypes(what):
    optimizer = gradhpo.ForwardModeOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init({"w": jnp.ones(3)}, jnp.zeros(3))
    fields, message = WRONG[what]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        state.update(**fields)


def test_update_under_transformations():
    state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
    double = lambda h: state.update(hyperparams=2 * h).hyperparams
    np.testing.assert_array_equal(jax.jit(jax.vmap(double))(jnp.ones((4, 3))), 2.0)
    with pytest.raises(ValueError, match="of shape"):
        jax.eval_shape(double, jnp.ones((4, 3)))


def test_a_state_equals_itself_before_the_first_step():
    """Its metrics are NaN then, and NaN equals nothing."""
    state = gradhpo.BilevelState.create(jnp.ones(3), {"h": jnp.zeros(3)}, (), ())
    again = gradhpo.BilevelState.create(jnp.ones(3), {"h": jnp.zeros(3)}, (), ())
    assert state == state
    assert state == again
    assert state != state.update(step=1)
    assert state != state.update(hyperparams={"h": jnp.full(3, jnp.nan)})
    assert state.update(metadata={"note": "a"}) != state
    assert state != 3


def test_a_state_prints_in_a_few_lines():
    class Model(eqx.Module):
        net: eqx.nn.MLP
        decay: jax.Array
        weights: jax.Array

    net = eqx.nn.MLP(4, 2, 8, 3, key=jax.random.key(0))
    model = Model(net, jnp.asarray(-3.25), jnp.ones(100, jnp.float32))
    halves = gradhpo.partition(model, lambda m: (m.decay, m.weights))
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.adam(0.1), optax.adam(0.1))
    state = optimizer.init(*halves).update(metadata={"epoch": jnp.asarray(7)})
    shown = repr(state)
    assert shown.splitlines() == [
        "BilevelState(",
        "  step=0,",
        "  params: 202 numbers in 8 arrays,",
        "  hyperparams: decay=-3.25, weights=f32[100],",
        "  train_loss=nan, val_loss=nan, hypergrad_norm=nan, rejected=0,",
        "  notes: ['epoch']=7,",
        "  memory: HyperDistillMemory,",
        ")",
    ]
    half = gradhpo.BilevelState.create(jnp.ones(1), jnp.arange(3, dtype=jnp.bfloat16), (), ())
    assert "params: 1 number in 1 array," in repr(half)
    assert "hyperparams: [0., 1., 2.]," in repr(half)
    traced = []
    jax.eval_shape(lambda state: traced.append(repr(state)), half)
    assert "step=i32[]," in traced[0]
    assert "hyperparams: bf16[3]," in traced[0]


def test_own_metadata_travels_along():
    loss = lambda w, h, batch: jnp.sum(jnp.square(w - h))
    optimizer = gradhpo.FOOptimizer(outer_optimizer=None, update_fn=lambda w, h, batch: w)
    state = optimizer.init(jnp.ones(3), jnp.zeros(3)).update(metadata={"mine": jnp.asarray(3)})
    state = optimizer.step(state, None, None, loss, loss, lr_hyper=0.1)
    assert state.get_metric("mine") == 3


def test_data_batch_unpacks_as_a_pair():
    batch = gradhpo.DataBatch(jnp.ones((4, 2)), {"label": jnp.zeros(4)})
    x, y = batch
    assert x.shape == (4, 2)
    assert y["label"].shape == (4,)


def test_batch_stack_of_keeps_the_order():
    stack = gradhpo.BatchStack.of([{"x": jnp.full(2, float(i))} for i in range(3)])
    assert stack.num_steps == 3
    np.testing.assert_array_equal(stack.batches["x"][:, 0], [0.0, 1.0, 2.0])
