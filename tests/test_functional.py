"""Functional hypergradients against their formula in NumPy, and implicit differentiation."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import assert_same, quick
from problems import relaxed
from single_loops import BY_HAND, EXAMPLES, FEATURES, data

import gradhpo
from gradhpo.utils.warn import forget_warnings


STEPS, INNER_STEPS = 20, 3

# -- its formula, written out: v = x w, weighted fourth powers of the error, then squares ----------


def linear(w, h, batch):
    return batch[0] @ w


def fourth_powers(v, h, batch):
    return jnp.sum(jnp.exp(h) * (v - batch[1]) ** 4) / 4 + 0.1 * jnp.sum(v**2)


def squares(v, h, batch):
    return jnp.sum((v - batch[1]) ** 2) + 0.1 * jnp.sum(h**2)


TRAIN = gradhpo.PredictionLoss(linear, fourth_powers)
VAL = gradhpo.PredictionLoss(linear, squares)


def on_training(v, h, batch):
    """Derivatives by the prediction: first, second (a diagonal), and by h (another one)."""
    r, weights = v - batch[1], np.exp(h)
    return weights * r**3 + 0.2 * v, 3 * weights * r**2 + 0.2, weights * r**3


def by_hand(problem, w_step, xi_step, a_step, xi, adjoint_steps, closed_form, ridge):
    """Every outer step, with the hypergradients and the residuals of the regression."""
    w, h, found = problem.w, problem.a, []
    x_val, y_val = problem.val
    for k in range(STEPS):
        for t in range(INNER_STEPS):
            x, y = problem.batch(k, t)
            w = w_step(w, x.T @ on_training(x @ w, h, (x, y))[0])
        asked = x_val.T @ (2 * (x_val @ w - y_val))
        if closed_form:
            x, y = problem.batch(k, INNER_STEPS - 1)
            _, curvature, _ = on_training(x @ w, h, (x, y))
            matrix = x.T @ (curvature[:, None] * x) + ridge * np.eye(FEATURES)
            xi, left = np.linalg.solve(matrix, -asked), 0.0
        for j in range(0 if closed_form else adjoint_steps):
            x, y = problem.batch(k, j % INNER_STEPS)
            _, curvature, _ = on_training(x @ w, h, (x, y))
            gradient = x.T @ (curvature * (x @ xi)) + asked + ridge * xi
            xi, left = xi_step(xi, gradient), np.linalg.norm(gradient) / np.linalg.norm(asked)
        x, y = problem.batch(k, INNER_STEPS - 1)
        g = 0.2 * h + on_training(x @ w, h, (x, y))[2] * (x @ xi)
        h = a_step(h, g)
        found.append((np.linalg.norm(g), left))
    return w, h, xi, np.asarray(found).T


@pytest.mark.parametrize(
    ("inner", "adjoint", "adjoint_steps"),
    quick(
        [
            ("momentum", "Adam", 5),
            ("Adam", "momentum", 2),
            ("momentum", None, 1),
            ("Adam", None, 1),
        ],
        keep=[("Adam", "momentum", 2), ("Adam", None, 1)],
    ),
)
def test_is_its_formula(inner, adjoint, adjoint_steps):
    """Over 20 steps with mini-batches. Only rounding differs: 1e-10."""
    problem, ridge = data(STEPS, INNER_STEPS), 0.3
    (inner_optimizer, w_step), (outer_optimizer, a_step) = BY_HAND[inner], BY_HAND["Adam"]
    fits = {"closed_form": True}
    if adjoint is not None:
        fits = {"adjoint_optimizer": BY_HAND[adjoint][0], "adjoint_steps": adjoint_steps}
    xi = np.array([0.3, -0.2, 0.1])
    optimizer = gradhpo.FunctionalOptimizer(
        inner_optimizer, outer_optimizer, adjoint=xi, inner_steps=INNER_STEPS, ridge=ridge, **fits
    )
    state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a))
    norms, left = [], []
    for k in range(STEPS):
        val = tuple(map(jnp.asarray, problem.val))
        state = optimizer.step(state, problem.stack(k), val, TRAIN, VAL)
        norms.append(state.metadata["hypergrad_norm"])
        left.append(state.get_metric("linear_residual"))
    xi_step = None if adjoint is None else BY_HAND[adjoint][1]()
    given = xi, adjoint_steps, adjoint is None, ridge
    w, h, xi, expected = by_hand(problem, w_step(), xi_step, a_step(), *given)
    np.testing.assert_allclose(state.params, w, rtol=1e-10)
    np.testing.assert_allclose(state.hyperparams, h, rtol=1e-10)
    np.testing.assert_allclose(state.memory.adjoint, xi, rtol=1e-10)
    np.testing.assert_allclose(norms, expected[0], rtol=1e-10)
    np.testing.assert_allclose(left, expected[1], rtol=1e-10, atol=1e-13)  # closed form: rounding
    assert np.linalg.norm(xi) > 0.01
    assert len(problem.a) == EXAMPLES


# -- against implicit differentiation --------------------------------------------------------------

STILL = relaxed(optax.sgd(0.05))


def regression(size=20, features=4):
    random = np.random.default_rng(1)
    x = random.normal(size=(2, size, features))
    y = x[..., 0] + 0.5 * random.normal(size=(2, size))
    return [tuple(map(jnp.asarray, half)) for half in zip(x, y, strict=True)]


def weighted(v, h, batch):
    return jnp.mean(jnp.exp(h["examples"]) * (v - batch[1]) ** 2)


def both_hypergradients(train_loss, val_loss, hyperparams, **settings):
    train, val = regression()
    w = jnp.asarray([0.5, -0.3, 0.2, 0.1])
    functional = gradhpo.FunctionalOptimizer(STILL, adjoint=jnp.zeros(4), **settings)
    implicit = gradhpo.ImplicitOptimizer(STILL, linear_solver=lx.LU())
    return [
        optimizer.compute_hypergradient(
            optimizer.init(w, hyperparams), train, val, train_loss, val_loss
        )
        for optimizer in (functional, implicit)
    ]


@pytest.mark.thorough
def test_with_linear_functions_it_is_implicit_differentiation():
    """At any point of training. Two solves of well-conditioned systems: 1e-10."""
    train_loss = gradhpo.PredictionLoss(linear, weighted)
    val_loss = gradhpo.PredictionLoss(linear, lambda v, h, batch: jnp.mean((v - batch[1]) ** 2))
    h = {"examples": jnp.linspace(-1, 1, 20)}
    found, expected = both_hypergradients(train_loss, val_loss, h, closed_form=True)
    np.testing.assert_allclose(found["examples"], expected["examples"], rtol=1e-10, atol=1e-14)
    # 400 steps of gradient descent on a condition number of about 10.
    by_steps = {"adjoint_optimizer": relaxed(optax.sgd(0.1)), "adjoint_steps": 400}
    found, _ = both_hypergradients(train_loss, val_loss, h, **by_steps)
    np.testing.assert_allclose(found["examples"], expected["examples"], rtol=1e-8, atol=1e-10)


def beside_the_weights(w, h, batch):
    return {"output": batch[0] @ w, "weights": w}


def ridge(v, h, batch):
    return jnp.mean((v["output"] - batch[1]) ** 2) + jnp.exp(h) @ v["weights"] ** 2


@pytest.mark.thorough
def test_a_penalty_on_weights_that_predict_returns_is_seen():
    """Two solves of well-conditioned systems: 1e-10."""
    val = lambda v, h, batch: jnp.mean((v["output"] - batch[1]) ** 2)
    losses = [gradhpo.PredictionLoss(beside_the_weights, loss) for loss in (ridge, val)]
    found, expected = both_hypergradients(*losses, jnp.full(4, -1.0), closed_form=True)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.thorough
def test_a_singular_regression_has_the_smallest_solution_and_says_what_is_left():
    """Five examples for eight parameters, like NumPy's least squares. Rounding: 1e-10."""
    random = np.random.default_rng(2)
    x, x_val = random.normal(size=(5, 8)), random.normal(size=(3, 8))
    train, val = (jnp.asarray(x), jnp.zeros(5)), (jnp.asarray(x_val), jnp.ones(3))
    optimizer = gradhpo.FunctionalOptimizer(
        STILL, optax.sgd(0.1), adjoint=jnp.zeros(8), closed_form=True
    )
    half = lambda v, h, batch: jnp.sum(jnp.exp(h) * (v - batch[1]) ** 2) / 2
    losses = [gradhpo.PredictionLoss(linear, loss) for loss in (half, squares)]
    state = optimizer.init(jnp.zeros(8), jnp.zeros(5))
    state = optimizer.step(state, train, val, *losses)
    asked = x_val.T @ (2 * (x_val @ np.asarray(state.params) - 1))
    solution = np.linalg.lstsq(x.T @ x, -asked, rcond=1e-12)[0]
    np.testing.assert_allclose(state.memory.adjoint, solution, rtol=1e-10)
    left = np.linalg.norm(x.T @ x @ solution + asked) / np.linalg.norm(asked)
    np.testing.assert_allclose(state.get_metric("linear_residual"), left, rtol=1e-10)
    assert left > 0.1
    both = gradhpo.LossFunctions(*losses)
    with pytest.warns(RuntimeWarning, match="do not show"):
        gradhpo.run(optimizer, state, both, train, val, num_steps=4, progress=False)


def test_no_second_derivative_by_weights_is_taken():
    """A model with an opaque gradient: no other method that sees the optimum accepts it."""

    @jax.custom_vjp
    def opaque(w, x):
        return x @ w

    def backward(x, bar):
        shape = jax.ShapeDtypeStruct((4,), x.dtype)
        made = jax.pure_callback(lambda x, bar: np.asarray(x).T @ np.asarray(bar), shape, x, bar)
        return made, jnp.zeros_like(x)

    opaque.defvjp(lambda w, x: (x @ w, x), backward)
    train, val = regression()
    h, w = {"examples": jnp.zeros(20)}, jnp.ones(4)
    by_steps = {"adjoint_optimizer": relaxed(optax.sgd(0.1)), "adjoint_steps": 5}
    optimizer = gradhpo.FunctionalOptimizer(STILL, adjoint=jnp.zeros(4), **by_steps)
    error = lambda v, h, batch: jnp.mean((v - batch[1]) ** 2)
    losses = [
        [gradhpo.PredictionLoss(predict, loss) for loss in (weighted, error)]
        for predict in (linear, lambda w, h, batch: opaque(w, batch[0]))
    ]
    expected, found = (
        optimizer.compute_hypergradient(optimizer.init(w, h), train, val, *pair) for pair in losses
    )
    assert_same(found, expected, rtol=1e-12)  # the same sums in NumPy
    implicit = gradhpo.ImplicitOptimizer(STILL)
    with pytest.raises(ValueError, match="derivative"):
        implicit.compute_hypergradient(implicit.init(w, h), train, val, *losses[1])


# -- networks, episodes, refusals ------------------------------------------------------------------


def new_network(key):
    return eqx.nn.MLP(4, "scalar", 6, 1, jnp.tanh, key=key)


@pytest.mark.thorough
def test_a_network_has_a_network_for_its_adjoint_that_survives_episodes():
    """Its module holds functions besides arrays; the adjoint has separate weights."""
    train, val = regression()
    predict = lambda model, h, batch: jax.vmap(model)(batch[0])
    losses = gradhpo.LossFunctions(
        gradhpo.PredictionLoss(predict, weighted),
        gradhpo.PredictionLoss(predict, lambda v, h, batch: jnp.mean((v - batch[1]) ** 2)),
    )
    adjoint = new_network(jax.random.key(1))
    optimizer = gradhpo.FunctionalOptimizer(
        STILL,
        relaxed(optax.adam(0.05)),
        adjoint=adjoint,
        adjoint_optimizer=relaxed(optax.adam(0.01)),
        inner_steps=2,
        adjoint_steps=3,
    )
    start = new_network(jax.random.key(0))
    state = optimizer.init(start, {"examples": jnp.zeros(20)})
    state, history = gradhpo.run(optimizer, state, losses, train, val, num_steps=20, progress=False)
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert history["linear_residual"][-1] < history["linear_residual"][0]
    again = optimizer.restart(state, start, reptile_rate=0.0)
    assert_same(again.memory, state.memory)
    assert_same(again.params, start)
    moved = gradhpo.tree_l2_norm(eqx.filter(state.memory.adjoint, eqx.is_inexact_array))
    assert moved != gradhpo.tree_l2_norm(eqx.filter(adjoint, eqx.is_inexact_array))
    # `run` has not donated the optimizer's own arrays.
    assert_same(
        optimizer.init(start, state.hyperparams).memory.adjoint.layers,
        tuple(eqx.filter(adjoint, eqx.is_inexact_array).layers),
    )


def test_a_refused_step_keeps_the_adjoint():
    train, val = regression()
    losses = [gradhpo.PredictionLoss(linear, loss) for loss in (weighted, squares_alone)]
    optimizer = gradhpo.FunctionalOptimizer(
        STILL, relaxed(optax.sgd(0.1)), adjoint=jnp.zeros(4), adjoint_optimizer=STILL
    )
    state = optimizer.init(jnp.zeros(4), {"examples": jnp.zeros(20)})
    state = optimizer.step(state, train, val, *losses)
    after = optimizer.step(state, train, (jnp.full_like(val[0], jnp.nan), val[1]), *losses)
    assert after.metadata["rejected"] == 1
    assert_same(after.memory.adjoint, state.memory.adjoint)
    assert np.isnan(after.get_metric("linear_residual"))
    assert np.isfinite(state.get_metric("linear_residual"))


def squares_alone(v, h, batch):
    return jnp.mean((v - batch[1]) ** 2)


# -- an ordinary loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls",
    quick(
        [gradhpo.FOOptimizer, gradhpo.OneStepOptimizer, gradhpo.T1T2Optimizer,
         gradhpo.GreedyOptimizer, gradhpo.OnlineHypergradientOptimizer, gradhpo.DrMADOptimizer,
         gradhpo.ForwardModeOptimizer, gradhpo.ImplicitOptimizer, gradhpo.NHGDOptimizer,
         gradhpo.PenaltyOptimizer, gradhpo.BOMEOptimizer, gradhpo.UnrolledOptimizer],
        keep=[],
    ),
)  # fmt: skip
def test_every_other_optimizer_takes_it_as_the_plain_loss(cls):
    """The same program: only rounding may differ, 1e-12."""
    problem = data(2, 1)
    val = tuple(map(jnp.asarray, problem.val))
    plain = [lambda w, h, batch, of=of: of(linear(w, h, batch), h, batch)
             for of in (fourth_powers, squares)]  # fmt: skip
    optimizer = cls(relaxed(optax.sgd(0.001)), relaxed(optax.sgd(0.1)))
    made = []
    for losses in (plain, (TRAIN, VAL)):
        state = optimizer.init(jnp.asarray(problem.w), jnp.asarray(problem.a))
        for k in range(2):
            state = optimizer.step(state, problem.stack(k).at(0), val, *losses)
        made.append(state)
    assert_same(made[1], made[0], rtol=1e-12)
    assert not np.array_equal(made[0].hyperparams, problem.a)


def test_it_returns_metrics_and_a_model_state_as_any_loss_does():
    batch = (jnp.ones((4, 3)), jnp.zeros(4))
    plain = lambda v, h, batch: jnp.mean(v)
    measured = lambda v, h, batch: (jnp.mean(v), {"largest": jnp.max(v)})
    loss = gradhpo.PredictionLoss(linear, measured)
    value, metrics = loss(jnp.ones(3), None, batch)
    assert (value, metrics["largest"], loss.value(jnp.ones(4), None, batch)) == (3, 3, 1)
    running = lambda w, h, batch, r: (batch[0] @ w, r + 1)
    assert gradhpo.PredictionLoss(running, plain)(jnp.ones(3), None, batch, 1) == (3, 2)
    value, (new, metrics) = gradhpo.PredictionLoss(running, measured)(jnp.ones(3), None, batch, 1)
    assert (value, new, metrics["largest"]) == (3, 2, 3)
    without = gradhpo.PredictionLoss(lambda w, h, batch, r: batch[0] @ w, plain)
    with pytest.raises(ValueError, match=r"return \(predictions, new_model_state\)"):
        without(jnp.ones(3), None, batch, 1)
    with pytest.raises(TypeError, match=r"predict\(params, hyperparams, batch"):
        gradhpo.PredictionLoss(lambda w, batch: w, plain)
    with pytest.raises(TypeError, match=r"loss\(predictions, hyperparams, batch\)"):
        gradhpo.PredictionLoss(linear, lambda v, batch: v)


@pytest.mark.thorough
def test_metrics_of_both_losses_are_recorded():
    train, val = regression()
    loss = lambda v, h, batch: (weighted(v, h, batch), {"largest": jnp.max(v)})
    optimizer = gradhpo.FunctionalOptimizer(
        STILL, relaxed(optax.sgd(0.1)), adjoint=jnp.zeros(4), adjoint_optimizer=STILL
    )
    state = optimizer.init(jnp.ones(4), {"examples": jnp.zeros(20)})
    state = optimizer.step(state, train, val, *[gradhpo.PredictionLoss(linear, loss)] * 2)
    expected = jnp.max(linear(state.params, None, val))
    np.testing.assert_allclose(state.get_metric("val_largest"), expected, rtol=1e-12)
    np.testing.assert_allclose(state.get_metric("train_largest"), jnp.max(train[0].sum(1)))


# -- errors ----------------------------------------------------------------------------------------


def test_settings_that_do_not_fit():
    make = lambda **settings: gradhpo.FunctionalOptimizer(STILL, adjoint=jnp.zeros(3), **settings)
    with pytest.raises(ValueError, match="nothing that fits the adjoint: pass adjoint_optimizer="):
        make()
    with pytest.raises(ValueError, match="closed_form=True solves for the adjoint"):
        make(closed_form=True, adjoint_optimizer=STILL)
    with pytest.raises(ValueError, match="ridge"):
        make(closed_form=True, ridge=-1.0)
    for count in ("inner_steps", "adjoint_steps"):
        with pytest.raises(ValueError, match=count):
            make(closed_form=True, **{count: 0})
    with pytest.raises(TypeError, match=r"predict\(adjoint, hyperparams, batch\)"):
        make(closed_form=True, predict=lambda xi, batch: xi)
    with pytest.raises(ValueError, match="adjoint has no floating-point arrays"):
        gradhpo.FunctionalOptimizer(STILL, adjoint=jnp.tanh, closed_form=True)
    assert make(closed_form=True).with_num_steps(7).num_inner_steps == 7
    large = gradhpo.FunctionalOptimizer(STILL, adjoint=jnp.zeros(2_001), closed_form=True)
    with pytest.warns(UserWarning, match="2,001 x 2,001"):
        large.init(jnp.zeros(3), jnp.zeros(3))


SQUARES = gradhpo.PredictionLoss(linear, squares)
WEIGHTED = gradhpo.PredictionLoss(linear, weighted)


def hypergradient(train_loss, val_loss, h=None, model_state=None, **settings):
    train, val = regression()
    settings = {"closed_form": True, "adjoint": jnp.zeros(4)} | settings
    optimizer = gradhpo.FunctionalOptimizer(STILL, **settings)
    h = {"examples": jnp.zeros(20)} if h is None else h
    state = optimizer.init(jnp.ones(4), h, model_state=model_state)
    return optimizer.compute_hypergradient(state, train, val, train_loss, val_loss)


def test_other_losses_and_adjoints_that_do_not_fit_say_what_to_write():
    plain = lambda w, h, batch: jnp.mean(batch[0] @ w) * jnp.sum(h["examples"])
    with pytest.raises(TypeError, match=r"train_loss = gradhpo.PredictionLoss\(predict, loss\)"):
        hypergradient(plain, WEIGHTED)
    with pytest.raises(TypeError, match=r"val_loss = gradhpo.PredictionLoss\(predict, loss\)"):
        hypergradient(WEIGHTED, plain)
    for bend in (jnp.tanh, jax.nn.relu, jnp.abs, jnp.sort, lambda v: jnp.clip(v, -1.0, 1.0)):
        bent = lambda xi, h, batch, bend=bend: bend(batch[0] @ xi)
        with pytest.raises(ValueError, match="linear in its parameters"):
            hypergradient(WEIGHTED, WEIGHTED, predict=bent)
    columns = lambda xi, h, batch: (batch[0] @ xi)[:, None]
    with pytest.raises(ValueError, match="what the adjoint function returned"):
        hypergradient(WEIGHTED, WEIGHTED, predict=columns)
    running = gradhpo.PredictionLoss(lambda w, h, batch, r: (batch[0] @ w, r), weighted)
    with pytest.raises(ValueError, match="takes no model_state"):
        hypergradient(running, running, model_state=jnp.zeros(2))


@pytest.mark.thorough
@pytest.mark.parametrize("adjoint_optimizer", [None, relaxed(optax.sgd(0.1))])
def test_frozen_leaves_of_the_adjoint_are_constants(adjoint_optimizer):
    """Like frozen leaves of params: a fixed scale equals scaled features."""
    scale = jnp.arange(1.0, 5.0)
    of_tree = lambda tree, h, batch: batch[0] @ (tree["scale"] * tree["xi"])
    plain = lambda xi, h, batch: batch[0] @ (scale * xi)
    closed = {"adjoint_optimizer": adjoint_optimizer, "closed_form": adjoint_optimizer is None}
    marked = {"xi": jnp.zeros(4), "scale": gradhpo.frozen(scale)}
    found = hypergradient(WEIGHTED, WEIGHTED, predict=of_tree, adjoint=marked, **closed)
    expected = hypergradient(WEIGHTED, WEIGHTED, predict=plain, **closed)
    assert_same(found, expected)


@pytest.mark.thorough
def test_hyperparameters_inside_predict_are_named():
    """They act on the prediction, which is the variable: the other methods see them."""
    scaled = lambda w, h, batch: batch[0] @ (w * jnp.exp(h["scale"]))
    error = lambda v, h, batch: jnp.mean((v - batch[1]) ** 2)
    h = {"examples": jnp.zeros(20), "scale": jnp.zeros(4)}
    losses = [gradhpo.PredictionLoss(scaled, loss) for loss in (weighted, error)]
    with pytest.warns(UserWarning, match=r"0 for hyperparams \['scale'\], which act inside"):
        found = hypergradient(*losses, h)
    assert_same(found["scale"], jnp.zeros(4))
    forget_warnings()
    both = lambda v, h, batch: weighted(v, h, batch) + jnp.sum(h["scale"]) * jnp.mean(v**2)
    with pytest.warns(UserWarning, match=r"ignores the effect of hyperparams \['scale'\] inside"):
        hypergradient(gradhpo.PredictionLoss(scaled, both), losses[1], h)
    alone = gradhpo.PredictionLoss(scaled, error)
    with pytest.raises(ValueError, match=r"sees none.*depends on them .*scale.*: inside predict"):
        hypergradient(alone, alone, {"scale": jnp.zeros(4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(WEIGHTED, gradhpo.PredictionLoss(linear, error))
