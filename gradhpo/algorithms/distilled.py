"""The one point and the one batch that stand for a whole stretch of training (HyperDistill)."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.types import BatchStack
from gradhpo.utils.gradients import accumulation_dtype, tree_lerp
from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import check_leading_axis, check_same_structure


class Distilled(eqx.Module):
    r"""$w^*$, a discounted mean of the parameters, and $D^*$, examples drawn in the same shares.

    `w_star` is kept in float32 or float64: steps of a hundredth of a difference are lost in
    bfloat16. Without `d_star` (and `key`) the current batch takes its place.
    """

    w_star: PyTree
    d_star: PyTree
    key: Array | None

    @classmethod
    def create(cls, w: PyTree, batch: PyTree, key: Array | None) -> "Distilled":
        """Of an example batch and a key, or of neither."""
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
        return cls(jax.tree.map(lambda x: x.astype(wide), w), batch, key)

    def add(self, w: PyTree, batch: PyTree, share: Float[Array, ""]) -> "Distilled":
        r"""With `share` of what was there before and `1 - share` of `(w, batch)`.

        Of the data every slot is replaced with probability `1 - share`, independently: the
        sizes stay fixed and the expected shares are those of $w^*$. Rounding them to whole
        numbers of examples would stop at the first share below half an example.
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
        key, draw = jax.random.split(self.key)
        size = jax.tree.leaves(self.d_star)[0].shape[0]
        replaced = jax.random.uniform(draw, (size,), share.dtype) < 1 - share

        def choose(new, old):
            of_example = jnp.reshape(replaced, (size, *[1] * (old.ndim - 1)))
            return jnp.where(of_example, new, old)

        return Distilled(w_star, jax.tree.map(choose, examples, self.d_star), key)

    def product(
        self, phi: InnerUpdate, s: PyTree, hyperparams: PyTree, t: ArrayLike, alpha: PyTree
    ) -> PyTree:
        r"""$\alpha\,\partial\Phi(w^*, \lambda; D^*)/\partial\lambda$, at optimizer state `s`.

        `alpha` is a cotangent on the parameters alone. What is no example in a batch (a PRNG
        key) is that of step `t`.
        """
        if self.d_star is not None:
            batch = eqx.combine(self.d_star, phi.batch(t))
            stack = BatchStack(jax.tree.map(lambda x: x[None] if eqx.is_array(x) else x, batch))
            phi, t = dataclasses.replace(phi, train_batch=stack), 0
        _, _, pull = phi.vjp((cast_like(self.w_star, alpha), s), hyperparams, t)
        return pull(alpha)[2]


def _is_examples(x: Any) -> bool:
    """Whether a leaf of a batch holds one entry for each example."""
    return eqx.is_array(x) and x.ndim > 0 and not is_key(x)
