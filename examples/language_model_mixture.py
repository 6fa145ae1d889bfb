"""The data mixture of a small language model, tuned by hypergradients while it trains.

The target is scikit-learn's docstrings, with only some pages to train on. Four other texts are
plentiful: SciPy's docstrings, the source of Python's standard library, licences, and tables of
numbers. All of it comes with Python and with packages that this example installs. The model is a
GPT of four layers, trained with dropout, clipping, and AdamW with warm-up, cosine decay and no
weight decay on vectors.

The hyperparameters are the share of each text in the training loss, a label smoothing for each
text, the weight decay, and a scale of the learning rate. They follow the hypergradient of the loss
on validation pages of the target; the table shows the loss on test pages.

    python examples/language_model_mixture.py            # 5 seeds, about five minutes on 2 cores
    python examples/language_model_mixture.py --quick    # 1 seed, 10 steps
"""

import argparse
import ast
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy
import sklearn
from jaxtyping import Array, ArrayLike, Float, Int

import gradhpo


DOMAINS = "target", "SciPy", "source", "licences", "tables"
TARGET = 0
TARGET_SIZE, SIZE = 60_000, 300_000  # at most, characters of the target and of each other text
LENGTH, ROWS = 64, 20  # tokens predicted per window, windows per batch
WORDS = 384
SYMBOLS = 128 + WORDS  # ASCII, and the most frequent words
LAYERS, WIDTH, HEADS = 4, 48, 4
DROPOUT = 0.1


# Text


def texts(size: int = SIZE) -> list[str]:
    """The text of each domain; `size` limits all but the target."""
    library = Path(sysconfig.get_paths()["stdlib"])
    tables = Path(sklearn.__file__).parent / "datasets" / "data"
    parts = (
        docstrings(sklearn),
        docstrings(scipy),
        (file.read_text("utf-8") for file in sorted(library.glob("*.py"))),
        licences(),
        (file.read_text("utf-8") for file in sorted(tables.glob("*.csv"))),
    )
    sizes = TARGET_SIZE, size, size, size, size
    return [joined(*given) for given in zip(parts, sizes, strict=True)]


def docstrings(package: ModuleType) -> Iterator[str]:
    """File by file, in a fixed random order."""
    files = sorted(file for path in package.__path__ for file in Path(path).rglob("*.py"))
    for i in np.random.default_rng(0).permutation(len(files)):
        for node in ast.walk(ast.parse(files[i].read_text("utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def licences() -> Iterator[str]:
    """Without duplicates: many packages share a licence."""
    found = set()
    for package in sorted(distributions(), key=lambda x: str(x.name)):
        for file in package.files or ():
            path = Path(str(package.locate_file(file)))
            if path.name.upper().startswith(("LICENSE", "LICENCE")) and path.is_file():
                text = path.read_text("utf-8", errors="ignore")
                if text not in found:
                    found.add(text)
                    yield text


def joined(parts: Iterable[str], size: int) -> str:
    """Enough parts for `size` characters, or all of them; ASCII."""
    text = ""
    for part in parts:
        text += part.encode("ascii", "ignore").decode() + "\n\n"
        if len(text) >= size:
            break
    return text[:size]


WORD = re.compile(r" ?[A-Za-z]{2,}|.", re.DOTALL)


def tokenized(found: list[str]) -> list[np.ndarray]:
    """Frequent words are one token, others are spelled out: nothing is lost."""
    split = [WORD.findall(text) for text in found]
    count = Counter(word for words in split for word in words if len(word) > 1)
    frequent = [word for word, _ in count.most_common(WORDS)]
    number = {symbol: i for i, symbol in enumerate([*map(chr, range(128)), *frequent])}
    pieces = lambda word: (word,) if word in number else word
    return [
        np.array([number[piece] for word in words for piece in pieces(word)], np.int32)
        for words in split
    ]


class Data(eqx.Module):
    """The training texts of all domains, concatenated, and held-out pages of the target."""

    text: Int[Array, " tokens"]
    starts: Int[Array, " domains"]
    lengths: Int[Array, " domains"]
    val: Int[Array, "val window"]
    test: Int[Array, "test window"]


def load_data(tokens: list[np.ndarray], seed: int, val_too: bool = False) -> Data:
    """Pages of the target, of eight windows: 30 % to train on, 20 % to validate, 50 % to test.

    With `val_too`, the validation pages are trained on as well.
    """
    size = 8 * (LENGTH + 1)
    pages = tokens[TARGET]
    pages = pages[: len(pages) // size * size].reshape(-1, size)
    pages = np.random.default_rng(seed).permutation(pages)
    train, end = round(0.3 * len(pages)), round(0.5 * len(pages))
    of_domains = [pages[:end].reshape(-1), *tokens[TARGET + 1 :]]
    lengths = np.array([len(x) for x in of_domains])
    starts = np.cumsum(lengths) - lengths
    if not val_too:
        lengths[TARGET] = train * size
    windows = lambda pages: jnp.asarray(pages.reshape(-1, LENGTH + 1))
    return Data(
        jnp.asarray(np.concatenate(of_domains)),
        jnp.asarray(starts),
        jnp.asarray(lengths),
        windows(pages[train:end]),
        windows(pages[end:]),
    )


class Batch(NamedTuple):
    windows: Int[Array, "rows window"]
    domain: Int[Array, " rows"]
    key: Array  # of the dropout


class Windows(eqx.Module):
    """Windows at random positions in the training texts; `domain` says which texts."""

    data: Data
    domain: Int[Array, " rows"]
    key: Array

    def __call__(self, index: Array) -> Batch:
        where, dropout = jax.random.split(jax.random.fold_in(self.key, index))
        last = self.data.lengths[self.domain] - LENGTH
        offset = jax.random.randint(where, self.domain.shape, 0, last)
        first = self.data.starts[self.domain] + offset
        windows = self.data.text[first[:, None] + jnp.arange(LENGTH + 1)]
        return Batch(windows, self.domain, dropout)


def rows_of(shares: ArrayLike) -> np.ndarray:
    """The domain of each of the `ROWS` rows of a batch, as close to these shares as possible."""
    wanted = ROWS * np.asarray(shares)
    rows = np.floor(wanted).astype(int)
    rows[np.argsort(rows - wanted)[: ROWS - rows.sum()]] += 1
    return np.repeat(np.arange(len(DOMAINS)), rows)


# Model


class Tuned(eqx.Module):
    """The hyperparameters, unconstrained: functions below bound each one."""

    shares: Float[Array, " domains"]
    smoothing: Float[Array, " domains"]
    log_decay: Float[Array, ""]
    log_rate: Float[Array, ""]

    @classmethod
    def start(cls) -> "Tuned":
        """Equal shares, smoothing 0.01, decay 0.01, the learning rate unscaled."""
        size = len(DOMAINS)
        smoothing = jnp.full(size, jnp.log(0.02 / 0.98))
        return cls(jnp.zeros(size), smoothing, jnp.log(0.01), jnp.array(0.0))


def shares_of(tuned: Tuned) -> Float[Array, " domains"]:
    return jax.nn.softmax(tuned.shares)


def smoothing_of(tuned: Tuned) -> Float[Array, " domains"]:
    return 0.5 * jax.nn.sigmoid(tuned.smoothing)


class Layer(eqx.Module):
    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp_norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key: Array):
        keys = jax.random.split(key, 3)
        self.attention_norm = self.mlp_norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])
        self.dropout = eqx.nn.Dropout(DROPOUT)

    def __call__(self, x: Array, key: Array | None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        normed = jax.vmap(self.attention_norm)(x)
        seen = jnp.tril(jnp.ones((len(x), len(x)), bool))
        attended = self.attention(normed, normed, normed, mask=seen)
        x = x + self.dropout(attended, key=keys[0], inference=key is None)
        mlp = lambda x: self.down(jax.nn.relu(self.up(self.mlp_norm(x))))
        return x + self.dropout(jax.vmap(mlp)(x), key=keys[1], inference=key is None)


class GPT(eqx.Module):
    """A decoder with stacked, scanned layers, and the hyperparameters."""

    symbols: Float[Array, "symbols width"]
    places: Float[Array, "length width"]
    layers: Layer
    norm: eqx.nn.LayerNorm
    tuned: Tuned

    def __init__(self, key: Array):
        keys = jax.random.split(key, 3)
        self.symbols = 0.02 * jax.random.normal(keys[0], (SYMBOLS, WIDTH))
        self.places = 0.02 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.layers = eqx.filter_vmap(Layer)(jax.random.split(keys[2], LAYERS))
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.tuned = Tuned.start()

    def __call__(self, read: Int[Array, " length"], key: Array | None) -> Array:
        """Logits of the next tokens; without a key there is no dropout."""
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def layer(x, given):
            arrays, key = given
            return eqx.combine(arrays, static)(x, key), None

        keys = None if key is None else jax.random.split(key, LAYERS)
        x, _ = jax.lax.scan(layer, self.symbols[read] + self.places, (arrays, keys))
        return jax.vmap(self.norm)(x) @ self.symbols.T


def halved(model: GPT) -> GPT:
    """The same weights in bfloat16, as used in the forward pass."""
    half = lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x
    return eqx.tree_at(lambda m: m.tuned, jax.tree.map(half, model), model.tuned)


def losses(bfloat16: bool) -> gradhpo.LossFunctions:
    """Both losses, in nats per token; the weights stay in float32."""
    cast = halved if bfloat16 else lambda model: model

    @gradhpo.model_loss
    def train_loss(model: GPT, batch: Batch) -> Array:
        """With smoothed labels; rows are weighted in proportion to their domain's share."""
        keys = jax.random.split(batch.key, ROWS)
        logits = jax.vmap(cast(model))(batch.windows[:, :-1], keys).astype(jnp.float32)
        smoothing = smoothing_of(model.tuned)[batch.domain][:, None, None]
        labels = optax.smooth_labels(jax.nn.one_hot(batch.windows[:, 1:], SYMBOLS), smoothing)
        of_rows = optax.softmax_cross_entropy(logits, labels).mean(axis=1)
        weights = len(DOMAINS) * shares_of(model.tuned)
        return jnp.mean(weights[batch.domain] * of_rows)

    @gradhpo.model_loss
    def val_loss(model: GPT, windows: Array) -> Array:
        """Without dropout or smoothing."""
        cast_model = cast(model)
        logits = jax.vmap(lambda read: cast_model(read, None))(windows[:, :-1])
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    return gradhpo.LossFunctions(train_loss, val_loss)


# Training


def adamw(steps: int) -> Callable[[GPT], optax.GradientTransformation]:
    """AdamW with clipping, warm-up and cosine decay; no weight decay on vectors."""

    def matrices(params: GPT) -> GPT:
        found = jax.tree.map(lambda x: x.ndim > 1, params)
        of_layers = jax.tree.map(lambda x: x.ndim > 2, params.layers)  # these are stacked
        return eqx.tree_at(lambda m: m.layers, found, of_layers)

    def of(hyperparams: GPT) -> optax.GradientTransformation:
        tuned = hyperparams.tuned
        schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.99, eps_root=1e-8),
            optax.add_decayed_weights(jnp.exp(tuned.log_decay), matrices),
            optax.scale_by_learning_rate(schedule),
            optax.scale(jnp.exp(tuned.log_rate)),
        )

    return of


class Result(NamedTuple):
    val_loss: float
    test_loss: float
    seconds: float
    shares: np.ndarray  # [records, domains]
    tuned: Tuned


class Trainer(NamedTuple):
    """The parts shared by all training runs; created once, so that each program compiles once."""

    losses: gradhpo.LossFunctions
    fixed: gradhpo.FixedOptimizer
    tuning: gradhpo.BilevelOptimizer
    steps: int

    @classmethod
    def of(cls, steps: int, bfloat16: bool) -> "Trainer":
        inner, outer = adamw(steps), optax.adam(0.05)
        tuning = gradhpo.T1T2Optimizer(inner, outer, inner_steps=5)
        if bfloat16:  # rounding would swallow the perturbations of T1-T2
            tuning = gradhpo.GreedyOptimizer(inner, outer, unroll_steps=5, gamma=0.0)
        return cls(losses(bfloat16), gradhpo.FixedOptimizer(inner, inner_steps=5), tuning, steps)

    def train(
        self,
        optimizer: gradhpo.BilevelOptimizer,
        data: Data,
        shares: ArrayLike,
        seed: int,
        label: str,
        start: Tuned | None = None,
    ) -> Result:
        """Trains a new network on batches with these shares of rows."""
        of_model, *of_data = jax.random.split(jax.random.key(seed), 3)
        model = GPT(of_model)
        model = eqx.tree_at(lambda m: m.tuned, model, start or model.tuned)
        params, hyperparams = gradhpo.partition(model, lambda m: m.tuned)
        started, recorded = time.perf_counter(), [hyperparams]
        num_steps = self.steps // optimizer.num_inner_steps
        state, _ = gradhpo.run(
            optimizer,
            optimizer.init(params, hyperparams),
            self.losses,
            Windows(data, jnp.asarray(rows_of(shares)), of_data[0]),
            gradhpo.ArrayData(data.val, ROWS, of_data[1]),
            num_steps=num_steps,
            chunk_size=max(1, num_steps // 20),
            callbacks=[lambda state, metrics: recorded.append(state.hyperparams)],
            progress=label,
        )
        seconds = time.perf_counter() - started
        loss = lambda windows: float(
            evaluated(self.losses.val_loss, state.params, state.hyperparams, windows)
        )
        return Result(
            loss(data.val),
            loss(data.test),
            seconds,
            np.stack([shares_of(x.tuned) for x in recorded]),
            state.hyperparams.tuned,
        )


@eqx.filter_jit
def evaluated(loss, params, hyperparams, windows: Array) -> Array:
    return loss(params, hyperparams, windows)


UNIFORM = np.full(len(DOMAINS), 1 / len(DOMAINS))
ALONE = np.eye(len(DOMAINS))[TARGET]
# Plausible guesses: the target and its relative, and more of the target in two steps.
GRID = (0.5, 0.5, 0, 0, 0), (0.4, 0.3, 0.1, 0.1, 0.1), (0.6, 0.1, 0.1, 0.1, 0.1)
BEST = f"best of a grid of {len(GRID)}"
TUNED = "tuned while training"
OTHERS = "trained again: all but the shares as tuned"
AGAIN = "trained again: all as tuned"


def all_rows(
    trainer: Trainer, tokens: list[np.ndarray], seed: int, quick: bool
) -> dict[str, Result]:
    """Every row of the table for one seed, or only the two main ones."""
    data = load_data(tokens, seed)

    def fixed(name: str, shares: ArrayLike, data: Data = data, start: Tuned | None = None):
        return trainer.train(trainer.fixed, data, shares, seed, f"seed {seed}, {name}", start)

    rows = {"uniform": fixed("uniform", UNIFORM)}
    if not quick:
        name = "target alone, validation pages too"
        rows[name] = fixed(name, ALONE, load_data(tokens, seed, val_too=True))
        tried = [fixed(f"grid {shares}", shares) for shares in GRID]
        best = min(tried, key=lambda result: result.val_loss)
        rows[BEST] = best._replace(seconds=sum(x.seconds for x in tried))
    found = trainer.train(trainer.tuning, data, UNIFORM, seed, f"seed {seed}, {TUNED}")
    rows[TUNED] = found
    if not quick:
        # Shares of rows replace weights in the loss.
        start = eqx.tree_at(lambda x: x.shares, found.tuned, jnp.zeros(len(DOMAINS)))
        for name, shares in {OTHERS: UNIFORM, AGAIN: found.shares[-1]}.items():
            again = fixed(name, shares, start=start)
            rows[name] = again._replace(seconds=found.seconds + again.seconds)
    return rows


def table(runs: list[dict[str, Result]]) -> str:
    """Means over the seeds, with standard deviations of the loss."""
    lines = [
        "| | test loss, nats per token | below uniform in | runs | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    counts = {BEST: len(GRID), OTHERS: 2, AGAIN: 2}
    for name in runs[0]:
        found = np.array([run[name].test_loss for run in runs])
        below = sum(run[name].test_loss < run["uniform"].test_loss for run in runs)
        lines.append(
            f"| {name} | {found.mean():.3f} ± {found.std():.3f} | "
            f"{'' if name == 'uniform' else f'{below} of {len(runs)}'} | "
            f"{counts.get(name, 1)} | {np.mean([run[name].seconds for run in runs]):.0f} |"
        )
    return "\n".join(lines)


def learned(runs: list[dict[str, Result]]) -> str:
    """The final hyperparameters, means over the seeds."""
    found = [run[TUNED].tuned for run in runs]
    mean = lambda of: np.mean([np.asarray(of(x)) for x in found], axis=0)
    lines = [
        f"| | {' | '.join(DOMAINS)} |",
        "| --- |" + " --- |" * len(DOMAINS),
        "| share | " + " | ".join(f"{x:.2f}" for x in mean(shares_of)) + " |",
        "| label smoothing | " + " | ".join(f"{x:.3f}" for x in mean(smoothing_of)) + " |",
    ]
    rate, decay = mean(lambda x: jnp.exp(x.log_rate)), mean(lambda x: jnp.exp(x.log_decay))
    return "\n".join(lines) + f"\n\nlearning rate x {rate:.2f}, weight decay {decay:.4f}"


def picture(runs: list[dict[str, Result]], trainer: Trainer, path: Path) -> None:
    """The shares during training, and each seed's loss relative to uniform shares."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shares = np.mean([run[TUNED].shares for run in runs], axis=0)
    steps = np.linspace(0, trainer.steps, len(shares))
    for i, name in enumerate(DOMAINS):
        left.plot(steps, shares[:, i], label=name)
    left.set(xlabel="training step", ylabel="share in the loss", ylim=(0, None))
    left.legend(frameon=False)
    names = [name for name in runs[0] if name != "uniform"][::-1]
    for i, name in enumerate(names):
        gains = [run["uniform"].test_loss - run[name].test_loss for run in runs]
        right.plot(gains, np.full(len(gains), i), "o", alpha=0.6, color="tab:blue")
        right.plot(np.mean(gains), i, "|", markersize=20, color="tab:red")
    right.axvline(0, color="0.6", lw=1)
    right.set(xlabel="test loss below uniform shares", yticks=range(len(names)))
    right.set_yticklabels(names, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Result]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default 5)")
    parser.add_argument("--steps", type=int, default=160, help="per training (default 160)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--quick", action="store_true", help="1 seed, 10 steps, two rows")
    parser.add_argument("--output", type=Path, default=Path("out/language_model_mixture.png"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps = 1, 10
        # Optimizing a program that runs for seconds takes longer than running it.
        jax.config.update("jax_disable_most_optimizations", True)
    if options.seeds < 1 or options.steps < 10 or options.steps % 5:
        parser.error("--seeds must be at least 1, --steps a multiple of 5 and at least 10")

    started = time.perf_counter()
    tokens = tokenized(texts(TARGET_SIZE if options.quick else SIZE))
    sizes = ", ".join(f"{name} {len(x):,}" for name, x in zip(DOMAINS, tokens, strict=True))
    print(f"tokens: {sizes}; {options.steps} steps of {ROWS * LENGTH} tokens")
    trainer = Trainer.of(options.steps, options.bfloat16)
    runs = [all_rows(trainer, tokens, seed, options.quick) for seed in range(options.seeds)]
    print(f"\nmean ± standard deviation over {options.seeds} seed(s)\n\n{table(runs)}")
    print(f"\n{learned(runs)}")
    picture(runs, trainer, options.output)
    print(f"\npicture in {options.output}; {time.perf_counter() - started:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
