"""Against bergson: the same scores of training examples, their ranking, time and memory.

bergson (EleutherAI) attributes a network's behaviour to its training examples, in PyTorch. Its
MAGIC is exact: it keeps checkpoints of a training in a directory, and goes back through every step
for each query. `replay` computes the same; both are checked against retraining without some
examples.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gradhpo
from benchmarks.intervals import with_interval
from benchmarks.peers import attributed
from benchmarks.peers.attributed import EXAMPLES, LOSSES, OPTIMIZERS, QUERIES, SIZES
from benchmarks.peers.environment import PeerError, Worker
from benchmarks.rows import Kept, Row, measured, taken


THEIRS = ("attribution_bergson.py", ("bergson==2.5.1", "torch==2.14.1", "numpy==2.4.6"))
OURS: tuple[str, tuple[str, ...]] = ("attribution_gradhpo.py", ())
# One thread each: on a busy machine, two threads would measure their wait for each other.
ONE_THREAD = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
RETRAININGS, LEFT_OUT = 100, 0.05
SAME = 1e-5  # largest relative difference in float64 that counts as the same number
REPLAY = "gradhpo: replay"
PROGRAMS = {
    REPLAY: (OURS, "replay"),
    "gradhpo: UnrolledOptimizer": (OURS, "unrolled"),
    "jax.vjp, checkpointed scan": (OURS, "jax"),
    "bergson: MAGIC": (THEIRS, "magic"),
}
ONE_QUERY_ALONE = {"gradhpo: UnrolledOptimizer"}
NUMBERS = [{"what": "numbers", "size": "small", "optimizer": x, "queries": 0} for x in OPTIMIZERS]
COSTS = [
    {"what": "cost", "size": size, "optimizer": optimizer, "queries": queries}
    for size, optimizer, queries in (
        ("small", "SGD", 1), ("small", "SGD", QUERIES), ("large", "SGD", 1)
    )
]  # fmt: skip


@contextlib.contextmanager
def opened(program: tuple[str, tuple[str, ...]], size: str, dtype: str) -> Iterator[Worker]:
    x64 = {"JAX_ENABLE_X64": "1"} if dtype == "float64" else {}
    with (
        tempfile.TemporaryDirectory() as directory,
        Worker(*program, **ONE_THREAD, **x64) as worker,
    ):
        path = Path(directory) / "problem.npz"
        attributed.write_problem(path, SIZES[size])
        worker.ask("start", path=str(path), dtype=dtype)
        yield worker


def numbers(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Differences from `replay` in float64, and scores against the same training runs."""
    size, optimizer = setting["size"], setting["optimizer"]
    found: dict[str, np.ndarray] = {}
    with opened(OURS, size, "float64") as ours, opened(THEIRS, size, "float64") as theirs:
        for name, (program, method) in PROGRAMS.items():
            worker = ours if program is OURS else theirs
            one = worker.ask("result", method=method, optimizer=optimizer, queries=False)
            found[name] = np.array(one)
        of_queries = {
            name: np.reshape(
                theirs.ask("result", method=method, optimizer=optimizer, queries=True),
                (QUERIES, EXAMPLES),
            )
            for name, method in {"bergson: MAGIC": "magic", "bergson: cosine": "cosine"}.items()
        }
    truth = found.pop(REPLAY)
    norm = np.linalg.norm
    off = {name: float(norm(x - truth) / norm(truth)) for name, x in found.items()}
    # Written so that NaN fails.
    if not all(x <= SAME for x in off.values()):
        raise PeerError(f"another number: {off}")
    return {"off": off, **scored(size, optimizer, of_queries)}


def scored(size: str, optimizer: str, hypergradients: dict[str, np.ndarray]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "problem.npz"
        attributed.write_problem(path, SIZES[size])
        problem = attributed.load(path, "float32")
    exact = attributed.unrolled_optimizer(problem, optimizer)
    report = gradhpo.retraining_score(
        {"gradhpo": exact} | {name: np.float32(x) for name, x in hypergradients.items()},
        exact.init(problem.params, problem.weights),
        problem.data,
        problem.queries,
        LOSSES,
        num_steps=problem.steps,
        perturb=gradhpo.leave_out(LEFT_OUT),
        num_retrainings=RETRAININGS,
        key=jax.random.key(0),
        progress=False,
    )
    return {
        "score": {name: float(x) for name, x in report.score.items()},
        "per_query": {name: np.asarray(x).tolist() for name, x in report.per_query.items()},
        "interval": {name: np.asarray(x).tolist() for name, x in report.interval.items()},
    }


def cost(setting: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Alternating CPU seconds, and memory of each process before and at its peak.

    In wall-clock time, a busy machine slows long programs down more than short ones.
    """
    many = setting["queries"] > 1
    request = {"optimizer": setting["optimizer"], "queries": many}
    methods = {k: v for k, v in PROGRAMS.items() if not (many and k in ONE_QUERY_ALONE)}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    before, peak = {}, {}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(opened(program, setting["size"], "float32"))
            for name, (program, _) in methods.items()
        }
        for name, worker in workers.items():
            before[name] = worker.ask("memory", method="nothing")
        for i in range(repeats):
            for name in list(methods)[:: 1 if i % 2 else -1]:
                asked = {"method": methods[name][1], **request}
                seconds[name].append(workers[name].ask("processor", **asked))
        for name, worker in workers.items():
            peak[name] = worker.ask("memory", method=methods[name][1], **request)
    return {"seconds": seconds, "before": before, "peak": peak}


def row(setting: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """The measurements, or why bergson cannot be measured."""
    try:
        return numbers(setting) if setting["what"] == "numbers" else cost(setting, repeats)
    except PeerError as error:
        return {"failed": str(error)}


def print_bergson(quick: bool = False, file: Path | Kept | None = None) -> None:
    print(
        f"\nA weight for each of {EXAMPLES:,} examples of digits, through whole training runs, "
        "on one thread: bergson, gradhpo, and\n`jax.vjp` of a hand-written scan, segments and "
        "steps under `jax.checkpoint`. MLP with tanh, three\ntenths of the labels wrong"
    )
    for name, (width, steps, batch) in SIZES.items():
        print(f"  {name}: 64-{width}-{width}-10, {steps} steps with batches of {batch}")
    print(f"With {', '.join(THEIRS[1])}")
    settings = [NUMBERS[0], COSTS[0]] if quick else NUMBERS + COSTS
    rows = measured(settings, lambda setting: row(setting, 1 if quick else 3), file)
    print_numbers([x for x in rows if x["what"] == "numbers"])
    print_costs([x for x in rows if x["what"] == "cost"])
    print(f"\n{taken(rows)}")


def print_numbers(rows: list[Row]) -> None:
    print(
        f"\nSmall: relative difference from gradhpo's replay, float64, query: mean of {QUERIES} "
        f"validation examples;\nand score: rank correlation with the changes of {RETRAININGS} "
        f"training runs without {100 * LEFT_OUT:.0f} % of the examples,\nmean of the {QUERIES} "
        "queries with a 95 % t-interval. Cosine: of gradients at the end, not projected"
    )
    for of in rows:
        print(f"  {of['optimizer']}")
        if "failed" in of:
            print(f"    bergson: {of['failed']}")
            continue
        for name, x in of["off"].items():
            print(f"    {name:28} off by {x:.0e}")
        for name, per_query in of["per_query"].items():
            print(f"    {name:28} score {with_interval(per_query)}")


def print_costs(rows: list[Row]) -> None:
    print(
        "\nTraining and hypergradient, float32: median CPU seconds (not wall-clock), alternating, "
        "after a\nfirst call that compiles; relative to gradhpo's replay (lowest to highest of "
        "pairs); MiB of the process\nbefore the first call, and at its peak, including compilation"
    )
    print(f"    {'':28} {'s':>8} {'ratio':>7} {'':17} {'before':>7} {'peak':>7} {'more':>6}")
    for of in rows:
        queries = "a mean of queries" if of["queries"] == 1 else f"{of['queries']} queries"
        print(f"  {of['size']}, {of['optimizer']}, {queries}")
        if "failed" in of:
            print(f"    bergson: {of['failed']}")
            continue
        base = of["seconds"][REPLAY]
        for name, seconds in of["seconds"].items():
            ratios = [a / b for a, b in zip(seconds, base, strict=True)]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            before, peak = of["before"][name], of["peak"][name]
            print(
                f"    {name:28} {statistics.median(seconds):8.3f} {statistics.median(ratios):7.2f}"
                f" {spread:17} {before:7.0f} {peak:7.0f} {peak - before:6.0f}"
            )
