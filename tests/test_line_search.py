"""Inner optimizers that need the loss itself: a line search, a Polyak step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from problems import relaxed
from test_implicit import logistic, ridge

import gradhpo
import gradhpo.extend
from gradhpo.utils.advice import NEEDS_THE_LOSS


LBFGS = relaxed(optax.lbfgs())
POLYAK = relaxed(optax.polyak_sgd(max_learning_rate=10.0))


@pytest.mark.parametrize("make", quick([ridge, logistic], keep=[ridge]))
def test_implicit_hypergradients_at_the_optimum_that_lbfgs_finds(make):
    problem = make()
    optimizer = gradhpo.ImplicitOptimizer(LBFGS, inner_steps=40)
    there = jax.tree.map(jnp.asarray, problem.hyperparams)
    elsewhere = jax.tree.map(lambda h: h + 0.3, there)
    losses = (problem.train_loss, problem.val_loss)
    step = lambda state: optimizer.step(state, None, None, *losses, lr_hyper=1.0)

    begun = step(optimizer.init(jnp.zeros(5), elsewhere)).update(hyperparams=there)
    state = step(begun)
    found = jax.tree.map(jnp.subtract, there, state.hyperparams)
    np.testing.assert_allclose(state.params, problem.w, atol=1e-10)
    for name, expected in problem.expected.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-10)
    loss = problem.train_loss(jnp.asarray(problem.w), there, None)
    np.testing.assert_allclose(state.get_metric("train_loss"), loss, rtol=1e-12)

    # Nothing learned about the previous training loss is used on this one.
    anew = step(optimizer.init(begun.params, there))
    np.testing.assert_array_equal(anew.params, state.params)


@pytest.mark.thorough
def test_steps_after_convergence_stay_at_the_optimum(as_a_user_has_it):
    """Also at an optimum of exactly 0, in float32, and while one of two tasks waits."""
    x, y, *_ = (jnp.asarray(a, jnp.float32) for a in ridge_data())

    def train_loss(w, h, batch):
        return jnp.mean((x @ w - batch) ** 2) + jnp.exp(h) * jnp.sum(w**2)

    def val_loss(w, h, batch):
        return jnp.sum((w - 1) ** 2)

    optimizer = gradhpo.ImplicitOptimizer(optax.lbfgs(), inner_steps=300)
    optimizer = gradhpo.TaskBatched(optimizer, num_tasks=2)
    state = optimizer.init(jnp.ones(5), jnp.array(-2.0))
    tasks = jnp.stack([y, jnp.zeros_like(y)])
    state, history = gradhpo.run(
        optimizer, state, gradhpo.LossFunctions(train_loss, val_loss), tasks, None,
        num_steps=4, chunk_size=4, lr_hyper=0.01, progress=False,
    )  # fmt: skip
    assert history["rejected"][-1] == 0
    assert history["inner_residual"].max() < 1e-6  # where gradients have length 1 at the start
    np.testing.assert_allclose(state.params[1], 0, atol=1e-6)


def ridge_data():
    random = np.random.default_rng(0)
    x = random.normal(size=(30, 5))
    return x, x @ random.normal(size=5) + random.normal(size=30)


def train_loss(w, h, batch):
    return jnp.sum(jnp.exp(h) * w**2) / 2 + jnp.sum((w - batch) ** 2) / 2


def val_loss(w, h, batch):
    return jnp.sum((w - 1) ** 2) + jnp.sum(h**2)


W, H, B = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, -0.2, 0.1]), jnp.array([2.0, 1.0, -1.0])


def polyak_step(h):
    value, gradient = jax.value_and_grad(train_loss)(W, h, B)
    return W - value / jnp.sum(gradient**2) * gradient


def test_a_polyak_step_where_the_update_is_not_differentiated():
    first_order = gradhpo.FOOptimizer(POLYAK)
    state = first_order.step(first_order.init(W, H), B, B, train_loss, val_loss, lr_hyper=0.1)
    np.testing.assert_allclose(state.params, polyak_step(H), rtol=1e-12)

    # The step depends on the hyperparameters through the value of the loss as well.
    exact = jax.grad(lambda h: val_loss(polyak_step(h), h, B))(H)
    quotient = gradhpo.T1T2Optimizer(POLYAK, epsilon=1e-4, perturb="hyperparams")
    found = quotient.compute_hypergradient(quotient.init(W, H), B, B, train_loss, val_loss)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


PLAIN = relaxed(optax.sgd(0.1))
SETTINGS = {
    "SOBAOptimizer": {"adjoint_optimizer": PLAIN},
    "FunctionalOptimizer": {"adjoint": jnp.zeros(3), "closed_form": True},
    "T1T2Optimizer": {"perturb": "hyperparams"},
}
ALGORITHMS = [
    name
    for name in sorted(gradhpo.__all__)
    if isinstance(cls := getattr(gradhpo, name), type) and issubclass(cls, gradhpo.extend.Algorithm)
]


@pytest.mark.thorough
@pytest.mark.parametrize("inner", [LBFGS, POLYAK], ids=["lbfgs", "polyak"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_advice_names_all_that_take_them(name, inner):
    predict = lambda w, h, batch: batch[0] @ w
    squares = lambda v, h, batch: jnp.mean((v - batch[1]) ** 2) + jnp.sum(h**2)
    weighted = lambda v, h, batch: jnp.mean(jnp.exp(h[0]) * (v - batch[1]) ** 2)
    x, y = (jnp.asarray(a) for a in ridge_data())
    losses = gradhpo.PredictionLoss(predict, weighted), gradhpo.PredictionLoss(predict, squares)
    batch = (x[:, :3], y)
    outer = () if name == "FixedOptimizer" else (PLAIN,)
    optimizer = getattr(gradhpo, name)(inner, *outer, **SETTINGS.get(name, {}))
    step = lambda: optimizer.step(optimizer.init(W, H), batch, batch, *losses)
    if name in NEEDS_THE_LOSS:
        assert step().get_metric("rejected") == 0
    else:
        with pytest.raises(ValueError, match="Transformations that need the loss"):
            step()


@jax.jit
def searched(batches):
    """Hand-written L-BFGS, each search on its step's batch: parameters, and the last loss."""
    w, s, value = W, LBFGS.init(W), jnp.zeros(())
    for batch in batches:
        value_fn = lambda w, batch=batch: train_loss(w, H, batch)
        value, grad = jax.value_and_grad(value_fn)(w)
        updates, s = LBFGS.update(grad, s, w, value=value, grad=grad, value_fn=value_fn)
        w = w + updates
    return w, value


@pytest.mark.thorough
def test_every_search_is_on_the_batch_of_its_step():
    """It has evaluated the next parameters; the value is reused while the batch stays."""
    optimizer = gradhpo.ImplicitOptimizer(LBFGS, inner_steps=3)
    state = optimizer.init(W, H)
    of_one = jnp.stack([B, B, B])
    for batch, batches in (
        (B, of_one),
        (gradhpo.BatchStack(of_one), of_one),
        *[(gradhpo.BatchStack(x), x) for x in (jnp.stack([B, -B, 2 * B]), jnp.stack([B, B, -B]))],
    ):
        after = optimizer.step(state, batch, B, train_loss, val_loss, lr_hyper=0.0)
        w, loss = searched(batches)
        np.testing.assert_allclose(after.params, w, rtol=1e-12)
        np.testing.assert_allclose(after.get_metric("train_loss"), loss, rtol=1e-12)


def test_a_search_shortens_its_step_on_the_batch_of_that_step():
    """The second batch is so steep that the first one's step is far too long."""
    search = optax.scale_by_backtracking_linesearch(20, store_grad=False)
    inner = relaxed(optax.chain(optax.sgd(1.0), search))
    loss = lambda w, h, size: size * jnp.sum((w - h) ** 2)
    optimizer = gradhpo.ImplicitOptimizer(inner, inner_steps=2)
    start, sizes = jnp.ones(3), jnp.array([0.1, 20.0])
    state = optimizer.init(start, jnp.zeros(()))
    after = optimizer.step(state, gradhpo.BatchStack(sizes), 1.0, loss, loss, lr_hyper=0.0)
    w, s = start, inner.init(start)
    for size in sizes:
        value_fn = lambda w, size=size: loss(w, 0.0, size)
        value, grad = jax.value_and_grad(value_fn)(w)
        updates, s = inner.update(grad, s, w, value=value, grad=grad, value_fn=value_fn)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(after.params, w, rtol=1e-12)


REFUSING = [
    gradhpo.OneStepOptimizer(LBFGS),
    gradhpo.UnrolledOptimizer(POLYAK, unroll_steps=2),
    gradhpo.DrMADOptimizer(POLYAK, unroll_steps=2),
    gradhpo.T1T2Optimizer(POLYAK),
    gradhpo.GreedyOptimizer(POLYAK),
    gradhpo.OnlineHypergradientOptimizer(POLYAK),
    gradhpo.ForwardModeOptimizer(POLYAK),
]


@pytest.mark.parametrize("optimizer", REFUSING, ids=lambda optimizer: type(optimizer).__name__)
def test_methods_that_differentiate_the_update_refuse(optimizer):
    state = optimizer.init(W, H)
    with pytest.raises(ValueError, match="FixedOptimizer, EvolutionOptimizer and T1T2"):
        optimizer.step(state, B, B, train_loss, val_loss, lr_hyper=0.1)
