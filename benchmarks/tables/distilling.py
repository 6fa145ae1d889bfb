"""Dataset distillation: images and a learning rate as hyperparameters, from random starts."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import gradhpo
from benchmarks.tables.small_sets import CLASSES, TRAIN, Digits, Network, labels_of


NETWORK = Network()
INNER_STEPS, OUTER_STEPS, OUTER_RATE = 30, 300, 0.02
# Hypergradients are clipped to it: at a rate near the edge of stability they explode.
LONGEST = 1.0
VAL_BATCH = 256  # images of the training set in each outer loss
FIRST_RATE, SOFTNESS = 0.3, 3.0  # at the start: the rate, and the logit of the true class
CALLS = 20  # that are timed together
Hyperparams = dict[str, Array]
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "exact": (gradhpo.UnrolledOptimizer, {}),
    'exact, checkpoints="sqrt"': (gradhpo.UnrolledOptimizer, {"checkpoints": "sqrt"}),
    "truncated": (gradhpo.UnrolledOptimizer, {"truncation": 10}),
    "DrMAD": (gradhpo.DrMADOptimizer, {}),
}


class Distilled(NamedTuple):
    images: Array
    labels: Array
    rate: float
    val_losses: np.ndarray
    refused: int  # validation losses that were not finite


def label_distributions(h: Hyperparams, classes: Array) -> Array:
    """Those that are learned, if they are."""
    if "logits" in h:
        return jax.nn.softmax(h["logits"])
    return jax.nn.one_hot(classes, CLASSES, dtype=jnp.float32)


def inner_loss(w: dict[str, Array], h: Hyperparams, classes: Array) -> Array:
    """The loss on the learned images; the batch is their classes."""
    return NETWORK.loss(w, h["images"], label_distributions(h, classes))


def outer_loss(w: dict[str, Array], h: Hyperparams, batch: tuple[Array, Array]) -> Array:
    """The loss on real images."""
    labels = jax.nn.one_hot(batch[1], CLASSES, dtype=jnp.float32)
    return NETWORK.loss(w, batch[0], labels)


LOSSES = gradhpo.LossFunctions(inner_loss, outer_loss)


def descent(h: Hyperparams) -> optax.GradientTransformation:
    return optax.sgd(jnp.exp(h["log_rate"]))


@functools.cache
def optimizer(method: str, inner_steps: int, outer_steps: int) -> gradhpo.BilevelOptimizer:
    """Made once, so that all seeds run one program."""
    kind, settings = METHODS[method]
    falling = optax.cosine_decay_schedule(OUTER_RATE, outer_steps)
    outer = optax.chain(optax.clip_by_global_norm(LONGEST), optax.adam(falling))
    return kind(descent, outer, unroll_steps=inner_steps, **settings)


def first(images: np.ndarray, soft: bool) -> Hyperparams:
    """Hyperparameters before they are tuned: real images."""
    h = {"images": jnp.asarray(images), "log_rate": jnp.log(jnp.float32(FIRST_RATE))}
    if soft:
        classes = labels_of(len(images) // CLASSES)
        h["logits"] = SOFTNESS * jax.nn.one_hot(classes, CLASSES, dtype=jnp.float32)
    return h


def distil(
    data: Digits, images: np.ndarray, seed: int, method: str = "exact", soft: bool = False,
    inner_steps: int = INNER_STEPS, outer_steps: int = OUTER_STEPS,
) -> Distilled:  # fmt: skip
    """From these images; every outer step trains a network from another random start."""
    chosen, classes = optimizer(method, inner_steps, outer_steps), labels_of(len(images) // CLASSES)
    key = jax.random.fold_in(jax.random.key(3), seed)
    source = gradhpo.ArrayData(data.train, min(VAL_BATCH, TRAIN), jax.random.fold_in(key, 1))
    state = chosen.init(NETWORK.start(key), first(images, soft))
    state, history = gradhpo.run(
        chosen, state, LOSSES, classes, source, num_steps=outer_steps, steps_per_episode=1,
        start_fn=NETWORK.start, key=key, progress=False,
    )  # fmt: skip
    h = state.hyperparams
    return Distilled(
        h["images"], label_distributions(h, classes), float(jnp.exp(h["log_rate"])),
        np.asarray(history["val_loss"]), int(np.sum(~np.isfinite(history["val_loss"]))),
    )  # fmt: skip


def cost(method: str, images: np.ndarray, data: Digits, inner_steps: int) -> dict[str, float]:
    """Milliseconds of CPU time and temporary MiB of one hypergradient; its cosine to the exact one.

    At the start of a search, without the new start of the network.
    """
    classes = labels_of(len(images) // CLASSES)
    val = data.train[0][:VAL_BATCH], data.train[1][:VAL_BATCH]

    def program(method: str) -> tuple[Callable, float]:
        chosen = optimizer(method, inner_steps, OUTER_STEPS)
        state = chosen.init(NETWORK.start(jax.random.key(4)), first(images, soft=False))
        of = lambda state, classes, val: chosen.compute_hypergradient(state, classes, val, LOSSES)
        compiled = jax.jit(of).lower(state, classes, val).compile()
        mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
        return lambda: jax.block_until_ready(compiled(state, classes, val)), mib

    flat = lambda g: np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)])
    call, mib = program(method)
    found, exact = flat(call()), flat(program("exact")[0]())
    cosine = found @ exact / (np.linalg.norm(found) * np.linalg.norm(exact))
    started = time.process_time()
    for _ in range(CALLS):
        call()
    ms = 1e3 * (time.process_time() - started) / CALLS
    return {"ms": ms, "mib": mib, "cosine": float(cosine)}
