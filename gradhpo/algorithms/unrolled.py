r"""Reverse-mode differentiation through the inner optimization."""

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gradhpo.core.algorithm import Memoryless
from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem, Sees
from gradhpo.core.reverse import along_a_line, cotangent_at_end, pull_through
from gradhpo.core.state import Memory
from gradhpo.core.types import InnerOptimizer, UpdateFn
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked


@checked
class UnrolledOptimizer(Memoryless):
    r"""The exact hypergradient of `unroll_steps` inner steps, by reverse mode.

    $$g = \frac{\partial L_{val}}{\partial\lambda} + \alpha_T\sum_{t=1}^{T} A_T\cdots A_{t+1} B_t:$$

    a forward scan keeps the inner states, a backward scan pulls the cotangent through them,
    parameters and optimizer state alike ($g \leftarrow g + \bar z B_t$, then
    $\bar z \leftarrow \bar z A_t$, from $\bar z = \alpha_T$ at $t = T$ to $t = 1$).
    No activation is kept from one inner step to another.

    **Arguments:**

    - `inner_optimizer`, `outer_optimizer`, `update_fn`: as for
        [`FOOptimizer`][gradhpo.FOOptimizer].
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `truncation`: keep only the last K terms of the sum; `None` (the default) keeps all.
    - `checkpoints`: `None` (the default) keeps every inner state, memory $O(P \cdot T)$. A number
        of segments, or `"sqrt"` for $\lceil\sqrt T\rceil$ of them, keeps the first state of each
        and runs each segment once more on the way back: memory $O(P\sqrt T)$ with `"sqrt"`,
        one more forward pass. Applies to the steps that `truncation` leaves.

    **Raises:** `ValueError` for counts below 1, `truncation > unroll_steps`, or more
    checkpoints than steps.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.UnrolledOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=20)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter Optimization*,
        ICML 2017, arXiv:1703.01785; truncation: Shaban et al., *Truncated Back-propagation
        for Bilevel Optimization*, AISTATS 2019, arXiv:1810.10667.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    truncation: int | None = eqx.field(static=True, default=None)
    checkpoints: int | Literal["sqrt"] | None = eqx.field(static=True, default=None)
    update_fn: UpdateFn | None = None

    def __check_init__(self):
        check_count("unroll_steps", self.unroll_steps)
        if self.truncation is not None:
            check_count("truncation", self.truncation, most=self.unroll_steps)
        if self.checkpoints not in (None, "sqrt"):
            check_count("checkpoints", self.checkpoints, most=self._differentiated_steps)

    @property
    def num_inner_steps(self) -> int:
        """Inner steps per `step`: `unroll_steps`."""
        return self.unroll_steps

    @property
    def _sees(self) -> Sees:
        return "updates" if self._differentiated_steps > 1 else "last update"

    @property
    def _differentiated_steps(self) -> int:
        return self.unroll_steps if self.truncation is None else self.truncation

    @property
    def _num_segments(self) -> int:
        if isinstance(self.checkpoints, int):
            return self.checkpoints
        return math.ceil(math.sqrt(self._differentiated_steps))

    def _estimate(self, problem: Problem, memory: Memory) -> Estimate:
        phi, validation, z, hyperparams = problem
        steps = self._differentiated_steps
        first = self.unroll_steps - steps
        z, _, _ = phi.rollout(z, hyperparams, 0, first)
        if self.checkpoints is None:
            keep, count = _keeping_all_states, ()
        else:
            keep, count = _keeping_segment_starts, (self._num_segments,)
        z, train_loss, pull_back = keep(phi, z, hyperparams, first, steps, *count)
        val_loss, alpha, direct = validation.value_and_grads(z[0], hyperparams)
        _, _, hypergradient = pull_back(cotangent_at_end(alpha, z[1], direct))
        hypergradient = cast_like(hypergradient, direct)
        return Estimate(z, {}, hypergradient, train_loss, val_loss)


@checked
class DrMADOptimizer(Memoryless):
    r"""The hypergradient of `unroll_steps` inner steps along a straight line, in memory $O(P)$.

    The backward pass of [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer], with the inner
    states that it would have to keep replaced by points on the line from the first to the
    last,

    $$\hat z_t = (1 - t/T)\,z_0 + (t/T)\,z_T,$$

    parameters and optimizer state alike (step counts are true ones). An approximation,
    as good as the path of training is straight.

    **Arguments:**

    - `inner_optimizer`, `outer_optimizer`, `update_fn`: as for
        [`FOOptimizer`][gradhpo.FOOptimizer].
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; with 1, the default, it is exact.

    **Raises:** `ValueError` for `unroll_steps < 1`.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.DrMADOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=20)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Fu et al., *DrMAD: Distilling Reverse-Mode Automatic Differentiation for Optimizing
        Hyperparameters of Deep Neural Networks*, IJCAI 2016, arXiv:1601.00917.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    update_fn: UpdateFn | None = None

    def __check_init__(self):
        check_count("unroll_steps", self.unroll_steps)

    @property
    def num_inner_steps(self) -> int:
        """Inner steps per `step`: `unroll_steps`."""
        return self.unroll_steps

    @property
    def _sees(self) -> Sees:
        return "updates" if self.unroll_steps > 1 else "last update"

    def _estimate(self, problem: Problem, memory: Memory) -> Estimate:
        phi, validation, z, hyperparams = problem
        steps = self.unroll_steps
        _, z, train_loss, line, kept = along_a_line(phi, z, hyperparams, steps)
        val_loss, alpha, direct = validation.value_and_grads(z[0], hyperparams)
        bar = cotangent_at_end(alpha, z[1], direct)
        _, _, hypergradient = pull_through(phi, line.at, kept, 0, steps, hyperparams, bar)
        hypergradient = cast_like(hypergradient, direct)
        return Estimate(z, {}, hypergradient, train_loss, val_loss)


# Both forms run the steps forward and return, with the end state and the last training loss,
# the function that takes (w_bar, s_bar, hyperparams_bar) from the end back to the start.


def _keeping_all_states(phi, z, hyperparams, first, steps):
    z, loss, before = phi.rollout(z, hyperparams, first, steps, keep=lambda z: z)
    return z, loss, lambda bar: _pull_back(phi, before, first, steps, hyperparams, bar)


def _pull_back(phi, before, first, steps, hyperparams, bar):
    return pull_through(phi, lambda z, t: z, before, first, steps, hyperparams, bar)


def _keeping_segment_starts(phi, z, hyperparams, first, steps, count):
    end = first + steps - 1

    def forward(z, start, length):
        new_z, loss, _ = phi.rollout(z, hyperparams, start, length, loss_at=end)
        return new_z, (loss, z)

    def backward(bar, z, start, length):
        _, _, before = phi.rollout(z, hyperparams, start, length, keep=lambda z: z, loss_at=-1)
        return _pull_back(phi, before, start, length, hyperparams, bar)

    groups, loss = [], jnp.asarray(jnp.nan)
    for starts, length in _segments(first, steps, count):
        body = lambda z, start, length=length: forward(z, start, length)
        z, (losses, before) = jax.lax.scan(body, z, starts)
        loss = losses[-1]
        groups.append((before, starts, length))

    def pull_back(bar):
        for before, starts, length in reversed(groups):
            body = lambda bar, at, length=length: (backward(bar, at[0], at[1], length), None)
            bar, _ = jax.lax.scan(body, bar, (before, starts), reverse=True)
        return bar

    return z, loss, pull_back


def _segments(first: int, steps: int, count: int) -> list[tuple[Array, int]]:
    """`count` segments that cover the steps, as groups of one length: (their starts, length).

    The lengths differ by at most 1, so there are at most two groups, and two programs.
    """
    short, longer = divmod(steps, count)
    middle = first + longer * (short + 1)
    groups = [
        (first + (short + 1) * jnp.arange(longer), short + 1),
        (middle + short * jnp.arange(count - longer), short),
    ]
    return [(starts, length) for starts, length in groups if starts.size]
