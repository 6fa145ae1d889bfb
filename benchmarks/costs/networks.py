"""Exact hypergradients of three kinds of network, against `jax.grad` through the training loop.

The loop is written in two ways: as a plain `lax.scan`, and with `jax.checkpoint` on its body, which
is one more line and keeps states instead of activations, as we do. The second is the one to beat.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import gradhpo
from benchmarks.costs.handwritten_unrolled import plain_unrolled_hypergradient
from benchmarks.costs.problem import Job, job
from benchmarks.costs.programs import hypergradient_program
from benchmarks.timed import alternating
from gradhpo.diagnostics.cost import Program


ADAM = optax.adam(1e-3, eps_root=1e-16)


class Task(NamedTuple):
    """A network with its losses, and the number of inner steps."""

    job: Job
    steps: int


def weighted(forward: Callable, params: Any, inputs: Any) -> Job:
    """One weight per example as the only hyperparameters; all steps share one batch."""
    x, labels = inputs

    def mean(w, log_weights, batch):
        x, labels, index = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(forward(w, x), labels)
        return jnp.mean(jax.nn.sigmoid(log_weights[index]) * losses.reshape(len(x), -1).mean(1))

    batch = x, labels, jnp.arange(len(x))
    return Job(params, jnp.zeros(len(x)), lambda index: batch, batch, mean, mean)


def _matrices(key: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    keys = jax.random.split(key, len(shapes))
    fan_in = lambda shape: np.prod(shape[1:]) if len(shape) == 4 else shape[-2]
    return {
        name: jax.random.normal(k, shape) / np.sqrt(fan_in(shape))
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def convolutional(batch_size: int = 64, channels: int = 16) -> Task:
    """Three convolutions of 28 x 28 images, with group normalisation and `relu`, four steps."""
    shapes = {
        "first": (channels, 1, 3, 3), "second": (2 * channels, channels, 3, 3),
        "third": (2 * channels, 2 * channels, 3, 3), "out": (2 * channels, 10),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    norms = [eqx.nn.GroupNorm(4, channels=n, channelwise_affine=False) for n in (channels,)]
    norms += [eqx.nn.GroupNorm(4, channels=2 * channels, channelwise_affine=False)] * 2

    def forward(w, images):
        x = images
        for name, stride, norm in zip(("first", "second", "third"), (1, 2, 2), norms, strict=True):
            x = jax.lax.conv(x, w[name], (stride, stride), "SAME")
            x = jax.nn.relu(jax.vmap(norm)(x))
        return x.mean((2, 3)) @ w["out"]

    images = jax.random.normal(keys[1], (batch_size, 1, 28, 28))
    labels = jax.random.randint(keys[2], (batch_size,), 0, 10)
    return Task(weighted(forward, _matrices(keys[0], shapes), (images, labels)), 4)


def decoder(
    keys: Array, layers: int, *, width: int, heads: int, words: int, recompute: bool
) -> tuple[dict[str, Any], Callable]:
    """Parameters, and a function from them and tokens to the last hidden states.

    The layers are a scan, each under `jax.checkpoint` or not.
    """
    shapes = {name: (layers, width, width) for name in ("q", "k", "v", "o")}
    shapes |= {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}
    params = {"layers": _matrices(keys[0], shapes)}
    params |= _matrices(keys[1], {"words": (words, width)})

    def layer(x, w):
        split = lambda x: x.reshape(*x.shape[:-1], heads, -1)
        q, k, v = (split(_normed(x) @ w[name]) for name in "qkv")
        seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
        shares = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        x = x + jnp.einsum("bhts,bshd->bthd", shares, v).reshape(x.shape) @ w["o"]
        return x + jax.nn.gelu(_normed(x) @ w["up"]) @ w["down"], None

    def features(w, tokens):
        step = jax.checkpoint(layer) if recompute else layer
        x, _ = jax.lax.scan(step, w["words"][tokens], w["layers"])
        return _normed(x)

    return params, features


def _normed(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def transformer(
    layers: int = 10,
    *,
    width: int = 48,
    heads: int = 4,
    length: int = 32,
    batch_size: int = 8,
    words: int = 100,
    recompute: bool = True,
) -> Task:
    """A decoder that predicts random tokens, four steps."""
    keys = jax.random.split(jax.random.key(0), 3)
    params, features = decoder(
        keys, layers, width=width, heads=heads, words=words, recompute=recompute
    )
    tokens = jax.random.randint(keys[2], (batch_size, length + 1), 0, words)
    forward = lambda w, tokens: features(w, tokens) @ w["words"].T
    return Task(weighted(forward, params, (tokens[:, :-1], tokens[:, 1:])), 4)


TASKS = {
    "MLP 64-128-10, batch 128": lambda: Task(job(128), 20),
    "MLP 64-128-10, batch 1,000": lambda: Task(job(1_000), 20),
    "CNN, 3 convolutions, batch 64": convolutional,
    "transformer, 4 layers": lambda: transformer(4, recompute=False),
    "transformer, 10 layers": lambda: transformer(recompute=False),
    "transformer, 10 recomputed layers": transformer,
}


# These would take an hour on a CPU.
_WIDE = {"width": 512, "heads": 8, "length": 256, "batch_size": 16, "words": 8192}
ON_A_GPU = {
    "12 layers of 512": lambda: transformer(12, recompute=False, **_WIDE),
    "12 recomputed layers of 512": lambda: transformer(12, **_WIDE),
}


def programs(task: Task) -> dict[str, Callable[[], Program]]:
    """Makers of the library's program, and of `jax.grad` through both scans."""
    the_job, steps = task
    optimizer = gradhpo.UnrolledOptimizer(ADAM, unroll_steps=steps)
    given = (
        eqx.filter(the_job.params, eqx.is_inexact_array), the_job.hyperparams,
        the_job.train_data(0), the_job.val_batch,
    )  # fmt: skip

    def through_scan(checkpoint: bool) -> Program:
        return Program(
            plain_unrolled_hypergradient(the_job, ADAM, steps, checkpoint=checkpoint), *given
        )

    return {
        "gradhpo": lambda: hypergradient_program(optimizer, the_job),
        "checkpointed scan": lambda: through_scan(True),
        "plain scan": lambda: through_scan(False),
    }


def print_networks(repeats: int = 7) -> None:
    print(
        "\nExact hypergradient, Adam: gradhpo, and jax.grad through lax.scan, with jax.checkpoint\n"
        "on its body and without. Ratios are gradhpo / each"
    )
    print(f"  {'':36}  {'MiB':>8} {'G flops':>8} {'ms':>8} {'s to compile':>13}   ratios")
    tasks = TASKS | (ON_A_GPU if jax.default_backend() == "gpu" else {})
    for name, make in tasks.items():
        made, compiling = {}, {}
        for which, build in programs(make()).items():
            start = time.perf_counter()
            made[which] = build()
            compiling[which] = time.perf_counter() - start
        ours = made["gradhpo"]
        for which, program in made.items():
            line = (
                f"  {name if program is ours else '  ' + which:36}"
                f"  {program.temporary_bytes / 2**20:8.2f} {program.cost.flops / 1e9:8.3g}"
            )
            if program is ours:
                print(f"{line} {1e3 * ours.timed()[1]:8.1f} {compiling[which]:13.1f}", flush=True)
                continue
            try:
                found = alternating(ours, program, repeats=repeats)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{line}   does not fit into the memory of the device", flush=True)
                continue
            ratios = (
                ours.temporary_bytes / program.temporary_bytes,
                ours.cost.flops / program.cost.flops,
                found.ratio,
                compiling["gradhpo"] / compiling[which],
            )
            shown = "  ".join(f"{x:.2f}" for x in ratios)
            print(
                f"{line} {1e3 * found.second:8.1f} {compiling[which]:13.1f}   {shown}"
                f"  (time {found.low:.2f} to {found.high:.2f})",
                flush=True,
            )
