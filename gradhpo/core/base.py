"""The one outer step that all algorithms share."""

import abc
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree, Real

from gradhpo.core.inner import Carry
from gradhpo.core.inner_optimizer import cast_like, explained, init_inner_state
from gradhpo.core.partition import check_disjoint
from gradhpo.core.problem import Problem, Sees, bind, init_outer_state
from gradhpo.core.state import BilevelState
from gradhpo.core.types import InnerOptimizer, LossFn, RealScalarLike, UpdateFn
from gradhpo.utils.gradients import accumulation_dtype, tree_l2_norm
from gradhpo.utils.tracing import record_trace
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import (
    check_inner_rule,
    check_outer_optimizer,
    check_outer_rate,
    numbers_as_arrays,
    outer_rate,
    prepare_hyperparams,
    prepare_params,
)


Memory: TypeAlias = dict[str, PyTree]


class Estimate(eqx.Module):
    """What an algorithm returns: the inner problem advanced, and the hypergradient."""

    z: Carry
    memory: Memory
    hypergradient: PyTree
    train_loss: Array
    val_loss: Array


class BilevelOptimizer(eqx.Module):
    """Base class of all algorithms: `init`, `step`, `compute_hypergradient`.

    An algorithm supplies its memory (`_init_memory`), the number of inner steps that one
    `step` takes, where it finds the hyperparameters (`_sees`), and `_estimate`, which advances
    the inner problem and returns the hypergradient estimate with it.

    ```python
    loss = lambda params, hyperparams, batch: jnp.sum((params - hyperparams) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1))  # an algorithm
    state = optimizer.init(jnp.ones(3), jnp.zeros(3))
    hypergradient = optimizer.compute_hypergradient(state, None, None, loss, loss)
    state = optimizer.step(state, None, None, loss, loss, lr_hyper=0.1)
    ```
    """

    inner_optimizer: eqx.AbstractVar[InnerOptimizer | None]
    outer_optimizer: eqx.AbstractVar[optax.GradientTransformation | None]
    update_fn: eqx.AbstractVar[UpdateFn | None]

    def __check_init__(self):
        name = type(self).__name__
        check_inner_rule(name, self.inner_optimizer, self.update_fn)
        check_outer_optimizer(name, self.outer_optimizer)

    @property
    @abc.abstractmethod
    def num_inner_steps(self) -> int:
        """How many inner steps, and so training batches, one `step` takes."""

    @property
    @abc.abstractmethod
    def _sees(self) -> Sees:
        """Where this method finds the hyperparameters."""

    @abc.abstractmethod
    def _init_memory(
        self, w: PyTree, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> Memory:
        """What the algorithm itself carries from step to step, kept in `metadata`."""

    @abc.abstractmethod
    def _estimate(self, problem: Problem, memory: Memory) -> Estimate:
        """Advances `z` by `num_inner_steps` and estimates the hypergradient at the end."""

    @checked
    def init(
        self,
        params: PyTree,
        hyperparams: PyTree,
        *,
        batch: PyTree = None,
        key: Array | None = None,
    ) -> BilevelState:
        """The state at step 0.

        **Arguments:**

        - `params`: parameters to train, with at least one floating-point array.
        - `hyperparams`: hyperparameters to tune, all floating-point arrays.
        - `batch`, `key`: an example batch and a PRNG key, for algorithms that keep data or
            draw random numbers; the others ignore them.

        **Raises:** `TypeError` or `ValueError` for leaves that cannot be trained or tuned.
        """
        check_disjoint(params, hyperparams)
        params, hyperparams = prepare_params(params), prepare_hyperparams(hyperparams)
        w = eqx.filter(params, eqx.is_inexact_array)
        state = BilevelState.create(
            params=params,
            hyperparams=hyperparams,
            inner_opt_state=init_inner_state(self.inner_optimizer, w, hyperparams),
            outer_opt_state=init_outer_state(self.outer_optimizer, hyperparams),
        )
        return state.update(metadata=self._init_memory(w, hyperparams, batch, key))

    def step(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: RealScalarLike | None = None,
    ) -> BilevelState:
        r"""Inner steps, hypergradient, one outer update. Compiled once.

        **Arguments:**

        - `state`: from `init` or from the `step` before.
        - `train_batch`: any pytree of arrays, used for every inner step (PRNG keys made by
            `jax.random.key` are folded with the inner index; make a new key for each `step`),
            or a [`BatchStack`][gradhpo.BatchStack] with one
            batch for each.
        - `val_batch`: any pytree of arrays.
        - `train_loss_fn`, `val_loss_fn`: `(params, hyperparams, batch) -> scalar`. Make them
            once: a function made anew is compiled anew.
        - `lr_hyper`: the step size of $\lambda \leftarrow \lambda - \mathtt{lr\_hyper}\cdot g$,
            needed with `outer_optimizer=None` and refused otherwise.

        **Returns:** the next state. If anything in it came out non-finite, params,
        hyperparams, optimizer states and memory keep their old values, and the metric
        `rejected` counts it.

        **Raises:** `TypeError` or `ValueError` while tracing, for misuse of any argument.
        """
        check_outer_rate(self.outer_optimizer is not None, lr_hyper)
        return _step(
            self,
            state,
            numbers_as_arrays(train_batch),
            numbers_as_arrays(val_batch),
            train_loss_fn,
            val_loss_fn,
            outer_rate(lr_hyper),
        )

    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> PyTree:
        """The hypergradient that `step` would follow, a tree like `state.hyperparams`.

        Arguments as for [`step`][gradhpo.BilevelOptimizer.step]; the state stays as it is.
        """
        return _compute_hypergradient(
            self,
            state,
            numbers_as_arrays(train_batch),
            numbers_as_arrays(val_batch),
            train_loss_fn,
            val_loss_fn,
        )


# Shapes are checked under `filter_jit`, so that a compiled call pays nothing for it.


@eqx.filter_jit
@checked
def _step(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
    lr_hyper: Real[Array, ""] | None,
) -> BilevelState:
    batches = {"train_batch": train_batch, "val_batch": val_batch}
    record_trace("step", optimizer, state, train_loss_fn, val_loss_fn, **batches)
    return advance(optimizer, state, train_batch, val_batch, train_loss_fn, val_loss_fn, lr_hyper)


@eqx.filter_jit
@checked
def _compute_hypergradient(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
) -> PyTree:
    problem = bind(optimizer, state, train_batch, val_batch, train_loss_fn, val_loss_fn)
    return optimizer._estimate(problem, state.metadata).hypergradient


def advance(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
    lr_hyper: Float[Array, ""] | None,
) -> BilevelState:
    """The outer step as a pure function, for use inside a larger compiled program."""
    problem = bind(optimizer, state, train_batch, val_batch, train_loss_fn, val_loss_fn)
    estimate = optimizer._estimate(problem, state.metadata)
    hyperparams, outer_opt_state = _outer_update(
        optimizer.outer_optimizer, state, estimate.hypergradient, lr_hyper
    )
    w, inner_opt_state = estimate.z
    old_w, frozen = eqx.partition(state.params, eqx.is_inexact_array)
    old_memory = {name: state.metadata[name] for name in estimate.memory}

    old = (old_w, state.inner_opt_state, state.outer_opt_state, old_memory)
    new = (w, inner_opt_state, outer_opt_state, estimate.memory)
    accepted = _finite((estimate.hypergradient, hyperparams)) & _finite(new, old)
    keep = lambda x, y: jnp.where(accepted, x, y)
    w, inner_opt_state, outer_opt_state, memory = jax.tree.map(keep, new, old)
    hyperparams = jax.tree.map(keep, hyperparams, state.hyperparams)
    dtype = accumulation_dtype(state.params)
    metrics = {
        "train_loss": estimate.train_loss,
        "val_loss": estimate.val_loss,
        "hypergrad_norm": tree_l2_norm(estimate.hypergradient),
        "param_norm": tree_l2_norm(w),
        "hyperparam_norm": tree_l2_norm(hyperparams),
        "rejected": state.metadata["rejected"] + (~accepted).astype(dtype),
    }
    return state.update(
        params=eqx.combine(w, frozen),
        hyperparams=hyperparams,
        inner_opt_state=inner_opt_state,
        outer_opt_state=outer_opt_state,
        step=state.step + 1,
        metadata=memory | {name: value.astype(dtype) for name, value in metrics.items()},
    )


def _outer_update(
    outer_optimizer: optax.GradientTransformation | None,
    state: BilevelState,
    hypergradient: PyTree,
    lr_hyper: Float[Array, ""] | None,
) -> tuple[PyTree, PyTree]:
    """New hyperparameters and outer optimizer state."""
    if lr_hyper is not None:
        updates, outer_opt_state = _scaled(hypergradient, -lr_hyper), ()
    else:
        assert outer_optimizer is not None  # `step` and `run` ask for one of the two
        with explained("outer"):
            updates, outer_opt_state = outer_optimizer.update(
                hypergradient, state.outer_opt_state, state.hyperparams
            )
    hyperparams = optax.apply_updates(state.hyperparams, updates)
    hyperparams = cast_like(hyperparams, state.hyperparams, "the outer update")
    return hyperparams, cast_like(outer_opt_state, state.outer_opt_state)


def _scaled(tree: PyTree, factor: Array) -> PyTree:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


def _finite(new: PyTree, unless_as_in: PyTree | None = None) -> Bool[Array, ""]:
    """Whether all numbers are finite, or else are those of the other tree.

    Parameters may hold an infinity on purpose (an attention mask), and so may optimizer
    states (a best value so far).
    """
    trees = (new,) if unless_as_in is None else (new, unless_as_in)
    fine = jax.tree.map(
        lambda x, *old: jnp.all(jnp.isfinite(x) if not old else jnp.isfinite(x) | (x == old[0])),
        *(eqx.filter(tree, eqx.is_inexact_array) for tree in trees),
    )
    return jnp.all(jnp.stack([jnp.asarray(True), *jax.tree.leaves(fine)]))
