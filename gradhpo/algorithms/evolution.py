r"""Evolution strategies over unrolled training: losses are compared, and nothing differentiated."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from gradhpo.extend import (
    Algorithm,
    Draws,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    Memory,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    check_count,
    check_setting,
    checked,
    mean_along,
    random_directions,
    setting,
    started,
)


class EvolutionMemory(Memory):
    r"""What carries over from window to window of an episode.

    - `perturbed`: $z$ of both runs of every direction, at $\lambda + \varepsilon$ and then at
        $\lambda - \varepsilon$: leaves `[2, directions, ...]`.
    - `noise`: $\varepsilon/\sigma$, or its sum over the episode so far with `noise="window"`: a
        tree like the hyperparameters with leaves `[directions, ...]`.
    - `starts_anew`: whether the next step begins an episode, with new perturbed runs.
    - `draws`: the key of the noise, and the number of draws from it.
    """

    perturbed: InnerState
    noise: PyTree
    starts_anew: Bool[Array, ""]
    draws: Draws


@checked
class EvolutionOptimizer(Algorithm):
    r"""NRES and PES: the hypergradient of a smoothed episode, from values of the validation loss.

    In addition to the unperturbed run, each direction has two more, trained at
    $\lambda + \varepsilon$ and $\lambda - \varepsilon$ with
    $\varepsilon \sim \mathcal{N}(0, \sigma^2 I)$, on the same batches.
    One `step` trains all of them for a window of `unroll_steps` inner steps. With the validation
    losses $L^\pm$ at its end, the estimate is the mean over directions of

    $$\hat g = \frac{L^+ - L^-}{2\sigma^2}\,\xi.$$

    - `noise="episode"` (NRES): $\varepsilon$ is drawn once for each episode, and
        $\xi = \varepsilon$.
    - `noise="window"` (PES): a new $\varepsilon$ is drawn for each window, and $\xi$ is the sum of
        all $\varepsilon$ of the episode so far.

    The perturbed runs continue from window to window, so the horizon is the whole episode. Summed
    over an episode, $\hat g$ has the expectation $\nabla_\lambda\,\mathbb{E}_\varepsilon \sum_k
    L_{\mathrm{val}}(w_{kT}(\lambda + \varepsilon), \lambda + \varepsilon)$ with $T$ inner steps per
    window (PES: with an $\varepsilon$ per window), exactly if the hyperparameters do not change
    during the episode. For the loss at the end of training alone, make the episode one window: set
    `unroll_steps` to all of its inner steps, and pass `steps_per_episode=1` to `run`.

    The training gradient is the only derivative: the validation loss may be an accuracy or an error
    count, and an `update_fn` may be a simulator (a `jax.pure_callback` with
    `vmap_method="sequential"`). For $H$ hyperparameters the variance is about $H\|g\|^2$ divided by
    the number of directions. It takes the time of `2 * num_directions + 1` training runs and the
    memory of as many states (of parameters, optimizer and model), for any horizon.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. It may need the
        loss (`optax.lbfgs`, `optax.polyak_sgd`).
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `num_directions`: pairs of perturbed runs, at least 1; default 8. They run together.
    - `sigma`: the standard deviation $\sigma$ of the perturbations, positive, shape `()`; default
        0.01. It is the same for all hyperparameters, so scale these alike (tune the logarithm of a
        rate). A perturbation lost to rounding, such as 1e-4 in bfloat16, measures nothing: the
        hypergradient is 0, without a warning.
    - `noise`: `"episode"` (the default) has less variance per step; `"window"` has less in the sum
        over an episode if training forgets within a window.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    `init` takes the `key` of the noise, by default `jax.random.key(0)`. Pass `steps_per_episode` to
    [`run`][gradhpo.run], which starts new perturbed runs with each episode. Without episodes, NRES
    keeps its first directions, and `run` warns.

    The memory, `state.memory`, holds the `perturbed` runs, `noise`, `starts_anew` and `draws`.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, counts below 1, or `sigma <= 0`; `TypeError` for an optimizer that
    is not an optax transformation, a function that is not callable, or another `noise`.

    ```python
    x = jax.random.normal(jax.random.key(0), (50, 3))
    batch = x, jnp.sign(x[:, 0])
    error = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(h) * w @ w
    mistakes = lambda w, h, batch: jnp.mean(jnp.sign(batch[0] @ w) != batch[1])
    optimizer = gradhpo.EvolutionOptimizer(
        optax.sgd(0.1), optax.adam(0.1), unroll_steps=10, sigma=0.3
    )
    state = optimizer.init(jnp.zeros(3), jnp.zeros(()), key=jax.random.key(1))
    losses = gradhpo.LossFunctions(error, mistakes)
    state, history = gradhpo.run(
        optimizer, state, losses, batch, batch, num_steps=20, steps_per_episode=4,
        reptile_rate=0.0, progress=False,
    )
    ```

    ??? cite "Reference"

        NRES: Li et al., *Noise-Reuse in Online Evolution Strategies*, NeurIPS 2023,
        arXiv:2304.12180. PES: Vicol, Metz, Sohl-Dickstein, *Unbiased Gradient Estimation in
        Unrolled Computation Graphs with Persistent Evolution Strategies*, ICML 2021,
        arXiv:2112.13835.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    num_directions: int = eqx.field(static=True, default=8)
    sigma: Float[Array, ""] = eqx.field(converter=setting, default=0.01)
    noise: Literal["episode", "window"] = eqx.field(static=True, default="episode")
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "unroll_steps"

    def __check_init__(self):
        check_count("num_directions", self.num_directions)
        check_setting("sigma", self.sigma, lambda x: x > 0, "positive")

    @property
    def sees(self) -> Sees:
        """Everything: updates are evaluated."""
        return "everything"

    @property
    def differentiates_validation(self) -> bool:
        """No."""
        return False

    @property
    def differentiates_init(self) -> bool:
        """Yes, by differences: perturbed runs start at perturbed hyperparameters."""
        return True

    @property
    def carries_start(self) -> bool:
        """Yes: perturbed runs continue from step to step."""
        return True

    @property
    def may_be_zero(self) -> bool:
        """Yes: both losses of a pair may be equal, as accuracies often are."""
        return True

    @property
    def suspect(self) -> str:
        """A perturbed run that diverges."""
        return f"a perturbed run that diverges: sigma={float(self.sigma):g} may be too large"

    @property
    def without_episodes(self) -> str:
        """The noise is never drawn again."""
        if self.noise == "window":
            return ""
        return (
            "EvolutionOptimizer(noise='episode') draws its directions at the start of an episode, "
            "and this run has no episodes: all steps follow the same directions. Pass "
            "steps_per_episode, or use noise='window'"
        )

    def with_difference_step(self, factor: float) -> "EvolutionOptimizer":
        """With another `sigma`."""
        return dataclasses.replace(self, sigma=factor * self.sigma)

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> EvolutionMemory:
        none = lambda x: jnp.zeros((self.num_directions, *x.shape), x.dtype)
        noise = jax.tree.map(none, hyperparams)
        return EvolutionMemory(self._copies(z), noise, jnp.asarray(True), Draws.create(key))

    def restart_memory(
        self, memory: EvolutionMemory, z: InnerState, hyperparams: PyTree
    ) -> EvolutionMemory:
        """The next step starts new perturbed runs."""
        return dataclasses.replace(memory, starts_anew=jnp.ones_like(memory.starts_anew))

    def after_refusal(self, old: EvolutionMemory, new: EvolutionMemory) -> EvolutionMemory:
        """The old memory with the draw spent: an episode that starts over gets other noise."""
        return dataclasses.replace(old, draws=new.draws)

    def estimate(self, problem: Problem, memory: EvolutionMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        key, draws = memory.draws.next()
        normal = random_directions(jax.random.normal, key, hyperparams, self.num_directions)
        begins = lambda new, old: jax.tree.map(
            lambda x, y: jnp.where(memory.starts_anew, x, y), new, old
        )
        if self.noise == "episode":
            direction = noise = begins(normal, memory.noise)
        else:
            so_far = jax.tree.map(jnp.add, memory.noise, normal)
            direction, noise = normal, begins(normal, so_far)
        epsilon = jax.tree.map(lambda x: self.sigma.astype(x.dtype) * x, direction)

        def window(at: InnerState, change: PyTree) -> tuple[InnerState, Array]:
            moved = jax.tree.map(jnp.add, hyperparams, change)
            at = started(phi, at, moved)
            at, _, _ = phi.rollout(at, moved, 0, self.unroll_steps)
            return at, validation.loss(at, moved)

        both = jax.tree.map(lambda x: jnp.stack([x, -x]), epsilon)
        perturbed = begins(self._copies(z), memory.perturbed)
        perturbed, (plus, minus) = jax.vmap(jax.vmap(window))(perturbed, both)
        z, train_loss, _ = phi.rollout(z, hyperparams, 0, self.unroll_steps)
        # The noise is in units of sigma, whose square would underflow in half precision.
        wide = accumulation_dtype(plus)
        slopes = (plus.astype(wide) - minus.astype(wide)) / (2 * self.sigma.astype(wide))
        memory = EvolutionMemory(perturbed, noise, jnp.zeros_like(memory.starts_anew), draws)
        hypergradient = mean_along(slopes, noise)
        return Estimate(z, hypergradient, train_loss, validation.measured(z, hyperparams), memory)

    def _copies(self, z: InnerState) -> InnerState:
        """For both runs of all directions."""
        copy = lambda x: jnp.broadcast_to(x, (2, self.num_directions, *x.shape))
        return jax.tree.map(copy, z)
