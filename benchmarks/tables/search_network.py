"""A network of cells with mixed operations, as in DARTS, on scikit-learn's digits."""

import functools
import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from sklearn.datasets import load_digits

import gradhpo


# 3 x 3 and 1 x 1 convolutions; 3 x 3 mean, smoothing by (1, 2, 1), skip; zero.
OPERATIONS = "31asi0"
FREE = "asi"  # have no parameters, and can be chosen
CELLS, CHANNELS, SIDE = 2, 6, 4
SOURCES = ((0, 1), (0, 2), (1, 2))  # the edges of a cell, between its nodes
EDGES = CELLS * len(SOURCES)
TRAIN, VAL, BATCH = 300, 300, 32


def _shifts() -> np.ndarray:
    """Matrices [9, pixels, pixels]: neighbours; beyond the border stands the border itself."""
    along = [np.eye(SIDE)[np.clip(np.arange(SIDE) + i, 0, SIDE - 1)] for i in (-1, 0, 1)]
    return np.float32([np.kron(a, b) for a in along for b in along])


SHIFTS = _shifts()
CENTRE = 4
SMOOTHING = np.outer([1, 2, 1], [1, 2, 1]).ravel() / 16


FREE_MATRICES = np.float32([SHIFTS.mean(0), np.tensordot(SMOOTHING, SHIFTS, 1), SHIFTS[CENTRE]])


def convolution_matrices(
    shares: Array, three: Float[Array, "edges 9 c d"], one: Float[Array, "edges c d"]
) -> Float[Array, "edges pixels c pixels d"]:
    """One for each edge: a 1 x 1 convolution is the centre of a 3 x 3 one."""
    kernels = shares[:, 0, None, None, None] * three
    kernels = kernels.at[:, CENTRE].add(shares[:, 1, None, None] * one)
    return jnp.einsum("kqp,ekcd->epcqd", SHIFTS, kernels)


def free_matrices(shares: Array, skip: Float[Array, ""]) -> Float[Array, "edges pixels pixels"]:
    """The operations without parameters, the same for every channel."""
    of_each = shares[:, 2:5] + skip * jnp.array([0.0, 0.0, 1.0])
    return jnp.tensordot(of_each, FREE_MATRICES, 1)


def normalised(x: Float[Array, "n pixels c"]) -> Array:
    """Each image to mean 0 and variance 1, without parameters or running state."""
    x = x - x.mean((1, 2), keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean((1, 2), keepdims=True) + 1e-5)


class Network(eqx.Module):
    """A 3 x 3 convolution, halved images, two cells, and the mean over the image.

    A cell has an input and two nodes. Each edge is a mixture of operations, in shares that `alpha`
    gives: convolutions of the ReLU of a node, and the others of the node itself.
    """

    stem: Float[Array, "in9 c"]
    three: Float[Array, "edges 9 c d"]
    one: Float[Array, "edges c d"]
    head: Float[Array, "c classes"]
    alpha: Float[Array, "edges operations"]

    def __init__(self, key: Array):
        keys = jax.random.split(key, 5)
        c, scale = CHANNELS, (2 / CHANNELS) ** 0.5
        self.stem = jax.random.normal(keys[0], (9, c)) / 3
        self.three = scale / 3 * jax.random.normal(keys[1], (EDGES, 9, c, c))
        self.one = scale * jax.random.normal(keys[2], (EDGES, c, c))
        self.head = c**-0.5 * jax.random.normal(keys[3], (c, 10))
        self.alpha = 1e-3 * jax.random.normal(keys[4], (EDGES, len(OPERATIONS)))

    def __call__(
        self, images: Float[Array, "n pixels in9"], shares: Array, skip: Float[Array, ""]
    ) -> Float[Array, "n classes"]:
        """With shares of the operations, `[edges, operations]`, and `skip` more of each input."""
        x = jax.nn.relu(normalised(images @ self.stem))
        x = x.reshape(-1, SIDE, 2, SIDE, 2, CHANNELS).mean((2, 4)).reshape(-1, SIDE**2, CHANNELS)
        x = normalised(x)
        convolutions = convolution_matrices(shares, self.three, self.one)
        others = free_matrices(shares, skip)
        for cell in range(CELLS):
            nodes = [x, 0.0, 0.0]
            for edge, (source, target) in enumerate(SOURCES, cell * len(SOURCES)):
                y = nodes[source]
                found = jnp.tensordot(jax.nn.relu(y), convolutions[edge], 2)
                nodes[target] += found + jnp.einsum("qp,npc->nqc", others[edge], y)
                if (source, target) in ((0, 1), (1, 2)):  # the last one into this node
                    nodes[target] = normalised(nodes[target])
            x = normalised(nodes[1] + nodes[2])
        return jax.nn.relu(x).mean(1) @ self.head


def shares_of(alpha: Array, sigmoids: Float[Array, ""]) -> Array:
    """A softmax over the operations of each edge, or (`sigmoids` = 1) a sigmoid of each."""
    return jnp.where(sigmoids > 0, jax.nn.sigmoid(alpha), jax.nn.softmax(alpha))


class Loss(eqx.Module):
    """Cross-entropy, with the settings that a search is tried with.

    Of `decay`, half the squares of all weights; of `penalty`, the mean share of operations without
    parameters; and with `auxiliary` > 0 a skip beside each edge (as in DARTS-), which batches
    fade out.
    """

    decay: Float[Array, ""]
    penalty: Float[Array, ""]
    auxiliary: Float[Array, ""]
    sigmoids: Float[Array, ""]

    def __call__(self, params: Network, hyperparams: Network, batch: tuple) -> Array:
        x, y, left = batch
        model = eqx.combine(params, hyperparams)
        shares = shares_of(model.alpha, self.sigmoids)
        loss = cross_entropy(model(x, shares, left * self.auxiliary), y)
        weights = jax.tree.leaves(params)
        squares = sum(jnp.sum(w * w) for w in weights)
        return loss + self.decay / 2 * squares + self.penalty * jnp.mean(shares[:, 2:5].sum(1))


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]


@functools.cache
def load(seed: int, num_train: int = TRAIN, num_val: int = VAL) -> Data:
    """Digits, 8 x 8 pixels, shuffled; each pixel with its eight neighbours."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    padded = np.pad(np.float32(x[order]).reshape(-1, 8, 8) / 16, ((0, 0), (1, 1), (1, 1)))
    near = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    x, y = np.stack(near, axis=-1).reshape(-1, 64, 9), y[order]
    ends = (0, num_train, num_train + num_val, len(y))
    parts = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]
    return Data(*jax.tree.map(jnp.asarray, parts))


class Fading(eqx.Module):
    """Batches `(images, labels, left)`: what is left of the auxiliary skip, 1 to 0 in `until`."""

    data: gradhpo.ArrayData
    until: Float[Array, ""]

    def __call__(self, index: Array) -> tuple:
        return *self.data(index), jnp.maximum(0.0, 1 - index / self.until)
