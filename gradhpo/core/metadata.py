"""Metrics of the last step and the user's notes, as a state holds them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, DTypeLike


@jax.tree_util.register_pytree_with_keys_class
class Metadata(dict[str, Any]):
    """Metrics of the last step and the user's notes: a dict that knows where other entries went.

    `in_memory` names the entries that the algorithm keeps in `state.memory`; `aux` the metrics
    that a loss returned.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        in_memory: frozenset[str] = frozenset(),
        aux: frozenset[str] | None = None,
    ):
        super().__init__(entries)
        self.in_memory = in_memory
        self.aux = getattr(entries, "aux", frozenset()) if aux is None else aux

    def __missing__(self, key: str) -> Any:
        if key in self.in_memory:
            raise KeyError(
                f"{key} is not in metadata, which holds metrics and your own notes: write "
                f'state.get_metric("{key}"); what the algorithm keeps is in state.memory'
            )
        raise KeyError(
            f"metadata has no {key!r}; it has {', '.join(map(str, self))}. What an algorithm "
            "keeps is in state.memory; metrics that a loss returns appear after the first step, or "
            "at once with init(params, hyperparams, losses=..., batch=..., val_batch=...)"
        )

    def get(self, key: str, default: Any = None) -> Any:
        """As for any dict; raises `KeyError` for entries that have moved to `state.memory`."""
        return self[key] if key in self or key in self.in_memory else default

    def __or__(self, other: Mapping[str, Any]) -> "Metadata":  # pyright: ignore
        aux = self.aux | getattr(other, "aux", frozenset())
        return Metadata({**self, **other}, self.in_memory, aux)

    def without(self, names: Iterable[str]) -> "Metadata":
        """The other entries."""
        names = frozenset(names)
        rest = {k: x for k, x in self.items() if k not in names}
        return Metadata(rest, self.in_memory, self.aux - names)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(x), self[x]) for x in names], self._about(names)

    def tree_flatten(self) -> tuple[list[Any], Any]:
        names = tuple(sorted(self))  # without keys, which take longer to make than everything else
        return [self[name] for name in names], self._about(names)

    def _about(self, names: tuple[str, ...]) -> Any:
        return names, self.in_memory, self.aux

    @classmethod
    def tree_unflatten(cls, about: Any, values: Iterable[Any]) -> "Metadata":
        made = cls.__new__(cls)  # without __init__: a loop over `step` spends its time here
        names, made.in_memory, made.aux = about
        made.update(zip(names, values))  # noqa: B905
        return made


def placed_nan(dtype: DTypeLike, shape: tuple[int, ...] = ()) -> Array:
    """A metric that is not measured yet.

    Placed, not computed: under `jax_debug_nans` no computation may return NaN.
    """
    return jax.device_put(np.full(shape, np.nan, dtype))
