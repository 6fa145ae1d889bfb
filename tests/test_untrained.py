"""Parameters that validation reads but training does not train are reported."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from problems import relaxed

import gradhpo


X = jax.random.normal(jax.random.key(0), (16, 4)) * 3 + 2
Y = jnp.sin(X[:, 0])
ADAMW = relaxed(optax.adamw(0.1, eps_root=1e-16, weight_decay=0.1))
# Like another framework's BatchNorm, with its statistics among the parameters.
PARAMS = {
    "scale": jnp.ones(4),
    "bias": jnp.zeros(4),
    "mean": jnp.zeros(4),
    "var": jnp.ones(4),
    "w": jnp.full(4, 0.1),
}
H = jnp.array(-3.0)


def predict(p, x, mean, var):
    normed = lambda x: p["scale"] * (x - mean) / jnp.sqrt(var + 1e-5) + p["bias"]
    return jax.vmap(lambda x: jnp.tanh(normed(x)) @ p["w"])(x)


def train_loss(p, h, batch):
    """With batch statistics; the running ones, which would be written, are dropped."""
    out = predict(p, X, jnp.mean(X, 0), jnp.var(X, 0))
    return jnp.mean((out - Y) ** 2) + jnp.exp(h) * jnp.sum(p["w"] ** 2)


def val_loss(p, h, batch):
    return jnp.mean((predict(p, X, p["mean"], p["var"]) - Y) ** 2)


def compute(train_loss, val_loss, params=PARAMS):
    optimizer = gradhpo.OneStepOptimizer(ADAMW)
    state = optimizer.init(params, H)
    call = lambda s: optimizer.compute_hypergradient(s, None, None, train_loss, val_loss)
    eqx.filter_eval_shape(call, state)


def test_running_statistics_among_the_parameters_are_named():
    said = r"val_loss_fn reads params \['mean'\], \['var'\], and train_loss_fn has no derivative"
    with pytest.warns(UserWarning, match=said):
        compute(train_loss, val_loss)


@pytest.mark.filterwarnings("ignore:train_loss_fn stops")
@pytest.mark.filterwarnings("ignore:train_loss_fn .* stops the gradient")
def test_so_are_those_behind_programs_and_stops():
    jitted = jax.jit(predict)

    def within(p, h, batch):
        """All parameters enter one compiled call, which does not use the statistics."""
        run = jax.checkpoint(
            lambda p, x: jitted(p, x, jax.lax.stop_gradient(p["mean"]), jnp.var(x, 0))
        )
        return jnp.mean((run(p, X) - Y) ** 2) + jnp.exp(h) * jnp.sum(p["w"] ** 2)

    with pytest.warns(UserWarning, match=r"reads params \['mean'\], \['var'\], and"):
        compute(within, val_loss)


def test_what_validation_does_not_read_is_no_matter():
    compute(train_loss, lambda p, h, batch: jnp.mean((X @ p["w"] - Y) ** 2))


def test_trained_ones_are_not_named():
    both = lambda p, h, batch: val_loss(p, h, batch) + jnp.exp(h) * jnp.sum(p["w"] ** 2)
    compute(both, val_loss)


def test_a_head_within_a_loop_counts_as_trained():
    def loss(p, h, batch):
        step = lambda carry, x: (jnp.tanh(carry * p["scale"] + x) + p["bias"], None)
        carry, _ = jax.lax.scan(step, jnp.zeros(4), X)
        return jnp.sum(carry * p["w"]) ** 2 + jnp.exp(h) * jnp.sum(p["w"] ** 2)

    compute(loss, lambda p, h, batch: jnp.sum(p["scale"] + p["bias"] + p["w"]))
