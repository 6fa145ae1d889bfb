"""What one training run carries from step to step."""

from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from gradhpo.core.partition import combine
from gradhpo.utils.gradients import accumulation_dtype
from gradhpo.utils.typecheck import checked


Memory: TypeAlias = dict[str, PyTree]
"""What an algorithm itself carries from step to step, kept in `metadata` beside the metrics."""

METRICS = (
    "train_loss",
    "val_loss",
    "hypergrad_norm",
    "param_norm",
    "hyperparam_norm",
    "rejected",
)


@checked
class BilevelState(eqx.Module):
    r"""State of a bilevel optimization: an immutable pytree.

    Made by an optimizer's `init`, advanced by its `step`. Structure, shapes and dtypes never
    change between steps, so that loops compile once and `jax.lax.scan` can carry it.

    **Fields:**

    - `params`: the parameters $w$ (with whatever else the model holds).
    - `hyperparams`: the hyperparameters $\lambda$, floating-point arrays.
    - `inner_opt_state`, `outer_opt_state`: optax states; `()` where there is none.
    - `step`: how often `step` was called, shape `()`, int32.
    - `metadata`: the metrics of the last step, and the memory of the algorithm if it has one.
    - `model`, `memory` (properties): the model that `partition` split, put together again; and
        of `metadata` what is no metric.

    The metrics are scalars, float32 or float64 where a parameter is float64, and `nan` before
    the first step: `train_loss` (last inner step, before its update), `val_loss` (at $w_T$,
    before the outer update), `hypergrad_norm`, `param_norm`, `hyperparam_norm` (Euclidean),
    and `rejected` (how many steps so far were refused for a non-finite value; 0 at first).

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
    metadata: dict[str, Any]

    @classmethod
    def create(
        cls,
        params: PyTree,
        hyperparams: PyTree,
        inner_opt_state: PyTree,
        outer_opt_state: PyTree,
    ) -> "BilevelState":
        """A state at step 0, its metrics `nan` and nothing rejected.

        **Arguments:** the fields of the same names; "no optimizer state" is `()`. They are taken as
        they are: an optimizer's [`init`][gradhpo.BilevelOptimizer.init] checks them and adds the
        memory of its algorithm.

        ```python
        state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
        ```
        """
        dtype = accumulation_dtype(params)
        metadata = {name: jnp.full((), jnp.nan, dtype) for name in METRICS}
        return cls(
            params=params,
            hyperparams=hyperparams,
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
            step=jnp.zeros((), jnp.int32),
            metadata=metadata | {"rejected": jnp.zeros((), dtype)},
        )

    def update(
        self,
        params: PyTree = None,
        hyperparams: PyTree = None,
        inner_opt_state: PyTree = None,
        outer_opt_state: PyTree = None,
        step: Int[Array, ""] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> "BilevelState":
        """A new state with some fields replaced.

        **Arguments:** the fields of the same names, default `None`, which keeps a field; entries of
        `metadata` are added to the old ones or replace them.

        **Returns:** a new state; this one stays as it is.

        ```python
        state = gradhpo.BilevelState.create(jnp.ones(3), jnp.zeros(3), (), ())
        state = state.update(params=2 * state.params, metadata={"note": jnp.array(1.0)})
        ```
        """

        def keep(new, old):
            return old if new is None else new

        return BilevelState(
            params=keep(params, self.params),
            hyperparams=keep(hyperparams, self.hyperparams),
            inner_opt_state=keep(inner_opt_state, self.inner_opt_state),
            outer_opt_state=keep(outer_opt_state, self.outer_opt_state),
            step=keep(step, self.step),
            metadata=self.metadata | (metadata or {}),
        )

    def get_metric(self, key: str, default: Any = None) -> Any:
        """The entry `key` of `metadata`, a metric or a part of the memory, or `default`."""
        return self.metadata.get(key, default)

    @property
    def memory(self) -> Memory:
        """The part of `metadata` that is an algorithm's own."""
        return {name: value for name, value in self.metadata.items() if name not in METRICS}

    @property
    def model(self) -> PyTree:
        """`eqx.combine(params, hyperparams)`: what [`partition`][gradhpo.partition] split.

        **Raises:** `ValueError` where the two are not halves of one model.
        """
        return combine(self.params, self.hyperparams)
