"""Where arrays are: what the library makes is placed beside what it is given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from gradhpo.utils.keys import is_key


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
    return jax.tree.map(lambda x: _copied(x, everywhere) if alone(x) else x, tree)


def _copied(x: Array, everywhere: NamedSharding) -> Array:
    """Not by `device_put` where several processes take part: it takes two NaN to be different."""
    if everywhere.is_fully_addressable:
        return jax.device_put(x, everywhere)
    if is_key(x):
        data = _copied(jax.random.key_data(x), everywhere)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    here = np.asarray(x)
    return jax.make_array_from_callback(x.shape, everywhere, lambda index: here[index])


def spread(tree: PyTree, sharding: NamedSharding | None, name: str, before: int = 0) -> PyTree:
    """Batches whose arrays are spread over devices as `sharding` says of one batch.

    `before` counts the axes in front of those of a batch. Scalars and single keys stay everywhere.
    Raises `ValueError` for examples that cannot be divided evenly; `name` is what users call it.
    """
    if sharding is None:
        return tree
    explicit = AxisType.Explicit in sharding.mesh.axis_types

    def placed(where: Any, x: Any) -> Any:
        shape, spec = jnp.shape(x)[before:], sharding.spec[: jnp.ndim(x) - before]
        of_batch = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        try:
            of_batch.shard_shape(shape)
        except ValueError:
            raise ValueError(
                f"{name} cannot spread {jax.tree_util.keystr(where) or 'the batch'}, of shape "
                f"{shape}, as {of_batch.spec} over a mesh of {dict(sharding.mesh.shape)}: choose a "
                "batch size that the number of devices divides"
            ) from None
        to = NamedSharding(sharding.mesh, PartitionSpec(*[None] * before, *spec))
        if not isinstance(x, Tracer):
            return jax.device_put(x, to)
        return jax.sharding.reshard(x, to) if explicit else jax.lax.with_sharding_constraint(x, to)

    return jax.tree.map_with_path(placed, tree)


def rows(x: Array, chosen: Array) -> Array:
    """`x[chosen]`; explicit mesh axes ask where that is to be: everywhere."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x[chosen]
    return x.at[chosen].get(out_sharding=NamedSharding(mesh, PartitionSpec()))


def sharded_like(x: Array, like: Any) -> Array:
    """`x` with the sharding in the type of `like`, which arrays have under explicit mesh axes."""
    sharding = jax.typeof(like).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(x, sharding) if explicit else x


def _is_placed(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)
