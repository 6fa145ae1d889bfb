"""The extension interface: an algorithm that the library does not have."""

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same
from jaxtyping import Array, PyTree
from problems import relaxed

import gradhpo
from gradhpo import extend
from gradhpo.extend import Algorithm, Estimate, setting


ROOT = Path(__file__).parents[1]


class PenaltyMemory(eqx.Module):
    """The other minimiser, and its own Adam."""

    y: PyTree
    opt_state: PyTree


class F2SA(Algorithm):
    """The fully first-order method of Kwon et al., ICML 2023, arXiv:2301.10945."""

    inner_optimizer: gradhpo.InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    penalty: Array = eqx.field(converter=setting, default=10.0)
    inner_steps: int = eqx.field(static=True, default=1)
    for_y: optax.GradientTransformation = relaxed(optax.adam(0.1))
    update_fn: gradhpo.UpdateFn | None = None

    @property
    def num_inner_steps(self):
        return self.inner_steps

    @property
    def passes_loss(self):
        return True

    def with_num_steps(self, num_steps):
        return F2SA(self.inner_optimizer, self.outer_optimizer, self.penalty, num_steps, self.for_y)

    def init_memory(self, z, hyperparams, batch, key):
        return PenaltyMemory(z.w, self.for_y.init(z.w))

    def restart_memory(self, memory, z, hyperparams):
        return PenaltyMemory(z.w, self.for_y.init(z.w))

    def estimate(self, problem, memory):
        phi, validation, z, hyperparams = problem

        def penalised(y, h, t):  # g + f/penalty, whose minimum is that of f + penalty g
            share = 1 / self.penalty.astype(jnp.result_type(float))
            at_y = z._replace(w=y)
            return phi.train_loss(at_y, h, t) + share * validation.loss(at_y, h)

        def body(carry, t):
            z, y, s = carry
            z, loss = phi.step(z, hyperparams, t)
            updates, s = self.for_y.update(jax.grad(penalised)(y, hyperparams, t), s, y)
            return (z, optax.apply_updates(y, updates), s), loss

        start = (z, memory.y, memory.opt_state)
        (z, y, s), losses = jax.lax.scan(body, start, jnp.arange(self.inner_steps))
        last = self.inner_steps - 1
        of_y = jax.grad(penalised, 1)(y, hyperparams, last)
        of_z = jax.grad(phi.train_loss, 1)(z, hyperparams, last)
        hypergradient = jax.tree.map(lambda a, b: self.penalty * (a - b), of_y, of_z)
        val_loss = validation.loss(z, hyperparams)
        return Estimate(z, hypergradient, losses[-1], val_loss, PenaltyMemory(y, s))


H = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
TARGET = jnp.array([1.0, -1.0, 0.5])
LOSSES = gradhpo.LossFunctions(
    lambda w, h, batch: w @ H @ w / 2 - w @ h + 0 * jnp.sum(batch),
    lambda w, h, batch: jnp.sum((w - TARGET) ** 2) / 2 + 0 * jnp.sum(batch),
)
SGD = relaxed(optax.sgd(0.2))
BATCH = jnp.zeros(2)
START = jnp.full(3, 0.3)


def count_of(memory):
    return memory.opt_state[0].count


def test_f2sa_is_short():
    source = Path(__file__).read_text()
    body = source[source.index("class PenaltyMemory") : source.index("\n\n\nH = ")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 60


def test_f2sa_has_the_bias_of_its_penalty():
    """On a quadratic: dF/dh = H^-1 (w* - target), with a relative error of order 1/penalty."""
    exact = jnp.linalg.solve(H, jnp.linalg.solve(H, START) - TARGET)
    errors = []
    for penalty in (10.0, 100.0, 1000.0):
        optimizer = F2SA(SGD, inner_steps=2_000, penalty=penalty, for_y=relaxed(optax.sgd(0.2)))
        state = optimizer.init(jnp.zeros(3), START)
        g = optimizer.compute_hypergradient(state, BATCH, BATCH, LOSSES.train_loss, LOSSES.val_loss)
        # Written out: y = (H + I/p)^-1 (h + target/p), z = H^-1 h, g = -p (y - z).
        y = jnp.linalg.solve(H + jnp.eye(3) / penalty, START + TARGET / penalty)
        np.testing.assert_allclose(g, -penalty * (y - jnp.linalg.solve(H, START)), rtol=1e-9)
        errors.append(float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)))
    np.testing.assert_allclose(errors[1:] / np.asarray(errors[:-1]), 0.1, rtol=0.1)


def test_f2sa_under_run_restarts_its_second_optimizer_with_the_episode():
    optimizer = F2SA(SGD, relaxed(optax.sgd(0.05)), inner_steps=5)
    state = optimizer.init(jnp.zeros(3), START)
    run = lambda **settings: gradhpo.run(
        optimizer, state, LOSSES, BATCH, BATCH, num_steps=6, progress=False, **settings
    )
    state_after, history = run()
    assert count_of(state_after.memory) == 30
    assert history["val_loss"][-1] < history["val_loss"][0]
    in_episodes, _ = run(steps_per_episode=3)
    assert count_of(in_episodes.memory) == 0  # whole episodes: the next one is about to begin
    stepped = optimizer.step(in_episodes, BATCH, BATCH, LOSSES.train_loss, LOSSES.val_loss)
    assert count_of(stepped.memory) == 5
    np.testing.assert_array_equal(in_episodes.memory.y, in_episodes.params)


def test_f2sa_on_tasks():
    """Two tasks with different losses: the mean of separate runs, each with its own memory."""
    single = F2SA(SGD, relaxed(optax.sgd(0.05)), inner_steps=5)
    together = gradhpo.TaskBatched(single, num_tasks=2)
    losses = (
        lambda w, h, batch: w @ H @ w / 2 - w @ (h + batch),
        lambda w, h, batch: jnp.sum((w - TARGET * batch) ** 2) / 2,
    )
    train = jnp.array([[0.5, -1.0, 2.0], [-0.3, 0.7, 0.1]])
    val = jnp.array([[1.0, 2.0, -1.0], [0.4, -0.5, 3.0]])
    state = together.init(jnp.zeros(3), START)
    alone = [single.init(jnp.zeros(3), START)] * 2
    for _ in range(2):
        gs = [
            single.compute_hypergradient(one, train[i], val[i], *losses)
            for i, one in enumerate(alone)
        ]
        assert not np.allclose(gs[0], gs[1], rtol=0.1)
        hyperparams = state.hyperparams - 0.05 * (gs[0] + gs[1]) / 2
        state = together.step(state, train, val, *losses)
        alone = [single.step(one, train[i], val[i], *losses) for i, one in enumerate(alone)]
        alone = [one.update(hyperparams=hyperparams) for one in alone]
        np.testing.assert_allclose(state.hyperparams, hyperparams, rtol=1e-12)
        for i, one in enumerate(alone):
            found = jax.tree.map(lambda x, i=i: x[i], (state.params, state.memory.of_each))
            assert_same(found, (one.params, one.memory), rtol=1e-12)
        for metric in ("train_loss", "val_loss"):
            mean = np.mean([one.metadata[metric] for one in alone])
            np.testing.assert_allclose(state.metadata[metric], mean, rtol=1e-12)
    assert count_of(state.memory.of_each).tolist() == [10, 10]


def test_f2sa_in_plan_and_compare():
    optimizer = F2SA(SGD, relaxed(optax.sgd(0.05)), inner_steps=500, penalty=1_000.0)
    state = optimizer.init(jnp.zeros(3), START)
    planned = gradhpo.plan({"F2SA": optimizer}, state, BATCH, BATCH, LOSSES, horizons=[10, 20])
    flops = [planned["F2SA", steps].cost.flops for steps in (10, 20)]
    assert 1.7 < flops[1] / flops[0] < 2.0
    by_sgd = F2SA(SGD, inner_steps=500, penalty=1_000.0, for_y=SGD)
    report = gradhpo.compare_hypergradients({"F2SA": by_sgd}, state, BATCH, BATCH, LOSSES)
    assert report.cosine["F2SA"] > 0.999
    np.testing.assert_allclose(report.norm_ratio["F2SA"], 1, rtol=1e-2)


class Named(PenaltyMemory):
    param_norm: Array


class Clash(F2SA):
    def init_memory(self, z, hyperparams, batch, key):
        return Named(z.w, (), jnp.zeros(()))


def test_a_memory_that_takes_the_name_of_a_metric_is_refused():
    with pytest.raises(ValueError, match="field param_norm, which is the name of a metric"):
        Clash(SGD).init(jnp.zeros(3), START)


def test_own_algorithms_use_the_extension_interface_alone():
    """So do the library's own: tests/test_rooms.py."""
    page = (ROOT / "docs" / "own_algorithm.md").read_text()
    inside = r"from gradhpo\.(\w+)[\w.]* import|import gradhpo\.(\w+)"
    used = {a or b for a, b in re.findall(inside, page)}
    assert used == {"extend"}
    assert all(hasattr(extend, name) for name in extend.__all__)


class Flawed(F2SA):
    """An own algorithm with one flaw at a time."""

    flaw: str = eqx.field(static=True, default="")

    @property
    def sees(self) -> Any:
        return "last_update" if self.flaw == "sees" else "updates"

    @property
    def num_inner_steps(self) -> Any:
        return 0 if self.flaw == "count" else self.inner_steps

    def init_memory(self, z, hyperparams, batch, key) -> Any:
        made = super().init_memory(z, hyperparams, batch, key)
        if self.flaw == "dict":
            return {"y": made.y}
        return PenaltyMemory(0.0, ()) if self.flaw == "number" else made

    def restart_memory(self, memory, z, hyperparams) -> Any:
        return None if self.flaw == "restart" else memory

    def estimate(self, problem, memory) -> Any:
        found = super().estimate(problem, memory)
        parts = [found.z, found.hypergradient, found.train_loss, found.val_loss, found.memory]
        if self.flaw == "tuple":
            return tuple(parts)
        changed = {
            "no memory": (4, None),
            "other memory": (4, PenaltyMemory(found.memory.y[:2], found.memory.opt_state)),
            "other z": (0, found.z._replace(w=found.z.w[:2])),
            "shape": (1, found.hypergradient[None]),
            "integers": (1, found.hypergradient.astype(int)),
            "losses": (2, jnp.ones(3)),
        }
        place, part = changed.get(self.flaw, (0, found.z))
        parts[place] = part
        return Estimate(*parts)

    def remarks(self, before, metrics, copies=1):
        return {}["missing"] if self.flaw == "remarks" else ""


FLAWS = {
    "sees": "Flawed.sees is 'last_update'; it must be one of 'validation'",
    "count": "Flawed.num_inner_steps must be at least 1",
    "dict": "Flawed.init_memory returned a dict: return a gradhpo.extend.Memory",
    "number": r"Flawed.init_memory returned 0\.0 at \.y, which is not an array",
    "tuple": r"Flawed.estimate returned a tuple: return Estimate\(z, hypergradient",
    "no memory": "the memory that Flawed.estimate returned does not fit",
    "other memory": "the memory that Flawed.estimate returned does not fit",
    "other z": "the z that Flawed.estimate returned does not fit",
    "shape": "the hypergradient that Flawed.estimate returned does not fit",
    "integers": "the hypergradient that Flawed.estimate returned does not fit",
    "losses": "Flawed.estimate returned train_loss=.* which is not a scalar",
    "restart": "the memory that Flawed.restart_memory returned does not fit",
}


def use(optimizer_of):
    optimizer = optimizer_of()
    state = optimizer.restart(optimizer.init(jnp.zeros(3), START))
    return optimizer.step(state, BATCH, BATCH, LOSSES.train_loss, LOSSES.val_loss)


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_of_an_own_algorithm_is_named(flaw):
    with pytest.raises((TypeError, ValueError), match=FLAWS[flaw]):
        use(lambda: Flawed(SGD, SGD, flaw=flaw))
    assert use(lambda: Flawed(SGD, SGD)).step == 1


class Counted(Algorithm):
    """It names the field that counts its steps, and nothing else."""

    inner_optimizer: gradhpo.InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    my_steps: int = eqx.field(static=True, default=2)
    update_fn: gradhpo.UpdateFn | None = None

    steps_field = "my_steps"

    def estimate(self, problem, memory):
        return extend.unrolled(problem, 0, self.my_steps)


class Uncounted(Counted):
    steps_field = None


class Misspelt(Counted):
    steps_field = "my_step"


class CountedBySelf(Counted):
    @property
    def num_inner_steps(self):
        return self.my_steps + 1


def test_a_field_counts_the_inner_steps():
    optimizer = Counted(SGD, my_steps=3)
    assert optimizer.num_inner_steps == 3
    longer = optimizer.with_num_steps(5)
    assert (longer.my_steps, longer.num_inner_steps, longer.inner_optimizer) == (5, 5, SGD)
    with pytest.raises(ValueError, match="my_steps must be at least 1"):
        Counted(SGD, my_steps=0)
    assert CountedBySelf(SGD).num_inner_steps == 3  # what the class itself says comes first
    with pytest.raises(TypeError, match=r"Uncounted must say how many .*steps_field.*num_inner"):
        Uncounted(SGD)
    with pytest.raises(TypeError, match=r"must name one of its fields.* my_steps.* got 'my_step'"):
        Misspelt(SGD)
    assert gradhpo.FOOptimizer(SGD).with_num_steps(5) is None


@pytest.mark.parametrize(
    ("sees", "passes_loss", "derivatives"),
    [
        ("validation", True, "first derivatives of both losses"),
        ("optimum", False, "second derivatives of the loss"),
        ("updates", False, "or derivatives of the inner update"),
        ("everything", True, "first derivatives of both losses"),
    ],
)
def test_what_a_method_sees_says_what_it_differentiates(sees, passes_loss, derivatives):
    optimizer = type("Seeing", (Counted,), {"sees": property(lambda self: sees)})(SGD)
    assert optimizer.passes_loss is passes_loss
    assert derivatives in optimizer.derivatives


def test_a_run_is_not_lost_to_its_remarks():
    optimizer = Flawed(SGD, SGD, flaw="remarks")
    state = optimizer.init(jnp.zeros(3), START)
    with pytest.warns(RuntimeWarning, match="remarks of Flawed failed: KeyError: 'missing'"):
        state, history = gradhpo.run(
            optimizer, state, LOSSES, BATCH, BATCH, num_steps=3, progress=False
        )
    assert state.step == 3
    assert len(history["val_loss"]) == 3


@pytest.mark.filterwarnings("ignore:.*is exactly 0", "ignore:.*Training has not converged")
def test_parameters_in_a_memory_are_not_its_entries():
    """A model's own fields must not be mistaken for metrics, under any name."""

    class Model(eqx.Module):
        theta: Array
        val_loss: Array

    optimizer = gradhpo.ImplicitOptimizer(SGD, SGD)
    state = optimizer.init(Model(jnp.zeros(()), jnp.ones(())), jnp.zeros(()))
    loss = lambda m, h, batch: (m.theta - h) ** 2 + m.val_loss**2
    losses = gradhpo.LossFunctions(loss, loss)
    _, history = gradhpo.run(optimizer, state, losses, None, None, num_steps=2, progress=False)
    assert "theta" not in history
    np.testing.assert_allclose(history["val_loss"][0], 0.36, rtol=1e-12)  # the loss itself
