"""Clean a data set when the loss is a fused kernel without second derivatives.

The data are scikit-learn's handwritten digits; 40 % of 400 training labels are wrong, 100 others
are known to be right. Every training example has a weight sigmoid(a) in the training loss. The last
layer and its cross-entropy are one function with a hand-written derivative, like the fused kernels
for large vocabularies: classes come in blocks, so the full logits never exist, and the kernel of
the derivative cannot be differentiated again. F2SA and BOME need only first derivatives and tune
the weights with it; the others (T1-T2 with Adam, which is SAMA, exact, implicit) get the same loss,
written to be differentiable twice. Then the network is retrained from scratch with the weights that
each method found.

    python examples/penalty_methods.py            # 5 seeds, a few minutes on 2 cores
    python examples/penalty_methods.py --help
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import gradhpo


TRAIN, VAL, NOISE = 400, 100, 0.4
CLASSES, BLOCK = 10, 5
INNER_STEPS, OUTER_STEPS, TRAINING = 10, 100, 500
CERTAIN = 10.0  # the logit of a weight that is 1, or 0 with the other sign

# -- a fused last layer ----------------------------------------------------------------------------


def of_block(features: Array, layer: Array, block: Array) -> Array:
    return features @ jax.lax.dynamic_slice_in_dim(layer, block * BLOCK, BLOCK, axis=1)


@jax.custom_vjp
def last_layer_gradients(
    features: Array, layer: Array, labels: Array, normaliser: Array, weights: Array
) -> tuple[Array, Array]:
    """The kernel of both derivatives, by features and layer, in one pass over the blocks."""

    def body(of_features, block):
        columns = jax.lax.dynamic_slice_in_dim(layer, block * BLOCK, BLOCK, axis=1)
        probabilities = jnp.exp(features @ columns - normaliser[:, None])
        wanted = labels[:, None] == block * BLOCK + jnp.arange(BLOCK)
        of_logits = weights[:, None] * (probabilities - wanted)
        return of_features + of_logits @ columns.T, features.T @ of_logits

    blocks = jnp.arange(CLASSES // BLOCK)
    of_features, of_columns = jax.lax.scan(body, jnp.zeros_like(features), blocks)
    return of_features, jnp.concatenate(list(of_columns), axis=1)


def no_rule(*_: Any) -> Any:
    raise NotImplementedError("the kernel of the derivative has no derivative")


# With this rule, JAX refuses forward mode through it as well.
last_layer_gradients.defvjp(no_rule, no_rule)


@jax.custom_vjp
def fused_cross_entropy(features: Array, layer: Array, labels: Array) -> Float[Array, " batch"]:
    """The cross-entropy of `features @ layer`, with a running sum over blocks of classes."""
    return forward(features, layer, labels)[0]


def forward(features: Array, layer: Array, labels: Array) -> tuple[Array, Any]:
    def body(carry, block):
        total, chosen = carry
        logits = of_block(features, layer, block)
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1))
        wanted = labels[:, None] == block * BLOCK + jnp.arange(BLOCK)
        return (total, chosen + jnp.sum(wanted * logits, axis=1)), None

    start = jnp.full(len(labels), -jnp.inf), jnp.zeros(len(labels))
    (normaliser, chosen), _ = jax.lax.scan(body, start, jnp.arange(CLASSES // BLOCK))
    return normaliser - chosen, (features, layer, labels, normaliser)


def backward(kept: Any, weights: Array) -> tuple[Array, Array, None]:
    return *last_layer_gradients(*kept, weights), None


fused_cross_entropy.defvjp(forward, backward)


def plain_cross_entropy(features: Array, layer: Array, labels: Array) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(features @ layer, labels)


# -- the problem -----------------------------------------------------------------------------------


class Model(eqx.Module):
    hidden: eqx.nn.Linear
    layer: Float[Array, "features classes"]
    example_weights: Float[Array, " examples"]

    def features(self, x: Array) -> Array:
        hidden = jnp.tanh(jax.vmap(self.hidden)(x))
        return jnp.concatenate([hidden, jnp.ones((len(x), 1))], axis=1)  # for the bias


def new_model(seed: int) -> Model:
    keys = jax.random.split(jax.random.key(seed))
    hidden = eqx.nn.Linear(64, 32, key=keys[0])
    return Model(hidden, 0.1 * jax.random.normal(keys[1], (33, CLASSES)), jnp.zeros(TRAIN))


def losses_with(cross_entropy: Callable) -> gradhpo.LossFunctions:
    def per_example(model, x, y):
        return cross_entropy(model.features(x), model.layer, y)

    def weighted(model, batch):
        decay = 1e-3 * gradhpo.tree_l2_norm((model.hidden, model.layer)) ** 2
        return jnp.mean(jax.nn.sigmoid(model.example_weights) * per_example(model, *batch)) + decay

    def plain(model, batch):
        return jnp.mean(per_example(model, *batch))

    return gradhpo.LossFunctions(gradhpo.model_loss(weighted), gradhpo.model_loss(plain))


FUSED, TWICE = losses_with(fused_cross_entropy), losses_with(plain_cross_entropy)
ALONE = gradhpo.LossFunctions(TWICE.val_loss, TWICE.val_loss)


class Data(NamedTuple):
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]
    wrong: np.ndarray


def load_data(seed: int) -> Data:
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    wrong = np.zeros(TRAIN, bool)
    wrong[random.permutation(TRAIN)[: round(NOISE * TRAIN)]] = True
    others = random.integers(1, CLASSES, TRAIN, dtype=np.int32)
    given = np.where(wrong, (y[:TRAIN] + others) % CLASSES, y[:TRAIN])
    end = TRAIN + VAL
    pairs = (x[:TRAIN], given), (x[TRAIN:end], y[TRAIN:end]), (x[end:], y[end:])
    train, val, test = jax.tree.map(jnp.asarray, pairs)
    return Data(train, val, test, wrong)


# -- the methods -----------------------------------------------------------------------------------

INNER = optax.adam(0.01, eps_root=1e-8)
OUTER = optax.adam(0.1)
common = {"inner_optimizer": INNER, "outer_optimizer": OUTER, "inner_steps": INNER_STEPS}
CG = lx.CG(rtol=1e-3, atol=0.0, max_steps=20)
METHODS: dict[str, tuple[Any, gradhpo.LossFunctions]] = {
    "F2SA, penalty 1 to 100": (
        gradhpo.PenaltyOptimizer(
            **common, penalty=optax.linear_schedule(1.0, 100.0, OUTER_STEPS)
        ),
        FUSED,
    ),
    "F2SA, penalty 10": (gradhpo.PenaltyOptimizer(**common, penalty=10.0), FUSED),
    "BOME": (gradhpo.BOMEOptimizer(**common), FUSED),
    "T1-T2 with Adam (SAMA), fused": (gradhpo.T1T2Optimizer(**common), FUSED),
    "T1-T2 with Adam (SAMA)": (gradhpo.T1T2Optimizer(**common), TWICE),
    "exact over 10 steps": (gradhpo.UnrolledOptimizer(INNER, OUTER, INNER_STEPS), TWICE),
    "implicit, CG": (
        gradhpo.ImplicitOptimizer(**common, linear_solver=CG, damping=1e-2), TWICE
    ),
}  # fmt: skip
PLAIN = gradhpo.FixedOptimizer(INNER, inner_steps=INNER_STEPS)


class Result(NamedTuple):
    error: float  # test error in percent, retrained
    auc: float
    milliseconds: float  # of an outer step
    weights: np.ndarray | None = None


@eqx.filter_jit
def test_error(model: Model, data: tuple[Array, Array]) -> Array:
    x, y = data
    return 100 * jnp.mean(jnp.argmax(model.features(x) @ model.layer, axis=1) != y)


def timed_run(optimizer: Any, losses: gradhpo.LossFunctions, data: Data, seed: int, steps: int):
    """The final state, and milliseconds per step, without the first chunk."""
    state = optimizer.init(*gradhpo.partition(new_model(seed), lambda m: m.example_weights))
    clock, chunk = [], max(1, steps // 5)
    state, _ = gradhpo.run(
        optimizer, state, losses, data.train, data.val,
        num_steps=steps, chunk_size=chunk, progress=False,
        callbacks=[lambda state, metrics: clock.append(time.perf_counter())],
    )  # fmt: skip
    return state, 1e3 * float(np.min(np.diff(clock))) / chunk


def trained(
    logits: Array, data: Data, seed: int, steps: int, *, alone: bool = False
) -> tuple[float, float]:
    """The test error of a fresh network with these weights, and milliseconds per ten steps.

    `alone`: on the validation set, without weights.
    """
    model = eqx.tree_at(lambda m: m.example_weights, new_model(seed), logits)
    state = PLAIN.init(*gradhpo.partition(model, lambda m: m.example_weights))
    clock, chunk = [], max(1, steps // 5)
    state, _ = gradhpo.run(
        PLAIN, state, ALONE if alone else FUSED, data.val if alone else data.train, data.val,
        num_steps=steps, chunk_size=chunk, progress=False,
        callbacks=[lambda state, metrics: clock.append(time.perf_counter())],
    )  # fmt: skip
    return float(test_error(state.model, data.test)), 1e3 * float(np.min(np.diff(clock))) / chunk


def experiment(seed: int, steps: int) -> dict[str, Any]:
    data, again = load_data(seed), max(5, steps * TRAINING // (INNER_STEPS * OUTER_STEPS))
    given = {
        "uniform weights": jnp.zeros(TRAIN),
        "weights known": jnp.where(data.wrong, -CERTAIN, CERTAIN),
    }
    rows: dict[str, Any] = {}
    for name, logits in given.items():
        error, milliseconds = trained(logits, data, seed, again)
        rows[name] = Result(error, np.nan, milliseconds)
    error, milliseconds = trained(jnp.zeros(TRAIN), data, seed, again, alone=True)
    rows["validation set alone"] = Result(error, np.nan, milliseconds)
    for name, (optimizer, losses) in METHODS.items():
        try:
            state, milliseconds = timed_run(optimizer, losses, data, seed, steps)
        except (TypeError, NotImplementedError) as error:
            rows[name] = "needs a second derivative"
            print(f"{name}: {str(error).splitlines()[0]}"[:160])
            continue
        logits = state.model.example_weights
        weights = np.asarray(jax.nn.sigmoid(logits))
        error, _ = trained(logits, data, seed, again)
        rows[name] = Result(error, roc_auc_score(~data.wrong, weights), milliseconds, weights)
    return rows


def median(values: list[float]) -> tuple[float, float, float]:
    """The median and the ends of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| | test error, % | AUC | an outer step, ms |", "| --- | --- | --- | --- |"]
    for name in runs[0]:
        found = [run[name] for run in runs]
        if isinstance(found[0], str):
            lines.append(f"| {name} | {found[0]} | | |")
            continue
        error, low, high = median([x.error for x in found])
        auc, *ends = median([x.auc for x in found])
        shown = "" if np.isnan(auc) else f"{auc:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
        milliseconds = min(x.milliseconds for x in found)  # the machine may be busy
        lines.append(
            f"| {name} | {error:.1f} ({low:.1f} to {high:.1f}) | {shown} | {milliseconds:.1f} |"
        )
    return "\n".join(lines)


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """The error of each seed, and F2SA's weights for right and wrong labels."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name, row in runs[0].items() if not isinstance(row, str)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, name in enumerate(names):
        errors = [run[name].error for run in runs]
        left.plot(errors, [i] * len(errors), "o", alpha=0.6)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("test error, %")
    wrong = load_data(len(runs) - 1).wrong
    weights = next(row.weights for name, row in runs[-1].items() if name.startswith("F2SA"))
    bins = np.linspace(0, 1, 31)
    right.hist(weights[~wrong], bins, alpha=0.7, label="right label")
    right.hist(weights[wrong], bins, alpha=0.7, label="wrong label")
    right.set(xlabel="weight of the example, by F2SA", ylabel="training examples")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default 5)")
    parser.add_argument("--steps", type=int, default=OUTER_STEPS, help="outer steps (default 100)")
    parser.add_argument("--quick", action="store_true", help="1 seed, 10 outer steps")
    parser.add_argument("--output", type=Path, default=Path("out/penalty_methods.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 10:
        parser.error("--seeds must be at least 1 and --steps at least 10")
    if options.quick:
        options.seeds, options.steps = 1, 10

    started, runs = time.perf_counter(), []
    for seed in range(options.seeds):
        runs.append(experiment(seed, options.steps))
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print(
        f"\n{TRAIN} digits, {NOISE:.0%} of the labels wrong, {options.steps} outer steps of "
        f"{INNER_STEPS}; then retrained with the tuned weights: median and 95 % interval over "
        f"{options.seeds} seed(s)\n\n{table(runs)}"
    )
    picture(runs, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
