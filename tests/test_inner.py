"""The inner update: its pullback against plain JAX, and what it must not change."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import FIXED, PROBLEMS, make, phi_of

import gradhpo
from gradhpo.core.inner_state import InnerState


def random_like(tree, seed):
    # From NumPy: JAX would compile a program for each shape of random array.
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree)


def assert_close(found, expected, rtol=1e-10):
    assert_same(found, expected, rtol=rtol, atol=1e-14)


COMBINATIONS = quick(
    [
        *((p, o, True) for p in PROBLEMS for o in FIXED),
        ("optimizer", "adam", False),
        ("layers", "momentum", False),
    ],
    keep=[
        ("loss", "adamw", True),
        ("optimizer", "adam", True),
        ("dicts", "sgd", True),
        ("layers", "momentum", True),
        ("layers", "momentum", False),
    ],
)


@pytest.mark.parametrize(("problem_name", "optimizer_name", "symmetric"), COMBINATIONS)
def test_pullback_is_the_vjp_and_agrees_with_the_jvp(
    problem_name, optimizer_name, symmetric, getkey
):
    problem, inner = make(problem_name, optimizer_name, getkey())
    phi, z = phi_of(problem, inner, symmetric=symmetric)
    # A few steps in, so that moments and counts are not at their initial values.
    (w, s, _), _, _ = eqx.filter_jit(phi.rollout)(z, problem.hyperparams, 0, 3)
    s, s_rest = eqx.partition(s, eqx.is_inexact_array)

    def plain(w, s, h):
        z, _ = phi.step(InnerState(w, eqx.combine(s, s_rest)), h, 3)
        return z.w, eqx.filter(z.s, eqx.is_inexact_array)

    primals = (w, s, problem.hyperparams)
    bar, tangent = random_like((w, s), 0), random_like(primals, 1)

    @jax.jit
    def both_ways(primals, bar, tangent):
        w, s, h = primals
        new, loss, pull = phi.vjp(InnerState(w, eqx.combine(s, s_rest)), h, 3)
        z_bar, hyper_bar = pull(InnerState(*bar))
        pulled = z_bar.w, z_bar.s, hyper_bar
        ours = (new.w, eqx.filter(new.s, eqx.is_inexact_array)), loss, pulled
        value, reference = jax.vjp(plain, *primals)
        plain_loss = problem.train_loss(eqx.combine(w, phi.frozen), h, problem.train_batch)
        return ours, (value, plain_loss, reference(bar)), jax.jvp(plain, primals, tangent)[1]

    found, expected, pushed = both_ways(primals, bar, tangent)
    assert_close(found, expected)
    np.testing.assert_allclose(
        gradhpo.tree_dot(bar, pushed), gradhpo.tree_dot(found[2], tangent), rtol=1e-10
    )


def test_pullback_can_be_differentiated_once_more(getkey):
    problem, inner = make("loss", "adam", getkey())
    phi, z = phi_of(problem, inner)

    def through_pullback(h):
        new, _, pull = phi.vjp(z, h, 0)
        return gradhpo.tree_l2_norm(pull(InnerState(new.w))[1])

    def through_jax(h):
        new_w, pull = jax.vjp(lambda h: phi.step(z, h, 0)[0].w, h)
        return gradhpo.tree_l2_norm(pull(new_w)[0])

    ours, plain = (jax.jit(jax.grad(f)) for f in (through_pullback, through_jax))
    assert_close(ours(problem.hyperparams), plain(problem.hyperparams))


@pytest.mark.thorough
def test_pullback_of_an_update_fn(getkey):
    problem, _ = make("dicts", "sgd", getkey())

    def update_fn(params, hyperparams, batch):
        gradient = jax.grad(problem.train_loss)(params, hyperparams, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    by_hand, z = phi_of(problem, update_fn=update_fn)
    by_optax, z_optax = phi_of(problem, optax.sgd(0.1))
    bar = InnerState(random_like(z.w, 0))
    new, loss, pull = by_hand.vjp(z, problem.hyperparams, 0)
    expected, expected_loss, expected_pull = by_optax.vjp(z_optax, problem.hyperparams, 0)
    assert new.s == ()
    assert_close(new.w, expected.w)
    np.testing.assert_allclose(loss, expected_loss)
    (found_z, found_h), (expected_z, expected_h) = pull(bar), expected_pull(bar)
    assert_close(found_z.w, expected_z.w)
    assert_close(found_h, expected_h)


def test_gradient_reversal_gets_its_right_hypergradient(getkey):
    """With a custom_vjp the gradient field is not symmetric: forward mode would be wrong."""

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))

    def train_loss(params, hyperparams, batch):
        features = jnp.tanh(hyperparams["features"] * params["w"])
        adversary = jnp.sum(jnp.square(reverse(features) * params["adversary"]))
        return jnp.sum(jnp.square(features - 1)) + adversary

    def val_loss(params, hyperparams, batch):
        return jnp.sum(jnp.square(params["w"] - 0.5) + jnp.square(params["adversary"] - 1))

    params = {"w": jnp.array([0.3, -0.2]), "adversary": jnp.array([0.7, 0.4])}
    hyperparams = {"features": jnp.array([1.0, 2.0])}
    for optimizer in (
        gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1)),
        gradhpo.T1T2Optimizer(optax.sgd(0.1), optax.sgd(0.1)),
        gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=5),
    ):
        state = optimizer.init(params, hyperparams)
        arguments = (state, None, None, train_loss, val_loss)
        found = optimizer.compute_hypergradient(*arguments)
        exact = gradhpo.finite_difference_hypergradient(optimizer, *arguments)
        assert_close(found, exact, rtol=1e-7)


@pytest.mark.thorough
def test_bfloat16_model_keeps_its_dtypes(getkey):
    net = eqx.nn.MLP(3, 2, 4, 1, key=getkey(), dtype=jnp.bfloat16)
    # A float32 learning rate and Adam's float32 accumulator meet bfloat16 parameters.
    optimizer = gradhpo.UnrolledOptimizer(
        lambda h: optax.adam(jnp.exp(h), mu_dtype=jnp.float32, eps_root=1e-8),
        optax.adam(0.1),
        unroll_steps=3,
    )

    def loss(params, hyperparams, batch):
        out = jax.vmap(params)(batch).astype(jnp.float32)
        return jnp.mean(jnp.square(out - 1))

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(net, jnp.asarray(-3.0, jnp.float32))
        dtypes = jax.tree.map(lambda x: x.dtype, eqx.filter(state, eqx.is_array))
        for _ in range(3):
            state = optimizer.step(state, *[jnp.ones((5, 3), jnp.bfloat16)] * 2, loss, loss)
    assert jax.tree.map(lambda x: x.dtype, eqx.filter(state, eqx.is_array)) == dtypes
    assert state.params.layers[0].weight.dtype == jnp.bfloat16
    assert state.metadata["val_loss"].dtype == jnp.float32
    assert state.metadata["rejected"] == 0


def test_keys_in_a_reused_batch_differ_between_inner_steps():
    def update_fn(params, hyperparams, batch):
        drawn = jax.random.uniform(batch["key"])
        return jnp.stack([params[1], drawn]) + 0 * hyperparams

    loss = lambda params, hyperparams, batch: jnp.sum(params) * hyperparams
    optimizer = gradhpo.UnrolledOptimizer(
        outer_optimizer=optax.sgd(0.1), update_fn=update_fn, unroll_steps=2
    )
    state = optimizer.init(jnp.zeros(2), jnp.asarray(1.0))
    state = optimizer.step(state, {"key": jax.random.key(0)}, None, loss, loss)
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), t)) for t in (0, 1)]
    np.testing.assert_array_equal(state.params, expected)


@pytest.mark.parametrize("settings", [{}, {"checkpoints": 3}, {"truncation": 4}])
def test_the_loss_of_an_update_fn_is_computed_for_the_last_step_only(settings):
    update_fn = lambda params, hyperparams, batch: params * hyperparams

    def loss(params, hyperparams, batch):
        return jax.pure_callback(record, jax.ShapeDtypeStruct((), params.dtype), params)

    def record(value):
        calls.append(float(value))
        return np.asarray(value)

    calls: list[float] = []
    val_loss = lambda params, hyperparams, batch: params**2
    optimizer = gradhpo.UnrolledOptimizer(
        update_fn=update_fn, outer_optimizer=optax.sgd(0.1), unroll_steps=7, **settings
    )
    state = optimizer.init(jnp.asarray(1.0), jnp.asarray(0.5))
    state = optimizer.step(state, None, None, loss, val_loss)
    jax.effects_barrier()
    assert state.metadata["train_loss"] == 0.5**6
    assert calls == [0.5**6]


def test_checks_while_tracing_leave_nothing_in_the_program():
    """A print in the user's loss appears once per evaluation of the loss."""

    def loss(params, hyperparams, batch):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.square(params - hyperparams))

    calls: list[int] = []
    val_loss = lambda params, hyperparams, batch: jnp.sum(params)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.ones(2), jnp.zeros(2))
    for _ in range(3):
        state = optimizer.step(state, None, None, loss, val_loss)
    jax.effects_barrier()
    assert len(calls) == 3


@pytest.mark.thorough
@pytest.mark.parametrize("rule", quick(["loss", "grad_fn", "update_fn"], keep=["loss"]))
def test_means_over_many_batches_add_up_in_float32(rule):
    """Sums of 256 numbers in bfloat16 stall, and so do sums of cotangents."""
    loss = lambda w, h, batch: jnp.mean((batch @ w - 1) ** 2) + jnp.exp(h) * jnp.sum(w**2)
    descend = lambda w, h, batch: w - 0.1 * jax.grad(loss)(w, h, batch)
    settings: dict = {"loss": {}, "grad_fn": {"grad_fn": jax.grad(loss)}}.get(rule) or {}
    inner = None if rule == "update_fn" else optax.sgd(0.0)
    if rule == "update_fn":
        settings = {"update_fn": descend}
    optimizer = gradhpo.ImplicitOptimizer(
        inner, inner_steps=256, curvature_batches=256, damping=1.0, **settings
    )
    x = jax.random.normal(jax.random.key(0), (256, 4, 3)).astype(jnp.bfloat16)
    val_loss = lambda w, h, batch: jnp.sum((w - 1) ** 2)
    found = []
    for dtype in (jnp.bfloat16, jnp.float64):
        state = optimizer.init(jnp.full(3, 0.5, dtype), jnp.zeros((), dtype))
        batches = gradhpo.BatchStack(x.astype(dtype))
        found.append(optimizer.compute_hypergradient(state, batches, None, loss, val_loss))
    np.testing.assert_allclose(found[0].astype(float), found[1], rtol=0.03)
