"""A few numbers for an array, which differ between data sets and agree between machines.

Every number counts, with its own weight: samples at a stride would share a channel or a column.
"""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.utils.dispatch import compiled
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import is_of_several


_ROW = 1024
_ROWS_PER_BLOCK, _MOST_BLOCKS = 4, 16
# On the host up to this size: a program for every shape would take longer to compile.
_MOST_ON_HOST = 2**20


def float_sums(x: Any) -> list[list[float]]:
    """Norm and weighted sum of each of up to 16 pieces of a floating-point array."""
    if is_of_several(x):
        scale, sums = map(np.asarray, _sums_in_place(x))
    else:
        on_device = np.size(x) > _MOST_ON_HOST
        scale, rows = _rows_on_device(jnp.asarray(x)) if on_device else _rows(np.asarray(x), np)
        rows = np.asarray(rows, np.float64)
        sums = [np.sum(block, axis=0) for block in np.array_split(rows, _num_blocks(len(rows)))]
    scale, sums = float(scale), np.asarray(sums, np.float64)
    return [[_rounded(scale * square**0.5), _rounded(scale * total)] for square, total in sums]


def checksum(x: Any) -> int:
    """A number that changes with any change of an array of integers, booleans or keys."""
    x = jax.random.key_data(x) if is_key(x) else x
    if np.size(x) > _MOST_ON_HOST or is_of_several(x):
        return int(_hash_on_device(jnp.asarray(x)))
    with np.errstate(over="ignore"):  # a sum modulo 2**32
        return int(_hash(np.asarray(x), np))


def checksum_of_bits(x: Any) -> int:
    """The same for an array of any kind, by its bits."""
    x = jax.random.key_data(x) if is_key(x) else x
    if jnp.iscomplexobj(x):
        x = (jnp if is_of_several(x) else np).stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.inexact):
        bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
        x = _bits(x, bits) if is_of_several(x) else np.ascontiguousarray(x).view(bits)
    return checksum(x)


def whole_sums(x: np.ndarray) -> list[float]:
    """Norm and weighted sum of a whole array on the host."""
    scale, rows = _rows(x, np)
    square, total = np.sum(rows, axis=0)
    return [_rounded(float(scale * square**0.5)), _rounded(float(scale * total))]


def spread(shape: tuple[int, ...], start: Any, xp: ModuleType = jnp) -> Any:
    """Weights in [-0.5, 0.5), one for each position, that depend on the start. float32."""
    count = int(np.prod(shape))
    positions = xp.arange(count, dtype=np.uint32) + xp.asarray(start, np.uint32)
    return _weights(positions).reshape(shape)


def _weights(positions: Any) -> Any:
    # The golden ratio of all integers, of which the upper 24 bits are exact in float32.
    bits = (positions * np.uint32(2654435769)) >> np.uint32(8)
    return bits.astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def _rows(x: Any, xp: ModuleType) -> tuple[Any, Any]:
    """The largest number, and (divided by it) square sum and weighted sum of 1024 after another."""
    flat = xp.ravel(x)
    if jnp.issubdtype(flat.dtype, jnp.complexfloating):
        flat = xp.concatenate([flat.real, flat.imag])
    wide = np.float64 if xp is np or flat.dtype == np.float64 else np.float32
    # Twice as long for complex numbers, and with zeros at the end.
    flat = xp.nan_to_num(flat.astype(wide), nan=0.0, posinf=0.0, neginf=0.0)
    flat = xp.pad(flat, (0, -flat.size % _ROW))
    scale = xp.max(xp.abs(flat), initial=0)
    table = (flat / xp.where(scale > 0, scale, xp.ones_like(scale))).reshape(-1, _ROW)
    weights = spread(table.shape, 0, xp).astype(wide)
    return scale, xp.stack([xp.sum(table * table, axis=1), xp.sum(table * weights, axis=1)], axis=1)


def _num_blocks(rows: int) -> int:
    return min(max(rows // _ROWS_PER_BLOCK, 1), _MOST_BLOCKS)


@compiled
def _sums_in_place(x: Array) -> PyTree:
    """`scale` and the sums of all blocks, moving no number, for arrays of several processes."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    wide = np.float64 if x.dtype == np.float64 else np.float32
    x = jnp.nan_to_num(x.astype(wide), nan=0.0, posinf=0.0, neginf=0.0)
    scale = jnp.max(jnp.abs(x), initial=0)
    x = x / jnp.where(scale > 0, scale, jnp.ones_like(scale))
    place = _positions(x.shape, jnp)
    terms = x * x, x * _weights(place).astype(wide)
    rows = max(1, -(-x.size // _ROW))

    def of_block(block: np.ndarray) -> Array:
        inside = place - block[0] * _ROW < len(block) * _ROW  # what comes before wraps around
        return jnp.stack([jnp.sum(jnp.where(inside, y, 0), dtype=wide) for y in terms])

    blocks = np.array_split(np.arange(rows, dtype=np.uint32), _num_blocks(rows))
    return scale, jnp.stack([of_block(block) for block in blocks])


def _positions(shape: tuple[int, ...], xp: ModuleType) -> Any:
    """The number of each entry, row by row, modulo 2**32."""
    if xp is np:
        return np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    place = jnp.zeros(shape, np.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(np.uint32, shape, axis) * stride
    return place


def _hash(x: Any, xp: ModuleType) -> Any:
    words = [x.astype(np.uint32)]
    if x.dtype.itemsize > 4:
        words.append((x >> 32).astype(np.uint32))
    total = xp.zeros((), np.uint32)
    for number, word in enumerate(words):
        place = _scrambled(_positions(x.shape, xp) + np.uint32(number * 2**31))
        total = total + xp.sum(_scrambled(word ^ place), dtype=np.uint32)
    return total


def _scrambled(x: Any) -> Any:
    """The 32-bit finaliser of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@compiled
def _rows_on_device(x: Array) -> PyTree:
    return _rows(x, jnp)


@compiled
def _bits(x: Array, kind: np.dtype) -> Array:
    return jax.lax.bitcast_convert_type(x, kind)


@compiled
def _hash_on_device(x: Array) -> Array:
    return _hash(x, jnp)


def _rounded(x: float) -> float:
    return float(f"{x:.9g}")
