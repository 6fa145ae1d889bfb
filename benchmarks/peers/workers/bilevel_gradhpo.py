"""gradhpo's optimizers on the quadratic that benchopt's benchmark_bilevel simulates."""

import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from worker import serve

import gradhpo


class Quadratic(eqx.Module):
    """The mean quadratic of a batch, a block of neighbouring indices."""

    hess_inner: Float[Array, "n p p"]
    hess_outer: Float[Array, "n q q"]
    cross: Float[Array, "n q p"]
    linear_inner: Float[Array, "n p"]
    linear_outer: Float[Array, "n q"]

    def __call__(
        self, z: Float[Array, " p"], x: Float[Array, " q"], batch: Int[Array, " block"]
    ) -> Float[Array, ""]:
        of_block = lambda a: jax.lax.dynamic_slice_in_dim(a, batch[0], len(batch))
        value = (of_block(self.hess_inner) @ z) @ z / 2 + (of_block(self.hess_outer) @ x) @ x / 2
        value += (of_block(self.cross) @ z) @ x
        value += of_block(self.linear_inner) @ z + of_block(self.linear_outer) @ x
        return jnp.mean(value)


class Blocks(eqx.Module):
    """All blocks in random order, repeatedly, as in the benchmark's sampler."""

    starts: Int[Array, " draws"]
    size: int = eqx.field(static=True)

    def __call__(self, index: Int[Array, ""]) -> Int[Array, " block"]:
        start = self.starts[index % len(self.starts)]
        return start + jnp.arange(self.size, dtype=start.dtype)


class Given(NamedTuple):
    inner: Quadratic
    outer: Quadratic
    z: Array
    x: Array


made: list[Given] = []


def load(path: str) -> None:
    with np.load(path) as found:
        names = list(Quadratic.__dataclass_fields__)
        levels = (
            Quadratic(**{name: jnp.asarray(found[f"{level}_{name}"]) for name in names})
            for level in ("inner", "outer")
        )
        starts = (jnp.asarray(found[f"{level}_start"]) for level in ("inner", "outer"))
        made[:] = [Given(*levels, *starts)]


def falling(rate: float, exponent: float, steps: int) -> Callable[[Array], Array]:
    """A rate shared by the `steps` inner steps of an outer step."""
    return lambda count: rate / (count // steps + 1) ** exponent


def optimizer(
    name: str,
    *,
    step_size: float,
    outer_ratio: float = 1.0,
    inner_steps: int = 1,
    exponents: tuple[float, float] = (0.0, 0.0),
    multipliers: tuple[float, ...] = (),
    products: int = 10,
    curvature_batches: int = 1,
) -> Any:
    """`exponents`: the powers with which the inner and the outer rate fall."""
    inner = optax.sgd(falling(step_size, exponents[0], inner_steps))
    outer = optax.sgd(falling(step_size / outer_ratio, exponents[1], 1))
    if name in ("soba", "amigo"):
        both = {"inner_steps": inner_steps, "adjoint_steps": inner_steps}
        return gradhpo.SOBAOptimizer(inner, outer, **both, adjoint_optimizer=inner)
    if name == "stocbio":
        solver = gradhpo.Neumann(products + 1, step_size, fresh_batches=True)
        return gradhpo.ImplicitOptimizer(inner, outer, solver, inner_steps)
    if name == "cg":
        solver = lx.CG(rtol=0.0, atol=0.0, max_steps=products)
        return gradhpo.ImplicitOptimizer(
            inner, outer, solver, inner_steps, curvature_batches=curvature_batches
        )
    if name == "f2sa":
        kept = jnp.asarray(multipliers)
        penalty = lambda taken: kept[jnp.minimum(taken, len(kept) - 1)]
        return gradhpo.PenaltyOptimizer(inner, outer, penalty, inner_steps)
    if name == "bome":
        return gradhpo.BOMEOptimizer(inner, outer, inner_steps)
    if name == "nhgd":
        return gradhpo.NHGDOptimizer(inner, outer, inner_steps)
    raise ValueError(f"no method is called {name}")


@functools.cache
def kept_optimizer(name: str, settings: str) -> Any:
    """The same one for every seed, so that only the first compiles."""
    return optimizer(name, **json.loads(settings))


def iterates(name: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Parameters and hyperparameters after each of the first steps, on all of the data."""
    chosen, given = optimizer(name, **settings), made[0]
    train, val = (jnp.arange(len(level.cross)) for level in (given.inner, given.outer))
    state = chosen.init(given.z, given.x)
    inner, outer = [], []
    for _ in range(steps):
        state = chosen.step(state, train, val, given.inner, given.outer)
        # F2SA: the other program returns the penalised copy.
        w = state.memory.penalised.w if name == "f2sa" else state.params
        inner.append(w.tolist())
        outer.append(state.hyperparams.tolist())
    return {"inner": inner, "outer": outer}


def timed(
    name: str, seed: int, chunks: int, chunk: int, batch_size: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Seconds since the start, and the hyperparameters, after each chunk of `run`."""
    chosen, given = kept_optimizer(name, json.dumps(settings)), made[0]
    losses = gradhpo.LossFunctions(given.inner, given.outer)
    random, draws = np.random.default_rng(seed), chunks * chunk * chosen.num_inner_steps

    def blocks(count: int) -> Blocks:
        passes = -(-draws // (count // batch_size))
        order = [random.permutation(count // batch_size) for _ in range(passes)]
        starts = batch_size * np.concatenate(order)
        return Blocks(jnp.asarray(starts, jnp.int32), batch_size)

    train, val = blocks(len(given.inner.cross)), blocks(len(given.outer.cross))

    def ran(chunks: int) -> tuple[list[float], list[Any]]:
        state = chosen.init(given.z, given.x)
        seconds, outer, start = [], [], time.perf_counter()

        def note(state: Any, metrics: Any) -> None:
            outer.append(np.asarray(state.hyperparams).tolist())
            seconds.append(time.perf_counter() - start)

        gradhpo.run(
            chosen, state, losses, train, val,
            num_steps=chunks * chunk, chunk_size=chunk, callbacks=[note], progress=False,
        )  # fmt: skip
        return seconds, outer

    ran(2)  # compiled
    seconds, outer = ran(chunks)
    return {"seconds": seconds, "outer": outer}


if __name__ == "__main__":
    serve(load=load, iterates=iterates, timed=timed)
