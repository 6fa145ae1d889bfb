"""Bugs found by review: each of these once gave a wrong number, or none."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import OUTER, relaxed

import gradhpo


SGD = relaxed(optax.sgd(0.1))


def quadratic(w, h, batch):
    return jnp.sum(jnp.square(w - h))


def to_one(w, h, batch):
    return jnp.sum(jnp.square(w - 1))


def hypergradient(optimizer, w, h, train_loss=quadratic, val_loss=to_one):
    state = optimizer.init(w, h)
    return optimizer.compute_hypergradient(state, None, None, train_loss, val_loss)


@pytest.mark.parametrize("size", [1e3, 3e5])
def test_perturbed_hyperparameters_divide_by_the_step_after_rounding(size):
    """In float32 a step of 0.01 at 3e5 is 0.03125 wide: dividing by 0.02 is wrong by half."""
    rate = jnp.asarray(size, jnp.float32)
    # Factors are powers of two: only the step is rounded, in any order of multiplication.
    loss = lambda w, h, batch: w * h * 2.0**-17
    val_loss = lambda w, h, batch: w * 2
    inner = relaxed(optax.sgd(2.0**-3))
    optimizer = gradhpo.T1T2Optimizer(inner, OUTER, perturb="hyperparams", epsilon=0.02)
    found = hypergradient(optimizer, jnp.zeros((), jnp.float32), rate, loss, val_loss)
    np.testing.assert_allclose(found, -(2.0**-19), rtol=1e-6)


def test_a_perturbation_lost_in_rounding_is_nan_and_rejected_not_zero():
    optimizer = gradhpo.T1T2Optimizer(SGD, OUTER, perturb="hyperparams", epsilon=1e-6)
    state = optimizer.init(jnp.zeros((), jnp.float32), jnp.asarray(1e5, jnp.float32))
    state = optimizer.step(state, None, None, quadratic, to_one)
    assert state.metadata["rejected"] == 1


def test_sums_over_many_steps_do_not_stall_in_bfloat16():
    """d/dh of w_T = w_0 - sum of 1,000 times h is -1,000; bfloat16 stops counting at 256."""
    loss = lambda w, h, batch: jnp.sum(w * h)
    optimizer = gradhpo.UnrolledOptimizer(relaxed(optax.sgd(1.0)), OUTER, unroll_steps=1_000)
    h = jnp.zeros((), jnp.bfloat16)
    val_loss = lambda w, h, batch: jnp.sum(w)
    found = hypergradient(optimizer, jnp.zeros((), jnp.bfloat16), h, loss, val_loss)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), -1_000, rtol=0.01)


def test_a_rate_that_broadcasts_is_refused():
    optimizer = gradhpo.OneStepOptimizer(lambda h: optax.sgd(h), OUTER)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="changes its shapes"):
        hypergradient(optimizer, jnp.zeros(()), jnp.ones(1), lambda w, h, batch: w**2)


def test_an_update_fn_that_counts_in_integers_is_refused():
    update_fn = lambda p, h, batch: {"w": p["w"] * h, "n": p["n"] + 1}
    optimizer = gradhpo.OneStepOptimizer(outer_optimizer=OUTER, update_fn=update_fn)
    loss = lambda p, h, batch: jnp.sum(p["w"])
    with pytest.raises(ValueError, match="not a floating-point array"):
        hypergradient(optimizer, {"w": jnp.ones(2), "n": jnp.asarray(0)}, jnp.ones(2), loss, loss)


def test_one_step_says_that_it_cannot_see_what_acts_through_the_state_only():
    """Momentum used one step late: only s' depends on h, w' does not."""

    def delayed(h):
        init = lambda params: jax.tree.map(jnp.zeros_like, params)

        def update(gradient, state, params):
            return jax.tree.map(lambda s: -0.1 * s, state), jax.tree.map(lambda g: h * g, gradient)

        return optax.GradientTransformation(init, update)

    loss = lambda w, h, batch: jnp.sum(w**2)
    one = gradhpo.OneStepOptimizer(delayed, OUTER)
    with pytest.raises(ValueError, match="sees none"):
        hypergradient(one, jnp.ones(2), jnp.asarray(0.5), loss)
    two = gradhpo.UnrolledOptimizer(delayed, OUTER, unroll_steps=2)
    found = hypergradient(two, jnp.ones(2), jnp.asarray(0.5), loss)
    np.testing.assert_allclose(found, 2 * 2 * (0.9 - 1) * -0.1 * 2, rtol=1e-12)


def test_infinite_constants_in_params_are_no_reason_to_reject():
    params = {"w": jnp.ones(2), "mask": jnp.asarray([0.0, -jnp.inf])}
    loss = lambda p, h, batch: jnp.sum(jnp.square(p["w"] - h))
    optimizer = gradhpo.OneStepOptimizer(SGD, OUTER)
    state = optimizer.init(params, jnp.zeros(2))
    after = optimizer.step(state, None, None, loss, loss)
    assert after.metadata["rejected"] == 0
    assert not np.array_equal(after.params["w"], state.params["w"])


def test_a_list_of_layers_with_functions_is_one_subtree(getkey):
    class Model(eqx.Module):
        layers: list

    linear = eqx.nn.Linear(2, 2, key=getkey())
    model = Model([linear, jax.nn.relu, linear])
    params, hyperparams = gradhpo.partition(model, lambda m: m.layers)
    assert len(jax.tree.leaves(hyperparams)) == 4
    assert params.layers[1] is jax.nn.relu


def test_the_report_of_rejections_counts_the_longest_row():
    """Four bad steps, then good ones, in one chunk: the report must not say 0 in a row."""
    bad = lambda i: jnp.where((i >= 2) & (i < 6), jnp.nan, 1.0)
    optimizer = gradhpo.OneStepOptimizer(SGD, OUTER)
    losses = gradhpo.LossFunctions(lambda w, h, batch: quadratic(w * batch, h, None), to_one)
    state = optimizer.init(jnp.zeros(2), jnp.zeros(2))
    with pytest.warns(RuntimeWarning, match="4 consecutive steps"):
        _, history = gradhpo.run(
            optimizer, state, losses, bad, None, num_steps=20, chunk_size=10, max_rejections=3,
            progress=False,
        )  # fmt: skip
    assert history.stop_reason == "rejected"


def test_a_loader_that_fails_late_loses_nothing():
    def batches():
        for _ in range(5):
            yield np.ones(2)
        raise OSError("disk gone")

    optimizer = gradhpo.OneStepOptimizer(SGD, OUTER)
    losses = gradhpo.LossFunctions(quadratic, to_one)
    state = optimizer.init(jnp.zeros(2), jnp.zeros(2))
    with pytest.warns(RuntimeWarning, match="OSError: disk gone"):
        state, history = gradhpo.run(
            optimizer, state, losses, batches(), None, num_steps=20, chunk_size=2, progress=False
        )
    assert state.step == 5
    assert history.stop_reason == "data error"
    assert len(history["val_loss"]) == 5


def test_warnings_about_blind_methods_come_once():
    loss = lambda w, h, batch: jnp.sum(jnp.square(w - h["a"])) + jnp.sum(h["a"])
    optimizer = gradhpo.FOOptimizer(SGD, OUTER)
    state = optimizer.init(jnp.zeros(2), {"a": jnp.zeros(2), "b": jnp.zeros(2)})
    with pytest.warns(UserWarning, match="hypergradient of 0") as caught:
        optimizer.compute_hypergradient(state, None, None, loss, loss)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    optimizer.step(state, None, None, loss, loss)  # another trace: a warning would be an error


# Found in HyperDistill, its data and its tasks.


def masked_loss(w, h, batch):
    return jnp.mean(jnp.where(jnp.isnan(batch), 0.0, w - h) ** 2)


def plain_loss(w, h, batch):
    return jnp.sum((w - 1) ** 2)


def test_missing_values_in_distilled_data_are_no_failure():
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    one, other = jnp.zeros((4, 3)).at[0].set(jnp.nan), jnp.zeros((4, 3)).at[2].set(jnp.nan)
    state = optimizer.init(jnp.ones(3), jnp.zeros(3), batch=one, key=jax.random.key(0))
    for batch in (one, other, one, other):
        state = optimizer.step(state, batch, None, masked_loss, plain_loss)
    assert state.metadata["rejected"] == 0


@pytest.mark.parametrize(
    "note",
    [
        *(
            pytest.param(note, marks=pytest.mark.thorough)
            for note in ("hello", 1.0, jnp.asarray(jnp.nan))
        ),
        jnp.nan,
    ],
)
def test_an_algorithm_with_memory_leaves_what_users_note_alone(note):
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.ones(3), jnp.zeros(3)).update(metadata={"note": note})
    batch, losses = jnp.ones(3), gradhpo.LossFunctions(masked_loss, plain_loss)
    after = optimizer.step(state, batch, None, masked_loss, plain_loss)
    assert after.metadata["rejected"] == 0
    assert type(after.metadata["note"]) is type(note)
    state, _ = gradhpo.run(
        optimizer, state, losses, batch, None, num_steps=4, steps_per_episode=2, progress=False
    )
    assert state.metadata["rejected"] == 0


def test_other_leaves_of_a_batch_reach_the_loss_as_they_are():
    modes = []

    def train_loss(w, h, batch):
        modes.append(batch["mode"])
        return jnp.mean((batch["x"] @ w - jnp.sum(h)) ** 2)

    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    batch = {"x": jnp.ones((4, 3)), "mode": "train"}
    state = optimizer.init(jnp.ones(3), jnp.zeros(3), batch=batch, key=jax.random.key(0))
    optimizer.step(state, batch, None, train_loss, plain_loss)
    assert set(modes) == {"train"}


def test_the_smallest_discounts_survive_an_episode():
    optimizer = gradhpo.OnlineHypergradientOptimizer(
        optax.sgd(0.1), optax.sgd(0.1), gamma=np.float32(1e-8)
    )
    start = optimizer.init(jnp.ones(3, jnp.float32), jnp.zeros(3, jnp.float32))
    losses = gradhpo.LossFunctions(masked_loss, plain_loss)
    state, _ = gradhpo.run(
        optimizer, start, losses, jnp.ones(3, jnp.float32), None, num_steps=8,
        steps_per_episode=4, progress=False,
    )  # fmt: skip
    assert state.metadata["rejected"] == 0
