"""How well the Fisher matrix replaces the Hessian of a network, and at what cost."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, PyTree
from sklearn.datasets import load_digits

import gradhpo
from benchmarks.costs.natural_flops import STEPS, of_estimate, relative
from gradhpo.algorithms.fisher import STRUCTURES


PENALTY = 1e-3  # on each pixel
REST = 1e-3  # the penalty on everything but the first layer
RESIDUAL = 1e-5  # norm of the training gradient at the end of training
BATCH, BATCHES = 128, 2_000
NEUMANN_STEP = 0.5
STILL = optax.sgd(0.0)  # all hypergradients below are taken at one point


def logits(w: PyTree, x: Array) -> Array:
    return jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"] + w["last"]


def error(w: PyTree, h: Array, batch: PyTree) -> Array:
    x, labels = batch
    given = logits(w, x), labels
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(*given))


def penalty(w: PyTree, h: Array) -> Array:
    """A penalty for each pixel, and a fixed one for everything else."""
    others = sum(jnp.sum(w[name] ** 2) for name in ("bias", "out", "last"))
    return (jnp.sum(jnp.exp(h)[:, None] * w["in"] ** 2) + REST * others) / 2


def train_loss(w: PyTree, h: Array, batch: PyTree) -> Array:
    return error(w, h, batch) + penalty(w, h)


class Converged(NamedTuple):
    """A network at the optimum of its penalised loss, with the data of both losses."""

    w: PyTree
    h: Array
    train: PyTree
    val: PyTree
    residual: float  # the norm of the training gradient


def digits(pooled: bool = False) -> tuple[PyTree, PyTree]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    if pooled:
        x = x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    x, y = jnp.asarray(x[order] / 16), jnp.asarray(y[order], jnp.int32)
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def network(sizes: tuple[int, int, int], seed: int = 0) -> PyTree:
    keys = jax.random.split(jax.random.key(seed))
    # Drawn in float32, so that the network is the same in float64.
    drawn = lambda key, *size: jax.random.normal(key, size, jnp.float32).astype(float)
    of_layer = lambda key, m, n: drawn(key, m, n) / np.sqrt(m)
    return {
        "in": of_layer(keys[0], *sizes[:2]),
        "bias": jnp.zeros(sizes[1]),
        "out": of_layer(keys[1], *sizes[1:]),
        "last": jnp.zeros(sizes[2]),
    }


@jax.jit
def _trained(w: PyTree, h: Array, batch: PyTree) -> tuple[PyTree, Array]:
    """By L-BFGS on all of the data."""
    objective = lambda w: train_loss(w, h, batch)
    method, evaluate = optax.lbfgs(), optax.value_and_grad_from_state(objective)

    def step(carried):
        w, s, _, count = carried
        value, g = evaluate(w, state=s)
        u, s = method.update(g, s, w, value=value, grad=g, value_fn=objective)
        return optax.apply_updates(w, u), s, optax.tree.norm(g), count + 1

    goes_on = lambda carried: (carried[2] > RESIDUAL) & (carried[3] < 2_000)
    w, _, residual, _ = jax.lax.while_loop(
        goes_on, step, (w, method.init(w), jnp.asarray(jnp.inf), 0)
    )
    return w, residual


def fitted() -> Converged:
    """The network 64-12-10, which fits 1,000 digits."""
    train, val = digits()
    h = jnp.full(64, np.log(PENALTY), train[0].dtype)
    w, residual = _trained(network((64, 12, 10)), h, train)
    return Converged(w, h, train, val, float(residual))


def well_specified(copies: int = 100) -> Converged:
    """A network 16-6-10 on 4 x 4 digits, repeated, with labels drawn from the network.

    The logits come from a network fitted to the digits, halved: a confident model would always draw
    the same label.
    """
    train, val = digits(pooled=True)
    h = jnp.full(16, np.log(PENALTY), train[0].dtype)
    w, _ = _trained(network((16, 6, 10)), h, train)
    w = w | {"out": w["out"] / 2, "last": w["last"] / 2}
    x = jnp.tile(train[0], (copies, 1))
    train = x, jax.random.categorical(jax.random.key(1), logits(w, x).astype(jnp.float32))
    w, residual = _trained(w, h, train)
    return Converged(w, h, train, val, float(residual))


class Estimate(NamedTuple):
    cosine: float
    length: float
    error: float  # norm of the difference, relative to the exact hypergradient


def methods() -> dict[str, tuple[Any, int]]:
    """By name: the optimizer and its number of training batches (0: one, with all data)."""
    natural = functools.partial(gradhpo.NHGDOptimizer, STILL, penalty=penalty, damping=1e-5)
    batches = functools.partial(natural, inner_steps=BATCHES, decay=1 - 2 / BATCHES)
    found: dict[str, tuple[Any, int]] = {}
    structures: list[Any] = list(STRUCTURES)
    for name in structures:
        found[f"{name}, each example"] = natural(structure=name, per_example=True), 0
    for name in structures:
        found[f"{name}, {BATCHES} batches"] = batches(structure=name), BATCHES
    solver = functools.partial(gradhpo.ImplicitOptimizer, STILL)
    cg = lambda count: lx.CG(rtol=0.0, atol=0.0, max_steps=count)
    solvers = {"CG(3)": cg(3), "Neumann(5)": gradhpo.Neumann(5, NEUMANN_STEP)}
    found["identity"] = (gradhpo.NHGDOptimizer(STILL, structure="diagonal", damping=1e6), 0)
    for name, linear_solver in solvers.items():
        found[f"{name}, all data"] = (solver(linear_solver=linear_solver), 0)
        found[f"{name}, one batch"] = (solver(linear_solver=linear_solver), 1)
    found["CG(12), one batch"] = (solver(linear_solver=cg(12)), 1)
    return found


def estimates(at: Converged, chosen: dict[str, Any]) -> dict[str, Estimate]:
    """Each method against the solution with the Hessian of all training data."""
    reference = gradhpo.ImplicitOptimizer(STILL, linear_solver=lx.LU())

    def hypergradient(optimizer: Any, count: int) -> np.ndarray:
        batch = at.train
        if count:
            batch = gradhpo.ArrayData(at.train, BATCH, key=jax.random.key(2)).stack(0, count)
        state = optimizer.init(at.w, at.h)
        found = optimizer.compute_hypergradient(state, batch, at.val, train_loss, error)
        return np.asarray(found, np.float64)

    exact, norm = hypergradient(reference, 0), np.linalg.norm
    rows = {}
    for name, (optimizer, count) in chosen.items():
        g = hypergradient(optimizer, count)
        size, away = norm(g) / norm(exact), norm(g - exact) / norm(exact)
        rows[name] = Estimate(float(g @ exact / norm(g) / norm(exact)), float(size), float(away))
    return rows


def work(at: Converged, name: str) -> float | None:
    """What the estimate adds to an outer step, in training gradients; `None` on all data."""
    batch = jax.tree.map(lambda x: x[:BATCH], at.train)
    gradient = lambda w: jax.grad(train_loss)(w, at.h, batch)
    kind, data = name.split(", ") if ", " in name else (name, "")
    if data == "one batch":
        count = int(kind[kind.index("(") + 1 : -1])
        # A series of n terms takes n - 1 products. One more, for the mixed derivative.
        return of_estimate(at.w, gradient, None, count + (not kind.startswith("Neumann")))
    return of_estimate(at.w, gradient, kind, 0) if data == f"{BATCHES} batches" else None


def print_natural() -> None:
    for title, at in (
        ("MLP 64-12-10, fitted to 1,000 digits", fitted()),
        ("MLP 16-6-10, 100,000 examples with labels that it draws", well_specified()),
    ):
        print(f"\n{title}: one penalty for each pixel, at the optimum")
        print(f"  {'':26} cosine  length  error   work  beside the exact implicit hypergradient")
        for name, found in estimates(at, methods()).items():
            row = f"{name:26} {found.cosine:6.3f} {found.length:7.3g} {found.error:6.2f}"
            gradients = work(at, name)
            print(f"  {row}" + ("" if gradients is None else f" {gradients:6.1f}"))
        print(f"  work: added to {STEPS} inner steps, in training gradients of {BATCH} examples")
    print(f"\nFlops of an outer step / of its {STEPS} inner steps: MLP 64-128-10, batches of 128")
    print(f"  {'diagonal':32} {relative('diagonal'):.2f}")
    for every in (1, 2, 4, 10):
        ratio = relative("kronecker", every)
        print(f"  {f'kronecker, factor_every={every}':32} {ratio:.2f}")
    print(f"  {'dense, 9,610 weights':32} {relative('dense'):,.0f}")
    print("  eigh is counted as 9 n^3, Cholesky as n^3 / 3: the compiler counts LAPACK as nothing")
