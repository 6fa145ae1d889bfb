"""One point and one batch that represent a stretch of training, and the regression on them."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradhpo.algorithms.discount import geometric_sum
from gradhpo.extend import (
    DrawnStack,
    InnerState,
    InnerUpdate,
    Problem,
    accumulation_dtype,
    along_a_line,
    cast_like,
    check_leading_axis,
    check_same_structure,
    cotangent_at_end,
    is_key,
    key_of_numbers,
    numbers_of_key,
    pull_step,
    tree_dot,
    tree_lerp,
    tree_zeros_like,
)


class Distilled(eqx.Module):
    r"""$w^*$, a discounted mean of the parameters, and $D^*$, examples drawn in the same shares.

    `w_star` is kept in float32 or float64: bfloat16 would round away steps of a hundredth of the
    difference. Without `d_star` (and `key`) the current batch is used instead. `key` holds the
    numbers of a PRNG key, so that a state can be serialised.
    """

    w_star: PyTree
    d_star: PyTree
    key: Array | None

    @classmethod
    def create(cls, w: PyTree, batch: PyTree, key: Array | None) -> "Distilled":
        """Made from an example batch and a key, or from neither."""
        if (batch is None) != (key is None):
            given, missing = ("batch", "key") if key is None else ("key", "batch")
            raise ValueError(
                f"init got {given} but no {missing}: the distilled data set needs both, "
                "init(params, hyperparams, batch=train_batch, key=jax.random.key(0)); without "
                "either, every step distils with its own batch"
            )
        if batch is not None:
            batch = eqx.filter(batch, _is_examples)
            check_leading_axis(batch, "init(batch=...)")
        wide = accumulation_dtype(w)
        numbers = None if key is None else numbers_of_key(key)
        return cls(jax.tree.map(lambda x: x.astype(wide), w), batch, numbers)

    def add(self, w: PyTree, batch: PyTree, share: Float[Array, ""]) -> "Distilled":
        r"""Keeps `share` of the earlier content and takes `1 - share` from `(w, batch)`.

        Each slot of the data is replaced independently with probability `1 - share`: sizes stay
        fixed, and the expected shares match $w^*$. With shares rounded to whole examples,
        nothing would be replaced once a share is below half an example.
        """
        wide = jax.tree.map(lambda x, like: x.astype(like.dtype), w, self.w_star)
        w_star = tree_lerp(wide, self.w_star, share)
        if self.d_star is None:
            return dataclasses.replace(self, w_star=w_star)
        examples = eqx.filter(batch, _is_examples)
        check_same_structure(
            examples,
            self.d_star,
            "the training batch",
            "Make the state with an example of it: init(params, hyperparams, batch=..., key=...).",
        )
        assert self.key is not None
        key, draw = jax.random.split(key_of_numbers(self.key))
        size = jax.tree.leaves(self.d_star)[0].shape[0]
        replaced = jax.random.uniform(draw, (size,), share.dtype) < 1 - share

        def choose(new, old):
            of_example = jnp.reshape(replaced, (size, *[1] * (old.ndim - 1)))
            return jnp.where(of_example, new, old)

        d_star = jax.tree.map(choose, examples, self.d_star)
        return Distilled(w_star, d_star, numbers_of_key(key))

    def product(
        self, phi: InnerUpdate, z: InnerState, hyperparams: PyTree, t: ArrayLike, alpha: InnerState
    ) -> PyTree:
        r"""$\alpha\,\partial\Phi(w^*, \lambda; D^*)/\partial\lambda$ at `z`, except for $w^*$.

        Only the part of `alpha` on the parameters is used, not the part on the running state.
        Anything in a batch that is not an example (a PRNG key) comes from step `t`.
        """
        if self.d_star is not None:
            batch = eqx.combine(self.d_star, phi.batch(t))
            # Not the batch itself: its keys are already folded with t.
            phi = dataclasses.replace(phi, train_batch=DrawnStack(lambda t: batch))
        _, _, pull = phi.vjp(z._replace(w=cast_like(self.w_star, alpha.w)), hyperparams, t)
        return pull(InnerState(alpha.w))[1]


def regress(
    problem: Problem, distilled: Distilled, gamma: Float[Array, ""], num_steps: int
) -> tuple[Array, Array, Array | None]:
    r"""$\sum_s x_s y_s$ and $\sum_s x_s^2$ of one episode (algorithm 4), and the next key.

    Goes back along the line. After s steps, `bar` holds the hypergradient $g^{SO}_s$ of the last s
    steps, and `distilled` their distilled point and data.
    """
    phi, validation, z, hyperparams = problem
    last, end, _, line, kept = along_a_line(phi, z, hyperparams, num_steps)
    alpha = validation.alpha(end, hyperparams)
    bar = cotangent_at_end(alpha, end, tree_zeros_like(hyperparams))

    def body(carry, at):
        bar, distilled, sum_xy, sum_xx = carry
        kept, t = at
        before, s = line.at(kept, t), num_steps - t
        bar = pull_step(phi, before, hyperparams, t, bar).bar
        total = geometric_sum(gamma, s)
        distilled = distilled.add(before.w, phi.batch(t), geometric_sum(gamma, s - 1) / total)
        v = distilled.product(phi, last, hyperparams, t, alpha)
        # x y = (|v| total) (v . g / |v|): no norm is needed, and v = 0 adds nothing.
        sum_xy += total * tree_dot(v, bar.hyperparams).astype(gamma.dtype)
        sum_xx += total**2 * tree_dot(v, v).astype(gamma.dtype)
        return (bar, distilled, sum_xy, sum_xx), None

    zero = jnp.zeros((), gamma.dtype)
    (_, distilled, sum_xy, sum_xx), _ = jax.lax.scan(
        body, (bar, distilled, zero, zero), (kept, jnp.arange(num_steps)), reverse=True
    )
    return sum_xy, sum_xx, distilled.key


def _is_examples(x: Any) -> bool:
    """Whether a leaf of a batch has one entry per example."""
    return eqx.is_array(x) and x.ndim > 0 and not is_key(x)
