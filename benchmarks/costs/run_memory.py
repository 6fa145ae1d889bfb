"""The memory of a chunk of `run`, against a hand-written donated scan and plain training.

Inner and outer Adam, one inner step, and a network whose parameters outweigh its activations. The
hand-written scan refuses non-finite steps too: parameters and both moments exist twice, old and
new, until the hypergradient is known.
"""

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import gradhpo
from gradhpo.data.sources import Feed, as_source
from gradhpo.training.chunk import Chunk
from gradhpo.training.refused import Refused
from gradhpo.utils.dispatch import traced
from gradhpo.utils.trees import inexact_bytes


ADAM, OUTER = optax.adam(1e-3, eps_root=1e-16), optax.adam(1e-2)
ALGORITHMS = {
    "OneStepOptimizer": gradhpo.OneStepOptimizer(ADAM, OUTER),
    "GreedyOptimizer": gradhpo.GreedyOptimizer(ADAM, OUTER),
    "UnrolledOptimizer": gradhpo.UnrolledOptimizer(ADAM, OUTER),
}
LENGTH = 100  # steps of a chunk


class Network(NamedTuple):
    """Parameters, hyperparameters (one weight decay per layer), and batches."""

    params: list[Array]
    log_decay: Array
    data: gradhpo.ArrayData
    val: tuple[Array, Array]


def network(width: int = 680, batch_size: int = 32) -> Network:
    """64 inputs, three hidden layers, 10 classes: a million parameters."""
    random = np.random.default_rng(0)
    sizes = [64, width, width, width, 10]
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / 8, jnp.float32)
    params = [draw(*shape) for shape in itertools.pairwise(sizes)]
    x, y = draw(1_000, 64), jnp.asarray(random.integers(0, 10, 1_000), jnp.int32)
    data = gradhpo.ArrayData((x, y), batch_size, jax.random.key(1))
    return Network(params, jnp.full(4, -5.0, jnp.float32), data, (x[:batch_size], y[:batch_size]))


def val_loss(w: list[Array], h: Array, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    for matrix in w[:-1]:
        x = jnp.tanh(x @ matrix)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w[-1], y))


def train_loss(w: list[Array], h: Array, batch: tuple[Array, Array]) -> Array:
    squares = jnp.stack([jnp.sum(jnp.square(matrix)) for matrix in w])
    return val_loss(w, h, batch) + jnp.exp(h) @ squares


LOSSES = gradhpo.LossFunctions(train_loss, val_loss)


class Bytes(NamedTuple):
    """Memory of a compiled program, and the part its results share with its arguments."""

    held: int
    shared: int


def bytes_of(traced_program: Any) -> Bytes:
    found = traced_program.lower().compile().memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return Bytes(held - found.alias_size_in_bytes, found.alias_size_in_bytes)


def of_run(optimizer: gradhpo.BilevelOptimizer, of: Network) -> Bytes:
    """A chunk as `run` compiles it."""
    sources = (
        as_source(of.data, "train_data", optimizer.num_inner_steps),
        as_source(of.val, "", None),
    )
    drawn = Feed(*sources).draw_chunk(LENGTH, 1, in_part=False)
    assert drawn is not None
    refused = Refused.at_first(10, 0)
    chunk = Chunk(optimizer, LOSSES, *drawn[:2], None, refused=refused)
    state = optimizer.init(of.params, of.log_decay)
    return bytes_of(traced(Chunk.run_steps, chunk, state, LENGTH))


def by_hand(of: Network, *, scanned: bool = False) -> Bytes:
    """The same in plain JAX: the exact hypergradient of one step of Adam.

    By `jax.vjp` of the step, or if `scanned` by `jax.grad` through a checkpointed scan of one step.
    """

    def body(of: Network, carry: PyTree, number: Array):
        w, s, h, outer, rejected = carry

        def update(h: Array):
            value, gradient = jax.value_and_grad(train_loss)(w, h, of.data(number))
            updates, new_s = ADAM.update(gradient, s, w)
            return optax.apply_updates(w, updates), (new_s, value)

        def whole(h: Array):
            step = lambda carry, _: _scanned_step(of.data(number), h, carry)
            step = jax.checkpoint(step, prevent_cse=False)
            (new_w, new_s), values = jax.lax.scan(step, (w, s), None, length=1)
            return val_loss(new_w, h, of.val), (new_w, new_s, values[0])

        if scanned:
            by_grad = jax.value_and_grad(whole, has_aux=True)
            (val_value, (new_w, new_s, train_value)), hypergradient = by_grad(h)
        else:
            new_w, pull, (new_s, train_value) = jax.vjp(update, h, has_aux=True)
            val_value, alpha = jax.value_and_grad(val_loss)(new_w, h, of.val)
            (hypergradient,) = pull(alpha)
        updates, new_outer = OUTER.update(hypergradient, outer, h)
        new = (new_w, new_s, optax.apply_updates(h, updates), new_outer)
        found = jax.tree.leaves((new, hypergradient))
        fine = jnp.stack([jnp.all(jnp.isfinite(x)) for x in found]).all()
        kept = jax.tree.map(lambda x, y: jnp.where(fine, x, y), new, (w, s, h, outer))
        norms = [optax.tree.norm(x) for x in (hypergradient, kept[0], kept[2])]
        return (*kept, rejected + ~fine), (train_value, val_value, *norms)

    h, rejected = of.log_decay, jnp.zeros((), jnp.int32)
    first = (of.params, ADAM.init(of.params), h, OUTER.init(h), rejected)
    return bytes_of(_scan(body, donate=True).trace(first, of))


def _scanned_step(batch: tuple[Array, Array], h: Array, carry: tuple) -> tuple:
    w, s = carry
    value, gradient = jax.value_and_grad(train_loss)(w, h, batch)
    updates, s = ADAM.update(gradient, s, w)
    return (optax.apply_updates(w, updates), s), value


def plain(of: Network, *, donate: bool) -> Bytes:
    """Training without hypergradients or refusal of non-finite steps."""

    def body(of: Network, carry: PyTree, number: Array):
        w, s = carry
        value, gradient = jax.value_and_grad(train_loss)(w, of.log_decay, of.data(number))
        updates, s = ADAM.update(gradient, s, w)
        return (optax.apply_updates(w, updates), s), value

    return bytes_of(_scan(body, donate=donate).trace((of.params, ADAM.init(of.params)), of))


def _scan(body: Callable, *, donate: bool) -> Any:
    steps = jnp.arange(LENGTH, dtype=jnp.int32)
    scanned = lambda carry, of: jax.lax.scan(functools.partial(body, of), carry, steps)
    return jax.jit(scanned, donate_argnums=(0,) if donate else ())


def bytes_alive(of: Network, callback: Callable | None) -> int:
    """The most that arrays hold at the end of a chunk of a run, including the caller's.

    Measured by a callback that needs no state; `callback` is a user's, or none.
    """
    optimizer, alive = ALGORITHMS["OneStepOptimizer"], []
    state = optimizer.init(of.params, of.log_decay)

    def watch(state, metrics):
        gc.collect()
        alive.append(sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted()))

    watch.reads_states = False  # pyright: ignore[reportFunctionMemberAccess]
    watch(None, None)
    before = alive.pop()
    gradhpo.run(
        optimizer, state, LOSSES, of.data, of.val, num_steps=10, chunk_size=2, progress=False,
        callbacks=[watch, *([callback] if callback else [])],
    )  # fmt: skip
    return max(alive) - before


def print_run_memory() -> None:
    of = network()
    size = inexact_bytes(of.params)
    shown = lambda x: f"{x / size:6.2f}"
    print(
        f"\nMemory of {LENGTH} steps in one program, in copies of the parameters "
        f"({size / 2**20:.1f} MiB): Adam, one inner step"
    )
    hand, training = by_hand(of), [plain(of, donate=x).held for x in (True, False)]
    print(f"  plain training, donated and not      {' '.join(map(shown, training))}")
    print(f"  by hand, donated                     {shown(hand.held)}")
    print(f"    jax.grad, checkpointed scan        {shown(by_hand(of, scanned=True).held)}")
    for name, optimizer in ALGORITHMS.items():
        ours = of_run(optimizer, of)
        print(
            f"  {name:36} {shown(ours.held)}, {ours.held / hand.held:.3f} of that by hand"
            f" (without donation {shown(ours.held + ours.shared)})",
            flush=True,
        )
    print("\nWhat `run` adds to the caller's state (3 copies of the parameters) between two chunks")
    for name, callback in (("without callbacks", None), ("with one", lambda state, metrics: None)):
        print(f"  {name:36} {shown(bytes_alive(of, callback))}")
