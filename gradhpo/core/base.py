"""What every optimizer offers: `init`, `step` and `compute_hypergradient`."""

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core import calls
from gradhpo.core.first_state import first_state
from gradhpo.core.inner_state import InnerState
from gradhpo.core.inputs import LossFunctions, both_losses
from gradhpo.core.measured import with_same_metrics
from gradhpo.core.outer_step import OuterStep
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFn, RealScalarLike
from gradhpo.utils.freezing import frozen_as, trained
from gradhpo.utils.placement import beside
from gradhpo.utils.settings import (
    check_outer_optimizer,
    check_outer_rate,
    check_restart,
    check_tunes,
    outer_rate,
)
from gradhpo.utils.typecheck import checked


class BilevelOptimizer(OuterStep):
    r"""Base class of all optimizers: `init`, `step`, `compute_hypergradient`.

    Let $z_t = \Phi(z_{t-1}, \lambda; D_t)$ be parameters and inner optimizer state, with
    derivatives $A_t, B_t$ with respect to $z_{t-1}$ and $\lambda$. Each optimizer estimates or
    computes

    $$g = \frac{\mathrm{d} L_{\mathrm{val}}}{\mathrm{d}\lambda} =
    \frac{\partial L_{\mathrm{val}}}{\partial\lambda} + \alpha_T \sum_{t=1}^{T} A_T \cdots A_{t+1}
    B_t,\qquad \alpha_T = \frac{\partial L_{\mathrm{val}}}{\partial w}(w_T).$$

    Algorithms derive from [`gradhpo.extend.Algorithm`][gradhpo.extend.Algorithm], which implements
    the private methods for one inner problem.

    ```python
    loss = lambda params, hyperparams, batch: jnp.sum((params - hyperparams) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1))  # an algorithm
    state = optimizer.init(jnp.ones(3), jnp.zeros(3))
    hypergradient = optimizer.compute_hypergradient(state, None, None, loss, loss)
    state = optimizer.step(state, None, None, loss, loss, lr_hyper=0.1)
    ```
    """

    def __check_init__(self):
        check_outer_optimizer(type(self).__name__, self.outer_optimizer)

    @checked
    def init(
        self,
        params: PyTree,
        hyperparams: PyTree,
        *,
        batch: PyTree = None,
        key: Array | None = None,
        model_state: PyTree = None,
        losses: LossFunctions | None = None,
        val_batch: PyTree = None,
    ) -> BilevelState:
        """The state at step 0.

        **Arguments:**

        - `params`: parameters to train, any pytree with at least one floating-point array that is
            not [frozen][gradhpo.frozen].
        - `hyperparams`: hyperparameters to tune, any pytree of floating-point arrays.
        - `batch`, `key`: an example of a training batch (only its shapes matter) and a PRNG key.
            With them [`OnlineHypergradientOptimizer`][gradhpo.OnlineHypergradientOptimizer] keeps a
            distilled data set; the other algorithms ignore them. Default `None`.
        - `model_state`: running state of the model, a pytree of arrays: the `state` of
            `eqx.nn.make_with_state`, batch statistics of another framework, a target network, an
            average of the weights. Losses are then called as
            `(params, hyperparams, batch, model_state)`; a training loss returns
            `(scalar, new_model_state)`, and a validation loss the scalar (or both; then the state
            is dropped). Hypergradients of exact methods go through it. Default `None`: none.
        - `losses`, `val_batch`: the [`LossFunctions`][gradhpo.LossFunctions] and an example
            validation batch. With them the state has an entry, `nan`, for every metric that the
            losses return: needed for losses with metrics if you call `step` inside your own `scan`,
            `jit` or `vmap`. Default `None`.

        **Returns:** a [`BilevelState`][gradhpo.BilevelState] whose structure, shapes and dtypes
        every `step` keeps (except for metrics that losses return, if `losses` was not given).

        **Raises:** `TypeError` for complex leaves, hyperparameters that are not floating-point
        arrays, a `batch` that is a data source or a `BatchStack`, or a `model_state` with leaves
        that are not arrays; `ValueError` for NaN, nothing to train or to tune, layers with running
        state (BatchNorm) without a `model_state`, or `params` and `hyperparams` that are swapped or
        overlap.
        """
        given = params, hyperparams, model_state, batch, key
        return first_state(self, self._init_state, *given, losses, val_batch)

    @checked
    def adopt(self, state: BilevelState) -> BilevelState:
        """Turns the state of another optimizer on the same problem into a state of this one.

        Parameters, hyperparameters, running state, the step count, metrics and notes are kept, and
        so is the inner optimizer's state if it has the structure and shapes of this optimizer's.
        Memory and outer optimizer state are new.

        **Arguments:** `state`: from the other optimizer's `init` or `step`.

        **Returns:** a state for this optimizer's `step` and [`run`][gradhpo.run].

        **Raises:** `ValueError` for a state with a different number of inner problems
        ([`TaskBatched`][gradhpo.TaskBatched]).

        ```python
        loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
        cheap = gradhpo.FOOptimizer(optax.sgd(0.1), optax.sgd(0.1))
        exact = gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.adam(0.1), unroll_steps=10)
        state = cheap.step(cheap.init(jnp.ones(3), jnp.zeros(3)), None, None, loss, loss)
        state = exact.step(exact.adopt(state), None, None, loss, loss)
        ```
        """
        return beside(self._adopt(state, keep_memory=False), state)

    @checked
    def restart(
        self,
        state: BilevelState,
        start: PyTree = None,
        reptile_rate: RealScalarLike = 1.0,
    ) -> BilevelState:
        r"""A new episode, for your own loops: what [`run`][gradhpo.run] does between two episodes.

        The parameters move to $\phi - \mathtt{reptile\_rate}\,(\phi - w)$; the inner optimizer's
        state and the memory of the episode are reset; the model state returns to that of the start
        if the rate is 0. Everything else stays.

        **Arguments:**

        - `state`: the state at the end of an episode, with parameters $w$.
        - `start`: the state at its start, with parameters $\phi$, or only these if there is no
            model state; needed unless the rate is 1.
        - `reptile_rate`: in [0, 1], default 1. 1 continues from $w$, 0 goes back to $\phi$.

        **Returns:** the state at the start of the next episode.

        **Raises:** `ValueError` for a rate outside [0, 1], or a rate other than 1 without `start`.

        ```python
        loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
        optimizer = gradhpo.OneStepOptimizer(optax.adam(0.1, eps_root=1e-16), optax.sgd(0.1))
        start = optimizer.init(jnp.ones(3), jnp.zeros(3))
        state = optimizer.step(start, None, None, loss, loss)
        state = optimizer.restart(state, start.params, reptile_rate=0.1)
        ```
        """
        check_restart(start, reptile_rate, state.model_state)
        start = state if start is None else start
        r = state.model_state
        if isinstance(start, BilevelState):
            start, r = start.params, start.model_state
        start = InnerState(trained(frozen_as(state.params, start, "start")), r=r)
        return calls.restart(state, self, start, jnp.asarray(reptile_rate, jnp.result_type(float)))

    def step(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn | LossFunctions,
        val_loss_fn: LossFn | None = None,
        lr_hyper: RealScalarLike | None = None,
    ) -> BilevelState:
        r"""Inner steps, hypergradient, one outer update. Compiled once.

        **Arguments:**

        - `state`: from `init` or from the previous `step`.
        - `train_batch`: any pytree of arrays, used for every inner step (PRNG keys made by
            `jax.random.key` are folded with the inner index; make a new key for each `step`), or a
            [`BatchStack`][gradhpo.BatchStack] with one batch per inner step.
        - `val_batch`: any pytree of arrays.
        - `train_loss_fn`, `val_loss_fn`: `(params, hyperparams, batch) -> scalar`, or
            `-> (scalar, {name: scalar})` with metrics, which appear in the next state as
            `train_<name>` and `val_<name>`; or one [`LossFunctions`][gradhpo.LossFunctions] in
            place of both. Create them once: each new function triggers a compilation.
        - `lr_hyper`: the step size of $\lambda \leftarrow \lambda - \mathtt{lr\_hyper}\cdot g$,
            shape `()`, needed with `outer_optimizer=None` and refused otherwise.

        **Returns:** the next state, while the device may still be working on it
        (`jax.block_until_ready(state)` waits, for example for timing). If anything in it is
        non-finite, params, hyperparams, optimizer states and memory keep their old values, and the
        metric `rejected` counts the step.

        **Raises:** while tracing, `ValueError` for a loss that is not a real scalar, a `BatchStack`
        whose length is not `num_inner_steps` (or one as `val_batch`), a state of another optimizer,
        or no hyperparameter that this method can see; `TypeError` for a loss with other arguments
        or outputs, or a data source as a batch. At each call, `ValueError` for an `lr_hyper` that
        is missing, refused or negative, and `TypeError` for one that is not a number; with several
        processes, `ValueError` for a batch of one process with a state that all of them share.
        """
        losses = both_losses("step", train_loss_fn, val_loss_fn)
        check_outer_rate(self, lr_hyper)
        given = train_batch, val_batch, *losses, outer_rate(lr_hyper)
        return with_same_metrics(calls.call(calls.step, self, state, *given), state)

    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn | LossFunctions,
        val_loss_fn: LossFn | None = None,
    ) -> PyTree:
        """The hypergradient that `step` would follow, a tree like `state.hyperparams`.

        **Arguments:**

        - `state`: from `init` or `step`; it is not changed.
        - `train_batch`: any pytree of arrays, used for every inner step, or a
            [`BatchStack`][gradhpo.BatchStack] with one batch per inner step.
        - `val_batch`: any pytree of arrays.
        - `train_loss_fn`, `val_loss_fn`: `(params, hyperparams, batch) -> scalar`, or one
            [`LossFunctions`][gradhpo.LossFunctions] in place of both.

        **Returns:** the hypergradient $g$, each leaf with the shape and dtype of its
        hyperparameter. It may be non-finite.

        **Raises:** what `step` raises while tracing.
        """
        losses = both_losses("compute_hypergradient", train_loss_fn, val_loss_fn)
        check_tunes(self)
        return calls.call(calls.compute_hypergradient, self, state, train_batch, val_batch, *losses)
