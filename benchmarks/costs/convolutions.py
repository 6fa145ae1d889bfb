"""Convolutions on a CPU, alone and in a compiled loop, and as matrix products."""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.peers.workers.worker import seconds


CHANNELS, STEPS, REPEATS = (1, 16, 32, 32), 10, 7
LAYOUTS = {
    "channels first": ("NCHW", "OIHW", "NCHW"),
    "channels last": ("NHWC", "HWIO", "NHWC"),
}


def convolved(layout: str) -> Callable[[Array, Array], Array]:
    """3 x 3 with stride 2, without padding."""
    numbers = LAYOUTS[layout]
    return lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "VALID", dimension_numbers=numbers
    )


def multiplied(x: Array, w: Array) -> Array:
    """The same with the channels last, as one product with nine shifted images."""
    end = (x.shape[1] - 3) // 2 * 2 + 1
    shifted = [x[:, i : i + end : 2, j : j + end : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ w.reshape(-1, w.shape[-1])


def milliseconds(layer: Callable, layout: str) -> list[float]:
    """For a gradient and a second-derivative product, each alone and in a loop, per step."""
    first = layout == "channels first"
    over = (0, 2, 3) if first else (0, 1, 2)

    def loss(weights: list[Array], x: Array) -> Array:
        for w in weights:
            x = layer(x, w)
            x = (x - x.mean(over, keepdims=True)) / jnp.sqrt(x.var(over, keepdims=True) + 1e-5)
            x = jax.nn.relu(x)
        return jnp.mean(x.mean(over[1:]) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    pairs = zip(keys, CHANNELS, CHANNELS[1:], strict=False)
    weights = [0.1 * jax.random.normal(key, (3, 3, a, b)) for key, a, b in pairs]
    if first:
        weights = [w.transpose(3, 2, 0, 1) for w in weights]
    x = jax.random.normal(keys[3], (100, 1, 28, 28) if first else (100, 28, 28, 1))
    gradient = jax.grad(loss)
    product = lambda weights, x: jax.jvp(lambda w: gradient(w, x), (weights,), (weights,))[1]

    def loop(function: Callable) -> Callable:
        def descend(weights: list[Array], _: None) -> tuple[list[Array], None]:
            return jax.tree.map(lambda w, g: w - 0.01 * g, weights, function(weights, x)), None

        return lambda weights, x: jax.lax.scan(descend, weights, length=STEPS)[0]

    found = []
    for function in (gradient, product):
        for program, steps in ((function, 1), (loop(function), STEPS)):
            run = jax.jit(program)
            call = lambda run=run: jax.block_until_ready(run(weights, x))
            call()
            found.append(1e3 / steps * statistics.median(seconds(call) for _ in range(REPEATS)))
    return found


def print_convolutions() -> None:
    print(
        "\nThree convolutions, 3 x 3 with stride 2 and 16, 32, 32 channels, on 100 images of\n"
        "28 x 28, each followed by a normalisation: ms of a gradient and of a second-derivative\n"
        "product, alone and per step of a compiled loop of ten"
    )
    print(f"  {'':34} gradient  in a loop   product  in a loop")
    rows = {f"convolution, {layout}": (convolved(layout), layout) for layout in LAYOUTS}
    rows["matrix product of shifted images"] = multiplied, "channels last"
    for name, row in rows.items():
        print(f"  {name:34}", "".join(f"{x:9.1f} " for x in milliseconds(*row)))
