"""The Lasso by gradhpo: `ImplicitOptimizer` around scikit-learn's coordinate descent."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lasso_programs import OUTER_RATE, Split, serve_searches
from sklearn.linear_model import Lasso, lasso_path

import gradhpo


CLOSE, USUAL = 1e-14, 1e-6  # tolerances of scikit-learn
GRID = 100
Batch = tuple[jax.Array, jax.Array, jax.Array]  # x, y, and the curvature of their squared error


def error(w: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def proximal_step(w: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """A proximal step on half the error plus the l1 norm weighted by the penalties."""
    x, y, curvature = batch
    moved = w - x.T @ (x @ w - y) / (len(x) * curvature)
    return jnp.sign(moved) * jax.nn.relu(jnp.abs(moved) - jnp.exp(h) / curvature)


def fitted(w, x, y, penalty, tolerance: float) -> np.ndarray:
    """From weights w; features divided by their penalties make it an ordinary Lasso."""
    w, x, y, penalty = (np.asarray(a) for a in (w, x, y, penalty))
    lasso = Lasso(
        alpha=1.0 if penalty.ndim else float(penalty),
        fit_intercept=False, tol=tolerance, max_iter=10_000, warm_start=True,
    )  # fmt: skip
    scale = penalty if penalty.ndim else 1.0
    lasso.coef_ = np.array(w * scale)
    return lasso.fit(np.asfortranarray(x / scale), np.array(y)).coef_ / scale


def by_scikit_learn(tolerance: float) -> Callable:
    fit = functools.partial(fitted, tolerance=tolerance)
    return lambda w, h, batch: jax.pure_callback(fit, w, w, *batch[:2], jnp.exp(h))


def known(w: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """The weights are the solution already."""
    return w


def batches(split: Split) -> tuple[Batch, Batch]:
    largest = np.linalg.norm(split.x, 2) ** 2 / len(split.x)
    of = lambda x, y: (jnp.asarray(x), jnp.asarray(y), jnp.asarray(largest))
    return of(split.x, split.y), of(split.u, split.v)


def optimizer(split: Split, how: str, inner: Callable, outer=None) -> gradhpo.ImplicitOptimizer:
    """By GMRES, the default, or with room for a third more weights in the support than at first."""
    room = min(split.w.size, int(1.34 * np.count_nonzero(split.w)) + 8)
    return gradhpo.ImplicitOptimizer(
        outer_optimizer=outer,
        inner_solver=inner,
        update_fn=proximal_step,
        linear_solver=None if how == "GMRES" else gradhpo.Support(max_active=room),
    )


LOSSES = gradhpo.LossFunctions(error, error)


def once(split: Split, how: str, inner: Callable, start: np.ndarray) -> Callable[[], dict]:
    chosen = optimizer(split, how, inner)
    state = chosen.init(jnp.asarray(start), jnp.asarray(split.h))
    train, val = batches(split)

    def program() -> dict:
        g = chosen.compute_hypergradient(state, train, val, LOSSES)
        return {"hypergradient": jax.block_until_ready(g)}

    return program


def derive(split: Split, how: str) -> Callable[[], dict]:
    """At the solution, which is given."""
    return once(split, how, known, split.w)


def solve(split: Split, how: str) -> Callable[[], dict]:
    """From weights of 0."""
    return once(split, how, by_scikit_learn(CLOSE), np.zeros_like(split.w))


def search(split: Split, how: str) -> Callable[[], dict]:
    """`how`: `descent` at a fixed rate, a `grid`, or Adam with the linear solver of that name.

    Fits start from the weights before.
    """
    if how == "grid":
        return grid(split)
    train, val = batches(split)
    if how == "descent":
        chosen = optimizer(split, how, by_scikit_learn(1e-10), optax.sgd(OUTER_RATE))
    else:
        falling = optax.cosine_decay_schedule(0.3, split.steps)
        chosen = optimizer(split, how, by_scikit_learn(USUAL), optax.adam(falling, b1=0.5))
    state = chosen.init(jnp.zeros_like(jnp.asarray(split.w)), jnp.asarray(split.h))
    record = None if split.h.ndim == 0 else lambda state: {"hyperparams": state.hyperparams}

    def program() -> dict:
        _, history = gradhpo.run(
            chosen, state, LOSSES, train, val, num_steps=split.steps, chunk_size=split.steps,
            progress=False, record=record,
        )  # fmt: skip
        # What is recorded follows the update; the loss is that of the penalties before it.
        tried = np.concatenate([np.asarray(split.h)[None], history["hyperparams"]])
        losses = np.asarray(history["val_loss"])
        best = int(np.argmin(losses))
        return {
            "h": tried[split.steps - 1], "best": tried[best], "loss": losses[best],
            "steps": split.steps, "descent": how == "descent",
        }  # fmt: skip

    return program


def grid(split: Split) -> Callable[[], dict]:
    """One penalty of a grid, by scikit-learn's path at its own tolerance."""

    def program() -> dict:
        penalties, weights, _ = lasso_path(split.x, split.y, alphas=GRID, eps=1e-3)
        losses = np.mean((split.u @ weights - split.v[:, None]) ** 2, axis=0)
        best = np.log(penalties[np.argmin(losses)])
        return {"h": best, "best": best, "loss": losses.min(), "steps": GRID, "descent": False}

    return program


serve_searches(derive=derive, solve=solve, search=search)
