"""What one training run carries from step to step."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from gradhpo.core.inner_state import InnerState
from gradhpo.core.memory import entries_of, path_to
from gradhpo.core.metadata import Metadata, placed_nan
from gradhpo.core.partition import combine
from gradhpo.core.showing import shown
from gradhpo.core.types import METRICS
from gradhpo.utils.freezing import frozen_as, trained
from gradhpo.utils.structure import fitted
from gradhpo.utils.trees import accumulation_dtype
from gradhpo.utils.typecheck import checked


@checked
class BilevelState(eqx.Module):
    r"""State of a bilevel optimization: an immutable pytree.

    Made by an optimizer's `init`, advanced by its `step`. Structure, shapes and dtypes never change
    between steps, so that loops compile once and `jax.lax.scan` can carry it. The one exception:
    the first step adds the metrics that losses return, unless `init` got `losses=`. Pass them if
    you call `step` in your own `scan`, `jit` or `vmap`, or deserialise into the state.

    **Fields:**

    - `params`: the parameters $w$ (with anything else that the model holds). A frozen array is
        wrapped in a node, which [`unfrozen`][gradhpo.unfrozen] removes.
    - `hyperparams`: the hyperparameters $\lambda$, floating-point arrays.
    - `inner_opt_state`, `outer_opt_state`: optax states; `()` if there is none.
    - `step`: how often `step` was called, shape `()`, int32.
    - `metadata`: the metrics of the last step, and your own notes, which you add with `update` and
        which stay with the state. Store numbers that change as arrays, `jnp.asarray(epoch)`: every
        new string or Python number compiles `step` again.
    - `memory`: what the algorithm carries from step to step, an object of its own type (see the
        algorithm's docstring); `None` if it carries nothing.
    - `model_state`: running state of the model, such as batch statistics; `None` if it has none.
    - `fresh`: whether the inner optimizer's state is what its `init` made at these hyperparameters,
        shape `()`, or `[members]` in a population, bool: true after `init` and `restart`, false
        after a `step` and after `update(inner_opt_state=...)`. `eqx.tree_at` leaves it true: an
        `inner_opt_state` set that way is recomputed where hyperparameters act in `init`.
    - `model` (property): the model that `partition` split, combined again, with plain arrays.

    The metrics are scalars, float32 (float64 if a parameter is float64), and `nan` before the first
    step: `train_loss` (last inner step, before its update), `val_loss` (at $w_T$, before the outer
    update), `hypergrad_norm`, `param_norm`, `hyperparam_norm` (Euclidean), and `rejected` (how many
    steps so far were refused for a non-finite value; initially 0). After a step there are also the
    metrics that losses return, as `train_<name>` and `val_<name>`.

    ```python
    optimizer = gradhpo.FOOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init({"w": jnp.ones(3)}, {"decay": jnp.array(0.1)})
    assert state.step == 0 and state.get_metric("rejected") == 0
    ```
    """

    params: PyTree
    hyperparams: PyTree
    inner_opt_state: PyTree
    outer_opt_state: PyTree
    step: Int[Array, ""]
    metadata: Metadata = eqx.field(converter=Metadata)
    memory: PyTree = None
    model_state: PyTree = None
    fresh: Bool[Array, "..."] = eqx.field(converter=jnp.asarray, default=False)

    def __check_init__(self):
        self.metadata.in_memory = frozenset(entries_of(self.memory))

    @classmethod
    def create(
        cls,
        params: PyTree,
        hyperparams: PyTree,
        inner_opt_state: PyTree,
        outer_opt_state: PyTree,
        memory: PyTree = None,
        model_state: PyTree = None,
        fresh: bool | Bool[Array, "..."] = False,
    ) -> "BilevelState":
        """A state at step 0, with metrics `nan` and nothing rejected.

        **Arguments:**

        - `params`, `hyperparams`: two pytrees.
        - `inner_opt_state`, `outer_opt_state`: optax states; `()` if there is none.
        - `memory`: what the algorithm carries from step to step; default `None`.
        - `model_state`: running state of the model; default `None`.
        - `fresh`: whether `inner_opt_state` is what `init` makes at these hyperparameters; default
            `False`.

        Nothing is checked: an optimizer's [`init`][gradhpo.BilevelOptimizer.init] does that, and
        makes the memory.

        ```python
        state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
        ```
        """
        dtype = accumulation_dtype(params)
        metrics = {name: placed_nan(dtype) for name in METRICS}
        metrics["rejected"] = jnp.zeros((), dtype)
        return cls(
            params=params,
            hyperparams=hyperparams,
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
            step=jnp.zeros((), jnp.int32),
            metadata=metrics,  # pyright: ignore[reportArgumentType]
            memory=memory,
            model_state=model_state,
            fresh=fresh,  # pyright: ignore[reportArgumentType]
        )

    def update(
        self,
        params: PyTree = None,
        hyperparams: PyTree = None,
        inner_opt_state: PyTree = None,
        outer_opt_state: PyTree = None,
        step: Int[Array, ""] | None = None,
        metadata: dict[str, Any] | None = None,
        memory: PyTree = None,
        model_state: PyTree = None,
        fresh: bool | Bool[Array, "..."] | None = None,
    ) -> "BilevelState":
        """A new state with some fields replaced.

        The default `None` keeps a field. Numbers and NumPy arrays become JAX arrays.

        **Arguments:**

        - `params`: new parameters. Frozen leaves stay frozen, even if plain arrays replace them.
        - `hyperparams`, `outer_opt_state`, `memory`, `model_state`: trees like the old ones.
        - `inner_opt_state`: a tree like the old one; the state is then no longer `fresh`.
        - `step`: the number of steps, shape `()`, int32.
        - `metadata`: notes by name, added to the old ones or in place of them.
        - `fresh`: whether the inner optimizer's state is what `init` makes at the hyperparameters.

        **Returns:** a new state; this one is unchanged.

        **Raises:** `ValueError` for a field with a different structure, shape or dtype, and for an
        entry of `metadata` that is a metric, or in the algorithm's `memory`.

        ```python
        state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
        state = state.update(params=2 * state.params, metadata={"note": jnp.array(1.0)})
        ```
        """

        if metadata:
            self._check_notes(metadata)
        if fresh is None and inner_opt_state is not None:
            fresh = False
        if isinstance(fresh, bool):
            fresh = jnp.full_like(self.fresh, fresh)
        if params is not None:
            params = frozen_as(self.params, params, "update(params=...)")
        given = {
            "params": params,
            "hyperparams": hyperparams,
            "inner_opt_state": inner_opt_state,
            "outer_opt_state": outer_opt_state,
            "step": step,
            "memory": memory,
            "model_state": model_state,
            "fresh": fresh,
        }
        new = {
            name: fitted(f"update({name}=...)", value, getattr(self, name))
            for name, value in given.items()
            if value is not None
        }
        return dataclasses.replace(self, metadata=self.metadata | (metadata or {}), **new)

    def _check_notes(self, notes: dict[str, Any]) -> None:
        for name in notes:
            if name in METRICS or name in self.metadata.aux:
                raise ValueError(
                    f"update(metadata=...) has {name}, which is a metric that every step writes: "
                    "rename your note"
                )
            if name in self.metadata.in_memory:
                raise ValueError(
                    f"update(metadata=...) has {name}, which the algorithm keeps in its memory: "
                    "change it there, state.update(memory=eqx.tree_at(lambda m: "
                    f"m.{path_to(self.memory, name)}, state.memory, value))"
                )

    def __repr__(self) -> str:
        return shown(self.params, self.hyperparams, self.step, self.metadata, self.memory)

    def __eq__(self, other: object) -> Any:
        """As for any module, except that `nan` equals `nan`: metrics start as `nan`."""
        return eqx.tree_equal(_without_nan(self), _without_nan(other))

    __hash__ = eqx.Module.__hash__

    def get_metric(self, key: str, default: Any = ...) -> Any:
        """A metric, a note, or an entry of the algorithm's memory (`"theta"`, `"linear_residual"`).

        **Arguments:**

        - `key`: its name.
        - `default`: what to return if there is none; without it, that is an error.

        **Raises:** `KeyError`, which lists the names, for an unknown name without a `default`.
        """
        if key in self.metadata:
            return self.metadata[key]
        entries = entries_of(self.memory)
        if key in entries:
            return entries[key]
        if default is not ...:
            return default
        names = ", ".join(map(str, [*self.metadata, *entries]))
        raise KeyError(f"no metric {key!r}; available: {names}")

    @property
    def model(self) -> PyTree:
        """The model that [`partition`][gradhpo.partition] split, put together, with nothing frozen.

        **Raises:** `ValueError` if the two are not halves of one model.
        """
        return combine(self.params, self.hyperparams)


def _without_nan(tree: PyTree) -> PyTree:
    """The same with 0 for `nan`, and a mask of where it was."""
    places = jax.tree.map(lambda x: jnp.isnan(x) if eqx.is_inexact_array(x) else None, tree)
    zeroed = lambda x, here: x if here is None else jnp.where(here, 0, x)
    return places, jax.tree.map(zeroed, tree, places)


def inner_state(state: BilevelState) -> InnerState:
    """The inner state z = (w, s, r) of a state; the rest of its params never changes."""
    return InnerState(trained(state.params), state.inner_opt_state, state.model_state)


def with_inner_state(state: BilevelState, z: InnerState) -> BilevelState:
    """A state with another z, which is no longer `fresh`; a wrapper may change its shapes."""
    params = eqx.combine(z.w, state.params)
    return dataclasses.replace(
        state,
        params=params,
        inner_opt_state=z.s,
        model_state=z.r,
        fresh=jnp.zeros_like(state.fresh),
    )


def with_metrics(state: BilevelState, metrics: dict[str, Array]) -> BilevelState:
    """A state with other metrics."""
    return dataclasses.replace(state, metadata=state.metadata | metrics)


def with_memory(state: BilevelState, memory: PyTree) -> BilevelState:
    """A state with the memory of another kind of optimizer, or without one."""
    return dataclasses.replace(state, memory=memory)
