"""What identifies a run, so that the checkpoint of another run is not mistaken for its own."""

import dataclasses
import zlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.utils.keys import is_key


def described(value: Any) -> Any:
    """A setting, a module or a tree of arrays as JSON; `None` for functions.

    A module is described by its settings, by name. Floating-point arrays are described by their
    norm and a weighted sum, which differ between data sets and starting points, but not between
    machines; other arrays by a checksum.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, eqx.Module):
        fields = {
            field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__} | {k: v for k, v in fields.items() if v is not None}
    leaves = [x for x in jax.tree.leaves(value) if eqx.is_array_like(x) or is_key(x)]
    if not leaves:
        return None
    if len(leaves) == 1 and not is_key(leaves[0]) and np.ndim(leaves[0]) == 0:
        return np.asarray(leaves[0]).item()
    inexact = [
        x for x in leaves if not is_key(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    exact = [x for x in leaves if not any(x is y for y in inexact)]
    return {"values": _two_numbers(inexact), "checksum": _checksum(exact)}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The differences between two descriptions, one per line."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "values" in old and "values" in new:
            (norm, total), (norm_now, total_now) = old["values"], new["values"]
            far = max(abs(norm - norm_now), abs(total - total_now)) > 1e-4 * max(norm, 1e-30)
            other = far or old["checksum"] != new["checksum"]
            return [f"{name} holds other values"] if other else []
        names = [*old, *(key for key in new if key not in old)]
        inner = lambda key: f"{name}.{key}" if name else key
        return [
            line for key in names for line in differences(old.get(key), new.get(key), inner(key))
        ]
    return [] if old == new else [f"{name} was {_shown(old)}, and is {_shown(new)}"]


def _shown(x: Any) -> Any:
    return x.get("kind", "an array") if isinstance(x, dict) else x


def _two_numbers(leaves: list[Any]) -> list[float]:
    square, total = 0.0, 0.0
    for number, leaf in enumerate(leaves):
        x = np.nan_to_num(_sample(leaf).astype(np.float64), posinf=0, neginf=0)
        # The golden ratio spreads the weights evenly; every leaf starts elsewhere.
        weights = (np.arange(1, x.size + 1) * 0.6180339887498949 + 0.7548776662466927 * number) % 1
        square += float(x @ x)
        total += float(x @ (weights - 0.5))
    return [square**0.5, total]


def _checksum(leaves: list[Any]) -> int:
    found = 0
    for leaf in leaves:
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        found = zlib.crc32(_sample(leaf).tobytes(), found)
    return found


def _sample(x: Any) -> np.ndarray:
    """A million entries distinguish two data sets as well as all of them would."""
    flat = jnp.ravel(x) if isinstance(x, jax.Array) else np.ravel(x)
    return np.asarray(flat[:: flat.size // 10**6] if flat.size > 10**6 else flat)
