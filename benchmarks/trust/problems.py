"""The training runs of the calibration: a small classifier with a weight for each example."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, PyTree
from sklearn.datasets import load_breast_cancer, load_digits

import gradhpo


QUERIES, OF_A_QUERY = 5, 20  # separate validation batches, and examples in each
TRAINED = 400
MOST_SEEDS = 101  # of live configurations: the training itself and retrainings
WIDTH = 32
DROPPED = 0.2
# Inner learning rates, before the factor of a configuration.
RATES = {"momentum": 0.02, "adam": 3e-3, "muon": 0.01}
ESTIMATORS: dict[str, Callable[[Any, int], gradhpo.BilevelOptimizer]] = {
    "exact": lambda inner, steps: gradhpo.UnrolledOptimizer(inner, unroll_steps=steps),
    "last tenth": lambda inner, steps: gradhpo.UnrolledOptimizer(
        inner, unroll_steps=steps, truncation=steps // 10
    ),
    "DrMAD": lambda inner, steps: gradhpo.DrMADOptimizer(inner, unroll_steps=steps),
    "one step": lambda inner, steps: gradhpo.OneStepOptimizer(inner),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One training, and the number of examples that a perturbation leaves out."""

    data: str = "digits"
    inner: str = "momentum"
    eps_root: float = 0.0
    factor: float = 1.0
    steps: int = 100
    batch_size: int = 50
    activation: str = "tanh"
    dropout: str = ""  # "replayed" or "live": other keys and batches in every retraining
    dtype: str = "float32"
    left_out: float = 0.02
    estimator: str = "exact"
    seed: int = 0

    @property
    def name(self) -> str:
        root = f" {self.eps_root:.0e}" if self.inner == "adam" else ""
        parts = [
            f"{self.data}, {self.inner}{root} x{self.factor:g}, T={self.steps}",
            f"b={self.batch_size}",
            self.activation,
        ]
        parts += [f"dropout {self.dropout}"] * bool(self.dropout)
        parts += [self.dtype] * (self.dtype != "float32")
        parts += [self.estimator] * (self.estimator != "exact")
        return ", ".join([*parts, f"-{self.left_out:.0%}"])

    @property
    def live(self) -> bool:
        return self.dropout == "live"

    @property
    def replayed(self) -> bool | None:
        """The argument of `check_hypergradient`."""
        return not self.live if self.dropout else None

    @property
    def rate(self) -> float:
        return self.factor * RATES[self.inner]

    def optimizer(self) -> optax.GradientTransformation:
        if self.inner == "momentum":
            return optax.sgd(self.rate, momentum=0.9)
        if self.inner == "adam":
            return optax.adam(self.rate, eps_root=self.eps_root)
        return optax.contrib.muon(self.rate)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A configuration ready to train: `batches(seed)` is a function of the step."""

    optimizer: gradhpo.BilevelOptimizer
    state: gradhpo.BilevelState
    batches: Callable[[Any], Callable[[Any], PyTree]]
    queries: PyTree
    losses: gradhpo.LossFunctions
    perturb: Callable[[Array, PyTree], PyTree]


def arrays_of(data: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    load = {"digits": load_digits, "cancer": load_breast_cancer}[data]
    x, y = load(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    x = x / 16 if data == "digits" else (x - x.mean(0)) / x.std(0)
    return x.astype(np.float32), y.astype(np.int32)


def initial(sizes: list[int], key: Array) -> list[tuple[Array, Array]]:
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, (m, n)) / jnp.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def problem_of(config: Config) -> Problem:
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[config.activation]

    def cross_entropy(w, x, y, key=None):
        for i, (matrix, bias) in enumerate(w):
            x = x @ matrix + bias
            if i < len(w) - 1:
                x = activation(x)
                if key is not None:
                    kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - DROPPED, x.shape)
                    x = jnp.where(kept, x / (1 - DROPPED), 0).astype(x.dtype)
        logits = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def train_loss(w, weights, batch):
        ((x, y), index), key = batch
        losses = cross_entropy(w, x, y, key)
        return jnp.mean(weights[index].astype(losses.dtype) * losses)

    def val_loss(w, weights, batch):
        x, y = batch
        return jnp.mean(cross_entropy(w, x.reshape(-1, x.shape[-1]), y.reshape(-1)))

    x, y = arrays_of(config.data, config.seed)
    x = jnp.asarray(x).astype(config.dtype)
    y = jnp.asarray(y)
    train, rest = (x[:TRAINED], y[:TRAINED]), slice(TRAINED, TRAINED + QUERIES * OF_A_QUERY)
    queries = tuple(a[rest].reshape(QUERIES, OF_A_QUERY, *a.shape[1:]) for a in (x, y))
    sizes = [x.shape[1], WIDTH, WIDTH, int(y.max()) + 1]
    cast = lambda tree: jax.tree.map(lambda x: x.astype(config.dtype), tree)
    params = cast(initial(sizes, jax.random.key(config.seed)))
    optimizer = ESTIMATORS[config.estimator](config.optimizer(), config.steps)
    state = optimizer.init(params, jnp.ones(TRAINED, config.dtype))

    # For every seed that a live configuration may use; others use only the first.
    rows = np.stack([_order(config, seed) for seed in range(MOST_SEEDS if config.live else 1)])
    rows = jnp.asarray(rows)

    def batches(seed):
        def batch(t):
            index = rows[seed, t]
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), t)
            return ((train[0][index], train[1][index]), index), key if config.dropout else None

        return batch

    return Problem(
        optimizer, state, batches, queries,
        gradhpo.LossFunctions(train_loss, val_loss), gradhpo.leave_out(config.left_out),
    )  # fmt: skip


def _order(config: Config, seed: int) -> np.ndarray:
    """The examples of every batch [steps, batch], shuffled in every epoch."""
    random = np.random.default_rng([config.seed, seed])
    count = config.steps * config.batch_size
    epochs = [random.permutation(TRAINED) for _ in range(-(-count // TRAINED))]
    return np.concatenate(epochs)[:count].reshape(config.steps, -1).astype(np.int32)
