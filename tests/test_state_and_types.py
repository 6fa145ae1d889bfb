"""The state and the small containers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_a_number_becomes_an_array_and_other_shapes_are_refused():
    state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
    step = state.update(step=5).step
    assert isinstance(step, jax.Array)
    assert step.dtype == jnp.int32
    for name in ("params", "hyperparams"):
        with pytest.raises(ValueError, match=rf"update\({name}=\.\.\.\)"):
            state.update(**{name: jnp.zeros(2)})


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
