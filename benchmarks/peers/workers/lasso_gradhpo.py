"""The Lasso by gradhpo: `ImplicitOptimizer` around scikit-learn's coordinate descent."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lasso_programs import OUTER_RATE, Split, serve_searches
from sklearn.linear_model import Lasso

import gradhpo


CLOSE, USUAL = 1e-14, 1e-6  # tolerances of scikit-learn
Batch = tuple[jax.Array, jax.Array, jax.Array]  # x, y, and the squared error's curvature


def error(w: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def proximal_step(w: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """For half the error and the l1 norm, each weight times its penalty."""
    x, y, curvature = batch
    moved = w - x.T @ (x @ w - y) / (len(x) * curvature)
    return jnp.sign(moved) * jax.nn.relu(jnp.abs(moved) - jnp.exp(h) / curvature)


def fitted(w, x, y, penalty, tolerance: float) -> np.ndarray:
    """From weights w; dividing features by their penalties makes it an ordinary Lasso."""
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
    """The weights are already the solution."""
    return w


def batches(split: Split) -> tuple[Batch, Batch]:
    largest = np.linalg.norm(split.x, 2) ** 2 / len(split.x)
    of = lambda x, y: (jnp.asarray(x), jnp.asarray(y), jnp.asarray(largest))
    return of(split.x, split.y), of(split.u, split.v)


def optimizer(split: Split, inner: Callable, outer=None) -> gradhpo.ImplicitOptimizer:
    """With room for a support a third larger than at the start."""
    room = min(split.w.size, int(1.34 * np.count_nonzero(split.w)) + 8)
    return gradhpo.ImplicitOptimizer(
        outer_optimizer=outer,
        inner_solver=inner,
        update_fn=proximal_step,
        linear_solver=gradhpo.Support(max_active=room),
    )


LOSSES = gradhpo.LossFunctions(error, error)


def once(split: Split, inner: Callable, start: np.ndarray) -> Callable[[], dict]:
    chosen = optimizer(split, inner)
    state = chosen.init(jnp.asarray(start), jnp.asarray(split.h))
    train, val = batches(split)

    def program() -> dict:
        g = chosen.compute_hypergradient(state, train, val, LOSSES)
        return {"hypergradient": jax.block_until_ready(g)}

    return program


def derive(split: Split, how: str) -> Callable[[], dict]:
    """At the given solution."""
    return once(split, known, split.w)


def solve(split: Split, how: str) -> Callable[[], dict]:
    """From zero weights."""
    return once(split, by_scikit_learn(CLOSE), np.zeros_like(split.w))


def search(split: Split, how: str) -> Callable[[], dict]:
    """`how`: `descent` at a fixed rate, or Adam; fits start from the previous weights."""
    train, val = batches(split)
    if how == "descent":
        chosen = optimizer(split, by_scikit_learn(1e-10), optax.sgd(OUTER_RATE))
    else:
        falling = optax.cosine_decay_schedule(0.3, split.steps)
        chosen = optimizer(split, by_scikit_learn(USUAL), optax.adam(falling, b1=0.5))
    state = chosen.init(jnp.zeros_like(jnp.asarray(split.w)), jnp.asarray(split.h))
    record = None if split.h.ndim == 0 else lambda state: {"hyperparams": state.hyperparams}

    def program() -> dict:
        _, history = gradhpo.run(
            chosen, state, LOSSES, train, val, num_steps=split.steps, chunk_size=split.steps,
            progress=False, record=record,
        )  # fmt: skip
        # Recorded penalties are those after the update; the loss belongs to those before it.
        tried = np.concatenate([np.asarray(split.h)[None], history["hyperparams"]])
        losses = np.asarray(history["val_loss"])
        best = int(np.argmin(losses))
        return {
            "h": tried[split.steps - 1], "best": tried[best], "loss": losses[best],
            "steps": split.steps, "descent": how == "descent",
        }  # fmt: skip

    return program


serve_searches(derive=derive, solve=solve, search=search)
