"""Where arrays are: what the library makes is placed beside what it is given."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree


def mesh_of(tree: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh that the arrays are spread over; `None` on one device, and while tracing."""
    for x in jax.tree.leaves(tree):
        if _is_placed(x) and isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1:
            return x.sharding.mesh
    return None


def beside(tree: PyTree, source: PyTree) -> PyTree:
    """The tree, with a copy on every device of the source's mesh of what is on one device only."""
    mesh = mesh_of(source)
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    alone = lambda x: _is_placed(x) and x.sharding.num_devices == 1
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if alone(x) else x, tree)


def sharded_like(x: Array, like: Array) -> Array:
    """`x` with the sharding in the type of `like`, which arrays have under explicit mesh axes."""
    sharding = jax.typeof(like).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(x, sharding) if explicit else x


def _is_placed(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)
