"""A transformer of realistic size as a job: rates and decays of its layers are tuned."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradhpo
from benchmarks.costs.networks import decoder
from benchmarks.costs.problem import Job


class Size(NamedTuple):
    """A batch has `rows` rows of `length` tokens; logits come in one chunk per row."""

    layers: int
    width: int
    heads: int
    words: int
    rows: int
    length: int
    dtype: str  # of the forward pass; parameters and optimizer state are float32


SIZES = {
    "110M": Size(12, 768, 12, 32_768, rows=4, length=512, dtype="bfloat16"),
    "tiny": Size(2, 16, 2, 64, rows=2, length=8, dtype="float32"),
}


def num_params(size: Size) -> int:
    return 12 * size.layers * size.width**2 + size.words * size.width


def start(size: Size) -> dict[str, dict[str, Any]]:
    """One learning rate and one weight decay for every layer, and for the embedding."""
    logs = lambda x, *shape: jnp.full(shape, math.log(x), float)
    each = lambda x: {"layers": logs(x, size.layers), "words": logs(x)}
    return {"log_rate": each(3e-4), "log_decay": each(0.1)}


def adamw(hyperparams: Any) -> optax.GradientTransformation:
    """AdamW with the rates and decays of `start`."""

    def scaled(updates, params):
        def of_group(name):
            rate, decay = (jnp.exp(hyperparams[x][name]) for x in ("log_rate", "log_decay"))
            of_layers = lambda x, w: x.reshape(x.shape + (1,) * (w.ndim - x.ndim))
            step = lambda u, w: -of_layers(rate, w) * (u + of_layers(decay, w) * w)
            return jax.tree.map(step, updates[name], params[name])

        return {name: of_group(name) for name in updates}

    return optax.chain(optax.scale_by_adam(b2=0.99, eps_root=1e-16), optax.stateless(scaled))


def gpt(size: Size) -> Job:
    """Random tokens, one batch for all training steps and another for validation.

    The layers are recomputed, and logits exist for one row of tokens at a time.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    params, features = decoder(
        keys, size.layers, width=size.width, heads=size.heads, words=size.words, recompute=True
    )

    def loss(w, hyperparams, tokens):
        w = jax.tree.map(lambda x: x.astype(size.dtype), w)
        x = features(w, tokens[:, :-1])
        labels = tokens[:, 1:]
        return jnp.mean(gradhpo.chunked_cross_entropy(x, w["words"], labels, size.rows))

    train, val = (
        jax.random.randint(key, (size.rows, size.length + 1), 0, size.words) for key in keys[2:]
    )
    return Job(params, start(size), lambda index: train, val, loss, loss)
