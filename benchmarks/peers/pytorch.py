"""Against PyTorch: the same hypergradients of data cleaning, one process for each library.

Digits, three tenths of the labels wrong, an MLP 64-128-128-10 with relu, one weight for each of
1,000 examples. All start from a file written here. Hypergradients must first agree, in float64 and
in float32. Then they are timed in float32, and the peak memory of a call's arrays is counted by
PyTorch's profiler and by XLA. PyTorch runs eagerly, as these libraries do, without `torch.compile`.
"""

import contextlib
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.peers.environment import PeerError, Worker
from benchmarks.timed import by_turns


STEPS, REPEATS, CALLS = 20, 11, 3
# Largest relative difference from ours in float64 that counts as equal. In float32 Adam loses
# digits: roots of second moments near 0, and bias corrections that optax computes in float32.
SAME = {"float64": 1e-5, "float32": 1e-2}
TORCH = ("torch==2.14.1", "numpy==2.4.6")
# hypertorch is on GitHub only; `hypertorch` and `hypergrad` on the package index are others.
HYPERTORCH = (
    "hypergrad @ https://github.com/prolearner/hypertorch/archive/"
    "6241dfafcf37ddaf14e152ba5e5a3aa7165396d3.zip"
)
OURS: tuple[str, tuple[str, ...]] = ("cleaning_gradhpo.py", ())
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("cleaning_torch.py", TORCH),
    "higher": ("cleaning_higher.py", ("higher==0.2.1", *TORCH)),
    "torchopt": ("cleaning_torchopt.py", ("torchopt==0.7.3", *TORCH)),
    "hypertorch": ("cleaning_hypertorch.py", (*TORCH, HYPERTORCH)),
    # It declares support up to Python 3.10, but runs on later versions.
    "betty": ("cleaning_betty.py", ("betty-ml==0.2.1", "--ignore-requires-python", *TORCH)),
}


class Row(NamedTuple):
    """A method of a peer, and our method that it is compared with."""

    name: str
    peer: str
    method: str
    ours: str
    optimizer: str = "sgd"
    steps: int = STEPS
    exact: bool = True  # otherwise another approximation of the same derivative


UNROLLED = {
    "torch, eager: autograd of loop": ("torch", "unrolled"),
    "torch, eager: each step by hand": ("torch", "reverse"),
    "higher": ("higher", "unrolled"),
    "torchopt": ("torchopt", "unrolled"),
    "hypertorch: reverse_unroll": ("hypertorch", "unrolled"),
    "hypertorch: reverse": ("hypertorch", "reverse"),
    "betty: IterativeProblem": ("betty", "unrolled"),
}
SGD_ALONE = ("hypertorch", "betty")
TABLES = {
    f"exact, {STEPS} steps of SGD with momentum / UnrolledOptimizer": [
        Row(name, *method, "unrolled") for name, method in UNROLLED.items()
    ],
    f"exact, {STEPS} steps of Adam / UnrolledOptimizer": [
        # higher's Adam scales epsilon by the correction of the second moment.
        Row(name, peer, method, "unrolled", "adam", exact=peer != "higher")
        for name, (peer, method) in UNROLLED.items()
        if peer not in SGD_ALONE
    ],
    "one step, exact / OneStepOptimizer": [
        Row("torch, eager: autograd", "torch", "unrolled", "one step", steps=1),
        Row("higher", "higher", "unrolled", "one step", steps=1),
        Row("torchopt", "torchopt", "unrolled", "one step", steps=1),
        Row("hypertorch: reverse_unroll", "hypertorch", "unrolled", "one step", steps=1),
    ],
    "one step, finite differences of DARTS / T1T2Optimizer": [
        Row("torch, eager: by hand", "torch", "darts", "darts", steps=1),
    ],
    f"implicit after {STEPS} steps / ImplicitOptimizer(linear_solver=Neumann(...))": [
        Row("hypertorch: fixed_point, 20", "hypertorch", "neumann", "neumann"),
        Row("betty: neumann, 20 terms", "betty", "neumann", "neumann"),
        Row("betty: darts, for 1 term", "betty", "darts", "identity", exact=False),
    ],
}


def write_problem(path: Path) -> None:
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    order = random.permutation(len(x))
    x, y = x[order] / 16, y[order]
    wrong = random.random(1_000) < 0.3
    arrays = {
        "x": x[:1_000],
        "y": np.where(wrong, random.integers(0, 10, 1_000), y[:1_000]),
        "val_x": x[1_000:1_200],
        "val_y": y[1_000:1_200],
        "log_odds": random.normal(size=1_000),
    }
    for i, (inputs, outputs) in enumerate([(64, 128), (128, 128), (128, 10)]):
        bound = inputs**-0.5
        arrays[f"param{2 * i}"] = random.uniform(-bound, bound, (outputs, inputs))
        arrays[f"param{2 * i + 1}"] = random.uniform(-bound, bound, outputs)
    np.savez(path, **arrays)


class Library:
    """Processes of one library: one in float64, and one in float32."""

    def __init__(
        self, script: str, requirements: tuple[str, ...], path: Path, stack: contextlib.ExitStack
    ) -> None:
        self._precise, self._timed = (
            stack.enter_context(Worker(script, requirements, JAX_PLATFORMS="cpu", **precision))
            for precision in ({"JAX_ENABLE_X64": "1"}, {})
        )
        self.versions = self._timed.versions() if requirements else []
        self._precise.ask("start", path=str(path), dtype="float64")
        self._timed.ask("start", path=str(path), dtype="float32")

    def result(self, dtype: str, **request: Any) -> np.ndarray:
        worker = self._precise if dtype == "float64" else self._timed
        return np.array(worker.ask("result", **request))

    def seconds(self, **request: Any) -> Callable[[], float]:
        return lambda: self._timed.ask("timed", calls=CALLS, **request)

    def mib(self, **request: Any) -> float:
        return self._timed.ask("memory", **request)


def print_row(row: Row, peer: Library, ours: Library) -> None:
    setting = {"optimizer": row.optimizer, "steps": row.steps}
    theirs, own = {"method": row.method, **setting}, {"method": row.ours, **setting}
    truth = ours.result("float64", **own)
    off = lambda result: np.linalg.norm(result - truth) / np.linalg.norm(truth)
    differences = {dtype: off(peer.result(dtype, **theirs)) for dtype in SAME}
    # Written so that NaN fails.
    if row.exact and not all(differences[dtype] <= most for dtype, most in SAME.items()):
        found = ", ".join(f"{x:.0e} in {dtype}" for dtype, x in differences.items())
        raise PeerError(f"another number: off by {found}")
    a, b, ratio, low, high = by_turns(peer.seconds(**theirs), ours.seconds(**own), REPEATS)
    held, failed = "-", ""
    try:
        held = f"{peer.mib(**theirs):.1f}"
    except PeerError as error:  # the times are still shown
        failed = f"\n    memory: {error}"[:100]
    far, near = differences.values()
    print(
        f"  {row.name:32}{far:6.0e}{near:6.0e}{off(ours.result('float32', **own)):6.0e}"
        f" {1e3 * a:7.1f} {1e3 * b:6.1f} {ratio:6.2f}"
        f" ({low:5.2f}-{high:5.2f}) {held:>6} {ours.mib(**own):6.1f}"
        + ("" if row.exact else "  *")
        + failed,
        flush=True,
    )


def print_pytorch() -> None:
    print(
        "\nData cleaning on digits, MLP 64-128-128-10, 1,000 examples, on the CPU:"
        " PyTorch / gradhpo\n"
        "Relative difference of the hypergradients from gradhpo's in float64; ms; peer's time /"
        " gradhpo's\n"
        "(quartiles); memory of arrays in MiB"
    )
    with opened() as (ours, find):
        print_versions(find)
        print(
            f"  {'':32}{'f64':>6}{'f32':>6}{'ours':>6} {'ms':>7} {'ours':>6} {'ratio':>6}"
            f" {'':13} {'MiB':>6} {'ours':>6}"
        )
        for title, rows in TABLES.items():
            print(f" {title}")
            for row in rows:
                try:
                    print_row(row, find(row.peer), ours)
                except PeerError as error:
                    print(f"  {row.name:33}{error}"[:100], flush=True)
            if rows[0].ours == "unrolled":
                print_checkpoints(rows[0].optimizer, ours)
        print("  * another approximation of the same derivative: not the same number")
        try:
            print_growth(find("torch"), ours)
        except PeerError as error:
            print(f"  {error}"[:100])


def print_versions(find: Callable[[str], Library]) -> None:
    """Versions of the installed peers; the rows of a missing one say why."""
    found: list[str] = []
    for name in PEERS:
        with contextlib.suppress(PeerError):
            found += find(name).versions
    listed = ", ".join(dict.fromkeys(found)) or "no peer"
    print(textwrap.fill(f"With {listed}; all eager, without torch.compile", 100))


@contextlib.contextmanager
def opened() -> Iterator[tuple[Library, Callable[[str], Library]]]:
    """Ours, and a function from the name of a peer to its library, which remembers failures."""
    found: dict[str, Library | PeerError] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "problem.npz"
        write_problem(path)

        def find(name: str) -> Library:
            if name not in found:
                try:
                    found[name] = Library(*PEERS[name], path, stack)
                except PeerError as error:
                    found[name] = error
            library = found[name]
            if isinstance(library, PeerError):
                raise library
            return library

        yield Library(*OURS, path, stack), find


SCANNED = "jax.grad, lax.scan with jax.checkpoint"


def print_checkpoints(optimizer: str, ours: Library) -> None:
    """`checkpoints="sqrt"` and a hand-written scan in JAX, against keeping all states."""
    setting = {"optimizer": optimizer, "steps": STEPS}
    kept = {"method": "unrolled", **setting}
    others = {'gradhpo itself, checkpoints="sqrt"': "sqrt", SCANNED: "scanned"}
    for name, method in others.items():
        other = {"method": method, **setting}
        for dtype, most in SAME.items():
            found, truth = (ours.result(dtype, **x) for x in (other, kept))
            assert np.linalg.norm(found - truth) <= most * np.linalg.norm(truth), (name, dtype)
        a, b, ratio, low, high = by_turns(ours.seconds(**other), ours.seconds(**kept), REPEATS)
        print(
            f"  {name:50} {1e3 * a:7.1f} {1e3 * b:6.1f} {ratio:6.2f}"
            f" ({low:5.2f}-{high:5.2f}) {ours.mib(**other):6.1f} {ours.mib(**kept):6.1f}",
            flush=True,
        )


def print_growth(torch: Library, ours: Library) -> None:
    """Memory over the number of steps, in PyTorch and gradhpo."""
    print(" memory in MiB by steps of SGD with momentum" + "".join(f"{t:8}" for t in (20, 40, 80)))
    of = lambda library, method: [
        library.mib(method=method, optimizer="sgd", steps=t) for t in (20, 40, 80)
    ]
    for name, sizes in {
        "torch, eager: autograd of loop": of(torch, "unrolled"),
        "torch, eager: each step by hand": of(torch, "reverse"),
        SCANNED: of(ours, "scanned"),
        "gradhpo": of(ours, "unrolled"),
        'gradhpo, checkpoints="sqrt"': of(ours, "sqrt"),
    }.items():
        print(f"  {name:42}" + "".join(f"{size:8.1f}" for size in sizes))
