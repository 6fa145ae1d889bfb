"""Iterators over any loader, and how to bring one back to where a run left it."""

import base64
import inspect
import json
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from gradhpo.utils.typecheck import checked


# Libraries' names for the pair: grain's iterators the first, PyTorch's stateful loaders the second.
_SEEKING = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


@checked
def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """An endless iterator over the batches of any loader, which restarts it at its end.

    **Arguments:**

    - `loader`: anything that `iter` accepts: a list of batches, a `torch.utils.data.DataLoader`, a
        `grain` data set. A generator can be read only once; `run` stops at its end.

    **Returns:** an iterator to pass to [`run`][gradhpo.run].

    **Raises:** `TypeError` for a `loader` that cannot be iterated over, or only over names or
    letters (a dict, a pandas object, a string).

    A resumed run seeks to its position if the loader (or the iterator that it makes) has
    `get_state` and `set_state`, or `state_dict` and `load_state_dict`, with a state that can be
    written as JSON. Otherwise it draws all earlier batches again: pass a loader that shuffles the
    same way each time it is created, and create a new one for the resumed run.

    ```python
    batches = gradhpo.iterate([jnp.zeros(3), jnp.ones(3)])
    first, second, first_again = next(batches), next(batches), next(batches)
    ```
    """
    if isinstance(loader, (str, bytes)) or callable(getattr(loader, "keys", None)):
        raise TypeError(
            f"iterate(loader) got a {type(loader).__name__}, which yields names or letters and not "
            "batches: pass a list of batches or a data loader; pass one batch, or data for "
            "gradhpo.ArrayData, without iterate"
        )
    return Repeated(loader)


class Repeated(Iterator[Any]):
    """The iterator that `iterate` returns."""

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self._pass: Iterator[Any] | None = None
        self._passes = 0
        self._returned: list[Any] = []
        self.drawn = 0

    def __next__(self) -> Any:
        batch = self._returned.pop(0) if self._returned else self._draw()
        self.drawn += 1
        return batch

    def _draw(self) -> Any:
        for _ in range(2):  # the rest of this pass, or the first of another
            batches = self._begin_pass() if self._pass is None else self._pass
            try:
                return next(batches)
            except StopIteration:
                self._pass = None
        raise StopIteration

    def _begin_pass(self) -> Iterator[Any]:
        self._pass = iter(self.loader)
        self._passes += 1
        return self._pass

    def give_back(self, batches: list[Any]) -> None:
        """Returns the unused batches that were drawn last; they come next again."""
        self._returned = batches + self._returned
        self.drawn -= len(batches)

    def get_state(self) -> Any:
        """The number of the pass and the loader's position in it; `None` if it cannot tell."""
        of_loader = _seeking(self.loader) is not None
        place = state_of(self.loader if of_loader else self._pass)
        if self._returned or place is None:
            return None
        return {"passes": 0 if of_loader else self._passes, "place": place}

    def set_state(self, state: Any) -> None:
        """Goes back to the position of `get_state`, with a new loader or the same one."""
        self._returned, self._pass = [], None
        if _seeking(self.loader):
            seek(self.loader, state["place"])
            return
        # A loader may reshuffle for every pass: it is asked for that many, and never for more.
        if self._passes >= state["passes"]:
            raise ValueError(
                "gradhpo.iterate(loader) has been drawn from already: to resume a run, call it on "
                "a loader that has not been drawn from"
            )
        while self._passes < state["passes"]:
            self._begin_pass()
        seek(self._pass, state["place"])


def state_of(iterator: Any) -> Any:
    """The position of an iterator that can seek, as JSON can hold it; otherwise `None`."""
    names = _seeking(iterator)
    if names is None:
        return None
    try:
        state = _written(getattr(iterator, names[0])())
        return state if json.loads(json.dumps(state)) == state else None
    except (TypeError, ValueError):
        return None


def seek(iterator: Any, state: Any) -> None:
    """Brings an iterator to the position of `state_of`."""
    names = _seeking(iterator)
    if names is None:
        raise ValueError(f"a {type(iterator).__name__} cannot seek")
    getattr(iterator, names[1])(_read(state))


# Iterators that a run has started to draw from. Most can neither seek nor report their position,
# and a second run gets them as objects: only this set knows that some of their batches are gone.
_drawn_from: weakref.WeakSet[Any] = weakref.WeakSet()


def is_untouched(iterator: Any) -> bool:
    """Whether nothing was drawn yet, as far as we can tell; from now on something may be."""
    try:
        seen = iterator in _drawn_from
        _drawn_from.add(iterator)
    except TypeError:  # it does not support weak references, like iterators of lists
        seen = False
    if isinstance(iterator, Repeated):
        return not seen and iterator.drawn == 0
    if inspect.isgenerator(iterator):
        return not seen and inspect.getgeneratorstate(iterator) == inspect.GEN_CREATED
    return not seen


def _seeking(thing: Any) -> tuple[str, str] | None:
    for names in _SEEKING:
        if all(callable(getattr(thing, name, None)) for name in names):
            return names
    return None


def _written(state: Any) -> Any:
    """JSON has no bytes."""
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    if isinstance(state, dict):
        return {key: _written(value) for key, value in state.items()}
    return [_written(x) for x in state] if isinstance(state, list) else state


def _read(state: Any) -> Any:
    if isinstance(state, dict) and set(state) == {"base64"}:
        return base64.b64decode(state["base64"])
    if isinstance(state, dict):
        return {key: _read(value) for key, value in state.items()}
    return [_read(x) for x in state] if isinstance(state, list) else state
