"""An optimizer for one inner problem: what an algorithm supplies, and what it gets in return."""

import abc
from typing import TYPE_CHECKING, Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.hooks import Hooks
from gradhpo.core.inner_optimizer import init_inner_state, inner_response
from gradhpo.core.inner_rule import function_response
from gradhpo.core.inner_state import InnerState, Start, restarted
from gradhpo.core.inputs import Inputs
from gradhpo.core.memory import (
    MemoryOfEach,
    are_the_same,
    check_memory,
    entries_of,
    kept_where_it_fits,
)
from gradhpo.core.outer import Estimate, check_estimate, init_outer_state
from gradhpo.core.outer_step import OneOuterStep
from gradhpo.core.problem import Problem, make_problem, not_differentiable
from gradhpo.core.start import started
from gradhpo.core.state import BilevelState, inner_state, with_inner_state, with_metrics
from gradhpo.core.types import Declared, GradFn, InnerOptimizer, InnerSolver, MetricDict, UpdateFn
from gradhpo.core.visibility import Sees, check_later_steps, check_visible, seen_by
from gradhpo.utils.freezing import trained
from gradhpo.utils.settings import check_count, check_inner_rule
from gradhpo.utils.structure import check_same_structure, have_same_structure
from gradhpo.utils.tracing import differentiation_explained
from gradhpo.utils.trees import tree_l2_norm, tree_lerp


_MADE_HERE = (
    "Make the state with this optimizer's init(params, hyperparams), or convert another "
    "optimizer's state with adopt(state)."
)


class Algorithm(Hooks, OneOuterStep, BilevelOptimizer):
    r"""Base class of the algorithms, including your own.

    A subclass has the fields `inner_optimizer`, `outer_optimizer` and `update_fn`, its own settings
    between them (and `grad_fn` before `update_fn`, if it takes one), and must supply

    - `steps_field`, the name of the setting that counts the inner steps of one `step`, such as
        `"unroll_steps"`; or `num_inner_steps`, if there is no such setting;
    - `estimate(problem, memory)`: those inner steps and the hypergradient at their end, as an
        [`Estimate`][gradhpo.extend.Estimate].

    Everything else has a default: a method that differentiates all of its inner updates, carries
    nothing from step to step and learns nothing from an episode before it runs. In return it gets
    `init`, `step`, `compute_hypergradient`, `restart`, the outer update, the refusal of non-finite
    steps, input checks, and support in `run`, `TaskBatched` and all diagnostics.

    ```python
    from gradhpo.extend import Algorithm, Estimate

    class DirectTerm(Algorithm):
        inner_optimizer: gradhpo.InnerOptimizer | None = None
        outer_optimizer: optax.GradientTransformation | None = None
        update_fn: gradhpo.UpdateFn | None = None

        @property
        def num_inner_steps(self):
            return 1

        @property
        def sees(self):
            return "validation"

        def estimate(self, problem, memory):
            phi, validation, z, hyperparams = problem
            z, train_loss = phi.step(z, hyperparams, 0)
            val_loss, _, direct = validation.value_and_grads(z, hyperparams)
            return Estimate(z, direct, train_loss, val_loss)

    optimizer = DirectTerm(optax.sgd(0.1), optax.sgd(0.1))
    ```
    """

    if TYPE_CHECKING:
        inner_optimizer = Declared[InnerOptimizer | None]()
        grad_fn = Declared[GradFn | None]()
        update_fn = Declared[UpdateFn | None]()
        inner_solver = Declared[InnerSolver | None]()
    else:
        inner_optimizer: eqx.AbstractVar[InnerOptimizer | None]
        outer_optimizer: eqx.AbstractVar[optax.GradientTransformation | None]
        update_fn: eqx.AbstractVar[UpdateFn | None]
        grad_fn = inner_solver = None  # fields of the algorithms that take them

    def __check_init__(self):
        name = type(self).__name__
        check_count(self.steps_field or f"{name}.num_inner_steps", self.num_inner_steps)
        check_inner_rule(name, *self._rule)
        if self.sees not in get_args(Sees):
            raise ValueError(
                f"{name}.sees is {self.sees!r}; it must be one of "
                f"{', '.join(map(repr, get_args(Sees)))}"
            )

    @abc.abstractmethod
    def estimate(self, problem: Problem, memory: Any) -> Estimate:
        """Advances `problem.z` by `num_inner_steps` and estimates the hypergradient at the end."""

    # -- for one inner problem -----------------------------------------------------------------

    @property
    def _rule(self) -> tuple[Any, Any, Any, Any]:
        return self.inner_optimizer, self.grad_fn, self.update_fn, self.inner_solver

    def _problem(self, inputs: Inputs, num_steps: int | None = None) -> Problem:
        """The problem of one `step` (or of this number of inner steps), after all checks."""
        self._check_state(inputs.state)
        steps = self.num_inner_steps if num_steps is None else num_steps
        differentiates = self.tunes and self.differentiates_gradient
        how = self.passes_loss, differentiates, self.tunes and self.differentiates_validation
        problem = make_problem(*self._rule, inputs, steps, *how)
        z = problem.phi.at_new_hyperparams(problem.z, self.num_inner_steps)
        return problem._replace(z=started(problem.phi, z, problem.hyperparams))

    def _check_state(self, state: BilevelState) -> None:
        self._check_inner_state(state)
        z, shape_of = inner_state(state), eqx.filter_eval_shape
        outer = shape_of(init_outer_state, self.outer_optimizer, state.hyperparams)
        memory = shape_of(self.init_memory, z, state.hyperparams, None, None)
        check_same_structure(state.outer_opt_state, outer, "state.outer_opt_state", _MADE_HERE)
        kept = kept_where_it_fits(state.memory, memory)
        if not are_the_same(kept, state.memory):
            check_same_structure(state.memory, memory, "state.memory", _MADE_HERE)

    def _check_inner_state(self, state: BilevelState) -> None:
        """Checks the part of the state that training at fixed hyperparameters uses."""
        z = inner_state(state)
        args = self.inner_optimizer, z.w, state.hyperparams
        inner = eqx.filter_eval_shape(init_inner_state, *args)
        check_same_structure(z.s, inner, "state.inner_opt_state", _MADE_HERE)

    def _init_state(
        self,
        params: PyTree,
        hyperparams: PyTree,
        model_state: PyTree,
        batch: PyTree,
        key: Array | None,
    ) -> BilevelState:
        w = trained(params)
        z = InnerState(w, init_inner_state(self.inner_optimizer, w, hyperparams), model_state)
        memory = self.init_memory(z, hyperparams, batch, key)
        check_memory(type(self).__name__, memory)
        return BilevelState.create(
            params=params,
            hyperparams=hyperparams,
            inner_opt_state=z.s,
            outer_opt_state=init_outer_state(self.outer_optimizer, hyperparams),
            memory=memory,
            model_state=model_state,
            fresh=True,
        )

    def _adopt(self, state: BilevelState, *, keep_memory: bool) -> BilevelState:
        if isinstance(state.memory, MemoryOfEach):
            raise ValueError(
                f"the state holds several inner problems, and {type(self).__name__} takes one: "
                "wrap this optimizer in the same way as the one that made the state"
            )
        z, hyperparams = inner_state(state), state.hyperparams
        s = init_inner_state(self.inner_optimizer, z.w, hyperparams)
        anew = not have_same_structure(z.s, s)
        z = z._replace(s=s if anew else z.s)
        fresh = self.init_memory(z, hyperparams, None, None)
        made = BilevelState.create(
            state.params,
            hyperparams,
            z.s,
            init_outer_state(self.outer_optimizer, hyperparams),
            kept_where_it_fits(state.memory, fresh) if keep_memory else fresh,
            z.r,
            fresh=anew or (keep_memory and state.fresh),
        )
        taken = sorted(made.metadata.in_memory.intersection(state.metadata))
        if taken:
            raise ValueError(
                f"the state has notes called {', '.join(taken)}, which {type(self).__name__} keeps "
                "in its memory: remove the notes first, "
                f"dataclasses.replace(state, metadata=state.metadata.without({taken!r}))"
            )
        return with_metrics(made.update(step=state.step), state.metadata)

    def _solve(self, inputs: Inputs) -> Estimate:
        problem = self._problem(inputs)
        self._check_visible(problem, inputs.continues)
        find = lambda: not_differentiable(problem)
        with differentiation_explained(type(self).__name__, self.derivatives, find):
            found = self.estimate(problem, inputs.state.memory)
        check_estimate(type(self).__name__, found, inputs.state, problem)
        return found

    def _seen(self, inputs: Inputs) -> list[bool]:
        if not self.tunes:
            return [False] * len(jax.tree.leaves(inputs.state.hyperparams))
        return seen_by(self.sees, self._problem(inputs), self.differentiates_init)

    def _recomputes(self, inputs: Inputs) -> bool:
        differentiates = self.tunes and self.differentiates_gradient
        return differentiates and self.update_fn is None and self._problem(inputs).phi.recomputes

    def _check_visible(self, problem: Problem, continues: bool = False) -> None:
        name = type(self).__name__
        if self.tunes:
            check_visible(name, self.sees, problem, self.differentiates_init)
        if self.tunes and continues and self.differentiates_init and not self.carries_start:
            check_later_steps(name, self.sees, problem)

    def _outer_loss(self, inputs: Inputs) -> Array:
        phi, validation, z, hyperparams = self._problem(inputs)
        z, _, _ = phi.rollout(z, hyperparams, 0, self.num_inner_steps)
        return validation.loss(z, hyperparams)

    def _begin_episode(self, inputs: Inputs, num_steps: int) -> BilevelState:
        state = inputs.state
        begins = state.step % num_steps == 0
        # Also here, not only at the end of the last episode: there may have been steps in between.
        new = self._restarted(state.memory, inner_state(state), state.hyperparams)
        choose = lambda x, y: x if x is y else jnp.where(begins, x, y)
        state = state.update(memory=jax.tree.map(choose, new, state.memory))
        if not self.reads_ahead:
            return state
        problem = self._problem(inputs.at(state), num_steps * self.num_inner_steps)
        memory = self.prepare(problem, state.memory, state.step, num_steps)
        self._check_kept("prepare", memory, state.memory)
        return state.update(memory=memory)

    def _fit(self, inputs: Inputs) -> BilevelState:
        steps = inputs.train_batch.num_steps
        problem = self._problem(inputs, steps)
        self._check_visible(problem)
        return inputs.state.update(memory=self.fit(problem, inputs.state.memory, steps))

    def _restart(
        self, state: BilevelState, start: InnerState, reptile_rate: Float[Array, ""]
    ) -> BilevelState:
        self._check_state(state)
        z = inner_state(state)
        w = tree_lerp(start.w, z.w, reptile_rate)
        s = init_inner_state(self.inner_optimizer, w, state.hyperparams)
        z = InnerState(w, s, restarted(start.r, z.r, reptile_rate))
        memory = self._restarted(state.memory, z, state.hyperparams)
        return with_inner_state(state, z).update(memory=memory, fresh=True)

    def _restart_at(self, state: BilevelState, start: Start) -> BilevelState:
        old = inner_state(state).w
        w = start(state.hyperparams, old)
        remedy = "Return params like those that init was given."
        check_same_structure(w, old, "what start_fn returned", remedy)
        return self._restart(state, InnerState(w, r=start.r), jnp.zeros(()))

    def _restarted(self, memory: Any, z: InnerState, hyperparams: PyTree) -> Any:
        new = self.restart_memory(memory, z, hyperparams)
        self._check_kept("restart_memory", new, memory)
        return new

    def _check_kept(self, method: str, new: Any, old: Any) -> None:
        what = f"the memory that {type(self).__name__}.{method} returned"
        check_same_structure(new, old, what, "Keep the structure that init_memory made.")

    def _inner_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        assert self.inner_optimizer is not None
        return inner_response(self.inner_optimizer, inner_state(state), state.hyperparams, gradient)

    def _function_response(self, state: BilevelState, batch: PyTree) -> tuple[PyTree, bool]:
        function = self.grad_fn if self.update_fn is None else self.update_fn
        assert function is not None
        given = state.params, state.hyperparams, batch, state.model_state
        return function_response(function, *given), self.update_fn is not None

    def _param_norm(self, w: PyTree) -> Array:
        return tree_l2_norm(w)

    def _scalars(self, memory: Any) -> MetricDict:
        is_scalar = lambda x: eqx.is_inexact_array(x) and x.shape == ()
        return {name: x for name, x in entries_of(memory).items() if is_scalar(x)}
