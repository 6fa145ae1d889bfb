"""Explicit mesh axes that are automatic for a while, for work that does not follow their rules."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def with_automatic_axes(
    function: Callable[..., Any], product: Callable[[PyTree], PyTree], vector: PyTree, given: PyTree
) -> Any:
    """`function(product, vector, given)`, for which explicit mesh axes of the vector are automatic.

    `product` maps trees like `vector` to such trees, and for it the axes are explicit. `function`
    returns one, which gets the shardings of the vector, and other results, which get copied to
    every device. `given` are arrays. Nothing is gathered first: the compiler divides the work.
    """
    mesh, axes = _explicit(vector)
    if mesh is None:
        return function(product, vector, given)
    # Arrays in the product are passed as well: loops and conditions take them for their operands.
    arrays, rest = eqx.partition(eqx.filter_closure_convert(product, vector), eqx.is_array)

    def of_arrays(arrays: PyTree, vector: PyTree) -> PyTree:
        return eqx.combine(arrays, rest)(vector)

    everywhere = NamedSharding(mesh, PartitionSpec())  # as are constants, which say nothing
    shardings = lambda tree: jax.tree.map(
        lambda x: jax.typeof(x).sharding if jax.typeof(x).sharding.mesh.axis_names else everywhere,
        tree,
    )
    where = shardings(arrays), shardings(vector)
    explicit: Callable = jax.sharding.explicit_axes(of_arrays, axes=axes, in_sharding=where)

    def inside(arrays: PyTree, vector: PyTree, given: PyTree) -> Any:
        return function(lambda x: explicit(arrays, x), vector, given)

    out = shardings(vector), everywhere
    automatic: Callable = jax.sharding.auto_axes(inside, axes=axes, out_sharding=out)
    return automatic(arrays, vector, given)


def _explicit(tree: PyTree) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """The mesh of arrays that have their shardings in their types, and the names of its axes."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh, mesh.explicit_axes
    return None, ()
