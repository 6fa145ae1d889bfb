"""How close cheap hypergradients come to the exact one: cosines along an episode.

For every step count t, all methods see the same t inner steps from the same start, with fixed
hyperparameters; `UnrolledOptimizer` through all t gives the exact hypergradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradhpo
from benchmarks.costs.problem import Model, plain_loss, train_loss


class Episode(NamedTuple):
    params: Any
    hyperparams: Any
    inner_optimizer: Any
    batch: Callable  # number of the step -> batch
    val_batch: Any
    train_loss: Callable
    val_loss: Callable
    first_order_sees: bool = False


# --- Losses and optimizers, created once: all seeds share their compiled programs ---------------

MOMENTUM_01, MOMENTUM_02 = optax.sgd(0.01, momentum=0.9), optax.sgd(0.02, momentum=0.9)


def rate_of_each(raw):
    scale = lambda r, g: -jax.nn.softplus(r) * g
    return optax.stateless(lambda gradients, _: jax.tree.map(scale, raw, gradients))


def cross_entropy(net, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y)


def plain_of_net(net, raw, batch):
    return jnp.mean(cross_entropy(net, *batch))


@gradhpo.model_loss
def plain(net, batch):
    return jnp.mean(cross_entropy(net, *batch))


@gradhpo.model_loss
def squares(net, batch):
    return jnp.mean((jax.vmap(net)(batch[0])[:, 0] - batch[1]) ** 2)


# --- Problems -----------------------------------------------------------------------------------


def digits(seed: int) -> tuple[tuple, tuple]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))[:1_200]
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return (x[:1_000], y[:1_000]), (x[1_000:], y[1_000:])


def layers_of_digits(seed: int) -> Episode:
    """All layers of a classifier but the last, mini-batches, momentum."""
    train, val = digits(seed)
    net = eqx.nn.MLP(64, 10, 64, 2, key=jax.random.key(seed))
    params, hyperparams = gradhpo.partition(net, lambda net: net.layers[:-1])
    data = gradhpo.ArrayData(train, 50, jax.random.key(seed))
    return Episode(params, hyperparams, MOMENTUM_02, data, val, plain, plain, True)


def layers_of_sinusoid(seed: int) -> Episode:
    """The same for a sine wave known at ten points (examples/meta_learning_sinusoid.py)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    net = eqx.nn.MLP(1, 1, 100, 3, key=keys[0])
    params, hyperparams = gradhpo.partition(net, lambda net: net.layers[:-1])
    x = jax.random.uniform(keys[1], (20, 1), minval=-5.0, maxval=5.0)
    amplitude, phase = jax.random.uniform(keys[2], (2,)) * jnp.array([4.9, jnp.pi])
    y = (0.1 + amplitude) * jnp.sin(x[:, 0] + phase)
    train, val = (x[:10], y[:10]), (x[10:], y[10:])
    return Episode(params, hyperparams, MOMENTUM_01, lambda t: train, val, squares, squares, True)


def weights_of_digits(seed: int) -> Episode:
    """One weight for every training example; first order sees none of them."""
    (x, y), val = digits(seed)
    net = eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(seed))
    model = Model(net, jnp.zeros(len(x)))
    params, hyperparams = gradhpo.partition(model, lambda m: m.weights)
    data = gradhpo.ArrayData((x, y, jnp.arange(len(x))), 50, jax.random.key(seed))
    return Episode(params, hyperparams, MOMENTUM_02, data, val, train_loss, plain_loss)


def rates_of_digits(seed: int) -> Episode:
    """One learning rate for every parameter; first order sees none of them."""
    train, val = digits(seed)
    net = eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(seed))
    raw = jax.tree.map(lambda x: jnp.full_like(x, -2.0), eqx.filter(net, eqx.is_inexact_array))
    data = gradhpo.ArrayData(train, 50, jax.random.key(seed))
    return Episode(net, raw, rate_of_each, data, val, plain_of_net, plain_of_net)


PROBLEMS = {
    "layers, digits": layers_of_digits,
    "layers, sinusoid": layers_of_sinusoid,
    "example weights": weights_of_digits,
    "learning rates": rates_of_digits,
}


# --- Cosines ------------------------------------------------------------------------------------


Methods = dict[str, Any]


def online_methods(inner: Any, gammas: tuple[float, ...] = (0.9, 0.99)) -> Methods:
    """Name to optimizer, for methods that estimate at every step."""
    distilled = {
        f"HyperDistill {gamma:g}".replace("0.", "."): gradhpo.OnlineHypergradientOptimizer(
            inner, gamma=gamma
        )
        for gamma in gammas
    }
    return distilled | {
        "one step": gradhpo.OneStepOptimizer(inner),
        "first order": gradhpo.FOOptimizer(inner),
    }


# Name to a function of an inner optimizer and a number of steps, for methods that see all steps.
OFFLINE = {
    "DrMAD": gradhpo.DrMADOptimizer,
    "greedy .99": functools.partial(gradhpo.GreedyOptimizer, gamma=0.99),
}


def cosines(episode: Episode, counts: tuple[int, ...]) -> dict[str, list[float]]:
    """Each method's cosine with the exact hypergradient after each number of steps."""
    online = online_methods(episode.inner_optimizer)
    if not episode.first_order_sees:
        del online["first order"]
    return followed(episode, counts, online, OFFLINE)


def followed(
    episode: Episode,
    counts: tuple[int, ...],
    online: Methods,
    offline: dict[str, Callable],
    *,
    fitted_on: Episode | None = None,
    around: Callable = lambda optimizer: optimizer,
) -> dict[str, list[float]]:
    """The same for these methods, with `around` each of them.

    HyperDistill's theta is fitted on this episode, or on another one.
    """
    losses, inner = (episode.train_loss, episode.val_loss), episode.inner_optimizer
    stack_of = lambda of: gradhpo.BatchStack.of([of.batch(t) for t in range(max(counts))])
    stack, fitted_on = stack_of(episode), episode if fitted_on is None else fitted_on
    fitting = stack if fitted_on is episode else stack_of(fitted_on)
    wrapped = {name: around(optimizer) for name, optimizer in online.items()}
    begin = lambda optimizer: optimizer.init(
        episode.params, episode.hyperparams, batch=stack.at(0), key=jax.random.key(0)
    )
    # These remember the episode; the others follow one of them, which saves compilation.
    states = {
        name: wrapped[name].estimate_theta(
            begin(wrapped[name]), fitting, fitted_on.val_batch, *losses
        )
        for name, optimizer in online.items()
        if isinstance(optimizer, gradhpo.OnlineHypergradientOptimizer)
    }
    leader = next(iter(states))
    found: dict[str, list[float]] = {name: [] for name in (*offline, *online)}
    for t in range(max(counts)):
        compared = t + 1 in counts
        results = {}
        if compared:
            first = gradhpo.BatchStack(jax.tree.map(lambda x, n=t + 1: x[:n], stack.batches))
            for name, make in {"exact": gradhpo.UnrolledOptimizer, **offline}.items():
                optimizer = around(make(inner, unroll_steps=t + 1))
                state = optimizer.init(episode.params, episode.hyperparams)
                arguments = (state, first, episode.val_batch, *losses)
                results[name] = optimizer.compute_hypergradient(*arguments)
        data = (stack.at(t), episode.val_batch, *losses)
        for name, optimizer in wrapped.items() if compared else ():
            state = states.get(name) or optimizer.adopt(states[leader])
            results[name] = optimizer.compute_hypergradient(state, *data)
        for name, state in states.items():
            states[name] = wrapped[name].step(state, *data, lr_hyper=0.0)
        for name in found if compared else ():
            found[name].append(cosine(results[name], results["exact"]))
    return found


def cosine(a: Any, b: Any) -> float:
    norms = gradhpo.tree_l2_norm(a) * gradhpo.tree_l2_norm(b)
    return float(gradhpo.tree_dot(a, b) / norms)


def print_accuracy() -> None:
    counts, seeds = (5, 10, 20, 30, 40, 50), 10
    print(
        "\nCosine to the exact hypergradient, median over 10 seeds and 5 to 50 steps from the start"
        "\n(gamma after the name; first order sees no weights or rates)"
    )
    methods = (
        "DrMAD", "greedy .99", "HyperDistill .9", "HyperDistill .99", "one step", "first order",
    )  # fmt: skip
    print(f"  {'':18}" + "".join(f"{method:>18}" for method in methods))
    for name, make in PROBLEMS.items():
        runs = [cosines(make(seed), counts) for seed in range(seeds)]
        medians = [
            f"{np.median([run[method] for run in runs]):.3f}" if method in runs[0] else ""
            for method in methods
        ]
        print(f"  {name:18}" + "".join(f"{x:>18}" for x in medians))
