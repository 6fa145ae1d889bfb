"""Where arrays are: the library places its own arrays with those that it is given."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree

from gradhpo.utils.keys import is_key


def mesh_of(tree: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh that the arrays are spread over; `None` on one device, and while tracing."""
    for x in jax.tree.leaves(tree):
        if _is_placed(x) and isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1:
            return x.sharding.mesh
    return None


def beside(tree: PyTree, source: PyTree) -> PyTree:
    """The tree, with single-device arrays copied to every device of the source's mesh."""
    mesh = mesh_of(source)
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    alone = lambda x: _is_placed(x) and x.sharding.num_devices == 1
    return jax.tree.map(lambda x: _copied(x, everywhere) if alone(x) else x, tree)


def split_like(tree: PyTree, source: PyTree) -> PyTree:
    """The tree with its arrays divided along their first axis as that of the source is.

    Other axes stay unchanged. Does nothing if the source is on one device, or its first axis is not
    divided.
    """
    mesh = mesh_of(source)
    specs = [x.sharding.spec for x in jax.tree.leaves(source) if mesh_of(x) is not None]
    axis = next((spec[0] for spec in specs if len(spec) and spec[0] is not None), None)
    if mesh is None or axis is None:
        return tree
    tree = beside(tree, source)
    rest = lambda x: tuple(x.sharding.spec[1:]) if isinstance(x.sharding, NamedSharding) else ()
    to = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(axis, *rest(x))), tree)
    return jax.jit(lambda tree: tree, out_shardings=to)(tree)


def settled(tree: PyTree, source: PyTree) -> PyTree:
    """The tree, committed to the source's devices if the source is committed.

    A program of both returns committed arrays; given uncommitted ones at first, it would compile
    again for its own results.
    """
    committed = [x for x in jax.tree.leaves(source) if _is_placed(x) and x.committed]
    if not committed:
        return tree
    loose = lambda x: _is_placed(x) and not x.committed
    put = lambda x: jax.device_put(x, committed[0].sharding) if loose(x) else x
    return jax.tree.map(put, tree) if mesh_of(source) is None else beside(tree, source)


def _copied(x: Array, everywhere: NamedSharding) -> Array:
    """Without `device_put` across processes: it compares values, and NaN differs from NaN."""
    if everywhere.is_fully_addressable:
        return jax.device_put(x, everywhere)
    if is_key(x):
        data = _copied(jax.random.key_data(x), everywhere)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return placed(np.asarray(x), everywhere)


def placed(x: np.ndarray, sharding: Sharding) -> Array:
    """A host array, the same in all processes, on the devices of a sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def parts_of(x: Array) -> list[Array]:
    """The different pieces of an array that this process has, each once."""
    return list({str(shard.index): shard.data for shard in x.addressable_shards}.values())


def from_parts(parts: list[Any], like: Array) -> Array:
    """An array of such pieces, placed as the one whose `parts_of` they are like."""
    shards = like.addressable_shards
    names = list(dict.fromkeys(str(shard.index) for shard in shards))
    of_name = dict(zip(names, parts, strict=True))
    pieces = [jax.device_put(of_name[str(shard.index)], shard.device) for shard in shards]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, pieces)


def spread(tree: PyTree, sharding: NamedSharding | None, name: str, before: int = 0) -> PyTree:
    """Batches whose arrays are spread over devices as `sharding` says for one batch.

    If the devices belong to several processes, each passes its part, and the parts are joined.
    `before` counts the axes in front of a batch's own. Scalars and single keys stay everywhere.
    Raises `ValueError` for examples that cannot be divided evenly; `name` is what users call it.
    """
    if sharding is None:
        return tree
    explicit = AxisType.Explicit in sharding.mesh.axis_types

    def placed(where: Any, x: Any) -> Any:
        shape, spec = jnp.shape(x)[before:], sharding.spec[: jnp.ndim(x) - before]
        of_batch = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        to = NamedSharding(sharding.mesh, PartitionSpec(*[None] * before, *spec))
        is_part = not (to.is_fully_addressable or isinstance(x, Tracer) or is_of_several(x))
        try:
            if is_part:
                return _joined(x, to)
            of_batch.shard_shape(shape)
        except ValueError:
            raise ValueError(
                f"{name} cannot spread {jax.tree_util.keystr(where) or 'the batch'}, of shape "
                f"{shape}{' in each process' * is_part}, as {of_batch.spec} over a mesh of "
                f"{dict(sharding.mesh.shape)}: choose a batch size that the number of devices "
                "divides"
            ) from None
        if not isinstance(x, Tracer):
            return jax.device_put(x, to)
        return jax.sharding.reshard(x, to) if explicit else jax.lax.with_sharding_constraint(x, to)

    return jax.tree.map_with_path(placed, tree)


def _joined(part: Any, to: NamedSharding) -> Array:
    """The parts of all processes as one array."""
    if is_key(part):
        data = _joined(jax.random.key_data(part), to)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(part))
    return jax.make_array_from_process_local_data(to, np.asarray(part))


def is_of_several(x: Any) -> bool:
    """Whether an array belongs to several processes."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and not x.is_fully_addressable


def rows(x: Array, chosen: Array) -> Array:
    """`x[chosen]`; explicit mesh axes need its placement: everywhere."""
    if not has_explicit_axes(x):
        return x[chosen]
    mesh = jax.typeof(x).sharding.mesh
    return x.at[chosen].get(out_sharding=NamedSharding(mesh, PartitionSpec()))


def entry(x: Array, number: Any) -> Array:
    """`x[number]`; explicit mesh axes need its placement: where the rest of `x` is."""
    if not has_explicit_axes(x):
        return x[number]
    sharding = jax.typeof(x).sharding
    to = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if isinstance(number, Tracer):  # a slice at an unknown place of a divided axis does not exist
        to_all = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
        return jax.sharding.reshard(x, to_all)[number]
    return x.at[int(number)].get(out_sharding=to)


def has_explicit_axes(tree: PyTree) -> bool:
    """Whether arrays have their shardings in their types, along some axis of a mesh."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def sharded_like(x: Array, like: Any) -> Array:
    """`x` with the sharding in the type of `like`, which arrays have under explicit mesh axes."""
    return placed_as(x, jax.typeof(like).sharding)


def everywhere(tree: PyTree) -> PyTree:
    """The tree with all of every array on each device, as far as their types say where it is."""

    def copied(x: Array) -> Array:
        if not has_explicit_axes(x):
            return x
        mesh = jax.typeof(x).sharding.mesh
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(copied, tree)


def interleaved(x: Array, num: int, name: str, before: int = 1) -> Array:
    """`x` with its first `before` axes, of n entries, as `[n / num, num]`.

    Column i has every `num`-th entry, from i on, and not a slice of neighbours: where the entries
    are spread over devices, each device has its part of every column. Raises `ValueError` where it
    cannot under explicit mesh axes; `name` is what users call what divides the entries.
    """
    count, rest = math.prod(x.shape[:before]), x.shape[before:]
    flat = x.reshape(count, *rest)  # explicit mesh axes allow no merge and split in one
    column, sharding = count // num, jax.typeof(flat).sharding
    try:
        sharding.shard_shape((column, *rest))
    except ValueError:
        raise ValueError(
            f"{name} cannot spread the {column} examples of a piece as {sharding.spec} over a mesh "
            f"of {dict(sharding.mesh.shape)}: choose a num whose pieces the number of devices "
            "divides evenly"
        ) from None
    return flat.reshape(column, num, *rest)


def zeros_of(abstract: PyTree) -> PyTree:
    """Zeros in place of abstract values, as `jax.eval_shape` gives them, for sums to start at.

    With the shardings in their types: under explicit mesh axes the carry of a loop keeps its own.
    """

    def zeros(x: Any) -> Array:
        explicit = x.sharding is not None and AxisType.Explicit in x.sharding.mesh.axis_types
        return jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding if explicit else None)

    return jax.tree.map(zeros, abstract)


def placed_as(x: Array, sharding: Any) -> Array:
    """`x` with a sharding that is part of a type, as it is under explicit mesh axes."""
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(x, sharding) if explicit else x


def _is_placed(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)
