"""What identifies a run or a callback, as JSON, and how two such descriptions differ."""

import dataclasses
import functools
import inspect
import math
import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.utils.conversion import is_container
from gradhpo.utils.keys import is_key
from gradhpo.utils.processes import numbers
from gradhpo.utils.sums import checksum, float_sums, whole_sums
from gradhpo.utils.validation import leaf_names


# Stands for an unknown description, which differs from nothing.
UNKNOWN = {"unknown": True}
# No field of a module has such a name.
_LEAVES, _FUNCTION = "@leaves", "@function"


def described(value: Any) -> Any:
    """A setting, or a module with its settings by name, as JSON; `None` for functions."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, eqx.Module):
        fields = {
            field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__} | {k: v for k, v in fields.items() if v is not None}
    leaves = _arrays(value)
    if len(leaves) == 1 and not is_key(leaves[0][1]) and np.ndim(leaves[0][1]) == 0:
        return np.asarray(leaves[0][1]).item()
    return described_arrays(value) if leaves else None


def described_arrays(tree: PyTree) -> dict[str, Any]:
    """All arrays of a tree: floating-point ones by sums with a tolerance, others by a checksum."""
    found = {}
    for name, x in _arrays(tree):
        inexact = not is_key(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        of_x = {"sums": float_sums(x)} if inexact else {"checksum": checksum(x)}
        found[name] = {"shape": list(np.shape(x))} | of_x
    return {_LEAVES: found}


def described_responses(tree: PyTree, responses: list[list[Any]]) -> dict[str, Any]:
    """Several trees like this one, by their leaves, each with its own tolerance."""
    names = leaf_names(tree)
    found = {name: [] for name in names}
    for response in responses:
        for name, x in zip(names, response, strict=True):
            found[name].append(whole_sums(numbers(x)))
    return {_LEAVES: {name: {"responses": x} for name, x in found.items()}}


def _arrays(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return [(name, x) for name, x in leaves if eqx.is_array_like(x) or is_key(x)]


def described_function(function: Callable) -> dict[str, Any]:
    """The name of a function, and a checksum of its code and of what it closes over."""
    name = getattr(inspect.unwrap(function), "__name__", type(function).__name__)
    parts: list[str] = []
    _collect(function, parts, set())
    python = ".".join(map(str, sys.version_info[:2]))
    return {_FUNCTION: name, "python": python, "code": zlib.crc32("\n".join(parts).encode())}


def _collect(value: Any, parts: list[str], seen: set[Any]) -> None:
    """All that identifies a function from one start of a program to the next."""
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, types.CodeType):
        parts.append(repr((value.co_code, value.co_names)))
        _collect(value.co_consts, parts, seen)
    elif isinstance(value, types.MethodType):
        _collect((value.__func__, value.__self__), parts, seen)
    elif isinstance(value, functools.partial):
        _collect((value.func, value.args, value.keywords), parts, seen)
    elif isinstance(value, types.FunctionType):
        if value not in seen:
            seen.add(value)
            cells = tuple(x.cell_contents for x in value.__closure__ or () if _is_filled(x))
            _collect((value.__code__, value.__defaults__, value.__kwdefaults__, cells), parts, seen)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        parts.append(repr(value))
    elif eqx.is_array(value):
        parts.append(repr(described_arrays(value)))
    else:
        parts.append(type(value).__name__)
        for leaf in jax.tree.leaves(value) if is_container(value) else ():
            _collect(leaf, parts, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The differences between two descriptions, one per line; rounding is no difference."""
    try:
        return _differences(old, new, name)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return [f"{name or 'the description'} is not one that gradhpo writes"]


def _differences(old: Any, new: Any, name: str) -> list[str]:
    if UNKNOWN in (old, new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        if _LEAVES in old and _LEAVES in new:
            return _other_values(old[_LEAVES], new[_LEAVES], name)
        if _FUNCTION in old and _FUNCTION in new:
            by_code = old["python"] == new["python"] and old["code"] != new["code"]
            other = by_code or old[_FUNCTION] != new[_FUNCTION]
            return [f"{name} was {shown(old)}, and is {_another(old, new)}"] if other else []
        names = [*old, *(key for key in new if key not in old)]
        inner = lambda key: f"{name}.{key}" if name else key
        return [
            line for key in names for line in _differences(old.get(key), new.get(key), inner(key))
        ]
    if isinstance(old, float) and isinstance(new, float) and _close(old, new, abs(old), 1e-6):
        return []
    return [] if old == new else [f"{name} was {shown(old)}, and is {shown(new)}"]


def shown(x: Any) -> Any:
    """A description in a few words."""
    return x.get("kind", x.get(_FUNCTION, "an array")) if isinstance(x, dict) else x


def _another(old: dict[str, Any], new: dict[str, Any]) -> str:
    same_name = old[_FUNCTION] == new[_FUNCTION]
    return f"another {new[_FUNCTION]}" if same_name else new[_FUNCTION]


def _other_values(old: dict[str, Any], new: dict[str, Any], name: str) -> list[str]:
    for leaf in [*old, *new]:
        if leaf not in old or leaf not in new:
            where = "here" if leaf in old else "there"
            return [f"{name} has another structure, {leaf} is missing {where}"]
    other = [leaf for leaf in old if not _alike(old[leaf], new[leaf])]
    if not other:
        return []
    where = f" (at {other[0]})" if len(old) > 1 else ""
    return [f"{name} holds other values{where}"]


def _alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if old.get("shape") != new.get("shape") or old.get("checksum") != new.get("checksum"):
        return False
    if "responses" in old and "responses" in new:
        return _are_close(old["responses"], new["responses"], 0.0)
    if "sums" in old and "sums" in new:
        # A tiny piece is rounding compared with the rest.
        return _are_close(old["sums"], new["sums"], 1e-2 * math.hypot(*(x for x, _ in old["sums"])))
    return old == new


def _are_close(old: list[list[float]], new: list[list[float]], floor: float) -> bool:
    return len(old) == len(new) and all(
        _close(norm, norm_now, max(norm, floor), 1e-4)
        and _close(total, total_now, max(norm, floor), 1e-4)
        for (norm, total), (norm_now, total_now) in zip(old, new, strict=True)
    )


def _close(old: float, new: float, size: float, tolerance: float) -> bool:
    return old == new or abs(old - new) <= tolerance * size or (old != old and new != new)
