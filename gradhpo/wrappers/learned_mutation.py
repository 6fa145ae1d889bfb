r"""HPM's mutation: a teacher that learns from the members' own hypergradients."""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree, Real

from gradhpo.core.inner_optimizer import cast_like
from gradhpo.utils.coordinates import num_coordinates, ravel, unravel
from gradhpo.utils.settings import check_count, check_outer_optimizer, check_setting, setting
from gradhpo.utils.trees import accumulation_dtype, all_finite
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import strong
from gradhpo.wrappers.mutations import Mutation


class Teacher(NamedTuple):
    """The parameters of the teacher, both of shape `[hyperparameters, units]`."""

    W: Array
    V: Array


class TeacherMemory(eqx.Module):
    """What [`LearnedMutation`][gradhpo.LearnedMutation] carries from step to step.

    - `teacher`: its `W` and `V`, shape `[n, units]` each, where n counts the hyperparameters.
    - `teacher_opt_state`: the state of its optimizer.
    """

    teacher: Teacher
    teacher_opt_state: PyTree


@checked
class LearnedMutation(Mutation):
    r"""HPM's mutation: factors from a teacher that learns from the members' hypergradients.

    $$\lambda \leftarrow \alpha \odot \lambda,\qquad
    \alpha = 1 + \tanh\left(W\,\mathrm{softmax}(V^\top\lambda)\right)$$

    with $W, V \in \mathbb R^{n \times M}$ for $n$ hyperparameters and $M$ = `units`; at first
    $W = 0$, which changes nothing, and $V$ is standard normal. At every outer step the teacher
    descends, with its own `optimizer`,

    $$\nabla_{W, V} \sum_k \left\langle g_k, \alpha(\lambda_k) \odot \lambda_k \right\rangle,$$

    the hypergradients $g_k$ of all members at their $\lambda_k$, both held constant. Members whose
    hypergradient is not finite are left out, and a step that would not be finite is not taken.

    With `kind="additive"`: $\lambda \leftarrow \lambda + \mathtt{scale}\cdot\tanh(W\,
    \mathrm{softmax}(V^\top\lambda))$, for hyperparameters that are logarithms or of either sign.
    The multiplicative form favours an optimum at 0. Close to a local optimum, $g_k \approx 0$
    teaches nothing: members with a slow teacher then do no better than without.

    **Arguments:**

    - `units`: $M$, at least 1, default 8.
    - `optimizer`: an optax transformation for the teacher, default `optax.adam(0.1)`.
    - `kind`: `"multiplicative"` (the default) or `"additive"`.
    - `scale`: the largest change of the additive kind, positive, shape `()`, default 1.

    **Raises:** `ValueError` for `units < 1` or a `scale` that is not positive; `TypeError` for an
    `optimizer` that is not an optax transformation. [`Population`][gradhpo.Population] raises
    `ValueError` if its optimizer has no hypergradients.

    ```python
    mutation = gradhpo.LearnedMutation(kind="additive")
    optimizer = gradhpo.Population(
        gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1)), 8, 20, mutation=mutation
    )
    ```

    ??? cite "Reference"

        Tao et al., *Learning to Mutate with Hypergradient Guided Population*, NeurIPS 2020.
    """

    units: int = eqx.field(static=True, default=8)
    optimizer: optax.GradientTransformation = optax.adam(0.1)
    kind: Literal["multiplicative", "additive"] = eqx.field(static=True, default="multiplicative")
    scale: Real[Array, ""] = eqx.field(converter=setting, default=1.0)

    learns = True

    def __check_init__(self):
        check_count("units", self.units)
        check_outer_optimizer("LearnedMutation", self.optimizer)
        check_setting("scale", self.scale, lambda x: x > 0, "positive")

    def init(self, key: Array, hyperparams: PyTree) -> TeacherMemory:
        """A teacher that changes nothing yet."""
        shape, dtype = (num_coordinates(hyperparams), self.units), accumulation_dtype(hyperparams)
        teacher = Teacher(jnp.zeros(shape, dtype), jax.random.normal(key, shape, dtype))
        return TeacherMemory(teacher, jax.tree.map(strong, self.optimizer.init(teacher)))

    def learn(
        self, memory: TeacherMemory, hypergradients: PyTree, hyperparams: PyTree
    ) -> TeacherMemory:
        """One step of the teacher."""
        old = memory.teacher, memory.teacher_opt_state
        gradient = self.teacher_gradient(memory.teacher, hypergradients, hyperparams)
        updates, opt_state = self.optimizer.update(gradient, old[1], old[0])
        new = cast_like((optax.apply_updates(old[0], updates), opt_state), old)
        fine = all_finite(new, unless_as_in=old)
        return TeacherMemory(*jax.tree.map(lambda x, y: jnp.where(fine, x, y), new, old))

    def teacher_gradient(
        self, teacher: Teacher, hypergradients: PyTree, hyperparams: PyTree
    ) -> Teacher:
        """The gradient that the teacher descends; both trees have the members first."""
        dtype = teacher.W.dtype
        rows = jax.vmap(lambda tree: ravel(tree, dtype))
        g, h = rows(hypergradients), rows(hyperparams)
        fine = jnp.all(jnp.isfinite(g), axis=1)

        def total(teacher: Teacher) -> Array:
            moved = jax.vmap(lambda row: self._moved(teacher, row))(_or_zero(fine, h))
            return jnp.sum(_or_zero(fine, g) * moved)

        return jax.grad(total)(teacher)

    def mutate(self, memory: TeacherMemory, key: Array, hyperparams: PyTree) -> PyTree:
        """The new hyperparameters; the key is not used."""
        row = ravel(hyperparams, memory.teacher.W.dtype)
        return unravel(self._moved(memory.teacher, row), hyperparams)

    def _moved(self, teacher: Teacher, row: Float[Array, " n"]) -> Float[Array, " n"]:
        tanh = jnp.tanh(teacher.W @ jax.nn.softmax(teacher.V.T @ row))
        if self.kind == "additive":
            return row + self.scale.astype(row.dtype) * tanh
        return (1 + tanh) * row


def _or_zero(fine: Bool[Array, " k"], rows: Float[Array, "k n"]) -> Float[Array, "k n"]:
    return jnp.where(fine[:, None], rows, 0)
