"""Bilevel problems that several tests share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

import gradhpo
from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.inner_state import InnerState
from gradhpo.diagnostics.cost import Program


class Problem(NamedTuple):
    """Everything that `step` takes, and an inner optimizer that fits the hyperparameters."""

    params: PyTree
    hyperparams: PyTree
    train_batch: PyTree
    val_batch: PyTree
    train_loss: Callable
    val_loss: Callable


def mse(model, batch):
    x, y = batch
    # A lambda, because vmap prints a module passed to it, which takes as long as tracing.
    return jnp.mean(jnp.square(jax.vmap(lambda x: model(x))(x) - y))


class Regularised(eqx.Module):
    """A network with hyperparameters in the loss and in the optimizer."""

    net: eqx.nn.MLP
    log_weight_decay: Float[Array, " layers"]
    log_rate: Float[Array, ""]
    logit_momentum: Float[Array, ""]


@gradhpo.model_loss
def regularised_train_loss(model, batch):
    squares = [jnp.sum(jnp.square(layer.weight)) for layer in model.net.layers]
    decay = jnp.exp(model.log_weight_decay)
    return mse(model.net, batch) + jnp.sum(decay * jnp.stack(squares))


@gradhpo.model_loss
def regularised_val_loss(model, batch):
    # The small direct term makes the partial derivative with respect to lambda nonzero.
    return mse(model.net, batch) + 0.01 * jnp.sum(jnp.square(model.log_weight_decay))


# Compiled, as `network` is: one program each, instead of several for every random array.
@eqx.filter_jit
def batches(key, dtype=jnp.float64):
    k1, k2, k3 = jax.random.split(key, 3)
    x_train, x_val = jax.random.normal(k1, (20, 3), dtype), jax.random.normal(k2, (10, 3), dtype)
    target = lambda x: jnp.sin(x @ jax.random.normal(k3, (3, 2), dtype))
    return (x_train, target(x_train)), (x_val, target(x_val))


@eqx.filter_jit
def network(key, dtype=jnp.float64):
    net = eqx.nn.MLP(3, 2, 5, 1, activation=jnp.tanh, key=key, dtype=dtype)
    return Regularised(
        net,
        log_weight_decay=jnp.asarray([-3.0, -4.0], dtype),
        log_rate=jnp.asarray(-2.0, dtype),
        logit_momentum=jnp.asarray(1.0, dtype),
    )


def in_the_loss(key, dtype=jnp.float64) -> Problem:
    """Weight decay of each layer, written into the training loss."""
    k1, k2 = jax.random.split(key)
    params, hyperparams = gradhpo.partition(network(k1, dtype), lambda m: m.log_weight_decay)
    return Problem(
        params, hyperparams, *batches(k2, dtype), regularised_train_loss, regularised_val_loss
    )


def in_the_optimizer(key, dtype=jnp.float64) -> Problem:
    """Learning rate, momentum and weight decay, seen by the optimizer or by optimizer and loss."""
    k1, k2 = jax.random.split(key)
    where = lambda m: (m.log_weight_decay, m.log_rate, m.logit_momentum)
    params, hyperparams = gradhpo.partition(network(k1, dtype), where)
    return Problem(
        params, hyperparams, *batches(k2, dtype), regularised_train_loss, regularised_val_loss
    )


def in_the_layers(key, dtype=jnp.float64) -> Problem:
    """The first layer of the network is the hyperparameter."""
    k1, k2 = jax.random.split(key)
    params, hyperparams = gradhpo.partition(network(k1, dtype), lambda m: m.net.layers[0])
    return Problem(
        params, hyperparams, *batches(k2, dtype), regularised_train_loss, regularised_val_loss
    )


def linear(params, x):
    return x @ params["w"] + params["b"][None, :]


def weighted_train_loss(params, hyperparams, batch):
    x, y, weights = *batch, jax.nn.sigmoid(hyperparams["weights"])
    return jnp.mean(weights * jnp.mean(jnp.square(linear(params, x) - y), axis=1))


def linear_val_loss(params, hyperparams, batch):
    x, y = batch
    return jnp.mean(jnp.square(linear(params, x) - y))


def dicts(key, dtype=jnp.float64) -> Problem:
    """Plain dict pytrees and hand-written losses; one weight per training example."""
    train, val = batches(key, dtype)
    params = {"w": jnp.full((3, 2), 0.1, dtype), "b": jnp.zeros(2, dtype)}
    hyperparams = {"weights": jnp.linspace(-1, 1, 20, dtype=dtype)}
    return Problem(params, hyperparams, train, val, weighted_train_loss, linear_val_loss)


PROBLEMS = {
    "loss": in_the_loss,
    "optimizer": in_the_optimizer,
    "layers": in_the_layers,
    "dicts": dicts,
}


def relaxed(optimizer: Any) -> Any:
    """optax mixes dtypes internally; everything else in the tests is strict about them."""
    if not isinstance(optimizer, optax.GradientTransformation):
        return lambda hyperparams: relaxed(optimizer(hyperparams))

    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **of_loss):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params, **of_loss)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


# Inner optimizers by name. For the problem "optimizer" they are functions of the hyperparameters.
FIXED = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.03, eps_root=1e-16),
    "adamw": optax.adamw(0.03, eps_root=1e-16, weight_decay=0.01),
}
CALLABLE = {
    "sgd": lambda h: optax.sgd(jnp.exp(h.log_rate)),
    "momentum": lambda h: optax.sgd(
        jnp.exp(h.log_rate), momentum=jax.nn.sigmoid(h.logit_momentum), nesterov=True
    ),
    "adam": lambda h: optax.adam(
        jnp.exp(h.log_rate), b1=jax.nn.sigmoid(h.logit_momentum), eps_root=1e-16
    ),
    "adamw": lambda h: optax.adamw(
        jnp.exp(h.log_rate),
        b1=jax.nn.sigmoid(h.logit_momentum),
        weight_decay=jnp.exp(h.log_weight_decay[0]),
        eps_root=1e-16,
    ),
}
FIXED = {name: relaxed(optimizer) for name, optimizer in FIXED.items()}
CALLABLE = {name: relaxed(optimizer) for name, optimizer in CALLABLE.items()}
OUTER = relaxed(optax.adam(0.05))
# SGD has no momentum for the hyperparameter to act on.
WITHOUT_MOMENTUM = lambda m: (m.log_weight_decay, m.log_rate)


def make(problem_name: str, optimizer_name: str, key, dtype=jnp.float64):
    """`(problem, inner optimizer)` for one combination."""
    problem = PROBLEMS[problem_name](key, dtype)
    if problem_name != "optimizer":
        return problem, FIXED[optimizer_name]
    if optimizer_name == "sgd":
        model = eqx.combine(problem.params, problem.hyperparams)
        params, hyperparams = gradhpo.partition(model, WITHOUT_MOMENTUM)
        problem = problem._replace(params=params, hyperparams=hyperparams)
    return problem, CALLABLE[optimizer_name]


def phi_of(problem: Problem, inner_optimizer=None, update_fn=None, symmetric=True):
    """The inner update on the training batch, and the initial z."""
    w, frozen = eqx.partition(problem.params, eqx.is_inexact_array)
    phi = InnerUpdate(
        inner_optimizer=inner_optimizer,
        grad_fn=None,
        update_fn=update_fn,
        train_loss_fn=problem.train_loss,
        frozen=frozen,
        train_batch=problem.train_batch,
        symmetric=symmetric,
    )
    return phi, InnerState(w, init_inner_state(inner_optimizer, w, problem.hyperparams))


def warmed(optimizer, problem: Problem, train_batch):
    """The arguments of `step` after a few inner steps, when moments and counts have moved."""
    state = optimizer.init(problem.params, problem.hyperparams)
    phi, z = phi_of(problem, optimizer.inner_optimizer)
    z, _, _ = eqx.filter_jit(phi.rollout)(z, problem.hyperparams, 0, 3)
    state = state.update(params=eqx.combine(z.w, phi.frozen), inner_opt_state=z.s)
    return state, train_batch, problem.val_batch, problem.train_loss, problem.val_loss


def stack_of(problem: Problem, count: int, key) -> gradhpo.BatchStack:
    """Different mini-batches for each inner step (the dict problem needs whole batches)."""
    x, y = problem.train_batch
    noise = jax.random.normal(key, (count, *x.shape), x.dtype)
    return gradhpo.BatchStack((x[None] + 0.3 * noise, jnp.stack([y] * count)))


def compiled_bytes(name: str, steps: int) -> int:
    """Temporary memory of one compiled hypergradient (or estimate of theta) of an MLP."""
    keys = jax.random.split(jax.random.key(0), 3)
    net = eqx.nn.MLP(8, 2, 32, 1, activation=jnp.tanh, key=keys[0])
    params, hyperparams = gradhpo.partition(net, lambda net: net.layers[0])
    loss = gradhpo.model_loss(mse)
    inner = relaxed(optax.adam(0.01, eps_root=1e-16))
    stack = gradhpo.BatchStack((jnp.ones((steps, 20, 8)), jnp.ones((steps, 20, 2))))
    val_batch = stack.at(0)
    if name == "theta":
        optimizer = gradhpo.OnlineHypergradientOptimizer(inner, OUTER)
        function = optimizer.estimate_theta
    else:
        classes = {"greedy": gradhpo.GreedyOptimizer, "DrMAD": gradhpo.DrMADOptimizer}
        optimizer = classes[name](inner, OUTER, unroll_steps=steps)
        function = optimizer.compute_hypergradient
    state = optimizer.init(params, hyperparams)
    on_batches = lambda *arguments: function(*arguments, loss, loss)
    return Program(on_batches, state, stack, val_batch).temporary_bytes
