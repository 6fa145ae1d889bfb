r"""The compiled programs of a replay: forward through a segment, the end, and back through one.

A state at the boundary of two segments is a `BilevelState` with the z there; its `step` is that of
the start, from which batches are counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.exact import ExactHypergradient
from gradhpo.core.inner_state import InnerState
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.measured import loss_of
from gradhpo.core.problem import Problem, Validation
from gradhpo.core.reverse import Cotangent, cotangent_at_end, pull_through, through_start
from gradhpo.core.state import BilevelState, with_inner_state
from gradhpo.data.passes import Part
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import everywhere
from gradhpo.utils.tracing import count_trace
from gradhpo.utils.trees import all_finite, scaled_norm_and_moving, tree_l2_norm


class Training(eqx.Module):
    """What is replayed. With `queries`, every validation example has its own cotangent."""

    exact: ExactHypergradient
    losses: LossFunctions
    val_batch: PyTree
    queries: bool = eqx.field(static=True)

    def inputs(self, state: BilevelState, part: Part) -> Inputs:
        """As `step` has them; the validation batch is the first query's."""
        first = jnp.zeros((), jnp.int32)
        drawn = part.batches.drawn(state.step, first, part.per_step)
        val_batch = self._queries(lambda x: x[:1]) if self.queries else self.val_batch
        return Inputs(state, drawn, val_batch, self.losses)

    def _queries(self, function: Callable[[Array], Array]) -> PyTree:
        """The validation batch with a function of its examples, which every device has all of."""
        return jax.tree.map(
            lambda x: x if is_common(x) else function(everywhere(x)), self.val_batch
        )

    def _problem(self, state: BilevelState, part: Part, length: int) -> Problem:
        count_trace()
        return self.exact._problem(self.inputs(state, part), length)

    def check(self, state: BilevelState, part: Part) -> None:
        """Raises what is wrong with losses, batches or derivatives, before hours are spent."""
        eqx.filter_eval_shape(self._hypergradient, state, part)

    @compiled  # traced once, and never run
    def _hypergradient(self, state: BilevelState, part: Part) -> PyTree:
        return self.exact._solve(self.inputs(state, part)).hypergradient

    @compiled
    def responses(self, state: BilevelState, part: Part) -> dict[str, Array]:
        """Both losses on their first batches, here and nearby: they identify the losses."""
        phi, validation, z, hyperparams = self._problem(state, part, 1)
        moved = lambda tree, by: jax.tree.map(lambda x: x + jnp.asarray(by, x.dtype), tree)
        found: dict[str, list[Array]] = {"train_loss": [], "val_loss": []}
        for of_w, of_h in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (-0.2, 0.3)):
            at = z._replace(w=moved(z.w, of_w)), moved(hyperparams, of_h)
            found["train_loss"].append(loss_of(phi.train_loss(*at, part.first)))
            found["val_loss"].append(validation.loss(*at))
        return {name: jnp.stack(values) for name, values in found.items()}

    @compiled
    def forward(
        self, state: BilevelState, part: Part, length: int
    ) -> tuple[BilevelState, Array, Array]:
        """The state after a segment, its last training loss, and whether the state is finite."""
        phi, _, z, hyperparams = self._problem(state, part, length)
        new, loss, _ = phi.rollout(z, hyperparams, part.first, length)
        # What an episode starts with may be infinite on purpose.
        return with_inner_state(state, new), loss_of(loss), all_finite(new.w, unless_as_in=z.w)

    @compiled
    def at_end(self, state: BilevelState, part: Part) -> tuple[Array, Cotangent]:
        """The validation loss and the cotangent at the end; of every query."""
        _, validation, z, hyperparams = self._problem(state, part, 1)
        if not self.queries:
            return _loss_and_cotangent(validation, z, hyperparams)
        axes = jax.tree.map(lambda x: None if is_common(x) else 0, self.val_batch)
        alone = self._queries(lambda x: x[:, None])

        def of_query(batch: PyTree) -> tuple[Array, Cotangent]:
            return _loss_and_cotangent(_with_batch(validation, batch), z, hyperparams)

        return eqx.filter_vmap(of_query, in_axes=(axes,))(alone)

    @compiled
    def back(self, state: BilevelState, part: Part, length: int, bar: Cotangent) -> Cotangent:
        """The cotangent at the start of a segment, which begins at this state."""
        phi, _, z, hyperparams = self._problem(state, part, length)
        of_each = jax.vmap if self.queries else lambda function: function
        keep = lambda z: z
        _, _, before = phi.rollout(z, hyperparams, part.first, length, keep=keep, loss_at=-1)
        state_at = lambda kept, t: kept
        way = phi, state_at, before, part.first, length, hyperparams, bar
        bar, _ = pull_through(*way, over=of_each)
        return of_each(lambda bar: through_start(phi, z, hyperparams, bar))(bar)


@compiled
def measured(w: PyTree, hypergradient: PyTree) -> tuple[Array, Array, Array, Array]:
    """Both norms; which leaves of the hypergradient are not 0; and whether it is finite."""
    norm, moving = scaled_norm_and_moving(hypergradient)
    return tree_l2_norm(w), norm, moving, all_finite(hypergradient)


def _loss_and_cotangent(
    validation: Validation, z: InnerState, hyperparams: PyTree
) -> tuple[Array, Cotangent]:
    loss, alpha, direct = validation.value_and_grads(z, hyperparams)
    return loss_of(loss), cotangent_at_end(alpha, z, direct)


def _with_batch(validation: Validation, batch: PyTree) -> Validation:
    return dataclasses.replace(validation, val_batch=batch)


def is_common(x: Any) -> bool:
    """Whether all queries have this leaf of the validation batch in common: a key, a function."""
    return not eqx.is_array(x) or (is_key(x) and x.ndim == 0)
