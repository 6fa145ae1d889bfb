"""One row of the calibration: the score from retrainings, and the check's verdict."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from benchmarks.trust.problems import Config, Problem, problem_of
from gradhpo.diagnostics.score import Scores
from gradhpo.diagnostics.trust import Trust, verdict_of


def row_of(config: Config, retrainings: int) -> dict[str, Any]:
    """As stored in JSON: numbers and faults, which give the verdict for any thresholds."""
    problem, started = problem_of(config), time.perf_counter()
    score, (low, high), per_query = (scored_live if config.live else scored)(
        config, problem, retrainings
    )
    retrained, started = time.perf_counter() - started, time.perf_counter()
    stack = jax.jit(lambda: jax.vmap(problem.batches(0))(jnp.arange(config.steps)))()
    report = gradhpo.check_hypergradient(
        problem.optimizer, problem.state, gradhpo.BatchStack(stack), problem.queries,
        problem.losses, perturb=problem.perturb,
        replayed=config.replayed,
    )  # fmt: skip
    measured = report.trusting
    return dataclasses.asdict(config) | {
        "retrainings": retrainings,
        # Without a hypergradient there is no prediction.
        "score": 0.0 if np.isnan(score) else score,
        "interval": [low, high],
        "per_query": per_query.tolist(),
        "trust": report.trust,
        "faults": [text for text in report.reasons if text not in measured.doubts],
        "unmeasured": list(measured.unmeasured),
        "agreement": measured.agreement,
        "followed": measured.followed,
        "scale": measured.scale,
        "signal_to_noise": measured.signal_to_noise,
        "training_loss": [measured.first_loss, measured.last_loss],
        "growth": measured.growth,
        "metasmoothness": report.metasmoothness,
        "width": min([x.width for x in report.finite_differences.values()], default=0.0),
        "seconds": [retrained, time.perf_counter() - started],
    }


def judged(row: dict[str, Any], config: Config) -> tuple[str, tuple[str, ...]]:
    """Verdict and reasons, by the library's thresholds.

    Rows may lack measurements that were added to the verdict later; these cast no doubt.
    """
    first, last = row["training_loss"]
    followed, scale = (row.get(name, float("nan")) for name in ("followed", "scale"))
    trust = Trust(
        row["agreement"], (), followed, scale, row["signal_to_noise"], first, last, row["growth"],
        config.replayed, tuple(row["unmeasured"]), {},
    )  # fmt: skip
    reasons = (*row["faults"], *trust.doubts)
    return verdict_of(row["trust"], reasons), reasons


def scored(config: Config, problem: Problem, retrainings: int) -> tuple:
    """Score, interval, and every query's score, from retrainings that repeat the batches."""
    report = gradhpo.retraining_score(
        problem.optimizer, problem.state, problem.batches(0), problem.queries, problem.losses,
        num_steps=config.steps, perturb=problem.perturb, num_retrainings=retrainings,
        key=jax.random.key(config.seed + 100), progress=False,
    )  # fmt: skip
    [name] = report.score
    return report.score[name], report.interval[name], report.per_query[name]


def scored_live(config: Config, problem: Problem, retrainings: int) -> tuple:
    """The same with other batches and keys in retraining, unlike `retraining_score`."""
    weights, w0 = problem.state.hyperparams, problem.state.params
    inner, losses = config.optimizer(), problem.losses
    keys = jax.random.split(jax.random.key(config.seed + 100), retrainings)
    moved = jnp.stack([weights, *(problem.perturb(key, weights) for key in keys)])

    def train(weights, seed):
        batch = problem.batches(seed)

        def step(carry, t):
            w, s = carry
            updates, s = inner.update(jax.grad(losses.train_loss)(w, weights, batch(t)), s, w)
            return (optax.apply_updates(w, updates), s), None

        (w, _), _ = jax.lax.scan(step, (w0, inner.init(w0)), jnp.arange(config.steps))
        return jax.vmap(lambda query: losses.val_loss(w, weights, query))(problem.queries)

    found = np.asarray(jax.jit(jax.vmap(train))(moved, jnp.arange(retrainings + 1)), np.float64)
    replayed = gradhpo.replay(
        problem.optimizer, problem.state, problem.batches(0), problem.queries, losses,
        num_steps=config.steps, queries=True, progress=False,
    )  # fmt: skip
    flat = lambda x: np.asarray(x, np.float64)
    predicted = flat(moved[1:] - weights) @ flat(replayed.hypergradient).T
    scores = Scores(found[1:] - found[0], {"exact": predicted}, np.random.default_rng(0))
    return scores.score["exact"], scores.interval["exact"], scores.per_query["exact"]
