"""`compare_hypergradients` against closed forms, and its reports when a method fails."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import assert_same
from problems import OUTER, relaxed

import gradhpo
from gradhpo.diagnostics.cost import Program


RATE, STEPS, GAMMA, TRUNCATION = 0.1, 8, 0.9, 3
random = np.random.default_rng(4)
ROOT = random.normal(size=(5, 5))
H, Q = ROOT @ ROOT.T / 5 + np.eye(5), np.diag(random.uniform(0.5, 2, size=5))
TARGET, START, B = random.normal(size=(3, 5))


def train_loss(w, h, batch):
    b = jnp.concatenate([h["first"], h["rest"]])
    return w @ jnp.asarray(H) @ w / 2 - b @ w


def val_loss(w, h, batch):
    return (w - TARGET) @ jnp.asarray(Q) @ (w - TARGET) / 2


HYPERPARAMS = {"first": jnp.asarray(B[:2]), "rest": jnp.asarray(B[2:])}
LOSSES = gradhpo.LossFunctions(train_loss, val_loss)
SGD = relaxed(optax.sgd(RATE))
LONG = {"unroll_steps": STEPS}
OPTIMIZERS = {
    "first order": gradhpo.FOOptimizer(SGD),
    "one step": gradhpo.OneStepOptimizer(SGD),
    "T1-T2": gradhpo.T1T2Optimizer(SGD, inner_steps=4),
    "greedy": gradhpo.GreedyOptimizer(SGD, gamma=GAMMA, **LONG),
    "HyperDistill": gradhpo.OnlineHypergradientOptimizer(SGD, OUTER),
    "truncated": gradhpo.UnrolledOptimizer(SGD, truncation=TRUNCATION, **LONG),
    "short": gradhpo.UnrolledOptimizer(SGD, unroll_steps=TRUNCATION + 1),
    "DrMAD": gradhpo.DrMADOptimizer(SGD, **LONG),
    "forward mode": gradhpo.ForwardModeOptimizer(SGD, OUTER),
    "implicit": gradhpo.ImplicitOptimizer(SGD, None, lx.LU(), inner_steps=STEPS),
}
ONE = OPTIMIZERS["one step"]


def closed_forms():
    """Name to hypergradient, by math.md 8.3: w_T = w* + P^T (w_0 - w*), dw_T/db = rate sum P^k."""
    P, optimum = np.eye(5) - RATE * H, np.linalg.solve(H, B)
    power = np.linalg.matrix_power
    alpha = [Q @ (optimum + power(P, t) @ (START - optimum) - TARGET) for t in range(STEPS + 1)]
    sum_of = lambda count: RATE * sum(power(P, k) for k in range(count)) @ alpha[STEPS]
    greedy = sum(GAMMA ** (STEPS - t) * RATE * alpha[t] for t in range(1, STEPS + 1))
    return {
        "exact": sum_of(STEPS),
        "one step": RATE * alpha[STEPS],
        "T1-T2": RATE * alpha[STEPS],
        "greedy": greedy,
        "truncated": sum_of(TRUNCATION),
        "short": sum_of(TRUNCATION + 1),
        "DrMAD": sum_of(STEPS),  # no derivative depends on the path
        "forward mode": sum_of(STEPS),
        "implicit": np.linalg.solve(H, alpha[STEPS]),
    }


def compared(g, r):
    g_size, r_size = np.linalg.norm(g), np.linalg.norm(r)
    return g @ r / g_size / r_size, g_size / r_size, np.linalg.norm(g - r) / r_size


def measured(agreement, name):
    return agreement.cosine[name], agreement.norm_ratio[name], agreement.relative_error[name]


@pytest.fixture(scope="module")
def report():
    state = OPTIMIZERS["forward mode"].init(jnp.asarray(START), HYPERPARAMS)
    return gradhpo.compare_hypergradients(OPTIMIZERS, state, None, None, LOSSES)


@pytest.mark.parametrize("name", [n for n in closed_forms() if n != "exact"])
def test_agreement_equals_closed_form(name, report):
    forms = closed_forms()
    g, exact = forms[name], forms["exact"]
    np.testing.assert_allclose(measured(report, name), compared(g, exact), atol=1e-8)
    for leaf, part in {"['first']": slice(0, 2), "['rest']": slice(2, 5)}.items():
        here = report.per_leaf[leaf]
        np.testing.assert_allclose(measured(here, name), compared(g[part], exact[part]), atol=1e-8)
        same = np.mean(np.sign(g[part]) == np.sign(exact[part]))
        assert here.sign_agreement[name] == pytest.approx(same)


def test_hyperdistill_is_fitted_and_follows_the_whole_horizon(report):
    """As in a hand-written loop: theta fitted on the batches of the episode, then its steps."""
    optimizer = OPTIMIZERS["HyperDistill"]
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    batches = gradhpo.BatchStack(jnp.zeros(STEPS))
    losses = (train_loss, val_loss)
    state = optimizer.estimate_theta(state, batches, None, *losses)
    frozen = gradhpo.OnlineHypergradientOptimizer(SGD)
    for _ in range(STEPS - 1):
        state = dataclasses.replace(state, outer_opt_state=())
        state = frozen.step(state, None, None, *losses, lr_hyper=0.0)
    g = frozen.compute_hypergradient(state, None, None, *losses)
    assert state.memory.theta != optimizer.distillation_weight
    for x, y in zip(
        jax.tree.leaves(g), jax.tree.leaves(report.hypergradients["HyperDistill"]), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-10)


def test_what_is_not_seen_is_said_and_not_raised(report, recwarn):
    assert report.unseen == {"first order": ("['first']", "['rest']")}
    assert report.sees_none("first order")
    assert np.isnan(report.cosine["first order"])
    assert report.norm_ratio["first order"] == 0
    text = str(report)
    assert "sees none" in text
    assert len(recwarn) == 0
    assert all(text.split("\n\n")[1].count(f"\n{name} ") == 1 for name in OPTIMIZERS)


def test_costs_are_those_of_the_horizon(report):
    assert set(report.seconds) == {"training alone", "reference", *OPTIMIZERS} - {"first order"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert report.flops["training alone"] < report.flops["reference"]
    assert report.flops["one step"] > report.flops["truncated"]  # it estimates at every step


def test_pictures(report):
    import matplotlib as mpl

    mpl.use("agg")
    figure = report.plot()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [name for name in OPTIMIZERS if name != "first order"]


def test_a_comparison_of_nothing_that_is_seen_can_be_shown():
    import matplotlib as mpl

    mpl.use("agg")
    first_order = {"first order": OPTIMIZERS["first order"]}
    state = ONE.init(jnp.asarray(START), HYPERPARAMS)
    batches = gradhpo.BatchStack(jnp.zeros(2))
    report = gradhpo.compare_hypergradients(first_order, state, batches, None, LOSSES)
    assert "sees none" in str(report)
    assert "seeing none: first order" in report.plot().get_suptitle()


def test_given_reference_and_its_horizon():
    state = OPTIMIZERS["one step"].init(jnp.asarray(START), HYPERPARAMS)
    forms = closed_forms()
    optimizers = {"exact": gradhpo.UnrolledOptimizer(SGD, **LONG)}
    of_vector = {"first": forms["implicit"][:2], "rest": forms["implicit"][2:]}
    arguments = (optimizers, state, gradhpo.BatchStack(jnp.zeros(STEPS)), None, LOSSES)
    report = gradhpo.compare_hypergradients(*arguments, reference=of_vector)
    expected = compared(forms["exact"], forms["implicit"])
    np.testing.assert_allclose(measured(report, "exact"), expected, atol=1e-8)
    report = gradhpo.compare_hypergradients(*arguments, reference=OPTIMIZERS["one step"])
    expected = compared(forms["exact"], forms["one step"])
    np.testing.assert_allclose(measured(report, "exact"), expected, atol=1e-8)
    assert "compared with OneStepOptimizer" in str(report)


def with_rate(w, h, batch):
    return train_loss(w, h, batch) * (1 + batch)


@pytest.mark.thorough
def test_leaves_that_some_methods_cannot_see():
    """A setting of the optimizer under implicit differentiation."""
    inner = relaxed(lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.5))
    optimizers = {
        "implicit": gradhpo.ImplicitOptimizer(inner, None, lx.LU(), inner_steps=4),
        "one step": gradhpo.OneStepOptimizer(inner),
    }
    hyperparams = HYPERPARAMS | {"log_rate": jnp.asarray(-2.5)}
    state = optimizers["one step"].init(jnp.asarray(START), hyperparams)
    stack = gradhpo.BatchStack(jnp.linspace(0, 1, 4))
    losses = gradhpo.LossFunctions(with_rate, val_loss)
    report = gradhpo.compare_hypergradients(optimizers, state, stack, None, losses)
    assert report.unseen == {"implicit": ("['log_rate']",)}
    assert report.per_leaf["['log_rate']"].norm_ratio["implicit"] == 0
    text = str(report)
    assert "implicit does not see ['log_rate']" in text
    assert text.count("unseen") == 2  # in two tables
    assert set(report.metrics) == {"implicit"}
    assert report.metrics["implicit"]["linear_residual"] < 1e-12
    assert "implicit ends with inner_residual" in text
    # Frozen hyperparameters along different batches: as in a hand-written loop.
    one_step, here, pair = optimizers["one step"], state, (with_rate, val_loss)
    for t in range(3):
        here = one_step.step(here, stack.at(t), None, *pair, lr_hyper=0.0)
    g = one_step.compute_hypergradient(here, stack.at(3), None, *pair)
    for x, y in zip(
        jax.tree.leaves(g), jax.tree.leaves(report.hypergradients["one step"]), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-10)


def test_tasks():
    """The mean over tasks of their separate hypergradients."""
    starts = jnp.asarray(random.normal(size=(3, 5)))
    losses = gradhpo.LossFunctions(train_loss, lambda w, h, c: c * val_loss(w, h, None))
    wrap = lambda optimizer: gradhpo.TaskBatched(optimizer, num_tasks=3)
    optimizers = {"one step": wrap(gradhpo.OneStepOptimizer(SGD))}
    state = optimizers["one step"].init(jnp.zeros(5), HYPERPARAMS).update(params=starts)
    scale = jnp.array([1.0, 2.0, 3.0])
    batches = gradhpo.BatchStack(jnp.zeros((STEPS, 3)))
    report = gradhpo.compare_hypergradients(optimizers, state, batches, scale, losses)
    alone = gradhpo.UnrolledOptimizer(SGD, **LONG)
    g = [
        alone.compute_hypergradient(
            alone.init(starts[i], HYPERPARAMS), None, scale[i], train_loss, losses.val_loss
        )
        for i in range(3)
    ]
    expected = jax.tree.map(lambda *x: sum(x) / 3, *g)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(report.reference), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)
    assert report.cosine["one step"] < 1


def test_what_does_not_work_is_said_and_the_rest_compared():
    def update(w, h, batch):
        grow = lambda carry: (carry[0] + 1, carry[1] * h)
        return jax.lax.while_loop(lambda carry: carry[0] < 2, grow, (0, w))[1]

    optimizers = {
        "forward": gradhpo.ForwardModeOptimizer(update_fn=update),
        "reverse": gradhpo.OneStepOptimizer(update_fn=update),
    }
    state = optimizers["forward"].init(jnp.ones(3), jnp.full(3, 0.5))
    losses = gradhpo.LossFunctions(lambda w, h, b: jnp.sum(w), lambda w, h, b: jnp.sum(w**2))
    report = gradhpo.compare_hypergradients(
        optimizers, state, None, None, losses, reference=jnp.full(3, 0.5)
    )
    assert report.cosine["forward"] == pytest.approx(1)  # d(h^4)/dh at 1/2
    assert "while_loop" in report.failed["reverse"]
    assert "does not work here" in str(report)


def test_opaque_updates_need_a_reference():
    def opaque(w, h, batch):
        shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
        return jax.pure_callback(lambda w, h: w / 2 + h, shape, w, h, vmap_method="sequential")

    optimizer = gradhpo.T1T2Optimizer(update_fn=opaque, perturb="hyperparams", epsilon=1e-3)
    state = optimizer.init(jnp.ones(3), jnp.zeros(3))
    losses = gradhpo.LossFunctions(lambda w, h, b: jnp.sum(w), lambda w, h, b: jnp.sum(w**2))
    arguments = ({"T1-T2": optimizer}, state, None, None, losses)
    with pytest.raises(ValueError, match="finite_difference_hypergradient"):
        gradhpo.compare_hypergradients(*arguments)
    differences = gradhpo.finite_difference_hypergradient(
        optimizer, state, None, None, losses.train_loss, losses.val_loss
    )
    report = gradhpo.compare_hypergradients(*arguments, reference=differences)
    assert report.relative_error["T1-T2"] < 1e-8
    with pytest.raises(ValueError, match="explain_horizon takes second derivatives"):
        gradhpo.explain_horizon(optimizer, state, None, None, losses)


def test_another_inner_update_and_nan_are_remarked():
    optimizers = {
        "rate .1": gradhpo.OneStepOptimizer(SGD),
        "rate .2": gradhpo.OneStepOptimizer(relaxed(optax.sgd(0.2))),
    }
    state = optimizers["rate .1"].init(jnp.asarray(START), HYPERPARAMS)
    batches = gradhpo.BatchStack(jnp.zeros(STEPS))
    report = gradhpo.compare_hypergradients(optimizers, state, batches, None, LOSSES)
    assert list(report.remarks) == ["rate .2"]
    assert "same inner update" in str(report)
    nan = gradhpo.LossFunctions(train_loss, lambda w, h, b: val_loss(w, h, b) * jnp.nan)
    del optimizers["rate .2"]
    report = gradhpo.compare_hypergradients(optimizers, state, batches, None, nan)
    assert "check_hypergradient" in report.remarks["rate .1"]
    assert "the reference is not finite in ['first'], ['rest']" in str(report)


def test_what_is_cut_off_is_0_in_the_reference_as_well():
    frozen = lambda h: h | {"rest": jax.lax.stop_gradient(h["rest"])}
    losses = gradhpo.LossFunctions(lambda w, h, batch: train_loss(w, frozen(h), batch), val_loss)
    state = ONE.init(jnp.asarray(START), HYPERPARAMS)
    report = gradhpo.compare_hypergradients({"one step": ONE}, state, None, None, losses)
    assert report.unseen == {"one step": ("['rest']",)}
    assert "the reference is 0 in ['rest']: gradhpo.check_hypergradient says why" in str(report)
    assert "a single batch" not in str(report)  # one step has only one batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizers": {}}, "optimizers is empty"),
        ({"train_batch": gradhpo.BatchStack(jnp.zeros(9))}, "do not divide the horizon of 9"),
        ({"optimizers": {"no": 3}}, "pass a dict of name to optimizer"),
        ({"optimizers": [ONE]}, "pass a dict of name to optimizer"),
        ({"train_batch": [jnp.zeros(3)] * 4}, "train_batch is a list of 4"),
        ({"train_batch": lambda t: t}, "train_batch is a function or a data source"),
        ({"losses": (train_loss, val_loss)}, "losses must be"),
        ({"reference": jnp.zeros(5)}, "reference must be an optimizer, or a tree like"),
        ({"optimizers": {"reference": ONE}}, "which the report reserves"),
        ({"optimizers": {"a": ONE, "b": gradhpo.TaskBatched(ONE, 2)}}, "numbers of inner problems"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    arguments = {
        "optimizers": {"greedy": OPTIMIZERS["greedy"]},
        "state": OPTIMIZERS["greedy"].init(jnp.asarray(START), HYPERPARAMS),
        "train_batch": None,
        "val_batch": None,
        "losses": LOSSES,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        gradhpo.compare_hypergradients(**(arguments | change))


def test_flops_count_loops_as_often_as_they_run():
    x = jnp.ones((20, 20))

    def loops(x):
        inner = lambda y, _: (y @ x, None)
        outer = lambda y, _: (jax.lax.scan(inner, y, None, length=5)[0], None)
        return jax.lax.scan(outer, x, None, length=7)[0]

    cost = Program(loops, x).cost
    np.testing.assert_allclose(cost.flops, 35 * 2 * 20**3, rtol=0.01)
    assert not cost.at_least
    assert cost.total_bytes >= cost.temporary_bytes + 2 * x.nbytes
    open_ended = lambda x: jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: 2 * y, x)
    assert Program(open_ended, x).cost.at_least
    inner = lambda y, _: (y @ x, None)
    for unroll in (5, 7, True):
        unrolled = lambda y, unroll=unroll: jax.lax.scan(inner, y, None, length=10, unroll=unroll)
        np.testing.assert_allclose(Program(unrolled, x).cost.flops, 10 * 2 * 20**3, rtol=0.01)
    short, long = (lambda y, n=n: jax.lax.scan(inner, y, None, length=n)[0] for n in (3, 10))
    either = lambda i, y: jax.lax.switch(i, [short, long, short], y)
    cost = Program(either, jnp.asarray(1), x).cost
    np.testing.assert_allclose(cost.flops, 10 * 2 * 20**3, rtol=0.01)
    solve = lambda x: lx.linear_solve(lx.MatrixLinearOperator(x + jnp.eye(20)), x[0]).value
    assert Program(solve, x).cost.at_least
    assert Program(jax.vmap(solve), jnp.stack([x, 2 * x])).cost.at_least
    assert Program(lambda x: x, jax.ShapeDtypeStruct((3,), jnp.float32)).cost.flops == 0


@pytest.mark.thorough
def test_from_the_middle_of_a_run():
    """Every estimator starts from the moments and counts of the state."""
    inner = relaxed(optax.adam(0.1, eps_root=1e-16))
    optimizer = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=3)
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    pair = (train_loss, val_loss)
    state = optimizer.step(state, None, None, *pair)
    g = optimizer.compute_hypergradient(state, None, None, *pair)
    optimizers = {"same": optimizer, "forward": gradhpo.ForwardModeOptimizer(inner)}
    report = gradhpo.compare_hypergradients(optimizers, state, None, None, LOSSES)
    for x, y in zip(jax.tree.leaves(g), jax.tree.leaves(report.reference), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
    assert report.relative_error["same"] == 0
    assert report.relative_error["forward"] < 1e-10


@pytest.mark.parametrize(
    "optimizer",
    [
        gradhpo.GreedyOptimizer(SGD, unroll_steps=2),
        gradhpo.UnrolledOptimizer(SGD, unroll_steps=3, truncation=2),
    ],
)
def test_every_step_has_its_batches_of_the_stack(optimizer):
    """An optimizer with fewer inner steps than the horizon: as in a full loop over `step`."""
    scaled = lambda w, h, batch: (1 + 0.3 * batch) * train_loss(w, h, batch)
    batches, count = jnp.array([1.0, -1.0, 0.5, 2.0, 0.0, -0.5]), optimizer.num_inner_steps
    state = begun = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    g = None
    for first in range(0, 6, count):
        stack = gradhpo.BatchStack(batches[first : first + count])
        g = optimizer.compute_hypergradient(state, stack, None, scaled, val_loss)
        state = optimizer.step(state, stack, None, scaled, val_loss, lr_hyper=0.0)
    losses = gradhpo.LossFunctions(scaled, val_loss)
    report = gradhpo.compare_hypergradients(
        {"": optimizer}, begun, gradhpo.BatchStack(batches), None, losses
    )
    assert_same(report.hypergradients[""], g, rtol=1e-12)


def test_what_was_learned_before_is_compared_as_it_is():
    """A user's theta, which is not fitted again."""
    optimizer = gradhpo.OnlineHypergradientOptimizer(SGD, OUTER, estimation_period=None)
    batches = gradhpo.BatchStack(jnp.zeros(STEPS))
    state = optimizer.init(jnp.asarray(START), HYPERPARAMS)
    fitted = optimizer.estimate_theta(state, batches, None, train_loss, val_loss)
    report = gradhpo.compare_hypergradients({"": optimizer}, fitted, batches, None, LOSSES)
    assert report.metrics[""]["theta"] == fitted.memory.theta != state.memory.theta


@pytest.mark.thorough
def test_bfloat16(as_a_user_has_it):
    """Computed in bfloat16, compared in float64."""
    inner, short = optax.sgd(0.1), jnp.bfloat16
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * jnp.arange(1, 5, dtype=w.dtype))
    losses = gradhpo.LossFunctions(loss, lambda w, h, batch: jnp.sum((w - 1) ** 2))
    exact = gradhpo.UnrolledOptimizer(inner, unroll_steps=3)
    optimizers = {"forward": gradhpo.ForwardModeOptimizer(inner), "exact": exact}
    state = exact.init(jnp.zeros(4, short), jnp.full(4, 0.3, short))
    report = gradhpo.compare_hypergradients(optimizers, state, None, None, losses)
    assert report.relative_error["exact"] == 0
    assert report.relative_error["forward"] < 0.05
    assert jax.tree.leaves(report.reference)[0].dtype == short
