"""Work that a compiled program may leave out."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, PyTree

from gradhpo.utils.freezing import carried
from gradhpo.utils.placement import placed_as


def unless(
    over: Bool[Array, ""], function: Callable[[PyTree], tuple[PyTree, PyTree]], carry: PyTree
) -> tuple[PyTree, PyTree]:
    """`function(carry)`, which is a new carry and other arrays; if `over`, the old one and zeros.

    A loop of at most one round: XLA updates the carry of a loop in place, but copies what goes
    through a `cond` (seen on a CPU with jaxlib 0.10).
    """
    arrays, static = carried(carry)

    def on_arrays(arrays: PyTree) -> tuple[PyTree, PyTree]:
        new, others = function(eqx.combine(arrays, static))
        return carried(new)[0], others

    program, shapes = jax.make_jaxpr(on_arrays, return_shape=True)(arrays)
    results, leaves = jax.tree.structure(shapes), jax.tree.leaves(arrays)
    zeros = [
        placed_as(jnp.zeros(x.shape, x.dtype), x.sharding) for x in program.out_avals[len(leaves) :]
    ]

    def once(loop: Any) -> Any:
        return jnp.asarray(True), *jaxpr_as_fun(program)(*loop[1 : 1 + len(leaves)])

    _, *found = jax.lax.while_loop(lambda loop: ~loop[0], once, (over, *leaves, *zeros))
    arrays, others = jax.tree.unflatten(results, found)
    return eqx.combine(arrays, static), others
