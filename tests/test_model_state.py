"""Running state of a model: batch statistics, averages of the weights, target networks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, quick, relative_error
from problems import OUTER, relaxed
from test_contract import ADAM, OF_ANY_LOSS, PLAIN, build, kept_steps

import gradhpo
from gradhpo.utils.tracing import num_traces


MOMENTUM = relaxed(optax.sgd(0.1, momentum=0.9))
STEPS = 4


# -- batch statistics --------------------------------------------------------------------------


class Network(eqx.Module):
    """A convolutional network with BatchNorm and dropout, and two hyperparameters."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    out: eqx.nn.Linear
    log_decay: jax.Array
    scale: jax.Array  # of training images: an augmentation, which acts on the statistics

    def __init__(self, key, mode="batch"):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 3, 3, key=first)
        self.norm = eqx.nn.BatchNorm(3, axis_name="batch", mode=mode, momentum=0.7)
        self.drop = eqx.nn.Dropout(0.3)
        self.out = eqx.nn.Linear(3 * 9, 4, key=second)
        self.log_decay, self.scale = jnp.array(-3.0), jnp.array(1.1)

    def __call__(self, x, key, model_state):
        x, model_state = self.norm(self.conv(x), model_state)
        return self.out(self.drop(jnp.tanh(x).ravel(), key=key)), model_state


@gradhpo.model_loss
def cnn_train_loss(model, batch, model_state):
    x, y, key = batch
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
    logits, model_state = forward(model.scale * x, jax.random.split(key, len(x)), model_state)
    weights = jnp.sum(model.conv.weight**2) + jnp.sum(model.out.weight**2)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss + jnp.exp(model.log_decay) * weights, model_state


@gradhpo.model_loss
def cnn_val_loss(model, batch, model_state):
    x, y, _ = batch
    model = eqx.nn.inference_mode(model)
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, None, None), out_axes=(0, None))
    logits, _ = forward(x, None, model_state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@pytest.fixture
def promotes():
    """`eqx.nn.BatchNorm` takes a power of a number and a count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CNN_LOSSES = gradhpo.LossFunctions(cnn_train_loss, cnn_val_loss)


def network(mode="batch"):
    model, model_state = eqx.nn.make_with_state(Network)(jax.random.key(0), mode)
    return *gradhpo.partition(model, lambda m: (m.log_decay, m.scale)), model_state


def images(number, steps=None):
    keys = jax.random.split(jax.random.key(number), 3)
    lead = () if steps is None else (steps,)
    x = jax.random.normal(keys[0], (*lead, 8, 1, 5, 5))
    y = jax.random.randint(keys[1], (*lead, 8), 0, 4)
    key = keys[2] if steps is None else jax.random.split(keys[2], steps)
    return (x, y, key) if steps is None else gradhpo.BatchStack((x, y, key))


@pytest.mark.parametrize(
    ("inner", "mode"),
    quick(
        [(inner, mode) for inner in (MOMENTUM, ADAM) for mode in ("batch", "ema")],
        keep=[],
    ),
)
def test_a_batchnorm_network_is_differentiated_through_its_statistics(inner, mode, promotes):
    """Validation in inference mode, so the path includes the statistics of training."""
    params, hyperparams, model_state = network(mode)
    given = images(1, STEPS), images(2), CNN_LOSSES

    def found(optimizer):
        state = optimizer.init(params, hyperparams, model_state=model_state)
        return optimizer.compute_hypergradient(state, *given), state

    unrolled = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=STEPS)
    exact, state = found(unrolled)
    differences = gradhpo.finite_difference_hypergradient(unrolled, state, *given)
    assert relative_error(exact, differences) < 1e-6
    for other in (
        gradhpo.ForwardModeOptimizer(inner, OUTER, unroll_steps=STEPS),
        gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=STEPS, checkpoints="sqrt"),
    ):
        assert relative_error(found(other)[0], exact) < 1e-10
    # The statistics matter: holding them constant changes the hypergradient.
    held = lambda p, h, b, r: cnn_val_loss(p, h, b, jax.lax.stop_gradient(r))
    with pytest.warns(UserWarning, match="stops the gradient"):
        without = unrolled.compute_hypergradient(state, *given[:2], cnn_train_loss, held)
    assert relative_error(without, exact) > 0.01


@pytest.mark.thorough
def test_a_state_of_equinox_goes_around(tmp_path, promotes):
    """It may be used once, and every call makes a new one: in loops, runs, checkpoints, copies."""
    params, hyperparams, model_state = network()
    optimizer = gradhpo.OneStepOptimizer(ADAM, OUTER)
    state = optimizer.init(params, hyperparams, model_state=model_state)
    first = lambda state: state.model_state.get(state.params.norm.batch_counter)
    for _ in range(2):
        state = optimizer.step(state, images(1), images(2), CNN_LOSSES)
    assert first(state) == 2
    data = lambda i: jax.tree.map(lambda x: x, images(1))
    run = lambda steps: gradhpo.run(
        optimizer, state, CNN_LOSSES, data, images(2), num_steps=steps, chunk_size=2,
        progress=False, checkpoint=tmp_path / "run",
    )[0]  # fmt: skip
    run(2)
    assert first(run(4)) == 6
    assert first(optimizer.step(state, images(1), images(2), CNN_LOSSES)) == 3


# -- averages of the weights and target networks -----------------------------------------------


def average_train(w, h, batch, r):
    """The state: an average of the weights, a count, and a flag."""
    loss = jnp.sum(jnp.square(w - h) * (1 + 0.1 * batch)) / 2
    kept = jax.nn.sigmoid(h)
    average = kept * r["average"] + (1 - kept) * w
    return loss, {"average": average, "count": r["count"] + 1, "begun": jnp.asarray(True)}


def average_val(w, h, batch, r):
    return jnp.sum(jnp.square(r["average"] - 1) + 0.1 * jnp.square(h - 1)) / 2 + 0 * jnp.sum(batch)


def target_train(w, h, batch, r):
    """A step towards a target from an older network; validation does not read the state."""
    x, y = batch
    towards = jnp.tanh(x @ r["w"])
    value = jnp.tanh(x @ w)
    loss = jnp.mean(jnp.square(value - y)) + jnp.exp(h[0]) * jnp.mean(jnp.square(value - towards))
    rate = jax.nn.sigmoid(h[1])
    return loss, {"w": (1 - rate) * r["w"] + rate * w}


def target_val(w, h, batch, r):
    x, y = batch
    return jnp.mean(jnp.square(jnp.tanh(x @ w) - y))


AVERAGE = gradhpo.LossFunctions(average_train, average_val)
BEGIN = {"average": jnp.full(3, 0.2), "count": jnp.zeros((), jnp.int32), "begun": jnp.array(False)}
W, H = jnp.array([0.5, -0.4, 0.3]), jnp.array([-1.0, 0.2, 0.4])
BATCH = jnp.array([0.5, 1.0, -0.5])


def problem_of(kind):
    if kind == "average":
        batches = jnp.stack([BATCH * (i + 1) for i in range(STEPS)])
        return W, H, BEGIN, batches, BATCH, AVERAGE
    keys = jax.random.split(jax.random.key(3), 4)
    x, y = jax.random.normal(keys[0], (STEPS, 6, 3)), jax.random.normal(keys[1], (STEPS, 6))
    val = jax.random.normal(keys[2], (6, 3)), jax.random.normal(keys[3], (6,))
    losses = gradhpo.LossFunctions(target_train, target_val)
    return W, H[:2], {"w": -W}, (x, y), val, losses


@pytest.mark.parametrize(
    ("kind", "inner"),
    quick(
        [(kind, inner) for kind in ("average", "target") for inner in (MOMENTUM, ADAM)],
        keep=[("target", ADAM)],
    ),
)
def test_exact_methods_go_through_it(kind, inner):
    w, h, r, batches, val, losses = problem_of(kind)
    given = gradhpo.BatchStack(batches), val, losses

    def found(optimizer):
        state = optimizer.init(w, h, model_state=r)
        return optimizer.compute_hypergradient(state, *given), state

    unrolled = gradhpo.UnrolledOptimizer(inner, OUTER, unroll_steps=STEPS)
    exact, state = found(unrolled)
    differences = gradhpo.finite_difference_hypergradient(unrolled, state, *given)
    assert relative_error(exact, differences) < 1e-6
    forward = gradhpo.ForwardModeOptimizer(inner, OUTER, unroll_steps=STEPS)
    assert relative_error(found(forward)[0], exact) < 1e-10


# -- every estimate against its formula --------------------------------------------------------


def by_hand(batches, val, losses):
    """Φ for SGD of rate 0.1, and the validation loss, as functions of (w, numbers of r)."""

    def phi(z, h, t):
        w, r = z
        batch = jax.tree.map(lambda x: x[t], batches)
        (_, new), g = jax.value_and_grad(losses.train_loss, has_aux=True)(w, h, batch, r | REST)
        return w - 0.1 * g, {name: new[name] for name in r}

    return phi, lambda z, h: losses.val_loss(z[0], h, val, z[1] | REST)


REST = {"count": jnp.zeros((), jnp.int32), "begun": jnp.array(False)}


def add(*trees):
    return jax.tree.map(lambda *x: sum(x), *trees)


def formulas(kind):
    """The estimates of all methods, written out with `jax.vjp`."""
    w, h, r, batches, val, losses = problem_of(kind)
    phi, loss = by_hand(batches, val, losses)
    path = [(w, {name: x for name, x in r.items() if name not in REST})]
    for t in range(STEPS):
        path.append(phi(path[-1], h, t))
    alpha = [jax.grad(loss)(z, h) for z in path]
    direct = jax.grad(loss, 1)(path[-1], h)
    pull = lambda z, t, bar: jax.vjp(lambda z, h: phi(z, h, t), z, h)[1](bar)
    last = STEPS - 1

    def back(states):
        bar, total = alpha[-1], direct
        for t in reversed(range(STEPS)):
            bar, term = pull(states[t], t, bar)
            total = add(total, term)
        return total

    on_line = lambda t: jax.tree.map(
        lambda x, y: (1 - t / STEPS) * x + t / STEPS * y, path[0], path[-1]
    )
    first = path[1]
    of_first = jax.grad(loss)(first, h)
    direct_first = jax.grad(loss, 1)(first, h)
    one_step = add(direct_first, pull(path[0], 0, of_first)[1])
    without_r = of_first[0], jax.tree.map(jnp.zeros_like, of_first[1])
    return {
        "first order": direct_first,
        "one step": one_step,
        "T1-T2 by hyperparams": add(direct, pull(path[last], last, alpha[-1])[1]),
        "greedy": add(
            direct, *(0.9 ** (last - t) * pull(path[t], t, alpha[t + 1])[1] for t in range(STEPS))
        ),
        "HyperDistill": add(direct_first, 0.1 * pull(path[0], 0, without_r)[1]),
        "DrMAD": back([on_line(t) for t in range(STEPS)]),
        "truncated": add(
            direct,
            pull(path[last], last, alpha[-1])[1],
            pull(path[last - 1], last - 1, pull(path[last], last, alpha[-1])[0])[1],
        ),
        "unrolled": back(path),
    }


@pytest.mark.parametrize("kind", quick(["average", "target"], keep=[]))
def test_every_method_sees_of_it_what_its_formula_says(kind):
    w, h, r, batches, val, losses = problem_of(kind)
    expected = formulas(kind)
    for name, formula in expected.items():
        if name == "T1-T2 by hyperparams":
            optimizer = gradhpo.T1T2Optimizer(
                PLAIN, OUTER, inner_steps=STEPS, perturb="hyperparams", epsilon=1e-5
            )
        else:
            optimizer = build(name, PLAIN)
        if name == "first order" and kind == "target":
            continue  # it sees nothing here
        steps = optimizer.num_inner_steps
        train = gradhpo.BatchStack(jax.tree.map(lambda x, steps=steps: x[:steps], batches))
        state = optimizer.init(w, h, model_state=r)
        found = optimizer.compute_hypergradient(state, train, val, losses)
        tolerance = 1e-6 if name.startswith("T1-T2") else 1e-10
        np.testing.assert_allclose(found, formula, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.thorough
def test_t1_t2_by_weights_is_the_exact_last_step_up_to_its_difference():
    w, h, r, batches, val, losses = problem_of("average")
    optimizer = gradhpo.T1T2Optimizer(PLAIN, OUTER, inner_steps=STEPS, epsilon=1e-5)
    state = optimizer.init(w, h, model_state=r)
    found = optimizer.compute_hypergradient(state, gradhpo.BatchStack(batches), val, losses)
    np.testing.assert_allclose(found, formulas("average")["T1-T2 by hyperparams"], rtol=1e-6)


@pytest.mark.thorough
def test_at_an_optimum_it_has_settled():
    """The average then equals the parameters, which equal the hyperparameters."""
    optimizer = gradhpo.ImplicitOptimizer(PLAIN, OUTER)
    state = optimizer.init(H, H, model_state=BEGIN | {"average": H})
    found = optimizer.compute_hypergradient(state, BATCH, BATCH, AVERAGE)
    np.testing.assert_allclose(found, (H - 1) + 0.1 * (H - 1), rtol=1e-8)
    # A hyperparameter that acts only on the state is seen: r = (1 - c) r + c (w + h).
    train = lambda w, h, batch, r: (jnp.sum(w**2), 0.8 * r + 0.2 * (w + h))
    val = lambda w, h, batch, r: jnp.sum((r - 1) ** 2) / 2
    state = optimizer.init(jnp.zeros(3), H, model_state=H)
    found = optimizer.compute_hypergradient(state, None, None, train, val)
    np.testing.assert_allclose(found, H - 1, rtol=1e-8)
    # If training reads it, that effect is left out, with a warning.
    w, h, r, batches, val, losses = problem_of("target")
    batch = jax.tree.map(lambda x: x[0], batches)
    state = optimizer.init(w, h, model_state=r)
    with pytest.warns(UserWarning, match="holds the model state constant"):
        optimizer.compute_hypergradient(state, batch, val, losses)


@pytest.mark.thorough
def test_what_has_not_settled_is_a_gap():
    """For a zero-debiased average, and for a state that diverges."""
    debiased = lambda r: r["sum"] / (1 - 0.99 ** r["count"].astype(float))
    next_of = lambda r, w: {"sum": 0.99 * r["sum"] + 0.01 * w, "count": r["count"] + 1}
    train = lambda w, h, batch, r: (jnp.sum((w - h) ** 2), next_of(r, w))
    val = lambda w, h, batch, r: jnp.sum(jnp.square(debiased(r) - 1)) / 2
    optimizer = gradhpo.ImplicitOptimizer(relaxed(optax.sgd(0.5)), OUTER)
    begin = {"sum": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}
    state = optimizer.init(W, H, model_state=begin)
    state = optimizer.step(state, None, None, train, val)
    assert state.get_metric("optimality_gap") > 1
    grows = lambda w, h, batch, r: (jnp.sum((w - h) ** 2), 1.5 * r + w)
    state = optimizer.init(W, H, model_state=jnp.ones(3))
    val = lambda w, h, batch, r: jnp.sum(jnp.square(r - 1)) / 2
    state = optimizer.step(state, None, None, grows, val)
    assert state.get_metric("optimality_gap") > 1


@pytest.mark.thorough
def test_the_settled_state_has_second_derivatives():
    train = lambda w, h, batch, r: (jnp.sum((w - h) ** 2 + 0.1 * w**4), 0.9 * r + 0.1 * w**2)
    val = lambda w, h, batch, r: jnp.sum(r**2) + 0.1 * jnp.sum(h**2)
    optimizer = gradhpo.ImplicitOptimizer(relaxed(optax.sgd(0.1)), OUTER, inner_steps=200)

    def hypergradient(h):
        state = optimizer.init(W, h, model_state=jnp.zeros(3))
        return optimizer.compute_hypergradient(state, None, None, train, val)

    reverse = jax.jacrev(hypergradient)(H)
    np.testing.assert_allclose(reverse, jax.jacfwd(hypergradient)(H), rtol=1e-8)
    difference = lambda e: (hypergradient(H + e) - hypergradient(H - e)) / 2e-4
    columns = jnp.stack([difference(1e-4 * row) for row in jnp.eye(3)], axis=1)
    np.testing.assert_allclose(reverse, columns, rtol=1e-4, atol=1e-6)


def test_what_comes_back_a_step_later_is_seen():
    """The state holds the previous step's parameters, and validation reads nothing else."""
    train = lambda w, h, batch, r: (jnp.sum((w - h) ** 2), w)
    val = lambda w, h, batch, r: jnp.sum(r**2)
    exact = gradhpo.UnrolledOptimizer(PLAIN, OUTER, unroll_steps=STEPS)
    state = exact.init(W, H, model_state=W)
    found = exact.compute_hypergradient(state, None, None, train, val)
    share = 1 - 0.8 ** (STEPS - 1)
    np.testing.assert_allclose(found, 2 * share * (W + share * (H - W)), rtol=1e-10)
    one = gradhpo.OneStepOptimizer(PLAIN, OUTER)
    with pytest.raises(ValueError, match="sees none of the hyperparameters"):
        one.compute_hypergradient(one.init(W, H, model_state=W), None, None, train, val)


def test_an_infinity_of_the_start_stays_with_the_start():
    optimizer = gradhpo.OneStepOptimizer(PLAIN, OUTER)
    train = lambda w, h, batch, r: (jnp.sum((w - h) ** 2), jnp.maximum(r, w))
    val = lambda w, h, batch, r: jnp.sum(w**2)
    state = optimizer.init(W, H, model_state=jnp.full(3, -jnp.inf))
    state, history = gradhpo.run(
        optimizer, state, gradhpo.LossFunctions(train, val), None, None,
        num_steps=4, steps_per_episode=2, progress=False,
    )  # fmt: skip
    assert history["rejected"][-1] == 0
    assert np.all(np.isfinite(state.model_state))


def test_a_state_that_is_not_finite_is_blamed():
    optimizer = gradhpo.OneStepOptimizer(PLAIN, OUTER)
    train = lambda w, h, batch, r: (jnp.sum((w - h) ** 2), jnp.log(-1 - w**2))
    val = lambda w, h, batch, r: jnp.sum(w**2)
    losses = gradhpo.LossFunctions(train, val)
    state = optimizer.init(W, H, model_state=W)
    with pytest.warns(RuntimeWarning, match="new model state that train_loss_fn returns is not"):
        gradhpo.run(optimizer, state, losses, None, None, num_steps=4, progress=False)
    report = gradhpo.check_hypergradient(optimizer, state, None, None, losses)
    assert "the new model state" in str(report)


def test_by_hand_it_is_returned_with_the_gradient_or_the_parameters():
    given = BATCH, BATCH, AVERAGE
    plain = gradhpo.UnrolledOptimizer(PLAIN, OUTER, unroll_steps=3)

    def gradient(w, h, batch, r):
        g, r = jax.grad(average_train, has_aux=True)(w, h, batch, r)
        return g, r

    def update(w, h, batch, r):
        g, r = gradient(w, h, batch, r)
        return w - 0.1 * g, r

    expected = plain.step(plain.init(W, H, model_state=BEGIN), *given)
    for optimizer in (
        gradhpo.UnrolledOptimizer(PLAIN, OUTER, unroll_steps=3, grad_fn=gradient),
        gradhpo.UnrolledOptimizer(outer_optimizer=OUTER, unroll_steps=3, update_fn=update),
        gradhpo.ForwardModeOptimizer(PLAIN, OUTER, unroll_steps=3, grad_fn=gradient),
        gradhpo.ForwardModeOptimizer(outer_optimizer=OUTER, unroll_steps=3, update_fn=update),
    ):
        found = optimizer.step(optimizer.init(W, H, model_state=BEGIN), *given)
        for part in ("params", "hyperparams", "model_state"):
            assert_same(getattr(found, part), getattr(expected, part), rtol=1e-12, atol=1e-12)


# -- recomputed activations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inner"),
    quick(
        [
            (name, inner)
            for name in ("unrolled", "greedy", "DrMAD")
            for inner in ("adam", "momentum")
        ],
        keep=[("unrolled", "adam"), ("greedy", "momentum")],
    ),
)
def test_recomputed_activations_change_nothing(name, inner):
    """Vector hyperparameters, a running state, and another batch in each of four steps."""
    rule = {"adam": ADAM, "momentum": optax.sgd(0.1, momentum=0.9)}[inner]
    optimizer = build(name, rule)

    def train_loss(w, h, batch, r):
        layer = lambda x: jnp.tanh(x * w + r["average"])
        x = layer(layer(batch))
        return jnp.sum((x - h) ** 2) + jnp.exp(h) @ w**2, {"average": 0.9 * r["average"] + 0.1 * w}

    val_loss = lambda w, h, batch, r: jnp.sum((w + r["average"] - batch) ** 2)
    stack = gradhpo.BatchStack(jnp.stack([i * BATCH for i in range(1, 5)]))
    begin = optimizer.init(W, H, model_state={"average": 0.5 * W})
    plain, recomputed = (
        optimizer.compute_hypergradient(begin, stack, BATCH, loss, val_loss)
        for loss in (train_loss, jax.checkpoint(train_loss))
    )
    assert relative_error(recomputed, plain) < 1e-12


# -- the contract ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*uses the model state as it is")
@pytest.mark.parametrize(
    "name",
    quick(list(OF_ANY_LOSS), keep=["greedy", "HyperDistill", "tasks", "implicit", "unrolled"]),
)
def test_every_optimizer_carries_it(name):
    optimizer = build(name, ADAM)
    tasks = name == "tasks"
    batch = jnp.stack([BATCH, 2 * BATCH]) if tasks else BATCH
    begin = optimizer.init(W, H, model_state=BEGIN)
    state = begin
    step = lambda state, batch: optimizer.step(state, batch, batch, AVERAGE)
    state = step(state, batch)
    traces = num_traces()
    for _ in range(2):
        state = step(state, batch)
    assert num_traces() == traces
    count = state.model_state["count"]
    np.testing.assert_array_equal(count, np.full(count.shape, 3 * kept_steps(name, optimizer)))
    assert np.all(state.model_state["begun"])
    assert not np.allclose(state.model_state["average"], begin.model_state["average"])
    assert state.get_metric("rejected") == 0
    # A non-finite step leaves it unchanged.
    refused = step(state, jnp.nan * batch)
    assert refused.get_metric("rejected") == 1
    assert_same(refused.model_state, state.model_state)
    # The next episode begins with the initial or the final state of the last one.
    for rate in (0.0, 0.25, 1.0):
        new = optimizer.restart(state, begin, rate)
        assert_same(new.model_state, (state if rate else begin).model_state)


@pytest.mark.thorough
def test_training_without_tuning_and_sophia():
    fixed = gradhpo.FixedOptimizer(ADAM, inner_steps=2)
    state = fixed.step(fixed.init(W, H, model_state=BEGIN), BATCH, BATCH, AVERAGE)
    assert state.model_state["count"] == 2
    sophia = relaxed(optax.contrib.sophia(0.1))
    given = gradhpo.BatchStack(jnp.stack([BATCH, 2 * BATCH])), BATCH, AVERAGE
    unrolled = gradhpo.UnrolledOptimizer(sophia, OUTER, unroll_steps=2)
    forward = gradhpo.ForwardModeOptimizer(sophia, OUTER, unroll_steps=2)
    exact, pushed = (
        x.compute_hypergradient(x.init(W, H, model_state=BEGIN), *given)
        for x in (unrolled, forward)
    )
    assert relative_error(pushed, exact) < 1e-10


@pytest.mark.filterwarnings("ignore:.*Training has not converged")
@pytest.mark.filterwarnings("ignore:.*uses the model state as it is")
@pytest.mark.parametrize("name", quick(list(OF_ANY_LOSS), keep=["tasks"]))
def test_a_run_is_a_loop_over_step(name, tmp_path):
    """With episodes from a `start_fn`, each with the run's initial state."""
    optimizer = build(name, ADAM)
    batch = jnp.stack([BATCH, 2 * BATCH]) if name == "tasks" else BATCH
    start = lambda key, h: W + 0.1 * jax.random.normal(key, (3,))
    begin = optimizer.init(W, H, model_state=BEGIN)
    run = lambda steps, **settings: gradhpo.run(
        optimizer, begin, AVERAGE, batch, batch, num_steps=steps, progress=False, chunk_size=2,
        **settings,
    )[0]  # fmt: skip
    episodes = {"steps_per_episode": 2, "start_fn": start, "key": jax.random.key(5)}
    assert_same(run(4, **episodes).model_state, begin.model_state)
    with_checkpoint = {"checkpoint": tmp_path, "steps_per_episode": 2, "reptile_rate": 0.5}
    run(2, **with_checkpoint)
    assert_same(run(6, **with_checkpoint), run(6, steps_per_episode=2, reptile_rate=0.5))


@pytest.mark.thorough
def test_diagnostics_go_through_it():
    w, h, r, batches, val, losses = problem_of("target")
    optimizer = gradhpo.UnrolledOptimizer(ADAM, OUTER, unroll_steps=STEPS)
    state = optimizer.init(w, h, model_state=r)
    given = state, gradhpo.BatchStack(batches), val, losses
    report = gradhpo.check_hypergradient(optimizer, *given)
    assert report.healthy, report
    shares = gradhpo.explain_horizon(optimizer, *given)
    exact = optimizer.compute_hypergradient(*given)
    np.testing.assert_allclose(shares.hypergradient, exact, rtol=1e-10)


# -- misuse ------------------------------------------------------------------------------------


def test_misuse_is_named():
    optimizer = gradhpo.OneStepOptimizer(PLAIN, OUTER)
    params, hyperparams, model_state = network()
    with pytest.raises(ValueError, match=r"layer with running state.*make_with_state"):
        optimizer.init(params, hyperparams)
    with pytest.raises(ValueError, match=r"holds an eqx.nn.State.*model_state="):
        optimizer.init((params, model_state), hyperparams, model_state=model_state)
    with pytest.raises(TypeError, match=r"model_state\['act'\] is .*arrays"):
        optimizer.init(W, H, model_state={"act": jnp.tanh})
    with pytest.raises(ValueError, match="model_state"):
        optimizer.init(W, H, model_state=jnp.array(jnp.nan))
    state = optimizer.init(W, H, model_state=BEGIN)

    def step(train=average_train, val=average_val):
        return optimizer.step(state, BATCH, BATCH, train, val)

    with pytest.raises(TypeError, match=r"called as train_loss_fn\(.*model_state\).*model_loss"):
        step(train=lambda w, h, batch: jnp.sum(w))
    with pytest.raises(TypeError, match=r"called as val_loss_fn\(.*model_state\)"):
        step(val=gradhpo.model_loss(lambda model, batch: jnp.sum(model)))
    with pytest.raises(ValueError, match=r"must return \(loss, new_model_state\)"):
        step(train=lambda w, h, batch, r: average_train(w, h, batch, r)[0])
    with pytest.raises(ValueError, match=r"(?s)structure of the state.*count"):
        step(train=lambda w, h, batch, r: (jnp.sum(w), {"average": w}))
    with pytest.raises(ValueError, match=r"(?s)shapes and kinds.*average"):
        step(train=lambda w, h, batch, r: (jnp.sum(w * h), r | {"average": jnp.zeros(4)}))
    with pytest.raises(ValueError, match="state_at_start"):
        optimizer.restart(state, state.params, 0.5)
    with pytest.raises(ValueError, match="state_at_start"):
        jax.jit(lambda rate: optimizer.restart(state, state.params, rate))(0.5)
    layer = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")
    with pytest.raises(ValueError, match="taken out of the model"):
        optimizer.init(layer, H, model_state=eqx.nn.State(layer))
    stopped = lambda w, h, batch, r: average_train(jax.lax.stop_gradient(w) + 0 * w, h, batch, r)
    with pytest.warns(UserWarning, match="stops the gradient"):
        step(train=stopped)
    # A validation loss may return both, as a training loss does.
    both = step(val=lambda w, h, batch, r: (average_val(w, h, batch, r), r))
    assert_same(both, step())
